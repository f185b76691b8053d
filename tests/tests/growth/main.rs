//! A schema that grows while all processes of an installation run and requests arrive: none fails,
//! what was predicted stays, and the new surface, action, feature and task are served and learned.

mod learning;
mod owned;
mod teams;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hypercast_config::Config;
use hypercast_data::schema::{Feature, FeatureKind, Schema, Task, TaskKind, TaskRole};
use hypercast_tests::{
    Prerequisites, TestDaemon, agent, expert, metric, prerequisites, rank_body, run_well,
    services::{ServiceProcess, free_port, wait_until},
    world,
};
use serde_json::{Value, json};

/// How long a process may take to do what it is to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a process may take to stop.
const GRACE: Duration = Duration::from_secs(20);

/// Items from this one on are in no event, so that their features stay.
const QUIET: u64 = 150;

/// Every so many items have the new action.
const GIFT_EVERY: u64 = 8;

#[test]
fn a_schema_grows_while_requests_are_answered() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("growth") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let installation =
        Installation::new(&binary, dir.path(), &plugins, |config| config.join.in_daemon = false);
    let daemon = TestDaemon::start(&binary, dir.path());
    let mut followers = Followers::start(&installation);
    let load = Load::new(&daemon);
    std::thread::scope(|scope| {
        let _ends = EndOfLoad(&load);
        for surface in ["feed", "search"] {
            let load = &load;
            scope.spawn(move || load.rank(surface));
        }
        scope.spawn(|| load.send_events());
        followers.wait_used(60);
        load.has_outcomes.store(false, Ordering::Relaxed);
        let before = settled(&daemon);

        installation.grow();
        let (status, outcome) = daemon.post("/v1/admin/reload", "");
        assert_eq!(status, 200, "{outcome}");
        let (status, answer) = daemon.post("/v1/rank", &rank_body(3, "gifts", 1..9).to_string());
        assert_eq!(status, 200, "it is taken over when the reload has ended: {answer}");
        assert_close(&settled(&daemon), &before);
        assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));

        load.is_grown.store(true, Ordering::Relaxed);
        load.has_outcomes.store(true, Ordering::Relaxed);
        followers.wait_used(200);
        run_well(&binary, dir.path(), &["versions", "promote", "fm", "2.0.0"]);
        let mut gifts = Vec::new();
        wait_until("the new task is predicted at about its base rate", PATIENCE, || {
            gifts = predicted(&daemon, "gifts", "gift");
            let mean = gifts.iter().sum::<f64>() / gifts.len().max(1) as f64;
            !gifts.is_empty() && mean < 0.3
        });
        assert!(gifts.iter().all(|gift| *gift > 0.0), "{gifts:?}");
    });
    assert_eq!(*load.failed.lock().unwrap(), [""; 0]);
    let answered = load.answered.load(Ordering::Relaxed);
    assert!(answered > 100, "{answered} requests");
    let schema = |path: &str| Schema::load(&dir.path().join(path)).unwrap();
    assert_eq!(schema("runs/logs/schema.toml"), schema("data/schema.toml"), "the logs have grown");
    followers.stop();
    assert!(daemon.stop());
    let letters = run_well(&binary, dir.path(), &["dead-letters", "list"]);
    assert_eq!(letters, "no record was set aside\n");
}

#[test]
fn a_daemon_goes_on_under_the_old_schema_until_all_can_be_loaded_under_the_new_one() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("growth, alone")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let installation = Installation::new(&binary, dir.path(), &plugins, |_| ());
    let daemon = TestDaemon::start(&binary, dir.path());
    let load = Load::new(&daemon);
    std::thread::scope(|scope| {
        let _ends = EndOfLoad(&load);
        scope.spawn(|| load.rank("feed"));
        scope.spawn(|| load.send_events());
        let experts = dir.path().join("runs/experts");
        std::fs::rename(experts.join("home"), experts.join("away")).unwrap();
        installation.grow();
        let (status, outcome) = daemon.post("/v1/admin/reload", "");
        let why = outcome["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 422 && why.contains("has no trained parameters"), "{outcome}");
        let (status, why) = daemon.get("/readyz");
        assert!(status == 503 && why.contains("the schema has grown"), "{status} {why}");
        let gifts = rank_body(3, "gifts", 1..9).to_string();
        assert_eq!(daemon.post("/v1/rank", &gifts).0, 404, "it knows the old schema");

        std::fs::rename(experts.join("away"), experts.join("home")).unwrap();
        assert_eq!(daemon.post("/v1/admin/reload", "").0, 200);
        assert_eq!(daemon.post("/v1/rank", &gifts).0, 200);
        assert_eq!(daemon.get("/readyz"), (200, "ready\n".into()));
        load.is_grown.store(true, Ordering::Relaxed);
        let mut number = 1 << 40;
        wait_until("events are joined at once again", PATIENCE, || {
            number += 1;
            let (status, answer) = daemon.post("/v1/events", &load.events(number).to_string());
            assert_eq!(status, 200, "{answer}");
            answer["applied"] == true
        });
    });
    assert_eq!(*load.failed.lock().unwrap(), [""; 0]);
    assert!(daemon.stop());
}

#[test]
fn every_tier_takes_a_growth_over() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("growth of tiers")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let installation =
        Installation::new(&binary, dir, &plugins, |config| config.join.in_daemon = false);
    let start = |args: &[&str]| TestDaemon::start_with(&binary, dir, args);
    let fm = start(&["--tier", "fm-serving"]);
    let mut of_experts = installation.config.clone();
    of_experts.fm_serving.url = fm.url().into();
    of_experts.write(&dir.join("experts.toml")).unwrap();
    let experts = start(&["--tier", "expert", "--config", "experts.toml"]);
    let ingest = start(&["--tier", "ingest"]);
    let load = Load::new(&ingest);
    let feed = rank_body(3, "feed", 1..9).to_string();
    let (status, answer) = experts.post("/v1/rank", &feed);
    assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");

    load.is_grown.store(true, Ordering::Relaxed);
    let event = |number| load.events(number).to_string();
    assert_eq!(ingest.post("/v1/events", &event(1)).0, 400, "nobody knows the new names");
    installation.grow();
    let mut number = 1;
    wait_until("the tier that takes events in knows the new names", PATIENCE, || {
        number += 1;
        ingest.post("/v1/events", &event(number)).0 == 200
    });
    wait_until("the FM of the other tier predicts the new task", PATIENCE, || {
        let (status, answer) = experts.post("/v1/rank", &feed);
        assert_eq!(status, 200, "it is answered meanwhile: {answer}");
        let gifts = rank_body(3, "gifts", 1..9).to_string();
        let (_, answer) = experts.post("/v1/rank", &gifts);
        answer["ranking"][0]["predictions"]["gift"].is_f64()
    });
    let (status, answer) = experts.post("/v1/rank", &feed);
    assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
    assert!([experts, fm, ingest].into_iter().all(TestDaemon::stop));
}

/// A trained world, whose processes share a folder.
struct Installation {
    binary: PathBuf,
    dir: PathBuf,
    config: Config,
}

impl Installation {
    fn new(
        binary: &Path,
        dir: &Path,
        plugins: &Path,
        change: impl FnOnce(&mut Config),
    ) -> Installation {
        let mut config = world(dir, 300, 2);
        config.publish.every_s = 1;
        config.fm.batch_requests = 8;
        config.fm_gate.rows = 0;
        config.logs.file_seconds = 1;
        config.experts = vec![expert("home", plugins.join("mlp-fusion.wasm"), &["feed", "search"])];
        change(&mut config);
        config.write(&dir.join("hypercast.toml")).unwrap();
        run_well(binary, dir, &["train", "fm"]);
        run_well(binary, dir, &["train", "expert"]);
        Installation { binary: binary.into(), dir: dir.into(), config }
    }

    fn service(&self, name: &str, metrics: &str) -> ServiceProcess {
        let args: &[&str] = match name {
            "join" => &["join"],
            "log" => &["materialise", "--follow"],
            "fm" => &["train", "fm", "--follow", "--version", "2.0.0"],
            "expert" => &["train", "expert", "home", "--follow"],
            other => unreachable!("no process is called {other}"),
        };
        let args = [args, &["--metrics", metrics]].concat();
        ServiceProcess::start(name, &self.binary, &args, &self.dir)
    }

    /// Lets the schema grow by a surface, an action, a feature and a task.
    fn grow(&self) {
        let schema = Schema::load(&self.dir.join("data/schema.toml")).unwrap();
        grown(&schema).save(&self.dir.join("new.toml")).unwrap();
        let said =
            run_well(&self.binary, &self.dir, &["schema", "apply", "new.toml", "--data", "data"]);
        assert!(said.contains("new surface `gifts`: number 2"), "{said}");
    }
}

/// A schema with one surface, action, feature and task more.
fn grown(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    schema.surfaces.push("gifts".into());
    schema.actions.push("gift".into());
    let brand = Feature::new("brand", FeatureKind::Categorical);
    // Callers of before need not send it.
    schema.item_features.push(Feature { optional: true, ..brand });
    schema.tasks.push(Task::of_label("gift", TaskRole::Main, TaskKind::Binary));
    schema
}

/// Processes that follow streams or logs, and where each answers about its metrics.
struct Followers(Vec<(ServiceProcess, String)>);

impl Followers {
    fn start(installation: &Installation) -> Followers {
        let start = |name| {
            let metrics = format!("127.0.0.1:{}", free_port());
            (installation.service(name, &metrics), metrics)
        };
        Followers(["join", "log", "fm", "expert"].map(start).into())
    }

    /// Waits until the trainers and the logging tier have used so many requests since they were
    /// started, or took the schema over.
    fn wait_used(&mut self, requests: usize) {
        for (service, address) in self.0.iter_mut().filter(|(service, _)| service.name != "join") {
            let name = match service.name.as_str() {
                "log" => "hypercast_logged_requests_total",
                _ => "hypercast_trained_requests_total",
            };
            let mut used = 0;
            let is_well = || {
                assert!(service.is_running(), "{} ended:\n{}", service.name, service.output());
                let answer = agent().get(format!("http://{address}/metrics")).call();
                let text = answer.map(|mut answer| answer.body_mut().read_to_string().unwrap());
                used = text.map_or(0, |text| metric(&text, name));
                used >= requests
            };
            wait_until(&format!("{address} has used {requests} requests"), PATIENCE, is_well);
        }
    }

    fn stop(mut self) {
        for (service, _) in &mut self.0 {
            assert!(service.is_running(), "{} ended:\n{}", service.name, service.output());
            service.stop(GRACE);
        }
    }
}

/// Requests without a pause until it ends, of which each must be answered.
struct Load<'a> {
    daemon: &'a TestDaemon,
    ends: AtomicBool,
    /// Whether events tell outcomes, and not the features of items alone.
    has_outcomes: AtomicBool,
    /// Whether callers know the schema that has grown.
    is_grown: AtomicBool,
    answered: AtomicU64,
    failed: Mutex<Vec<String>>,
}

/// Ends the load also if the test fails, because the load's threads are waited for.
struct EndOfLoad<'a>(&'a Load<'a>);

impl Drop for EndOfLoad<'_> {
    fn drop(&mut self) {
        self.0.ends.store(true, Ordering::Relaxed);
    }
}

impl<'a> Load<'a> {
    fn new(daemon: &'a TestDaemon) -> Load<'a> {
        Load {
            daemon,
            ends: AtomicBool::new(false),
            has_outcomes: AtomicBool::new(true),
            is_grown: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            failed: Mutex::default(),
        }
    }

    fn post(&self, route: &str, body: &Value) {
        let (status, answer) = self.daemon.post(route, &body.to_string());
        if status != 200 || answer["degraded"] == true {
            self.failed.lock().unwrap().push(format!("{route}: {status} {answer}"));
        }
        self.answered.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }

    fn rank(&self, surface: &str) {
        for user in (1..100).cycle() {
            if self.ends.load(Ordering::Relaxed) {
                return;
            }
            self.post("/v1/rank", &rank_body(user, surface, 1..9));
        }
    }

    fn send_events(&self) {
        for number in 1.. {
            if self.ends.load(Ordering::Relaxed) {
                return;
            }
            self.post("/v1/events", &self.events(number));
        }
    }

    fn events(&self, number: u64) -> Value {
        let is_grown = self.is_grown.load(Ordering::Relaxed);
        let mut features = json!({ "topic": "new", "creator": "new", "length": 0.5 });
        if is_grown {
            features["brand"] = json!("own");
        }
        let changed = json!([{ "id": 1 + number % 20, "features": features }]);
        if !self.has_outcomes.load(Ordering::Relaxed) {
            return json!({ "items": changed });
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        let shown = |at: u64| {
            let request = number * 10 + at;
            let item = 1 + request * 7 % (QUIET - 1);
            let mut actions = json!({
                "click": request.is_multiple_of(3), "like": false, "finish": false,
            });
            let mut surface = if at.is_multiple_of(2) { "feed" } else { "search" };
            if is_grown && at.is_multiple_of(3) {
                surface = "gifts";
                actions["gift"] = json!(item.is_multiple_of(GIFT_EVERY));
            }
            json!({
                "request": request, "user": 1 + request % 100, "item": item, "surface": surface,
                "time_ms": now, "actions": actions, "values": { "watch": 0.5 },
            })
        };
        json!({ "items": changed, "events": (0..4).map(shown).collect::<Vec<_>>() })
    }
}

/// What is predicted for users and items that no event is of, by task, once it stays.
fn settled(daemon: &TestDaemon) -> BTreeMap<String, Vec<f64>> {
    let tasks = ["click", "like"];
    let all = || -> BTreeMap<_, _> {
        let of = |task: &str| (task.to_owned(), predicted(daemon, "feed", task));
        tasks.map(of).into()
    };
    let mut last = all();
    wait_until("the features stay as they are", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(300));
        let now = all();
        std::mem::replace(&mut last, now.clone()) == now
    });
    last
}

/// The predictions of a task for some quiet items; none while the task is not predicted.
fn predicted(daemon: &TestDaemon, surface: &str, task: &str) -> Vec<f64> {
    let body = rank_body(QUIET, surface, QUIET..QUIET + 20);
    let (status, answer) = daemon.post("/v1/rank", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    let mut places: Vec<&Value> = answer["ranking"].as_array().unwrap().iter().collect();
    places.sort_by_key(|place| place["id"].as_u64());
    places.iter().filter_map(|place| place["predictions"][task].as_f64()).collect()
}

fn assert_close(found: &BTreeMap<String, Vec<f64>>, expected: &BTreeMap<String, Vec<f64>>) {
    for (task, expected) in expected {
        assert_eq!(found[task].len(), expected.len(), "{task}");
        let apart = found[task].iter().zip(expected).map(|(a, b)| (a - b).abs());
        let most = apart.fold(0.0, f64::max);
        assert!(most <= 1e-5, "{task}: {most} apart");
    }
}
