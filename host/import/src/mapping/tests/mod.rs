//! Tests of imports by a mapping, on a small shop.

mod refusals;
pub(crate) mod shop;
mod tags;
mod wrong_files;

use std::collections::HashMap;
use std::path::Path;

use hypercast_data::dataset::ids::{ITEM_IDS, USER_IDS, id_key};
use hypercast_data::dataset::{Dataset, Impression};
use hypercast_data::schema::{IdKind, category_id};

use self::shop::{ShopEvent, events, mapping, write_parquet, write_text};
use super::*;
use crate::report::ImportReport;

/// Imports the shop's files in a folder.
fn import_in(dir: &Path, mapping: &str) -> Result<(ImportReport, Dataset)> {
    let path = dir.join("mapping.toml");
    std::fs::write(&path, mapping).unwrap();
    let report = import(&Mapping::load(&path)?, None, &dir.join("data"))?;
    Ok((report, Dataset::open(&dir.join("data"))?))
}

fn rows(data: &Dataset) -> Vec<Impression> {
    data.impressions().unwrap().map(|row| row.unwrap()).collect()
}

/// All of a data set, as text that also compares NaN.
fn told(data: &Dataset) -> String {
    let mut items: Vec<_> = data.items.values().collect();
    items.sort_by_key(|item| item.id);
    let mut users: Vec<_> = data.users.values().collect();
    users.sort_by_key(|user| user.id);
    let mut names: Vec<_> = data.item_names.iter().collect();
    names.sort();
    format!("{:?} {items:?} {users:?} {names:?} {:?}", data.schema, rows(data))
}

#[test]
fn a_shop_in_csv_becomes_a_data_set() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path(), "csv");
    let (report, data) = import_in(dir.path(), &mapping("csv")).unwrap();
    assert_eq!((report.bad_rows, report.impressions, report.items, report.users), (0, 600, 40, 30));
    assert_eq!((report.requests, report.repeated), (200, 0));
    assert_eq!((report.of_unknown_items, report.of_unknown_users), (0, 0));
    assert_eq!(data.schema.surfaces, ["home", "search", "product"]);
    assert_eq!((data.schema.ids.users, data.schema.ids.items), (IdKind::String, IdKind::String));
    let rows = rows(&data);
    assert!(rows.is_sorted_by_key(|row| (row.time_ms, row.request)));
    let by_place = |event: &ShopEvent| (event.request_ms, id_key(&event.sku).key);
    let mut events: HashMap<_, _> =
        events().into_iter().map(|event| (by_place(&event), event)).collect();
    for row in &rows {
        let event = events.remove(&(row.time_ms, row.item)).expect("an event of this row");
        assert_eq!(row.user, id_key(&event.user).key);
        assert_eq!(row.outcome_ms, event.time_ms + 1_800_000);
        assert_eq!(row.surface, event.surface);
        let bits = u64::from(event.clicked) | u64::from(event.revenue.is_some()) << 1;
        assert_eq!((row.outcome.actions, row.outcome.known), (bits, 0b11));
        let revenue = event.revenue.map_or(0.0, |revenue| revenue.min(50.0));
        assert_eq!(row.outcome.values[0], revenue as f32);
        assert_eq!(row.context.dense, [event.position.unwrap_or(9) as f32]);
    }
    let item = &data.items[&id_key("SKU-7").key];
    assert_eq!(item.ids, [category_id("shoes"), category_id("brand2")]);
    assert_eq!(item.dense, [17.5]);
    let unpriced = &data.items[&id_key("SKU-3").key];
    assert!(unpriced.dense[0].is_nan(), "an empty cell: {unpriced:?}");
    assert_eq!(data.item_names[&item.id], "Thing, \"no. 7\"");
    let ranges: Vec<_> = data.schema.ranges.iter().map(|range| range.name.as_str()).collect();
    assert_eq!(ranges, ["revenue", "position"], "prices of 40 items say too little");
    let has = |file: &str| dir.path().join("data").join(file).is_file();
    assert!(has(ITEM_IDS) && has(USER_IDS));
}

#[test]
fn every_format_gives_the_same_data_set() {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path(), "csv");
    let (_, data) = import_in(dir.path(), &mapping("csv")).unwrap();
    let expected = told(&data);
    for ending in ["csv.gz", "csv.zst", "tsv", "tsv.lz4", "jsonl", "jsonl.snappy", "parquet"] {
        let dir = tempfile::tempdir().unwrap();
        if ending == "parquet" {
            write_parquet(dir.path());
        } else {
            write_text(dir.path(), ending);
        }
        let (report, data) = import_in(dir.path(), &mapping(ending)).unwrap();
        assert_eq!((report.bad_rows, report.impressions), (0, 600), "{ending}: {report}");
        assert!(told(&data) == expected, "{ending}");
    }
}

/// A mapping of `log.csv` with the columns `u`, `i`, `t` in seconds and `n`, a like. `more` stands
/// among the keys of the top.
fn mapping_of_likes(more: &str, request_within_s: u32) -> String {
    format!(
        r#"
        surfaces = ["feed"]
        actions = [{{ name = "like", column = "n" }}]
        tasks = [{{ name = "like", role = "main", kind = "binary", label = "like" }}]
        {more}
        [impressions]
        files = ["log.csv"]
        user = "u"
        item = "i"
        time = "t"
        time_unit = "s"
        request_within_s = {request_within_s}
        outcome_delay_s = 60
        "#
    )
}

#[test]
fn a_logarithm_is_bounded_as_its_number_is() {
    let dir = tempfile::tempdir().unwrap();
    let log = "u,i,t,n,d\n1,1,1764000000,0,5\n1,2,1764000002,1,20\n2,3,1764000003,1,-3\n\
               2,1,1764000002,0,99999\n";
    std::fs::write(dir.path().join("log.csv"), log).unwrap();
    let mapping = mapping_of_likes(
        r#"context_features = [
            { name = "d", kind = "dense", log = true, clip = [10, 1000], default = 3 },
        ]"#,
        1,
    );
    let (_, data) = import_in(dir.path(), &mapping).unwrap();
    let range = &data.schema.ranges[0];
    let bounds = [10.0_f32, 1000.0].map(f32::ln_1p);
    assert_eq!((range.low, range.high), (bounds[0], bounds[1]));
    let mut stored: Vec<f32> =
        data.impressions().unwrap().map(|row| row.unwrap().context.dense[0]).collect();
    stored.sort_by(f32::total_cmp);
    assert_eq!(stored, [bounds[0], bounds[0], 20.0_f32.ln_1p(), bounds[1]]);
}

#[test]
fn rows_near_each_other_are_a_request_where_nothing_else_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let log = "u,i,t,n\n1,1,1764000000,0\n1,2,1764000002,1\n1,3,1764000003,1\n2,1,1764000002,\n";
    std::fs::write(dir.path().join("log.csv"), log).unwrap();
    let mapping = mapping_of_likes("", 2);
    let (report, data) = import_in(dir.path(), &mapping).unwrap();
    let at =
        |row: &Impression| (row.request, row.time_ms / 1000 - 1_764_000_000, row.user, row.item);
    let rows = rows(&data);
    let told: Vec<_> = rows.iter().map(at).collect();
    assert_eq!(told, [(1, 0, 1, 1), (1, 0, 1, 2), (2, 2, 2, 1), (3, 3, 1, 3)]);
    assert_eq!((rows[2].outcome.known, rows[3].outcome.known), (0, 1), "missing is not known");
    assert_eq!(rows[1].outcome_ms, 1_764_000_062_000, "after its own time");
    assert_eq!(data.items.len(), 3, "items are those of the log");
    assert_eq!((report.items, report.requests), (3, 3));
}

/// The operations guide shows what a mapping may say.
#[test]
fn the_mapping_of_the_guide_is_valid() {
    let guide = include_str!("../../../../README.md");
    let (_, section) = guide.split_once("### A team's own data").expect("the section");
    let (_, block) = section.split_once("```toml\n").expect("a mapping");
    let (block, _) = block.split_once("```").expect("its end");
    let mapping = Mapping::parse(block, Path::new("README.md")).unwrap();
    let schema = mapping.schema().unwrap();
    assert_eq!((schema.surfaces.len(), schema.item_features.len()), (2, 1));
    let of = &mapping.impressions;
    let optional = [&of.surface, &of.surface_default, &of.request, &of.outcome_time];
    assert!(optional.iter().all(|key| key.is_some()) && of.outcome_unit.is_some());
}
