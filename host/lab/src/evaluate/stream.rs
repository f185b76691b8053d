//! The data set's requests as batches in time order, for a foundation model that learns from some
//! and predicts others.
//!
//! First come examples of events without times, then the stream. No batch crosses the beginning of
//! the test.

use std::cell::Cell;

use hypercast_config::Config;
use hypercast_core::{atomic_dir, progress::Progress};
use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    features::replay::{Pretraining, Replay, ReplayOptions},
    logs::LogVersion,
    schema::CoreColumns,
};
use hypercast_fm::{
    example::Example,
    inference::FmOutput,
    trainer::{FmTrainer, StepOutput},
};
use hypercast_train::fm::log_writer;

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
    /// What of them the FM's trainer is shown.
    pub core: &'a CoreColumns,
    /// The examples are of events without times, which come before the stream.
    pub history_only: bool,
    /// Whether models may learn from them.
    pub may_learn: bool,
    /// An earlier pass went through them.
    pub repeats: bool,
    /// Examples of the stream before these.
    pub seen: usize,
}

/// The data set's requests as examples with `history_len` events of history.
///
/// # Errors
/// Data that cannot be read.
pub fn replay(dataset: &Dataset, config: &Config, history_len: usize) -> Result<Replay> {
    let options = ReplayOptions { history_len, ..config.replay(Span::default()) };
    Ok(Replay::new(dataset, options)?)
}

/// A target of a request.
#[derive(Debug, Clone, Copy)]
pub struct TargetRow<'a> {
    /// The request.
    pub example: &'a Example,
    /// Index of the target.
    pub row: usize,
}

/// The targets of requests, in order.
pub fn targets<'a>(
    examples: impl IntoIterator<Item = &'a Example>,
) -> impl Iterator<Item = TargetRow<'a>> {
    let rows = |example: &'a Example| {
        (0..example.targets.len()).map(move |row| TargetRow { example, row })
    };
    examples.into_iter().flat_map(rows)
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
        let core = self.core.examples(self.examples);
        let (learned, others): (Vec<&Example>, Vec<&Example>) = core
            .iter()
            .map(|example| &**example)
            .partition(|example| self.may_learn && learns(example));
        let predicted =
            if others.is_empty() { StepOutput::default() } else { trainer.predict(&others)? };
        if learned.is_empty() {
            return Ok(predicted);
        }
        trainer.set_repeats(self.repeats);
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
        let rows = targets(self.examples.iter().filter(|example| learns(example))).count().max(1);
        let (width, tasks) = (stepped.tae.len() / rows, stepped.labels.len() / rows);
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

/// The version under which an FM is logged, by its place among those that are logged together.
pub fn logged_version(fm: usize) -> String {
    format!("{}.0.0", fm + 1)
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
        let replay = replay(self.dataset, self.config, self.history_len)?;
        let mut progress =
            Progress::start(&format!("{name} on the stream"), self.dataset.rows as u64);
        let mut seen = 0;
        let core = &CoreColumns::for_trainer(&self.dataset.schema);
        self.in_batches(replay, |examples| {
            let is_test = examples[0].time_ms >= self.window.test_from_ms;
            let may_learn = !is_test || self.mode == TestMode::Streaming;
            let (history_only, repeats) = (false, false);
            take(StreamBatch { examples, core, history_only, may_learn, repeats, seen })?;
            seen += examples.len();
            progress.advance(targets(examples).count() as u64, String::new);
            Ok(())
        })?;
        progress.finish("done");
        Ok(())
    }

    /// Passes every batch to `embed`, and logs what it returns for each FM: embeddings of the FM's
    /// width, with predictions of the schema's main tasks or without, for the targets of all
    /// requests, or of those on `surface`. `embed` is told whether a batch is logged.
    ///
    /// # Errors
    /// Data that cannot be read, a full disk; those of `embed`.
    pub fn log(
        &self,
        name: &str,
        widths: &[usize],
        surface: Option<u16>,
        mut embed: impl FnMut(&StreamBatch<'_>, bool) -> Result<Vec<FmOutput>>,
    ) -> Result<()> {
        atomic_dir::remove(&self.config.paths.logs)?;
        let version = |(fm, width): (usize, &usize)| LogVersion::new(logged_version(fm), *width);
        let versions = widths.iter().enumerate().map(version).collect();
        let mut log = log_writer(self.dataset, self.config, versions)?;
        let skip = self.skip()?;
        self.run(name, |part| {
            let is_logged = !part.history_only && part.seen >= skip;
            let said = embed(&part, is_logged)?;
            if is_logged {
                log.write_batch(part.examples, &said, |example| {
                    surface.is_none_or(|own| example.surface == own)
                })?;
            }
            Ok(())
        })?;
        Ok(log.finish()?)
    }

    /// The number of examples at the stream's beginning that are not logged, because the TAEs of a
    /// young FM are of little use.
    fn skip(&self) -> Result<usize> {
        let before_test = self.window.test_from_ms;
        let requests =
            self.dataset.requests(Some(before_test), |user| self.users.contains(user))?;
        Ok((requests as f64 * self.config.logs.skip_share) as usize)
    }

    /// Hands on the examples of the chosen users in batches that do not cross the test's beginning.
    ///
    /// # Errors
    /// Those of the examples and of `take`.
    pub fn in_batches(
        &self,
        examples: impl Iterator<Item = hypercast_data::Result<Example>>,
        mut take: impl FnMut(&[Example]) -> Result<()>,
    ) -> Result<()> {
        let is_test = |example: &Example| example.time_ms >= self.window.test_from_ms;
        let mut batch: Vec<Example> = Vec::new();
        for example in examples {
            let example = example?;
            if !self.users.contains(example.user.id) {
                continue;
            }
            let crosses = batch.first().is_some_and(|first| is_test(first) != is_test(&example));
            if crosses || batch.len() == self.config.fm.batch_requests {
                take(&batch)?;
                batch.clear();
            }
            batch.push(example);
        }
        if batch.is_empty() { Ok(()) } else { take(&batch) }
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
        let first_pass = examples.examples() / self.config.fm.pretraining_passes;
        let read = Cell::new(0);
        let counted = examples.inspect(|_| read.set(read.get() + 1));
        let core = &CoreColumns::for_trainer(&self.dataset.schema);
        self.in_batches(counted.map(Ok), |examples| {
            let repeats = read.get() > first_pass;
            let (history_only, may_learn) = (true, true);
            take(StreamBatch { examples, core, history_only, may_learn, repeats, seen: 0 })?;
            progress.advance(examples.len() as u64, String::new);
            Ok(())
        })?;
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
