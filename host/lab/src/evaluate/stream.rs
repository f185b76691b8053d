//! The data set's requests as batches in time order, for a foundation model that learns from some
//! and predicts others.
//!
//! First come examples of events without times, then the stream. No batch crosses the beginning of
//! the test.

use hypercast_config::Config;
use hypercast_core::progress::Progress;
use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    features::replay::{Pretraining, Replay, ReplayOptions},
};
use hypercast_fm::{
    example::Example,
    trainer::{FmTrainer, StepOutput},
};

use super::window::TestWindow;
use crate::error::Result;

/// Whether models learn during the test.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum TestMode {
    /// Weights stay fixed from the test's beginning; histories and counters go on.
    Fixed,
    /// Predict, then train, on every batch of the test.
    Streaming,
}

/// A stream of batches.
#[derive(Clone, Copy)]
pub struct DatasetStream<'a> {
    /// The data set.
    pub dataset: &'a Dataset,
    /// Sizes of batches and histories.
    pub config: &'a Config,
    /// Where the test begins.
    pub window: TestWindow,
    /// Whether models learn during the test.
    pub mode: TestMode,
    /// Events of history per example; the FM reads the newest `fm.max_history` of them.
    pub history_len: usize,
    /// The users whose requests are in the stream.
    pub users: UserSample,
}

/// A share of the users, chosen by a hash of their ids.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UserSample {
    /// The share, above 0; 1 is all users.
    pub share: f64,
    /// Chooses the users.
    pub salt: u64,
}

impl UserSample {
    /// Every user.
    pub const ALL: UserSample = UserSample { share: 1.0, salt: 0 };

    /// Whether a user is in the sample.
    pub fn contains(&self, user: u64) -> bool {
        let mixed = hypercast_core::hash::mix64(user ^ hypercast_core::hash::mix64(self.salt));
        (mixed >> 11) as f64 / (1u64 << 53) as f64 <= self.share
    }
}

/// Consecutive examples of a stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamBatch<'a> {
    /// In time order.
    pub examples: &'a [Example],
    /// The examples are of events without times, which come before the stream.
    pub history_only: bool,
    /// Whether models may learn from them.
    pub may_learn: bool,
    /// Examples of the stream before these.
    pub seen: usize,
}

impl StreamBatch<'_> {
    /// Predicts the batch, and learns from the examples that `learns` accepts if it may. Every
    /// prediction is made before anything is learned from the batch.
    ///
    /// # Errors
    /// Those of the trainer.
    pub fn through(
        &self,
        trainer: &mut dyn FmTrainer,
        learns: &dyn Fn(&Example) -> bool,
    ) -> Result<StepOutput> {
        let (learned, others): (Vec<&Example>, Vec<&Example>) =
            self.examples.iter().partition(|example| self.may_learn && learns(example));
        let predicted =
            if others.is_empty() { StepOutput::default() } else { trainer.predict(&others)? };
        if learned.is_empty() {
            return Ok(predicted);
        }
        let stepped = trainer.step(&learned)?;
        if others.is_empty() {
            return Ok(stepped);
        }
        Ok(self.merge(stepped, predicted, learns))
    }

    /// Puts the outputs for learned and for other examples back into one order.
    fn merge(
        &self,
        stepped: StepOutput,
        predicted: StepOutput,
        learns: &dyn Fn(&Example) -> bool,
    ) -> StepOutput {
        let rows = |output: &StepOutput, examples: &mut dyn Iterator<Item = &Example>| {
            let rows: usize = examples.map(|example| example.targets.len()).sum();
            (output.tae.len() / rows.max(1), output.labels.len() / rows.max(1))
        };
        let (width, tasks) = rows(&stepped, &mut self.examples.iter().filter(|e| learns(e)));
        let mut all = StepOutput { loss: stepped.loss, ..StepOutput::default() };
        let (mut own, mut other) = (0, 0);
        for example in self.examples {
            let (output, row) =
                if learns(example) { (&stepped, &mut own) } else { (&predicted, &mut other) };
            let (from, to) = (*row, *row + example.targets.len());
            all.tae.extend_from_slice(&output.tae[from * width..to * width]);
            all.predictions.extend_from_slice(&output.predictions[from * tasks..to * tasks]);
            all.labels.extend_from_slice(&output.labels[from * tasks..to * tasks]);
            all.mask.extend_from_slice(&output.mask[from * tasks..to * tasks]);
            *row = to;
        }
        all
    }
}

impl DatasetStream<'_> {
    /// Passes every batch to `take`; `name` is shown in the progress.
    ///
    /// # Errors
    /// Data that cannot be read; those of `take`.
    pub fn run(
        &self,
        name: &str,
        mut take: impl FnMut(StreamBatch<'_>) -> Result<()>,
    ) -> Result<()> {
        self.pretraining(name, &mut take)?;
        let options = self.config.replay(Span::default());
        let options = ReplayOptions { history_len: self.history_len, ..options };
        let replay = Replay::new(self.dataset, options)?;
        let mut progress =
            Progress::start(&format!("{name} on the stream"), self.dataset.rows as u64);
        let (mut batch, mut seen) = (Vec::new(), 0);
        let mut hand_on = |batch: &mut Vec<Example>| -> Result<()> {
            let Some(first) = batch.first() else { return Ok(()) };
            let test = first.time_ms >= self.window.test_from_ms;
            let may_learn = !test || self.mode == TestMode::Streaming;
            take(StreamBatch { examples: batch, history_only: false, may_learn, seen })?;
            seen += batch.len();
            let rows: usize = batch.iter().map(|example| example.targets.len()).sum();
            progress.advance(rows as u64, String::new);
            batch.clear();
            Ok(())
        };
        for example in replay {
            let example = example?;
            if !self.users.contains(example.user.id) {
                continue;
            }
            let test = |example: &Example| example.time_ms >= self.window.test_from_ms;
            if batch.first().is_some_and(|first| test(first) != test(&example)) {
                hand_on(&mut batch)?;
            }
            batch.push(example);
            if batch.len() == self.config.fm.batch_requests {
                hand_on(&mut batch)?;
            }
        }
        hand_on(&mut batch)?;
        progress.finish("done");
        Ok(())
    }

    /// The number of examples at the stream's beginning that are not logged, because the TAEs of a
    /// young FM are of little use.
    ///
    /// # Errors
    /// Data that cannot be read.
    pub fn skip(&self) -> Result<usize> {
        let before_test = self.window.test_from_ms;
        let requests =
            self.dataset.requests(Some(before_test), |user| self.users.contains(user))?;
        Ok((requests as f64 * self.config.logs.skip_share) as usize)
    }

    fn pretraining(
        &self,
        name: &str,
        take: &mut impl FnMut(StreamBatch<'_>) -> Result<()>,
    ) -> Result<()> {
        let options = self.config.pretraining(Some(self.window.test_from_ms));
        let examples = Pretraining::new(self.dataset, options)?;
        if examples.examples() == 0 {
            return Ok(());
        }
        let mut progress =
            Progress::start(&format!("{name} on past histories"), examples.examples() as u64);
        let mut batch = Vec::new();
        let mut examples =
            examples.filter(|example| self.users.contains(example.user.id)).peekable();
        while let Some(example) = examples.next() {
            batch.push(example);
            if batch.len() == self.config.fm.batch_requests || examples.peek().is_none() {
                take(StreamBatch {
                    examples: &batch,
                    history_only: true,
                    may_learn: true,
                    seen: 0,
                })?;
                progress.advance(batch.len() as u64, String::new);
                batch.clear();
            }
        }
        progress.finish("done");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_users_is_about_that_and_stays() {
        let of = |share, salt| {
            (0..20_000).filter(|&user| UserSample { share, salt }.contains(user)).count()
        };
        assert!((of(0.2, 0) as i64 - 4000).abs() < 200, "{}", of(0.2, 0));
        assert_eq!(of(1.0, 5), 20_000);
        assert_eq!(of(0.2, 0), of(0.2, 0));
        let both = |user| {
            UserSample { share: 0.2, salt: 1 }.contains(user)
                && UserSample { share: 0.2, salt: 2 }.contains(user)
        };
        let both = (0..20_000).filter(|&user| both(user)).count();
        assert!((both as i64 - 800).abs() < 120, "salts choose independently: {both}");
    }
}
