//! Events of one request and its outcomes, in any order.

use hypercast_config::JoinSettings;
use hypercast_data::dataset::ContextFeatures;
use hypercast_data::simulate;
use hypercast_fm::example::Outcome;
use hypercast_stream::events::{ActionEvent, ImpressionEvent};
use serde_json::Value;

use super::*;

const START_MS: i64 = 1_764_000_000_000;

/// A line of the tests: `{"shown": item}`, `{"click": item, "after_s": 5}` or `{"item": id}`.
fn convert(line: &[u8]) -> std::result::Result<ConvertedLine, String> {
    events(line).map(|events| ConvertedLine { events, ..ConvertedLine::default() })
}

fn events(line: &[u8]) -> std::result::Result<Vec<EventKind>, String> {
    let line: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let number = |key: &str| line[key].as_u64();
    let time_ms = START_MS + 1000 * number("after_s").unwrap_or_default() as i64;
    let context = ContextFeatures { ids: vec![3], dense: vec![0.5] };
    if let Some(item) = number("shown") {
        let shown = ImpressionEvent { request: 9, user: 7, item, surface: 1, time_ms, context };
        return Ok(vec![EventKind::Impression(shown)]);
    }
    if let Some(item) = number("click") {
        let outcome = Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN };
        let complete = number("complete").is_some();
        return Ok(vec![EventKind::Action(ActionEvent {
            request: 9,
            item,
            time_ms,
            outcome,
            complete,
        })]);
    }
    let id = number("item").ok_or("neither shown, nor clicked, nor an item")?;
    let content = line["content"].as_array().into_iter().flatten();
    let content = content.map(|number| number.as_f64().unwrap() as f32).collect();
    Ok(vec![EventKind::Item(Item { id, ids: vec![5, 6], dense: vec![0.1], content })])
}

fn imported(lines: &[&str]) -> (Result<ImportReport>, Vec<Impression>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    let into = dir.path().join("data");
    let settings = JoinSettings { first_window_s: 60, ..JoinSettings::default() };
    let report = EventImport {
        files: &[path.to_string_lossy().into_owned()],
        schema: Arc::new(simulate::schema(2)),
        join: JoinerOptions { settings, history_len: 4, max_targets: 16 },
        convert: &convert,
    }
    .run(&into);
    let Ok(data) = Dataset::open(&into) else { return (report, Vec::new(), 0) };
    let rows = data.impressions().unwrap().map(|row| row.unwrap()).collect();
    (report, rows, data.items.len())
}

#[test]
fn outcomes_meet_their_impressions_in_any_order() {
    let (report, rows, items) = imported(&[
        "{\"click\": 2, \"after_s\": 5}",
        "{\"item\": 1}",
        "not an event",
        "{\"shown\": 1}",
        "{\"shown\": 2, \"after_s\": 1}",
        "{\"shown\": 3, \"after_s\": 1}",
        "{\"shown\": 3, \"after_s\": 1}",
        // After the example, within the time of corrections; and without an impression.
        "{\"click\": 3, \"after_s\": 3000}",
        "{\"click\": 8, \"after_s\": 9}",
    ]);
    let report = report.unwrap();
    assert_eq!((report.bad_rows, report.first_bad_rows[0].line), (1, 3), "{report}");
    let told: Vec<_> =
        rows.iter().map(|row| (row.request, row.time_ms, row.item, row.outcome.actions)).collect();
    assert_eq!(told, [(1, START_MS, 1, 0), (1, START_MS, 2, 1), (1, START_MS, 3, 1)]);
    assert!(rows.iter().all(|row| row.user == 7 && row.surface == 1));
    assert_eq!(rows[0].context.dense, [0.5]);
    assert!(rows[2].outcome_ms >= START_MS + 3_000_000, "known only with its correction");
    assert!(rows[0].outcome_ms < START_MS + 3_600_000);
    assert_eq!((report.requests, report.items, items), (1, 3, 3));
    let unused: Vec<_> = report.unused_events.iter().map(|(why, &n)| (why.as_str(), n)).collect();
    let expected = [("actions without an impression", 1), ("impressions that came before", 1)];
    assert_eq!(unused, expected, "{report}");
}

#[test]
fn items_have_their_newest_vectors_which_are_of_one_width() {
    let (report, ..) = imported(&[
        "{\"shown\": 1}",
        "{\"item\": 1, \"content\": [1, 0]}",
        "{\"item\": 2, \"content\": [0, 1]}",
        "{\"item\": 1}",
        "{\"item\": 2, \"content\": [0.6, 0.8]}",
        "{\"item\": 2, \"content\": [1]}",
        "{\"item\": 3}",
    ]);
    let report = report.unwrap();
    assert_eq!((report.items_with_content, report.content_width), (2, 2), "{report}");
    assert_eq!((report.bad_rows, report.first_bad_rows[0].line), (1, 6));
    assert!(report.first_bad_rows[0].reason.contains("1 numbers; the first one has 2"), "{report}");
}

#[test]
fn files_without_an_event_are_refused() {
    let (report, ..) = imported(&["{}", "[]"]);
    let error = report.unwrap_err().to_string();
    assert!(error.contains("none of its 2 rows can be used; line 1"), "{error}");
}
