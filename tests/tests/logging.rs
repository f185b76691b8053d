//! The logging tier as a process: killed at random moments, it neither loses nor repeats a request.
//! It stops cleanly, and a second one in the same folder is refused.

use hypercast_core::prerequisite::skip;
use std::{
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
use hypercast_tests::{binary, run_well, world};
use rand::{Rng, SeedableRng, rngs::SmallRng};

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
        let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1 });
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
