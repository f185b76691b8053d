//! Compares the outcomes of requests with what was predicted of them, and counts those of each arm.

use std::{sync::Mutex, time::Duration};

use hypercast_core::{clock::now_ms, logging::RepeatedFailures, shutdown::Shutdown};
use hypercast_data::schema::Schema;
use hypercast_stream::{
    join::{OutcomeRecord, StateUpdate},
    streams::{StreamCursor, StreamEngine, StreamPlace, StreamRead, StreamRecord, Topic},
};

use crate::{
    error::Result,
    metrics::{arm_outcomes::ArmOutcomes, prediction_log::PredictionLog},
    threads::lock,
    versions::serving_set::ServingModels,
};

/// How long a read of a stream waits for new records.
pub(super) const WAIT: Duration = Duration::from_millis(200);

/// Back-off after a stream failed.
pub(super) const REST: Duration = Duration::from_secs(1);

/// Most records in one read.
const MOST: usize = 4096;

/// What outcomes are for.
#[derive(Clone, Copy)]
pub(super) struct OutcomeUses<'a> {
    pub(super) predictions: &'a PredictionLog,
    pub(super) arms: &'a ArmOutcomes,
    /// Whose arms these are; none without experts.
    pub(super) models: Option<&'a ServingModels>,
    pub(super) schema: &'a Schema,
}

/// Follows outcomes from `compared` until `stop`, and notes there how far it came. It tries again
/// while the stream cannot be read.
pub(super) fn follow_outcomes(
    streams: &dyn StreamEngine,
    uses: OutcomeUses<'_>,
    compared: &Mutex<Option<StreamPlace>>,
    stop: &Shutdown,
) {
    let (from, mut following) = (*lock(compared), None::<OutcomeComparison<'_>>);
    let mut failures = RepeatedFailures::default();
    while !stop.is_requested() {
        let followed = match &mut following {
            Some(comparison) => comparison.step(streams, WAIT),
            None => {
                OutcomeComparison::open(streams, from, uses).map(|begun| following = Some(begun))
            }
        };
        if let Err(error) = followed {
            if failures.is_news(&error) {
                tracing::warn!(%error, "outcomes cannot be read; trying again");
            }
            std::thread::sleep(REST);
        }
    }
    if let Some(comparison) = following {
        *lock(compared) = Some(comparison.cursor.place());
    }
}

/// Compares outcomes with the predictions for them.
struct OutcomeComparison<'a> {
    cursor: StreamCursor,
    uses: OutcomeUses<'a>,
}

impl<'a> OutcomeComparison<'a> {
    /// Begins at `from`; without it at the stream's end, because this process has no predictions
    /// for older outcomes.
    fn open(
        streams: &dyn StreamEngine,
        from: Option<StreamPlace>,
        uses: OutcomeUses<'a>,
    ) -> Result<Self> {
        let topic = Topic::outcomes();
        let from = match from {
            Some(from) => from,
            None => StreamPlace::at(streams.span(&topic)?.end),
        };
        let cursor = StreamCursor::open(streams, &topic, from)?;
        Ok(Self { cursor, uses })
    }

    /// Compares the next outcomes, for the first of which it waits. Behind missing ones it goes on
    /// with the first that is stored: predictions of requests wait for it there.
    fn step(&mut self, streams: &dyn StreamEngine, wait: Duration) -> Result<()> {
        match self.cursor.next(streams, MOST, wait)? {
            StreamRead::Records(records) => records.iter().for_each(|record| self.compare(record)),
            StreamRead::Gap(gap) => {
                tracing::warn!("outcomes are missing, and are compared with no prediction: {gap}");
            }
        }
        Ok(())
    }

    fn compare(&self, stored: &StreamRecord) {
        let OutcomeUses { predictions, arms, models, schema } = self.uses;
        match OutcomeRecord::decode(&stored.payload) {
            Ok(OutcomeRecord { update: StateUpdate::Outcome(impression), ranked, .. }) => {
                predictions.outcome(&impression, schema, now_ms());
                if let Some(ranked) = ranked {
                    let set = models.map(ServingModels::set);
                    let split = set.as_ref().and_then(|set| set.split(impression.surface));
                    arms.outcome(split, &impression, &ranked, schema);
                }
            }
            // A correction is ignored, because the outcome was compared when it first became known.
            Ok(_) => {}
            // The follower of features sets it aside, and says so.
            Err(error) => {
                tracing::debug!(%error, position = stored.position, "an outcome is not compared");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use hypercast_data::dataset::{ContextFeatures, Impression};
    use hypercast_fm::example::Outcome;
    use hypercast_stream::streams::{MemoryEngine, Record};

    use super::*;
    use crate::metrics::prediction_log::ArmPredictions;

    /// An outcome without any action.
    fn outcome(request: u64) -> Record {
        let impression = Impression {
            request,
            time_ms: 1,
            outcome_ms: 2,
            user: 3,
            item: 7,
            surface: 0,
            outcome: Outcome { known: 1, ..Outcome::UNKNOWN },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: false,
        };
        let update = StateUpdate::Outcome(impression);
        let record = OutcomeRecord { update, ingested_ms: 2, ranked: None };
        Record { id: 0, payload: postcard::to_stdvec(&record).unwrap() }
    }

    fn append(streams: &MemoryEngine, requests: &[u64]) {
        let records: Vec<Record> = requests.iter().map(|request| outcome(*request)).collect();
        streams.appender(&Topic::outcomes()).unwrap().append(&records).unwrap();
    }

    /// A schema, and predictions of six requests.
    fn predicted() -> (Schema, PredictionLog) {
        let schema = toml::from_str(
            "surfaces = ['feed']\nactions = ['click']\n\
             tasks = [{ name = 'click', role = 'main', kind = 'binary', label = 'click' }]",
        );
        let predictions = PredictionLog::new(1000);
        for request in 1..=6 {
            let tasks = [("click".to_owned(), vec![0.1])].into();
            predictions.keep(request, &[7], ArmPredictions { arm: "a@1.0.0".into(), tasks });
        }
        (schema.unwrap(), predictions)
    }

    #[test]
    fn outcomes_that_come_between_two_comparisons_are_compared_by_the_second() {
        let ((schema, predictions), streams) = (predicted(), MemoryEngine::default());
        let (arms, compared) = (ArmOutcomes::default(), Mutex::default());
        let uses =
            OutcomeUses { predictions: &predictions, arms: &arms, models: None, schema: &schema };
        let follow = |steps: usize| {
            let taken = AtomicUsize::new(0);
            let is_done = move || taken.fetch_add(1, Ordering::Relaxed) == steps;
            let stop = Shutdown::default().part(is_done);
            follow_outcomes(&streams, uses, &compared, &stop);
        };
        append(&streams, &[1]);
        // Opens alone, at the end.
        follow(1);
        append(&streams, &[2, 3]);
        // Opens, and reads.
        follow(2);
        assert_eq!(predictions.counts(), (2, 0));
        append(&streams, &[4]);
        follow(2);
        assert_eq!(predictions.counts(), (3, 0), "each once");
    }

    #[test]
    fn outcomes_behind_missing_ones_are_compared_and_each_once() {
        let ((schema, predictions), streams) = (predicted(), MemoryEngine::default());
        append(&streams, &[1]);
        let arms = ArmOutcomes::default();
        let uses =
            OutcomeUses { predictions: &predictions, arms: &arms, models: None, schema: &schema };
        let mut comparison = OutcomeComparison::open(&streams, None, uses).unwrap();
        append(&streams, &[2, 3, 4]);
        streams.trim(&Topic::outcomes(), 2).unwrap();
        let steps = |comparison: &mut OutcomeComparison<'_>, streams: &MemoryEngine| {
            (0..3).for_each(|_| comparison.step(streams, Duration::ZERO).unwrap());
            predictions.counts()
        };
        assert_eq!(steps(&mut comparison, &streams), (2, 0), "those that are stored");
        // The stream was restored from a backup and grew: it is read again from its beginning.
        let restored = MemoryEngine::default();
        append(&restored, &[1, 2, 3, 5, 6]);
        comparison.cursor.seek(&restored, comparison.cursor.place()).unwrap();
        assert_eq!(steps(&mut comparison, &restored), (6, 1), "3 comes again");
    }
}
