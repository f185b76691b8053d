//! Kills processes at random moments while events arrive. Afterwards the joined examples equal
//! those of an undisturbed run, the trainers have continued, and the daemon answers.
//!
//! `HYPERCAST_CHAOS_ROUNDS` sets the number of kills (6 by default). `HYPERCAST_CHAOS_ENGINE=nats`
//! uses NATS, whose server is then killed too.

use std::{
    collections::BTreeMap,
    net::TcpStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hypercast_config::{Config, EngineKind};
use hypercast_data::dataset::{
    Dataset, Impression,
    timeline::{Span, Timeline, TimelineStep},
};
use hypercast_data::schema::Schema;
use hypercast_serve::api::{ActionBody, EventsRequest, ImpressionBody};
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::streams::{self, Topic};
use hypercast_tests::{
    Prerequisites, copy_folder, expert, prerequisites, rebase, run_well,
    services::{ServiceProcess, free_port, wait_until},
    world,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// The approximate number of events in one POST.
const BATCH: usize = 25;

/// How long the processes may take to catch up.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a process may take to stop.
const GRACE: Duration = Duration::from_secs(20);

#[test]
fn killed_processes_neither_lose_nor_repeat_examples() {
    let Some(Prerequisites { hypercast: binary, plugins, .. }) = prerequisites("chaos") else {
        return;
    };
    let kind = match std::env::var("HYPERCAST_CHAOS_ENGINE").as_deref() {
        Ok("nats") => EngineKind::Nats,
        _ => EngineKind::Directory,
    };
    let rounds: u32 = std::env::var("HYPERCAST_CHAOS_ROUNDS")
        .map_or(6, |rounds| rounds.parse().expect("HYPERCAST_CHAOS_ROUNDS is a number"));
    let dir = tempfile::tempdir().unwrap();
    let trained = dir.path().join("trained");
    let bodies = prepare(&binary, &trained, &plugins);

    let calm = System::begin(&binary, &trained, &dir.path().join("calm"), kind);
    let quiet = Scope { services: &["ingest", "join"], rounds: 0 };
    let expected = calm.process(&bodies, quiet);
    assert!(expected.examples.len() > 100, "{} examples", expected.examples.len());

    let wild = System::begin(&binary, &trained, &dir.path().join("wild"), kind);
    let all = ["ingest", "join", "log", "fm", "expert", "serve"];
    let found = wild.process(&bodies, Scope { services: &all, rounds });
    assert_eq!(found.examples.len(), expected.examples.len(), "none lost, none repeated");
    for (at, (found, expected)) in found.examples.iter().zip(&expected.examples).enumerate() {
        assert_eq!(found, expected, "record {at} of `joined`");
    }
    assert_eq!(found.outcomes, expected.outcomes, "records of `outcomes`");
}

/// The final contents of the streams.
struct StreamContents {
    /// Each record of `joined`, without the time of its ingestion.
    examples: Vec<String>,
    outcomes: u64,
}

/// Trains an FM and an expert on the first half of a world. Returns the second half as bodies of
/// `POST /v1/events`.
fn prepare(binary: &Path, dir: &Path, plugins: &Path) -> Vec<String> {
    std::fs::create_dir_all(dir).unwrap();
    let mut config = world(dir, 1600, 2);
    let dataset = Dataset::open(&dir.join("data")).unwrap();
    let times: Vec<i64> = dataset.impressions().unwrap().map(|row| row.unwrap().time_ms).collect();
    let middle_ms = times[times.len() / 2];
    config.timeline.until = middle_ms.to_string();
    config.join.in_daemon = false;
    config.join.tick_ms = 0;
    config.join.first_window_s = 60;
    config.join.save_every_events = 400;
    config.publish.every_s = 1;
    config.publish.snapshot_every = 5;
    config.fm.batch_requests = 8;
    config.fm.save_every_requests = 64;
    config.logs.file_seconds = 1;
    config.experts = vec![expert("home", plugins.join("mlp-fusion.wasm"), &[])];
    config.write(&dir.join("hypercast.toml")).unwrap();
    run_well(binary, dir, &["train", "fm"]);
    run_well(binary, dir, &["train", "expert"]);
    bodies(&dataset, middle_ms)
}

/// The events from a time on. Outcomes contain only actions that happened, so the joiner must wait
/// to know which did not. Every fifth outcome is complete at once, and every seventh is sent twice.
fn bodies(dataset: &Dataset, from_ms: i64) -> Vec<String> {
    let schema = &dataset.schema;
    let (mut bodies, mut body, mut outcomes) = (Vec::new(), EventsRequest::default(), 0);
    for step in Timeline::new(dataset, Span { from_ms: Some(from_ms), until_ms: None }).unwrap() {
        match step.unwrap() {
            TimelineStep::Request(rows) => {
                body.impressions.extend(rows.iter().map(|row| shown(schema, row)))
            }
            TimelineStep::Outcome(row) if row.time_ms >= from_ms => {
                outcomes += 1;
                let action = acted(schema, &row, outcomes % 5 == 0);
                if outcomes % 7 == 0 {
                    body.actions.push(action.clone());
                }
                body.actions.push(action);
            }
            TimelineStep::Outcome(_) => {}
        }
        if body.len() >= BATCH {
            bodies.push(serde_json::to_string(&std::mem::take(&mut body)).unwrap());
        }
    }
    body.clock_ms = Some(from_ms + 1000 * 86_400_000);
    bodies.push(serde_json::to_string(&body).unwrap());
    bodies
}

fn shown(schema: &Schema, row: &Impression) -> ImpressionBody {
    ImpressionBody {
        id: None,
        request: row.request,
        user: row.user.into(),
        item: row.item.into(),
        surface: schema.surfaces[usize::from(row.surface)].clone(),
        time_ms: row.time_ms,
        context: BTreeMap::new(),
    }
}

fn acted(schema: &Schema, row: &Impression, complete: bool) -> ActionBody {
    let happened = |at: &usize| row.outcome.actions >> at & 1 == 1;
    let names = (0..schema.actions.len()).filter(happened).map(|at| schema.actions[at].clone());
    ActionBody {
        id: None,
        request: row.request,
        item: row.item.into(),
        user: Some(row.user.into()),
        time_ms: row.outcome_ms,
        actions: names.map(|name| (name, true)).collect(),
        values: BTreeMap::new(),
        complete,
    }
}

/// Which processes run, and how often one of them is killed.
struct Scope<'a> {
    services: &'a [&'a str],
    rounds: u32,
}

/// The processes that work on one folder.
struct System {
    binary: PathBuf,
    dir: PathBuf,
    config: Config,
    ingest: String,
    serve: String,
    nats: Option<ServiceProcess>,
}

impl System {
    /// Copies the trained models to a new folder.
    fn begin(binary: &Path, trained: &Path, dir: &Path, kind: EngineKind) -> System {
        copy_folder(trained, dir);
        let mut config = Config::read(&trained.join("hypercast.toml")).unwrap();
        let nats = (kind == EngineKind::Nats).then(|| {
            let program =
                nats_server().expect("HYPERCAST_CHAOS_ENGINE=nats needs nats-server in PATH");
            let port = free_port().to_string();
            config.engine.kind = EngineKind::Nats;
            config.engine.nats_url = format!("nats://127.0.0.1:{port}").into();
            let store = dir.join("nats");
            let args = ["-js", "-sd", store.to_str().unwrap(), "-a", "127.0.0.1", "-p", &port];
            let server = ServiceProcess::start("nats", &program, &args, dir);
            let address = format!("127.0.0.1:{port}");
            wait_until("NATS listens", PATIENCE, || TcpStream::connect(&address).is_ok());
            server
        });
        let config = rebase(&config, trained, dir);
        let [ingest, serve] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
        System { binary: binary.into(), dir: dir.into(), config, ingest, serve, nats }
    }

    /// Sends the events to the processes, kills some of these, and returns the resulting streams.
    fn process(mut self, bodies: &[String], scope: Scope<'_>) -> StreamContents {
        let mut services: Vec<ServiceProcess> =
            scope.services.iter().map(|name| self.service(name)).collect();
        services.extend(self.nats.take());
        let mut rng = SmallRng::seed_from_u64(11);
        let every = (bodies.len() / (scope.rounds as usize + 1)).max(1);
        for (at, body) in bodies.iter().enumerate() {
            self.send(body, &mut services);
            if scope.rounds > 0 && at % every == every - 1 {
                // A random moment, perhaps in the middle of an append, a step or a file.
                std::thread::sleep(Duration::from_millis(rng.random_range(0..400)));
                let victim = rng.random_range(0..services.len());
                services[victim].kill();
                std::thread::sleep(Duration::from_millis(rng.random_range(0..200)));
                services[victim].begin();
            }
        }
        self.settle(&mut services);
        if scope.services.contains(&"serve") {
            self.check_followers(&mut services);
        }
        let streams = self.read();
        // Stop NATS last, because the others need it to stop cleanly.
        for service in &mut services {
            if service.name != "nats" {
                assert!(service.is_running(), "{} ended:\n{}", service.name, service.output());
                service.stop(GRACE);
            }
        }
        streams
    }

    fn service(&self, name: &str) -> ServiceProcess {
        let args: &[&str] = match name {
            "ingest" => &["serve", "--tier", "ingest", "--listen", &self.ingest],
            "join" => &["join"],
            "log" => &["materialise", "--follow"],
            "fm" => &["train", "fm", "--follow"],
            "expert" => &["train", "expert", "home", "--follow"],
            "serve" => &["serve", "--listen", &self.serve],
            other => unreachable!("no process is called {other}"),
        };
        ServiceProcess::start(name, &self.binary, args, &self.dir)
    }

    /// POSTs a body until it is acknowledged, like a caller that must not lose events.
    fn send(&self, body: &str, services: &mut [ServiceProcess]) {
        let url = format!("http://{}/v1/events", self.ingest);
        let start = Instant::now();
        loop {
            let sent = agent().post(&url).header("content-type", "application/json").send(body);
            let last = match sent {
                Ok(answer) if answer.status().as_u16() == 200 => return,
                Ok(mut answer) => {
                    let status = answer.status().as_u16();
                    let said = answer.body_mut().read_to_string().unwrap_or_default();
                    assert!(status >= 500, "{status}: {said}");
                    said
                }
                Err(error) => error.to_string(),
            };
            if start.elapsed() > PATIENCE {
                let logs = services.iter().map(|one| format!("{}:\n{}\n", one.name, one.output()));
                panic!("events are not acknowledged: {last}\n{}", logs.collect::<String>());
            }
            self.supervise(services);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Restarts processes that have ended, as a supervisor does: a process that starts while NATS
    /// is down ends with an error.
    fn supervise(&self, services: &mut [ServiceProcess]) {
        if self.config.engine.kind == EngineKind::Nats {
            for service in services.iter_mut().filter(|service| service.name != "nats") {
                if !service.is_running() {
                    service.kill();
                    service.begin();
                }
            }
        }
    }

    /// Waits until the joiner has nothing left to join.
    fn settle(&self, services: &mut [ServiceProcess]) {
        let engine = streams::open(&self.config.engine).unwrap();
        let ends = || [Topic::joined(), Topic::outcomes()].map(|topic| engine.span(&topic));
        let (mut last, mut since) = (Vec::new(), Instant::now());
        wait_until("the joiner has joined everything", PATIENCE, || {
            self.supervise(services);
            let now: Vec<u64> = ends().into_iter().flatten().map(|span| span.end).collect();
            if now != last || now.len() != 2 || now.contains(&0) {
                (last, since) = (now, Instant::now());
            }
            // No more events arrive, so a joiner with work left makes progress within this time.
            since.elapsed() > Duration::from_secs(6)
        });
        let joiner = services.iter().find(|service| service.name == "join").unwrap();
        assert!(!joiner.output().contains("panicked"), "{}", joiner.output());
    }

    /// Checks that all processes run and that the daemon answers without degradation.
    fn check_followers(&self, services: &mut [ServiceProcess]) {
        let body =
            r#"{"user": 3, "surface": "feed", "candidates": [{"id": 1}, {"id": 2}, {"id": 5}]}"#;
        let url = format!("http://{}/v1/rank", self.serve);
        let mut said = String::new();
        wait_until("the daemon ranks", PATIENCE, || {
            self.supervise(services);
            let sent = agent().post(&url).header("content-type", "application/json").send(body);
            said = sent.map_or_else(
                |e| e.to_string(),
                |mut answer| answer.body_mut().read_to_string().unwrap(),
            );
            said.contains("\"ranking\"") && said.contains("\"degraded\":false")
        });
        for service in services {
            assert!(service.is_running(), "{} ended:\n{}", service.name, service.output());
        }
    }

    fn read(&self) -> StreamContents {
        let engine = streams::open(&self.config.engine).unwrap();
        let mut reader = engine.reader(&Topic::joined(), 0).unwrap();
        let mut examples = Vec::new();
        loop {
            let records = reader.next(1024, Duration::from_millis(200)).unwrap();
            if records.is_empty() {
                break;
            }
            examples.extend(records.iter().map(|record| {
                let timeless = |joined: JoinedExample| JoinedExample { ingested_ms: 0, ..joined };
                let joined: JoinedRecord = JoinedRecord::decode(&record.payload).unwrap();
                let joined = match joined {
                    JoinedRecord::Example(joined) => JoinedRecord::Example(timeless(joined)),
                    JoinedRecord::Correction(joined) => JoinedRecord::Correction(timeless(joined)),
                    JoinedRecord::Content(content) => JoinedRecord::Content(content),
                };
                // Compare as text, because unknown values are NaN, which is not equal to itself.
                format!("{joined:?}")
            }));
        }
        let outcomes = engine.span(&Topic::outcomes()).unwrap().end;
        StreamContents { examples, outcomes }
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    ureq::Agent::new_with_config(config.timeout_global(Some(Duration::from_secs(10))).build())
}

fn nats_server() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("nats-server")).find(|file| file.is_file())
}
