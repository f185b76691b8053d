//! The data set's requests as batches in time order, for a foundation model that
//! learns from some and predicts others.
//!
//! First come examples of mere history, then the stream. No batch reaches over
//! the beginning of the test. Which model reads them is the caller's.

use hypercast_fm::{
    example::Example,
    trainer::{FmTrainer, StepOutput},
};

use super::window::Window;
use crate::error::Result;
use hypercast_config::Config;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Pretraining, Replay, ReplayOptions};

/// Whether weights go on learning through the test.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Weights stay as they are at the test's beginning; histories and counters run on.
    Fixed,
    /// Predict, then train, through the test.
    Streaming,
}

/// What is streamed.
#[derive(Clone, Copy)]
pub struct Stream<'a> {
    /// The data set.
    pub dataset: &'a Dataset,
    /// Sizes of batches and histories.
    pub config: &'a Config,
    /// Where the test begins.
    pub window: Window,
    /// Whether the test teaches.
    pub mode: Mode,
    /// Events of history an example holds; the FM reads the newest `fm.max_history` of them.
    pub history_len: usize,
    /// Which users take part.
    pub users: Users,
}

/// A share of the users, chosen by a hash of their ids.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Users {
    /// From above 0 to 1: all.
    pub share: f64,
    /// Another salt chooses others.
    pub salt: u64,
}

impl Users {
    /// Every user.
    pub const ALL: Users = Users { share: 1.0, salt: 0 };

    /// Whether a user is one of them.
    pub fn hold(&self, user: u64) -> bool {
        let mixed = hypercast_core::hash::mix64(user ^ hypercast_core::hash::mix64(self.salt));
        (mixed >> 11) as f64 / (1u64 << 53) as f64 <= self.share
    }
}

/// Consecutive examples.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// In time order.
    pub examples: &'a [Example],
    /// Made of events whose times are not known: not of the stream.
    pub history_only: bool,
    /// Whether they may be learned from.
    pub teaches: bool,
    /// Examples of the stream before these.
    pub seen: usize,
}

impl Part<'_> {
    /// Predicts the part, and learns from those of its examples that `learns` accepts if it teaches.
    /// Every prediction is made before anything is learned from the part.
    ///
    /// # Errors
    /// Those of the trainer.
    pub fn through(
        &self,
        trainer: &mut dyn FmTrainer,
        learns: &dyn Fn(&Example) -> bool,
    ) -> Result<StepOutput> {
        let (taught, others): (Vec<&Example>, Vec<&Example>) =
            self.examples.iter().partition(|example| self.teaches && learns(example));
        let foretold =
            if others.is_empty() { StepOutput::default() } else { trainer.predict(&others)? };
        if taught.is_empty() {
            return Ok(foretold);
        }
        let stepped = trainer.step(&taught)?;
        if others.is_empty() {
            return Ok(stepped);
        }
        Ok(self.merge(stepped, foretold, learns))
    }

    /// Puts what was said of taught and of other examples back into one order.
    fn merge(
        &self,
        stepped: StepOutput,
        foretold: StepOutput,
        learns: &dyn Fn(&Example) -> bool,
    ) -> StepOutput {
        let rows = |said: &StepOutput, examples: &mut dyn Iterator<Item = &Example>| {
            let rows: usize = examples.map(|example| example.targets.len()).sum();
            (said.tae.len() / rows.max(1), said.labels.len() / rows.max(1))
        };
        let (width, tasks) = rows(&stepped, &mut self.examples.iter().filter(|e| learns(e)));
        let mut all = StepOutput { loss: stepped.loss, ..StepOutput::default() };
        let (mut own, mut other) = (0, 0);
        for example in self.examples {
            let (said, row) =
                if learns(example) { (&stepped, &mut own) } else { (&foretold, &mut other) };
            let (from, to) = (*row, *row + example.targets.len());
            all.tae.extend_from_slice(&said.tae[from * width..to * width]);
            all.predictions.extend_from_slice(&said.predictions[from * tasks..to * tasks]);
            all.labels.extend_from_slice(&said.labels[from * tasks..to * tasks]);
            all.mask.extend_from_slice(&said.mask[from * tasks..to * tasks]);
            *row = to;
        }
        all
    }
}

impl Stream<'_> {
    /// Hands on every part; `name` stands in the progress shown.
    ///
    /// # Errors
    /// Data that cannot be read, and those of `take`.
    pub fn run(&self, name: &str, mut take: impl FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        self.past(name, &mut take)?;
        let replay = Replay::new(
            self.dataset,
            ReplayOptions {
                span: Span::default(),
                history_len: self.history_len,
                max_targets: self.config.fm.max_targets,
                features: self.config.features,
            },
        )?;
        let mut progress =
            Progress::start(&format!("{name} on the stream"), self.dataset.rows as u64);
        let (mut batch, mut seen) = (Vec::new(), 0);
        let mut hand_on = |batch: &mut Vec<Example>| -> Result<()> {
            let Some(first) = batch.first() else { return Ok(()) };
            let test = first.time_ms >= self.window.test_from_ms;
            let teaches = !test || self.mode == Mode::Streaming;
            take(Part { examples: batch, history_only: false, teaches, seen })?;
            seen += batch.len();
            let rows: usize = batch.iter().map(|example| example.targets.len()).sum();
            progress.advance(rows as u64, String::new);
            batch.clear();
            Ok(())
        };
        for example in replay {
            let example = example?;
            if !self.users.hold(example.user.id) {
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

    /// How many examples of the stream come before the first that is logged: TAEs of a young FM are not.
    ///
    /// # Errors
    /// Data that cannot be read.
    pub fn skip(&self) -> Result<usize> {
        let before_test = self.window.test_from_ms;
        let requests = self.dataset.requests(Some(before_test), |user| self.users.hold(user))?;
        Ok((requests as f64 * self.config.logs.skip_share) as usize)
    }

    fn past(&self, name: &str, take: &mut impl FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        let options = self.config.pretraining(Some(self.window.test_from_ms));
        let examples = Pretraining::new(self.dataset, options)?;
        if examples.examples() == 0 {
            return Ok(());
        }
        let mut progress =
            Progress::start(&format!("{name} on past histories"), examples.examples() as u64);
        let mut batch = Vec::new();
        let mut examples = examples.filter(|example| self.users.hold(example.user.id)).peekable();
        while let Some(example) = examples.next() {
            batch.push(example);
            if batch.len() == self.config.fm.batch_requests || examples.peek().is_none() {
                take(Part { examples: &batch, history_only: true, teaches: true, seen: 0 })?;
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
        let of = |share, salt| (0..20_000).filter(|&user| Users { share, salt }.hold(user)).count();
        assert!((of(0.2, 0) as i64 - 4000).abs() < 200, "{}", of(0.2, 0));
        assert_eq!(of(1.0, 5), 20_000);
        assert_eq!(of(0.2, 0), of(0.2, 0));
        let both = |user| {
            Users { share: 0.2, salt: 1 }.hold(user) && Users { share: 0.2, salt: 2 }.hold(user)
        };
        let both = (0..20_000).filter(|&user| both(user)).count();
        assert!((both as i64 - 800).abs() < 120, "salts choose independently: {both}");
    }
}
