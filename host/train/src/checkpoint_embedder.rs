//! A finished checkpoint that embeds requests for experts to learn from, on the spot or into
//! feature logs.
//!
//! An FM that has learned from a request knows its outcomes. An expert that learns from such an
//! embedding trusts it more than it deserves in serving, where outcomes are not known yet. `train
//! fm` embeds each request before it learns from it, and the logging tier waits with weights that
//! are ahead of it. A checkpoint cannot: it may embed only what is newer than all that it has
//! learned from, by its manifest. Past histories count as requests do, by the times that they have
//! in the data set: an FM that has learned only from what lies before the first request passes.

use std::path::PathBuf;

use hypercast_fm::{
    checkpoint::FmManifest,
    example::Example,
    inference::{self, FmOutput, FmServingOptions, FoundationModel},
};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Config;
use hypercast_core::clock::format_time;
use hypercast_data::dataset::Dataset;
use hypercast_data::schema::{CoreColumns, MainTasks, spec_growths};

/// A checkpoint that gives TAEs, and what it may embed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingCheckpoint {
    /// The folder that `train fm` wrote it to.
    pub dir: PathBuf,
    /// The time of the first request of the data set that it embeds; all if missing.
    pub from_ms: Option<i64>,
    /// Whether it may embed requests that are no newer than what it learned from, because that was
    /// other data.
    pub allow_look_ahead: bool,
}

/// A loaded checkpoint, which refuses what it may not embed.
pub(crate) struct CheckpointEmbedder {
    fm: Box<dyn FoundationModel>,
    core: CoreColumns,
    main_tasks: MainTasks,
    checkpoint: EmbeddingCheckpoint,
    utc_offset_h: i32,
}

impl CheckpointEmbedder {
    pub(crate) fn load(
        dataset: &Dataset,
        config: &Config,
        checkpoint: &EmbeddingCheckpoint,
    ) -> Result<CheckpointEmbedder> {
        let growths = spec_growths(&dataset.schema)?.into();
        let serving = FmServingOptions { growths, ..config.fm_logging.loading(config.device) };
        Ok(CheckpointEmbedder {
            fm: inference::load(&checkpoint.dir, serving)?,
            core: CoreColumns::new(&dataset.schema),
            main_tasks: MainTasks::new(&dataset.schema),
            checkpoint: checkpoint.clone(),
            utc_offset_h: config.timeline.utc_offset_h,
        })
    }

    pub(crate) fn manifest(&self) -> &FmManifest {
        self.fm.manifest()
    }

    /// The number of predictions a target.
    pub(crate) fn main_tasks(&self) -> usize {
        self.main_tasks.count()
    }

    /// Whether the checkpoint may have learned from a request, and must not embed it.
    pub(crate) fn looks_ahead(&self, example: &Example) -> bool {
        let FmManifest { requests, trained_until_ms, .. } = *self.fm.manifest();
        !self.checkpoint.allow_look_ahead && requests > 0 && example.time_ms <= trained_until_ms
    }

    /// Why it must not embed a request, and what to do instead.
    pub(crate) fn look_ahead(&self, example: &Example) -> Error {
        let FmManifest { version, trained_until_ms, .. } = self.fm.manifest();
        let time = |time_ms| format_time(time_ms, self.utc_offset_h);
        Error::data(
            &self.checkpoint.dir,
            format!(
                "FM {version} has learned from requests up to {}, and is to embed one of {} for \
                 experts to learn from. Its embedding tells the outcome, which serving will not \
                 know. Train on the feature logs that `train fm` or the logging tier wrote, \
                 without a checkpoint; or embed what the data set has that is newer (`--from {}`), \
                 or take a checkpoint of before. If it learned from other data, say \
                 `--allow-look-ahead`",
                time(*trained_until_ms),
                time(example.time_ms),
                trained_until_ms + 1,
            ),
        )
    }

    /// The TAEs and main predictions of all targets.
    ///
    /// # Errors
    /// A request that the checkpoint may have learned from, or that does not fit it.
    pub(crate) fn embed<'a>(
        &self,
        examples: impl IntoIterator<Item = &'a Example> + Clone,
    ) -> Result<FmOutput> {
        if let Some(ahead) = examples.clone().into_iter().find(|own| self.looks_ahead(own)) {
            return Err(self.look_ahead(ahead));
        }
        let shown = self.core.examples(examples);
        let said = self.fm.infer(&shown.iter().map(|example| &**example).collect::<Vec<_>>())?;
        Ok(self.main_tasks.output(&self.fm.manifest().spec, said))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::expert::{self, TrainingSource};
    use crate::fm::dataset_spec;
    use crate::materialise::materialise;
    use hypercast_data::dataset::timeline::Span;
    use hypercast_data::features::replay::Replay;
    use hypercast_data::logs::LogReader;
    use hypercast_data::simulate;
    use hypercast_expert::Engine;
    use hypercast_fm::{device::DeviceKind, spec::FmConfig, trainer};

    /// A world, and a checkpoint that has learned from examples of it.
    struct LearnedWorld {
        dataset: Dataset,
        config: Config,
        examples: Vec<Example>,
        checkpoint: EmbeddingCheckpoint,
    }

    fn learned(dir: &Path, requests: usize) -> LearnedWorld {
        let into = dir.join("world");
        let options = simulate::SimulateOptions {
            into,
            users: 20,
            items: 30,
            requests: 120,
            surfaces: 2,
            seed: 3,
        };
        simulate::simulate(&options).unwrap();
        let dataset = Dataset::open(&options.into).unwrap();
        let fm = FmConfig { dim: 16, qk_dim: 8, v_dim: 8, embedding_dim: 8, ..FmConfig::default() };
        let mut config = Config { fm: FmConfig { max_history: 8, ..fm }, ..Config::default() };
        config.paths.dataset = options.into;
        config.paths.logs = dir.join("logs");
        config.paths.experts = dir.join("experts");
        let replay = config.replay(Span::default());
        let examples: Vec<Example> =
            Replay::new(&dataset, replay).unwrap().map(|read| read.unwrap()).collect();
        let spec = dataset_spec(&dataset).unwrap();
        let work = dir.join("work");
        let mut trainer = trainer::create(&work, &config.fm, &spec, DeviceKind::Cpu).unwrap();
        if requests > 0 {
            trainer.step(&examples[..requests].iter().collect::<Vec<_>>()).unwrap();
        }
        let dir = dir.join("fm");
        trainer.checkpoint(&dir, "1.2.3").unwrap();
        let checkpoint = EmbeddingCheckpoint { dir, from_ms: None, allow_look_ahead: false };
        LearnedWorld { dataset, config, examples, checkpoint }
    }

    #[test]
    fn a_checkpoint_embeds_nothing_that_it_has_learned_from() {
        let dir = tempfile::tempdir().unwrap();
        let LearnedWorld { dataset, config, examples, checkpoint } = learned(dir.path(), 80);
        let rows = |checkpoint: &EmbeddingCheckpoint| {
            let embedded = materialise(&dataset, &config, checkpoint, None);
            let logged = LogReader::open(&config.paths.logs);
            (embedded, logged.map_or(0, |log| log.iter().count()))
        };
        let (refused, logged) = rows(&checkpoint);
        let why = refused.unwrap_err().to_string();
        let newest_ms = examples[79].time_ms;
        for part in ["FM 1.2.3", "fm:", &format!("`--from {}`", newest_ms + 1)] {
            assert!(why.contains(part), "{part:?} is not in: {why}");
        }
        assert_eq!(logged, 0);
        // The newest request that it has learned from, and the first that it has not.
        let from = |from_ms| EmbeddingCheckpoint { from_ms: Some(from_ms), ..checkpoint.clone() };
        assert!(examples[80].time_ms > newest_ms);
        assert!(rows(&from(newest_ms)).0.is_err());
        let (embedded, logged) = rows(&from(newest_ms + 1));
        assert_eq!((embedded.is_ok(), logged), (true, 40));
        let said = EmbeddingCheckpoint { allow_look_ahead: true, ..checkpoint.clone() };
        assert!(rows(&said).0.is_ok(), "of other data");
        // The same checkpoint on the spot. Its plugin is not even looked for.
        let entry = toml::from_str("name = \"all\"\nplugin = \"none.wasm\"").unwrap();
        let engine = Engine::new(config.guests()).unwrap();
        let source = TrainingSource::Checkpoint(&checkpoint);
        let why = expert::train(&config, &entry, &engine, source).unwrap_err().to_string();
        assert!(why.contains("has learned from requests up to"), "{why}");
    }

    #[test]
    fn a_checkpoint_that_has_learned_nothing_embeds_all() {
        let dir = tempfile::tempdir().unwrap();
        let LearnedWorld { dataset, config, examples, checkpoint } = learned(dir.path(), 0);
        materialise(&dataset, &config, &checkpoint, None).unwrap();
        let log = LogReader::open(&config.paths.logs).unwrap();
        assert_eq!(log.iter().count(), examples.len());
    }
}
