//! Versions as an operator manages them: two FMs side by side, experts pinned to either, promotions
//! and rollbacks under load, and refusals with their reasons.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_core::clock::now_ms;
use hypercast_tests::services::wait_until;
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, rank_body, run, run_well, world,
};
use serde_json::{Value, json};

/// Trains FM 1.0.0 with two experts (`hypercast.toml`), and FM 2.0.0 with the same experts
/// (`second.toml`).
fn trained(dir: &Path, plugins: &Path, binary: &Path) -> Config {
    let mut config = world(dir, 1500, 2);
    config.experts = vec![
        expert("short", plugins.join("short-term.wasm"), &["feed"]),
        expert("mlp", plugins.join("mlp-fusion.wasm"), &["search"]),
    ];
    config.write(&dir.join("hypercast.toml")).unwrap();
    let mut second = config.clone();
    second.fm.seed = 8;
    second.paths.fm = "runs/fm2".into();
    second.paths.fm_work = "runs/fm2-work".into();
    second.paths.logs = "runs/logs2".into();
    second.paths.experts = "runs/experts2".into();
    second.write(&dir.join("second.toml")).unwrap();
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
    run_well(binary, dir, &["train", "fm", "--config", "second.toml"]);
    // Give the second FM its own version, and let experts learn from logs with its embeddings.
    let manifest = dir.join("runs/fm2/fm.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let mut fields: Value = serde_json::from_str(&text).unwrap();
    fields["version"] = json!("2.0.0");
    std::fs::write(&manifest, fields.to_string()).unwrap();
    std::fs::remove_dir_all(dir.join("runs/logs2")).unwrap();
    // It has learned from just these requests. How good its experts become does not matter here.
    let embed = ["materialise", "--config", "second.toml"];
    let (well, text) = run(binary, dir, &embed);
    assert!(!well && text.contains("--allow-look-ahead"), "{text}");
    run_well(binary, dir, &[&embed[..], &["--allow-look-ahead"]].concat());
    run_well(binary, dir, &["train", "expert", "--config", "second.toml"]);
    config
}

fn versions(binary: &Path, dir: &Path, args: &[&str]) -> String {
    run_well(binary, dir, &[&["versions"], args].concat())
}

fn refused(binary: &Path, dir: &Path, args: &[&str], word: &str) {
    let (well, text) = run(binary, dir, &[&["versions"], args].concat());
    assert!(!well && text.contains("refused") && text.contains(word), "{args:?}: {text}");
}

fn rank(user: u64, surface: &str) -> String {
    let mut body = rank_body(user, surface, 1..20);
    body["explain"] = json!(true);
    body.to_string()
}

/// The expert's predictions for some users on a surface.
fn predictions(daemon: &TestDaemon, surface: &str) -> Vec<f64> {
    let of = |user| {
        let (status, answer) = daemon.post("/v1/rank", &rank(user, surface));
        assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
        let tasks = answer["explain"]["expert"].as_object().unwrap().clone();
        tasks.into_iter().flat_map(|(_, values)| values.as_array().unwrap().clone())
    };
    (1..8).flat_map(of).map(|value| value.as_f64().unwrap()).collect()
}

fn assert_close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(most <= 1e-5, "{most}");
}

/// Waits until the given version answers requests on `feed`.
fn until(daemon: &TestDaemon, arm: &str) {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let (_, answer) = daemon.post("/v1/rank", &rank(1, "feed"));
        if answer["expert"]["arm"] == arm {
            return;
        }
        assert!(
            Instant::now() < give_up,
            "{arm} does not serve: {answer}; {:?}",
            daemon.get("/readyz")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ranks for some users on the surface `feed`, and then shows each the first item, which is
/// clicked.
fn show_and_click(daemon: &TestDaemon) {
    let (mut impressions, mut actions) = (Vec::new(), Vec::new());
    for user in 1..30 {
        let mut body = rank_body(user, "feed", 1..20);
        body.as_object_mut().unwrap().remove("time_ms");
        let (_, answer) = daemon.post("/v1/rank", &body.to_string());
        let (request, item) = (&answer["request"], &answer["ranking"][0]["id"]);
        let time_ms = now_ms();
        impressions.push(json!({
            "request": request, "user": user, "item": item, "surface": "feed", "time_ms": time_ms,
        }));
        actions.push(json!({
            "request": request, "item": item, "time_ms": time_ms, "actions": { "click": true },
            "complete": true,
        }));
    }
    // The daemon notes what it ranked meanwhile.
    std::thread::sleep(Duration::from_millis(100));
    let body = json!({ "impressions": impressions, "actions": actions });
    let (status, said) = daemon.post("/v1/events", &body.to_string());
    assert_eq!(status, 200, "{said}");
}

#[test]
fn versions_serve_side_by_side_and_swap_under_requests() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("versions") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    trained(dir, &plugins, &binary);
    // The predictions of each expert with the FM that it was trained on, in separate daemons.
    let first = TestDaemon::start(&binary, dir);
    let (feed_1, search_1) = (predictions(&first, "feed"), predictions(&first, "search"));
    assert!(first.stop());
    let second = TestDaemon::start_with(&binary, dir, &["--config", "second.toml"]);
    let feed_2 = predictions(&second, "feed");
    assert!(second.stop());

    // Register the versions. From then on the registry decides what serves.
    assert!(versions(&binary, dir, &["list"]).contains("nothing is registered"));
    versions(&binary, dir, &["register", "fm"]);
    versions(&binary, dir, &["register", "fm", "--checkpoint", "runs/fm2"]);
    versions(&binary, dir, &["register", "expert", "short", "1.0.0"]);
    versions(&binary, dir, &["register", "expert", "mlp", "1.0.0"]);
    versions(&binary, dir, &["register", "expert", "short", "2.0.0", "--config", "second.toml"]);
    refused(&binary, dir, &["promote", "expert", "short", "1.0.0"], "promote that FM first");
    versions(&binary, dir, &["promote", "fm", "1.0.0"]);
    versions(&binary, dir, &["promote", "expert", "short", "1.0.0"]);
    versions(&binary, dir, &["promote", "expert", "mlp", "1.0.0"]);
    let daemon = TestDaemon::start(&binary, dir);
    assert_close(&predictions(&daemon, "feed"), &feed_1);

    // Promote and roll back under load.
    let stop = AtomicBool::new(false);
    let answered: usize = std::thread::scope(|scope| {
        let ask = |user: u64| {
            let (daemon, stop) = (&daemon, &stop);
            scope.spawn(move || {
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (status, answer) = daemon.post("/v1/rank", &rank(user, "feed"));
                    assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
                    let pins =
                        if answer["expert"]["version"] == "2.0.0" { "2.0.0" } else { "1.0.0" };
                    assert_eq!(answer["fm_version"], pins, "expert and FM belong together");
                    answered += 1;
                }
                answered
            })
        };
        let threads: Vec<_> = (1..3).map(ask).collect();
        versions(&binary, dir, &["promote", "fm", "2.0.0"]);
        versions(&binary, dir, &["promote", "expert", "short", "2.0.0"]);
        until(&daemon, "short@2.0.0");
        versions(&binary, dir, &["rollback", "expert", "short"]);
        until(&daemon, "short@1.0.0");
        versions(&binary, dir, &["promote", "expert", "short", "2.0.0"]);
        until(&daemon, "short@2.0.0");
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(answered > 0);

    // Each expert uses the FM to which it is pinned.
    assert_close(&predictions(&daemon, "feed"), &feed_2);
    assert_close(&predictions(&daemon, "search"), &search_1);
    refused(&binary, dir, &["retire", "fm", "1.0.0"], "expert mlp 1.0.0 (active)");
    refused(&binary, dir, &["retire", "expert", "short", "2.0.0"], "answers 100 %");

    // Shares of users, and shadows.
    versions(&binary, dir, &["promote", "expert", "short", "1.0.0", "--share", "0.5"]);
    let give_up = Instant::now() + Duration::from_secs(60);
    let arms = || -> Vec<Value> {
        (1..30)
            .map(|user| daemon.post("/v1/rank", &rank(user, "feed")).1["expert"]["version"].clone())
            .collect()
    };
    while !arms().contains(&json!("1.0.0")) {
        assert!(Instant::now() < give_up, "1.0.0 serves its share");
    }
    let split = arms();
    assert!(split.contains(&json!("2.0.0")), "{split:?}");
    assert_eq!(split, arms(), "a user always gets the same version");
    let (_, metrics) = daemon.get("/metrics");
    assert!(metrics.contains("hypercast_arm_requests_total{arm=\"short@2.0.0\""), "{metrics}");
    let live: Value = serde_json::from_str(&daemon.get("/v1/live").1).unwrap();
    assert_eq!(live["fms"].as_array().unwrap().len(), 2, "{live}");
    assert_eq!(live["arms"], json!([]), "no outcome is known");

    // What came of either's rankings is counted, and told by the daemon and the command.
    let list = ["list", "--daemon", daemon.url()];
    assert!(versions(&binary, dir, &list).contains("no two versions share users"));
    wait_until("outcomes of both versions", Duration::from_secs(60), || {
        show_and_click(&daemon);
        let live: Value = serde_json::from_str(&daemon.get("/v1/live").1).unwrap();
        let arms = live["arms"].as_array().unwrap();
        !arms.is_empty() && arms.iter().all(|arm| arm["rows"] != 0)
    });
    let table = versions(&binary, dir, &list);
    assert!(
        ["short@1.0.0", "short@2.0.0", "50.0 %"].iter().all(|own| table.contains(own)),
        "{table}"
    );
    assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));
    assert!(daemon.stop());
}

#[test]
fn a_version_that_cannot_be_loaded_does_not_affect_the_serving_one() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("a bad promotion")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = world(dir, 1000, 2);
    config.experts = vec![expert("mlp", plugins.join("mlp-fusion.wasm"), &[])];
    config.write(&dir.join("hypercast.toml")).unwrap();
    run_well(&binary, dir, &["train", "fm"]);
    run_well(&binary, dir, &["train", "expert"]);
    versions(&binary, dir, &["register", "fm"]);
    versions(&binary, dir, &["promote", "fm", "1.0.0"]);
    for version in ["1.0.0", "1.1.0"] {
        versions(&binary, dir, &["register", "expert", "mlp", version]);
    }
    versions(&binary, dir, &["promote", "expert", "mlp", "1.0.0"]);
    let daemon = TestDaemon::start(&binary, dir);
    std::fs::write(dir.join("runs/experts/mlp/1.1.0/plugin.wasm"), b"something else").unwrap();
    versions(&binary, dir, &["promote", "expert", "mlp", "1.1.0"]);
    let give_up = Instant::now() + Duration::from_secs(60);
    while !daemon.get("/readyz").1.contains("not the file that was registered") {
        assert!(Instant::now() < give_up, "{:?}", daemon.get("/readyz"));
        std::thread::sleep(Duration::from_millis(50));
    }
    let (status, text) = daemon.get("/readyz");
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("not_ready")), "{answer}");
    assert_eq!(answer["missing"], json!(["expert mlp 1.1.0 on FM 1.0.0"]), "{answer}");
    assert_eq!(daemon.get("/readyz/serving"), (200, "serving\n".into()));
    let (status, answer) = daemon.post("/v1/rank", &rank(1, "feed"));
    assert_eq!((status, &answer["expert"]["arm"]), (200, &json!("mlp@1.0.0")), "{answer}");
    // After the rollback the broken version is only a standby, which is still reported. Retiring it
    // ends that.
    versions(&binary, dir, &["rollback", "expert", "mlp"]);
    versions(&binary, dir, &["retire", "expert", "mlp", "1.1.0"]);
    while daemon.get("/readyz").1 != "ready\n" {
        assert!(Instant::now() < give_up, "{:?}", daemon.get("/readyz"));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(daemon.stop());
}
