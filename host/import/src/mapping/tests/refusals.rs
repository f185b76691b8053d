//! Files and mappings that are wrong: each is refused or told, with where and what to do.

use super::*;

/// The shop in CSV after `change`d files, and what its import says.
fn refused(change: impl FnOnce(&Path), edit: impl FnOnce(String) -> String) -> String {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path(), "csv");
    change(dir.path());
    import_in(dir.path(), &edit(mapping("csv"))).unwrap_err().to_string()
}

/// What the import of a shop with one log, of these lines, reports.
fn reported(log: &str, edit: impl FnOnce(String) -> String) -> ImportReport {
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path(), "csv");
    std::fs::remove_file(dir.path().join("log-1.csv")).unwrap();
    std::fs::write(dir.path().join("log-0.csv"), log).unwrap();
    let (report, _) = import_in(dir.path(), &edit(mapping("csv"))).unwrap();
    report
}

const HEADER: &str = "customer,sku,placement,shown_at,request_id,clicked,revenue,position\n";

fn same(text: String) -> String {
    text
}

#[test]
fn wrong_mappings_are_refused_by_name() {
    for (from, to, reason) in [
        ("request = \"request_id\"", "", "nothing says which rows are one request"),
        ("outcome_delay_s = 1800", "", "nothing says when an outcome was known"),
        ("outcome_delay_s = 1800", "outcome_delay_s = -1", "outcome_delay_s is no number"),
        ("surface = \"placement\"", "", "name the column `surface`"),
        ("pdp = \"product\"", "pdp = \"prod\"", "no surface is called `prod`"),
        ("time_unit = \"iso\"", "time_unit = \"minutes\"", "unknown variant `minutes`"),
        ("at_least = 0.01", "at_least = 1\none_of = [\"a\"]", "it has one_of beside at_least"),
        ("label = \"click\"", "label = \"buy\"", "no label is called `buy`"),
        ("item = \"sku\"", "item = \"sku\"\ncolour = 1", "unknown field `colour`"),
        ("id = \"customer\"", "id = \"customer\"\nname = \"x\"", "only items have a `name`"),
        ("default = 9", "default = \"last\"", "its default `last` is not a number"),
        ("outcome_delay_s = 1800", "outcome_delay_s = 1800\nrequest_rows = 0", "request_rows is 0"),
        ("default = 9", "clip = [9, 1]", "9 to 1 are not two numbers, lower first"),
        ("default = 9", "separator = \",\"", "`separator` is for a list"),
        ("log-*.csv", "logs/*.csv", "no file has this name"),
        ("log-*.csv", "log-[.csv", "not a pattern"),
        ("item = \"sku\"", "item = \"product\"", "column `product` is missing; the file has cust"),
    ] {
        let error = refused(
            |_| {},
            |text| {
                assert!(text.contains(from), "{from}");
                text.replacen(from, to, 1)
            },
        );
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

#[test]
fn wrong_files_are_refused_with_what_they_are() {
    let put = |name: &'static str, content: &'static [u8]| {
        move |dir: &Path| std::fs::write(dir.join(name), content).unwrap()
    };
    for (name, content, reason) in [
        ("log-2.csv", &b"PK\x03\x04"[..], "zip archive"),
        ("log-2.csv", b"PAR1", "Parquet, not text"),
        ("log-2.csv", b"", "the file is empty"),
        ("log-2.csv", b"customer;sku\n1;2\n", "between semicolons"),
        ("log-2.csv", b"\x1f\x8b\x08\x00", "log-2.csv"),
        ("log-2.csv", b"\xff\xfec\x00", "UTF-16"),
    ] {
        let error = refused(put(name, content), same);
        assert!(error.contains(reason) && error.contains(name), "{reason}: {error}");
    }
    let all = |text: String| text.replace("log-*.csv", "log-*.*");
    let error = refused(put("log-2.parquet", b"PAR1 and no more"), all);
    assert!(error.contains("is it a complete Parquet file?"), "{error}");
    let error = refused(put("log-2.xlsx", b"x"), all);
    assert!(error.contains("set `options.format`"), "{error}");
    let error = refused(put("log-2.jsonl", b"{\"sku\": 1}\n{\"sku\": 2}\n"), all);
    assert!(error.contains("column `customer` is in no row; the first row has sku"), "{error}");
    let error = refused(put("log-2.jsonl", b"{\"sku\": 1\n[2]\n"), all);
    assert!(error.contains("none of its 2 rows can be used; line 1"), "{error}");
    let error = refused(put("log-2.jsonl", b"\n"), all);
    assert!(error.contains("a JSON object a line"), "{error}");
    let cut = |dir: &Path| {
        write_parquet(dir);
        let path = dir.join("log-0.parquet");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    };
    let error = refused(cut, all);
    assert!(error.contains("log-0.parquet"), "{error}");
}

#[test]
fn times_in_another_unit_are_refused_with_the_one_they_look_like() {
    let log = format!("{HEADER}u,SKU-1,search,1764000000000,1,1,,\n");
    let change = |dir: &Path| {
        std::fs::remove_file(dir.join("log-1.csv")).unwrap();
        std::fs::write(dir.join("log-0.csv"), log).unwrap();
    };
    let error = refused(change, |text| text.replace("\"iso\"", "\"s\""));
    assert!(error.contains("log-0.csv") && error.contains("line 2, column `shown_at`"), "{error}");
    assert!(error.contains("looks like ms, not s; set the unit to \"ms\""), "{error}");
}

#[test]
fn bad_rows_are_left_out_and_told_with_their_place() {
    let good = "u,SKU-1,search,2025-11-24T10:00:00Z,1,1,,\n";
    let mut log = format!("{HEADER}{good}");
    for bad in [
        ",SKU-1,search,2025-11-24T10:00:00Z,1,1,,\n",
        "u,SKU-1,cellar,2025-11-24T10:00:00Z,1,1,,\n",
        "u,SKU-1,search,24.11.2025,1,1,,\n",
        "u,SKU-1,search,2025-11-24T10:00:00Z,,1,,\n",
        "u,SKU-1,search,2025-11-24T10:00:00Z,1,perhaps,,\n",
        "u,SKU-1,search,2025-11-24T10:00:00Z,1,1,ten,\n",
        "u,SKU-1,search\n",
        "u,\"SKU-1,search,2025-11-24T10:00:00Z,1,1,,\n",
    ] {
        log += bad;
    }
    log += &"u,SKU-1,attic,2025-11-24T10:00:00Z,1,1,,\n".repeat(2_000);
    let report = reported(&log, same);
    assert_eq!((report.impressions, report.bad_rows), (1, 2_008));
    let columns: Vec<&str> = report.first_bad_rows.iter().map(|bad| bad.column.as_str()).collect();
    let expected =
        ["customer", "placement", "shown_at", "request_id", "clicked", "revenue", "(all)", "(all)"];
    assert_eq!(columns[..8], expected);
    assert_eq!(report.first_bad_rows[1].line, 4);
    assert_eq!(report.first_bad_rows.len(), 1000, "the list is bounded");
    let surfaces: Vec<_> = report
        .bad_rows_by_reason
        .iter()
        .filter(|(reason, _)| reason.contains("placement"))
        .collect();
    assert_eq!(surfaces.len(), 1, "a reason does not name what was in the cell: {surfaces:?}");
    assert_eq!(*surfaces[0].1, 2_001);
    let text = report.to_string();
    assert!(text.contains("log-0.csv:3: column `customer`: it is missing"), "{text}");
    assert!(text.contains("2001 x placement: _ is no surface; add it to"), "{text}");
}

#[test]
fn what_does_not_fit_together_is_told() {
    let log = format!(
        "{HEADER}nobody,SKU-1,search,2025-11-24T10:00:00Z,1,1,,\n\
         nobody,SKU-1,search,2025-11-24T10:00:00Z,1,1,,\n\
         nobody,SKU-99,search,2025-11-24T10:00:00Z,1,0,,\n"
    );
    let report = reported(&log, same);
    assert_eq!((report.repeated, report.of_unknown_items, report.of_unknown_users), (1, 1, 3));
    let text = report.to_string();
    assert!(text.contains("1 impressions are of items without features"), "{text}");
    let early = format!("{HEADER}u,SKU-1,search,2025-11-24T10:00:00Z,1,1,,2025-11-24T09:00:00Z\n");
    let late = early.clone() + "u,SKU-1,search,2025-11-24T10:00:00Z,1,1,,2025-11-24T11:00:00Z\n";
    let timed = |text: String| {
        let context = "[[context_features]]\nname = \"position\"\nkind = \"dense\"\ndefault = 9\n";
        text.replace("outcome_delay_s = 1800", "outcome_time = \"position\"").replace(context, "")
    };
    let report = reported(&late, timed);
    assert!(report.first_bad_rows[0].reason.contains("is before the impression"), "{report}");
    assert_eq!(report.impressions, 1);
}

#[test]
fn ids_that_are_no_numbers_say_what_to_do() {
    let error = refused(|_| {}, |text| text.replace("items = \"string\"", "items = \"integer\""));
    assert!(error.contains("`SKU-0` is not a whole number from 0 on"), "{error}");
    assert!(error.contains("set the ids to \"string\""), "{error}");
}

#[test]
fn a_list_is_refused_where_nothing_says_what_is_taken_of_it() {
    let dir = tempfile::tempdir().unwrap();
    write_parquet(dir.path());
    let position = "name = \"position\"\nkind = \"dense\"\ndefault = 9";
    let mapping = mapping("parquet");
    assert!(mapping.contains(position));
    let tags = "name = \"tags\"\nkind = \"categorical\"";
    let error = import_in(dir.path(), &mapping.replace(position, tags)).unwrap_err().to_string();
    assert!(error.contains("column `tags`: it is a list, not a text"), "{error}");
    assert!(error.contains("`list = \"first\"`"), "{error}");
    let first = format!("{tags}\nlist = \"first\"");
    let (_, data) = import_in(dir.path(), &mapping.replace(position, &first)).unwrap();
    let new = rows(&data).iter().filter(|row| row.context.ids == [category_id("new")]).count();
    // One row in four of each row group, of which two have 50 rows.
    assert_eq!(new, 5 * 25 + 2 * 12);
}
