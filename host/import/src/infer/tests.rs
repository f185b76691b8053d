//! What is proposed for the small shop of the mapping's tests.

use std::path::Path;

use hypercast_data::dataset::Dataset;
use hypercast_data::schema::{IdKind, LabelTransform, TaskKind};

use super::*;
use crate::cell::TimeUnit;
use crate::mapping::import;
use crate::mapping::tests::shop::{write_parquet, write_text};

fn options(dir: &Path, ending: &str) -> InferOptions {
    let of = |name: &str| vec![dir.join(format!("{name}.{ending}")).to_string_lossy().into_owned()];
    InferOptions {
        impressions: of("log-*"),
        items: of("items"),
        users: of("users"),
        format: None,
        hints: ColumnHints::default(),
        into: dir.join("mapping.toml"),
    }
}

/// The names of a list's entries.
fn names<T>(entries: &[T], name: impl Fn(&T) -> &String) -> Vec<&str> {
    entries.iter().map(|entry| name(entry).as_str()).collect()
}

#[test]
fn a_shop_is_understood_and_its_mapping_imports_as_it_is() {
    for ending in ["csv", "jsonl", "parquet"] {
        let dir = tempfile::tempdir().unwrap();
        if ending == "parquet" {
            write_parquet(dir.path());
        } else {
            write_text(dir.path(), ending);
        }
        let options = options(dir.path(), ending);
        infer(&options).unwrap();
        let text = std::fs::read_to_string(&options.into).unwrap();
        let mapping = Mapping::load(&options.into).unwrap();
        let of = &mapping.impressions;
        assert_eq!((of.user.as_str(), of.item.as_str()), ("customer", "sku"), "{text}");
        assert_eq!((of.time.as_str(), of.time_unit), ("shown_at", TimeUnit::Iso), "{text}");
        assert_eq!(of.surface.as_deref(), Some("placement"), "{text}");
        assert_eq!((of.request.as_deref(), of.outcome_delay_s), (Some("request_id"), Some(3600.0)));
        assert_eq!(mapping.ids.users, IdKind::String, "{text}");
        let actions = names(&mapping.actions, |action| &action.name);
        assert_eq!(actions, ["clicked", "revenue_above_0"], "{ending}: {text}");
        assert_eq!(names(&mapping.values, |value| &value.name), ["revenue"], "{text}");
        let position = &mapping.context_features[0];
        assert_eq!((position.name.as_str(), position.training_only), ("position", true), "{text}");
        assert!(text.contains("# named as a place in the ranking, so no request"), "{text}");
        let items = mapping.items.as_ref().unwrap();
        assert_eq!((items.id.as_str(), items.name.as_deref()), ("sku", Some("title")), "{text}");
        assert_eq!(names(&items.features, |of| &of.name).len(), 3, "{text}");
        let optional = items.features.iter().filter(|of| of.optional);
        assert!(optional.map(|of| of.name.as_str()).eq(["price"]), "{text}");
        let reason = "optional = true  # 2 % of the cells are missing; models learn from that";
        assert!(text.contains(reason), "{text}");
        let revenue = mapping.tasks.iter().find(|task| task.kind == TaskKind::Regression).unwrap();
        assert_eq!((revenue.weight, revenue.transform), (1.0, LabelTransform::Identity), "{text}");
        assert!(text.contains("# it is above 0 only where `clicked` happened"), "{text}");
        assert!(text.contains("12 % missing"), "{text}");
        let into = dir.path().join("data");
        let report = import(&mapping, None, &into).unwrap();
        assert_eq!((report.bad_rows, report.impressions, report.requests), (0, 600, 200), "{text}");
        let data = Dataset::open(&into).unwrap();
        assert_eq!((data.rows, data.schema.surfaces.len()), (600, 3));
        assert!(data.schema.counters.len() >= 7, "{text}");
    }
}

#[test]
fn what_is_not_found_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let log = "a,b,c,d\n1,9,1764000000,1\n1,8,1764000001,0\n2,9,1764000002,0\n2,7,1764000003,1\n";
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let files = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    let refused = |hints: ColumnHints| {
        infer(&InferOptions { hints, ..files.clone() }).unwrap_err().to_string()
    };
    let name = |name: &str| Some(name.to_owned());
    let error = refused(ColumnHints::default());
    assert!(error.contains("looks like the item; name it with --item, of a, b, c, d"), "{error}");
    let error = refused(ColumnHints { item: name("e"), ..ColumnHints::default() });
    assert!(error.contains("--item: no column is called `e`"), "{error}");
    let hints = ColumnHints { item: name("b"), user: name("a"), ..ColumnHints::default() };
    infer(&InferOptions { hints, ..files.clone() }).unwrap();
    let mapping = Mapping::load(&files.into).unwrap();
    assert_eq!(mapping.impressions.time_unit, TimeUnit::S);
    assert_eq!((mapping.ids.users, mapping.surfaces), (IdKind::Integer, vec!["main".to_owned()]));
    assert!(refused(ColumnHints::default()).contains("may have been corrected"));
}

#[test]
fn a_form_that_no_ending_says_is_named_and_stands_in_the_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let row = |at: u64| format!("{}\t{}\t{}\t{}\n", at % 3, at, 1_764_000_000 + at, at % 2);
    let log = "user\titem\tts\tliked\n".to_owned() + &(0..30).map(row).collect::<String>();
    std::fs::write(dir.path().join("log-0.inter"), log).unwrap();
    let files = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "inter") };
    let error = infer(&files).unwrap_err().to_string();
    assert!(error.contains("`--format` of `data infer`"), "{error}");
    infer(&InferOptions { format: Some(FileFormat::Tsv), ..files.clone() }).unwrap();
    let mapping = Mapping::load(&files.into).unwrap();
    import(&mapping, None, &dir.path().join("data")).unwrap();
    let dataset = Dataset::open(&dir.path().join("data")).unwrap();
    assert_eq!(dataset.rows, 30);
}

#[test]
fn amounts_with_a_long_tail_are_learned_by_their_logarithm() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = "user,item,ts,liked,revenue,seconds\n".to_owned();
    for at in 0..400_u64 {
        let chance = hypercast_core::hash::mix64(at + 1);
        let (share, ms) = ((chance >> 16) % 1000, 1_764_000_000_000_u64 + at * 60_000);
        let liked = share < 250;
        let revenue = if liked { (share as f64 / 25.0).exp() } else { 0.0 };
        let (item, seconds) = (chance % 20, if liked { 1.0 + share as f64 / 100.0 } else { 0.0 });
        log += &format!("{at},{item},{ms},{},{revenue:.2},{seconds:.2}\n", u8::from(liked));
    }
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    infer(&options).unwrap();
    let text = std::fs::read_to_string(&options.into).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    let of = |name: &str| mapping.tasks.iter().find(|task| task.name == name).unwrap().transform;
    assert_eq!(of("revenue"), LabelTransform::Log, "{text}");
    assert_eq!(of("seconds"), LabelTransform::Identity, "{text}");
    assert!(text.contains("# a long tail: 7"), "{text}");
}

#[test]
fn attributes_of_requests_and_items_are_no_actions() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = "user,item,ts,is_mobile,is_new,liked,position\n".to_owned();
    for at in 0..400_u64 {
        let (request, place) = (at / 4, at % 4);
        let chance = hypercast_core::hash::mix64(at + 1);
        let item = chance % 20;
        let (mobile, new) = (request.is_multiple_of(3), item.is_multiple_of(5));
        let liked = (chance >> 8).is_multiple_of(150);
        let (mobile, new, liked) = (u8::from(mobile), u8::from(new), u8::from(liked));
        let ms = 1_764_000_000_000_u64 + request * 60_000;
        log += &format!("{request},{item},{ms},{mobile},{new},{liked},{place}\n");
    }
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    infer(&options).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    assert_eq!(names(&mapping.actions, |action| &action.name), ["liked"]);
    let context = names(&mapping.context_features, |of| &of.name);
    assert_eq!(context, ["position", "is_mobile", "is_new"]);
    assert_eq!(mapping.impressions.time_unit, TimeUnit::Ms);
}

#[test]
fn a_log_with_more_flags_than_there_can_be_actions_has_those_that_names_tell() {
    let dir = tempfile::tempdir().unwrap();
    let flags: String = (0..70).map(|at| format!(",affinity_{at}")).collect();
    let row = |at: u64| {
        let chance = hypercast_core::hash::mix64(at + 1);
        let bit = |bit: u64| hypercast_core::hash::mix_parts(&[at, bit]) & 1;
        let bits: String = (0..71).map(|at| format!(",{}", bit(at))).collect();
        format!("{},{},{}{bits}\n", at % 30, chance % 20, 1_764_000_000_000_u64 + at * 60_000)
    };
    let rows: String = (0..200).map(row).collect();
    let log = format!("user,item,ts,click{flags}\n{rows}");
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    infer(&options).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    assert_eq!(names(&mapping.actions, |action| &action.name), ["click"]);
    assert_eq!(mapping.context_features.len(), 70);
}

#[test]
fn ratings_of_the_nineties_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = "user_id,item_id,rating,timestamp\n".to_owned();
    for at in 0..1000_u64 {
        let chance = hypercast_core::hash::mix64(at + 1);
        // As often as in MovieLens-100K.
        let rating =
            [6, 17, 44, 79, 100].iter().filter(|&&below| chance % 100 >= below).count() + 1;
        let (user, item) = (1 + (chance >> 8) % 40, 700_000_000 + (chance >> 16) % 30);
        log += &format!("{user},{item},{rating},{}\n", 881_250_949 + at * 37);
    }
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    infer(&options).unwrap();
    let text = std::fs::read_to_string(&options.into).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    let of = &mapping.impressions;
    assert_eq!((of.time.as_str(), of.time_unit), ("timestamp", TimeUnit::S), "{text}");
    assert_eq!(of.item, "item_id", "numbers of nine digits are no times by themselves");
    let actions: Vec<_> = mapping.actions.iter().map(|own| (&*own.name, own.at_least)).collect();
    assert_eq!(actions, [("rating_at_least_4", Some(4.0))], "{text}");
    assert_eq!(names(&mapping.values, |value| &value.name), ["rating"], "{text}");
    assert!(text.contains("# of the rows that are rated, at least 1 in 100 %, 2 in 9"), "{text}");
    let report = import(&mapping, None, &dir.path().join("data")).unwrap();
    assert_eq!((report.bad_rows, report.impressions), (0, 1000), "{text}");
    let data = Dataset::open(&dir.path().join("data")).unwrap();
    let times = data.impressions().unwrap().map(|row| row.unwrap().time_ms);
    assert_eq!(times.min(), Some(881_250_949_000));
}

#[test]
fn a_request_is_what_has_one_user_and_one_time() {
    let dir = tempfile::tempdir().unwrap();
    let row = |at: u64| {
        let (view, session) = (at / 3, at / 6);
        let ms = 1_764_000_000_000_u64 + view * 60_000;
        let clicked = u8::from(at.is_multiple_of(7));
        format!("{},{},{ms},s{session},v{view},{clicked}\n", session % 9, at % 20)
    };
    let rows = (0..180).map(row).collect::<String>();
    let log = format!("user,item,ts,visit,view,clicked\n{rows}");
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { items: vec![], users: vec![], ..options(dir.path(), "csv") };
    infer(&options).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    assert_eq!(mapping.impressions.request.as_deref(), Some("view"));
}

#[test]
fn ids_that_are_small_numbers_are_told_apart_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
    let log = |header: &str| {
        let row = |at: u64| {
            let chance = hypercast_core::hash::mix64(at + 1);
            let (user, movie) = (1 + chance % 20, 1 + (chance >> 8) % 30);
            format!(
                "{user},{movie},{},{}\n",
                1_764_000_000 + at,
                u8::from(chance.is_multiple_of(3))
            )
        };
        format!("{header}\n") + &(0..200).map(row).collect::<String>()
    };
    let items = (1..=40).map(|at| format!("{at},genre{},{}\n", at % 4, 1000 - at));
    write("items.csv", "id,genre,popularity\n".to_owned() + &items.collect::<String>());
    let options = InferOptions { users: vec![], ..options(dir.path(), "csv") };
    write("log-0.csv", log("viewer_user,movie,ts,liked"));
    infer(&options).unwrap();
    let mapping = Mapping::load(&options.into).unwrap();
    assert_eq!(
        (mapping.impressions.user.as_str(), mapping.impressions.item.as_str()),
        ("viewer_user", "movie")
    );
    assert_eq!(mapping.items.unwrap().id, "id");
    std::fs::remove_file(&options.into).unwrap();
    write("log-0.csv", log("a,b,ts,liked"));
    let error = infer(&options).unwrap_err().to_string();
    assert!(error.contains("looks like the item; name it with --item"), "{error}");
}

#[test]
fn tags_are_proposed_and_imported_as_several_values() {
    let dir = tempfile::tempdir().unwrap();
    let row = |at: u64| {
        let chance = hypercast_core::hash::mix64(at + 1);
        let (user, item, clicked) = (chance % 20, (chance >> 8) % 40, chance % 3 / 2);
        format!("{user},{item},{},{clicked}\n", 1_764_000_000 + at)
    };
    let tags = |item: u64| {
        let tags = ["new", "sale", "local", "gift", "red"].iter().enumerate();
        let own = tags.filter(|(at, _)| item >> at & 1 == 1);
        own.map(|(_, tag)| *tag).collect::<Vec<&str>>().join(";")
    };
    let items = |column: &str| {
        let rows = (0..40).map(|item| format!("{item},{},{}\n", tags(item), item % 3));
        format!("item,tags,{column}\n") + &rows.collect::<String>()
    };
    let log = "user,item,ts,clicked\n".to_owned() + &(0..300).map(row).collect::<String>();
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let options = InferOptions { users: vec![], ..options(dir.path(), "csv") };
    // Where another feature has the name of one of its columns, it stays one category.
    for (column, expected) in [("shelf", (Some(8), Some(';'))), ("tags_2", (None, None))] {
        let columns = if column == "shelf" { items(column) } else { swapped(&items(column)) };
        std::fs::write(dir.path().join("items.csv"), columns).unwrap();
        infer(&options).unwrap();
        let text = std::fs::read_to_string(&options.into).unwrap();
        let mapping = Mapping::load(&options.into).unwrap();
        let features = &mapping.items.as_ref().unwrap().features;
        let tags = features.iter().find(|feature| feature.name == "tags").unwrap();
        assert_eq!((tags.max_values, tags.separator), expected, "{text}");
        let into = dir.path().join(column);
        import(&mapping, None, &into).unwrap();
        assert!(Dataset::open(&into).unwrap().items.values().any(|item| item.ids[0] > 0));
        std::fs::remove_file(&options.into).unwrap();
    }
}

/// The rows of three cells with the last two in the other order.
fn swapped(rows: &str) -> String {
    let swap = |row: &str| {
        let cells: Vec<&str> = row.split(',').collect();
        format!("{},{},{}\n", cells[0], cells[2], cells[1])
    };
    rows.lines().map(swap).collect()
}
