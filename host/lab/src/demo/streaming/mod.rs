//! The whole loop live on one machine (paper section 3.3): events replayed in time
//! order against the daemon, joined, learned from by both tiers' trainers, and their weights served under that load;
//! two FM versions side by side, and an operator who promotes and rolls back.
//!
//! Every part is a process of its own, over HTTP and the streams, as an operator runs them. It has no model code.

mod client;
mod drive;
mod operator;
mod prepare;
pub(crate) mod processes;
mod report;
mod scores;
mod watch;

use std::{
    ffi::OsStr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

pub use self::report::Report;
use self::{
    client::Client,
    drive::{Drive, Pace},
    operator::{Course, Operator, PATIENCE, PUBLISHED, VERSIONS},
    prepare::Ground,
    processes::Fleet,
    report::Examples,
    scores::Scores,
    watch::{Line, Live},
};
use super::Seconds;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::EngineKind;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::shutdown::Shutdown;
use hypercast_stream::streams;

/// How often a line is printed.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// What to run the loop on.
#[derive(Debug, Clone)]
pub struct Options {
    /// What it shares with the demo of every step.
    pub base: super::Options,
    /// Event time over wall time; if missing, what lets the stream end with the minutes, as far as two cores bear it.
    pub speed_up: Option<f64>,
    /// The replay ends after so long.
    pub minutes: f64,
    /// What keeps the streams.
    pub engine: EngineKind,
    /// Where a NATS server runs; if missing, one is started.
    pub nats_url: Option<String>,
    /// The daemon's address.
    pub listen: String,
    /// Tiny models and a tiny world, for a look in seconds.
    pub small: bool,
}

/// Runs the loop to its end, and stops everything.
///
/// # Errors
/// A work folder that another demo has (the error says its process id); a process that ends before it is asked;
/// an impression that was lost or doubled.
pub fn run(options: &Options) -> Result<Report> {
    if !(options.minutes > 0.0 && options.speed_up.is_none_or(|speed_up| speed_up > 0.0)) {
        return Err(Error::invalid("--minutes and --speed-up must be above 0"));
    }
    let _owner = DirLock::acquire(&options.base.work)?;
    prepare::clear(&options.base.work)?;
    let stop = Shutdown::on_signals()?;
    let mut seconds = Seconds::default();
    let mut options = options.clone();
    let mut fleet = Fleet::new(options.base.work.join("said"), stop.clone())?;
    if options.engine == EngineKind::Nats && options.nats_url.is_none() {
        options.nats_url = Some(fleet.start_nats(&options.base.work.join("nats"))?);
    }
    let ground = prepare::prepare(&options, &fleet, &mut seconds)?;
    let url = seconds.time("start", || start(&ground, &mut fleet, &options.listen))?;
    println!("the page is at {url}/");
    let client = Client::new(url, ground.dataset.schema.clone());
    let fleet = Mutex::new(fleet);
    let replayed = replay(&options, &ground, (&client, &fleet, &stop), &mut seconds);
    let mut fleet = fleet.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut report = match replayed {
        Ok(report) => report,
        Err(error) => {
            // What was wrong first matters more than how others end.
            if let Err(also) = fleet.stop() {
                tracing::warn!("{also}");
            }
            return Err(error);
        }
    };
    report.memory_mib = fleet.memory_mib().into_iter().collect();
    seconds.time("stop", || fleet.stop())?;
    report.seconds = seconds.0;
    Ok(report)
}

/// Starts every process but the second expert's trainer: trainers first, so that there are weights to serve.
fn start(ground: &Ground, fleet: &mut Fleet, listen: &str) -> Result<String> {
    let configs = [&ground.first, &ground.second];
    for (version, config) in VERSIONS.into_iter().zip(configs) {
        let mut args =
            ["train", "fm", "--follow", "--version", version, "--config"].map(OsStr::new).to_vec();
        args.push(config.as_os_str());
        fleet.start(&format!("train-fm-{version}"), &args)?;
    }
    operator::start_expert(ground, fleet, VERSIONS[0])?;
    for version in VERSIONS {
        fleet.await_word(&format!("train-fm-{version}"), PUBLISHED, PATIENCE)?;
    }
    fleet.await_word(&operator::trainer(VERSIONS[0]), PUBLISHED, PATIENCE)?;
    Operator::begin(ground, fleet)?;
    let config = [OsStr::new("--config"), ground.first.as_os_str()];
    fleet.start("log", &[&["materialise", "--follow"].map(OsStr::new)[..], &config].concat())?;
    fleet
        .start("serve", &[&["serve", "--listen", listen].map(OsStr::new)[..], &config].concat())?;
    fleet.await_word("serve", "listening on ", PATIENCE)
}

/// Replays under an operator's decisions, then waits for the last examples.
fn replay(
    options: &Options,
    ground: &Ground,
    (client, fleet, stop): (&Client, &Mutex<Fleet>, &Shutdown),
    seconds: &mut Seconds,
) -> Result<Report> {
    let Ground { from_ms, requests, speed_up, .. } = *ground;
    let most = Duration::from_secs_f64(options.minutes * 60.0);
    println!("replaying {requests} requests, {speed_up:.0} times as fast as they came");
    let late_ms = (ground.config.join.max_window_s as i64 + 1) * 1000;
    let pace = Pace { from_ms, speed_up, requests, most, late_ms };
    let mut drive = Drive::new(client, Scores::new(&ground.dataset.schema), pace);
    let course = Course::default();
    let mut said = Instant::now();
    let utc_offset_h = ground.config.timeline.utc_offset_h;
    let look = |drive: &mut Drive<'_>| {
        if stop.is_requested() {
            return Err(Error::invalid("stopped before its end"));
        }
        course.failed().map_or(Ok(()), Err)?;
        if said.elapsed() >= SAY_EVERY {
            said = Instant::now();
            // The operator may hold the fleet; it looks itself then.
            if let Ok(mut fleet) = fleet.try_lock() {
                fleet.check()?;
            }
            let live = Live::read(&client.live()?);
            let (scores, share) = (drive.scores.line(), drive.share());
            let line =
                Line { sent: &drive.sent, share, live: &live, scores: &scores, utc_offset_h };
            println!("{}", line.text());
        }
        Ok(())
    };
    let operator = Operator { ground, fleet, client, stop };
    seconds.time("replay", || {
        std::thread::scope(|scope| {
            scope.spawn(|| operator.follow(&course));
            let outcome = drive.run(&ground.dataset, &course, look);
            if outcome.is_err() {
                // The operator waits for a replay that goes no further.
                stop.request();
            }
            outcome
        })
    })?;
    course.failed().map_or(Ok(()), Err)?;
    let streams = streams::open(&ground.config.engine)?;
    let examples = Examples::read(&*streams, drive.sent.impressions)?;
    let live = Live::read(&client.live()?);
    let mut report = Report::new(&drive.sent, drive.scores.rows(), (live, examples));
    report.decisions = course.notes();
    report.check()?;
    Ok(report)
}
