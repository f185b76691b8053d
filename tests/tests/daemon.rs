//! The daemon from a caller's point of view: every documented response, events that survive a kill,
//! and predictions equal to those in training.

use hypercast_config::Config;
use hypercast_data::dataset::Dataset;
use hypercast_data::dataset::timeline::{Span, Timeline, TimelineStep};
use hypercast_data::logs::LogReader;
use hypercast_expert::{
    Blueprint, Engine, FmRows, LoadOptions, SavedParameters, ServedExpert, Tae,
};
use hypercast_serve::convert::Converter;
use hypercast_tests::{Prerequisites, TestDaemon, expert, prerequisites, run, run_well, world};
use serde_json::{Map, Value, json};

/// Trains an FM and two in-tree experts on the first four fifths of a simulated world.
fn trained(dir: &std::path::Path, plugins: &std::path::Path, binary: &std::path::Path) -> Config {
    let mut config = world(dir, 2000, 2);
    let dataset = Dataset::open(&config_path(dir, "data")).unwrap();
    let at = dataset.rows * 4 / 5;
    config.timeline.until =
        dataset.impressions().unwrap().nth(at).unwrap().unwrap().time_ms.to_string();
    config.experts = vec![
        expert("short", plugins.join("short-term.wasm"), &["feed"]),
        expert("mlp", plugins.join("mlp-fusion.wasm"), &["search"]),
    ];
    config.write(&config_path(dir, "hypercast.toml")).unwrap();
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
    Config::read(&config_path(dir, "hypercast.toml")).unwrap()
}

fn config_path(dir: &std::path::Path, name: &str) -> std::path::PathBuf {
    dir.join(name)
}

fn rank(user: u64, surface: &str, items: &[u64]) -> Value {
    let candidates: Vec<Value> = items.iter().map(|id| json!({ "id": id })).collect();
    json!({ "user": user, "surface": surface, "candidates": candidates })
}

#[test]
fn every_kind_of_request_gets_its_documented_response() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("daemon answers")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = trained(dir.path(), &plugins, &binary);
    config.server.max_candidates = 20;
    config.write(&config_path(dir.path(), "hypercast.toml")).unwrap();
    let daemon = TestDaemon::start(&binary, dir.path());
    let refused = |body: &str, status: u16, code: &str, word: &str| {
        let (got, answer) = daemon.post("/v1/rank", body);
        assert_eq!(
            (got, answer["error"]["code"].as_str()),
            (status, Some(code)),
            "{body}: {answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    };
    refused("{\"user\": 1,", 400, "bad_request", "line 1");
    refused("{\"user\": 1, \"surfac\": \"x\", \"candidates\": []}", 400, "bad_request", "surfac");
    refused(&rank(1, "nowhere", &[1]).to_string(), 404, "unknown_surface", "feed");
    refused(&rank(1, "feed", &[]).to_string(), 422, "no_candidates", "at least one");
    refused(&rank(1, "feed", &[1; 21]).to_string(), 413, "too_many", "20");
    let mut foreign = rank(1, "feed", &[1]);
    foreign["candidates"][0]["features"] = json!({ "colour": 3 });
    refused(&foreign.to_string(), 400, "bad_request", "colour");

    let (status, answer) = daemon.post("/v1/rank", &rank(3, "feed", &[1, 2, 3]).to_string());
    assert_eq!(
        (status, &answer["degraded"], &answer["new_user"]),
        (200, &json!(false), &json!(false)),
        "{answer}"
    );
    assert_eq!(answer["ranking"].as_array().unwrap().len(), 3);
    assert_eq!(answer["fm_version"], "1.0.0");
    assert_eq!(answer["expert"]["name"], "short");
    assert!(answer["ranking"][0]["predictions"]["click"].as_f64().is_some(), "{answer}");
    assert!(answer.get("explain").is_none(), "`explain` is only present if requested");

    columns_are_answered_with_columns(&daemon, &answer);

    let (status, answer) =
        daemon.post("/v1/rank", &rank(987_654_321, "search", &[1, 777_777]).to_string());
    assert_eq!((status, &answer["new_user"]), (200, &json!(true)), "{answer}");
    assert_eq!(answer["unknown_items"], json!([777_777]));
    assert_eq!(answer["ranking"].as_array().unwrap().len(), 2);

    assert_eq!(daemon.get("/healthz"), (200, "ok\n".into()));
    assert_eq!(daemon.get("/readyz").0, 200);
    let (_, metrics) = daemon.get("/metrics");
    assert!(
        metrics.contains("hypercast_requests_total{route=\"/v1/rank\",status=\"404\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("hypercast_stage_seconds_count{stage=\"wasm\"} 3"), "{metrics}");
    let (status, page) = daemon.get("/");
    assert!(status == 200 && page.contains("page.js") && page.contains("page.css"), "{page}");
    for part in ["/page.js", "/page.css"] {
        assert_eq!(daemon.get(part).0, 200, "{part}");
    }
    let (status, answer) = daemon.post("/v2/rank", "{}");
    assert_eq!((status, answer["error"]["code"].as_str()), (404, Some("not_found")));
    files_that_are_cut_are_named(&daemon, &dir.path().join("runs/fm/store"));
    assert!(daemon.stop());
}

/// Candidates 1, 2 and 3 as columns have the ranking that they had as rows.
fn columns_are_answered_with_columns(daemon: &TestDaemon, of_rows: &Value) {
    let mut body = rank(3, "feed", &[]);
    body["candidates"] = json!({ "id": [1, 2, 3] });
    let (status, answer) = daemon.post("/v1/rank", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    let place = |at: usize| {
        let of = |name: &str| answer["ranking"][name][at].clone();
        let predictions = answer["ranking"]["predictions"].as_object().unwrap().iter();
        let predictions: Map<String, Value> =
            predictions.map(|(task, values)| (task.clone(), values[at].clone())).collect();
        json!({ "id": of("id"), "score": of("score"), "predictions": predictions })
    };
    assert_eq!(json!([place(0), place(1), place(2)]), of_rows["ranking"]);
    body["candidates"]["features"] = json!({ "colour": [1, 2, 3] });
    let (status, answer) = daemon.post("/v1/rank", &body.to_string());
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(status == 400 && message.contains("candidates.features: unknown feature"), "{answer}");
}

/// While a file of the store is cut, requests get a 503 and the daemon is not ready; both name the
/// file. Once it is as it was, both go on.
fn files_that_are_cut_are_named(daemon: &TestDaemon, store: &std::path::Path) {
    let body = rank(5, "feed", &[1, 2, 3, 4]).to_string();
    let (_, expected) = daemon.post("/v1/rank", &body);
    for name in ["index.table", "rows-00000.slab"] {
        let path = store.join(name);
        let content = std::fs::read(&path).unwrap();
        // In place, as `cp` does it.
        std::fs::write(&path, &content[..content.len() / 2]).unwrap();
        let (status, text) = daemon.get("/readyz");
        assert!(status == 503 && text.contains(name), "{status} {text}");
        std::fs::write(&path, "").unwrap();
        let (status, answer) = daemon.post("/v1/rank", &body);
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!((status, answer["error"]["code"].as_str()), (503, Some("file_lost")));
        assert!(message.contains(name), "{message}");
        std::fs::write(&path, content).unwrap();
        let (status, answer) = daemon.post("/v1/rank", &body);
        assert_eq!((status, &answer["ranking"]), (200, &expected["ranking"]), "{answer}");
        assert_eq!(daemon.get("/readyz").0, 200);
    }
}

#[test]
fn events_reach_the_features_and_survive_a_kill() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("events") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    trained(dir.path(), &plugins, &binary);
    let daemon = TestDaemon::start(&binary, dir.path());
    let body = rank(987_654_321, "feed", &[1, 2, 3]).to_string();
    assert_eq!(daemon.post("/v1/rank", &body).1["new_user"], true);
    let event = |action: &str| {
        json!({ "events": [{ "user": 987_654_321, "item": 2, "surface": "feed",
                             "time_ms": 1_700_000_000_000u64, "actions": { action: true } }] })
    };
    let (status, answer) = daemon.post("/v1/events", &event("bought").to_string());
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("events[0]"), "{answer}");
    let (status, answer) = daemon.post("/v1/events", &event("click").to_string());
    assert_eq!((status, &answer["accepted"]), (200, &json!(1)), "{answer}");
    assert_eq!((&answer["applied"], &answer["repeated"]), (&json!(true), &json!(0)), "{answer}");
    assert_eq!(daemon.post("/v1/rank", &body).1["new_user"], false);
    let (_, answer) = daemon.post("/v1/events", &event("click").to_string());
    assert_eq!((&answer["accepted"], &answer["repeated"]), (&json!(0), &json!(1)), "{answer}");
    // Dropping kills the process.
    drop(daemon);
    let daemon = TestDaemon::start(&binary, dir.path());
    assert_eq!(daemon.post("/v1/rank", &body).1["new_user"], false, "the event was stored");
}

#[test]
fn impressions_wait_for_their_outcomes_and_survive_restarts() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("join") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = trained(dir.path(), &plugins, &binary);
    // Only the times of events advance the joiner's clock.
    config.join.tick_ms = 0;
    config.write(&config_path(dir.path(), "hypercast.toml")).unwrap();
    let daemon = TestDaemon::start(&binary, dir.path());
    let mut body = rank(987_654_321, "feed", &[1, 2, 3]);
    (body["time_ms"], body["explain"]) = (json!(1_700_000_100_000_u64), json!(true));
    let body = body.to_string();
    let ask = |daemon: &TestDaemon| daemon.post("/v1/rank", &body).1;
    let answer = ask(&daemon);
    assert_eq!(answer["new_user"], true);
    let request = answer["request"].as_u64().unwrap();
    assert!(request > 0 && request < 1 << 53);
    let tell = |daemon: &TestDaemon, events: Value| {
        let (status, answer) = daemon.post("/v1/events", &events.to_string());
        assert_eq!((status, &answer["applied"]), (200, &json!(true)), "{answer}");
    };
    let shown = |item: u64| {
        json!({ "request": request, "user": 987_654_321, "item": item, "surface": "feed",
                "time_ms": 1_700_000_000_000_u64 })
    };
    tell(&daemon, json!({ "impressions": [shown(1), shown(2)] }));
    assert_eq!(ask(&daemon)["new_user"], true, "the outcomes are not known yet");
    drop(daemon);
    let daemon = TestDaemon::start(&binary, dir.path());
    let done = |item: u64| {
        json!({ "request": request, "item": item, "time_ms": 1_700_000_001_000_u64,
                "actions": { "click": true }, "complete": true })
    };
    tell(&daemon, json!({ "actions": [done(1), done(2)] }));
    let known = ask(&daemon);
    assert_eq!(known["new_user"], false, "the outcomes are complete, so the joiner does not wait");
    assert!(daemon.stop());
    let same = |daemon: &TestDaemon| {
        let answer = ask(daemon);
        assert_eq!(answer["explain"]["fm"], known["explain"]["fm"]);
        assert_eq!(answer["explain"]["expert"], known["explain"]["expert"]);
    };
    let daemon = TestDaemon::start(&binary, dir.path());
    same(&daemon);
    drop(daemon);
    // Without the saved state, the daemon rebuilds it from the streams.
    std::fs::remove_dir_all(config.paths.state.join("serve")).unwrap();
    let daemon = TestDaemon::start(&binary, dir.path());
    same(&daemon);
    let (well, text) = run(&binary, dir.path(), &["join"]);
    assert!(!well && text.contains("process"), "the daemon joins already: {text}");
    assert!(daemon.stop());
}

#[test]
fn served_predictions_equal_those_of_training_for_the_same_examples() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("skew") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = trained(dir.path(), &plugins, &binary);
    let until_ms = config.timeline.until_ms().unwrap();
    // Write the logs of the last fifth as a trainer would see them, with the serving FM's TAEs.
    config.paths.logs = dir.path().join("test-logs");
    config.write(&config_path(dir.path(), "logs.toml")).unwrap();
    let from = config.timeline.until.clone();
    run_well(&binary, dir.path(), &["materialise", "--config", "logs.toml", "--from", &from]);
    let log = LogReader::open(&config.paths.logs).unwrap();
    let engine = Engine::new(config.guests()).unwrap();
    let options = LoadOptions {
        tae_dim: log.tae_dim,
        fm_version: Some("1.0.0".into()),
        ..config.plugin_limits.load_options()
    };
    let open = |at: usize| {
        let entry = &config.experts[at];
        let blueprint = Blueprint::load(&engine, &entry.plugin, &log.schema, &options).unwrap();
        let parameters = config.parameters(entry);
        ServedExpert::open(
            blueprint.into(),
            SavedParameters::read(&parameters).unwrap(),
            config.device,
            config.plugin_limits.breaker(),
        )
        .unwrap()
    };
    let experts = [open(0), open(1)];

    let daemon = TestDaemon::start(&binary, dir.path());
    let dataset = Dataset::open(&config.paths.dataset).unwrap();
    let schema = &dataset.schema;
    let converter = Converter::new(schema.clone());
    let mut logged = log.iter();
    let mut compared = 0;
    for step in Timeline::new(&dataset, Span { from_ms: until_ms, until_ms: None }).unwrap() {
        match step.unwrap() {
            TimelineStep::Outcome(row) => {
                let known = |bit: &usize| row.outcome.known >> bit & 1 == 1;
                let actions: serde_json::Map<String, Value> = (0..schema.actions.len())
                    .filter(known)
                    .map(|bit| {
                        (schema.actions[bit].clone(), json!(row.outcome.actions >> bit & 1 == 1))
                    })
                    .collect();
                let values: serde_json::Map<String, Value> = schema
                    .values
                    .iter()
                    .zip(row.outcome.values)
                    .filter(|(_, value)| value.is_finite())
                    .map(|(name, value)| (name.clone(), json!(value)))
                    .collect();
                let event = json!({ "request": row.request, "user": row.user, "item": row.item,
                    "surface": schema.surfaces[usize::from(row.surface)], "time_ms": row.time_ms,
                    "outcome_ms": row.outcome_ms, "actions": actions, "values": values,
                    "context": converter.named(&row.context) });
                let (status, answer) =
                    daemon.post("/v1/events", &json!({ "events": [event] }).to_string());
                assert_eq!(status, 200, "{answer}");
            }
            TimelineStep::Request(rows) => {
                let surface = usize::from(rows[0].surface);
                let items: Vec<u64> = rows.iter().map(|row| row.item).collect();
                let mut body = rank(rows[0].user, &schema.surfaces[surface], &items);
                for (candidate, row) in
                    body["candidates"].as_array_mut().unwrap().iter_mut().zip(&rows)
                {
                    candidate["features"] = json!(converter.named(&row.context));
                }
                body["time_ms"] = json!(rows[0].time_ms);
                body["explain"] = json!(true);
                let (_, answer) = daemon.post("/v1/rank", &body.to_string());
                let trainers = logged.next().expect("a log row a request").unwrap();
                assert_eq!(trainers.example.request, rows[0].request);
                let (tae, predictions) = (Tae::Rows(&trainers.tae), &trainers.predictions[..]);
                let expected = experts[surface]
                    .predict(&[&trainers.example], FmRows { tae, predictions })
                    .unwrap();
                for task in &expected.tasks {
                    for (row, value) in task.values.iter().enumerate() {
                        let served = answer["explain"]["expert"][&task.task][row].as_f64().unwrap();
                        let gap = (served - f64::from(*value)).abs();
                        assert!(
                            gap < 1e-5,
                            "request {}, {} row {row}: {served} {value}",
                            rows[0].request,
                            task.task
                        );
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 1000, "{compared} predictions compared");
}
