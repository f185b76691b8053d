//! The experts' phase of an evaluation: each expert of the preset learns from the logs up to the
//! test, then predicts the test in time order. Experiments train the same way.
//!
//! It reads only the logs. A surface's rows are scored by the expert that serves it, so every arm
//! covers the same rows.

use std::time::Instant;

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::progress::Progress;
use hypercast_data::{dataset::timeline::Span, logs::LogReader};
use hypercast_expert::{Engine, Parameters};
use hypercast_fm::example::Example;
use hypercast_train::stream::{ExpertSetup, ExpertStream, LogView, Survey};

use super::{
    scores::{EvaluationScores, ScoredImpression},
    stream::{TargetRow, TestMode, targets},
    window::TestWindow,
};
use crate::{
    demo::replay::PredictionArm,
    error::{CommonErrors as _, Error, Result},
};

/// The layers that read the FM's embedding or its predictions, by the names that the SDK's plugins
/// use. A warm start across FMs must leave them out (section 4.3).
const FM_LAYERS: [&str; 3] = ["fm", "fusion", "from_fm"];

/// The inputs of the phase.
#[derive(Clone, Copy)]
pub struct ExpertPhase<'a> {
    /// The preset.
    pub config: &'a Config,
    /// The logs that the FM's phase wrote.
    pub log: &'a LogReader,
    /// Runs the plugins.
    pub engine: &'a Engine,
    /// Where the test begins.
    pub window: TestWindow,
    /// Whether experts go on learning through the test.
    pub mode: TestMode,
}

/// An expert after its past.
pub struct TrainedExpert {
    /// Its plugin and network, ready for the stream.
    pub stream: ExpertStream,
    /// Index in the schema of each of the expert's tasks.
    tasks: Vec<Option<usize>>,
    /// Rows that it learned from, each counted once a pass.
    pub trained_rows: u64,
    /// Seconds of training.
    pub seconds: f64,
}

/// What an expert says of a row.
#[derive(Debug, Clone, Copy)]
struct RowPrediction {
    /// The probability, or the value of a regression.
    prediction: f32,
    /// The ranking score of a task that has one.
    score: Option<f32>,
}

/// Sees the predictions for a target, each with its task of the schema.
pub type PredictionWatcher<'a> = &'a mut dyn FnMut(TargetRow<'_>, usize, f32);

impl ExpertPhase<'_> {
    /// Trains one expert and scores it as `arm`.
    ///
    /// # Errors
    /// Logs or a plugin that cannot be used.
    pub fn run(
        &self,
        entry: &ExpertEntry,
        arm: PredictionArm,
        scores: &mut EvaluationScores,
    ) -> Result<()> {
        let test_from_ms = Some(self.window.test_from_ms);
        let name = &entry.name;
        let schema = &self.log.schema;
        let serves = self.config.serving_surfaces(entry, schema)?;
        let view = |surfaces: &[u16], from_ms, until_ms| LogView {
            log: self.log,
            surfaces: surfaces.to_vec(),
            span: Span { from_ms, until_ms },
            embedding: None,
            mask: None,
        };
        if view(&serves, test_from_ms, None).rows().next().transpose()?.is_none() {
            eprintln!("expert {name}: the test holds no row of its surfaces");
            return Ok(());
        }
        let mut surfaces = self.config.training_surfaces(entry, schema)?;
        let mut survey = view(&surfaces, None, test_from_ms).survey()?;
        if survey.is_none() {
            eprintln!("expert {name}: no row of its surfaces before the test; it learns from all");
            surfaces = (0..schema.surfaces.len() as u16).collect();
            survey = view(&surfaces, None, test_from_ms).survey()?;
        }
        let survey = survey.ok_or_else(|| {
            Error::invalid(format!("expert {name:?}: the logs hold no row before the test"))
        })?;
        let scored = |TargetRow { example, row }: TargetRow<'_>, task: usize| {
            let label = schema.label(task, example.surface, &example.targets[row].outcome);
            let label = label.filter(|_| serves.contains(&example.surface))?;
            Some(ScoredImpression::of(example, task, arm, label))
        };
        let mut score = |target: TargetRow<'_>, task: usize, probability: f32| {
            if let Some(of) = scored(target, task) {
                scores.push(of, probability);
            }
        };
        let expert = ExpertSetup::of(self.config, entry, self.engine);
        let past = view(&surfaces, None, test_from_ms);
        let mut trained = self.train(expert, &past, survey, None, &mut score)?;
        let test = view(&surfaces, test_from_ms, None);
        self.follow_scored(&mut trained, &test, &mut |target, task, said| {
            let RowPrediction { prediction, score } = said;
            let Some(of) = scored(target, task) else { return };
            scores.push(of, prediction);
            if let Some(score) = score {
                scores.push_score(&of, prediction, score);
            }
        })
    }

    /// Trains an expert on a view, from fresh parameters, or from those of `warm` for every layer
    /// that does not read the FM's embedding.
    ///
    /// # Errors
    /// A plugin that is refused or faults.
    pub fn train(
        &self,
        expert: ExpertSetup<'_>,
        view: &LogView<'_>,
        survey: Survey,
        warm: Option<&Parameters>,
        watch: PredictionWatcher<'_>,
    ) -> Result<TrainedExpert> {
        let name = expert.name;
        let warm_start = |parameters: &mut Parameters| {
            if let Some(warm) = warm {
                let reads_fm = |name: &str| name.split('/').any(|layer| FM_LAYERS.contains(&layer));
                parameters.warm_start_from(warm, |name| !reads_fm(name));
                parameters.provenance.normaliser = warm.provenance.normaliser.clone();
            }
        };
        let mut stream = expert.begin(view, survey, warm_start)?;
        let schema = &self.log.schema;
        let tasks = stream.blueprint.description.tasks.iter().map(|task| schema.task(&task.name));
        let tasks: Vec<_> = tasks.collect();
        let mut progress = Progress::start(&format!("expert {name}"), stream.passes.rows());
        let rows = stream.passes.learned_rows;
        let mut trained_rows = 0;
        let began = Instant::now();
        stream.learn_past(view, |report| {
            each_prediction(&tasks, report.examples, &report.predictions, watch);
            let rows = targets(report.examples.iter().copied()).count() as u64;
            trained_rows += if report.stepped { rows } else { 0 };
            progress.advance(rows, String::new);
        })?;
        let seconds = began.elapsed().as_secs_f64();
        progress.finish(&format!("trained on {rows} rows before the test"));
        Ok(TrainedExpert { stream, tasks, trained_rows, seconds })
    }

    /// Follows the test with a trained expert.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin that faults.
    pub fn follow(
        &self,
        trained: &mut TrainedExpert,
        test: &LogView<'_>,
        watch: PredictionWatcher<'_>,
    ) -> Result<()> {
        self.follow_scored(trained, test, &mut |target, task, said| {
            watch(target, task, said.prediction);
        })
    }

    /// The same with ranking scores.
    fn follow_scored(
        &self,
        trained: &mut TrainedExpert,
        test: &LogView<'_>,
        watch: &mut dyn FnMut(TargetRow<'_>, usize, RowPrediction),
    ) -> Result<()> {
        let TrainedExpert { stream, tasks, .. } = trained;
        let learns = self.mode == TestMode::Streaming;
        if learns {
            // This learns the rows that passes held out, so what does not go on is left as saved.
            stream.go_online()?;
        }
        Ok(stream.follow(test, learns, &mut |examples, predictions| {
            let own = predictions.tasks.iter().zip(&*tasks);
            for (own, task) in own.filter_map(|(own, task)| Some((own, (*task)?))) {
                let scores = predictions.score(&own.task);
                for (at, target) in targets(examples.iter().copied()).enumerate() {
                    let (prediction, score) = (own.values[at], scores.map(|scores| scores[at]));
                    watch(target, task, RowPrediction { prediction, score });
                }
            }
        })?)
    }
}

/// Hands on predictions, `[tasks][rows]`; there are no tasks if the pass did not predict.
fn each_prediction(
    tasks: &[Option<usize>],
    examples: &[&Example],
    predictions: &[Vec<f32>],
    watch: PredictionWatcher<'_>,
) {
    for (at, target) in targets(examples.iter().copied()).enumerate() {
        for (predictions, task) in predictions.iter().zip(tasks) {
            if let Some(task) = *task {
                watch(target, task, predictions[at]);
            }
        }
    }
}
