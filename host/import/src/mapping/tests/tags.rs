//! Features of several values, in files of every form and in events.

use hypercast_data::dataset::table::{CellType, Column, Field, TableWriter};

use super::*;

/// What items have: a list with a repetition and a gap, none, more than fit, and nothing known.
const TAGS: [&[&str]; 4] = [&["vegan", "", "new", "vegan"], &[], &["a", "b", "c", "7", "d"], &[]];

const MAPPING: &str = r#"
    surfaces = ["feed"]
    actions = [{ name = "like" }]
    tasks = [{ name = "like", role = "main", kind = "binary", label = "like" }]
    [impressions]
    files = ["log.csv"]
    user = "user"
    item = "item"
    time = "time"
    time_unit = "s"
    request_within_s = 2
    outcome_delay_s = 60
    [items]
    files = ["ITEMS"]
    id = "item"
    [[items.features]]
    name = "tags"
    kind = "categorical"
    max_values = 3
    separator = "|"
    map = { new = "fresh" }
"#;

const LOG: &str = "user,item,time,like\n1,0,1764000000,0\n1,1,1764000000,1\n1,2,1764000000,0\n";

/// Writes the items in the form that a name ends with.
fn write_items(dir: &Path, name: &str) {
    let path = dir.join(name);
    let lines = TAGS.iter().enumerate();
    match name.rsplit_once('.').unwrap().1 {
        "csv" => {
            let lines = lines.map(|(id, tags)| format!("{id},{}\n", tags.join("|")));
            std::fs::write(path, format!("item,tags\n{}", lines.collect::<String>())).unwrap();
        }
        "jsonl" => {
            let value = |tag: &&str| match tag.parse::<u64>() {
                Ok(number) => serde_json::json!(number),
                Err(_) if tag.is_empty() => serde_json::json!(null),
                Err(_) => serde_json::json!(tag),
            };
            let lines = lines.map(|(id, tags)| {
                let tags = tags.iter().map(value).collect::<Vec<_>>();
                let tags = if id == 3 { serde_json::json!(null) } else { tags.into() };
                format!("{}\n", serde_json::json!({ "item": id, "tags": tags }))
            });
            std::fs::write(path, lines.collect::<String>()).unwrap();
        }
        _ => {
            let fields = [Field::new("item", CellType::U64), Field::list("tags", CellType::Text)];
            let mut writer = TableWriter::create(&path, fields.to_vec()).unwrap();
            let tags = TAGS.iter().copied().flatten().map(|tag| tag.to_string());
            let lists = Column::lists(tags, TAGS.iter().map(|tags| tags.len()));
            writer.write(&[Column::scalars(0..TAGS.len() as u64), lists]).unwrap();
            writer.finish().unwrap();
        }
    }
}

fn imported(name: &str) -> (ImportReport, Dataset) {
    let dir = tempfile::tempdir().unwrap();
    write_items(dir.path(), name);
    std::fs::write(dir.path().join("log.csv"), LOG).unwrap();
    import_in(dir.path(), &MAPPING.replace("ITEMS", name)).unwrap()
}

#[test]
fn tags_are_the_same_in_every_file() {
    for name in ["items.csv", "items.jsonl", "items.parquet"] {
        let (report, data) = imported(name);
        assert_eq!(report.bad_rows, 0, "{name}: {report}");
        assert_eq!(report.cut_values, [("tags".to_owned(), 1)].into(), "{name}");
        assert!(report.to_string().contains("1 rows have more values of `tags`"), "{report}");
        let [a, b, c] = ["a", "b", "c"].map(category_id);
        let (vegan, fresh) = (category_id("vegan"), category_id("fresh"));
        let expected = [[vegan, fresh, 0], [0; 3], [a, b, c], [0; 3]];
        for (id, expected) in expected.into_iter().enumerate() {
            assert_eq!(data.items[&(id as u64)].ids, expected, "item {id} of {name}");
        }
        assert_eq!(data.schema.item_features[0].max_values, Some(3));
    }
}

#[test]
fn wrong_mappings_of_tags_are_refused() {
    for (from, to, reason) in [
        ("separator = \"|\"", "list = \"first\"", "it has `max_values` beside `list`"),
        ("max_values = 3", "", "say with `max_values` or `list`"),
        ("max_values = 3", "max_values = 33", "max_values is 33; it must be 2 to 32"),
        ("\"categorical\"", "\"dense\"", "only a categorical feature has `max_values`"),
    ] {
        let text = MAPPING.replacen(from, to, 1).replace("map = { new = \"fresh\" }", "");
        let error = Mapping::parse(&text, Path::new("mapping.toml")).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}
