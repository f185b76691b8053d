//! Trains and measures the arms of an experiment, which share a plugin, a log and a test. An arm is
//! the same expert with another part of the logged embedding, or shown less of the log.

use std::{ops::Range, path::PathBuf};

use hypercast_config::Config;
use hypercast_data::{
    dataset::timeline::Span,
    logs::{LogReader, LoggedRequest},
};
use hypercast_expert::Parameters;
use hypercast_train::stream::{ExpertSetup, LogView};

use super::{ExperimentContext, mask::InputMask};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::{
        expert::{ExpertPhase, TrainedExpert},
        stream::TargetRow,
    },
    tally::{ScoreTally, TalliedLabel},
};

/// Adds the prediction of an arm for a target, if it has a label.
pub fn add_target(
    tally: &mut ScoreTally,
    arm: usize,
    target: TargetRow<'_>,
    task: usize,
    probability: f32,
) {
    let TargetRow { example, row } = target;
    if let Some(label) = tally.label(example, row, task) {
        let (user, surface) = (example.user.id, example.surface);
        tally.add(TalliedLabel { arm, user, surface, task, label }, probability);
    }
}

/// What one arm of an experiment trains an expert on.
#[derive(Debug, Clone)]
pub struct ExperimentArm {
    /// Index of the arm in the tally.
    pub index: usize,
    /// Columns of the logged embedding that the expert reads.
    pub embedding: Range<usize>,
    /// Replaces them by zeros.
    pub without_tae: bool,
    /// Whether the expert may begin at the FM's own predictions. Without them what it gains is what
    /// the embedding carries.
    pub with_fm_logits: bool,
}

/// Trains and measures the arms of one seed.
pub struct ArmRunner<'a> {
    /// The test.
    pub context: &'a ExperimentContext<'a>,
    /// Settings of the experts, their seed among them.
    pub config: &'a Config,
    /// The seed's log.
    pub log: LogReader,
    /// The component of the expert.
    pub plugin: PathBuf,
    /// What the expert is not shown of the log.
    pub mask: InputMask,
}

impl ArmRunner<'_> {
    fn phase(&self) -> ExpertPhase<'_> {
        let ExperimentContext { engine, window, options, .. } = self.context;
        let (config, log) = (self.config, &self.log);
        ExpertPhase { config, log, engine, window: *window, mode: options.setup.mode }
    }

    /// The rows of some surfaces and a span of time, with the arm's part of the embedding.
    fn view<'b>(
        &'b self,
        surfaces: &[u16],
        arm: &ExperimentArm,
        span: Span,
        mask: &'b dyn Fn(&mut LoggedRequest),
    ) -> LogView<'b> {
        let (log, surfaces) = (&self.log, surfaces.to_vec());
        let embedding = Some(vec![arm.embedding.clone()]);
        LogView { log, surfaces, span, embedding, mask: Some(mask) }
    }

    /// Trains an expert on a span of time, from fresh parameters, or from those of `warm` for every
    /// layer that does not read the FM's embedding.
    ///
    /// # Errors
    /// A span without rows, a plugin that is refused or faults.
    pub fn train(
        &self,
        arm: &ExperimentArm,
        surfaces: &[u16],
        span: Span,
        warm: Option<&Parameters>,
    ) -> Result<TrainedExpert> {
        let mask = |logged: &mut LoggedRequest| self.mask.hide_of_log(logged);
        let view = self.view(surfaces, arm, span, &mask);
        let survey = view.survey()?.ok_or_else(|| {
            Error::invalid("the logs have no row to train the expert on: begin the test later, or take more users")
        })?;
        let phase = self.phase();
        let expert = ExpertSetup {
            config: phase.config,
            engine: phase.engine,
            plugin: &self.plugin,
            name: "experiment",
            without_tae: arm.without_tae,
            without_fm_logits: !arm.with_fm_logits,
            content_dim: Some(self.context.dataset.content),
        };
        phase.train(expert, &view, survey, warm, &mut |_, _, _| ())
    }

    /// Follows the test with a trained expert, and tallies its predictions.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin that faults.
    pub fn measure(
        &self,
        trained: &mut TrainedExpert,
        arm: &ExperimentArm,
        surfaces: &[u16],
        tally: &mut ScoreTally,
    ) -> Result<()> {
        let span = Span { from_ms: Some(self.context.window.test_from_ms), until_ms: None };
        let mask = |logged: &mut LoggedRequest| self.mask.hide_of_log(logged);
        let test = self.view(surfaces, arm, span, &mask);
        self.phase().follow(trained, &test, &mut |target, task, probability| {
            add_target(tally, arm.index, target, task, probability);
        })
    }

    /// Trains an arm on everything before the test and measures it on the test.
    ///
    /// # Errors
    /// Those of both.
    pub fn run(
        &self,
        arm: &ExperimentArm,
        surfaces: &[u16],
        tally: &mut ScoreTally,
    ) -> Result<TrainedExpert> {
        self.context.times.time("experts", || {
            let past = Span { from_ms: None, until_ms: Some(self.context.window.test_from_ms) };
            let mut trained = self.train(arm, surfaces, past, None)?;
            self.measure(&mut trained, arm, surfaces, tally)?;
            Ok(trained)
        })
    }

    /// All surfaces of the log.
    pub fn surfaces(&self) -> Vec<u16> {
        (0..self.log.schema.surfaces.len() as u16).collect()
    }
}
