//! Trains and measures the arms of an experiment, which share a plugin, a log and a test. An arm is
//! the same expert with another part of the logged embedding.

use std::{ops::Range, path::Path, sync::Arc};

use hypercast_config::Config;
use hypercast_core::progress::Progress;
use hypercast_data::{dataset::timeline::Span, logs::LogReader};
use hypercast_expert::{Blueprint, Engine, Parameters};
use hypercast_train::stream::{ExpertSetup, ExpertStream, LogView};

use super::tally::{ScoreTally, TargetRow};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::{stream::TestMode, window::TestWindow},
};

/// The layers that read the FM's embedding, by the names that the SDK's plugins use. A warm start
/// across FMs must leave them out (section 4.3).
const FM_LAYERS: [&str; 2] = ["fm", "fusion"];

/// Whether a parameter belongs to the FM Embedding Module, the FM Fusion Module or a head's direct
/// path from them.
pub fn reads_fm(parameter: &str) -> bool {
    parameter.split('/').any(|layer| FM_LAYERS.contains(&layer))
}

/// An expert's arm.
#[derive(Debug, Clone)]
pub struct ExperimentArm {
    /// Index of the arm in the tally.
    pub index: usize,
    /// Columns of the logged embedding that the expert reads.
    pub embedding: Range<usize>,
    /// Replaces them by zeros.
    pub without_tae: bool,
}

/// Trains and measures the arms of one seed.
#[derive(Clone, Copy)]
pub struct ArmRunner<'a> {
    /// Settings of the experts, their seed among them.
    pub config: &'a Config,
    /// The seed's log.
    pub log: &'a LogReader,
    /// Runs the plugin.
    pub engine: &'a Engine,
    /// The component.
    pub plugin: &'a Path,
    /// Where the test begins.
    pub window: TestWindow,
    /// Whether experts learn during the test.
    pub mode: TestMode,
}

/// An expert after its past.
pub struct TrainedArm {
    /// Its plugin and network.
    pub blueprint: Arc<Blueprint>,
    /// Ready for the stream.
    pub stream: ExpertStream,
    /// Index in the schema of each of the expert's tasks.
    tasks: Vec<Option<usize>>,
    /// Rows that it learned from.
    pub rows: u64,
    /// Seconds of training.
    pub seconds: f64,
}

impl<'a> ArmRunner<'a> {
    /// The rows of some surfaces and a span of time, with the arm's part of the embedding.
    pub fn view(&self, surfaces: &[u16], arm: &ExperimentArm, span: Span) -> LogView<'a> {
        LogView {
            log: self.log,
            surfaces: surfaces.to_vec(),
            span,
            embedding: Some(vec![arm.embedding.clone()]),
        }
    }

    /// The span before the test.
    pub fn past(&self) -> Span {
        Span { from_ms: None, until_ms: Some(self.window.test_from_ms) }
    }

    /// Trains an expert on a view, from fresh parameters, or from those of `warm` for every layer
    /// that does not read the FM's embedding.
    ///
    /// # Errors
    /// A view without rows, a plugin that is refused or faults.
    pub fn train(
        &self,
        view: &LogView<'_>,
        arm: &ExperimentArm,
        warm: Option<&Parameters>,
    ) -> Result<TrainedArm> {
        let survey = view.survey()?.ok_or_else(|| {
            Error::invalid("the logs have no row to train the expert on: begin the test later, or take more users")
        })?;
        let rows = survey.rows;
        let setup = ExpertSetup {
            config: self.config,
            engine: self.engine,
            plugin: self.plugin,
            name: "experiment",
            without_tae: arm.without_tae,
        };
        let mut stream = setup.begin(view, survey, |parameters| {
            if let Some(warm) = warm {
                parameters.warm_start_from(warm, |name| !reads_fm(name));
                parameters.provenance.normaliser = warm.provenance.normaliser.clone();
            }
        })?;
        let (blueprint, schema) = (stream.blueprint.clone(), &self.log.schema);
        let tasks =
            blueprint.description.tasks.iter().map(|task| schema.task(&task.name)).collect();
        let total = rows * self.config.expert_training.epochs as u64;
        let mut progress = Progress::start("expert", total);
        let began = std::time::Instant::now();
        stream.learn_past(view, |report| {
            let rows: usize = report.examples.iter().map(|example| example.targets.len()).sum();
            progress.advance(rows as u64, String::new);
        })?;
        let seconds = began.elapsed().as_secs_f64();
        progress.finish(&format!("trained on {rows} rows"));
        Ok(TrainedArm { blueprint, stream, tasks, rows, seconds })
    }

    /// Follows the test with a trained expert, and tallies its predictions.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin that faults.
    pub fn measure(
        &self,
        trained: &mut TrainedArm,
        arm: &ExperimentArm,
        surfaces: &[u16],
        tally: &mut ScoreTally,
    ) -> Result<()> {
        let span = Span { from_ms: Some(self.window.test_from_ms), until_ms: None };
        let view = self.view(surfaces, arm, span);
        let TrainedArm { stream, tasks, .. } = trained;
        stream.go_online();
        Ok(stream.follow(
            &view,
            self.mode == TestMode::Streaming,
            &mut |examples, predictions| {
                let rows = examples.iter().flat_map(|e| {
                    (0..e.targets.len()).map(move |row| TargetRow { example: e, row })
                });
                for (at, target) in rows.enumerate() {
                    for (predictions, task) in predictions.iter().zip(&*tasks) {
                        if let Some(task) = *task {
                            tally.push(arm.index, target, task, predictions[at]);
                        }
                    }
                }
            },
        )?)
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
    ) -> Result<TrainedArm> {
        let view = self.view(surfaces, arm, self.past());
        let mut trained = self.train(&view, arm, None)?;
        self.measure(&mut trained, arm, surfaces, tally)?;
        Ok(trained)
    }

    /// All surfaces of the log.
    pub fn surfaces(&self) -> Vec<u16> {
        (0..self.log.schema.surfaces.len() as u16).collect()
    }
}
