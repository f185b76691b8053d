//! An expert that learns from logged rows as they come: passes over a past, then
//! predict-then-train behind a stream.
//!
//! `train expert`, evaluations and experiments all learn through this. It reads
//! the logs alone; what is measured is up to the caller, who sees predictions
//! before they are learned from.

use std::{ops::Range, path::Path, sync::Arc};

use hypercast_fm::example::Example;

use super::chunk_rows::ChunkRows;
use super::early_stop::{EarlyStop, PassScores, learned_rows};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, ExpertEntry, ExpertTraining};
use hypercast_core::disk;
use hypercast_data::dataset::{content, timeline::Span};
use hypercast_data::logs::{LogReader, LoggedRequest};
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, Chunk, Engine, ExpertPredictions, ExpertTrainer, FeatureStatistics, LoadOptions,
    Parameters, Plugin, Provenance, TrainerConfig,
    train::{BatchReport, OptimizerConfig, RefusedRequest, SavedTrainer},
    wasm::contract::VectorWidths,
};

/// Rows that are held, hooked and shuffled together.
const CHUNK_ROWS: usize = 65_536;

/// Learning rate of embedding tables, relative to that of dense weights.
const TABLE_RATE: f64 = 10.0;

/// Which logged rows an expert sees, and which part of their embeddings.
#[derive(Clone)]
pub struct LogView<'a> {
    /// The feature logs that are read.
    pub log: &'a LogReader,
    /// Indices of the surfaces whose requests are read.
    pub surfaces: Vec<u16>,
    /// Requests of this stretch of time alone.
    pub span: Span,
    /// Columns of the logged embeddings, joined in this order; none for the whole.
    pub embedding: Option<Vec<Range<usize>>>,
    /// Hides parts of what was logged from the expert; the widths of its columns stay.
    pub mask: Option<&'a dyn Fn(&mut LoggedRequest)>,
}

impl LogView<'_> {
    /// Width of the embedding that it gives.
    pub fn tae_dim(&self) -> usize {
        match &self.embedding {
            Some(parts) => parts.iter().map(Range::len).sum(),
            None => self.log.tae_dim,
        }
    }

    /// The rows, in the order they were written.
    pub fn rows(&self) -> impl Iterator<Item = Result<LoggedRequest>> + '_ {
        self.log.iter().filter_map(|logged| match logged {
            Ok(logged) if self.holds(&logged.example) => Some(Ok(self.cut(logged))),
            Ok(_) => None,
            Err(error) => Some(Err(error.into())),
        })
    }

    /// A first look at the rows; none if there are none.
    ///
    /// # Errors
    /// Logs that cannot be read.
    pub fn survey(&self) -> Result<Option<Survey>> {
        let mut statistics = FeatureStatistics::new(&self.log.schema.feature_columns());
        let (mut rows, mut newest_rows) = (0, 0);
        for logged in self.rows() {
            let logged = logged?;
            statistics.observe(&logged.example);
            newest_rows = logged.example.targets.len() as u64;
            rows += newest_rows;
        }
        let fm_version = self.log.fm_version.clone();
        Ok((rows > 0).then_some(Survey { rows, newest_rows, fm_version, statistics }))
    }

    fn holds(&self, example: &Example) -> bool {
        !example.targets.is_empty()
            && self.surfaces.contains(&example.surface)
            && self.span.from_ms.is_none_or(|from_ms| example.time_ms >= from_ms)
            && self.span.until_ms.is_none_or(|until_ms| example.time_ms < until_ms)
    }

    fn cut(&self, mut logged: LoggedRequest) -> LoggedRequest {
        if let Some(parts) = &self.embedding {
            let rows = logged.tae.chunks_exact(self.log.tae_dim.max(1));
            let part = |row: &[f32]| parts.iter().flat_map(|at| row[at.clone()].to_vec()).collect();
            logged.tae = rows.flat_map(|row| -> Vec<f32> { part(row) }).collect();
        }
        if let Some(mask) = self.mask {
            mask(&mut logged);
        }
        logged
    }
}

/// What a first look at the logs tells.
pub struct Survey {
    /// Targets of all requests in the view.
    pub rows: u64,
    /// Those of the newest request.
    pub newest_rows: u64,
    /// The FM that made the embeddings.
    pub fm_version: String,
    /// Of the numeric features.
    pub statistics: FeatureStatistics,
}

/// An expert to train: its plugin, and how it is loaded and trained.
#[derive(Clone, Copy)]
pub struct ExpertSetup<'a> {
    /// Limits of plugins, rates, passes, batches, seed and device.
    pub config: &'a Config,
    /// The Wasm engine in which hooks run.
    pub engine: &'a Engine,
    /// The file of the plugin's component.
    pub plugin: &'a Path,
    /// The expert's name, for its limits and for messages.
    pub name: &'a str,
    /// Zeros in the TAE's place.
    pub without_tae: bool,
    /// A host that offers no predictions of the FM. Such an expert cannot serve.
    pub without_fm_logits: bool,
    /// The width of the open data set's content vectors, 0 without any. None where no data set is
    /// open: then it is that of the configured one or, on a machine without that, of the logs.
    pub content_dim: Option<usize>,
}

impl<'a> ExpertSetup<'a> {
    /// An expert as the configuration names it.
    pub fn of(config: &'a Config, entry: &'a ExpertEntry, engine: &'a Engine) -> Self {
        let (plugin, name, without_tae) = (&entry.plugin, &entry.name, entry.without_tae);
        ExpertSetup {
            config,
            engine,
            plugin,
            name,
            without_tae,
            without_fm_logits: false,
            content_dim: None,
        }
    }

    /// Begins with fresh parameters, which `warm` may change, to learn from the rows of a view.
    ///
    /// # Errors
    /// A plugin that is refused, or that wants a longer short history than was logged, or content
    /// vectors that were not; a device that is not in this build.
    pub fn begin(
        &self,
        view: &LogView<'_>,
        survey: Survey,
        warm: impl FnOnce(&mut Parameters),
    ) -> Result<ExpertStream> {
        let (schema, fm_version) = (&view.log.schema, &survey.fm_version);
        let content = self.content_dim(view.log.content_dim)?;
        let vectors = VectorWidths { tae: view.tae_dim(), content };
        let blueprint = self.blueprint(schema, schema, vectors, fm_version)?;
        if blueprint.description.reads_vectors() {
            self.check_content(content, view.log)?;
        }
        let wanted = blueprint.description.history_len as usize;
        let logged = view.log.manifest.history_len;
        if wanted > logged {
            return Err(Error::invalid(format!(
                "expert {:?} reads {wanted} events of short history and the logs hold {logged}; raise logs.history_len and log again",
                self.name
            )));
        }
        let settings = self.config.expert_training.clone();
        let passes = PlannedPasses::new(blueprint.description.patience, &settings, &survey);
        let mut parameters = blueprint.init_parameters(survey.statistics.finish(), settings.seed);
        warm(&mut parameters);
        let (config, device) = (self.trainer_config(passes), self.config.device);
        let trainer = ExpertTrainer::new(blueprint.clone(), parameters, config, device)?;
        Ok(ExpertStream { trainer, blueprint, settings, passes, held: ChunkRows::default() })
    }

    /// Goes on online with what [`ExpertTrainer::saved`] gave: with the network as it is now or, if
    /// that is another one, as of the newest layout of the schema under which it was trained.
    ///
    /// # Errors
    /// What was saved is of another network or configuration.
    pub fn resume(&self, schema: &Schema, saved: SavedTrainer) -> Result<ExpertStream> {
        self.resume_as_of(schema, schema, saved.clone()).or_else(|error| {
            let as_of = |layout| self.resume_as_of(&layout, schema, saved.clone()).ok();
            schema.layouts().skip(1).find_map(as_of).ok_or(error)
        })
    }

    fn resume_as_of(
        &self,
        layout: &Schema,
        schema: &Schema,
        saved: SavedTrainer,
    ) -> Result<ExpertStream> {
        let Provenance { tae_dim, fm_version, .. } = saved.provenance();
        let vectors = VectorWidths { tae: *tae_dim, content: self.content_dim(0)? };
        let blueprint = self.blueprint(layout, schema, vectors, fm_version)?;
        let passes = PlannedPasses::default();
        let (config, device) = (self.trainer_config(passes), self.config.device);
        let trainer = ExpertTrainer::resume(blueprint.clone(), saved, config, device)?;
        let settings = self.config.expert_training.clone();
        let held = ChunkRows::default();
        let mut stream = ExpertStream { trainer, blueprint, settings, passes, held };
        stream.go_online()?;
        Ok(stream)
    }

    /// The width of the content vectors that the expert reads, `logged` being that of the logs.
    fn content_dim(&self, logged: usize) -> Result<usize> {
        let dataset = &self.config.paths.dataset;
        match self.content_dim {
            Some(width) => Ok(width),
            None if disk::is_file(&dataset.join("schema.toml")) => Ok(content::width_in(dataset)?),
            None => Ok(logged),
        }
    }

    /// Refuses logs of which an expert would learn from zeros where it is served vectors of this
    /// width, and warns of those of which it will in part.
    fn check_content(&self, width: usize, log: &LogReader) -> Result<()> {
        let found = match log.content_dim {
            logged if logged == width => {
                if log.other_content > 0 {
                    tracing::warn!(
                        expert = self.name,
                        files = log.other_content,
                        "files of the feature logs have no content vectors of {width} numbers; it \
                         learns from zeros there"
                    );
                }
                return Ok(());
            }
            0 => "the feature logs hold none".to_owned(),
            logged => format!("those of the feature logs have {logged}"),
        };
        Err(Error::invalid(format!(
            "expert {:?} reads content vectors, which have {width} numbers in the data set, and \
             {found}; make the logs anew (`hypercast materialise` or `hypercast train fm`)",
            self.name
        )))
    }

    /// The plugin's network as of a layout of the schema, for logs of the present one.
    fn blueprint(
        &self,
        layout: &Schema,
        schema: &Schema,
        vectors: VectorWidths,
        fm_version: &str,
    ) -> Result<Arc<Blueprint>> {
        let options = LoadOptions {
            tae_dim: vectors.tae,
            fm_version: Some(fm_version.to_owned()),
            without_fm_logits: self.without_fm_logits,
            ..self.config.load_options(self.name, vectors.content)
        };
        let plugin = Plugin::load(self.engine, self.plugin, &options.limits)?;
        let blueprint = Blueprint::as_of(plugin, layout, schema, &options)?;
        let limits = &options.graph_limits;
        blueprint.check_memory(&limits.training, limits.memory_bytes)?;
        Ok(Arc::new(blueprint))
    }

    /// The schedule spans all passes that there may be.
    fn trainer_config(&self, passes: PlannedPasses) -> TrainerConfig {
        let settings = &self.config.expert_training;
        let steps = passes.rows() / settings.batch_rows as u64;
        TrainerConfig {
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
            without_tae: self.without_tae,
            average_decay: settings.average_decay as f32,
            seed: settings.seed,
            ..TrainerConfig::default()
        }
    }
}

/// An expert in training over logged rows.
pub struct ExpertStream {
    /// What a step computes.
    pub trainer: ExpertTrainer,
    /// The plugin and its network.
    pub blueprint: Arc<Blueprint>,
    /// The passes over the past.
    pub passes: PlannedPasses,
    settings: ExpertTraining,
    /// Rows of the past that no pass has learned from.
    held: ChunkRows,
}

/// How many passes over a past an expert learns in, and from which rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlannedPasses {
    /// How many there are at most.
    pub most: usize,
    /// The rows that each learns from, the first ones in the order of the logs.
    pub learned_rows: u64,
    /// After so many that are no better than the best one, they end early.
    patience: Option<u32>,
}

impl PlannedPasses {
    fn new(patience: Option<u32>, settings: &ExpertTraining, survey: &Survey) -> PlannedPasses {
        let Survey { rows, newest_rows, .. } = *survey;
        let all = PlannedPasses { most: settings.epochs, learned_rows: rows, patience: None };
        if patience.is_none() {
            return all;
        }
        let learned_rows = learned_rows(rows);
        // Requests are held out as a whole.
        if learned_rows + newest_rows > rows {
            tracing::warn!(
                rows,
                newest_rows,
                "too few rows are logged to hold a tenth of them out, so passes do not end early: \
                 there are as many as expert_training.epochs says; log more rows"
            );
            return all;
        }
        PlannedPasses { most: settings.max_epochs, learned_rows, patience }
    }

    /// The rows of all passes, each counted once a pass.
    pub fn rows(self) -> u64 {
        self.most as u64 * self.learned_rows
    }
}

/// Sees requests and the predictions for their targets, before they are learned from.
pub type Watcher<'a> = &'a mut dyn FnMut(&[&Example], &ExpertPredictions);

impl ExpertStream {
    /// Learns from the past with which it has begun, in as many passes as the settings say or, for
    /// a plugin with `patience` and rows enough to tell, until they are no better (see
    /// [`PassScores`]). The first goes in time order, and `report` sees each batch's predictions
    /// before it is learned from. What no pass learned from, it sees in the end, as the parameters
    /// predict it.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin whose hooks fail.
    pub fn learn_past(
        &mut self,
        view: &LogView<'_>,
        mut report: impl FnMut(&BatchReport<'_>),
    ) -> Result<Option<PassScores>> {
        let mut early_stop = None;
        for epoch in 0..self.passes.most {
            self.trainer.set_pass(epoch > 0, epoch == 0);
            self.trainer.set_repeats(epoch > 0);
            let mut rows = view.rows();
            in_chunks(first_rows(&mut rows, self.passes.learned_rows), CHUNK_ROWS, |chunk| {
                let refused = self.trainer.train(chunk, &mut report)?;
                // Later passes refuse the same ones.
                if epoch == 0 {
                    warn_of(&refused, chunk);
                }
                Ok(())
            })?;
            if let (Some(patience), 0) = (self.passes.patience, epoch) {
                let mut held = ChunkRows::default();
                for logged in rows {
                    held.add(logged?);
                }
                early_stop = Some(EarlyStop::new(self, patience, &view.log.schema, held)?);
            }
            if let Some(stop) = &mut early_stop
                && stop.is_over(&self.trainer)?
            {
                break;
            }
        }
        let Some(stop) = early_stop else { return Ok(None) };
        let (scores, held) = stop.finish(&mut self.trainer, report)?;
        self.held = held;
        Ok(Some(scores))
    }

    /// From here on the learning rate is constant and small; call it once between a past and a
    /// stream. What no pass has learned from, it learns once, as if the stream began with it.
    ///
    /// # Errors
    /// A plugin whose hooks fail.
    pub fn go_online(&mut self) -> Result<()> {
        let rate = self.settings.online_learning_rate;
        self.trainer.hold_rates(rate as f32, (rate * TABLE_RATE) as f32);
        self.trainer.set_pass(false, false);
        self.trainer.set_repeats(false);
        self.trainer.set_batch_rows(self.settings.online_batch_rows);
        let held = std::mem::take(&mut self.held);
        if held.rows > 0 {
            let refused = self.trainer.train(held.chunk(), |_| ())?;
            warn_of(&refused, held.chunk());
        }
        Ok(())
    }

    /// Follows a stream batch by batch in the order of the logs: predicts every row, lets `watch`
    /// see it, and, if it `learns`, learns from the batch.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin whose hooks fail.
    pub fn follow(&mut self, view: &LogView<'_>, learns: bool, watch: Watcher<'_>) -> Result<()> {
        in_chunks(view.rows(), self.settings.online_batch_rows, |chunk| {
            let predictions = self.trainer.predict_scored(chunk)?;
            watch(&chunk.examples.iter().collect::<Vec<_>>(), &predictions);
            if learns {
                self.trainer.train(chunk, |_| ())?;
            }
            Ok(())
        })
    }
}

fn warn_of(refused: &[RefusedRequest], chunk: Chunk<'_>) {
    for RefusedRequest { index, reason } in refused {
        let request = chunk.examples[*index].request;
        tracing::warn!(request, reason, "a request is not learned from");
    }
}

/// Whole requests up to the first that ends at or behind row `most`.
fn first_rows(
    rows: &mut impl Iterator<Item = Result<LoggedRequest>>,
    most: u64,
) -> impl Iterator<Item = Result<LoggedRequest>> {
    let mut read = 0;
    std::iter::from_fn(move || {
        let logged = if read < most { rows.next()? } else { return None };
        read += logged.as_ref().map_or(0, |logged| logged.example.targets.len() as u64);
        Some(logged)
    })
}

/// Hands on requests as a whole, at most `most` rows at a time unless one request has more.
fn in_chunks(
    requests: impl Iterator<Item = Result<LoggedRequest>>,
    most: usize,
    mut take: impl FnMut(Chunk<'_>) -> Result<()>,
) -> Result<()> {
    let mut held = ChunkRows::default();
    for logged in requests {
        let logged = logged?;
        // A chunk that a trainer would have to cut would leave it a step of a few rows.
        if held.rows > 0 && held.rows + logged.example.targets.len() > most {
            take(held.chunk())?;
            held.clear();
        }
        held.add(logged);
    }
    if held.rows > 0 { take(held.chunk()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_config::Logs;
    use hypercast_data::dataset::Dataset;
    use hypercast_data::features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    };
    use hypercast_data::logs::{LogOptions, LogVersion, LogWriter};
    use hypercast_data::simulate;
    use hypercast_fm::inference::FmOutput;

    /// A log whose embeddings are `[request, row, 7]`.
    fn log(dir: &std::path::Path) -> (LogReader, Vec<Example>) {
        let into = dir.join("world");
        let options = simulate::SimulateOptions {
            into,
            users: 20,
            items: 30,
            requests: 90,
            surfaces: 2,
            seed: 3,
        };
        simulate::simulate(&options).unwrap();
        let dataset = Dataset::open(&options.into).unwrap();
        let replay = ReplayOptions {
            span: Span::default(),
            history_len: 8,
            max_targets: 4,
            features: FeatureConfig::default(),
        };
        let examples: Vec<Example> =
            Replay::new(&dataset, replay).unwrap().map(|read| read.unwrap()).collect();
        let options =
            LogOptions { history_len: 4, rows_per_file: 200, ..Logs::default().options() };
        let logs = dir.join("logs");
        let versions = vec![LogVersion::new("1.0.0", 3)];
        let mut writer = LogWriter::create(&logs, &dataset.schema, options, versions).unwrap();
        for example in &examples {
            let tae = (0..example.targets.len())
                .flat_map(|row| [example.request as f32, row as f32, 7.0])
                .collect::<Vec<f32>>();
            let said = FmOutput { tae, main: Vec::new() };
            writer.write_batch(std::slice::from_ref(example), &[said], |_| true).unwrap();
        }
        writer.finish().unwrap();
        (LogReader::open(&logs).unwrap(), examples)
    }

    fn whole(log: &LogReader) -> LogView<'_> {
        let (surfaces, span) = (vec![0, 1], Span::default());
        LogView { log, surfaces, span, embedding: None, mask: None }
    }

    #[test]
    fn a_view_gives_its_surfaces_its_time_and_its_columns() {
        let dir = tempfile::tempdir().unwrap();
        let (log, examples) = log(dir.path());
        let middle_ms = examples[examples.len() / 2].time_ms;
        let view = LogView {
            surfaces: vec![1],
            span: Span { from_ms: Some(middle_ms), until_ms: None },
            embedding: Some(vec![2..3, 0..1]),
            ..whole(&log)
        };
        let seen: Vec<LoggedRequest> = view.rows().map(|read| read.unwrap()).collect();
        let expected: Vec<&Example> =
            examples.iter().filter(|e| e.surface == 1 && e.time_ms >= middle_ms).collect();
        assert!(!expected.is_empty() && seen.len() == expected.len());
        assert_eq!(view.tae_dim(), 2);
        for (logged, example) in seen.iter().zip(&expected) {
            assert_eq!(logged.example.request, example.request);
            assert_eq!(logged.tae, [7.0, example.request as f32].repeat(example.targets.len()));
        }
        let rows: usize = expected.iter().map(|example| example.targets.len()).sum();
        assert_eq!(view.survey().unwrap().unwrap().rows, rows as u64);
        let nothing = LogView { surfaces: vec![], ..view };
        assert!(nothing.survey().unwrap().is_none());
    }

    #[test]
    fn logs_have_the_content_vectors_of_the_data_set() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = log(dir.path());
        let mut config = Config::without_folder();
        config.paths.dataset = dir.path().join("elsewhere");
        let setup = ExpertSetup {
            config: &config,
            engine: &Engine::new(config.guests()).unwrap(),
            plugin: Path::new("own.wasm"),
            name: "own",
            without_tae: false,
            without_fm_logits: false,
            content_dim: Some(8),
        };
        let why = |log: &LogReader| setup.check_content(8, log).unwrap_err().to_string();
        let said = why(&log);
        assert!(said.contains("8 numbers") && said.contains("logs hold none"), "{said}");
        log.content_dim = 4;
        let said = why(&log);
        assert!(said.contains("have 4") && said.contains("hypercast materialise"), "{said}");
        log.content_dim = 8;
        setup.check_content(8, &log).unwrap();
        assert_eq!(setup.content_dim(4).unwrap(), 8);
        let of_logs = ExpertSetup { content_dim: None, ..setup };
        assert_eq!(of_logs.content_dim(4).unwrap(), 4, "there is no data set");
    }

    #[test]
    fn chunks_hold_whole_requests_and_no_more_rows_than_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (log, examples) = log(dir.path());
        for most in [1, 10, 64, 1 << 20] {
            let (mut requests, mut chunks) = (Vec::new(), 0);
            in_chunks(whole(&log).rows(), most, |Chunk { examples, tae, .. }| {
                let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
                assert!(rows <= most || examples.len() == 1, "{rows} of {most}");
                assert_eq!(tae.len(), rows * 3);
                requests.extend(examples.iter().map(|example| example.request));
                chunks += 1;
                Ok(())
            })
            .unwrap();
            let all: Vec<u64> = examples.iter().map(|example| example.request).collect();
            assert_eq!(requests, all);
            assert_eq!(chunks == 1, most == 1 << 20);
        }
    }
}
