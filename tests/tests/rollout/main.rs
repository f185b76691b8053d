//! Pushes as a surface team makes them: rolled out step by step under load, refused with a reason,
//! rolled back automatically, and continued after a restart.
//!
//! `HYPERCAST_ROLLOUT_PUSHES` sets the number of pushes that the last test makes (3 by default).
//! `hostile` has guests that turn hostile in the middle of it.

mod hostile;
mod team;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use hypercast_config::{Config, sha256};
use hypercast_serve::rollout::{PolicyOverrides, Push, PushManifest, SecretKey, SignedManifest};
use hypercast_tests::{
    TestDaemon, agent, run, run_well,
    secure::{Certificate, HttpRequest, ask, write_secret},
    services::wait_until,
};
use serde_json::{Value, json};

use team::{PATIENCE, RequestLoad, Team, predictions, rank, state};

/// POSTs the body of a push. Returns the status and the error message.
fn send(daemon: &TestDaemon, version: &str, body: &[u8]) -> (u16, String) {
    let url = format!("{}/v1/admin/experts/home/versions/{version}", daemon.url());
    let mut answer = agent().post(&url).send(body).unwrap();
    let status = answer.status().as_u16();
    let answer: Value = answer.body_mut().read_json().unwrap();
    (status, answer["error"]["message"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_push_is_rolled_out_to_everybody_and_invalid_pushes_are_refused_with_a_reason() {
    let Some(team) = Team::new("rollout", |_| {}) else { return };
    let other = team.trained(&team.component(), 8);
    let other = other.to_str().unwrap();
    let daemon = team.daemon();
    let first = predictions(&daemon);

    // Roll out under load. No request fails or is degraded.
    let load = RequestLoad::of(12);
    let push =
        || team.push(&daemon, &team.component(), &["--version", "1.1.0", "--parameters", other]);
    let (status, said) = load.during(&daemon, push);
    assert_eq!(status, 0, "{said}");
    for word in
        ["signed by key", "recorded requests replayed", "shadow", "canary", "answers everybody"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(load.counts().1, 0, "of {} requests", load.counts().0);
    let second = predictions(&daemon);
    assert_ne!(first, second, "the new parameters answer");
    assert!(team.list().contains("standby"), "{}", team.list());

    // Send invalid pushes directly. Each is refused with its reason, and nothing changes.
    let before = team.list();
    let component = std::fs::read(team.component()).unwrap();
    let manifest = |version: &str| PushManifest {
        name: "home".into(),
        version: version.into(),
        contract: contract(&component),
        surfaces: Vec::new(),
        fm: None,
        component: sha256(&component),
        parameters: None,
        created_ms: i64::MAX,
        audience: None,
        expires_ms: None,
        policy: PolicyOverrides::default(),
    };
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64;
    let body = |signed: SignedManifest, component: &[u8]| {
        Push { signed, wishes: PolicyOverrides::default(), component, parameters: None }.encode()
    };
    let key = team.key();
    let sign = |version: &str, created_ms: i64| {
        key.sign(&PushManifest { created_ms, ..manifest(version) })
    };
    let good = body(sign("1.2.0", now()), &component);
    let refused = |version: &str, body: &[u8], word: &str| {
        let (status, said) = send(&daemon, version, body);
        assert!((400..500).contains(&status) && said.contains(word), "{word}: {status} {said}");
    };
    let stranger = SecretKey::generate().unwrap();
    refused("1.2.0", &body(stranger.sign(&manifest("1.2.0")), &component), "not trusted");
    let posing = SignedManifest { key: key.public().id(), ..stranger.sign(&manifest("1.2.0")) };
    refused("1.2.0", &body(posing, &component), "the signature does not fit key");
    let mut flipped = good.clone();
    let last = flipped.len() - 1000;
    flipped[last] ^= 1;
    refused("1.2.0", &flipped, "not the one that was signed");
    refused("1.2.0", &good[..good.len() - 1], "it is truncated");
    refused("1.3.0", &good, "home 1.2.0 was signed, but it was pushed as home 1.3.0");
    refused("1.2.0", &body(sign("1.2.0", 1000), &component), "older pushes are refused");
    refused("1.2.0", &body(sign("1.2.0", i64::MAX), &component), "clock");
    refused("1.1.0", &body(sign("1.1.0", now()), &component), "other content");
    refused("1.2.0", b"no push", "hcpush01");
    let wishes = PolicyOverrides { canary_share: Some(0.9), ..PolicyOverrides::default() };
    let policy = wishes.clone();
    let eager = PushManifest { created_ms: now(), policy, ..manifest("1.2.0") };
    refused("1.2.0", &body(key.sign(&eager), &component), "rollout.canary_share");
    let unsigned =
        Push { signed: sign("1.2.0", now()), wishes, component: &component, parameters: None };
    refused("1.2.0", &unsigned.encode(), "other conditions than were signed");
    let expired = PushManifest { created_ms: now(), expires_ms: Some(1), ..manifest("1.2.0") };
    refused("1.2.0", &body(key.sign(&expired), &component), "the signature expired");
    let audience = Some("another".to_owned());
    let elsewhere = PushManifest { created_ms: now(), audience, ..manifest("1.2.0") };
    refused("1.2.0", &body(key.sign(&elsewhere), &component), "rollout.audience");
    // A push without parameters needs a network whose parameters the serving version has.
    let short = team.plugins.join("short-term.wasm");
    let (status, said) = team.push(&daemon, &short, &["--version", "2.0.0"]);
    assert!(
        status == 1 && said.contains("by name and shape: `") && said.contains("train"),
        "{said}"
    );
    // A component that faults on the recorded requests does not get past the replay.
    let trap = team.hostile.join("trap.wasm");
    let parameters = team.trained(&trap, 9);
    let args = ["--version", "2.1.0", "--parameters", parameters.to_str().unwrap()];
    assert_eq!(team.list(), before, "refusals change nothing");
    let (status, said) = team.push(&daemon, &trap, &args);
    assert!(status == 1 && said.contains("replay:") && said.contains("trap"), "{said}");
    assert_eq!((team.list(), predictions(&daemon)), (before, second));

    // A push without parameters starts from those of the serving version. Roll it back by hand.
    let load = RequestLoad::of(12);
    let (status, said) =
        load.during(&daemon, || team.push(&daemon, &team.component(), &["--version", "1.2.0"]));
    assert!(status == 0 && said.contains("the parameters of 1.1.0"), "{said}");
    assert_eq!(load.counts().1, 0);
    let done = run_well(&team.binary, &team.dir, &["plugin", "rollback", "home", daemon.url()]);
    assert!(done.contains("1.1.0 (100 %)"), "{done}");
    let logs = run_well(&team.binary, &team.dir, &["plugin", "logs", "home", daemon.url()]);
    assert!(logs.contains("home@1.2.0 (rolled-back)") && logs.contains("asked to"), "{logs}");
    // The panic of the version that was given up is there, with its place.
    assert!(logs.contains("trap.rs:") && logs.contains("intended panic with"), "{logs}");

    // The recorded requests can be replayed.
    let args = ["plugin", "replay", team.plugins.join("mlp-fusion.wasm").to_str().unwrap()]
        .map(str::to_owned);
    let more = ["--requests", "runs/state/recorded", "--parameters", other, "--json"];
    let args: Vec<&str> = args.iter().map(String::as_str).chain(more).collect();
    let report: Value = serde_json::from_str(&run_well(&team.binary, &team.dir, &args)).unwrap();
    assert!(report["compared"].as_u64().unwrap() > 20, "{report}");
    assert_eq!(report["faults"], json!({}), "{report}");
    assert!(daemon.stop());
}

fn contract(component: &[u8]) -> String {
    let import = b"hypercast:expert/types@";
    let at = component.windows(import.len()).position(|bytes| bytes == import).unwrap();
    let version = component[at + import.len()..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit() || **byte == b'.');
    version.map(|byte| char::from(*byte)).collect()
}

#[test]
fn a_version_that_faults_in_its_canary_is_rolled_back() {
    let Some(team) = Team::new("canary", |config| config.rollout.canary_requests = 1_000_000)
    else {
        return;
    };
    let crowd = team.hostile.join("crowd.wasm");
    let parameters = team.trained(&crowd, 9);
    let daemon = team.daemon();
    let first = predictions(&daemon);
    let load = RequestLoad::of(12);
    let (status, said) = load.during(&daemon, || {
        std::thread::scope(|scope| {
            let push = scope.spawn(|| {
                let args = ["--version", "1.1.0", "--parameters", parameters.to_str().unwrap()];
                team.push(&daemon, &crowd, &args)
            });
            wait_until("it is a canary that answers", PATIENCE, || {
                push.is_finished() || state(&daemon, "1.1.0")["step"] == "canary"
            });
            // From now on send requests on which it faults.
            load.candidates.store(20, Ordering::Relaxed);
            push.join().unwrap()
        })
    });
    assert_eq!(status, 1, "{said}");
    for word in ["rolled-back rolled back to 1.0.0: canary: faults", "trap"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // Every request was answered, and all users are back on the previous version.
    let (answered, bad) = load.counts();
    assert!(bad > 0 && bad < answered, "{bad} of {answered}");
    let give_up = Instant::now() + PATIENCE;
    while (1..30).any(|user| daemon.post("/v1/rank", &rank(user, 20)).1["degraded"] != json!(false))
    {
        assert!(Instant::now() < give_up, "all users return to the previous version");
    }
    assert_eq!(predictions(&daemon), first);
    assert!(team.list().contains("retired"), "{}", team.list());
    // The same version cannot be pushed again.
    let (status, said) = team.push(
        &daemon,
        &crowd,
        &["--version", "1.1.0", "--parameters", parameters.to_str().unwrap()],
    );
    assert!(status == 1 && said.contains("retired"), "{said}");
    let (well, said) = run(&team.binary, &team.dir, &["plugin", "rollback", "home", daemon.url()]);
    assert!(!well && said.contains("no earlier version"), "{said}");
    assert!(daemon.stop());
}

#[test]
fn a_version_that_is_slow_in_its_canary_is_rolled_back() {
    let change = |config: &mut Config| {
        config.rollout.canary_requests = 1_000_000;
        config.rollout.latency_factor = 1.0;
        config.rollout.latency_slack_ms = 5.0;
        // The guest must be slow without running past a deadline, on any machine.
        config.plugin_limits.deadline_ms = 60_000;
        config.server.deadline_ms = 60_000;
    };
    let Some(team) = Team::new("slow canary", change) else { return };
    let plods = team.hostile.join("plods.wasm");
    let parameters = team.trained(&plods, 9);
    let daemon = team.daemon();
    let load = RequestLoad::of(12);
    let (status, said) = load.during(&daemon, || {
        std::thread::scope(|scope| {
            let push = scope.spawn(|| {
                let args = ["--version", "1.1.0", "--parameters", parameters.to_str().unwrap()];
                team.push(&daemon, &plods, &args)
            });
            wait_until("it is a canary that answers", PATIENCE, || {
                push.is_finished() || state(&daemon, "1.1.0")["step"] == "canary"
            });
            load.candidates.store(20, Ordering::Relaxed);
            push.join().unwrap()
        })
    });
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("rolled-back rolled back to 1.0.0: canary: latency: p99"), "{said}");
    assert_eq!(load.counts().1, 0, "no answer was degraded");
    let list = team.list();
    assert!(list.contains("retired"), "{list}");
    assert!(daemon.stop());
}

#[test]
fn a_canary_that_its_own_evaluate_rejects_is_rolled_back() {
    let change = |config: &mut Config| {
        config.rollout.canary_requests = 1_000_000;
        config.join.max_future_s = 0;
    };
    let Some(team) = Team::new("evaluate", change) else { return };
    let takes_back = team.hostile.join("takes_back.wasm");
    let parameters = team.trained(&takes_back, 9);
    let daemon = team.daemon();
    let mut load = RequestLoad::of(12);
    load.sends_outcomes = true;
    let args = ["--version", "1.1.0", "--parameters", parameters.to_str().unwrap()];
    let (status, said) = load.during(&daemon, || team.push(&daemon, &takes_back, &args));
    assert_eq!(status, 1, "{said}");
    let cause = "rolled back to 1.0.0: canary: evaluate: takes_back never wants anything new";
    assert!(said.contains(cause), "{said}");
    assert_eq!(load.counts().1, 0, "no answer was degraded");
    assert!(daemon.stop());
}

#[test]
fn a_first_push_over_tls_registers_the_configured_expert() {
    const TOKEN: &str = "4f1d0d5c2f7e4f3aa1b0c9d8e7f60514";
    let change = |config: &mut Config| {
        config.server.admin_tokens = "admin".into();
        config.server.tls_certificate = "own.crt".into();
        config.server.tls_key = "own.key".into();
    };
    let Some(team) = Team::unregistered("first push", change) else { return };
    let own = Certificate::make(&team.dir, "own");
    write_secret(&team.dir.join("admin"), &format!("team {TOKEN}\n"));
    write_secret(&team.dir.join("token"), TOKEN);
    let daemon = team.daemon();
    let url = daemon.url().replace("127.0.0.1", "localhost");
    let answered = || {
        let body = rank(1, 12);
        let asked = HttpRequest {
            route: "/v1/rank",
            body: Some(&body),
            header: Some("Content-Type: application/json"),
            ..HttpRequest::default()
        };
        let answer = ask(&url, Some(&own), asked).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    };
    let before = answered();
    assert_eq!(
        (&before["expert"]["arm"], &before["degraded"]),
        (&json!("home@0.1.0"), &json!(false))
    );

    let (status, said) = team.push_to(&url, &team.component(), &["--version", "1.1.0"]);
    assert!(
        status == 1 && said.contains("cannot reach"),
        "only the authority named by --ca is trusted: {said}"
    );
    let (status, said) =
        team.push_to(&url, &team.component(), &["--version", "1.1.0", "--ca", "own.crt"]);
    assert!(status == 1 && said.contains("401"), "{said}");
    let stop = AtomicBool::new(false);
    let (status, said) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(answered()["degraded"], json!(false));
            }
        });
        let args = [
            "--version",
            "1.1.0",
            "--ca",
            "own.crt",
            "--token-file",
            "token",
            "--stop-after",
            "shadow",
        ];
        let pushed = team.push_to(&url, &team.component(), &args);
        stop.store(true, Ordering::Relaxed);
        pushed
    });
    assert!(
        status == 3 && said.contains("the parameters of 0.1.0") && said.contains("waits for"),
        "{said}"
    );
    // The configured expert is now registered and answers as before.
    let after = answered();
    assert_eq!(after["expert"]["arm"], json!("home@0.1.0"));
    assert_eq!(before["ranking"], after["ranking"]);
    let list = team.list();
    assert!(list.contains("100.0 %") && list.contains("shadow"), "{list}");
    assert!(daemon.stop());
}

#[test]
fn a_rollout_continues_after_a_restart_and_waits_at_the_given_step() {
    let Some(team) = Team::new("restart", |_| {}) else { return };
    let daemon = team.daemon();
    let args = ["--version", "1.1.0", "--no-wait", "--stop-after", "canary"];
    let (status, said) = team.push(&daemon, &team.component(), &args);
    assert_eq!(status, 0, "{said}");
    wait_until("it is a shadow", PATIENCE, || state(&daemon, "1.1.0")["step"] == "shadow");
    let (status, said) = team.push(&daemon, &team.component(), &["--version", "1.2.0"]);
    assert!(status == 1 && said.contains("1.1.0 is under way (shadow)"), "{said}");
    assert!(daemon.stop());
    let daemon = team.daemon();
    let load = RequestLoad::of(12);
    load.during(&daemon, || {
        wait_until("it waits", PATIENCE, || state(&daemon, "1.1.0")["step"] == "waiting");
        team.versions(&["promote", "expert", "home", "1.1.0"]);
        wait_until("it is promoted", PATIENCE, || state(&daemon, "1.1.0")["step"] == "promoted");
    });
    assert_eq!(load.counts().1, 0);
    assert!(daemon.stop());
}

#[test]
fn many_pushes_in_a_row_under_load() {
    let change = |config: &mut Config| {
        config.rollout.shadow_requests = 5;
        config.rollout.canary_requests = 5;
        config.rollout.replay_requests = 10;
        config.recorded.share = 0.05;
        config.engine.fsync = false;
        // The defaults take an hour to fill; until then memory would grow. What was ranked where
        // waits for impressions, which never come here.
        config.server.served_predictions = 100_000;
        config.join.correction_s = 30;
    };
    let Some(team) = Team::new("many pushes", change) else { return };
    let pushes: usize = std::env::var("HYPERCAST_ROLLOUT_PUSHES")
        .map_or(3, |pushes| pushes.parse().expect("HYPERCAST_ROLLOUT_PUSHES is a number"));
    let daemon = team.daemon();
    let load = RequestLoad::of(12);
    let memory = load.during(&daemon, || {
        let mut memory = Vec::new();
        let start = Instant::now();
        for push in 1..=pushes {
            let version = format!("1.0.{push}");
            let (status, said) = team.push(&daemon, &team.component(), &["--version", &version]);
            assert_eq!(status, 0, "{said}");
            memory.push(daemon.memory_mib());
            if push % 10 == 0 || push == pushes {
                let (answered, bad) = load.counts();
                eprintln!(
                    "{push} pushes in {:.0} s, {answered} requests, {bad} failed or degraded, {:.0} MiB",
                    start.elapsed().as_secs_f64(),
                    memory[push - 1]
                );
            }
        }
        memory
    });
    let (answered, bad) = load.counts();
    assert_eq!(bad, 0, "of {answered} requests");
    let list = team.list();
    assert_eq!(list.matches("standby").count(), 1, "{list}");
    // After the caches have filled, memory must not grow.
    if pushes >= 50 {
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (early, late) =
            (mean(&memory[pushes / 4..pushes / 2]), mean(&memory[pushes * 3 / 4..]));
        assert!(late < early * 1.1 + 16.0, "{early:.0} MiB, then {late:.0} MiB");
    }
    assert!(daemon.stop());
}
