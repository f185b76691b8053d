//! Hostile guests in a running daemon, each on its own surface, next to a valid expert on another.
//! The fault of each is contained and reported, and the valid expert is not affected. Guests that
//! fail at load or in training are refused with plugin and cause.

use hypercast_config::Config;
use hypercast_data::schema::Schema;
use hypercast_tests::{Prerequisites, TestDaemon, expert, prerequisites, run, run_well, world};
use serde_json::Value;

/// Guests that load and train like any other and fail in `rank` or in their network, with the cause
/// that an answer must contain.
const AT_SERVING: [(&str, &str); 15] = [
    ("empty", "no ranked candidate"),
    ("greedy", "deadline of 1000 ms"),
    ("spin", "deadline"),
    ("bomb", "MiB of memory"),
    ("overflow", "call stack"),
    ("overflow_array", "call stack"),
    ("trap", "trapped"),
    ("rank_error", "returned an error"),
    ("nan", "score NaN"),
    ("nan_network", "prediction NaN"),
    ("huge_output", "bytes of output"),
    ("propensity", "propensity 1.5"),
    ("wrong_length", "bad output"),
    ("out_of_range", "bad output"),
    ("duplicates", "bad output"),
];

/// Guests that are refused at load, with a part of the reason.
const AT_LOAD: [(&str, &str); 21] = [
    ("bomb_describe", "MiB of memory"),
    ("deep", "more than the limit"),
    ("flops", "FLOPs a candidate"),
    ("foreign_column", "`no_such_feature`"),
    ("foreign_rank_column", "rank-columns"),
    ("hoards", "MiB of memory where it serves, more than the limit of 4096 MiB"),
    ("long_history", "history-len"),
    ("long_name", "longer than"),
    ("shape_overflow", "overflows"),
    ("spin_network", "deadline"),
    ("tasks_twice", "declared twice"),
    ("wide", "values a candidate"),
    ("bad_shape", "the inner dimensions 64 and 3 differ"),
    ("unknown_kind", "a column of kind `hologram`"),
    ("unknown_op", "the op is unknown"),
    ("unknown_option", "has the option `momentum`"),
    ("cycle", "no cycle"),
    ("huge", "1000000000 values"),
    ("foreign_version", "contract 1.0.0, and this host speaks 3.0.0 and 2.0.0"),
    ("other_import", "nothing but `log`"),
    ("spin_describe", "deadline"),
];

/// Guests that fail in training, with a part of the reason.
const AT_TRAINING: [(&str, &str); 6] = [
    ("spin_labels", "`labels` ran past its deadline"),
    ("spin_sample", "`sample` ran past its deadline"),
    ("labels_short", "`labels` gave a bad output"),
    ("sample_invalid", "`sample` gave a bad output"),
    ("spin_evaluate", "`evaluate` ran past its deadline"),
    ("trap_evaluate", "`evaluate` trapped"),
];

fn rank(surface: &str, user: u64) -> String {
    let candidates: Vec<String> =
        (0..12).map(|item| format!("{{\"id\": {}}}", item * 7 + 1)).collect();
    format!(
        "{{\"user\": {user}, \"surface\": {surface:?}, \"candidates\": [{}], \"limit\": 5, \"explain\": true}}",
        candidates.join(",")
    )
}

fn write(config: &Config, dir: &std::path::Path) {
    config.write(&dir.join("hypercast.toml")).unwrap();
}

/// Each place has its probability, and a request that is sent again the ranking of before.
fn rankings_by_chance_have_propensities(daemon: &TestDaemon, surface: &str) {
    let ranked = |request: u64| {
        let body = rank(surface, 3).replacen('{', &format!("{{\"request\": {request}, "), 1);
        let (status, answer) = daemon.post("/v1/rank", &body);
        assert_eq!((status, &answer["degraded"]), (200, &Value::Bool(false)), "{answer}");
        answer["ranking"].clone()
    };
    let first = ranked(1);
    for place in first.as_array().unwrap() {
        // Of twenty requests one by chance among twelve, and the others by score.
        let propensity = place["propensity"].as_f64().unwrap();
        let by_chance = 0.05 / 12.0;
        let expected = [by_chance, 0.95 + by_chance];
        assert!(expected.iter().any(|own| (propensity - own).abs() < 1e-6), "{place}");
    }
    assert_eq!(ranked(1), first);
    assert!((2..200).any(|request| ranked(request) != first));
}

#[test]
fn guests_that_fail_in_serving_do_not_affect_a_valid_one() {
    let Some(Prerequisites { hypercast: binary, plugins, hostile, .. }) = prerequisites("hostile")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 1500, AT_SERVING.len() + 2);
    config.plugin_limits.breaker_faults = 1000;
    config.plugin_limits.breaker_lost_share = 1.0;
    // Long enough that a guest fails for its own cause first, even on a busy machine.
    config.plugin_limits.deadline_ms = 1000;
    config.server.deadline_ms = 60_000;
    let schema = Schema::load(&dir.path().join("data/schema.toml")).unwrap();
    let surface = |at: usize| schema.surfaces[at].clone();
    config.experts = vec![expert("good", plugins.join("mlp-fusion.wasm"), &[&surface(0)])];
    for (at, (name, _)) in AT_SERVING.iter().enumerate() {
        config.experts.push(expert(
            name,
            hostile.join(format!("{name}.wasm")),
            &[&surface(at + 1)],
        ));
    }
    let explored = surface(AT_SERVING.len() + 1);
    config.experts.push(expert("explorer", hostile.join("explorer.wasm"), &[&explored]));
    write(&config, dir.path());
    run_well(&binary, dir.path(), &["train", "fm"]);
    run_well(&binary, dir.path(), &["train", "expert"]);
    let daemon = TestDaemon::start(&binary, dir.path());
    rankings_by_chance_have_propensities(&daemon, &explored);
    let (_, before) = daemon.post("/v1/rank", &rank(&surface(0), 3));
    assert_eq!(before["degraded"], false, "{before}");
    assert!(before["ranking"][0]["propensity"].is_null(), "it does not explore: {before}");

    for round in 0..3 {
        for (at, (name, cause)) in AT_SERVING.iter().enumerate() {
            let (status, answer) = daemon.post("/v1/rank", &rank(&surface(at + 1), round));
            assert_eq!(status, 200, "{name}: {answer}");
            assert_eq!(answer["degraded"], true, "{name}: {answer}");
            assert_eq!(
                answer["ranking"].as_array().unwrap().len(),
                5,
                "{name}: the FM's ranking answers"
            );
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains(cause), "{name}: {reason}");
            assert!(
                reason.contains(answer["expert"]["plugin"].as_str().unwrap()),
                "{name}: {reason}"
            );
            let (_, good) = daemon.post("/v1/rank", &rank(&surface(0), 3));
            assert_eq!(good["degraded"], false, "next to {name}: {good}");
            assert_eq!(good["ranking"][0]["id"], before["ranking"][0]["id"], "next to {name}");
        }
    }
    let (_, metrics) = daemon.get("/metrics");
    assert!(
        metrics.contains("hypercast_degraded_total{cause=\"deadline\",expert=\"spin\"} 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("hypercast_plugin_faults_total{arm=\"spin@1.0.0\",cause=\"deadline\"} 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("hypercast_plugin_breaker{arm=\"good@0.1.0\",state=\"closed\"} 1"),
        "{metrics}"
    );
    assert!(!metrics.contains("expert=\"good\"}"), "the valid expert never degraded: {metrics}");
    assert!(daemon.stop(), "the daemon stops cleanly");
}

#[test]
fn a_breaker_opens_and_the_daemon_keeps_answering() {
    let Some(Prerequisites { hypercast: binary, hostile, .. }) = prerequisites("breaker") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 800, 1);
    config.plugin_limits.breaker_faults = 2;
    config.plugin_limits.breaker_rest_ms = 3_600_000;
    config.experts = vec![expert("trap", hostile.join("trap.wasm"), &["feed"])];
    write(&config, dir.path());
    run_well(&binary, dir.path(), &["train", "fm"]);
    run_well(&binary, dir.path(), &["train", "expert"]);
    let daemon = TestDaemon::start(&binary, dir.path());
    let reasons: Vec<String> = (0..4)
        .map(|user| {
            daemon.post("/v1/rank", &rank("feed", user)).1["reason"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(reasons[..2].iter().all(|reason| reason.contains("trapped")), "{reasons:?}");
    assert!(reasons[2..].iter().all(|reason| reason.contains("breaker is open")), "{reasons:?}");
}

#[test]
fn guests_that_fail_at_load_or_in_training_are_refused_with_plugin_and_cause() {
    let Some(Prerequisites { hypercast: binary, hostile, .. }) = prerequisites("refusals") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 800, 1);
    for (name, word) in AT_LOAD {
        let file = hostile.join(format!("{name}.wasm")).display().to_string();
        let (well, text) =
            run(&binary, dir.path(), &["plugin", "check", &file, "--schema", "data/schema.toml"]);
        assert!(!well, "{name} was accepted: {text}");
        assert!(text.contains(word), "{name}: {text}");
        assert!(
            text.contains(name) || text.contains(&name.replace('_', "-")),
            "the plugin is named: {text}"
        );
    }
    for (name, _) in AT_TRAINING {
        config.experts.push(expert(name, hostile.join(format!("{name}.wasm")), &[]));
    }
    write(&config, dir.path());
    run_well(&binary, dir.path(), &["train", "fm"]);
    let unhurried = config.plugin_limits.setup_deadline_ms;
    for (name, word) in AT_TRAINING {
        // A guest that spins does so until each deadline. The others have to fail for their own
        // cause first, on a busy machine too.
        let spins = name.starts_with("spin");
        config.plugin_limits.setup_deadline_ms = if spins { 200 } else { unhurried };
        write(&config, dir.path());
        let (well, text) = run(&binary, dir.path(), &["train", "expert", name]);
        assert!(!well && text.contains(word), "{name}: {text}");
        assert!(
            text.contains(name) || text.contains(&name.replace('_', "-")),
            "the plugin is named: {text}"
        );
    }
}
