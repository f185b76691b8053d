//! Expert training: the logs, and nothing else, through an expert's plugin and
//! network.
//!
//! It never sees the FM or the data set: TAEs, features and outcomes all come
//! from the feature logs (section 3.3.1). How rows become steps is
//! `stream`'s, and what a step is, `expert::train`'s.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_fm::metrics::{Keeper, Scored};
use serde::Serialize;

use super::{
    fm::remove_dir,
    materialise,
    report::{ALL, Line},
    stream::{ExpertStream, Load, LogView, Start},
};
use crate::{
    config::{Config, ExpertEntry},
    dataset::{Dataset, timeline::Span},
    error::{Error, Result},
    expert::{Blueprint, Engine, train::BatchReport, wasm::contract::TaskKind},
    logs::LogReader,
    progress::Progress,
    schema::Schema,
};

/// What an expert's training did.
#[derive(Debug, Clone, Serialize)]
pub struct ExpertReport {
    /// The expert's name in the configuration.
    pub name: String,
    /// The plugin and its version.
    pub plugin: String,
    /// Rows a pass.
    pub rows: u64,
    /// The parameter file.
    pub parameters: PathBuf,
    /// Seconds that it took.
    pub seconds: f64,
    /// Metrics of the first pass, each prediction made before learning from it.
    pub progressive: Vec<Line>,
}

/// Where the TAEs come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The configured logs: those of an FM version, or of the only one that they hold.
    Logs(Option<&'a str>),
    /// A checkpoint, which computes them for the data set up to `timeline.until`.
    Checkpoint(&'a Path),
}

/// Trains the expert of `entry` and saves its parameters.
///
/// # Errors
/// Logs that are missing or hold no row of its surfaces, a plugin that is refused or faults.
pub fn train(
    config: &Config,
    entry: &ExpertEntry,
    engine: &Engine,
    source: Source<'_>,
) -> Result<ExpertReport> {
    let (logs, version) = match source {
        Source::Logs(version) => (config.paths.logs.clone(), version),
        Source::Checkpoint(checkpoint) => {
            let logs = config.paths.experts.join(&entry.name).join("past");
            let dataset = Dataset::open(&config.paths.dataset)?;
            materialise::past(&dataset, config, (checkpoint, &logs))?;
            (logs, None)
        }
    };
    let report = train_on(config, entry, engine, &LogReader::open_for(&logs, version)?)?;
    if let Source::Checkpoint(_) = source {
        remove_dir(&logs)?;
    }
    Ok(report)
}

fn train_on(
    config: &Config,
    entry: &ExpertEntry,
    engine: &Engine,
    log: &LogReader,
) -> Result<ExpertReport> {
    let started = std::time::Instant::now();
    let surfaces = config.training_surfaces(entry, &log.schema)?;
    let view = LogView { log, surfaces, span: Span::default(), embedding: None };
    let survey = view.survey()?.ok_or_else(|| {
        Error::Invalid(format!(
            "expert {:?}: the logs hold no row of its surfaces; log more or give it others",
            entry.name
        ))
    })?;
    let load = Load { engine, plugin: &entry.plugin, name: &entry.name };
    let options = config.load_options(&entry.name);
    let blueprint = load.blueprint(&view, &survey.fm_version, options)?;
    let settings = &config.expert_training;
    let parameters = blueprint.init_parameters(survey.statistics.finish(), settings.seed);
    let start = Start {
        settings,
        rows: survey.rows,
        without_tae: entry.without_tae,
        device: config.device,
    };
    let mut stream = ExpertStream::new(blueprint.clone(), parameters, &start)?;
    let mut metrics = Metrics { blueprint, kept: Keeper::new(1 << 20), schema: log.schema.clone() };
    let mut progress =
        Progress::start(&format!("expert {}", entry.name), survey.rows * settings.epochs as u64);
    stream.learn_past(&view, |report| {
        let rows: usize = report.examples.iter().map(|example| example.targets.len()).sum();
        metrics.observe(report);
        progress.advance(rows as u64, || format!("loss {:.4}", report.losses.iter().sum::<f64>()));
    })?;
    let path = config.parameters(entry);
    let dir = path.parent().expect("a file in the expert's folder");
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut parameters = stream.into_parameters();
    parameters.provenance.trained_rows = survey.rows;
    parameters.save(&path)?;
    progress.finish(&format!("trained on {} rows", survey.rows));
    Ok(ExpertReport {
        name: entry.name.clone(),
        plugin: format!(
            "{} {}",
            parameters.provenance.plugin, parameters.provenance.plugin_version
        ),
        rows: survey.rows,
        parameters: path,
        seconds: started.elapsed().as_secs_f64(),
        progressive: metrics.lines(),
    })
}

/// Progressive metrics of the first pass, as the plugin labels its tasks.
struct Metrics {
    blueprint: Arc<Blueprint>,
    /// By surface (the count of surfaces for all) and task.
    kept: Keeper<(usize, usize)>,
    schema: Arc<Schema>,
}

impl Metrics {
    /// Keeps the predictions of a progressive batch.
    fn observe(&mut self, report: &BatchReport<'_>) {
        let all = self.schema.surfaces.len();
        let rows = report
            .examples
            .iter()
            .flat_map(|example| example.targets.iter().map(move |_| *example));
        for (row, example) in rows.enumerate() {
            for (task, predictions) in report.predictions.iter().enumerate() {
                let targets = &report.targets[task];
                let binary = self.blueprint.description.tasks[task].kind == TaskKind::Binary;
                if binary && targets.mask[row] {
                    let scored = Scored {
                        user: example.user.id,
                        probability: predictions[row],
                        label: targets.labels[row] > 0.5,
                    };
                    self.kept.push((usize::from(example.surface), task), scored);
                    self.kept.push((all, task), scored);
                }
            }
        }
    }

    fn lines(&self) -> Vec<Line> {
        let surface =
            |at: usize| self.schema.surfaces.get(at).map_or(ALL, String::as_str).to_owned();
        let tasks = &self.blueprint.description.tasks;
        let line =
            |(&(at, task), summary): (&(usize, usize), hypercast_fm::metrics::Summary)| Line {
                surface: surface(at),
                task: tasks[task].name.clone(),
                n: summary.n,
                ne: summary.ne,
                auc: summary.auc,
                gauc: summary.gauc,
                best_ne: None,
            };
        self.kept.summaries().map(line).collect()
    }
}
