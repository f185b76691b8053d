//! The experts' phase of an evaluation: each expert of the preset learns from the logs up to the
//! test, then predicts the test in time order.
//!
//! It reads only the logs. A surface's rows are scored by the expert that serves it, so every arm
//! covers the same rows.

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::progress::Progress;
use hypercast_data::{dataset::timeline::Span, logs::LogReader, schema::BinaryLabels};
use hypercast_expert::{Blueprint, Engine};
use hypercast_fm::example::Example;
use hypercast_train::stream::{ExpertSetup, LogView};

use super::{
    scores::{EvaluationScores, ScoredImpression},
    stream::TestMode,
    window::TestWindow,
};
use crate::{
    demo::replay::PredictionArm,
    error::{CommonErrors as _, Error, Result},
};

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

impl ExpertPhase<'_> {
    /// Trains one expert and scores it.
    ///
    /// # Errors
    /// Logs or a plugin that cannot be used.
    pub fn run(&self, entry: &ExpertEntry, scores: &mut EvaluationScores) -> Result<()> {
        let test_from_ms = Some(self.window.test_from_ms);
        let schema = &self.log.schema;
        let serves = self.config.serving_surfaces(entry, schema)?;
        let view = |surfaces: Vec<u16>, from_ms, until_ms| LogView {
            log: self.log,
            surfaces,
            span: Span { from_ms, until_ms },
            embedding: None,
        };
        if view(serves.clone(), test_from_ms, None).rows().next().transpose()?.is_none() {
            eprintln!("expert {}: the test holds no row of its surfaces", entry.name);
            return Ok(());
        }
        let mut surfaces = self.config.training_surfaces(entry, schema)?;
        let mut survey = view(surfaces.clone(), None, test_from_ms).survey()?;
        if survey.is_none() {
            eprintln!(
                "expert {}: no row of its surfaces before the test; it learns from all",
                entry.name
            );
            surfaces = (0..schema.surfaces.len() as u16).collect();
            survey = view(surfaces.clone(), None, test_from_ms).survey()?;
        }
        let survey = survey.ok_or_else(|| {
            Error::invalid(format!("expert {:?}: the logs hold no row before the test", entry.name))
        })?;
        let past = view(surfaces.clone(), None, test_from_ms);
        let rows = survey.rows;
        let setup = ExpertSetup::of(self.config, entry, self.engine);
        let mut stream = setup.begin(&past, survey, |_| ())?;
        let scorer = ExpertScorer::new(self.log, &stream.blueprint, &serves, entry);
        let total = rows * self.config.expert_training.epochs as u64;
        let mut progress = Progress::start(&format!("expert {}", entry.name), total);
        stream.learn_past(&past, |report| {
            let rows: usize = report.examples.iter().map(|example| example.targets.len()).sum();
            scorer.score(report.examples, &report.predictions, scores);
            progress.advance(rows as u64, String::new);
        })?;
        stream.go_online();
        let test = view(surfaces, test_from_ms, None);
        stream.follow(&test, self.mode == TestMode::Streaming, &mut |examples, predictions| {
            scorer.score(examples, predictions, scores);
        })?;
        progress.finish(&format!("trained on {rows} rows before the test"));
        Ok(())
    }
}

/// Turns an expert's predictions into scores.
pub struct ExpertScorer {
    labels: BinaryLabels,
    /// Index in the schema of each of the expert's tasks.
    tasks: Vec<Option<usize>>,
    serves: Vec<u16>,
    arm: PredictionArm,
}

impl ExpertScorer {
    /// A scorer of an expert's tasks on the surfaces that it serves.
    pub fn new(
        log: &LogReader,
        blueprint: &Blueprint,
        serves: &[u16],
        entry: &ExpertEntry,
    ) -> Self {
        let labels = BinaryLabels::new(&log.schema);
        let tasks = blueprint.description.tasks.iter().map(|task| log.schema.task(&task.name));
        Self {
            tasks: tasks.collect(),
            labels,
            serves: serves.to_vec(),
            arm: if entry.without_tae { PredictionArm::Expert } else { PredictionArm::ExpertTae },
        }
    }

    /// Scores predictions, `[tasks][rows]`; there are no tasks if the pass did not predict.
    pub fn score(
        &self,
        examples: &[&Example],
        predictions: &[Vec<f32>],
        scores: &mut EvaluationScores,
    ) {
        let rows = examples.iter().flat_map(|e| (0..e.targets.len()).map(move |row| (*e, row)));
        for (at, (example, row)) in rows.enumerate() {
            if !self.serves.contains(&example.surface) {
                continue;
            }
            for (predictions, task) in predictions.iter().zip(&self.tasks) {
                let Some(task) = *task else { continue };
                if let Some(label) = self.labels.label(example, row, task) {
                    let of = ScoredImpression::of(example, task, self.arm, label);
                    scores.push(of, predictions[at]);
                }
            }
        }
    }
}
