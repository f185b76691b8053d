//! Every kind of wrong file that a team may have, and what it is told. What is read is read right:
//! nothing is taken for something else without a word.

mod typed_log;

use std::io::Write as _;

use hypercast_data::check::check;

use self::typed_log::{TypedColumn, TypedLog, Values};
use super::*;

/// What becomes of a file.
enum Fate {
    /// The import ends, with all of these words.
    Refused(&'static [&'static str]),
    /// So many rows are imported, and all of these words are in the report or the check.
    Told(u64, &'static [&'static str]),
    /// Nothing needs to be said. The number of rows, and what the last one says.
    Read(u64, &'static str),
}

use Fate::{Read, Refused, Told};

/// A kind of wrong file.
struct WrongFile {
    kind: &'static str,
    /// The name of the log, from which the mapping's patterns take the ending.
    name: &'static str,
    content: Vec<u8>,
    /// What is replaced in the mapping.
    edit: [&'static str; 2],
    /// The file of items.
    items: &'static str,
    fate: Fate,
}

const MAPPING: &str = r#"
surfaces = ["feed"]
actions = [{ name = "clicked" }]
values = [{ name = "price" }]
tasks = [{ name = "clicked", role = "main", kind = "binary", label = "clicked" }]
[impressions]
files = ["FILES"]
user = "user"
item = "item"
time = "at"
time_unit = "iso"
request_within_s = 1
outcome_delay_s = 60
[[context_features]]
name = "device"
kind = "categorical"
[items]
files = ["items.csv"]
id = "item"
features = [{ name = "weight", kind = "dense" }]
"#;

const HEADER: &str = "user,item,at,clicked,price,device\n";

const GOOD: &str = "1,10,2025-11-24T10:00:00Z,1,2.5,phone\n2,11,2025-11-24T10:01:00Z,0,,tablet\n";

/// The last row of those.
const LAST: &str = "user 2, item 11, 1763978460000 ms, clicked 0 of 1, NaN";

/// The only row of JSON.
const FIRST: &str = "user 1, item 10, 1763978400000 ms, clicked 1 of 1, 1";

/// The last row where there is a third one.
const THIRD: &str = "user 3, item 10, 1763978520000 ms, clicked 1 of 1, 2.5";

/// A row in JSON.
const OBJECT: &str = r#"{"user": {"id": 1}, "item": 10, "at": "2025-11-24T10:00:00Z",
    "clicked": true, "price": 1, "device": "a"}"#;

const ITEMS: &str = "item,weight\n10,1.5\n11,2.5\n";

const SAME: [&str; 2] = ["", ""];

/// A text log of the usual name.
fn csv(kind: &'static str, content: &str, fate: Fate) -> WrongFile {
    file(kind, "log.csv", content.as_bytes(), SAME, fate)
}

fn file(
    kind: &'static str,
    name: &'static str,
    content: &[u8],
    edit: [&'static str; 2],
    fate: Fate,
) -> WrongFile {
    WrongFile { kind, name, content: content.to_vec(), edit, items: ITEMS, fate }
}

/// A log with good rows and this one.
fn row(kind: &'static str, row: &str, fate: Fate) -> WrongFile {
    csv(kind, &format!("{HEADER}{GOOD}{row}\n"), fate)
}

/// The first half of what is `whole`.
fn half(whole: &[u8]) -> Vec<u8> {
    whole[..whole.len() / 2].to_vec()
}

/// A log of many rows.
fn long() -> String {
    let row = |at: u64| {
        format!("{},{},2025-11-24T10:00:00Z,{},0.5,{}\n", at % 7, at % 9, at % 2, mix(at) % 1000)
    };
    HEADER.to_owned() + &(0..4000).map(row).collect::<String>()
}

fn mix(at: u64) -> u64 {
    hypercast_core::hash::mix64(at + 1)
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// Files that are cut, empty, or of another form than their name says.
fn damaged_files() -> Vec<WrongFile> {
    let zst = zstd::encode_all(long().as_bytes(), 1).unwrap();
    let whole = TypedLog::default().written();
    vec![
        file(
            "gzip that is cut",
            "log.csv.gz",
            &half(&gzip(&long())),
            SAME,
            Refused(&["log.csv.gz", "is the file complete?"]),
        ),
        file(
            "Zstandard that is cut",
            "log.csv.zst",
            &half(&zst),
            SAME,
            Refused(&["log.csv.zst", "is the file complete?"]),
        ),
        file(
            "Parquet that is cut",
            "log.parquet",
            &half(&whole),
            SAME,
            Refused(&["log.parquet", "is it a complete Parquet file?"]),
        ),
        csv(
            "text that is cut in a row",
            &format!("{HEADER}{GOOD}3,10,2025-11"),
            Told(2, &["log.csv:4", "3 cells, the header has 6"]),
        ),
        csv("an empty file", "", Refused(&["log.csv", "the file is empty"])),
        csv("a header alone", HEADER, Refused(&["log.csv", "a header and no rows"])),
        file(
            "gzip without the ending",
            "log.csv",
            &gzip(&format!("{HEADER}{GOOD}")),
            SAME,
            Read(2, LAST),
        ),
        file(
            "Parquet called CSV",
            "log.csv",
            &whole,
            SAME,
            Refused(&["log.csv", "the file is Parquet, not text"]),
        ),
        file(
            "CSV called Parquet",
            "log.parquet",
            long().as_bytes(),
            SAME,
            Refused(&["log.parquet", "is it a complete Parquet file?"]),
        ),
        file(
            "CSV called JSON",
            "log.jsonl",
            format!("{HEADER}{GOOD}").as_bytes(),
            SAME,
            Refused(&["none of its 3 rows can be used; line 1", "it is no JSON object"]),
        ),
        csv(
            "JSON called CSV",
            "{\"user\": 1}\n{\"user\": 2}\n",
            Refused(&["log.csv", "column `user` is missing"]),
        ),
        file(
            "a spreadsheet",
            "log.csv",
            b"PK\x03\x04\x14\x00",
            SAME,
            Refused(&["log.csv", "zip archive; unpack it"]),
        ),
        file(
            "UTF-16",
            "log.csv",
            b"\xff\xfeu\x00s\x00",
            SAME,
            Refused(&["log.csv", "UTF-16; convert it to UTF-8"]),
        ),
        file(
            "an ending that says nothing",
            "log.dat",
            HEADER.as_bytes(),
            SAME,
            Refused(&["log.dat", "set `options.format`"]),
        ),
        file(
            "a pattern that meets nothing",
            "log.csv",
            HEADER.as_bytes(),
            ["FILES", "logs/*.csv"],
            Refused(&["logs/*.csv", "no file has this name"]),
        ),
        file(
            "a folder",
            "log.csv",
            HEADER.as_bytes(),
            ["FILES", "."],
            Refused(&["it is a folder: name it as FOLDER/*"]),
        ),
    ]
}

/// Texts whose lines or cells are cut in another way.
fn odd_texts() -> Vec<WrongFile> {
    let all = format!("{HEADER}{GOOD}");
    let latin: Vec<u8> = [all.as_bytes(), b"3,10,2025-11-24T10:02:00Z,1,2.5,T\xe9l\xe9\n"].concat();
    let object = OBJECT.replace('\n', " ") + "\n";
    let is_cut = object.replace(r#"{"id": 1}"#, "1") + "{\"user\": 1, \"item\"\n";
    let marked = format!("\u{feff}\"user\"{}", &all["user".len()..]);
    let once_more = format!("{all}{HEADER}3,10,2025-11-24T10:02:00Z,1,2.5,phone\n");
    vec![
        csv(
            "a column that is missing",
            &all.replacen("clicked", "klicked", 1),
            Refused(&["log.csv", "column `clicked` is missing; the file has user, item, at"]),
        ),
        csv(
            "a column that stands twice",
            &all.replacen("device", "price", 1),
            Refused(&["log.csv", "column `price` stands twice in the header"]),
        ),
        csv(
            "another delimiter",
            &all.replace(',', ";"),
            Refused(&["log.csv", "column `user` is missing (its cells", "between semicolons)"]),
        ),
        row(
            "a row with too few cells",
            "3,10,2025-11-24T10:02:00Z",
            Told(2, &["log.csv:4", "3 cells, the header has 6"]),
        ),
        row(
            "a row with too many cells",
            "3,10,2025-11-24T10:02:00Z,1,2,5,phone",
            Told(2, &["log.csv:4", "7 cells, the header has 6"]),
        ),
        csv("a byte order mark", &format!("\u{feff}{all}"), Read(2, LAST)),
        csv("one before a name in quotes", &marked, Read(2, LAST)),
        csv("lines that end with CR LF", &all.replace('\n', "\r\n"), Read(2, LAST)),
        csv(
            "lines that end with CR",
            &all.replace('\n', "\r"),
            Refused(&["end with CR alone; convert it"]),
        ),
        file("Latin-1", "log.csv", &latin, SAME, Read(3, THIRD)),
        row(
            "a line break in a cell",
            "3,10,2025-11-24T10:02:00Z,1,2.5,\"a\nphone\"",
            Told(2, &["log.csv:4", "a cell cannot have a line break"]),
        ),
        csv(
            "files that were put together",
            &once_more,
            Told(3, &["log.csv:4", "it is the header again; were several files put together?"]),
        ),
        file(
            "a line of JSON that is broken",
            "log.jsonl",
            is_cut.as_bytes(),
            SAME,
            Told(1, &["log.jsonl:2", "it is no JSON object", "at byte"]),
        ),
        file(
            "a JSON array",
            "log.json",
            b"[{\"user\": 1},\n{\"user\": 2}]\n",
            SAME,
            Refused(&["log.json", "it is a JSON array; write an object a line"]),
        ),
        file(
            "JSON inside JSON",
            "log.jsonl",
            object.as_bytes(),
            SAME,
            Refused(&["column `user`: it is an object (its parts are columns"]),
        ),
        file(
            "JSON inside JSON, by its path",
            "log.jsonl",
            object.as_bytes(),
            ["user = \"user\"", "user = \"user.id\""],
            Read(1, FIRST),
        ),
    ]
}

/// Cells that say something else than they seem to.
fn odd_cells() -> Vec<WrongFile> {
    let all = format!("{HEADER}{GOOD}");
    vec![
        csv(
            "times in another unit",
            &all.replace("2025-11-24T10:00:00Z", "1763978400"),
            Told(
                1,
                &[
                    "log.csv:2",
                    "column `at`",
                    "`1763978400` looks like s, not iso; set the unit to \"s\"",
                ],
            ),
        ),
        file(
            "times of two units",
            "log.csv",
            b"user,item,at,clicked,price,device\n1,10,1763978400,1,1,a\n1,10,1763978400000,1,1,a\n",
            ["\"iso\"", "\"s\""],
            Told(1, &["log.csv:3", "looks like ms, not s"]),
        ),
        row(
            "a time that is to come",
            "3,10,2085-11-24T10:02:00Z,1,2.5,phone",
            Told(3, &["column `time_ms`", "still to come, up to 2085"]),
        ),
        row(
            "a time without a zone",
            "3,10,2025-11-24 10:02:00,1,2.5,phone",
            Told(3, &["1 times have no zone and count as UTC"]),
        ),
        row(
            "day and month first",
            "3,10,24/11/2025 10:02,1,2.5,phone",
            Told(2, &["log.csv:4", "column `at`", "`24/11/2025 10:02` is not a time as"]),
        ),
        row("an id that is a float", "3.0,10.0,2025-11-24T10:02:00Z,1,2.5,phone", Read(3, THIRD)),
        row(
            "an id with a fraction",
            "3.5,10,2025-11-24T10:02:00Z,1,2.5,phone",
            Told(
                2,
                &[
                    "log.csv:4",
                    "column `user`",
                    "`3.5` is not a whole number from 0 on; set the ids to \"string\"",
                ],
            ),
        ),
        row(
            "an id below 0",
            "-3,10,2025-11-24T10:02:00Z,1,2.5,phone",
            Told(2, &["column `user`", "`-3` is not a whole number from 0 on"]),
        ),
        row(
            "an id that is missing",
            ",10,2025-11-24T10:02:00Z,1,2.5,phone",
            Told(2, &["log.csv:4", "column `user`: it is missing"]),
        ),
        row(
            "cells that say they are missing",
            "3,10,2025-11-24T10:02:00Z,NULL,N/A,nan",
            Read(3, "user 3, item 10, 1763978520000 ms, clicked 0 of 0, NaN"),
        ),
        row(
            "an infinite number",
            "3,10,2025-11-24T10:02:00Z,1,inf,phone",
            Told(2, &["log.csv:4", "column `price`", "`inf` is not finite"]),
        ),
        row(
            "a number beyond 32 bits",
            "3,10,2025-11-24T10:02:00Z,1,1e300,phone",
            Told(2, &["column `price`", "beyond what 32 bits hold"]),
        ),
        csv(
            "yes and no in words",
            &format!(
                "{HEADER}{}",
                ["yes", "No", "True", "f", "Y", "n"]
                    .map(|word| format!("1,10,2025-11-24T10:00:00Z,{word},1,a\n"))
                    .concat()
            ),
            Told(6, &["say the same"]),
        ),
        row(
            "neither yes nor no",
            "3,10,2025-11-24T10:02:00Z,2,1,phone",
            Told(2, &["log.csv:4", "column `clicked`", "neither true nor false; use `at_least`"]),
        ),
        row(
            "thousands between commas",
            "3,10,2025-11-24T10:02:00Z,1,\"1,234.5\",phone",
            Told(2, &["log.csv:4", "column `price`", "`1,234.5` is not a number"]),
        ),
        csv(
            "rows that stand twice",
            &format!("{all}{GOOD}"),
            Told(4, &["2 rows say the same as earlier ones"]),
        ),
        csv(
            "rows out of order",
            &format!(
                "{HEADER}{}{}",
                &GOOD[GOOD.find('\n').unwrap() + 1..],
                &GOOD[..=GOOD.find('\n').unwrap()]
            ),
            Read(2, LAST),
        ),
    ]
}

/// Parquet of other types than are expected.
fn odd_types() -> Vec<WrongFile> {
    let parquet =
        |kind, content: Vec<u8>, edit, fate| file(kind, "log.parquet", &content, edit, fate);
    let text = TypedColumn::new("STRING", Values::Text(["many", "few"]));
    let decimal = TypedColumn::new("DECIMAL(10,2)", Values::Int64([250, 50]));
    let days = TypedColumn::new("DATE", Values::Int32([20_416, 20_417]));
    let large = TypedColumn::new("INTEGER(64,false)", Values::Int64([1, -1]));
    let seconds = TypedColumn::new("", Values::Int64([1_763_978_400, 1_763_978_460]));
    vec![
        parquet(
            "texts where numbers are wanted",
            TypedLog { price: text, ..TypedLog::default() }.written(),
            SAME,
            Refused(&[
                "none of its 2 rows can be used; line 1, column `price`",
                "`many` is not a number",
            ]),
        ),
        parquet(
            "decimals",
            TypedLog { price: decimal, ..TypedLog::default() }.written(),
            SAME,
            Read(2, "user 2, item 11, 1763978460000 ms, clicked 0 of 1, 0.5"),
        ),
        parquet(
            "days without a time",
            TypedLog { at: days, ..TypedLog::default() }.written(),
            SAME,
            Read(2, "user 2, item 11, 1764028800000 ms, clicked 0 of 1, 0.5"),
        ),
        parquet(
            "ids beyond 2^63",
            TypedLog { user: large, ..TypedLog::default() }.written(),
            SAME,
            Read(2, "user 18446744073709551615, item 11, 1763978460000 ms, clicked 0 of 1, 0.5"),
        ),
        parquet(
            "numbers where timestamps are wanted",
            TypedLog { at: seconds, ..TypedLog::default() }.written(),
            SAME,
            Refused(&["column `at`", "looks like s, not iso; set the unit to \"s\""]),
        ),
        parquet(
            "timestamps where numbers are wanted",
            TypedLog::default().written(),
            ["\"iso\"", "\"ms\""],
            Refused(&["the column has timestamps; set its unit to \"iso\""]),
        ),
        parquet(
            "a column that is missing",
            TypedLog::default().written(),
            ["\"clicked\" }]\nvalues", "\"clicked\", column = \"click\" }]\nvalues"],
            Refused(&[
                "log.parquet",
                "column `click` is missing; the file has user, item, at, clicked",
            ]),
        ),
    ]
}

/// Wrong files of items.
fn odd_items() -> Vec<WrongFile> {
    let items = |kind, items, fate| {
        let log = csv(kind, &format!("{HEADER}{GOOD}"), fate);
        WrongFile { items, ..log }
    };
    vec![
        items(
            "items that stand twice and differ",
            "item,weight\n10,1.5\n11,2.5\n10,7\n",
            Told(2, &["items.csv:4", "`10` has another row that differs; the last counts"]),
        ),
        items("items that stand twice alike", "item,weight\n10,1.5\n11,2\n11,2.0\n", Read(2, LAST)),
        items(
            "items of something else",
            "item,weight\n77,1.5\n78,2.5\n",
            Told(2, &["2 impressions are of items without features", "2 rows (100.0 %) are of"]),
        ),
        items(
            "an infinite feature",
            "item,weight\n10,1.5\n11,-inf\n",
            Told(2, &["items.csv:3", "column `weight`", "is not finite"]),
        ),
    ]
}

/// What an import and a check of its data set say.
fn said(wrong: &WrongFile) -> std::result::Result<Said, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(wrong.name), &wrong.content).unwrap();
    std::fs::write(dir.path().join("items.csv"), wrong.items).unwrap();
    let [from, to] = wrong.edit;
    assert!(MAPPING.contains(from), "{}: {from}", wrong.kind);
    let mapping = MAPPING.replacen(from, to, 1).replace("FILES", wrong.name);
    let (report, data) = import_in(dir.path(), &mapping).map_err(|error| error.to_string())?;
    let mut text = report.to_string();
    check(&data).unwrap().write_findings(&mut text).unwrap();
    let Impression { user, item, time_ms, outcome, .. } = rows(&data).pop().expect("a row");
    let (actions, known, price) = (outcome.actions, outcome.known, outcome.values[0]);
    let last =
        format!("user {user}, item {item}, {time_ms} ms, clicked {actions} of {known}, {price}");
    Ok(Said { rows: report.impressions, last, text })
}

struct Said {
    rows: u64,
    last: String,
    text: String,
}

#[test]
fn each_kind_of_wrong_file_is_refused_or_told_or_read_right() {
    let all = [damaged_files(), odd_texts(), odd_cells(), odd_types(), odd_items()];
    let all: Vec<WrongFile> = all.into_iter().flatten().collect();
    let mut faults = Vec::new();
    for wrong in &all {
        let kind = wrong.kind;
        let said = said(wrong);
        let told = match &said {
            Ok(said) => format!("{} rows, the last: {}; {}", said.rows, said.last, said.text),
            Err(refused) => format!("refused: {refused}"),
        };
        let has = |words: &[&str]| words.iter().all(|word| told.contains(word));
        let is_right = match (&wrong.fate, &said) {
            (Refused(words), Err(_)) => has(words),
            (Told(rows, words), Ok(said)) => said.rows == *rows && has(words),
            (Read(rows, last), Ok(said)) => {
                let is_quiet =
                    ["could not be used", "no zone"].iter().all(|word| !said.text.contains(word));
                said.rows == *rows && said.last == *last && is_quiet
            }
            _ => false,
        };
        println!("{kind} -> {}", told.trim().replace('\n', " | "));
        if !is_right {
            faults.push(format!("{kind}: {told}"));
        }
    }
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), all.len(), faults.join("\n"));
}
