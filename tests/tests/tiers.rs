//! Tiers as an operator runs them: the FM in its own process, deadlines that are passed on, and
//! requests that are refused at once if they cannot be answered in time.

use std::{path::Path, time::Duration};

use hypercast_config::Config;
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, rank_body, run_well,
    secure::{Certificate, HttpRequest, ask, write_secret},
    services::wait_until,
    world,
};
use serde_json::{Value, json};

/// A small trained world with one expert.
fn trained(dir: &Path, plugins: &Path, binary: &Path) -> Config {
    let mut config = world(dir, 1500, 2);
    config.experts = vec![expert("mlp", plugins.join("mlp-fusion.wasm"), &[])];
    write(&config, dir, "hypercast.toml");
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
    config
}

fn write(config: &Config, dir: &Path, name: &str) {
    config.write(&dir.join(name)).unwrap();
}

fn rank(user: u64) -> String {
    rank_body(user, "feed", 1..40).to_string()
}

/// The item and score of each place in the ranking, sorted by item.
fn scores(answer: &Value) -> Vec<(u64, f64)> {
    let places = answer["ranking"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let mut scores: Vec<(u64, f64)> = places
        .iter()
        .map(|place| (place["id"].as_u64().unwrap(), place["score"].as_f64().unwrap()))
        .collect();
    scores.sort_by_key(|(id, _)| *id);
    scores
}

#[test]
fn separate_tiers_answer_like_one_process_and_survive_each_other() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("tiers") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let config = trained(dir.path(), &plugins, &binary);
    let whole = TestDaemon::start(&binary, dir.path());
    let expected: Vec<Value> = (1..6).map(|user| whole.post("/v1/rank", &rank(user)).1).collect();
    assert!(whole.stop());

    for (format, tolerance) in [("f32", 1e-5), ("bf16", 0.02), ("int8", 0.05)] {
        let mut of_fm = config.clone();
        of_fm.fm_serving.tae = serde_json::from_value(json!(format)).unwrap();
        write(&of_fm, dir.path(), "fm.toml");
        let fm = TestDaemon::start_with(
            &binary,
            dir.path(),
            &["--config", "fm.toml", "--tier", "fm-serving"],
        );
        let mut of_expert = config.clone();
        of_expert.fm_serving.url = fm.url().into();
        // The expert tier needs no checkpoint of the FM.
        of_expert.paths.fm = "nowhere".into();
        write(&of_expert, dir.path(), "expert.toml");
        let experts = TestDaemon::start_with(
            &binary,
            dir.path(),
            &["--config", "expert.toml", "--tier", "expert"],
        );
        for (user, expected) in (1..6).zip(&expected) {
            let (status, answer) = experts.post("/v1/rank", &rank(user));
            assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{format}: {answer}");
            for ((id, score), (same, expected)) in scores(&answer).iter().zip(scores(expected)) {
                assert_eq!(*id, same);
                assert!(
                    (score - expected).abs() <= tolerance,
                    "{format}, item {id}: {score} {expected}"
                );
            }
        }
        assert_eq!(fm.post("/v1/rank", &rank(1)).0, 404, "the FM's tier does not rank");
        let (_, metrics) = fm.get("/metrics");
        assert!(metrics.contains("hypercast_fm_batch_requests_count 5"), "{metrics}");
        assert!(metrics.contains("hypercast_history_cache{what=\"new_tokens\"}"), "{metrics}");

        // Dropping kills the process. The expert continues without embeddings and reports that.
        drop(fm);
        let (status, answer) = experts.post("/v1/rank", &rank(1));
        assert_eq!((status, &answer["degraded"]), (200, &json!(true)), "{answer}");
        let reason = answer["reason"].as_str().unwrap();
        assert!(reason.contains("without the FM's embedding"), "{reason}");
        assert_eq!(answer["ranking"].as_array().unwrap().len(), 39);
        assert!(experts.stop());
    }
}

#[test]
fn the_expert_tier_uses_tls_and_tokens_of_the_fm_tier() {
    const TOKEN: &str = "4f1d0d5c2f7e4f3aa1b0c9d8e7f60514";
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("tiers over TLS")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let config = trained(dir.path(), &plugins, &binary);
    let own = Certificate::make(dir.path(), "own");
    write_secret(&dir.path().join("callers"), &format!("experts {TOKEN}\n"));
    write_secret(&dir.path().join("token"), &format!("{TOKEN}\n"));
    write_secret(&dir.path().join("old-token"), &TOKEN.replace('4', "5"));

    let mut of_fm = config.clone();
    of_fm.server.tls_certificate = "own.crt".into();
    of_fm.server.tls_key = "own.key".into();
    of_fm.server.tokens = "callers".into();
    write(&of_fm, dir.path(), "fm.toml");
    let args = ["--config", "fm.toml", "--tier", "fm-serving"];
    let fm = TestDaemon::start_with(&binary, dir.path(), &args);
    let url = fm.url().replace("127.0.0.1", "localhost");
    assert!(url.starts_with("https://"), "{url}");
    let asked = HttpRequest { route: "/v1/embed", body: Some(""), ..HttpRequest::default() };
    assert_eq!(ask(fm.url(), Some(&own), asked).unwrap().status, 401);

    let mut of_expert = config;
    of_expert.fm_serving.url = url;
    of_expert.fm_serving.ca = "own.crt".into();
    of_expert.fm_serving.token = "token".into();
    let args = ["--config", "expert.toml", "--tier", "expert"];
    for (change, word) in [
        (
            &(|config: &mut Config| config.fm_serving.ca = "".into()) as &dyn Fn(&mut Config),
            "certificate",
        ),
        (&|config| config.fm_serving.token = "".into(), "fm_serving.token"),
        (&|config| config.fm_serving.token = "old-token".into(), "fm_serving.token"),
        (&|config| config.fm_serving.token = "callers".into(), "one token and nothing else"),
        (&|config| config.fm_serving.ca = "own.key".into(), "own.key"),
    ] {
        let mut wrong = of_expert.clone();
        change(&mut wrong);
        write(&wrong, dir.path(), "expert.toml");
        let args = [&["serve", "--listen", "127.0.0.1:0"], &args[..]].concat();
        let (well, text) = hypercast_tests::run(&binary, dir.path(), &args);
        assert!(!well && text.contains(word) && !text.contains(TOKEN), "{word}: {text}");
    }
    write(&of_expert, dir.path(), "expert.toml");
    let experts = TestDaemon::start_with(&binary, dir.path(), &args);
    for user in 1..6 {
        let (status, answer) = experts.post("/v1/rank", &rank(user));
        assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
    }
    // After a reload the FM's tier rejects the old token. The expert continues without embeddings
    // and reports why.
    write_secret(&dir.path().join("callers"), &format!("others {}\n", TOKEN.replace('4', "6")));
    fm.hang_up();
    wait_until("the FM's tier rejects the token", Duration::from_secs(60), || {
        experts.post("/v1/rank", &rank(1)).1["degraded"] == json!(true)
    });
    let (_, answer) = experts.post("/v1/rank", &rank(1));
    assert!(answer["reason"].as_str().unwrap().contains("token"), "{answer}");
    assert!(experts.stop() && fm.stop());
}

#[test]
fn an_expert_tier_without_an_fm_names_the_missing_key() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("expert tier")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    trained(dir.path(), &plugins, &binary);
    let (well, text) = hypercast_tests::run(&binary, dir.path(), &["serve", "--tier", "expert"]);
    assert!(!well && text.contains("fm_serving.url"), "{text}");
}

#[test]
fn requests_that_cannot_be_answered_in_time_are_refused() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("shedding") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut config = trained(dir.path(), &plugins, &binary);
    (config.server.queue, config.server.threads) = (2, 1);
    write(&config, dir.path(), "hypercast.toml");
    let daemon = TestDaemon::start(&binary, dir.path());
    let (status, answer, _) = daemon.post_within("/v1/rank", &rank(1), "soon");
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("hypercast-deadline-ms"));
    let (status, answer, _) = daemon.post_within("/v1/rank", &rank(1), "0");
    assert_eq!((status, answer["error"]["code"].as_str()), (504, Some("deadline")), "{answer}");
    assert_eq!(daemon.post_within("/v1/rank", &rank(1), "60000").0, 200);

    let answers: Vec<(u16, Value, bool)> = std::thread::scope(|scope| {
        let ask = |user| {
            let daemon = &daemon;
            scope.spawn(move || daemon.post_within("/v1/rank", &rank(user), "60000"))
        };
        let asked: Vec<_> = (0..40).map(ask).collect();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let count = |wanted| answers.iter().filter(|(status, _, _)| *status == wanted).count();
    assert_eq!(count(200) + count(503), 40, "{answers:?}");
    assert!(count(200) >= 2 && count(503) >= 1, "{} answered, {} refused", count(200), count(503));
    for (status, answer, again) in &answers {
        assert_eq!(*status == 503, *again, "a refusal has a retry-after header: {answer}");
    }
    assert_eq!(daemon.post("/v1/rank", &rank(1)).0, 200, "the daemon accepts requests again");
    assert!(daemon.stop());
}
