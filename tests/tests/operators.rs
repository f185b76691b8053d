//! The daemon as an operator runs it: tokens and TLS, reloading the configuration under load, and
//! processes that print where their metrics are.

use std::{
    io::{BufRead, BufReader},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use hypercast_config::Config;
use hypercast_serve::client;
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, run, run_well,
    secure::{Certificate, HttpRequest, HttpResponse, ask, write_secret},
    services::wait_until,
    world,
};
use serde_json::{Value, json};

const OPS: &str = "4f1d0d5c2f7e4f3aa1b0c9d8e7f60514";
const OTHER_OPS: &str = "c0ffee5c2f7e4f3aa1b0c9d8e7f60514";
const FEED: &str = "9a8b7c6d5e4f30219a8b7c6d5e4f3021";

const PATIENCE: Duration = Duration::from_secs(60);

/// Trains an FM and an expert on a small simulated world. The component is copied to its folder.
fn trained(dir: &Path, plugins: &Path, binary: &Path) -> Config {
    let mut config = world(dir, 1000, 2);
    std::fs::copy(plugins.join("mlp-fusion.wasm"), dir.join("mlp.wasm")).unwrap();
    config.experts = vec![expert("mlp", "mlp.wasm".into(), &[])];
    write(&config, dir);
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
    config
}

fn write(config: &Config, dir: &Path) {
    config.write(&dir.join("hypercast.toml")).unwrap();
}

fn rank() -> String {
    let candidates: Vec<Value> = (1..5).map(|id| json!({ "id": id })).collect();
    json!({ "user": 3, "surface": "feed", "candidates": candidates }).to_string()
}

/// The same request with a fixed time, so that answers can be compared.
fn timed_rank() -> String {
    let mut body: Value = serde_json::from_str(&rank()).unwrap();
    body["time_ms"] = json!(1_800_000_000_000_u64);
    body.to_string()
}

/// The value of a metric. `name` includes its labels, if it has any.
fn metric(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

/// Tells the daemon to reload and waits until its metrics count one more reload with `outcome`.
fn reloaded(daemon: &TestDaemon, outcome: &str, metrics: &dyn Fn() -> String) {
    let name = format!("hypercast_reloads_total{{outcome=\"{outcome}\"}}");
    let before = metric(&metrics(), &name).unwrap_or(0.0);
    daemon.hang_up();
    wait_until("the daemon reloads its configuration", PATIENCE, || {
        metric(&metrics(), &name).is_some_and(|now| now > before)
    });
    let ok = metric(&metrics(), "hypercast_config_reload_ok");
    assert_eq!(ok, Some(f64::from(u8::from(outcome == "applied"))));
}

#[test]
fn tokens_and_certificates_are_required_and_can_be_replaced() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("tokens and TLS")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = trained(dir, &plugins, &binary);
    let (first, second) = (Certificate::make(dir, "first"), Certificate::make(dir, "second"));
    write_secret(&dir.join("admin"), &format!("ops {OPS}\n"));
    write_secret(&dir.join("callers"), &format!("feed {FEED}\n"));
    config.server.admin_tokens = "admin".into();
    config.server.tokens = "callers".into();
    config.server.tls_certificate = "first.crt".into();
    config.server.tls_key = "first.key".into();
    write(&config, dir);
    let daemon = TestDaemon::start(&binary, dir);
    assert!(daemon.url().starts_with("https://127.0.0.1:"), "{}", daemon.url());
    // A client that connects but never starts the handshake must not block others.
    let _silent = TcpStream::connect(daemon.url().trim_start_matches("https://")).unwrap();
    let asked = |trusted: &Certificate, of: HttpRequest| ask(daemon.url(), Some(trusted), of);
    let first_answer = |of: HttpRequest| asked(&first, of).unwrap();
    let plain = daemon.url().replace("https", "http");
    let health = HttpRequest { route: "/healthz", ..HttpRequest::default() };
    assert!(ask(&plain, None, health).is_err(), "the port does not accept plain HTTP");
    assert!(asked(&second, health).is_err(), "the daemon does not use the second certificate");
    assert_eq!(first_answer(health).status, 200, "the health route needs no token");

    let body = rank();
    let ranked = HttpRequest { route: "/v1/rank", body: Some(&body), ..HttpRequest::default() };
    let reload =
        HttpRequest { route: "/v1/admin/reload", body: Some(""), ..HttpRequest::default() };
    let message_of =
        |answer: &HttpResponse| answer.json()["error"]["message"].as_str().unwrap().to_owned();
    let answer = first_answer(ranked);
    assert_eq!(answer.status, 401);
    assert!(answer.headers.contains("www-authenticate: bearer"), "{}", answer.headers);
    assert!(message_of(&answer).contains("server.tokens"), "{}", answer.body);
    for token in [FEED, OPS] {
        assert_eq!(first_answer(HttpRequest { token: Some(token), ..ranked }).status, 200);
    }
    let answer = first_answer(reload);
    assert!(answer.status == 401 && message_of(&answer).contains("server.admin_tokens"));
    assert_eq!(first_answer(HttpRequest { token: Some(FEED), ..reload }).status, 403);
    assert_eq!(first_answer(HttpRequest { token: Some(OTHER_OPS), ..reload }).status, 401);
    let answer = first_answer(HttpRequest { token: Some(OPS), ..reload });
    assert_eq!((answer.status, &answer.json()["changed"]), (200, &json!([])), "{}", answer.body);

    // The same with the HTTP client of the host's commands.
    let config = ureq::Agent::config_builder().http_status_as_error(false).build();
    let client = |ca: &Certificate| {
        let agent = client::agent(config.clone(), Some(&ca.certificate)).unwrap();
        let url = daemon.url().replace("127.0.0.1", "localhost") + "/v1/admin/reload";
        agent.post(url).header("authorization", format!("Bearer {OPS}")).send("")
    };
    let mut answer = client(&first).unwrap();
    let outcome: Value = answer.body_mut().read_json().unwrap();
    assert_eq!((answer.status().as_u16(), &outcome["restart"]), (200, &json!([])), "{outcome}");
    let error = client(&second).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");

    // Replace the certificate and the tokens in the same files.
    let read = |trusted: &Certificate| {
        asked(trusted, HttpRequest { route: "/metrics", ..HttpRequest::default() })
            .map(|answer| answer.body)
    };
    let either = || read(&first).or_else(|_| read(&second)).unwrap();
    second.replace(&first);
    write_secret(&dir.join("admin"), &format!("ops {OTHER_OPS}\n"));
    reloaded(&daemon, "applied", &either);
    assert!(asked(&first, health).is_err(), "the first certificate is no longer in use");
    let second_answer = |of: HttpRequest| asked(&second, of).unwrap();
    assert_eq!(second_answer(HttpRequest { token: Some(OPS), ..reload }).status, 401);
    assert_eq!(second_answer(HttpRequest { token: Some(OTHER_OPS), ..reload }).status, 200);

    // If the key does not match the certificate, nothing changes, not even the tokens.
    let third = Certificate::make(dir, "third");
    std::fs::copy(&third.key, dir.join("first.key")).unwrap();
    write_secret(&dir.join("admin"), &format!("ops {OPS}\n"));
    reloaded(&daemon, "refused", &either);
    assert_eq!(second_answer(health).status, 200);
    let answer = second_answer(HttpRequest { token: Some(OTHER_OPS), ..reload });
    assert!(answer.status == 422 && message_of(&answer).contains("first.crt"), "{}", answer.body);
    assert!(daemon.stop());
}

#[test]
fn a_configuration_is_reloaded_completely_or_not_at_all() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("reload") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = trained(dir, &plugins, &binary);
    let daemon = TestDaemon::start(&binary, dir);
    let metrics = || daemon.get("/metrics").1;
    let served = || {
        let (status, answer) = daemon.post("/v1/rank", &rank());
        (status, answer["expert"]["name"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(served(), (200, "mlp".into()));

    config.server.max_candidates = 2;
    config.server.threads = 7;
    write(&config, dir);
    reloaded(&daemon, "applied", &metrics);
    assert_eq!(served().0, 413, "the new limit applies at once");
    let (status, answer) = daemon.post("/v1/admin/reload", "");
    assert_eq!((status, &answer["restart"]), (200, &json!(["server.threads"])), "{answer}");
    assert_eq!(answer["experts"], false);
    let of_a_page = HttpRequest {
        route: "/v1/admin/reload",
        body: Some(""),
        header: Some("Origin: http://page.example"),
        ..HttpRequest::default()
    };
    let status = ask(daemon.url(), None, of_a_page).unwrap().status;
    assert_eq!(status, 403, "requests of web pages are refused");

    // An invalid file changes nothing, and the error says why.
    std::fs::write(dir.join("hypercast.toml"), "[server]\nmax_candidates = 20\nlisen = 1\n")
        .unwrap();
    reloaded(&daemon, "refused", &metrics);
    let (status, answer) = daemon.post("/v1/admin/reload", "");
    assert_eq!((status, answer["error"]["code"].as_str()), (422, Some("not_reloaded")));
    assert!(answer["error"]["message"].as_str().unwrap().contains("lisen"), "{answer}");
    assert_eq!(served().0, 413);

    // The configuration names another expert. One without parameters is refused.
    config.server.max_candidates = 20;
    config.experts[0].name = "untrained".into();
    write(&config, dir);
    reloaded(&daemon, "refused", &metrics);
    assert_eq!(served().0, 413);
    std::fs::rename(dir.join("runs/experts/mlp"), dir.join("runs/experts/renamed")).unwrap();
    config.experts[0].name = "renamed".into();
    write(&config, dir);
    reloaded(&daemon, "applied", &metrics);
    assert_eq!(served(), (200, "renamed".into()));

    // Another component in the same file: the old one with an additional empty section.
    let mut component = std::fs::read(dir.join("mlp.wasm")).unwrap();
    component.extend([0, 3, 1, b'x', b'y']);
    std::fs::write(dir.join("mlp.wasm"), &component).unwrap();
    let (status, answer) = daemon.post("/v1/admin/reload", "");
    assert_eq!((status, &answer["experts"]), (200, &json!(true)), "{answer}");
    std::fs::write(dir.join("mlp.wasm"), "no component").unwrap();
    let (status, answer) = daemon.post("/v1/admin/reload", "");
    assert_eq!(status, 422, "{answer}");
    assert_eq!(served(), (200, "renamed".into()), "the loaded component keeps serving");
    std::fs::write(dir.join("mlp.wasm"), &component).unwrap();
    let expected = daemon.post("/v1/rank", &timed_rank()).1["ranking"].clone();
    assert!(daemon.stop());
    restored(&binary, dir, &expected);
}

/// Copies the folder while nothing runs, and checks that a daemon on the copy answers the same.
fn restored(binary: &Path, dir: &Path, expected: &Value) {
    let copy = tempfile::tempdir().unwrap();
    let args = [dir.join("."), copy.path().to_path_buf()];
    assert!(Command::new("cp").arg("-a").args(args).status().unwrap().success());
    run_well(binary, copy.path(), &["store", "check", "runs/fm/store"]);
    let daemon = TestDaemon::start(binary, copy.path());
    assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));
    assert_eq!(daemon.post("/v1/rank", &timed_rank()).1["ranking"], *expected);
    assert!(daemon.stop());
}

/// It was ready, and answered 500, when nothing compared the two.
#[test]
fn an_fm_that_cannot_read_the_data_sets_columns_is_refused_with_the_way_out() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("misfit") else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write(&world(dir, 300, 1), dir);
    run_well(&binary, dir, &["train", "fm"]);
    let path = dir.join("data/schema.toml");
    let schema = std::fs::read_to_string(&path).unwrap();
    let counter =
        "\n[[counters]]\nname = \"creator_like\"\nkey = [\"creator\"]\naction = \"like\"\n";
    std::fs::write(&path, schema + counter).unwrap();
    let (well, text) = run(&binary, dir, &["serve", "--listen", "127.0.0.1:0"]);
    assert!(!well && text.contains("numeric columns instead of"), "{text}");
    assert!(text.contains("hypercast schema apply"), "{text}");
}

#[test]
fn a_daemon_on_a_public_address_must_be_protected() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("protection") else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = Config::default();
    write_secret(&dir.join("admin"), &format!("ops {OPS}\n"));
    config.server.admin_tokens = "admin".into();
    write(&config, dir);
    let refused = |word: &str| {
        // The daemon refuses before it opens any file of the FM.
        let (well, text) = run(&binary, dir, &["serve", "--listen", "0.0.0.0:0"]);
        assert!(!well && text.contains(word), "{text}");
    };
    refused("server.tls_certificate");
    config.server.tls_certificate = "none.crt".into();
    write(&config, dir);
    refused("server.tls_key");
    config.server.tls_certificate = "".into();
    config.server.admin_tokens = "".into();
    config.server.insecure_admin = true;
    write(&config, dir);
    refused("server.admin_tokens");
    config.server.admin_tokens = "admin".into();
    std::fs::write(dir.join("admin"), "ops short\n").unwrap();
    write(&config, dir);
    refused("at least 24 characters");
}

#[test]
fn a_joiner_prints_where_its_metrics_are() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("metrics of join") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    write(&world(dir.path(), 100, 2), dir.path());
    let mut joiner = Command::new(&binary)
        .args(["join", "--metrics", "127.0.0.1:0"])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(joiner.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    let url = next().strip_prefix("metrics at ").unwrap().to_owned();
    assert_eq!(next(), "joining from event 0");
    let signal = |name: &str| {
        Command::new("kill").args([name, &joiner.id().to_string()]).status().unwrap().success()
    };
    assert!(signal("-HUP"), "the joiner ignores SIGHUP");
    let (url, route) = url.rsplit_once('/').unwrap();
    let route = format!("/{route}");
    wait_until("the joiner reports its lag", PATIENCE, || {
        let answer =
            ask(url, None, HttpRequest { route: &route, ..HttpRequest::default() }).unwrap();
        metric(&answer.body, "hypercast_joiner{what=\"lag_events\"}") == Some(0.0)
    });
    assert!(signal("-TERM"));
    assert!(joiner.wait().unwrap().success());
}

#[test]
fn the_ingest_tier_requires_tokens_too() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("tokens of ingest") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut config = world(dir, 100, 2);
    config.server.tokens = "callers".into();
    write_secret(&dir.join("callers"), &format!("feed {FEED}\n"));
    write(&config, dir);
    let daemon = TestDaemon::start_with(&binary, dir, &["--tier", "ingest"]);
    let [events, clock] = [json!({}), json!({ "clock_ms": 1_700_000_000_000_u64 })];
    let answer = |token, body: &Value| {
        let body = body.to_string();
        let tell = HttpRequest { route: "/v1/events", body: Some(&body), ..HttpRequest::default() };
        ask(daemon.url(), None, HttpRequest { token, ..tell }).unwrap()
    };
    let status = |token| answer(token, &events).status;
    assert_eq!((status(None), status(Some(FEED)), status(Some(OPS))), (401, 200, 401));
    let refused = answer(Some(FEED), &clock);
    assert!(refused.status == 403 && refused.body.contains("`replay`"), "{}", refused.body);
    write_secret(&dir.join("callers"), &format!("feed {FEED}\nlater {OPS} replay\n"));
    reloaded(&daemon, "applied", &|| daemon.get("/metrics").1);
    assert_eq!((status(Some(FEED)), status(Some(OPS))), (200, 200));
    let clock_by = |token| answer(Some(token), &clock).status;
    assert_eq!((clock_by(FEED), clock_by(OPS)), (403, 200));
    assert!(daemon.stop());
}
