//! Reloads of the configuration, with daemons in this process: every key that a reload changes
//! takes hold, in both directions, and what does not fit is refused as a whole.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use hypercast_config::{Config, DaemonTier, RELOADABLE_KEYS};
use hypercast_core::{logging, prerequisite};
use hypercast_data::dataset::Dataset;
use hypercast_expert::{Blueprint, Engine, LoadOptions, Normaliser};
use hypercast_fm::trainer;
use hypercast_serve::{
    client, http,
    reload::Origin,
    rollout::{PolicyOverrides, Push, SignedManifest},
};
use hypercast_tests::{
    copy_folder, expert, rank_body,
    secure::{Certificate, write_secret},
    services::wait_until,
    world,
};
use serde_json::Value;
use tokio::sync::oneshot;
use tracing::{Level, enabled};

const TOKEN: &str = "4f1d0d5c2f7e4f3aa1b0c9d8e7f60514";

const PATIENCE: Duration = Duration::from_secs(60);

/// Held by each test: a signal reaches all daemons of the process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// An FM and experts that were not trained, a data set, tokens and certificates, in one folder.
struct Installation {
    dir: PathBuf,
    config: Config,
    certificates: [Certificate; 2],
}

impl Installation {
    fn new(dir: &Path, plugins: &Path) -> Self {
        let mut config = world(dir, 100, 2);
        config.experts = vec![
            expert("home", plugins.join("mlp-fusion.wasm"), &[]),
            expert("small", plugins.join("hello-expert.wasm"), &[]),
        ];
        let certificates = ["first", "second"].map(|name| Certificate::make(dir, name));
        config.server.tls_certificate = "first.crt".into();
        config.server.tls_key = "first.key".into();
        for name in ["admin", "callers"] {
            write_secret(&dir.join(name), &format!("somebody {TOKEN}\n"));
        }
        let installation = Self { dir: dir.to_path_buf(), config, certificates };
        installation.write(&installation.config);
        let config = Config::read(&dir.join("hypercast.toml")).unwrap();
        let dataset = Dataset::open(&config.paths.dataset).unwrap();
        let spec = hypercast_train::fm::dataset_spec(&dataset).unwrap();
        let mut fm =
            trainer::create(&config.paths.fm_work, &config.fm, &spec, config.device).unwrap();
        fm.checkpoint(&config.paths.fm, "1.0.0").unwrap();
        let engine = Engine::new(config.guests()).unwrap();
        for entry in &config.experts {
            let options = LoadOptions {
                tae_dim: config.fm.tae_width(),
                fm_version: Some("1.0.0".into()),
                ..config.load_options(&entry.name, dataset.content)
            };
            let blueprint =
                Blueprint::load(&engine, &entry.plugin, &dataset.schema, &options).unwrap();
            let normaliser = Normaliser::identity(blueprint.columns.feature_names());
            let path = config.parameters(entry);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            blueprint.init_parameters(normaliser, 1).save(&path).unwrap();
        }
        installation
    }

    fn write(&self, config: &Config) {
        config.write(&self.dir.join("hypercast.toml")).unwrap();
    }

    /// The configuration with the expert of this name alone.
    fn with(&self, name: &str) -> Config {
        let mut config = self.config.clone();
        config.experts.retain(|entry| entry.name == name);
        config
    }

    /// Starts a daemon of the configuration that is written.
    fn start(&self, tier: DaemonTier) -> InProcessDaemon {
        let origin = Origin {
            path: self.dir.join("hypercast.toml"),
            listen: Some("127.0.0.1:0".into()),
            probe_listen: None,
            tier,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = channel();
        let thread = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
            let ready = move |url: &str| ready.send(url.to_owned()).unwrap();
            runtime.block_on(http::serve(origin, async { drop(stopped.await) }, ready)).unwrap();
        });
        InProcessDaemon::new(&is_ready, stop, thread)
    }
}

/// A daemon in this process. Dropping it stops it.
struct InProcessDaemon {
    url: String,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

/// What was answered: the status and the text, or why there is no answer.
type Answered = Result<String, String>;

impl InProcessDaemon {
    fn new(ready: &Receiver<String>, stop: oneshot::Sender<()>, thread: JoinHandle<()>) -> Self {
        let url = ready.recv().expect("it becomes ready");
        // The name that certificates have.
        let url = url.replace("127.0.0.1", "localhost");
        Self { url, running: Some((stop, thread)) }
    }

    /// Asks over a connection of its own; a request with a body is a POST.
    fn ask(&self, trusted: &Certificate, route: &str, body: Option<&[u8]>) -> Answered {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let agent = client::agent(config, Some(&trusted.certificate)).unwrap();
        let url = format!("{}{route}", self.url);
        let answer = match body {
            Some(body) => agent.post(url).send(body),
            None => agent.get(url).call(),
        };
        let mut answer = answer.map_err(|error| error.to_string())?;
        let text = answer.body_mut().read_to_string().unwrap();
        Ok(format!("{} {text}", answer.status().as_u16()))
    }

    /// How many reloads were applied.
    fn reloads(&self, certificates: &[Certificate]) -> u64 {
        // A reload between two questions may leave each of them with the wrong certificate.
        let twice = certificates.iter().chain(certificates);
        let mut answers = twice.map(|trusted| self.ask(trusted, "/metrics", None));
        let text = answers.find_map(Result::ok).expect("it has one of the certificates");
        let name = "hypercast_reloads_total{outcome=\"applied\"} ";
        let count = text.lines().find_map(|line| line.strip_prefix(name));
        count.map_or(0, |count| count.parse().unwrap())
    }
}

impl Drop for InProcessDaemon {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "it ends without an error");
        }
    }
}

/// What is asked of the daemons.
#[derive(Clone, Copy)]
enum Probe {
    Rank,
    /// Whether an answer is explained.
    Explain,
    /// An admin route, for an expert that is not there.
    Logs,
    /// A push that nobody signed.
    Push,
    /// 2,000 bytes that are no examples, to either tier of the FM.
    EmbedServing,
    EmbedLogging,
    /// Over a connection with the second certificate.
    SecondCertificate,
    /// Whether lines of the level DEBUG are written.
    LogLevel,
}

/// Keys that change together, and the answer by which one sees it.
struct ReloadedKeys {
    keys: &'static [&'static str],
    change: fn(&mut Config),
    probe: Probe,
    before: &'static str,
    after: &'static str,
}

impl ReloadedKeys {
    const fn new(
        keys: &'static [&'static str],
        change: fn(&mut Config),
        probe: Probe,
        [before, after]: [&'static str; 2],
    ) -> Self {
        Self { keys, change, probe, before, after }
    }
}

static CASES: [ReloadedKeys; 13] = [
    ReloadedKeys::new(
        &["experts"],
        |config| config.experts[0].name = "renamed".into(),
        Probe::Rank,
        ["\"name\":\"home\"", "\"name\":\"renamed\""],
    ),
    ReloadedKeys::new(
        &["fm_logging.max_body_bytes"],
        |config| config.fm_logging.max_body_bytes = 1000,
        Probe::EmbedLogging,
        ["does not contain examples", "over 1000 bytes"],
    ),
    ReloadedKeys::new(
        &["fm_serving.max_body_bytes"],
        |config| config.fm_serving.max_body_bytes = 1000,
        Probe::EmbedServing,
        ["does not contain examples", "over 1000 bytes"],
    ),
    ReloadedKeys::new(
        &["rollout.trusted_keys"],
        |config| config.rollout.trusted_keys = vec![format!("ed25519:{}", "a".repeat(64))],
        Probe::Push,
        ["this daemon trusts no key", "is not trusted here"],
    ),
    ReloadedKeys::new(
        &["server.admin"],
        |config| config.server.admin = false,
        Probe::Logs,
        ["404 ", "admin_off"],
    ),
    ReloadedKeys::new(
        &["server.admin_tokens"],
        |config| config.server.admin_tokens = "admin".into(),
        Probe::Logs,
        ["404 ", "401 "],
    ),
    ReloadedKeys::new(
        &["server.deadline_ms"],
        |config| config.server.deadline_ms = 0,
        Probe::Rank,
        ["200 ", "{\"error\":{\"code\""],
    ),
    ReloadedKeys::new(
        &["server.explain"],
        |config| config.server.explain = false,
        Probe::Explain,
        ["true", "false"],
    ),
    ReloadedKeys::new(
        &["server.log"],
        |config| config.server.log = "warn,hypercast_serve=debug".into(),
        Probe::LogLevel,
        ["false", "true"],
    ),
    ReloadedKeys::new(
        &["server.max_body_bytes"],
        |config| config.server.max_body_bytes = 64,
        Probe::Rank,
        ["200 ", "over 64 bytes"],
    ),
    ReloadedKeys::new(
        &["server.max_candidates"],
        |config| config.server.max_candidates = 3,
        Probe::Rank,
        ["200 ", "413 "],
    ),
    ReloadedKeys::new(
        &["server.tls_certificate", "server.tls_key"],
        |config| {
            config.server.tls_certificate = "second.crt".into();
            config.server.tls_key = "second.key".into();
        },
        Probe::SecondCertificate,
        ["no answer", "200 "],
    ),
    ReloadedKeys::new(
        &["server.tokens"],
        |config| config.server.tokens = "callers".into(),
        Probe::Rank,
        ["200 ", "401 "],
    ),
];

/// Has an effect only where others reach the address; `http::auth` tests it.
const TESTED_ELSEWHERE: &str = "server.insecure_admin";

/// A daemon of each tier that has a key, all of one configuration file.
struct AllTiers<'a> {
    own: &'a Installation,
    daemons: [InProcessDaemon; 3],
}

impl<'a> AllTiers<'a> {
    fn start(own: &'a Installation) -> Self {
        let tiers = [DaemonTier::All, DaemonTier::FmServing, DaemonTier::FmLogging];
        Self { own, daemons: tiers.map(|tier| own.start(tier)) }
    }

    fn answer(&self, probe: Probe) -> String {
        let [daemon, fm_serving, fm_logging] = &self.daemons;
        let [first, second] = &self.own.certificates;
        let rank = |body: &Value| daemon.ask(first, "/v1/rank", Some(body.to_string().as_bytes()));
        let mut body = rank_body(3, "feed", 1..5);
        let answered = match probe {
            Probe::Rank => rank(&body),
            Probe::Explain => {
                body["explain"] = true.into();
                rank(&body).map(|answer| answer.contains("\"explain\":{").to_string())
            }
            Probe::Logs => daemon.ask(first, "/v1/admin/experts/none/logs", None),
            Probe::Push => {
                let route = "/v1/admin/experts/home/versions/2.0.0";
                daemon.ask(first, route, Some(&unsigned_push()))
            }
            Probe::EmbedServing => fm_serving.ask(first, "/v1/embed", Some(&[0xff; 2000])),
            Probe::EmbedLogging => fm_logging.ask(first, "/v1/embed", Some(&[0xff; 2000])),
            Probe::SecondCertificate => daemon.ask(second, "/healthz", None),
            Probe::LogLevel => Ok(enabled!(target: "hypercast_serve", Level::DEBUG).to_string()),
        };
        answered.unwrap_or_else(|error| format!("no answer: {error}"))
    }

    /// Reloads another configuration by a signal, and waits until all daemons have.
    fn reload(&self, config: &Config) {
        self.own.write(config);
        let count = |daemon: &InProcessDaemon| daemon.reloads(&self.own.certificates);
        let before = self.daemons.each_ref().map(count);
        let id = std::process::id().to_string();
        assert!(Command::new("kill").args(["-HUP", &id]).status().unwrap().success());
        wait_until("all daemons reload their configuration", PATIENCE, || {
            self.daemons.iter().zip(before).all(|(daemon, before)| count(daemon) > before)
        });
    }
}

fn unsigned_push() -> Vec<u8> {
    let push = Push {
        signed: SignedManifest { manifest: "{}".into(), key: "k".into(), signature: "00".into() },
        wishes: PolicyOverrides::default(),
        component: b"wasm",
        parameters: None,
    };
    push.encode()
}

#[test]
fn every_key_that_a_reload_changes_takes_hold() {
    let Some(plugins) = prerequisite::plugins("reloadable keys") else { return };
    let tested = CASES.iter().flat_map(|case| case.keys).chain([&TESTED_ELSEWHERE]);
    assert_eq!(tested.copied().collect::<BTreeSet<_>>(), BTreeSet::from(RELOADABLE_KEYS));
    let _turn = ONE_AT_A_TIME.lock();
    assert!(std::env::var_os("HYPERCAST_LOG").is_none(), "it overrides server.log: unset it");
    logging::start();
    let dir = tempfile::tempdir().unwrap();
    let own = Installation::new(dir.path(), &plugins);
    let home = dir.path().join("runs/experts/home");
    copy_folder(&home, &home.with_file_name("renamed"));
    own.write(&own.with("home"));
    let tiers = AllTiers::start(&own);
    for ReloadedKeys { keys, change, probe, before, after } in &CASES {
        let check = |expected: &str| {
            let found = tiers.answer(*probe);
            assert!(found.contains(expected), "{keys:?}: {found}, not {expected}");
        };
        let mut changed = own.with("home");
        change(&mut changed);
        check(before);
        tiers.reload(&changed);
        check(after);
        tiers.reload(&own.with("home"));
        check(before);
    }
}

#[test]
fn a_reload_is_refused_where_an_expert_that_goes_on_has_not_the_memory() {
    let Some(plugins) = prerequisite::plugins("memory at a reload") else { return };
    let _turn = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir().unwrap();
    let own = Installation::new(dir.path(), &plugins);
    let mut config = own.with("home");
    own.write(&config);
    let daemon = own.start(DaemonTier::All);
    let [trusted, _] = &own.certificates;
    let reload = |config: &Config| {
        own.write(config);
        daemon.ask(trusted, "/v1/admin/reload", Some(b"")).unwrap()
    };
    let mut body = rank_body(3, "feed", 1..5);
    body["explain"] = true.into();
    let body = body.to_string();
    let rank = || daemon.ask(trusted, "/v1/rank", Some(body.as_bytes())).unwrap();
    let mut fits = config.clone();
    let refused = loop {
        config.server.max_candidates *= 2;
        let answer = reload(&config);
        if answer.starts_with("422 ") {
            break answer;
        }
        assert!(config.server.max_candidates < 1 << 30, "{answer}");
        fits = config.clone();
    };
    let figure = format!("cannot serve {} candidates", config.server.max_candidates);
    for part in ["nothing has changed", "expert home@", &figure, "MiB of memory"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    // Nothing of a file that is refused applies.
    config.server.explain = false;
    assert!(reload(&config).starts_with("422 "));
    assert!(rank().contains("\"explain\":{"));
    let answer = reload(&fits);
    assert!(answer.starts_with("200 ") && answer.contains("\"changed\":[]"), "{answer}");
    // An expert that does not go on does not count.
    config.experts = own.with("small").experts;
    let answer = reload(&config);
    assert!(answer.starts_with("200 ") && answer.contains("\"experts\":true"), "{answer}");
    let answer = rank();
    assert!(answer.contains("\"name\":\"small\"") && !answer.contains("\"explain\":"), "{answer}");
    // One that would not fit is not loaded, and the one that serves goes on.
    config.experts = own.with("home").experts;
    let answer = reload(&config);
    assert!(answer.starts_with("422 ") && answer.contains("expert home: "), "{answer}");
    assert!(rank().contains("\"name\":\"small\""));
    // An expert's own limits are those that it is loaded with.
    config.experts = own.with("small").experts;
    for (memory_mib, expected) in [(1, ["422 ", "expert small: "]), (16, ["200 ", "experts"])] {
        config.experts[0].limits.memory_mib = Some(memory_mib);
        let answer = reload(&config);
        assert!(expected.iter().all(|part| answer.contains(part)), "{memory_mib}: {answer}");
        assert!(rank().contains("\"name\":\"small\""));
    }
}
