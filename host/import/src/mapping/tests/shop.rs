//! A small shop: 200 requests of 30 users with UUIDs on three placements, three of 40 items each,
//! in files of any format.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use chrono::DateTime;
use hypercast_core::hash::{mix_parts, mix64};
use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::json;

const PLACEMENTS: [&str; 3] = ["home-top", "search", "pdp"];

/// An item that was shown, and what came of it.
#[derive(Debug, Clone)]
pub(crate) struct ShopEvent {
    pub(super) user: String,
    pub(super) sku: String,
    pub(super) surface: u16,
    pub(super) request: u64,
    pub(super) request_ms: i64,
    pub(super) time_ms: i64,
    pub(super) clicked: bool,
    pub(super) revenue: Option<f64>,
    pub(super) position: Option<i64>,
}

/// The mapping of files with an ending.
pub(crate) fn mapping(ending: &str) -> String {
    format!(
        r#"
surfaces = ["home", "search", "product"]

[ids]
users = "string"
items = "string"

[impressions]
files = ["log-*.{ending}"]
user = "customer"
item = "sku"
surface = "placement"
surface_map = {{ home-top = "home", pdp = "product" }}
time = "shown_at"
time_unit = "iso"
request = "request_id"
outcome_delay_s = 1800

[[actions]]
name = "click"
column = "clicked"

[[actions]]
name = "purchase"
column = "revenue"
at_least = 0.01
default = false

[[values]]
name = "revenue"
default = 0
clip = [0, 50]

[[context_features]]
name = "position"
kind = "dense"
default = 9

[items]
files = ["items.{ending}"]
id = "sku"
name = "title"

[[items.features]]
name = "category"
kind = "categorical"
map = {{ Shoes = "shoes" }}

[[items.features]]
name = "brand"
kind = "categorical"

[[items.features]]
name = "price"
kind = "dense"

[users]
files = ["users.{ending}"]
id = "customer"

[[users.features]]
name = "country"
kind = "categorical"

[[tasks]]
name = "click"
role = "main"
kind = "binary"
label = "click"

[[counters]]
name = "item_click"
key = ["item_id"]
action = "click"
"#
    )
}

/// All events, in the order in which files have them: not that of their times.
pub(crate) fn events() -> Vec<ShopEvent> {
    let start_ms = 1_764_000_000_000;
    let mut events: Vec<ShopEvent> = (0..600).map(|at| event(at, start_ms)).collect();
    events.sort_by_key(|event| mix_parts(&[event.request, event.time_ms as u64]));
    events
}

fn event(at: u64, start_ms: i64) -> ShopEvent {
    let (request, place) = (at / 3, at % 3);
    let chance = mix64(at + 1);
    let request_ms = start_ms + request as i64 * 40_000;
    ShopEvent {
        user: user(mix64(request + 1) % 30),
        sku: format!("SKU-{}", (mix64(request + 7) + place) % 40),
        surface: (request % 3) as u16,
        request: 90_000 - request,
        request_ms,
        time_ms: request_ms + place as i64 * 250,
        clicked: chance.is_multiple_of(4),
        revenue: chance.is_multiple_of(8).then_some((chance % 97) as f64 + 0.5),
        position: (chance % 10 != 1).then_some(place as i64 + 1),
    }
}

fn user(number: u64) -> String {
    format!("6f1c{number:04x}-0000-4000-8000-0123456789ab")
}

/// A time as text, with a zone that is not UTC.
fn iso(time_ms: i64) -> String {
    let zone = chrono::FixedOffset::east_opt(3600).unwrap();
    DateTime::from_timestamp_millis(time_ms).unwrap().with_timezone(&zone).to_rfc3339()
}

/// A row of an item: its id, title, category, brand and price.
fn item(number: usize) -> [String; 5] {
    let category = ["Shoes", "hats", "41"][number % 3].to_owned();
    let category = if number == 7 { "Shoes".to_owned() } else { category };
    let price = if number == 3 { String::new() } else { format!("{}", number as f64 * 2.5) };
    let title = format!("Thing, \"no. {number}\"");
    [format!("SKU-{number}"), title, category, format!("brand{}", number % 5), price]
}

const ITEM_COLUMNS: [&str; 5] = ["sku", "title", "category", "brand", "price"];

const LOG_COLUMNS: [&str; 7] =
    ["customer", "sku", "placement", "shown_at", "request_id", "clicked", "revenue"];

fn log_row(event: &ShopEvent) -> Vec<String> {
    vec![
        event.user.clone(),
        event.sku.clone(),
        PLACEMENTS[event.surface as usize].to_owned(),
        iso(event.time_ms),
        event.request.to_string(),
        if event.clicked { "True".to_owned() } else { "False".to_owned() },
        event.revenue.map_or(String::new(), |revenue| revenue.to_string()),
        event.position.map_or("NaN".to_owned(), |position| format!("{position}.0")),
    ]
}

/// Writes the shop's files as text with an ending that says how.
pub(crate) fn write_text(dir: &Path, ending: &str) {
    let columns = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    let header: Vec<String> = columns(&[&LOG_COLUMNS[..], &["position"]].concat());
    let events = events();
    for (part, events) in events.chunks(350).enumerate() {
        let rows = events.iter().map(log_row);
        let rows = std::iter::once(header.clone()).chain(rows);
        write_rows(dir, &format!("log-{part}.{ending}"), rows.collect());
    }
    let items = (0..40).map(|number| item(number).to_vec());
    let items = std::iter::once(columns(&ITEM_COLUMNS)).chain(items);
    write_rows(dir, &format!("items.{ending}"), items.collect());
    let country = |number: u64| ["DE", "NA", "FR"][number as usize % 3].to_owned();
    let users = (0..30).map(|number| vec![user(number), country(number)]);
    let users = std::iter::once(columns(&["customer", "country"])).chain(users);
    write_rows(dir, &format!("users.{ending}"), users.collect());
}

fn write_rows(dir: &Path, name: &str, rows: Vec<Vec<String>>) {
    let quoted = |cell: &String| format!("\"{}\"", cell.replace('"', "\"\""));
    let mut text = String::new();
    for row in &rows {
        if name.contains(".tsv") {
            text += &(row.join("\t") + "\n");
        } else if name.contains(".csv") {
            text += &(row.iter().map(quoted).collect::<Vec<_>>().join(",") + "\r\n");
        } else if row != &rows[0] {
            let value = |cell: &String| match cell.parse::<f64>() {
                _ if cell.is_empty() || cell == "NaN" => json!(null),
                Ok(number) if number.fract() == 0.0 => json!(number as i64),
                Ok(number) => json!(number),
                Err(_) => json!(cell),
            };
            let object: serde_json::Map<_, _> =
                rows[0].iter().cloned().zip(row.iter().map(value)).collect();
            text += &(json!(object).to_string() + "\n");
        }
    }
    fs::write(dir.join(name), compressed(name, text.as_bytes())).unwrap();
}

fn compressed(name: &str, text: &[u8]) -> Vec<u8> {
    match name.rsplit_once('.').unwrap().1 {
        "gz" => {
            let level = flate2::Compression::fast();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        }
        "zst" => zstd::encode_all(text, 1).unwrap(),
        "lz4" => {
            let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        }
        "snappy" => {
            let mut encoder = snap::write::FrameEncoder::new(Vec::new());
            encoder.write_all(text).unwrap();
            encoder.into_inner().unwrap()
        }
        _ => text.to_vec(),
    }
}

/// Writes the shop's files as Parquet with Snappy, dictionaries, nulls and wide numbers, as pandas
/// does by default, and with a column of lists that no mapping reads.
pub(crate) fn write_parquet(dir: &Path) {
    let schema = "message log { optional binary customer (STRING); optional binary sku (STRING);
        optional binary placement (STRING); optional int64 shown_at (TIMESTAMP(MICROS,true));
        optional int64 request_id; required boolean clicked; optional double revenue;
        optional double position;
        optional group tags (LIST) { repeated group list { optional binary element (STRING); } } }";
    let events = events();
    for (part, events) in events.chunks(350).enumerate() {
        let path = dir.join(format!("log-{part}.parquet"));
        write_groups(&path, schema, events, |group, events| {
            texts(group, events.iter().map(|event| Some(event.user.clone())));
            texts(group, events.iter().map(|event| Some(event.sku.clone())));
            let placement = |event: &ShopEvent| PLACEMENTS[event.surface as usize].to_owned();
            texts(group, events.iter().map(|event| Some(placement(event))));
            integers(group, events.iter().map(|event| event.time_ms * 1000));
            integers(group, events.iter().map(|event| event.request as i64));
            let mut column = group.next_column().unwrap().unwrap();
            let clicked: Vec<bool> = events.iter().map(|event| event.clicked).collect();
            column.typed::<BoolType>().write_batch(&clicked, None, None).unwrap();
            column.close().unwrap();
            doubles(group, events.iter().map(|event| event.revenue));
            doubles(group, events.iter().map(|event| event.position.map(|at| at as f64)));
            lists(group, events.len());
        });
    }
    let schema = "message items { optional binary sku (STRING); optional binary title (STRING);
        optional binary category (STRING); optional binary brand (STRING); optional double price; }";
    let items: Vec<[String; 5]> = (0..40).map(item).collect();
    write_groups(&dir.join("items.parquet"), schema, &items, |group, items| {
        (0..4).for_each(|at| texts(group, items.iter().map(|item| Some(item[at].clone()))));
        doubles(group, items.iter().map(|item| item[4].parse().ok()));
    });
    let schema = "message users { optional binary customer (STRING); optional binary country; }";
    let users: Vec<u64> = (0..30).collect();
    write_groups(&dir.join("users.parquet"), schema, &users, |group, users| {
        texts(group, users.iter().map(|&number| Some(user(number))));
        let country = |number: u64| ["DE", "NA", "FR"][number as usize % 3].to_owned();
        texts(group, users.iter().map(|&number| Some(country(number))));
    });
}

type ShopGroup<'a> = SerializedRowGroupWriter<'a, File>;

/// Writes rows in groups of 100.
fn write_groups<T>(
    path: &Path,
    schema: &str,
    rows: &[T],
    write: impl Fn(&mut ShopGroup<'_>, &[T]),
) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(100) {
        let mut group = writer.next_row_group().unwrap();
        write(&mut group, rows);
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn texts(group: &mut ShopGroup<'_>, cells: impl Iterator<Item = Option<String>>) {
    let cells: Vec<Option<String>> = cells.collect();
    let levels: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
    let values: Vec<ByteArray> =
        cells.iter().flatten().map(|text| ByteArray::from(text.as_str())).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
    column.close().unwrap();
}

fn integers(group: &mut ShopGroup<'_>, cells: impl Iterator<Item = i64>) {
    let values: Vec<i64> = cells.collect();
    let levels = vec![1; values.len()];
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&values, Some(&levels), None).unwrap();
    column.close().unwrap();
}

fn doubles(group: &mut ShopGroup<'_>, cells: impl Iterator<Item = Option<f64>>) {
    let cells: Vec<Option<f64>> = cells.collect();
    let levels: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
    let values: Vec<f64> = cells.into_iter().flatten().collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<DoubleType>().write_batch(&values, Some(&levels), None).unwrap();
    column.close().unwrap();
}

/// A null list, an empty one, one of a null, and one of two texts, over and over.
fn lists(group: &mut ShopGroup<'_>, rows: usize) {
    let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows {
        let levels: &[[i16; 2]] = match row % 4 {
            3 => &[[3, 0], [3, 1]],
            kind => &[[kind as i16, 0]],
        };
        definition.extend(levels.iter().map(|[definition, _]| *definition));
        repetition.extend(levels.iter().map(|[_, repetition]| *repetition));
        values.extend(levels.iter().filter(|level| level[0] == 3).map(|_| ByteArray::from("new")));
    }
    let mut column = group.next_column().unwrap().unwrap();
    let writer = column.typed::<ByteArrayType>();
    writer.write_batch(&values, Some(&definition), Some(&repetition)).unwrap();
    column.close().unwrap();
}
