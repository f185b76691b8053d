//! Users and items whose ids are strings, by HTTP and by the commands: from events to a ranking, a
//! string whose key another one has, and ids of the wrong form.

use std::{fmt::Write as _, path::Path};

use hypercast_core::prerequisite::skip;
use hypercast_data::dataset::{
    entity_id::TextId,
    id_dictionary::IdDictionary,
    ids::{ITEM_IDS, IdKey, USER_IDS, id_key},
};
use hypercast_tests::{TestDaemon, binary, metric, run, run_well, small_config};
use serde_json::{Value, json};

const SCHEMA: &str = r#"
surfaces = ["home", "search"]
actions = ["click"]
ids = { users = "string", items = "string" }

[[tasks]]
name = "click"
role = "main"
kind = "binary"
label = "click"
"#;

/// The first of the times in the tests.
const START_MS: i64 = 1_764_000_000_000;

/// Imports 200 requests, trains an FM on them, and writes the configuration.
fn train(binary: &Path, dir: &Path) {
    let mut bodies = String::new();
    for request in 0..200_u64 {
        let time_ms = START_MS + request as i64 * 60_000;
        let surface = if request % 2 == 0 { "home" } else { "search" };
        let shown = |at: u64| {
            let item = (request * 7 + at * 11) % 40;
            let clicked = hypercast_core::hash::mix64(request * 3 + at).is_multiple_of(3);
            json!({
                "request": request + 1, "user": format!("user-{}", request % 25),
                "item": format!("sku-{item}"), "surface": surface,
                "time_ms": time_ms, "actions": {"click": clicked},
            })
        };
        let events: Vec<Value> = (0..3).map(shown).collect();
        let _ = writeln!(bodies, "{}", json!({ "events": events }));
    }
    std::fs::write(dir.join("events.jsonl"), bodies).unwrap();
    std::fs::write(dir.join("own.toml"), SCHEMA).unwrap();
    small_config().write(&dir.join("hypercast.toml")).unwrap();
    let import = ["data", "import", "--events", "events.jsonl", "--schema", "own.toml", "--into"];
    let said = run_well(binary, dir, &[&import[..], &["data"]].concat());
    assert!(said.contains("600 impressions"), "{said}");
    assert!(dir.join("data").join(USER_IDS).is_file() && dir.join("data").join(ITEM_IDS).is_file());
    run_well(binary, dir, &["train", "fm"]);
}

fn rank(user: &Value, items: &[Value]) -> String {
    let candidates: Vec<Value> = items.iter().map(|id| json!({ "id": id })).collect();
    json!({ "user": user, "surface": "home", "candidates": candidates }).to_string()
}

fn message(answer: &Value) -> &str {
    answer["error"]["message"].as_str().unwrap_or_default()
}

#[test]
fn strings_are_ids_from_events_to_answers_and_reports() {
    let Some(binary) = binary() else {
        return skip("ids", "`cargo verify` builds the binary that it needs");
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(&binary, dir);
    // As chance would do it with one of some thousand million ids: the key has another text.
    let kept = dir.join("runs/state/ids/serve");
    {
        let key = IdKey { key: id_key("sku-taken").key, check: 1 };
        let impostor = TextId::stored(key, "sku-first");
        IdDictionary::open(&kept, 10).unwrap().insert([&impostor].into_iter()).unwrap();
    }
    let daemon = TestDaemon::start(&binary, dir);
    let count = || metric(&daemon.get("/metrics").1, "hypercast_text_ids");
    assert_eq!(count(), 1 + 25 + 40, "those of the data set, too");

    let items = ["sku-1", "sku-2", "sku-1", "\u{fc}ber/7"].map(Value::from);
    let (status, answer) = daemon.post("/v1/rank", &rank(&json!("user-3"), &items));
    assert_eq!((status, &answer["new_user"]), (200, &json!(false)), "{answer}");
    let ranking = answer["ranking"].as_array().unwrap().iter();
    let mut ids: Vec<&str> = ranking.map(|place| place["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["sku-1", "sku-2", "\u{fc}ber/7"]);
    assert_eq!(answer["unknown_items"], json!(["\u{fc}ber/7"]));

    for (body, place) in [
        (rank(&json!(3), &items), "user: 3 is a number"),
        (rank(&json!("user-3"), &[json!("sku-1"), json!(7)]), "candidates[1].id: 7 is a number"),
    ] {
        let (status, answer) = daemon.post("/v1/rank", &body);
        let why = message(&answer);
        assert!(status == 400 && why.contains(place) && why.contains("\"string\""), "{answer}");
    }

    let shown = |item: &str, time_ms: i64| {
        let shown = json!({"request": 900, "user": "new user", "item": item, "surface": "home",
                           "time_ms": START_MS + time_ms});
        json!({ "impressions": [shown] }).to_string()
    };
    let (status, answer) = daemon.post("/v1/events", &shown("sku-9", 1));
    assert_eq!((status, &answer["accepted"]), (200, &json!(1)), "{answer}");
    let (_, answer) = daemon.post("/v1/events", &shown("sku-9", 1));
    assert_eq!(answer["repeated"], json!(1), "{answer}");
    let before = count();
    assert_eq!(before, 1 + 25 + 40 + 2);
    let refused = [
        daemon.post("/v1/events", &shown("sku-taken", 2)),
        daemon.post("/v1/rank", &rank(&json!("another user"), &[json!("sku-taken")])),
    ];
    for (status, answer) in refused {
        let why = message(&answer);
        assert!(status == 400 && why.contains("sku-taken") && why.contains("sku-first"), "{why}");
    }
    assert_eq!(count(), before, "nothing of a refused body is kept");
    let (_, answer) = daemon.post("/v1/events", &shown("sku-10", 2));
    assert_eq!(answer["accepted"], json!(1), "and no event: {answer}");
    assert!(daemon.stop());

    let key = id_key("\u{fc}ber/7").key.to_string();
    let said = run_well(&binary, dir, &["data", "ids", &key]);
    assert_eq!(said.trim_end(), format!("{key}\t\u{fc}ber/7"));
    let (fine, said) = run(&binary, dir, &["data", "ids", "5"]);
    assert!(!fine && said.contains("no id with the key 5"), "{said}");
    let said = run_well(&binary, dir, &["data", "ids", "--into", "ids.parquet"]);
    assert!(said.contains("68 ids written"), "{said}");
}
