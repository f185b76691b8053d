//! Notes in the stream of events what was answered, so that impressions find in the joiner where
//! their item was ranked, whichever daemon gets them.
//!
//! An answer does not wait for its note. What a killed process had not appended yet, or what a full
//! queue drops, leaves its impressions without a ranking, and is in no other way different.

use std::{
    sync::{Arc, mpsc::Receiver},
    thread,
    time::Duration,
};

use hypercast_core::{logging::RepeatedFailures, supervised_thread::OnPanic};
use hypercast_data::dataset::entity_id::EntityId;
use hypercast_stream::events::{EventWriter, RankingEvent};

use crate::{
    error::Result,
    metrics::Metrics,
    request::api::{RankAnswer, RankedPlaces},
    threads::QueueThread,
};

/// The first places of an answer, which are noted: few people see more, and a note stays far
/// below the longest record, so that none is refused and takes its batch along.
const MAX_PLACES: usize = 100;

/// Answers that may wait to be noted: 1.6 MB of [`MAX_PLACES`] each.
const QUEUE: usize = 1024;

/// Answers that are appended together.
const BATCH: usize = 512;

/// How long an answer waits for others to be appended with, so that few do not mean a sync each.
const GATHER: Duration = Duration::from_millis(5);

/// Appends answers' rankings in a thread. Dropping it appends what is queued first.
pub(crate) struct RankingRecorder {
    thread: QueueThread<RankingEvent>,
    metrics: Arc<Metrics>,
}

impl RankingRecorder {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(crate) fn start(writer: Arc<EventWriter>, metrics: &Arc<Metrics>) -> Result<Self> {
        let counted = metrics.clone();
        let run = move |rankings: Receiver<RankingEvent>| {
            let mut failures = RepeatedFailures::default();
            while let Ok(first) = rankings.recv() {
                thread::sleep(GATHER);
                let batch: Vec<RankingEvent> =
                    std::iter::once(first).chain(rankings.try_iter()).take(BATCH).collect();
                let count = batch.len() as u64;
                let what = match writer.append_rankings(batch) {
                    Ok(true) => "kept",
                    Ok(false) => "elsewhere",
                    Err(error) => {
                        if failures.is_news(&error) {
                            tracing::warn!(
                                %error,
                                "answers cannot be noted; their impressions will be of no known \
                                 ranking"
                            );
                        }
                        "failed"
                    }
                };
                counted.rankings.with_label_values(&[what]).inc_by(count);
            }
        };
        let thread = QueueThread::start("rankings", QUEUE, OnPanic::NotReady, run)?;
        Ok(Self { thread, metrics: metrics.clone() })
    }

    /// Queues the ranking of an answer that `arm` gave.
    pub(crate) fn record(&self, answer: &RankAnswer, arm: String) {
        let RankedPlaces { ids, propensities, .. } = &answer.ranking;
        let items = ids.iter().take(MAX_PLACES).map(EntityId::key).collect();
        let mut propensities: Vec<Option<f32>> =
            propensities.iter().take(MAX_PLACES).copied().collect();
        let known = propensities.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        propensities.truncate(known);
        let ranking = RankingEvent { request: answer.request, arm, items, propensities };
        if self.thread.try_send(ranking).is_err() {
            self.metrics.rankings.with_label_values(&["dropped"]).inc();
        }
    }
}
