//! The whole training and serving loop as `hypercast-lab demo --streaming` runs it: all processes,
//! publications under load, a promotion and a rollback, and each impression in exactly one example.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
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

/// A running demo. Dropping it kills the process.
struct RunningDemo(Child);

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
    let mut first = demo(&binary, &plugins, dir.path());
    let first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (pid, mut first) = (first.id(), RunningDemo(first));
    let serves = dir.path().join("work/process-logs/serve.log");
    let until = Instant::now() + Duration::from_secs(120);
    while !std::fs::read_to_string(&serves).is_ok_and(|said| said.contains("listening on")) {
        assert!(Instant::now() < until && first.0.try_wait().unwrap().is_none(), "the demo starts");
        std::thread::sleep(Duration::from_millis(100));
    }
    let second = demo(&binary, &plugins, dir.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && stderr.contains(&pid.to_string()), "{stderr}");

    assert!(Command::new("kill").arg(pid.to_string()).status().unwrap().success());
    // Its child processes have ended too, so their folders are no longer locked.
    assert!(!first.0.wait().unwrap().success(), "a demo that was stopped reports a failure");
    let again = Command::new(&hypercast)
        .args(["materialise", "--follow", "--until-end"])
        .current_dir(dir.path().join("work"))
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}

#[test]
fn arms_of_an_ab_test_share_the_users_of_a_daemon_that_learns_from_all() {
    let Some(Prerequisites { lab, plugins, .. }) = prerequisites("streaming, A/B") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let small = "[fm]\ndim = 16\nqk_dim = 8\nv_dim = 8\nlayers = 1\nmax_history = 32\n";
    std::fs::write(dir.path().join("small.toml"), small).unwrap();
    let size = ["--ab-users", "30", "--ab-past-days", "2", "--ab-days", "1", "--seeds", "3,"];
    let output = Command::new(lab)
        .args(["experiment", "ab", "--config", "small.toml", "--json", "ab.json", "--work", "work"])
        .args(size)
        .arg("--plugins")
        .arg(plugins)
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(dir.path().join("ab.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    // Who answered whom was checked at each answer.
    let (config, traffic) = (&report["config"], &report["config"]["traffic"]);
    assert!(traffic["ranked"].as_u64().unwrap() > 20, "{traffic}");
    assert_eq!(traffic["degraded"], 0, "{traffic}");
    assert!(traffic["released"].as_u64().unwrap() > 5, "{traffic}");
    let flops: Vec<u64> = serde_json::from_value(config["flops"].clone()).unwrap();
    assert!(flops[0] < flops[2] && flops[2] <= flops[1], "{flops:?}");
    for arm in ["FM alone", "one-stage", "FM and expert"] {
        for metric in ["value a user and day", "fresh share of shown"] {
            let rows = report["models"].as_array().unwrap();
            let row = rows.iter().find(|row| row["arm"] == arm && row["metric"] == metric);
            let row = row.unwrap_or_else(|| panic!("no {metric} of {arm}: {text}"));
            assert!(row["rows"].as_u64().unwrap() > 0 && row["mean"].is_f64(), "{row}");
        }
    }
}
