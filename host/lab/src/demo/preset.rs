//! The demo's configurations, small enough for two cores: one per public data set, and one for any
//! other that follows from its size.

use std::path::{Path, PathBuf};

use hypercast_config::{Config, ExpertEntry, ExpertTraining, Logs, Paths, TrainOn, parse_time_ms};
use hypercast_data::{dataset::Dataset, simulate};
use hypercast_expert::{Blueprint, Engine, LoadOptions};
use hypercast_fm::spec::FmConfig;

use super::scale::DatasetSize;
use crate::error::{CommonErrors as _, Error, Result};

/// The data sets of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DatasetChoice {
    /// MovieLens-1M, fetched with pip.
    Movielens,
    /// KuaiRand-Pure, from its own files.
    Kuairand,
    /// A simulated world whose true probabilities are known.
    Simulated,
    /// A simulated world in which NE falls with a model's size by a power law.
    PowerLaw,
    /// Any other: files by `--mapping`, or a folder that was imported; settings follow from its
    /// size.
    Own,
}

impl DatasetChoice {
    /// Where the test begins: at the given time, else at the data set's own date, else with row
    /// `row` of its impressions.
    ///
    /// # Errors
    /// A time that cannot be read; a data set that is empty or cannot be read.
    pub fn test_from_ms(
        self,
        given: Option<&str>,
        row: usize,
        config: &Config,
        dataset: &Dataset,
    ) -> Result<i64> {
        let own = (self == DatasetChoice::Kuairand).then_some("2022-04-29");
        if let Some(date) = given.or(own) {
            return Ok(parse_time_ms(date, config.timeline.utc_offset_h)?);
        }
        match dataset.impressions()?.nth(row) {
            Some(impression) => Ok(impression?.time_ms),
            None => Err(Error::invalid("the data set is empty")),
        }
    }

    /// The share of users that an experiment takes by default. With it, `experiment tae` of three
    /// seeds on MovieLens took a quarter of an hour on two cores.
    ///
    /// # Errors
    /// A data set that cannot be read.
    pub fn experiment_share(self, dataset: &Dataset) -> Result<f64> {
        Ok(match self {
            DatasetChoice::Movielens => 0.3,
            DatasetChoice::Kuairand => 0.25,
            DatasetChoice::Simulated | DatasetChoice::PowerLaw => 1.0,
            DatasetChoice::Own => DatasetSize::of(dataset)?.experiment_share(),
        })
    }

    /// The configuration for a data set, for a work folder that holds `data/`.
    ///
    /// # Errors
    /// A data set that cannot be read.
    pub fn config(self, dataset: &Dataset, plugins: &Path) -> Result<Config> {
        let mut config = Config {
            paths: Paths {
                dataset: "data".into(),
                fm_work: "fm-work".into(),
                fm: "fm".into(),
                logs: "logs".into(),
                experts: "experts".into(),
                state: "state".into(),
            },
            ..Config::default()
        };
        config.engine.dir = "streams".into();
        // The events are of the past: their own times are the clock.
        config.join.tick_ms = 0;
        let short_term: &[&str] = match self {
            DatasetChoice::Movielens => {
                config.fm = FmConfig { max_history: 48, max_targets: 16, ..FmConfig::default() };
                config.expert_training = ExpertTraining { epochs: 1, ..ExpertTraining::default() };
                config.logs = Logs { skip_share: 0.4, ..Logs::default() };
                &["drama", "comedy"]
            }
            DatasetChoice::Kuairand => {
                config.timeline.utc_offset_h = 8;
                config.logs = Logs { skip_share: 0.0, ..Logs::default() };
                // Most of the users' events are older than the logs and have no times.
                config.fm = FmConfig {
                    pretraining_passes: 2,
                    sparse_learning_rate: 0.06,
                    ..FmConfig::default()
                };
                // Four days are few: small steps and their average. Steps on the stream may be
                // larger.
                config.expert_training = ExpertTraining {
                    epochs: 3,
                    batch_rows: 128,
                    average_decay: 0.997,
                    online_learning_rate: 2e-3,
                    ..ExpertTraining::default()
                };
                &["tab1"]
            }
            DatasetChoice::Simulated => {
                // In a small world many small steps are better than few large ones.
                config.fm = FmConfig {
                    max_history: 128,
                    batch_requests: 16,
                    learning_rate: 2e-3,
                    sparse_learning_rate: 0.1,
                    ..FmConfig::default()
                };
                config.logs = Logs { skip_share: 0.4, ..Logs::default() };
                &["feed"]
            }
            DatasetChoice::PowerLaw => {
                config.fm = FmConfig {
                    tae_dim: 16,
                    // Longer ones cost more than they tell with so few requests.
                    max_history: 8,
                    batch_requests: 16,
                    // Codes of items have most of what can be learned, and are seen often.
                    sparse_learning_rate: 0.2,
                    sparse_init: 0.1,
                    ..FmConfig::default()
                };
                config.expert_training = ExpertTraining { epochs: 1, ..ExpertTraining::default() };
                config.logs = Logs { skip_share: 0.4, ..Logs::default() };
                &["feed"]
            }
            DatasetChoice::Own => {
                let size = DatasetSize::of(dataset)?;
                config.fm = size.fm();
                config.expert_training = size.expert_training();
                config.logs = size.logs();
                config.plugin_limits.max_flops_share = size.max_flops_share();
                config.experts = shared_expert(plugins);
                return Ok(config);
            }
        };
        let schema = &dataset.schema;
        let served: Vec<String> = short_term
            .iter()
            .map(|name| name.to_string())
            .filter(|name| schema.surface(name).is_some())
            .collect();
        let first = if served.is_empty() { schema.surfaces[..1].to_vec() } else { served };
        config.experts = experts(plugins, &first);
        Ok(config)
    }
}

/// The world of `--data simulated`.
pub fn world(into: PathBuf) -> simulate::SimulateOptions {
    simulate::SimulateOptions {
        into,
        users: 400,
        items: 200,
        requests: 24_000,
        surfaces: 3,
        seed: 1,
    }
}

/// The world of `--data power-law`.
pub fn power_law_world(into: PathBuf) -> simulate::SimulateOptions {
    simulate::SimulateOptions {
        into,
        users: 1_000,
        items: 100_000,
        requests: 60_000,
        surfaces: 2,
        seed: 1,
    }
}

/// An expert on every surface.
pub fn expert(name: &str, plugin: PathBuf) -> ExpertEntry {
    ExpertEntry {
        name: name.into(),
        plugin,
        surfaces: Vec::new(),
        without_tae: false,
        shadow: false,
        train_on: TrainOn::All,
        limits: Default::default(),
        ne_limits: Default::default(),
    }
}

/// An expert of some surfaces and one of all others, each with its baseline.
fn experts(plugins: &Path, short_term: &[String]) -> Vec<ExpertEntry> {
    let surfaces = short_term.to_vec();
    let own = expert("short-term", plugins.join("short-term.wasm"));
    let mut all = with_baseline(ExpertEntry { surfaces, train_on: TrainOn::Own, ..own }).to_vec();
    all.extend(shared_expert(plugins));
    all
}

/// An expert of all surfaces that no other serves, with its baseline.
fn shared_expert(plugins: &Path) -> Vec<ExpertEntry> {
    with_baseline(expert("mlp-fusion", plugins.join("mlp-fusion.wasm"))).to_vec()
}

/// The first expert of a configuration, beside an FM of this version with its settings.
///
/// # Errors
/// A plugin that is missing or refused.
pub fn blueprint(config: &Config, dataset: &Dataset, fm_version: &str) -> Result<Blueprint> {
    let ExpertEntry { name, plugin, .. } = &config.experts[0];
    let options = LoadOptions {
        tae_dim: config.fm.tae_width(),
        fm_version: Some(fm_version.to_owned()),
        ..config.load_options(name, dataset.content)
    };
    let engine = Engine::new(config.guests())?;
    Ok(Blueprint::load(&engine, plugin, &dataset.schema, &options)?)
}

/// An expert, and a shadow of it without TAE as its baseline.
pub fn with_baseline(with: ExpertEntry) -> [ExpertEntry; 2] {
    let name = format!("{}-without-tae", with.name);
    let without = ExpertEntry { name, without_tae: true, shadow: true, ..with.clone() };
    [with, without]
}
