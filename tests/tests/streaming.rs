//! The whole training and serving loop as `hypercast-lab demo --streaming` runs it: all processes,
//! publications under load, a promotion and a rollback, and each impression in exactly one example.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_data::dataset::Dataset;
use hypercast_stream::{
    events::{EventKind, EventRecord},
    join::JoinedRecord,
    streams::{self, Topic},
};
use hypercast_tests::{Prerequisites, prerequisites};
use serde_json::Value;

/// The command of the demo. It works in `dir/work` and writes its result to `dir/report.json`.
fn demo(binary: &Path, plugins: &Path, dir: &Path) -> Command {
    let mut command = Command::new(binary);
    command
        .args(["demo", "--streaming", "--data", "simulated", "--small", "--minutes", "0.2"])
        .args(["--json", "report.json", "--work", "work", "--plugins"])
        .arg(plugins)
        .current_dir(dir);
    command
}

/// The command of a small A/B test. It works in `dir/work` and writes its result to `dir/ab.json`.
fn ab_test(binary: &Path, plugins: &Path, dir: &Path, days: &str) -> Command {
    let small = "[fm]\ndim = 16\nqk_dim = 8\nv_dim = 8\nlayers = 1\nmax_history = 32\n";
    std::fs::write(dir.join("small.toml"), small).unwrap();
    let mut command = Command::new(binary);
    command
        .args(["experiment", "ab", "--config", "small.toml", "--json", "ab.json", "--work", "work"])
        .args(["--ab-users", "30", "--ab-past-days", "2", "--ab-days", days, "--seeds", "3,"])
        .args(["--variant", "mlp-fusion", "--plugins"])
        .arg(plugins)
        .current_dir(dir);
    command
}

/// A running demo or test. Dropping it kills the process.
struct RunningDemo(Child);

impl RunningDemo {
    /// Starts a command, and waits until the daemon serves whose log is `log`.
    fn serving(command: &mut Command, log: &Path) -> Self {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut running = Self(child);
        let until = Instant::now() + Duration::from_secs(120);
        while !std::fs::read_to_string(log).is_ok_and(|said| said.contains("listening on")) {
            let runs = running.0.try_wait().unwrap().is_none();
            assert!(Instant::now() < until && runs, "it starts");
            std::thread::sleep(Duration::from_millis(100));
        }
        running
    }

    /// Asks it to stop. Its child processes have then ended, too: the folders in `work` are no
    /// longer locked.
    fn stop(mut self, hypercast: &Path, work: &Path) {
        assert!(Command::new("kill").arg(self.0.id().to_string()).status().unwrap().success());
        assert!(!self.0.wait().unwrap().success(), "one that was stopped reports a failure");
        let again = Command::new(hypercast)
            .args(["materialise", "--follow", "--until-end"])
            .current_dir(work)
            .output()
            .unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    }
}

impl Drop for RunningDemo {
    fn drop(&mut self) {
        // Both calls do nothing if the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_loop_learns_serves_promotes_and_rolls_back() {
    let Some(Prerequisites { lab: binary, plugins, .. }) = prerequisites("streaming") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let output = demo(&binary, &plugins, dir.path()).output().unwrap();
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let text = std::fs::read_to_string(dir.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();

    let joined = &report["joined"];
    assert!(report["impressions"].as_u64().unwrap() > 1000, "{text}");
    assert_eq!(report["impressions"], joined["impressions"], "{joined}");
    assert_eq!(joined["doubled"], 0, "{joined}");
    let late = report["late_actions"].as_u64().unwrap();
    let corrected = joined["corrected"].as_u64().unwrap();
    assert!(late > 0 && corrected > 0, "{late} late, {corrected} corrected");

    assert_eq!((&report["degraded"], &report["refused"]), (&Value::from(0), &Value::from(0)));
    for model in ["fm@1.0.0", "fm@2.0.0", "ranker@1.0.0", "ranker@2.0.0"] {
        let served = report["live"]["publications"][model].as_u64().unwrap();
        assert!(served > 0, "{model}: {}", report["live"]["publications"]);
    }
    for arm in ["ranker@1.0.0", "ranker@2.0.0"] {
        assert!(report["arms"][arm].as_u64().unwrap() > 0, "{}", report["arms"]);
        let rows = report["rows"].as_array().unwrap();
        assert!(rows.iter().any(|row| row["arm"] == arm && row["ne"].is_f64()), "{arm}");
    }
    let decisions = report["decisions"].as_array().unwrap();
    let of = |word: &str| {
        decisions.iter().filter(|own| own["command"].as_str().unwrap().contains(word)).count()
    };
    assert_eq!((of("promote"), of("rollback")), (2, 2), "{decisions:?}");
    let refused =
        decisions.iter().find(|own| own["command"] == "hypercast versions retire fm 1.0.0");
    let why = refused.unwrap()["refused"].as_str().unwrap();
    assert!(why.contains("pinned by expert ranker 1.0.0"), "{why}");
}

#[test]
fn a_second_demo_in_the_same_folder_is_refused_and_the_first_stops_on_request() {
    let Some(Prerequisites { lab: binary, hypercast, plugins, .. }) =
        prerequisites("streaming, twice")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    let first = &mut demo(&binary, &plugins, dir.path());
    let first = RunningDemo::serving(first, &work.join("process-logs/serve.log"));
    let pid = first.0.id();
    let second = demo(&binary, &plugins, dir.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && stderr.contains(&pid.to_string()), "{stderr}");
    first.stop(&hypercast, &work);
}

#[test]
fn an_ab_test_stops_on_request_amid_its_traffic() {
    let Some(Prerequisites { lab, hypercast, plugins, .. }) = prerequisites("streaming, A/B stops")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work/seed-3");
    let test = &mut ab_test(&lab, &plugins, dir.path(), "1000");
    let test = RunningDemo::serving(test, &work.join("process-logs/serve.log"));
    std::thread::sleep(Duration::from_secs(1));
    test.stop(&hypercast, &work);
}

/// Checks that `released` items arrived in the events, and that what is learned from has the
/// features of those that were shown.
fn assert_items_arrive(work: &Path, released: u64) {
    let first = Dataset::open(&work.join("data")).unwrap().items.len() as u64;
    let config = Config::read(&work.join("hypercast.toml")).unwrap();
    let engine = streams::open(&config.engine).unwrap();
    let read = |topic: &Topic| {
        let mut reader = engine.reader(topic, 0).unwrap();
        std::iter::from_fn(move || {
            let records = reader.next(1024, Duration::from_millis(200)).unwrap();
            (!records.is_empty()).then_some(records)
        })
        .flatten()
        .map(|record| record.payload)
        .collect::<Vec<_>>()
    };
    let arrived: BTreeSet<u64> = read(&Topic::events())
        .iter()
        .filter_map(|payload| match EventRecord::decode(payload).unwrap().kind {
            EventKind::Item(item) => Some(item.id),
            _ => None,
        })
        .collect();
    assert_eq!(arrived, (first + 1..=first + released).collect());
    let mut shown = 0;
    for payload in read(&Topic::joined()) {
        let JoinedRecord::Example(joined) = JoinedRecord::decode(&payload).unwrap() else {
            continue;
        };
        let targets = joined.example.targets.iter();
        for item in targets.map(|target| &target.item).filter(|item| item.id > first) {
            shown += 1;
            assert!(item.ids.len() == 2 && item.ids.iter().all(|id| *id != 0), "{item:?}");
        }
    }
    assert!(shown > 0, "an item that arrived is shown");
}

#[test]
fn arms_of_an_ab_test_share_the_users_of_a_daemon_that_learns_from_all() {
    let Some(Prerequisites { lab, plugins, .. }) = prerequisites("streaming, A/B") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let output = ab_test(&lab, &plugins, dir.path(), "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(dir.path().join("ab.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    // Who answered whom was checked at each answer.
    let (config, traffic) = (&report["config"], &report["config"]["traffic"]["3"]);
    assert!(traffic["ranked"].as_u64().unwrap() > 20, "{traffic}");
    assert_eq!(traffic["degraded"], 0, "{traffic}");
    assert!(traffic["released"].as_u64().unwrap() > 5, "{traffic}");
    assert!(traffic["fm_lag_minutes"]["2.0.0"].as_f64().unwrap() > 0.0, "{traffic}");
    assert_items_arrive(&dir.path().join("work/seed-3"), traffic["released"].as_u64().unwrap());
    let flops: Vec<u64> = serde_json::from_value(config["flops"].clone()).unwrap();
    assert!(flops[0] < flops[2] && flops[2] <= flops[1] && flops[0] < flops[3], "{flops:?}");
    for arm in ["FM alone", "one-stage", "FM and expert", "mlp-fusion"] {
        for metric in ["value a user and day", "fresh share of shown"] {
            let rows = report["models"].as_array().unwrap();
            let row = rows.iter().find(|row| row["arm"] == arm && row["metric"] == metric);
            let row = row.unwrap_or_else(|| panic!("no {metric} of {arm}: {text}"));
            assert!(row["rows"].as_u64().unwrap() > 0 && row["mean"].is_f64(), "{row}");
        }
    }
}
