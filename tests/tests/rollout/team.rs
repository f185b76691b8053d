//! A team that pushes versions of its expert, and the requests of its users.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_serve::rollout::SecretKey;
use hypercast_tests::{
    Prerequisites, TestDaemon, expert, prerequisites, rank_body, run_well, world,
};
use serde_json::{Value, json};

/// How long a step of a rollout may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A simulated world with an FM, version 1.0.0 of the expert `home`, and a trusted key.
pub struct Team {
    pub binary: PathBuf,
    pub dir: PathBuf,
    pub plugins: PathBuf,
    pub hostile: PathBuf,
    pub config: Config,
    _folder: tempfile::TempDir,
}

impl Team {
    /// Returns none, with a message, where its prerequisites are missing.
    pub fn new(test: &str, change: impl Fn(&mut Config)) -> Option<Team> {
        let team = Team::unregistered(test, change)?;
        team.versions(&["register", "fm"]);
        team.versions(&["promote", "fm", "1.0.0"]);
        team.versions(&["register", "expert", "home", "1.0.0"]);
        team.versions(&["promote", "expert", "home", "1.0.0"]);
        Some(team)
    }

    /// Like `new`, but without registered versions: the configuration decides what serves.
    pub fn unregistered(test: &str, change: impl Fn(&mut Config)) -> Option<Team> {
        let Prerequisites { hypercast: binary, plugins, hostile, .. } = prerequisites(test)?;
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().to_path_buf();
        let key = SecretKey::generate().unwrap();
        key.write(&dir.join("team.key")).unwrap();
        let mut config = world(&dir, 1000, 2);
        // These tests do not measure speed, so allow for a busy machine.
        config.plugin_limits.deadline_ms = 500;
        config.plugin_limits.slow_ms = 100_000.0;
        config.experts = vec![expert("home", plugins.join("mlp-fusion.wasm"), &[])];
        config.rollout.trusted_keys = vec![key.public().text()];
        config.rollout.shadow_requests = 20;
        config.rollout.canary_share = 0.5;
        config.rollout.canary_requests = 20;
        config.rollout.canary_s = 0;
        config.rollout.latency_slack_ms = 10_000.0;
        config.recorded.share = 1.0;
        change(&mut config);
        config.write(&dir.join("hypercast.toml")).unwrap();
        run_well(&binary, &dir, &["train", "fm"]);
        run_well(&binary, &dir, &["train", "expert"]);
        Some(Team { binary, dir, plugins, hostile, config, _folder: folder })
    }

    /// Trains parameters of a component with the given seed.
    pub fn trained(&self, component: &Path, seed: u64) -> PathBuf {
        let mut other = self.config.clone();
        other.experts[0].plugin = component.to_path_buf();
        other.expert_training.seed = seed;
        other.paths.experts = format!("runs/experts-{seed}").into();
        other.write(&self.dir.join("other.toml")).unwrap();
        let train = ["train", "expert", "home", "--config", "other.toml"];
        run_well(&self.binary, &self.dir, &train);
        self.dir.join(format!("runs/experts-{seed}/home/parameters.safetensors"))
    }

    pub fn daemon(&self) -> TestDaemon {
        TestDaemon::start(&self.binary, &self.dir)
    }

    pub fn component(&self) -> PathBuf {
        self.plugins.join("mlp-fusion.wasm")
    }

    /// Runs `hypercast plugin push`. Returns its exit status and its output.
    pub fn push(&self, daemon: &TestDaemon, component: &Path, args: &[&str]) -> (i32, String) {
        self.push_to(daemon.url(), component, args)
    }

    pub fn push_to(&self, url: &str, component: &Path, args: &[&str]) -> (i32, String) {
        let output = Command::new(&self.binary)
            .args(["plugin", "push", component.to_str().unwrap(), url, "--name", "home"])
            .args(["--key", "team.key"])
            .args(args)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()
            .expect("the binary starts");
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap(), text.into_owned())
    }

    pub fn key(&self) -> SecretKey {
        SecretKey::read(&self.dir.join("team.key")).unwrap()
    }

    pub fn versions(&self, args: &[&str]) -> String {
        run_well(&self.binary, &self.dir, &[&["versions"], args].concat())
    }

    pub fn list(&self) -> String {
        self.versions(&["list"])
    }
}

pub fn rank(user: u64, candidates: usize) -> String {
    rank_on("feed", user, candidates)
}

fn rank_on(surface: &str, user: u64, candidates: usize) -> String {
    let mut body = rank_body(user, surface, 1..=candidates as u64);
    body["explain"] = json!(true);
    body.to_string()
}

pub fn predictions(daemon: &TestDaemon) -> Vec<f64> {
    let (status, answer) = daemon.post("/v1/rank", &rank(1, 12));
    assert_eq!((status, &answer["degraded"]), (200, &json!(false)), "{answer}");
    let tasks = answer["explain"]["expert"].as_object().unwrap().clone();
    let values = tasks.into_iter().flat_map(|(_, values)| values.as_array().unwrap().clone());
    values.map(|value| value.as_f64().unwrap()).collect()
}

/// What a daemon says of the rollout of a version.
pub fn state(daemon: &TestDaemon, version: &str) -> Value {
    let (_, text) = daemon.get(&format!("/v1/admin/experts/home/versions/{version}"));
    serde_json::from_str::<Value>(&text).unwrap()["rollout"].clone()
}

/// Sends requests in the background and counts the answers.
#[derive(Default)]
pub struct RequestLoad {
    stop: AtomicBool,
    surface: &'static str,
    pub candidates: AtomicUsize,
    answered: AtomicUsize,
    /// The number of errors and degraded answers.
    bad: AtomicUsize,
    /// The number of errors.
    pub failed: AtomicUsize,
    /// How long each answer took since this was last taken.
    pub took: Mutex<Vec<Duration>>,
    /// Whether to send the outcome of each answer.
    pub sends_outcomes: bool,
}

impl RequestLoad {
    pub fn of(candidates: usize) -> RequestLoad {
        RequestLoad::on("feed", candidates)
    }

    pub fn on(surface: &'static str, candidates: usize) -> RequestLoad {
        let candidates = AtomicUsize::new(candidates);
        RequestLoad { surface, candidates, ..RequestLoad::default() }
    }

    /// Sends requests of many users until `run` returns.
    pub fn during<T>(&self, daemon: &TestDaemon, run: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            for first in [0, 50] {
                scope.spawn(move || {
                    for user in (first..first + 50).cycle() {
                        if self.stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let candidates = self.candidates.load(Ordering::Relaxed);
                        let body = rank_on(self.surface, user + 1, candidates);
                        let asked = Instant::now();
                        let (status, answer) = daemon.post("/v1/rank", &body);
                        self.took.lock().unwrap().push(asked.elapsed());
                        self.answered.fetch_add(1, Ordering::Relaxed);
                        self.failed.fetch_add(usize::from(status != 200), Ordering::Relaxed);
                        if status != 200 || answer["degraded"] != json!(false) {
                            self.bad.fetch_add(1, Ordering::Relaxed);
                        }
                        if self.sends_outcomes {
                            send_outcomes(daemon, user + 1, &answer);
                        }
                    }
                });
            }
            let guard = StopOnDrop(self);
            let done = run();
            drop(guard);
            done
        })
    }

    pub fn counts(&self) -> (usize, usize) {
        (self.answered.load(Ordering::Relaxed), self.bad.load(Ordering::Relaxed))
    }
}

/// Sends the outcomes of an answer: the user clicked the first item.
fn send_outcomes(daemon: &TestDaemon, user: u64, answer: &Value) {
    let ranking = answer["ranking"].as_array().unwrap();
    let event = |(place, item): (usize, &Value)| {
        json!({
            "request": answer["request"], "user": user, "item": item["id"], "surface": "feed",
            "time_ms": 1_800_000_000_000_u64, "actions": { "click": place == 0 },
        })
    };
    let events: Vec<Value> = ranking.iter().enumerate().map(event).collect();
    let (status, said) = daemon.post("/v1/events", &json!({ "events": events }).to_string());
    assert_eq!(status, 200, "{said}");
}

/// Stops the load when dropped, also if an assertion fails.
struct StopOnDrop<'a>(&'a RequestLoad);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}
