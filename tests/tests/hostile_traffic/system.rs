//! A system of all processes on one folder, and what it served.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypercast_config::Config;
use hypercast_serve::api::RankAnswer;
use hypercast_stream::{
    join::JoinedRecord,
    streams::{self, StreamEngine, Topic},
};
use hypercast_tests::{
    agent, copy_folder, expert, metric, rebase, run_well,
    secure::write_secret,
    services::{ServiceProcess, free_port, wait_until},
    small_config,
};
use serde_json::Value;

use super::{
    honest::{HonestWorld, RoundBodies, ServedNe},
    hostile::{FIRST_HOSTILE_ID, HostileAnswer, HostileTally},
};

/// How long processes may take to do what is expected.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a process may take to stop.
const GRACE: Duration = Duration::from_secs(30);

/// How long a trainer that has learned may take to ask whether it may publish.
const ASKS_WITHIN: Duration = Duration::from_millis(1400);

const HONEST_TOKEN: &str = "honest-0123456789abcdef0123456789";
const HOSTILE_TOKEN: &str = "hostile-0123456789abcdef0123456789";

/// The processes that serve metrics of their own, and the daemon.
const PROCESSES: [&str; 4] = ["fm", "expert", "log", "serve"];

/// A way into a daemon, with a token.
pub struct Door {
    agent: ureq::Agent,
    url: String,
    token: &'static str,
}

impl Door {
    /// POSTs a body. Returns the status and the answer.
    pub fn post(&self, route: &str, body: &str) -> (u16, Value) {
        let request = self
            .agent
            .post(format!("{}{route}", self.url))
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {}", self.token));
        let mut response = request.send(body).expect("the daemon answers");
        (response.status().as_u16(), response.body_mut().read_json().expect("the answer is JSON"))
    }

    /// POSTs a body that must be answered with 200.
    fn post_well(&self, route: &str, body: &str) -> Value {
        let (status, answer) = self.post(route, body);
        assert_eq!(status, 200, "{}{route}: {answer}", self.url);
        answer
    }
}

/// Trains both tiers on the past in `dir/data`.
pub fn train(binary: &Path, dir: &Path, plugins: &Path) {
    let mut config = small_config();
    (config.fm.dim, config.fm.layers, config.fm.embedding_dim) = (16, 1, 8);
    (config.fm.qk_dim, config.fm.v_dim, config.fm.max_history) = (8, 8, 8);
    (config.fm.learning_rate, config.fm.warmup_steps) = (3e-3, 10);
    // A round is a step, whatever hostile users add to it.
    config.fm.batch_requests = 96;
    // What serves shows soon what was learned.
    config.fm.average_decay = 0.98;
    config.expert_training.online_batch_rows = 4096;
    config.publish.every_s = 1;
    config.logs.file_seconds = 1;
    // What comes in a round is complete, so no window ends before its outcomes.
    (config.join.first_window_s, config.join.min_window_s) = (60, 60);
    // Three systems share the machine.
    config.server.deadline_ms = 20_000;
    config.server.tokens = dir.join("tokens");
    config.experts = vec![expert("home", plugins.join("mlp-fusion.wasm"), &[])];
    write_secret(
        &config.server.tokens,
        &format!("honest {HONEST_TOKEN}\nhostile {HOSTILE_TOKEN}\n"),
    );
    config.write(&dir.join("hypercast.toml")).unwrap();
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
}

/// The processes of a system. Dropping it kills them.
pub struct RunningSystem {
    pub name: String,
    dir: PathBuf,
    engine: Arc<dyn StreamEngine>,
    services: Vec<ServiceProcess>,
    /// Where each process answers `/metrics`.
    urls: [String; PROCESSES.len()],
    door: Door,
    /// Publications before the daemon served.
    published_before: usize,
    rounds: usize,
    /// What it answered to honest requests.
    pub served: ServedNe,
}

impl RunningSystem {
    /// Starts all processes on a copy of what was trained, and waits until the daemon serves.
    pub fn start(binary: &Path, trained: &Path, dir: &Path) -> RunningSystem {
        copy_folder(trained, dir);
        let config = Config::read(&trained.join("hypercast.toml")).unwrap();
        let config = rebase(&config, trained, dir);
        let addresses = PROCESSES.map(|_| format!("127.0.0.1:{}", free_port()));
        let [fm, expert, log, serve] = &addresses;
        let start = |name: &str, args: &[&str]| ServiceProcess::start(name, binary, args, dir);
        let mut services = vec![
            start("fm", &["train", "fm", "--follow", "--metrics", fm]),
            start("expert", &["train", "expert", "home", "--follow", "--metrics", expert]),
        ];
        for name in ["fm", "expert"] {
            let what = format!("{name} is published");
            wait_until(&what, PATIENCE, || !said(dir, name, &["published"]).is_empty());
        }
        run_well(binary, dir, &["versions", "promote", "fm", "1.0.0"]);
        run_well(binary, dir, &["versions", "promote", "expert", "home", "0.1.0"]);
        services.push(start("log", &["materialise", "--follow", "--metrics", log]));
        services.push(start("serve", &["serve", "--listen", serve]));
        let urls = addresses.each_ref().map(|address| format!("http://{address}"));
        let ready = |url: &str| {
            agent().get(format!("{url}/readyz")).call().is_ok_and(|answer| answer.status() == 200)
        };
        wait_until("all are ready", PATIENCE, || urls.iter().all(|url| ready(url)));
        let door = Door { agent: agent(), url: urls[3].clone(), token: HONEST_TOKEN };
        let engine = streams::open(&config.engine).unwrap();
        let mut system = RunningSystem {
            name: dir.file_name().expect("a folder").to_string_lossy().into_owned(),
            dir: dir.into(),
            engine,
            services,
            urls,
            door,
            published_before: 0,
            rounds: 0,
            served: ServedNe::default(),
        };
        system.published_before = system.published() - system.applied();
        system
    }

    /// The way in of hostile users.
    pub fn door(&self) -> Door {
        Door { agent: agent(), url: self.door.url.clone(), token: HOSTILE_TOKEN }
    }

    /// Ranks, sends what was shown and what came of it, and waits until all of it serves.
    pub fn round(
        &mut self,
        world: &HonestWorld,
        bodies: &RoundBodies<'_>,
        hostile: &[HostileAnswer],
    ) {
        for (rows, body) in bodies.requests.iter().zip(&bodies.rankings) {
            let answer = self.door.post_well("/v1/rank", body);
            let answer: RankAnswer = serde_json::from_value(answer).unwrap();
            assert!(!answer.degraded, "{}: {:?}", self.name, answer.reason);
            self.served.push(world, rows, &answer);
        }
        self.door.post_well("/v1/events", &bodies.impressions);
        let door = self.door();
        for body in hostile.iter().flat_map(|answer| &answer.bodies) {
            door.post_well("/v1/events", body);
        }
        let sent = self.door.post_well("/v1/events", &bodies.actions);
        assert_eq!(sent["applied"], true, "{}: the joiner is not in time", self.name);
        self.settle();
        self.rounds += 1;
    }

    /// Waits until what was joined is learned from by both tiers, and what they published serves.
    fn settle(&mut self) {
        let joined = self.engine.span(&Topic::joined()).unwrap().end;
        self.wait("the FM asks to publish", |own| {
            let lines = said(&own.dir, "fm", &["published", "held"]);
            lines.last().is_some_and(|line| line["position"].as_u64() == Some(joined))
        });
        self.wait("the expert learns", |own| {
            let [_, expert, log, _] = own.urls.each_ref().map(|url| metrics(url));
            let learned = ["trained_requests", "corrections", "examples_set_aside"]
                .map(|name| metric(&expert, &format!("hypercast_{name}_total")));
            metric(&log, "hypercast_logged_position") as u64 == joined
                && metric(&log, "hypercast_logged_requests_total") == learned.iter().sum::<usize>()
        });
        std::thread::sleep(ASKS_WITHIN);
        self.wait("all publications serve", |own| {
            own.published() == own.published_before + own.applied()
        });
    }

    fn wait(&mut self, what: &str, mut is: impl FnMut(&Self) -> bool) {
        let what = format!("{}: {what}", self.name);
        wait_until(&what, PATIENCE, || {
            for service in &mut self.services {
                assert!(service.is_running(), "{} ended:\n{}", service.name, service.output());
            }
            is(self)
        });
    }

    /// The publications of both tiers.
    fn published(&self) -> usize {
        ["fm", "expert"].map(|name| said(&self.dir, name, &["published"]).len()).iter().sum()
    }

    /// The publications that the daemon applied.
    fn applied(&self) -> usize {
        let url = format!("{}/v1/live", self.door.url);
        let token = format!("Bearer {}", self.door.token);
        let mut answer =
            self.door.agent.get(&url).header("authorization", token).call().expect("it answers");
        let live: Value = answer.body_mut().read_json().expect("the answer is JSON");
        let models = ["fms", "experts"].map(|list| live[list].as_array().expect("a list").clone());
        let applied = |model: &Value| model["publications"].as_u64().expect("a number") as usize;
        models.iter().flatten().map(applied).sum()
    }

    /// The honest requests of `joined` with their outcomes, without what was known of them.
    pub fn honest_examples(&self) -> Vec<String> {
        let mut reader = self.engine.reader(&Topic::joined(), 0).unwrap();
        let mut examples = Vec::new();
        loop {
            let records = reader.next(1024, Duration::from_millis(200)).unwrap();
            if records.is_empty() {
                return examples;
            }
            for record in records {
                let (kind, joined) = match JoinedRecord::decode(&record.payload).unwrap() {
                    JoinedRecord::Example(joined) => ("example", joined.example),
                    JoinedRecord::Correction(joined) => ("correction", joined.example),
                    JoinedRecord::Content(_) => continue,
                };
                if joined.user.id >= FIRST_HOSTILE_ID {
                    continue;
                }
                let targets = joined.targets.iter().map(|row| (row.item.id, row.outcome));
                // As text, because unknown values are NaN, which is not equal to itself.
                examples.push(format!(
                    "{kind} {} of {} at {}: {:?}",
                    joined.request,
                    joined.user.id,
                    joined.time_ms,
                    targets.collect::<Vec<_>>()
                ));
            }
        }
    }

    /// The requests that the daemon refused, by its own count.
    pub fn refusals(&self) -> HostileTally {
        let mut tally = HostileTally::default();
        for line in metrics(&self.door.url).lines() {
            for route in ["/v1/rank", "/v1/events"] {
                let prefix = format!("hypercast_requests_total{{route=\"{route}\",status=\"");
                let Some(rest) = line.strip_prefix(&prefix) else { continue };
                let (status, times) = rest.split_once("\"} ").expect("a status and a number");
                tally.count(route, status.parse().unwrap(), times.parse().unwrap());
            }
        }
        tally.refused()
    }

    /// The numbers that the daemon clipped to their ranges.
    pub fn clipped(&self) -> usize {
        let text = metrics(&self.door.url);
        let lines = text.lines().filter(|line| line.starts_with("hypercast_beyond_range_total{"));
        let count =
            |line: &str| -> usize { line.rsplit_once(' ').expect("a number").1.parse().unwrap() };
        lines.map(count).sum()
    }

    /// Stops all processes, which must be ready until then and end well.
    pub fn stop(mut self) {
        for (name, url) in PROCESSES.iter().zip(&self.urls) {
            let mut answer = agent().get(format!("{url}/readyz")).call().expect("it answers");
            let text = answer.body_mut().read_to_string().unwrap();
            assert_eq!(answer.status().as_u16(), 200, "{} {name}: {text}", self.name);
        }
        let published = ["fm", "expert"].map(|name| said(&self.dir, name, &["published"]).len());
        let held =
            ["fm", "expert"].map(|name| said(&self.dir, name, &["held", "rolled-back"]).len());
        println!(
            "figure: {}: {published:?} publications of the FM and the expert, {held:?} held",
            self.name
        );
        for published in published {
            assert!(published > self.rounds / 2, "{published} in {} rounds", self.rounds);
        }
        self.services.iter_mut().rev().for_each(|service| service.stop(GRACE));
    }
}

/// The text of a process' metrics.
fn metrics(url: &str) -> String {
    let mut answer = agent().get(format!("{url}/metrics")).call().expect("it answers");
    answer.body_mut().read_to_string().expect("the answer is text")
}

/// The complete lines of JSON of some kinds that a process has written.
fn said(dir: &Path, name: &str, kinds: &[&str]) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
    let complete = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let lines = complete.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| kinds.iter().any(|kind| line["kind"] == *kind)).collect()
}
