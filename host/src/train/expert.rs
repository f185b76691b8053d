//! Expert training: the logs, and nothing else, through an expert's plugin and
//! network.
//!
//! It never sees the FM or the data set: TAEs, features and outcomes all come
//! from the feature logs (section 3.3.1). What a step is, is `expert::train`'s.

use std::{path::PathBuf, sync::Arc};

use hypercast_fm::{
    example::Example,
    metrics::{Keeper, Scored},
};
use serde::Serialize;

use super::report::{ALL, Line};
use crate::{
    config::{Config, ExpertEntry},
    error::{Error, Result},
    expert::{
        Blueprint, Chunk, Engine, ExpertTrainer, FeatureStatistics, LoadOptions, TrainerConfig,
        train::{BatchReport, OptimizerConfig},
        wasm::contract::TaskKind,
    },
    logs::{LogReader, Logged},
    progress::Progress,
    schema::Schema,
};

/// Rows that are held, hooked and shuffled together.
const CHUNK_ROWS: usize = 65_536;

/// Learning rate of embedding tables, relative to that of dense weights.
const TABLE_RATE: f64 = 10.0;

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

/// Trains the expert of `entry` on the configured logs and saves its parameters.
///
/// # Errors
/// Logs that are missing or hold no row of its surfaces, a plugin that is refused or faults.
pub fn train(config: &Config, entry: &ExpertEntry, engine: &Engine) -> Result<ExpertReport> {
    let started = std::time::Instant::now();
    let log = LogReader::open(&config.paths.logs)?;
    let schema = log.schema.clone();
    let surfaces = config.training_surfaces(entry, &schema)?;
    let survey = Survey::of(&log, &surfaces, entry)?;
    let options = LoadOptions {
        tae_dim: log.manifest.tae_dim,
        fm_version: Some(survey.fm_version),
        ..config.plugin_limits.load_options()
    };
    let blueprint = Arc::new(Blueprint::load(engine, &entry.plugin, &schema, &options)?);
    let (wanted, logged) = (blueprint.description.history_len as usize, log.manifest.history_len);
    if wanted > logged {
        return Err(Error::Invalid(format!(
            "expert {:?} reads {wanted} events of short history and the logs hold {logged}; raise logs.history_len and log again",
            entry.name
        )));
    }
    let settings = &config.expert_training;
    let steps = settings.epochs as u64 * survey.rows / settings.batch_rows as u64;
    let trainer_config = TrainerConfig {
        optimizer: OptimizerConfig {
            learning_rate: settings.learning_rate as f32,
            table_learning_rate: (settings.learning_rate * TABLE_RATE) as f32,
            weight_decay: settings.weight_decay as f32,
            clip_norm: settings.clip_norm as f32,
            warmup_steps: (steps / 20).clamp(1, 200),
            decay_steps: steps,
        },
        batch_rows: settings.batch_rows,
        shuffle: false,
        progressive: true,
        without_tae: entry.without_tae,
        seed: settings.seed,
        ..TrainerConfig::default()
    };
    let parameters = blueprint.init_parameters(survey.statistics.finish(), settings.seed);
    let trainer = ExpertTrainer::new(blueprint.clone(), parameters, trainer_config, config.device)?;
    let mut run = Run { trainer, blueprint, metrics: Keeper::new(1 << 20), schema };
    let mut progress =
        Progress::start(&format!("expert {}", entry.name), survey.rows * settings.epochs as u64);
    for epoch in 0..settings.epochs {
        run.trainer.set_pass(epoch > 0, epoch == 0);
        run.pass(&log, &surfaces, &mut progress)?;
    }
    let progressive = run.lines();
    let path = config.parameters(entry);
    let dir = path.parent().expect("a file in the expert's folder");
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut parameters = run.trainer.into_parameters();
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
        progressive,
    })
}

/// What a first look at the logs tells.
struct Survey {
    rows: u64,
    fm_version: String,
    statistics: FeatureStatistics,
}

impl Survey {
    fn of(log: &LogReader, surfaces: &[u16], entry: &ExpertEntry) -> Result<Self> {
        let mut statistics = FeatureStatistics::new(&log.schema.feature_columns());
        let (mut rows, mut fm_version) = (0, None::<String>);
        for logged in log.iter() {
            let logged = logged?;
            if !surfaces.contains(&logged.example.surface) {
                continue;
            }
            statistics.observe(&logged.example);
            rows += logged.example.targets.len() as u64;
            match &fm_version {
                None => fm_version = Some(logged.fm_version),
                Some(version) if *version != logged.fm_version => {
                    return Err(Error::Invalid(format!(
                        "the logs hold TAEs of FM {version} and of FM {}; materialise them again with one",
                        logged.fm_version
                    )));
                }
                Some(_) => {}
            }
        }
        match fm_version {
            Some(fm_version) => Ok(Self { rows, fm_version, statistics }),
            None => Err(Error::Invalid(format!(
                "expert {:?}: the logs hold no row of its surfaces; log more or give it others",
                entry.name
            ))),
        }
    }
}

struct Run {
    trainer: ExpertTrainer,
    blueprint: Arc<Blueprint>,
    /// By surface (the count of surfaces for all) and task.
    metrics: Keeper<(usize, usize)>,
    schema: Arc<Schema>,
}

impl Run {
    fn pass(&mut self, log: &LogReader, surfaces: &[u16], progress: &mut Progress) -> Result<()> {
        let (mut examples, mut tae, mut rows) = (Vec::new(), Vec::new(), 0);
        for logged in log.iter() {
            let Logged { example, tae: own, .. } = logged?;
            if example.targets.is_empty() || !surfaces.contains(&example.surface) {
                continue;
            }
            rows += example.targets.len();
            examples.push(example);
            tae.extend_from_slice(&own);
            if rows >= CHUNK_ROWS {
                self.chunk(&examples, &tae, progress)?;
                examples.clear();
                tae.clear();
                rows = 0;
            }
        }
        if rows > 0 {
            self.chunk(&examples, &tae, progress)?;
        }
        Ok(())
    }

    fn chunk(&mut self, examples: &[Example], tae: &[f32], progress: &mut Progress) -> Result<()> {
        let Run { trainer, blueprint, metrics, schema } = self;
        trainer.train(Chunk { examples, tae }, |report| {
            let rows: usize = report.examples.iter().map(|example| example.targets.len()).sum();
            observe(metrics, blueprint, schema.surfaces.len(), report);
            progress
                .advance(rows as u64, || format!("loss {:.4}", report.losses.iter().sum::<f64>()));
        })?;
        Ok(())
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
        self.metrics.summaries().map(line).collect()
    }
}

/// Keeps the predictions of a progressive batch.
fn observe(
    metrics: &mut Keeper<(usize, usize)>,
    blueprint: &Blueprint,
    all: usize,
    report: &BatchReport,
) {
    let rows =
        report.examples.iter().flat_map(|example| example.targets.iter().map(move |_| *example));
    for (row, example) in rows.enumerate() {
        for (task, predictions) in report.predictions.iter().enumerate() {
            let targets = &report.targets[task];
            let binary = blueprint.description.tasks[task].kind == TaskKind::Binary;
            if binary && targets.mask[row] {
                let scored = Scored {
                    user: example.user.id,
                    probability: predictions[row],
                    label: targets.labels[row] > 0.5,
                };
                metrics.push((usize::from(example.surface), task), scored);
                metrics.push((all, task), scored);
            }
        }
    }
}
