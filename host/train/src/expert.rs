//! Expert training: the logs, and nothing else, through an expert's plugin and
//! network.
//!
//! It never sees the FM or the data set: TAEs, features and outcomes all come from the feature logs
//! (section 3.3.1). How rows become steps is `stream`'s, and what a step is, `expert::train`'s.
//! Parameters that serve are replaced if the plugin's `evaluate` and the operator's limits of NE
//! allow it; else those that were trained are left beside them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_fm::metrics::{MetricsWindow, ScoredPrediction, ScoredValue, TaskMetrics};
use serde::Serialize;

use super::{
    PassScores,
    eval_window::{EvalWindow, WindowPredictions, judge},
    materialise::{self, EmbeddingCheckpoint},
    report::ReportLine,
    stream::{ExpertSetup, LogView},
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, ExpertEntry};
use hypercast_core::{atomic_dir, progress::Progress};
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::logs::LogReader;
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, Engine, Parameters, SavedParameters,
    train::{BatchReport, ServingParameters},
    wasm::contract::{TaskKind, Verdict},
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
    /// How passes ended, if the plugin ends them itself.
    pub passes: Option<PassScores>,
    /// The parameter file, of what was trained or, if that is held, of what serves.
    pub parameters: PathBuf,
    /// Why it may not serve, if the plugin's `evaluate` or the operator's limits say so.
    pub held: Option<HeldExpert>,
    /// Seconds that it took.
    pub seconds: f64,
    /// Metrics of predictions of each row before it was learned from: in the first pass or, of rows
    /// that were held out, by the pass that is kept.
    pub progressive: Vec<ReportLine>,
}

/// Trained parameters that do not serve.
#[derive(Debug, Clone, Serialize)]
pub struct HeldExpert {
    /// The plugin's reason, how it failed, or the limit that was exceeded.
    pub reason: String,
    /// Where they are.
    pub candidate: PathBuf,
}

/// Where the TAEs come from.
#[derive(Debug, Clone, Copy)]
pub enum TrainingSource<'a> {
    /// The configured logs: those of an FM version, or of the only one that they hold.
    Logs(Option<&'a str>),
    /// A checkpoint, which computes them for the data set up to `timeline.until`.
    Checkpoint(&'a EmbeddingCheckpoint),
}

/// Trains the expert of `entry` and saves its parameters.
///
/// # Errors
/// Logs that are missing or hold no row of its surfaces, a checkpoint that learned from what it is
/// to embed, a plugin that is refused or faults.
pub fn train(
    config: &Config,
    entry: &ExpertEntry,
    engine: &Engine,
    source: TrainingSource<'_>,
) -> Result<ExpertReport> {
    let (logs, version) = match source {
        TrainingSource::Logs(version) => (config.paths.logs.clone(), version),
        TrainingSource::Checkpoint(checkpoint) => {
            let logs = config.paths.experts.join(&entry.name).join("past");
            let dataset = Dataset::open(&config.paths.dataset)?;
            materialise::past(&dataset, config, checkpoint, &logs)?;
            (logs, None)
        }
    };
    let report = train_on(config, entry, engine, &LogReader::open_for(&logs, version)?)?;
    if let TrainingSource::Checkpoint(_) = source {
        atomic_dir::remove(&logs)?;
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
    let view = LogView { log, surfaces, span: Span::default(), embedding: None, mask: None };
    let survey = view.survey()?.ok_or_else(|| {
        Error::invalid(format!(
            "expert {:?}: the logs hold no row of its surfaces; log more or give it others",
            entry.name
        ))
    })?;
    let mut stream = ExpertSetup::of(config, entry, engine).begin(&view, survey, |_| ())?;
    let rows = stream.passes.learned_rows;
    let blueprint = stream.blueprint.clone();
    let window = || EvalWindow::new(&blueprint.description.tasks, &log.schema);
    window().check_limits(&entry.ne_limits)?;
    let path = config.parameters(entry);
    let serving = serving(&path, &blueprint);
    let serving_until_ms = serving.as_ref().map(|serving| serving.learned_until_ms);
    if let Some(serving) = serving {
        stream.trainer.compare_with(serving);
    }
    let mut metrics = TrainingMetrics {
        blueprint: blueprint.clone(),
        kept: MetricsWindow::new(1 << 20),
        schema: log.schema.clone(),
        all: window(),
        new: window(),
        serving_until_ms,
    };
    let mut progress = Progress::start(&format!("expert {}", entry.name), stream.passes.rows());
    let passes = stream.learn_past(&view, |report| {
        let rows: usize = report.examples.iter().map(|example| example.targets.len()).sum();
        metrics.observe(report);
        progress.advance(rows as u64, || format!("loss {:.4}", report.losses.iter().sum::<f64>()));
    })?;
    let dir = path.parent().expect("a file in the expert's folder");
    atomic_dir::create(dir)?;
    let judged = stream.trainer.judge(&metrics.measured().evaluation());
    let mut parameters = stream.trainer.into_parameters();
    parameters.provenance.trained_rows = rows;
    let replaces = serving_until_ms.is_some();
    let measured = metrics.measured();
    let verdict = judge(judged, measured, &entry.ne_limits, replaces);
    let held = save(&parameters, &path, verdict)?;
    progress.finish(&format!("trained on {rows} rows"));
    Ok(ExpertReport {
        name: entry.name.clone(),
        plugin: format!(
            "{} {}",
            parameters.provenance.plugin, parameters.provenance.plugin_version
        ),
        rows,
        passes,
        parameters: path,
        held,
        seconds: started.elapsed().as_secs_f64(),
        progressive: metrics.lines(),
    })
}

/// What serves now, if it is of this network and FM, and it is known what it has learned from.
fn serving(path: &Path, blueprint: &Blueprint) -> Option<ServingParameters> {
    let parameters = blueprint.restore(SavedParameters::read(path).ok()?).ok()?;
    let learned_until_ms = parameters.provenance.trained_until_ms;
    (learned_until_ms > 0).then_some(ServingParameters { parameters, learned_until_ms })
}

/// Replaces what serves, or leaves the parameters beside it.
fn save(parameters: &Parameters, path: &Path, verdict: Verdict) -> Result<Option<HeldExpert>> {
    let candidate = path.with_file_name("candidate.safetensors");
    match verdict {
        Verdict::Publish => {
            parameters.save(path)?;
            Error::found(&candidate, std::fs::remove_file(&candidate))?;
            Ok(None)
        }
        Verdict::Hold(reason) | Verdict::RollBack(reason) => {
            parameters.save(&candidate)?;
            Ok(Some(HeldExpert { reason, candidate }))
        }
    }
}

/// Progressive metrics, as the plugin labels its tasks.
struct TrainingMetrics {
    blueprint: Arc<Blueprint>,
    /// By surface (the count of surfaces for all) and task.
    kept: MetricsWindow<(usize, usize)>,
    schema: Arc<Schema>,
    /// Of all rows.
    all: EvalWindow,
    /// Of those that what serves has not learned from, which alone compare the two.
    new: EvalWindow,
    /// What serves has learned from requests up to this time.
    serving_until_ms: Option<i64>,
}

impl TrainingMetrics {
    /// For the plugin's `evaluate`.
    fn measured(&self) -> &EvalWindow {
        if self.new.rows.is_empty() { &self.all } else { &self.new }
    }

    /// Keeps the predictions of a progressive batch.
    fn observe(&mut self, report: &BatchReport<'_>) {
        if report.predictions.is_empty() {
            return;
        }
        let said = |serving| WindowPredictions {
            candidate: &report.predictions,
            serving,
            targets: report.targets,
        };
        let examples = || report.examples.iter().copied();
        self.all.push(examples(), said(&[]), |_| true);
        if let Some(until_ms) = self.serving_until_ms.filter(|_| !report.serving.is_empty()) {
            self.new.push(examples(), said(&report.serving), |own| own.time_ms > until_ms);
        }
        let all = self.schema.surfaces.len();
        let rows = examples().flat_map(|example| example.targets.iter().map(move |_| example));
        for (row, example) in rows.enumerate() {
            for (task, predictions) in report.predictions.iter().enumerate() {
                let targets = &report.targets[task];
                if !targets.mask[row] {
                    continue;
                }
                let (prediction, label) = (predictions[row], targets.labels[row]);
                for surface in [usize::from(example.surface), all] {
                    match self.blueprint.description.tasks[task].kind {
                        TaskKind::Binary => {
                            let (user, label) = (example.user.id, label > 0.5);
                            let scored = ScoredPrediction { user, probability: prediction, label };
                            self.kept.push((surface, task), scored);
                        }
                        TaskKind::Regression => {
                            let scored = ScoredValue { prediction, label };
                            self.kept.push_value((surface, task), scored);
                        }
                    }
                }
            }
        }
    }

    fn lines(&self) -> Vec<ReportLine> {
        let (surfaces, tasks) = (&self.schema.surfaces, &self.blueprint.description.tasks);
        let line = |(&(surface, task), summary): (&(usize, usize), TaskMetrics)| {
            ReportLine::of(surfaces, surface, &tasks[task].name, summary, None)
        };
        self.kept.summaries().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ALL;
    use hypercast_core::prerequisite::{hostile, plugins};
    use hypercast_data::features::replay::{Replay, ReplayOptions};
    use hypercast_data::logs::{LogVersion, LogWriter};
    use hypercast_data::schema::{CoreColumns, Feature, FeatureKind, OwnedEntries};
    use hypercast_data::simulate;
    use hypercast_fm::example::{Example, Item, Target};
    use hypercast_fm::inference::FmOutput;
    use hypercast_fm::metrics::binary_metrics;
    use hypercast_fm::spec::FmConfig;
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    /// A configuration, and a log of the first requests of a world, of which the FM predicts that
    /// anything may happen or nothing.
    fn logged(dir: &Path, requests: usize) -> Config {
        logged_with(dir, requests, &[0.5])
    }

    fn logged_with(dir: &Path, requests: usize, prediction: &[f32]) -> Config {
        let into = dir.join("world");
        let options = simulate::SimulateOptions {
            into,
            users: 20,
            items: 30,
            requests: 200,
            surfaces: 2,
            seed: 3,
        };
        simulate::simulate(&options).unwrap();
        let dataset = Dataset::open(&options.into).unwrap();
        let mut config = Config::default();
        config.paths.logs = dir.join("logs");
        config.paths.experts = dir.join("experts");
        config.paths.state = dir.join("state");
        config.expert_training.epochs = 1;
        config.expert_training.batch_rows = 64;
        let replay = ReplayOptions {
            span: Span::default(),
            history_len: 32,
            max_targets: 16,
            features: config.features,
        };
        let _ = std::fs::remove_dir_all(&config.paths.logs);
        let (options, versions) = (config.logs.options(), vec![LogVersion::new("1.0.0", 2)]);
        let mut writer =
            LogWriter::create(&config.paths.logs, &dataset.schema, options, versions).unwrap();
        for example in Replay::new(&dataset, replay).unwrap().take(requests) {
            let example = example.unwrap();
            let rows = example.targets.len();
            let main = prediction.repeat(dataset.schema.main_tasks().count() * rows);
            let said = FmOutput { tae: vec![0.5; 2 * rows], main };
            writer.write_batch(std::slice::from_ref(&example), &[said], |_| true).unwrap();
        }
        writer.finish().unwrap();
        config
    }

    fn entry(plugin: &Path) -> ExpertEntry {
        toml::from_str(&format!("name = \"all\"\nplugin = {plugin:?}")).unwrap()
    }

    /// Each item of `example` made new, with a vector whose first number tells whether it is
    /// clicked.
    fn fresh(example: &mut Example, click: usize, random: &mut SmallRng) {
        for target in &mut example.targets {
            let id = random.random();
            let content: [f32; 4] = std::array::from_fn(|_| random.random_range(-0.5..0.5));
            let chance = if content[0] > 0.0 { 0.9 } else { 0.1 };
            target.ids[1] = id;
            target.item = Arc::new(Item { id, content: content.into(), ..(*target.item).clone() });
            let clicked = u64::from(random.random_bool(chance)) << click;
            target.outcome.actions = target.outcome.actions & !(1 << click) | clicked;
            target.outcome.known |= 1 << click;
        }
    }

    #[test]
    fn an_expert_knows_a_fresh_item_by_its_content_vector() {
        let Some(plugin) = hostile("content vectors", "content_vector") else { return };
        let dir = tempfile::tempdir().unwrap();
        let mut config = logged(dir.path(), 200);
        config.expert_training.learning_rate = 0.02;
        let log = LogReader::open(&config.paths.logs).unwrap();
        let click = log.schema.actions.iter().position(|action| action == "click").unwrap();
        let mut random = SmallRng::seed_from_u64(5);
        let examples: Vec<Example> = log.iter().map(|row| row.unwrap().example).collect();
        config.paths.logs = dir.path().join("fresh");
        let (options, versions) = (config.logs.options(), vec![LogVersion::new("1.0.0", 2)]);
        let mut writer =
            LogWriter::create(&config.paths.logs, &log.schema, options, versions).unwrap();
        for example in std::iter::repeat_n(&examples, 5).flatten() {
            let mut example = example.clone();
            fresh(&mut example, click, &mut random);
            let tae = vec![0.5; 2 * example.targets.len()];
            let said = FmOutput { tae, main: Vec::new() };
            writer.write_batch(&[example], &[said], |_| true).unwrap();
        }
        writer.finish().unwrap();
        let ne = ne_of_clicks(&config, &plugin);
        // Without the vector it is 1; who knows it from the start has 0.47.
        assert!(ne < 0.8, "NE {ne:.3}");
    }

    /// The NE of clicks over a log, each predicted before it was learned.
    fn ne_of_clicks(config: &Config, plugin: &Path) -> f64 {
        let guests = Engine::new(config.guests()).unwrap();
        let report = train(config, &entry(plugin), &guests, TrainingSource::Logs(None)).unwrap();
        let clicks = report.progressive.iter().find(|line| line.task == "click").unwrap();
        let ne = clicks.metrics.ne.unwrap();
        println!("NE of clicks {ne:.3} over {} rows, each before it was learned", clicks.metrics.n);
        ne
    }

    /// The schema of a log whose surface `search` has a feature of its own.
    fn with_words(schema: &Schema) -> Schema {
        let mut schema = schema.clone();
        schema.context_features.push(Feature::new("words", FeatureKind::Dense));
        let context_features = ["words".to_owned()].into();
        let own = OwnedEntries { context_features, ..OwnedEntries::default() };
        schema.owned.insert("search".into(), own);
        schema
    }

    #[test]
    fn a_feature_of_the_surface_helps_its_expert_and_is_not_shown_to_the_fm() {
        let Some(plugin) = hostile("features of a surface", "search_team") else { return };
        let dir = tempfile::tempdir().unwrap();
        let mut config = logged(dir.path(), 200);
        config.expert_training.learning_rate = 0.1;
        let log = LogReader::open(&config.paths.logs).unwrap();
        let click = log.schema.action("click").unwrap();
        let schema = with_words(&log.schema);
        let place = schema.feature_columns().iter().position(|own| own == "words").unwrap();
        let core = CoreColumns::new(&schema);
        let mut random = SmallRng::seed_from_u64(5);
        let examples: Vec<Example> = log.iter().map(|row| row.unwrap().example).collect();
        config.paths.logs = dir.path().join("own");
        let (options, versions) = (config.logs.options(), vec![LogVersion::new("1.0.0", 2)]);
        let mut writer = LogWriter::create(&config.paths.logs, &schema, options, versions).unwrap();
        for example in std::iter::repeat_n(&examples, 8).flatten().filter(|own| own.surface == 1) {
            let mut own = example.clone();
            for target in &mut own.targets {
                let words: f32 = random.random_range(-1.0..1.0);
                let clicked = random.random_bool(if words > 0.0 { 0.9 } else { 0.1 });
                target.features.insert(place, words);
                target.outcome.known |= 1 << click;
                target.outcome.actions &= !(1 << click);
                target.outcome.actions |= u64::from(clicked) << click;
            }
            let columns = |example: &Example| {
                let of = |target: &Target| (target.ids.clone(), format!("{:?}", target.features));
                example.targets.iter().map(of).collect::<Vec<_>>()
            };
            assert_eq!(columns(&core.example(&own)), columns(example));
            let tae = vec![0.5; 2 * own.targets.len()];
            let said = FmOutput { tae, main: Vec::new() };
            writer.write_batch(&[own], &[said], |_| true).unwrap();
        }
        writer.finish().unwrap();
        let ne = ne_of_clicks(&config, &plugin);
        // Without the feature it is 1; who knows it from the start has 0.47.
        assert!(ne < 0.85, "NE {ne:.3}");
    }

    #[test]
    fn an_expert_that_begins_at_the_fm_is_no_worse_than_it() {
        let Some(plugin) = hostile("the FM's predictions", "fm_residual") else { return };
        let dir = tempfile::tempdir().unwrap();
        let mut config = logged_with(dir.path(), 1, &[]);
        let why = train(
            &config,
            &entry(&plugin),
            &Engine::new(config.guests()).unwrap(),
            TrainingSource::Logs(None),
        );
        let why = why.unwrap_err().to_string();
        assert!(why.contains("make the logs anew"), "{why}");

        let dataset = Dataset::open(&dir.path().join("world")).unwrap();
        let fm = FmConfig { dim: 16, qk_dim: 8, v_dim: 8, embedding_dim: 8, ..FmConfig::default() };
        config.fm = FmConfig { max_history: 8, batch_requests: 4, learning_rate: 5e-3, ..fm };
        config.paths.fm_work = dir.path().join("work");
        config.paths.fm = dir.path().join("fm-1.0");
        crate::fm::train(&dataset, &config, None).unwrap();
        let log = LogReader::open(&config.paths.logs).unwrap();
        let click = log.schema.tasks.iter().position(|task| task.name == "click").unwrap();
        let mut of_fm = Vec::new();
        for row in log.iter() {
            let row = row.unwrap();
            let said = row.predictions.iter().step_by(log.schema.main_tasks().count());
            for (target, &probability) in row.example.targets.iter().zip(said) {
                let label = log.schema.label(click, row.example.surface, &target.outcome);
                if let Some(label) = label.map(|label| label > 0.5) {
                    let user = row.example.user.id;
                    of_fm.push(ScoredPrediction { user, probability, label });
                }
            }
        }
        let fm = binary_metrics(&of_fm).ne.unwrap();
        let guests = Engine::new(config.guests()).unwrap();
        let report = train(&config, &entry(&plugin), &guests, TrainingSource::Logs(None)).unwrap();
        let clicks = report.progressive.iter();
        let clicks = clicks.filter(|line| line.surface == ALL).find(|line| line.task == "click");
        let clicks = clicks.unwrap();
        let own = clicks.metrics.ne.unwrap();
        println!("NE of clicks {own:.4}, {fm:.4} of the FM, each before it was learned");
        assert!(own < fm + 2e-3, "{own} of the expert, {fm} of the FM");
    }

    #[test]
    fn what_is_held_leaves_what_serves_as_it_is() {
        let Some(good) = plugins("held parameters") else { return };
        let Some(never) = hostile("held parameters", "long_verdict") else { return };
        let dir = tempfile::tempdir().unwrap();
        let config = logged(dir.path(), 60);
        let guests = Engine::new(config.guests()).unwrap();
        let trained = |plugin: &Path| {
            train(&config, &entry(plugin), &guests, TrainingSource::Logs(None)).unwrap()
        };
        let report = trained(&good.join("mlp-fusion.wasm"));
        assert!(report.held.is_none());
        let serving = std::fs::read(&report.parameters).unwrap();
        let report = trained(&never);
        let held = report.held.expect("it never lets anything serve");
        assert!(held.reason.starts_with("long_verdict"), "{}", held.reason);
        assert_eq!(std::fs::read(&report.parameters).unwrap(), serving);
        let candidate = SavedParameters::read(&held.candidate).unwrap();
        assert_eq!(candidate.provenance.plugin, "long_verdict");
        assert!(candidate.provenance.trained_until_ms > 0);
        // What is let through takes the place of both.
        trained(&good.join("mlp-fusion.wasm"));
        assert!(!held.candidate.exists());
    }

    #[test]
    fn what_serves_is_compared_on_rows_that_it_has_not_learned_from() {
        let Some(plugin) = hostile("comparison", "takes_back") else { return };
        let dir = tempfile::tempdir().unwrap();
        let config = logged(dir.path(), 60);
        let guests = Engine::new(config.guests()).unwrap();
        let trained = |config: &Config| {
            train(config, &entry(&plugin), &guests, TrainingSource::Logs(None)).unwrap()
        };
        // It refuses whatever is compared with what serves.
        assert!(trained(&config).held.is_none(), "nothing serves yet");
        assert!(trained(&config).held.is_none(), "what serves has learned from all of the logs");
        let config = logged(dir.path(), 120);
        assert!(trained(&config).held.is_some(), "half of the logs are new to both");
    }
}
