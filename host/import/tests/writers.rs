//! Parquet by other writers, each with its own types and compression: `files/make.py` made them.

use std::path::Path;

use hypercast_data::dataset::ids::id_key;
use hypercast_data::dataset::{Dataset, Impression};
use hypercast_data::schema::category_id;
use hypercast_import::mapping::{Mapping, import};

const MAPPING: &str = r#"
surfaces = ["feed"]
ids = { users = "string" }
actions = [{ name = "click", column = "clicked" }]
values = [{ name = "revenue" }]
tasks = [{ name = "click", role = "main", kind = "binary", label = "click" }]

[[context_features]]
name = "tag"
kind = "categorical"
column = "tags"
list = "first"

[[context_features]]
name = "stock"
kind = "dense"

[[context_features]]
name = "position"
kind = "dense"
column = "page.position"

[impressions]
files = ["FILE"]
user = "customer"
item = "sku"
time = "shown_at"
time_unit = "iso"
request_within_s = 0
outcome_delay_s = 60
"#;

fn imported(file: &str) -> Vec<Impression> {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(file);
    let mapping = dir.path().join("mapping.toml");
    std::fs::write(&mapping, MAPPING.replace("FILE", &path.to_string_lossy())).unwrap();
    let into = dir.path().join("data");
    let report = import(&Mapping::load(&mapping).unwrap(), None, &into).unwrap();
    assert_eq!(report.bad_rows, 0, "{file}: {report}");
    Dataset::open(&into).unwrap().impressions().unwrap().map(|row| row.unwrap()).collect()
}

#[test]
fn files_of_each_writer_say_the_same() {
    for writer in ["duckdb", "pandas", "polars", "pyarrow-int96", "pyarrow-types"] {
        let rows = imported(&format!("{writer}.parquet"));
        let of =
            |read: &dyn Fn(&Impression) -> f32| -> Vec<f32> { rows.iter().map(read).collect() };
        let times = rows.iter().map(|row| row.time_ms - 1_763_978_400_250).collect::<Vec<_>>();
        assert_eq!(times, [0, 1000, 2000, 3000, 4000], "{writer}");
        let users = rows.iter().map(|row| row.user);
        assert!(users.eq(["u-1", "u-2", "u-1", "u-3", "u-2"].map(|id| id_key(id).key)), "{writer}");
        assert!(rows.iter().map(|row| row.item).eq([7, 8, 9, 7, 8]), "{writer}");
        let clicked = rows.iter().map(|row| (row.outcome.known, row.outcome.actions));
        assert!(clicked.eq([(1, 1), (1, 0), (0, 0), (1, 1), (1, 0)]), "{writer}");
        let revenue = of(&|row| row.outcome.values[0]);
        assert_eq!([revenue[0], revenue[2], revenue[4]], [12.5, 0.25, 3.0], "{writer}");
        assert!(revenue[1].is_nan() && revenue[3].is_nan(), "{writer}");
        // A missing number as -1, which no number of the files is.
        let known = |at: usize| {
            of(&|row| Some(row.context.dense[at]).filter(|number| !number.is_nan()).unwrap_or(-1.0))
        };
        assert_eq!(known(0), [3.0, -1.0, 5.0, 0.0, 1.0], "{writer}");
        assert_eq!(known(1), [1.0, -1.0, 3.0, -1.0, 5.0], "{writer}");
        let tags = rows.iter().map(|row| row.context.ids[0]);
        assert!(tags.eq(["new", "", "", "sale", "red"].map(category_id)), "{writer}");
    }
}
