//! The daemon under load from another process: the highest rate that it serves in time, and its
//! behaviour at twice that rate.
//!
//! A simulated world gives every user a history of 256 events; a request has 200 candidates. Models
//! are trained as an operator trains them. While requests come, so do events: one for each request,
//! which makes the user's cached history one event too short. A fifth of the requests are of users
//! whom neither the training data nor the cache has seen. Beside it, the same without either, so
//! that all histories are cached.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use axum::body::Bytes;
use hypercast_config::Config;
use hypercast_core::quantile::quantile;
use hypercast_data::{
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use super::{
    BenchOptions, BenchReport, kuairand_files,
    load::{LoadResult, MetricsSnapshot, OpenLoopClient},
    stages, world,
};
use crate::{
    demo::preset::expert,
    error::{CommonErrors as _, Error, Result},
    processes::{DaemonProcess, hypercast},
};

const ITEMS: usize = 5_000;
pub(super) const CANDIDATES: usize = 200;
const HISTORY: usize = 256;

/// The most users of the world in KuaiRand's form, whose training takes longer.
const KUAIRAND_USERS: u64 = 60;

/// The latency that 99 of 100 requests must keep, in milliseconds.
const TARGET_MS: f64 = 50.0;

/// The longest time for which a rate is tried, in seconds.
const STRETCH_S: u64 = 8;

/// Events in a body of `/v1/events`.
const EVENTS_PER_BODY: u64 = 10;

/// One request in so many is of a new user, and a new user makes five requests.
const NEW_USER_ONE_IN: u64 = 5;
const NEW_USER_REQUESTS: u64 = 5;

/// Ids of new users begin here; the data set's are far below.
const NEW_USERS: u64 = 1 << 40;

/// Requests are this much later than the data set, so that all events are of their past.
const REQUESTS_AFTER_MS: i64 = 3_600_000;

/// Adds the figures of the part.
///
/// # Errors
/// A plugin that is not built; a failure of training or serving.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let (wants_stages, wants_load) = (options.wants("stages"), options.wants("load"));
    let dir = super::temporary()?;
    let of = ServedWorld::simulated(dir.path(), options.users)?;
    let fixture = ServingFixture::trained(dir.path(), of, options)?;
    if wants_stages {
        stages::measure(&fixture, report)?;
        let dir = super::temporary()?;
        let of = ServedWorld::of_kuairand(dir.path(), options.users)?;
        stages::measure(&ServingFixture::trained(dir.path(), of, options)?, report)?;
    }
    if wants_load {
        let stretch = Duration::from_secs(options.seconds.min(STRETCH_S));
        let kept = LoadBench::of_known_users(&fixture, stretch)?.kept()?;
        LoadBench::of_events(&fixture, stretch)?.run(kept, report)?;
    }
    Ok(())
}

/// A data set, and what requests of it are.
pub(super) struct ServedWorld {
    pub(super) dataset: PathBuf,
    /// The surface of requests, by index.
    pub(super) surface: usize,
    /// Behind the names of its figures.
    pub(super) suffix: &'static str,
}

impl ServedWorld {
    fn simulated(dir: &Path, users: usize) -> Result<Self> {
        let requests = users * 50;
        let world = SimulateOptions { users, items: ITEMS, requests, ..world(dir) };
        simulate(&world)?;
        Ok(Self { dataset: world.into, surface: 0, suffix: "" })
    }

    fn of_kuairand(dir: &Path, users: usize) -> Result<Self> {
        let dataset = kuairand_files::dataset(dir, (users as u64).min(KUAIRAND_USERS))?;
        Ok(Self { dataset, surface: 1, suffix: ", KuaiRand's schema" })
    }
}

/// Configurations that daemons are started from, and their data set.
pub(super) struct ServingFixture {
    /// An FM and an expert.
    pub(super) two_tiers: PathBuf,
    /// The FM by itself: a one-stage model of its size.
    pub(super) one_stage: PathBuf,
    /// The FM and the expert, with the joiner in the daemon, so that events reach features.
    with_events: PathBuf,
    pub(super) of: ServedWorld,
}

impl ServingFixture {
    /// Trains an FM and an expert of a world in `dir`.
    fn trained(dir: &Path, of: ServedWorld, options: &BenchOptions) -> Result<Self> {
        let fixture = Self {
            two_tiers: dir.join("hypercast.toml"),
            one_stage: dir.join("one-stage.toml"),
            with_events: dir.join("with-events.toml"),
            of,
        };
        let mut config = Config::default();
        config.fm.max_history = HISTORY;
        config.features.history_events = HISTORY;
        config.server.deadline_ms = TARGET_MS as u64;
        // Two daemons cannot share a joiner or a state folder.
        config.join.in_daemon = false;
        config.paths.state = "runs/one-stage".into();
        config.write(&fixture.one_stage)?;
        config.paths.state = Config::default().paths.state;
        config.experts = vec![expert("mlp", options.plugin("mlp-fusion")?)];
        config.write(&fixture.two_tiers)?;
        config.join.in_daemon = true;
        // The events are of the simulated past: their own times are the clock.
        config.join.tick_ms = 0;
        config.paths.state = "runs/with-events".into();
        config.write(&fixture.with_events)?;
        train_both(&fixture.two_tiers)?;
        Ok(fixture)
    }
}

/// A daemon under load of requests and events.
struct LoadBench {
    daemon: DaemonProcess,
    requests: OpenLoopClient,
    events: Option<OpenLoopClient>,
    stretch: Duration,
}

/// The highest rate that was served in time.
struct Peak {
    rate: f64,
    result: LoadResult,
    cache: CacheShares,
}

/// Shares of what the FM read of histories, in per cent.
#[derive(Clone, Copy)]
struct CacheShares {
    /// History tokens that were cached.
    tokens: f64,
    /// Requests whose whole history was cached.
    whole: f64,
}

impl LoadBench {
    /// With events, and users whom nobody knows.
    fn of_events(fixture: &ServingFixture, stretch: Duration) -> Result<Self> {
        let daemon = DaemonProcess::start(&fixture.with_events)?;
        let traffic = Traffic::new(&fixture.of.dataset, fixture.of.surface)?;
        let of_events = traffic.clone();
        let requests = OpenLoopClient::new(
            rank_url(&daemon),
            Box::new(move |at| Bytes::from(traffic.request(at).to_string())),
        )?;
        let events = OpenLoopClient::new(
            format!("{}/v1/events", daemon.url),
            Box::new(move |at| Bytes::from(of_events.events(at).to_string())),
        )?;
        Ok(Self { daemon, requests, events: Some(events), stretch })
    }

    /// Without both, so that all histories are cached.
    fn of_known_users(fixture: &ServingFixture, stretch: Duration) -> Result<Self> {
        let daemon = DaemonProcess::start(&fixture.two_tiers)?;
        let requests = rank_client(&daemon, &fixture.of.dataset, fixture.of.surface)?;
        Ok(Self { daemon, requests, events: None, stretch })
    }

    /// The highest rate while all histories are cached.
    fn kept(self) -> Result<Option<f64>> {
        let alone_ms = self.requests.alone_ms();
        let peak = self.peak(1e3 / alone_ms)?;
        self.daemon.stop()?;
        Ok(peak.map(|peak| peak.rate))
    }

    fn run(self, kept: Option<f64>, report: &mut BenchReport) -> Result<()> {
        let alone = self.requests.alone_ms();
        report.figure(format!("request of {CANDIDATES} candidates alone, p50"), alone, "ms");
        let Some(peak) = self.peak(1e3 / alone)? else {
            report.note(format!("no rate kept p99 under {TARGET_MS} ms"));
            return self.daemon.stop();
        };
        let memory = self.daemon.memory_mib();
        let name = format!("highest rate with p99 <= {TARGET_MS} ms");
        match kept {
            Some(kept) => {
                report.versus(name, peak.rate, "requests/s", "all histories cached", kept);
            }
            None => report.figure(name, peak.rate, "requests/s"),
        }
        report.figure("p50 at that rate", peak.result.answered(0.5), "ms");
        report.figure("p99 at that rate", peak.result.answered(0.99), "ms");
        report.figure("events at that rate", peak.rate, "events/s");
        let new_users = 100.0 / NEW_USER_ONE_IN as f64;
        report.figure("requests of new users", new_users, "% of requests");
        report.figure("history cache: tokens found at that rate", peak.cache.tokens, "% of tokens");
        let name = "history cache: whole histories found at that rate";
        report.figure(name, peak.cache.whole, "% of requests");
        self.overload(&peak, report);
        let after = self.daemon.memory_mib();
        report.versus("memory after twice the rate", after, "MiB", "before it", memory);
        self.daemon.stop()
    }

    /// Requests at a rate, and as many events if there are any.
    fn send(&self, rate: f64, lasting: Duration) -> LoadResult {
        thread::scope(|scope| {
            let send =
                |events: &OpenLoopClient| events.send(rate / EVENTS_PER_BODY as f64, lasting);
            let events = self.events.as_ref().map(|events| scope.spawn(move || send(events)));
            let result = self.requests.send(rate, lasting);
            events.map(|events| events.join().expect("a client does not panic"));
            result
        })
    }

    /// The highest rate at which 99 of 100 requests are answered in time: raised by steps from half
    /// of `one_by_one` until two in a row fail, since one may have met other load on the machine.
    fn peak(&self, one_by_one: f64) -> Result<Option<Peak>> {
        let (mut best, mut failed) = (None, 0);
        for step in 0..40 {
            let rate = one_by_one * 0.5 * 1.15f64.powi(step);
            let before = MetricsSnapshot::read(&self.daemon)?;
            let result = self.send(rate, self.stretch);
            let cache = CacheShares::between(&before, &MetricsSnapshot::read(&self.daemon)?);
            let answered = result.answered_ms.len() as f64 / result.requests().max(1) as f64;
            let p99 = result.answered(0.99);
            eprintln!(
                "  {rate:.0} requests/s: {:.1} % answered, p99 {p99:.1} ms, {:.1} % of history \
                 tokens cached",
                answered * 100.0,
                cache.tokens
            );
            if answered < 0.99 || p99 > TARGET_MS {
                failed += 1;
                if failed == 2 {
                    break;
                }
                continue;
            }
            failed = 0;
            best = Some(Peak { rate, result, cache });
        }
        Ok(best)
    }

    fn overload(&self, peak: &Peak, report: &mut BenchReport) {
        let mut twice = self.send(2.0 * peak.rate, 2 * self.stretch);
        let [ours, theirs] = [&twice, &peak.result].map(|load| load.goodput(TARGET_MS));
        report.versus("goodput at twice the rate", ours, "requests/s", "at the rate", theirs);
        let late = twice.late as f64 / twice.requests().max(1) as f64 * 100.0;
        report.figure("let in at twice the rate, and late", late, "% of requests");
        if twice.failed > 0 {
            report.note(format!("{} requests got no proper status", twice.failed));
        }
        if twice.refused_ms.is_empty() {
            report.note("no request was refused at twice the rate");
        } else {
            let refused = quantile(&mut twice.refused_ms, 0.99);
            report.figure("status of a refused request, p99", refused, "ms");
        }
    }
}

impl CacheShares {
    fn between(before: &MetricsSnapshot, after: &MetricsSnapshot) -> Self {
        let more = |name: &str, label: &str| after.sum(name, label) - before.sum(name, label);
        let cache = |what: &str| more("hypercast_history_cache", &format!("\"{what}\""));
        let (known, new) = (cache("known_tokens"), cache("new_tokens"));
        let requests = more("hypercast_requests_total", "/v1/rank");
        Self {
            tokens: known / (known + new).max(1.0) * 100.0,
            whole: cache("whole_requests") / requests.max(1.0) * 100.0,
        }
    }
}

/// The n-th request and the n-th body of events; both follow the same sequence of users.
#[derive(Clone)]
struct Traffic {
    users: Vec<u64>,
    items: Vec<u64>,
    surface: String,
    /// After the newest event of the data set, milliseconds since the epoch.
    from_ms: i64,
}

impl Traffic {
    /// Of the users of a data set, on one of its surfaces.
    fn new(dataset: &Path, surface: usize) -> Result<Self> {
        let dataset = Dataset::open(dataset)?;
        let mut newest = BTreeMap::<u64, i64>::new();
        for impression in dataset.impressions()? {
            let impression = impression?;
            newest.insert(impression.user, impression.time_ms);
        }
        let mut items: Vec<u64> = dataset.items.keys().copied().collect();
        items.sort_unstable();
        Ok(Self {
            users: newest.keys().copied().collect(),
            items,
            surface: dataset.schema.surfaces[surface].clone(),
            from_ms: newest.values().max().copied().unwrap_or(0) + 1,
        })
    }

    fn user(&self, at: u64) -> u64 {
        if at % NEW_USER_ONE_IN == NEW_USER_ONE_IN - 1 {
            return NEW_USERS + at / (NEW_USER_ONE_IN * NEW_USER_REQUESTS);
        }
        self.users[at as usize % self.users.len()]
    }

    fn request(&self, at: u64) -> Value {
        self.request_of(self.user(at), &mut SmallRng::seed_from_u64(at), false)
    }

    fn request_of(&self, user: u64, random: &mut SmallRng, explain: bool) -> Value {
        let item = |_| json!({ "id": self.items[random.random_range(0..self.items.len())] });
        let candidates: Vec<Value> = (0..CANDIDATES).map(item).collect();
        json!({
            "user": user, "surface": self.surface, "candidates": candidates,
            "time_ms": self.from_ms + REQUESTS_AFTER_MS, "explain": explain,
        })
    }

    /// What the users of the requests before did: each clicked on an item.
    fn events(&self, at: u64) -> Value {
        let event = |at: u64| {
            let item = self.items[at as usize % self.items.len()];
            json!({
                "request": at + 1, "user": self.user(at), "item": item, "surface": self.surface,
                "time_ms": self.from_ms + at as i64, "actions": { "click": true },
            })
        };
        let first = at * EVENTS_PER_BODY;
        json!({ "events": (first..first + EVENTS_PER_BODY).map(event).collect::<Vec<_>>() })
    }
}

/// Requests of all users of a data set on a surface, for random candidates.
pub(super) fn bodies(dataset: &Path, surface: usize, explain: bool) -> Result<Vec<String>> {
    let traffic = Traffic::new(dataset, surface)?;
    let mut random = SmallRng::seed_from_u64(3);
    let mut body = |&user: &u64| traffic.request_of(user, &mut random, explain).to_string();
    Ok(traffic.users.iter().map(&mut body).collect())
}

/// A client that sends these requests.
pub(super) fn rank_client(
    daemon: &DaemonProcess,
    dataset: &Path,
    surface: usize,
) -> Result<OpenLoopClient> {
    OpenLoopClient::cycle(rank_url(daemon), bodies(dataset, surface, false)?)
}

/// The address of a daemon's rankings.
pub(super) fn rank_url(daemon: &DaemonProcess) -> String {
    format!("{}/v1/rank", daemon.url)
}

/// Trains the FM and the experts of a configuration as an operator does.
pub(super) fn train_both(config: &Path) -> Result<()> {
    for model in ["fm", "expert"] {
        let failed = |error: std::io::Error| Error::internal(format!("cannot train: {error}"));
        let mut command = hypercast(&["train", model], config)?;
        if !command.stdout(Stdio::null()).status().map_err(failed)?.success() {
            return Err(Error::internal(format!("`hypercast train {model}` failed; see above")));
        }
    }
    Ok(())
}
