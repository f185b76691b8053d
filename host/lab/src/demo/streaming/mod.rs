//! The whole loop live on one machine (paper section 3.3): events are replayed in time order
//! against the daemon, joined, and learned from by the trainers of both tiers, whose weights are
//! served under that load. Two FM versions run side by side, and an operator promotes and rolls
//! back.
//!
//! Every part is a process of its own, over HTTP and the streams, as an operator runs them.

mod load;
mod operator;
mod prepare;
mod report;
mod scores;
mod status;

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use hypercast_config::EngineKind;
use hypercast_core::{dir_lock::DirLock, shutdown::Shutdown};
use hypercast_stream::streams;

pub(crate) use self::operator::{PUBLISHED, VERSION_WITHIN};
pub use self::{load::count, report::StreamingReport};
use self::{
    load::{LoadGenerator, ReplaySchedule},
    operator::{ReplayProgress, VERSIONS},
    prepare::DemoSetup,
    report::JoinedCounts,
    scores::ServedScores,
    status::{LiveStatus, status_text},
};
use super::{DemoOptions, StepTimes, client::DemoClient};
use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::LatencyQuantiles,
    processes::ProcessGroup,
};

/// The time between two printed status lines.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// How the loop runs.
#[derive(Debug, Clone, clap::Args)]
pub struct LiveOptions {
    /// Replay events so many times as fast as they came [default: what fits the minutes, at 40
    /// requests a second at most]
    #[arg(long, requires = "streaming", value_name = "N")]
    pub speed_up: Option<f64>,
    /// End the replay after so many minutes
    #[arg(long, requires = "streaming", value_name = "M", default_value_t = 5.0)]
    pub minutes: f64,
    /// The stream engine
    #[arg(long, requires = "streaming", value_enum, default_value_t)]
    pub engine: EngineKind,
    /// A running NATS server, as nats://HOST:PORT; by default `nats-server` is started
    #[arg(long, requires = "streaming", value_name = "URL")]
    pub nats_url: Option<String>,
    /// The address of the daemon and its page; port 0 takes a free one
    #[arg(long, requires = "streaming", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Tiny models and a tiny simulated world, for a look in seconds
    #[arg(long, requires = "streaming")]
    pub small: bool,
}

/// Runs the loop to its end, and stops everything.
///
/// # Errors
/// A work folder that another demo uses (the error has its process id); a process that ends early;
/// an impression that was lost or doubled.
pub fn run(options: &DemoOptions) -> Result<StreamingReport> {
    let LiveOptions { minutes, speed_up, .. } = options.live;
    if !(minutes > 0.0 && speed_up.is_none_or(|speed_up| speed_up > 0.0)) {
        return Err(Error::invalid("--minutes and --speed-up must be above 0"));
    }
    let _owner = DirLock::acquire(options.work())?;
    prepare::clear(options.work())?;
    let stop = Shutdown::on_signals()?;
    let times = StepTimes::default();
    let mut options = options.clone();
    let mut processes = ProcessGroup::new(options.work().join("process-logs"), stop.clone())?;
    if options.live.engine == EngineKind::Nats && options.live.nats_url.is_none() {
        options.live.nats_url = Some(processes.start_nats(&options.work().join("nats"))?);
    }
    let setup = prepare::prepare(&options, &processes, &times)?;
    let url = times.time("start", || start(&setup, &mut processes, &options.live.listen))?;
    println!("the page is at {url}/");
    let client = DemoClient::new(url, &setup.dataset)?;
    let processes = Mutex::new(processes);
    let running = RunningDemo {
        setup: &setup,
        client: &client,
        processes: &processes,
        stop: &stop,
        progress: ReplayProgress::default(),
    };
    let replayed = running.replay(&times);
    let mut processes = operator::lock(&processes);
    let mut report = replayed.inspect_err(|_| {
        // The first failure matters more than how the others end.
        if let Err(also) = processes.stop() {
            tracing::warn!("{also}");
        }
    })?;
    report.memory_mib = processes.memory_mib().into_iter().collect();
    times.time("stop", || processes.stop())?;
    report.seconds = times.seconds();
    Ok(report)
}

/// Starts every process but the second expert's trainer; the trainers first, so that there are
/// weights to serve. Returns the daemon's address.
fn start(setup: &DemoSetup, processes: &mut ProcessGroup, listen: &str) -> Result<String> {
    let configs = [&setup.first, &setup.second];
    for (version, config) in VERSIONS.into_iter().zip(configs) {
        let words = ["train", "fm", "--follow", "--version", version];
        processes.start(&format!("train-fm-{version}"), &words, config)?;
    }
    operator::start_expert(setup, processes, VERSIONS[0])?;
    for version in VERSIONS {
        processes.await_output(&format!("train-fm-{version}"), PUBLISHED, VERSION_WITHIN)?;
    }
    processes.await_output(&operator::trainer(VERSIONS[0]), PUBLISHED, VERSION_WITHIN)?;
    operator::begin(setup, processes)?;
    processes.start("log", &["materialise", "--follow"], &setup.first)?;
    processes.start("serve", &["serve", "--listen", listen], &setup.first)?;
    processes.await_output("serve", "listening on ", VERSION_WITHIN)
}

/// A demo whose processes run.
struct RunningDemo<'a> {
    setup: &'a DemoSetup,
    client: &'a DemoClient,
    processes: &'a Mutex<ProcessGroup>,
    stop: &'a Shutdown,
    progress: ReplayProgress,
}

impl RunningDemo<'_> {
    /// Replays under an operator's decisions, then waits for the last examples.
    fn replay(&self, times: &StepTimes) -> Result<StreamingReport> {
        let Self { setup, client, stop, progress, .. } = self;
        let ReplaySchedule { requests, speed_up, .. } = setup.schedule;
        println!("replaying {requests} requests, {speed_up:.0} times as fast as they came");
        let scores = ServedScores::new(&setup.dataset.schema);
        let mut load = LoadGenerator::new(client, scores, setup.schedule);
        let mut printed = Instant::now();
        let look = |load: &mut LoadGenerator<'_>| {
            if stop.is_requested() {
                return Err(Error::refused("stopped before its end"));
            }
            progress.take_failure().map_or(Ok(()), Err)?;
            if printed.elapsed() >= STATUS_EVERY {
                printed = Instant::now();
                self.print_status(load)?;
            }
            Ok(())
        };
        times.time("replay", || {
            std::thread::scope(|scope| {
                scope.spawn(|| self.operate());
                let outcome = load.run(&setup.dataset, progress, look);
                if outcome.is_err() {
                    // The operator would wait for a replay that goes no further.
                    stop.request();
                }
                outcome
            })
        })?;
        progress.take_failure().map_or(Ok(()), Err)?;
        let streams = streams::open(&setup.config.engine)?;
        let joined = JoinedCounts::read(&*streams, load.sent.impressions)?;
        let report = StreamingReport {
            rows: load.scores.rows(),
            round_trip: LatencyQuantiles::of(load.sent.round_trips_ms.clone()),
            sent: load.sent,
            live: LiveStatus::read(&client.live()?),
            joined,
            decisions: progress.decisions(),
            memory_mib: BTreeMap::new(),
            seconds: BTreeMap::new(),
        };
        report.check()?;
        Ok(report)
    }

    fn print_status(&self, load: &mut LoadGenerator<'_>) -> Result<()> {
        // The operator checks the processes itself while it holds them.
        if let Ok(mut processes) = self.processes.try_lock() {
            processes.check()?;
        }
        let live = LiveStatus::read(&self.client.live()?);
        println!("{}", status_text(load, &live, self.setup.config.timeline.utc_offset_h));
        Ok(())
    }
}
