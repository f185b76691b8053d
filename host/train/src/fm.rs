//! FM training: the data set's requests in time order through the trainer,
//! and the TAEs that it computed before learning into the logs.
//!
//! The logs so hold what a logging tier beside a streaming trainer would have
//! written: every TAE is older than the outcome it is stored with. Only served
//! items are in the stream, so only their TAEs are materialised. A run that was
//! saved (`saved`) can be resumed as if it had not been interrupted.
//!
//! Its checkpoint is an operator's own act, so no gate compares it with what serves. But weights
//! that are not finite become no checkpoint, and what predicted its newest rows no better than the
//! base rate takes no other checkpoint's place: it is left beside it.

use std::path::PathBuf;

use hypercast_fm::{
    checkpoint::FmManifest,
    example::Example,
    spec::FmSpec,
    trainer::{self, FmTrainer},
};
use serde::Serialize;

use super::eval_window::EvalWindow;
use super::report::{ProgressiveCollector, ReportLine};
use super::run_state::{Over, RunPhase, RunPosition};
use crate::error::Result;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Pretraining, Replay};
use hypercast_data::logs::{self, LogVersion, LogWriter};
pub use hypercast_data::schema::fm_spec;
use hypercast_data::schema::{CoreColumns, MainTasks, Schema, trainer_spec};

/// The version of a freshly trained FM.
pub const FIRST_VERSION: &str = "1.0.0";

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
    pub progressive: Vec<ReportLine>,
    /// The checkpoint: `paths.fm`, or a folder beside it if what is there was left as it is.
    pub checkpoint: PathBuf,
    /// Why it should not serve, if its newest predictions say so. A first checkpoint takes no
    /// other's place, and is written all the same.
    pub doubt: Option<String>,
}

/// What the FM's trainer is told of a data set: its schema and the width of its content vectors.
pub fn dataset_spec(dataset: &Dataset) -> Result<FmSpec> {
    Ok(FmSpec { content: dataset.content, ..trainer_spec(&dataset.schema)? })
}

/// Trains an FM on what a data set holds before `until_ms`, writes its checkpoint and its logs.
///
/// # Errors
/// A data set, configuration or device that cannot be used; a full disk.
pub fn train(dataset: &Dataset, config: &Config, until_ms: Option<i64>) -> Result<FmReport> {
    let spec = dataset_spec(dataset)?;
    let _owner = DirLock::acquire(&config.paths.fm_work)?;
    // What trainers that follow the stream keep beside it stays.
    for own in ["store", "saved", "saved.old", "saved.partial", "trained"] {
        atomic_dir::remove(&config.paths.fm_work.join(own))?;
    }
    let trainer = trainer::create(&config.paths.fm_work, &config.fm, &spec, config.device)?;
    let collector = ProgressiveCollector::new(&spec);
    let over = Over { dataset, config, until_ms };
    FmRun::new(trainer, collector, spec, RunPosition::default(), over).complete(over)
}

/// Goes on with a training that was interrupted after it had been saved (`fm.save_every_requests`):
/// metrics, logs and checkpoint are those of a training that was never interrupted.
///
/// # Errors
/// No saved run, or one of another data set or configuration; what [`train`] can fail at.
pub fn resume(dataset: &Dataset, config: &Config, until_ms: Option<i64>) -> Result<FmReport> {
    let spec = dataset_spec(dataset)?;
    let _owner = DirLock::acquire(&config.paths.fm_work)?;
    let over = Over { dataset, config, until_ms };
    let (place, collector) = over.load(&spec)?;
    let (saved, work) = (&over.trainer_dir(), &config.paths.fm_work);
    // What it measured so far is by the numbers of its own tasks.
    let from = trainer::ResumePaths { saved, work, growths: &[] };
    let trainer = trainer::resume(from, &config.fm, &spec, config.device)?;
    if place.phase == RunPhase::Stream {
        logs::truncate(&config.paths.logs, place.log_files)?;
    }
    FmRun::new(trainer, collector, spec, place, over).complete(over)
}

/// Where a finished training leaves its trainer, for one that goes on with the stream.
pub fn trained_dir(config: &Config) -> PathBuf {
    config.paths.fm_work.join("trained")
}

/// Where a finished training leaves a checkpoint that must not take the place of what is there.
fn candidate_dir(config: &Config) -> PathBuf {
    let mut name = config.paths.fm.file_name().unwrap_or_default().to_owned();
    name.push(".candidate");
    config.paths.fm.with_file_name(name)
}

/// Where each task of the specification stands in `Target::truth`, which has the schema's order.
pub fn truth_order(spec: &FmSpec, schema: &Schema) -> Vec<usize> {
    spec.tasks.iter().map(|task| schema.task(&task.name).unwrap_or(usize::MAX)).collect()
}

struct FmRun {
    trainer: Box<dyn FmTrainer>,
    collector: ProgressiveCollector,
    /// The newest rows of the stream; kept where the operator has a gate.
    newest: EvalWindow,
    truth_order: Vec<usize>,
    spec: FmSpec,
    core: CoreColumns,
    main_tasks: MainTasks,
    place: RunPosition,
    /// Examples of the present phase before it repeats them.
    first_pass: u64,
    /// Requests since the run was saved.
    unsaved: u64,
}

/// The logs of a phase, without its first requests.
struct PhaseLog<'a> {
    writer: &'a mut LogWriter,
    skip: u64,
}

impl FmRun {
    fn new(
        trainer: Box<dyn FmTrainer>,
        collector: ProgressiveCollector,
        spec: FmSpec,
        place: RunPosition,
        over: Over<'_>,
    ) -> Self {
        let truth_order = truth_order(&spec, &over.dataset.schema);
        let newest = EvalWindow::of_fm(&spec, over.config.fm_gate.rows);
        Self {
            trainer,
            collector,
            newest,
            truth_order,
            spec,
            core: CoreColumns::for_trainer(&over.dataset.schema),
            main_tasks: MainTasks::new(&over.dataset.schema),
            place,
            first_pass: u64::MAX,
            unsaved: 0,
        }
    }

    fn complete(mut self, over: Over<'_>) -> Result<FmReport> {
        let started = std::time::Instant::now();
        if self.place.phase == RunPhase::Pretraining {
            self.pretrain(over)?;
            self.place = RunPosition { phase: RunPhase::Stream, done: 0, ..self.place };
        }
        self.stream(over)?;
        let (current, beside) = (&over.config.paths.fm, candidate_dir(over.config));
        let doubt = self.newest.above_base_rate();
        let is_held = doubt.is_some() && FmManifest::read(current).is_ok();
        let checkpoint = if is_held { &beside } else { current };
        self.trainer.checkpoint(checkpoint, FIRST_VERSION)?;
        if !is_held {
            atomic_dir::remove(&beside)?;
        }
        self.trainer.save(&trained_dir(over.config))?;
        Ok(FmReport {
            requests: self.place.requests,
            rows: self.place.rows,
            logged_rows: self.place.logged_rows,
            seconds: started.elapsed().as_secs_f64(),
            progressive: self.collector.lines(),
            checkpoint: checkpoint.clone(),
            doubt,
        })
    }

    fn pretrain(&mut self, over: Over<'_>) -> Result<()> {
        let Over { dataset, config, until_ms } = over;
        let examples = Pretraining::new(dataset, config.pretraining(until_ms))?;
        if examples.examples() == 0 {
            return Ok(());
        }
        let progress = Progress::start("FM on past histories", examples.examples() as u64);
        self.first_pass = examples.examples() as u64 / config.fm.pretraining_passes as u64;
        let seen = ProgressiveCollector::new(&self.spec);
        let examples = examples.skip(self.place.done as usize).map(Ok);
        self.learn_all(over, examples, progress, Some(seen), None)?.finish("learned");
        self.first_pass = u64::MAX;
        Ok(())
    }

    fn stream(&mut self, over: Over<'_>) -> Result<()> {
        let Over { dataset, config, until_ms } = over;
        let total = dataset.requests(until_ms, |_| true)?;
        let skip = (total as f64 * config.logs.skip_share) as u64;
        if self.place.done == 0 {
            atomic_dir::remove(&config.paths.logs)?;
        }
        let versions = vec![LogVersion::new(FIRST_VERSION, config.fm.tae_width())];
        let mut log = log_writer(dataset, config, versions)?;
        let progress = Progress::start("FM on the stream", total);
        let requests = config.replay(Span { from_ms: None, until_ms });
        let examples = Replay::new(dataset, requests)?.skipping(self.place.done);
        let phase_log = PhaseLog { writer: &mut log, skip };
        let progress = self.learn_all(over, examples, progress, None, Some(phase_log))?;
        log.finish()?;
        let logged = self.place.logged_rows;
        progress.finish(&format!("learned; {logged} rows logged with their TAE"));
        Ok(())
    }

    /// Learns from all examples in batches, and saves the run from time to time.
    fn learn_all(
        &mut self,
        over: Over<'_>,
        examples: impl Iterator<Item = hypercast_data::Result<Example>>,
        mut progress: Progress,
        mut aside: Option<ProgressiveCollector>,
        mut log: Option<PhaseLog<'_>>,
    ) -> Result<Progress> {
        let settings = &over.config.fm;
        progress.advance(self.place.done, String::new);
        let mut batch = Vec::with_capacity(settings.batch_requests);
        let mut examples = examples.peekable();
        while let Some(example) = examples.next() {
            batch.push(example?);
            if batch.len() < settings.batch_requests && examples.peek().is_some() {
                continue;
            }
            let to_log = log.as_mut().filter(|log| self.place.done >= log.skip);
            self.learn(&batch, aside.as_mut(), to_log.map(|log| &mut *log.writer))?;
            let collector = aside.as_ref().unwrap_or(&self.collector);
            progress.advance(batch.len() as u64, || collector.recent());
            batch.clear();
            if settings.save_every_requests > 0 && self.unsaved >= settings.save_every_requests {
                if let Some(log) = &mut log {
                    self.place.log_files = log.writer.cut()?;
                }
                self.unsaved = 0;
                over.save(self.place, &mut *self.trainer, &self.collector)?;
            }
        }
        Ok(progress)
    }

    /// Predicts, reports, logs and learns a batch.
    fn learn(
        &mut self,
        batch: &[Example],
        aside: Option<&mut ProgressiveCollector>,
        log: Option<&mut LogWriter>,
    ) -> Result<()> {
        let core = self.core.examples(batch);
        let references: Vec<&Example> = core.iter().map(|example| &**example).collect();
        self.trainer.set_repeats(self.place.done >= self.first_pass);
        let said = self.trainer.step(&references)?;
        let harmful: Vec<u64> = said.set_aside.iter().map(|&at| batch[at].request).collect();
        for request in &harmful {
            tracing::warn!(request, "a request would harm the model; it is not learned from");
        }
        if aside.is_none() {
            self.newest.push_step(batch, &said);
        }
        aside.unwrap_or(&mut self.collector).push(batch, &said, &self.truth_order);
        if let Some(log) = log {
            let served = self.main_tasks.output(&self.spec, said.served(&self.spec));
            let keep = |example: &Example| !harmful.contains(&example.request);
            self.place.logged_rows += log.write_batch(batch, &[served], keep)?;
        }
        self.place.done += batch.len() as u64;
        self.place.requests += batch.len() as u64;
        self.place.rows += batch.iter().map(|example| example.targets.len() as u64).sum::<u64>();
        self.unsaved += batch.len() as u64;
        Ok(())
    }
}

/// A writer of the configured logs with the TAEs of these versions.
///
/// # Errors
/// Logs of another schema, or a full disk.
pub fn log_writer(
    dataset: &Dataset,
    config: &Config,
    versions: Vec<LogVersion>,
) -> Result<LogWriter> {
    let (logs, options) = (&config.paths.logs, config.logs.options());
    Ok(LogWriter::create(logs, &dataset.schema, options, versions)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_data::simulate;
    use hypercast_fm::spec::FmConfig;

    #[test]
    fn what_is_no_better_than_the_base_rate_takes_no_checkpoints_place() {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("world");
        let options = simulate::SimulateOptions {
            into,
            users: 20,
            items: 30,
            requests: 300,
            surfaces: 2,
            seed: 3,
        };
        simulate::simulate(&options).unwrap();
        let dataset = Dataset::open(&options.into).unwrap();
        let fm = FmConfig { dim: 16, qk_dim: 8, v_dim: 8, embedding_dim: 8, ..FmConfig::default() };
        let mut config = Config { fm: FmConfig { max_history: 8, ..fm }, ..Config::default() };
        config.paths.fm_work = dir.path().join("work");
        config.paths.logs = dir.path().join("logs");
        config.paths.fm = dir.path().join("fm-1.0");
        let weights = |dir: &PathBuf| std::fs::read(dir.join("model.safetensors")).unwrap();
        // So far that it is sure of the wrong things.
        let spoilt = FmConfig { learning_rate: 3.0, ..config.fm.clone() };
        let good = std::mem::replace(&mut config.fm, spoilt);
        let first = train(&dataset, &config, None).unwrap();
        assert_eq!(first.checkpoint, config.paths.fm, "nothing was there");
        let doubt = first.doubt.expect("it is told all the same");
        assert!(doubt.contains("no better than that of the base rate"), "{doubt}");
        let served = weights(&config.paths.fm);
        config.fm.seed += 1;
        let held = train(&dataset, &config, None).unwrap();
        assert_eq!(held.checkpoint, dir.path().join("fm-1.0.candidate"));
        assert!(held.doubt.is_some() && weights(&held.checkpoint) != served);
        assert!(weights(&config.paths.fm) == served);
        config.fm = FmConfig { batch_requests: 4, learning_rate: 5e-3, ..good };
        let better = train(&dataset, &config, None).unwrap();
        assert_eq!((better.doubt, &better.checkpoint), (None, &config.paths.fm));
        assert!(weights(&config.paths.fm) != served && !held.checkpoint.exists());
    }
}
