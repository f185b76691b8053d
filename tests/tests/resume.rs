//! `hypercast train fm --resume` after a kill: metrics, logs and checkpoint equal those of an
//! undisturbed training.

use hypercast_core::prerequisite::skip;
use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use hypercast_config::Config;
use hypercast_data::dataset::{Dataset, ImpressionWriter};
use hypercast_data::logs::LogReader;
use hypercast_tests::{binary, run, run_well, world};

/// Simulates a world and marks its first third as history, so that a run has both phases. Returns
/// the configuration.
fn prepare(dir: &Path) -> Config {
    let mut config = world(dir, 1500, 2);
    config.fm.dropout = 0.1;
    config.fm.average_decay = 0.99;
    config.fm.pretraining_passes = 2;
    config.fm.batch_requests = 16;
    config.fm.stochastic_length_alpha = 1.6;
    config.fm.sample_negatives = [("feed".to_string(), 0.7)].into();
    config.fm.save_every_requests = 200;
    config.fm.admit_after = 2;
    config.fm.expire_after_steps = 24;
    config.fm.serving_rows = serde_json::from_str("\"bf16\"").unwrap();
    config.logs.rows_per_file = 500;
    let data = dir.join("data");
    let dataset = Dataset::open(&data).unwrap();
    let mut rows: Vec<_> = dataset.impressions().unwrap().map(Result::unwrap).collect();
    let third = rows[rows.len() / 3].time_ms;
    rows.iter_mut().for_each(|row| row.history_only = row.time_ms < third);
    let mut writer = ImpressionWriter::create(&data, &dataset.schema);
    rows.iter().for_each(|row| writer.write(row).unwrap());
    writer.finish().unwrap();
    config.write(&dir.join("hypercast.toml")).unwrap();
    config
}

/// Starts a training and kills it after it has saved its state in the given phase.
fn train_and_kill(binary: &Path, dir: &Path, phase: &str, args: &[&str]) {
    let mut child = Command::new(binary)
        .args(["train", "fm"])
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let saved = dir.join("runs/fm-work/saved/run.toml");
    let wanted = format!("phase = \"{phase}\"");
    while !std::fs::read_to_string(&saved).is_ok_and(|text| text.contains(&wanted)) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before saving in phase {phase}");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// All files under `dir` with their contents, sorted by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(at, b)| (format!("{name}/{at}"), b)));
        } else {
            all.push((name, std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn a_killed_training_resumes_as_if_it_had_not_been_killed() {
    let Some(binary) = binary() else {
        skip("resume", "`cargo test --workspace` builds the hypercast binary");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    for dir in [&whole, &killed] {
        std::fs::create_dir(dir).unwrap();
        prepare(dir);
    }
    let (well, said) = run(&binary, &killed, &["train", "fm", "--resume"]);
    assert!(!well && said.contains("no run is saved here"), "{said}");

    let expected = run_well(&binary, &whole, &["train", "fm"]);
    train_and_kill(&binary, &killed, "pretraining", &[]);
    train_and_kill(&binary, &killed, "stream", &["--resume"]);
    let got = run_well(&binary, &killed, &["train", "fm", "--resume"]);
    let table = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.contains("click")).map(String::from).collect()
    };
    assert!(table(&expected).len() >= 3, "{expected}");
    assert_eq!(table(&got), table(&expected));

    let logged = |dir: &Path| {
        let logs = LogReader::open(&dir.join("runs/logs")).unwrap();
        let rows = logs.iter().map(Result::unwrap);
        rows.map(|row| (row.example.request, row.tae)).collect::<Vec<_>>()
    };
    let (a, b) = (logged(&whole), logged(&killed));
    assert!(a.len() > 300);
    assert!(a == b, "the logs differ; they have {} and {} requests", a.len(), b.len());
    for folder in ["runs/fm", "runs/logs"] {
        let (a, b) = (files(&whole.join(folder)), files(&killed.join(folder)));
        let names = |files: &[(String, Vec<u8>)]| {
            files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&a), names(&b));
        for ((name, a), (_, b)) in a.iter().zip(&b).filter(|((name, _), _)| !name.ends_with("lock"))
        {
            assert!(a == b, "{folder}/{name} differs");
        }
    }

    // A finished run keeps its last saved state. Resuming with another configuration is refused.
    let mut config = Config::read(&killed.join("hypercast.toml")).unwrap();
    config.logs.history_len += 1;
    config.write(&killed.join("hypercast.toml")).unwrap();
    let (well, said) = run(&binary, &killed, &["train", "fm", "--resume"]);
    assert!(!well && said.contains("logs.history_len was"), "{said}");
}
