//! The daemon's streams: events that arrive, the joiner if it runs in this process, and the feature
//! state that follows the outcomes. The latter two have threads; a stop ends both and saves their
//! state.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_core::{shutdown::Shutdown, supervised_thread};
use hypercast_data::dataset::Dataset;
use hypercast_stream::{
    join::{JoinerPosition, Runner},
    streams::{StreamEngine, Topic},
};
use tokio::sync::watch;

use crate::{
    error::Result,
    metrics::Metrics,
    request::{
        caller_ids::CallerIds,
        convert::Converter,
        events::EventIntake,
        feature_state::{FeatureFollower, LiveFeatures},
    },
    threads::ThreadGroup,
};

/// The threads of the streams, and what requests need of them.
pub struct EventStreams {
    /// Takes the events that arrive.
    pub(crate) intake: Arc<EventIntake>,
    /// Features of items and users as the outcomes so far make them.
    pub(crate) live: Arc<LiveFeatures>,
    /// Progress of this process' joiner; none if another process joins.
    passed: Option<watch::Receiver<JoinerPosition>>,
    /// Stopping them saves their state.
    pub(crate) threads: ThreadGroup,
}

impl EventStreams {
    /// Catches up with the streams, then goes on in threads until `stop` or the end of what is
    /// returned. Goes on with the intake of `before`, whose threads have ended.
    ///
    /// # Errors
    /// The joiner or the feature state cannot be opened; a thread cannot be started.
    pub fn start(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        dataset: &Dataset,
        metrics: Arc<Metrics>,
        stop: Shutdown,
        before: Option<&EventStreams>,
    ) -> Result<Self> {
        let (threads, schema) = (ThreadGroup::ending_with(stop), dataset.schema.clone());
        let intake = match before {
            Some(before) => before.intake.under(schema, dataset.content),
            None => {
                let ids = CallerIds::open(config, &dataset.dir, &schema, "serve", &metrics)?;
                let converter = Converter::new(schema).with_content(Some(dataset.content));
                EventIntake::new(engine.clone(), converter, ids, config, metrics.clone())
            }
        };
        let intake = Arc::new(intake);
        let mut joiner = None;
        if config.join.in_daemon {
            intake.writer.open()?;
            joiner = Some(caught_up(&engine, config, dataset, &metrics, &threads.stop)?);
        }
        let stop = threads.stop.clone();
        let follower = FeatureFollower::open(engine, config, dataset, metrics.clone(), stop)?;
        let mut streams = Self { intake, live: follower.live.clone(), passed: None, threads };
        if let Some(joiner) = joiner {
            let (progress, passed) = watch::channel(joiner.passed());
            streams.passed = Some(passed);
            metrics.joiner.with_label_values(&["failed"]).set(0);
            streams.threads.spawn("join", move |stop| {
                let ended = joiner.run(|passed| {
                    progress.send_replace(passed);
                });
                match ended {
                    Ok(()) => {}
                    // A stop ends the attempts, too. Whoever goes on joins the same events again.
                    Err(error) if stop.is_requested() => {
                        tracing::warn!(%error, "the joiner was stopped while it could not go on");
                    }
                    Err(error) => {
                        metrics.joiner.with_label_values(&["failed"]).set(1);
                        supervised_thread::report_lost("join");
                        tracing::error!(%error, "the joiner has stopped; events are still stored, and are joined after a restart");
                    }
                }
            })?;
        }
        streams.threads.spawn("live", move |_| follower.run())?;
        Ok(streams)
    }

    /// Waits until rankings use the events before `end`, or until the deadline. Returns whether
    /// they do; always false if this process does not join, or follows no outcomes any more.
    pub async fn wait_applied(&self, end: u64, deadline: Instant) -> bool {
        let Some(mut passed) = self.passed.clone() else { return false };
        if self.live.ended.load(Ordering::Relaxed) {
            return false;
        }
        let mut applied = self.live.applied.subscribe();
        let both = async {
            let outcomes = passed.wait_for(|passed| passed.events >= end).await.ok()?.outcomes;
            applied.wait_for(|&applied| applied >= outcomes).await.ok()?;
            Some(())
        };
        matches!(tokio::time::timeout_at(deadline.into(), both).await, Ok(Some(())))
    }
}

/// A joiner that has processed every event in the stream, or those before `stop` was requested.
fn caught_up(
    engine: &Arc<dyn StreamEngine>,
    config: &Config,
    dataset: &Dataset,
    metrics: &Arc<Metrics>,
    stop: &Shutdown,
) -> Result<Runner> {
    let mut joiner =
        Runner::open(engine.clone(), &config.joiner()?, dataset, metrics.clone(), stop.clone())?;
    let end = engine.span(&Topic::events())?.end;
    while joiner.passed().events < end && !stop.is_requested() {
        joiner.step(Duration::from_millis(100))?;
    }
    Ok(joiner)
}
