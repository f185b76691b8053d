//! The logging tier as a process: killed at random moments, it neither loses nor repeats a request.
//! It stops cleanly, and a second one in the same folder is refused. What a daemon ranked by chance
//! reaches its logs, and tells what another policy would have earned.

use hypercast_core::{clock::now_ms, prerequisite::skip};
use std::{
    collections::HashMap,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::logs::LogReader;
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::streams::{Record, Topic};
use hypercast_tests::services::wait_until;
use hypercast_tests::{Prerequisites, TestDaemon, binary, expert, prerequisites, run_well, world};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

/// Appends the data set's requests to the joined stream. Returns how many there are.
fn join(dir: &Path, config: &Config) -> usize {
    let dataset = Dataset::open(&config.paths.dataset).unwrap();
    let mut settings = config.engine.clone();
    settings.dir = dir.join("runs/streams");
    let engine = hypercast_stream::streams::open(&settings).unwrap();
    let appender = engine.appender(&Topic::joined()).unwrap();
    let options = ReplayOptions {
        span: Span::default(),
        history_len: config.fm.max_history,
        max_targets: config.fm.max_targets,
        features: config.features,
    };
    let record = |example| {
        let joined =
            JoinedRecord::Example(JoinedExample { example, ingested_ms: 1, ranked: Vec::new() });
        Record { id: 0, payload: postcard::to_stdvec(&joined).unwrap() }
    };
    let examples = Replay::new(&dataset, options).unwrap().map(Result::unwrap);
    let records: Vec<Record> = examples.map(record).collect();
    for records in records.chunks(64) {
        appender.append(records).unwrap();
    }
    records.len()
}

fn start(binary: &Path, dir: &Path, config: &str) -> Child {
    Command::new(binary)
        .args(["materialise", "--follow", "--config", config])
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn requests(logs: &Path) -> Vec<(u64, usize)> {
    let log = LogReader::open(logs).unwrap();
    let rows = log.iter().map(Result::unwrap);
    rows.map(|row| (row.example.request, row.tae.len())).collect()
}

#[test]
fn a_killed_logging_tier_neither_loses_nor_repeats_requests() {
    let Some(binary) = binary() else {
        skip("logging", "`cargo test --workspace` builds the hypercast binary");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 1500, 2);
    config.logs.rows_per_file = 300;
    config.logs.skip_share = 0.9;
    config.fm_logging.batch_candidates = 128;
    config.write(&dir.path().join("hypercast.toml")).unwrap();
    run_well(&binary, dir.path(), &["train", "fm"]);
    let config = Config::read(&dir.path().join("hypercast.toml")).unwrap();
    let total = join(dir.path(), &config);
    let named = |name: &str| {
        let mut own = config.clone();
        own.paths.logs = dir.path().join(name);
        own.write(&dir.path().join(format!("{name}.toml"))).unwrap();
        own.paths.logs
    };
    let (whole, killed) = (named("whole"), named("killed"));
    run_well(
        &binary,
        dir.path(),
        &["materialise", "--follow", "--until-end", "--config", "whole.toml"],
    );
    let expected = requests(&whole);
    assert_eq!(expected.len(), total);

    let mut rng = SmallRng::seed_from_u64(5);
    let mut rounds = 0;
    let logged = |logs: &Path| {
        if logs.join("log-manifest.json").exists() { requests(logs).len() } else { 0 }
    };
    while logged(&killed) < total && rounds < 50 {
        let mut child = start(&binary, dir.path(), "killed.toml");
        std::thread::sleep(Duration::from_millis(rng.random_range(20..400)));
        child.kill().unwrap();
        child.wait().unwrap();
        rounds += 1;
    }
    let mut last = start(&binary, dir.path(), "killed.toml");
    let pid = last.id();
    let until = Instant::now() + Duration::from_secs(60);
    while logged(&killed) < total * 9 / 10 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    // A second process is refused. The first one stops cleanly and completes its last file.
    let second = start(&binary, dir.path(), "killed.toml").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        !second.status.success() && said.contains(&format!("process {pid} works here")),
        "{said}"
    );
    Command::new("kill").args(["-TERM", &pid.to_string()]).status().unwrap();
    assert!(last.wait().unwrap().success());
    run_well(
        &binary,
        dir.path(),
        &["materialise", "--follow", "--until-end", "--config", "killed.toml"],
    );
    assert!(rounds >= 2, "it was killed {rounds} times");
    assert!(requests(&killed) == expected, "the rows are those of an undisturbed run");
}

/// Requests that are ranked, one of twenty by chance.
const RANKED: u64 = 1200;

/// The items of each request.
const ITEMS: u64 = 12;

/// The answers to some requests, by request.
fn ranked(
    daemon: &TestDaemon,
    surface: &str,
    requests: std::ops::Range<u64>,
) -> HashMap<u64, Value> {
    let answer = |request: u64| {
        let candidates: Vec<Value> = (1..=ITEMS).map(|id| json!({ "id": id })).collect();
        let body = json!({
            "request": request, "user": request % 200, "surface": surface,
            "candidates": candidates, "limit": 3,
        });
        let (status, answer) = daemon.post("/v1/rank", &body.to_string());
        assert_eq!((status, &answer["degraded"]), (200, &Value::Bool(false)), "{answer}");
        (request, answer)
    };
    let part = |from: u64| requests.clone().skip(from as usize).step_by(4).map(answer);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|at| scope.spawn(move || part(at).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// Whether an item is clicked when it is shown: four of twelve are.
fn is_clicked(item: u64) -> bool {
    item.is_multiple_of(3)
}

#[test]
fn exploration_reaches_the_logs_and_tells_what_others_would_earn() {
    let Some(Prerequisites { hypercast, lab, hostile, .. }) = prerequisites("logging") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 300, 1);
    let surface = Dataset::open(&dir.path().join("data")).unwrap().schema.surfaces[0].clone();
    config.experts = vec![expert("explorer", hostile.join("explorer.wasm"), &[&surface])];
    config.write(&dir.path().join("hypercast.toml")).unwrap();
    run_well(&hypercast, dir.path(), &["train", "fm"]);
    run_well(&hypercast, dir.path(), &["train", "expert"]);

    let first = TestDaemon::start(&hypercast, dir.path());
    let mut answers = ranked(&first, &surface, 1..RANKED / 2);
    assert!(first.stop(), "what it has ranked is noted");
    let daemon = TestDaemon::start(&hypercast, dir.path());
    answers.extend(ranked(&daemon, &surface, RANKED / 2..RANKED));
    let kept = format!("hypercast_noted_rankings_total{{what=\"kept\"}} {}", RANKED / 2);
    wait_until("noted", Duration::from_secs(20), || daemon.get("/metrics").1.contains(&kept));

    // The first two places of each are shown, by whichever daemon is there then. Impressions say
    // what they always said.
    let (mut impressions, mut actions) = (Vec::new(), Vec::new());
    for (&request, answer) in &answers {
        for place in &answer["ranking"].as_array().unwrap()[..2] {
            let (item, time_ms) = (place["id"].as_u64().unwrap(), now_ms());
            impressions.push(json!({
                "request": request, "user": request % 200, "item": item, "surface": surface,
                "time_ms": time_ms,
            }));
            actions.push(json!({
                "request": request, "item": item, "time_ms": time_ms,
                "actions": { "click": is_clicked(item) }, "complete": true,
            }));
        }
    }
    // One that nobody ranked.
    impressions.push(json!({
        "request": 1_u64 << 40, "user": 1, "item": 1, "surface": surface, "time_ms": now_ms(),
    }));
    actions
        .push(json!({ "request": 1_u64 << 40, "item": 1, "time_ms": now_ms(), "complete": true }));
    let body = json!({ "impressions": impressions, "actions": actions });
    let (status, said) = daemon.post("/v1/events", &body.to_string());
    assert_eq!(status, 200, "{said}");
    assert!(daemon.stop());

    config.paths.logs = "runs/live".into();
    config.write(&dir.path().join("live.toml")).unwrap();
    let follow = ["materialise", "--follow", "--until-end", "--config", "live.toml"];
    run_well(&hypercast, dir.path(), &follow);
    let logs = LogReader::open_without_tae(&dir.path().join("runs/live")).unwrap();
    let mut rows = 0;
    for logged in logs.iter().map(Result::unwrap) {
        for (target, place) in logged.example.targets.iter().zip(&logged.ranked) {
            let Some(answer) = answers.get(&logged.example.request) else {
                assert_eq!(place, &None, "nobody ranked it");
                continue;
            };
            let place = place.as_ref().expect("it was ranked");
            let told = &answer["ranking"][place.position as usize];
            assert_eq!(told["id"], target.item.id);
            let propensity = told["propensity"].as_f64().map(|propensity| propensity as f32);
            assert_eq!(propensity, place.propensity);
            assert_eq!(answer["expert"]["arm"], place.arm);
            rows += 1;
        }
    }
    assert_eq!(rows, 2 * answers.len());

    let evaluate = ["evaluate", "policy", "--from", "runs/live", "--policy", "uniform"];
    let more = ["--reward", "click", "--json", "policy.json"];
    run_well(&lab, dir.path(), &[&evaluate[..], &more].concat());
    let report = std::fs::read_to_string(dir.path().join("policy.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let counts = [&report["rows"], &report["without_propensity"]];
    assert_eq!(counts, [&json!(rows), &json!(1)], "{report}");
    let truth = (1..=ITEMS).filter(|&item| is_clicked(item)).count() as f64 / ITEMS as f64;
    for estimate in &report["estimates"].as_array().unwrap()[1..] {
        let [low, high] = [0, 1].map(|end| estimate["bootstrap95"][end].as_f64().unwrap());
        // Chance decides what is shown, and a 95 % interval misses the truth in one run of twenty.
        // Widened to five standard errors it misses once in millions.
        let (middle, deviation) = ((low + high) / 2.0, (high - low) / (2.0 * 1.96));
        assert!((truth - middle).abs() < 5.0 * deviation, "{truth}: {estimate}");
        assert!(high - low < 0.4, "{estimate}");
    }
}
