//! FM training: the data set's requests in time order through the trainer,
//! and the TAEs that it computed before learning into the logs.
//!
//! The logs so hold what a logging tier beside a streaming trainer would have
//! written: every TAE is older than the outcome it is stored with. Only served
//! items are in the stream, so only their TAEs are materialised.

use hypercast_fm::{
    example::Example,
    spec::{FmSpec, Label, TaskSpec},
    trainer::{self, FmTrainer},
};
use serde::Serialize;

use super::report::{Collector, Line, Rows};
use crate::{
    config::Config,
    dataset::{Dataset, timeline::Span},
    error::{Error, Result},
    features::replay::{Pretraining, PretrainingOptions, Replay, ReplayOptions},
    logs::{LogOptions, LogWriter},
    progress::Progress,
    schema::{BUILT_IN_IDS, FeatureKind, Schema, TaskKind, TaskRole, names},
};

/// The version of a freshly trained FM.
pub const FIRST_VERSION: &str = "1.0.0";

/// Consecutive history events that make one pre-training request.
pub const PRETRAINING_CHUNK: usize = 8;

/// What an FM training did.
#[derive(Debug, Clone, Serialize)]
pub struct FmReport {
    /// Requests learned from, those made of mere history included.
    pub requests: u64,
    /// Candidates learned from.
    pub rows: u64,
    /// Rows logged with their TAE.
    pub logged_rows: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Progressive metrics: each prediction made before learning from it.
    pub progressive: Vec<Line>,
}

/// What the FM is told of a schema; main tasks come first.
pub fn fm_spec(schema: &Schema) -> Result<FmSpec> {
    let mut tasks = schema.tasks.iter().collect::<Vec<_>>();
    tasks.sort_by_key(|task| task.role != TaskRole::Main);
    let tasks = tasks
        .into_iter()
        .map(|task| {
            let label = match task.kind {
                TaskKind::Binary => schema.action(&task.label).map(Label::Action),
                TaskKind::Regression => schema.value(&task.label).map(Label::Value),
            };
            let missing =
                || Error::Schema(format!("task {:?}: no label {:?}", task.name, task.label));
            Ok(TaskSpec {
                name: task.name.clone(),
                main: task.role == TaskRole::Main,
                label: label.ok_or_else(missing)?,
                surfaces: schema
                    .surfaces
                    .iter()
                    .map(|surface| task.surfaces.is_empty() || task.surfaces.contains(surface))
                    .collect(),
                weight: task.weight,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let spec = FmSpec {
        surfaces: schema.surfaces.clone(),
        actions: schema.actions.len(),
        values: schema.values.len(),
        item_ids: names(&schema.item_features, FeatureKind::Categorical).len(),
        item_dense: names(&schema.item_features, FeatureKind::Dense).len(),
        features: schema.feature_columns().len(),
        profile_ids: profile_ids(schema),
        tasks,
    };
    spec.validate()?;
    Ok(spec)
}

/// Where the user's and the request's categories stand among the id columns: after the built-in ones and the item's.
fn profile_ids(schema: &Schema) -> Vec<usize> {
    let count = |features| names(features, FeatureKind::Categorical).len();
    let first = BUILT_IN_IDS.len() + count(&schema.item_features);
    let width = count(&schema.user_features) + count(&schema.context_features);
    (first..first + width).collect()
}

/// Trains an FM on what a data set holds before `until_ms`, writes its checkpoint and its logs.
///
/// # Errors
/// A data set, configuration or device that cannot be used; a full disk.
pub fn train(dataset: &Dataset, config: &Config, until_ms: Option<i64>) -> Result<FmReport> {
    let spec = fm_spec(&dataset.schema)?;
    remove_dir(&config.paths.fm_work)?;
    let trainer = trainer::create(&config.paths.fm_work, &config.fm, &spec, config.device)?;
    let mut run = Run {
        trainer,
        collector: Collector::new(&spec),
        truth_order: truth_order(&spec, &dataset.schema),
        spec,
        batch_requests: config.fm.batch_requests,
        requests: 0,
        rows: 0,
    };
    let started = std::time::Instant::now();
    run.pretrain(dataset, config, until_ms)?;
    let logged_rows = run.stream(dataset, config, until_ms)?;
    run.trainer.checkpoint(&config.paths.fm, FIRST_VERSION)?;
    Ok(FmReport {
        requests: run.requests,
        rows: run.rows,
        logged_rows,
        seconds: started.elapsed().as_secs_f64(),
        progressive: run.collector.lines(),
    })
}

/// Where each task of the specification stands in `Target::truth`, which has the schema's order.
pub fn truth_order(spec: &FmSpec, schema: &Schema) -> Vec<usize> {
    spec.tasks.iter().map(|task| schema.task(&task.name).unwrap_or(usize::MAX)).collect()
}

struct Run {
    trainer: Box<dyn FmTrainer>,
    collector: Collector,
    truth_order: Vec<usize>,
    spec: FmSpec,
    batch_requests: usize,
    requests: u64,
    rows: u64,
}

impl Run {
    fn pretrain(
        &mut self,
        dataset: &Dataset,
        config: &Config,
        until_ms: Option<i64>,
    ) -> Result<()> {
        let options = PretrainingOptions {
            until_ms,
            history_len: config.fm.max_history,
            chunk: PRETRAINING_CHUNK,
            seed: config.fm.seed,
            features: config.features,
        };
        let examples = Pretraining::new(dataset, options)?;
        if examples.examples() == 0 {
            return Ok(());
        }
        let mut progress = Progress::start("FM on past histories", examples.examples() as u64);
        let mut batch = Vec::with_capacity(self.batch_requests);
        let mut seen = Collector::new(&self.spec);
        let mut examples = examples.peekable();
        while let Some(example) = examples.next() {
            batch.push(example);
            if batch.len() == self.batch_requests || examples.peek().is_none() {
                let count = batch.len() as u64;
                self.learn(&batch, Some(&mut seen), None)?;
                batch.clear();
                progress.advance(count, || format!("NE {}", seen.recent()));
            }
        }
        progress.finish("learned");
        Ok(())
    }

    fn stream(&mut self, dataset: &Dataset, config: &Config, until_ms: Option<i64>) -> Result<u64> {
        let total = count_requests(dataset, until_ms)?;
        let skip = (total as f64 * config.logs.skip_share) as u64;
        remove_dir(&config.paths.logs)?;
        let options = LogOptions {
            tae_dim: config.fm.tae_width(),
            history_len: config.logs.history_len,
            rows_per_file: config.logs.rows_per_file,
        };
        let mut log = LogWriter::create(&config.paths.logs, &dataset.schema, options)?;
        let replay = Replay::new(
            dataset,
            ReplayOptions {
                span: Span { from_ms: None, until_ms },
                history_len: config.fm.max_history,
                max_targets: config.fm.max_targets,
                features: config.features,
            },
        )?;
        let mut progress = Progress::start("FM on the stream", total);
        let mut batch = Vec::with_capacity(self.batch_requests);
        let (mut seen, mut logged) = (0, 0);
        let mut examples = replay.peekable();
        while let Some(example) = examples.next() {
            batch.push(example?);
            if batch.len() == self.batch_requests || examples.peek().is_none() {
                let log = (seen >= skip).then_some(&mut log);
                logged += self.learn(&batch, None, log)?;
                seen += batch.len() as u64;
                let count = batch.len() as u64;
                batch.clear();
                progress.advance(count, || format!("NE {}", self.collector.recent()));
            }
        }
        log.finish()?;
        progress.finish(&format!("learned; {logged} rows logged with their TAE"));
        Ok(logged)
    }

    /// Predicts, reports, logs and learns a batch; returns the rows logged.
    fn learn(
        &mut self,
        batch: &[Example],
        aside: Option<&mut Collector>,
        mut log: Option<&mut LogWriter>,
    ) -> Result<u64> {
        let references: Vec<&Example> = batch.iter().collect();
        let said = self.trainer.step(&references)?;
        let collector = aside.unwrap_or(&mut self.collector);
        let tasks = self.spec.tasks.len();
        let (mut row, mut logged) = (0, 0);
        for example in batch {
            let rows = example.targets.len();
            let cells = row * tasks..(row + rows) * tasks;
            let view = Rows {
                predictions: &said.predictions[cells.clone()],
                labels: &said.labels[cells.clone()],
                mask: &said.mask[cells],
            };
            collector.push(example, view, &self.truth_order);
            if let Some(log) = &mut log
                && rows > 0
            {
                let width = said.tae.len() * rows / (said.labels.len() / tasks) / rows;
                log.write(example, &said.tae[row * width..(row + rows) * width], FIRST_VERSION)?;
                logged += rows as u64;
            }
            row += rows;
        }
        self.requests += batch.len() as u64;
        self.rows += row as u64;
        Ok(logged)
    }
}

/// Requests of a data set before `until_ms`, mere history not counted.
fn count_requests(dataset: &Dataset, until_ms: Option<i64>) -> Result<u64> {
    let (mut count, mut last) = (0, None);
    for impression in dataset.impressions()? {
        let impression = impression?;
        if until_ms.is_some_and(|until_ms| impression.time_ms >= until_ms) {
            break;
        }
        if !impression.history_only && last.replace(impression.request) != Some(impression.request)
        {
            count += 1;
        }
    }
    Ok(count)
}

/// Removes the results of an earlier run of the same configuration.
pub(crate) fn remove_dir(dir: &std::path::Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir)(error)),
        _ => Ok(()),
    }
}
