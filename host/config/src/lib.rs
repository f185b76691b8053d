//! `hypercast.toml`: the operator's settings of every command, in one file.
//!
//! Unknown keys are refused, relative paths start at the file, and every key has a default that
//! works. The file at the root of the repository explains each key; a test keeps it complete. This
//! crate reads and checks settings. It opens no file that they name and starts nothing; a function
//! elsewhere takes the settings that it needs, not the whole [`Config`].
//!
//! ```text
//! hypercast.toml ──► Config ── paths, timeline, logs, expert_training   training.rs
//!                      │    ├─ server, fm_serving, fm_logging            serving.rs
//!                      │    ├─ engine, join, publish, fm_gate            lifecycle.rs
//!                      │    ├─ plugin_limits, experts                    plugins.rs
//!                      │    └─ rollout, recorded, keys of pushers        rollout.rs
//!                      ▼
//!                  Reloaded: the keys that take effect while the daemon runs   reload.rs
//! ```
//!
//! ```
//! use hypercast_config::Config;
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("hypercast.toml");
//! std::fs::write(&path, "[server]\nthreads = 4\n")?;
//! let config = Config::read(&path)?;
//! assert_eq!((config.server.threads, config.server.queue), (4, 256));
//!
//! std::fs::write(&path, "[server]\nthread = 4\n")?;
//! let error = Config::read(&path).unwrap_err().to_string();
//! assert!(error.contains("unknown field `thread`"), "{error}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod error;
mod flops_share;
mod lifecycle;
mod plugins;
mod redacted_url;
mod reload;
mod rollout;
mod serving;
mod training;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
use hypercast_data::dataset::timeline::Span;
use hypercast_data::features::{
    FeatureConfig,
    replay::{PRETRAINING_CHUNK, PretrainingOptions, ReplayOptions},
};
use hypercast_data::schema::Schema;
use hypercast_expert::graph::NetworkUse;
use hypercast_expert::{CacheConfig, EngineConfig, LoadOptions};
use hypercast_fm::{device::DeviceKind, spec::FmConfig};
use serde::{Deserialize, Serialize};

use self::error::CommonErrors as _;
pub use self::error::{Error, Result};
pub use self::flops_share::{FlopsShare, OverFlopsShare};
pub use self::lifecycle::{
    EngineKind, EngineSettings, FmGateSettings, JoinSettings, JoinerOptions, JoinerSettings,
    NeLimits, OnGap, PublishSettings,
};
pub use self::plugins::{ExpertEntry, ExpertLimits, PluginLimits, TrainOn};
pub use self::redacted_url::{RedactedUrl, UrlLogin};
pub use self::reload::{RELOADABLE_KEYS, Reloaded, differing_keys, value_at};
pub use self::rollout::{
    PublicKey, RecordedSettings, RolloutSettings, StopAfter, TrustedKey, sha256,
};
pub use self::serving::{DaemonTier, FmTierConfig, ServerSettings};
pub use self::training::{ExpertTraining, Logs, TimelineSettings, parse_time_ms};

/// The content of `hypercast.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Files and folders of all commands.
    pub paths: Paths,
    /// The HTTP server, and the tier of experts behind it.
    pub server: ServerSettings,
    /// The tier that runs the FM for candidates.
    pub fm_serving: FmTierConfig,
    /// The FM of the logging tier, which runs it for served items.
    #[serde(default = "FmTierConfig::logging", deserialize_with = "serving::logging_keys")]
    pub fm_logging: FmTierConfig,
    /// The end of the data set's part that trains and that `serve` starts from.
    pub timeline: TimelineSettings,
    /// Bounds of histories and counters.
    pub features: FeatureConfig,
    /// The foundation model's size and training.
    pub fm: FmConfig,
    /// The device that runs models.
    pub device: DeviceKind,
    /// The streams that carry events, examples, weights and versions.
    pub engine: EngineSettings,
    /// How long impressions wait for their outcomes.
    pub join: JoinSettings,
    /// The weights that trainers publish, and how often.
    pub publish: PublishSettings,
    /// The conditions under which what the FM's trainer learned is published.
    pub fm_gate: FmGateSettings,
    /// The feature logs for expert training.
    pub logs: Logs,
    /// The training of experts.
    pub expert_training: ExpertTraining,
    /// Limits of every plugin.
    pub plugin_limits: PluginLimits,
    /// The conditions under which pushed versions serve.
    pub rollout: RolloutSettings,
    /// The sample of answered requests that is recorded.
    pub recorded: RecordedSettings,
    /// The plugins that serve, and their surfaces.
    pub experts: Vec<ExpertEntry>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            paths: Paths::default(),
            server: ServerSettings::default(),
            fm_serving: FmTierConfig::serving(),
            fm_logging: FmTierConfig::logging(),
            timeline: TimelineSettings::default(),
            features: FeatureConfig::default(),
            fm: FmConfig::default(),
            device: DeviceKind::default(),
            engine: EngineSettings::default(),
            join: JoinSettings::default(),
            publish: PublishSettings::default(),
            fm_gate: FmGateSettings::default(),
            logs: Logs::default(),
            expert_training: ExpertTraining::default(),
            plugin_limits: PluginLimits::default(),
            rollout: RolloutSettings::default(),
            recorded: RecordedSettings::default(),
            experts: Vec::new(),
        }
    }
}

/// Files and folders of all commands: `[paths]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// The imported data set, as `hypercast import` and `hypercast simulate` write it.
    pub dataset: PathBuf,
    /// Work folder of FM training: its embedding store with optimizer state.
    pub fm_work: PathBuf,
    /// The FM checkpoint that `train fm` writes and `serve` loads.
    pub fm: PathBuf,
    /// Feature logs with TAEs (Parquet with zstd).
    pub logs: PathBuf,
    /// Trained parameters, a folder for each expert.
    pub experts: PathBuf,
    /// The state that the joiner and the daemon save for a quick restart. Daemons on one machine
    /// need different folders.
    pub state: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            dataset: "data".into(),
            fm_work: "runs/fm-work".into(),
            fm: "runs/fm".into(),
            logs: "runs/logs".into(),
            experts: "runs/experts".into(),
            state: "runs/state".into(),
        }
    }
}

impl Config {
    /// Reads a configuration file. Relative paths in it start at the file.
    ///
    /// # Errors
    /// The file is missing, or has an unknown key or a bad value; the error names file, line and
    /// key.
    pub fn read(path: &Path) -> Result<Self> {
        let invalid = |reason: String| Error::invalid(format!("{}: {reason}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| {
            invalid(format!("{error}; start from the hypercast.toml of the repository"))
        })?;
        let mut config: Self = toml::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        config.validate().map_err(invalid)?;
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        Ok(config)
    }

    /// Writes the configuration with every key.
    ///
    /// # Errors
    /// The file system fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text =
            toml::to_string_pretty(self).map_err(|error| Error::data(path, error.to_string()))?;
        atomic_file::write(path, text.as_bytes()).map_err(Error::io(path))
    }

    /// The entry of an expert by its name.
    ///
    /// # Errors
    /// There is no such expert; the error lists the names.
    pub fn expert(&self, name: &str) -> Result<&ExpertEntry> {
        self.experts.iter().find(|entry| entry.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.experts.iter().map(|entry| entry.name.as_str()).collect();
            Error::invalid(format!("no expert {name:?} in the configuration; there are {names:?}"))
        })
    }

    /// The surfaces that an expert serves, by index: those it names, or else all that no other
    /// expert of its kind (serving or shadow) names.
    ///
    /// # Errors
    /// The schema does not have a surface that the entry names.
    pub fn serving_surfaces(&self, entry: &ExpertEntry, schema: &Schema) -> Result<Vec<u16>> {
        let index = |name: &String| {
            schema.surface(name).ok_or_else(|| {
                let known = &schema.surfaces;
                Error::invalid(format!(
                    "expert {:?}: unknown surface {name:?}; there are {known:?}",
                    entry.name
                ))
            })
        };
        if !entry.surfaces.is_empty() {
            return entry.surfaces.iter().map(index).collect();
        }
        let named = |surface: &String| {
            let alike = self.experts.iter().filter(|other| other.shadow == entry.shadow);
            alike.flat_map(|other| &other.surfaces).any(|name| name == surface)
        };
        schema.surfaces.iter().filter(|surface| !named(surface)).map(index).collect()
    }

    /// The surfaces on whose rows an expert is trained, by index.
    ///
    /// # Errors
    /// The schema does not have a surface that the entry names.
    pub fn training_surfaces(&self, entry: &ExpertEntry, schema: &Schema) -> Result<Vec<u16>> {
        match entry.train_on {
            TrainOn::Own => self.serving_surfaces(entry, schema),
            TrainOn::All => Ok((0..schema.surfaces.len() as u16).collect()),
        }
    }

    /// The defaults, for a command without a configuration file. Compiled plugins are not cached
    /// then, because there is no folder for them.
    pub fn without_folder() -> Self {
        let plugin_limits = PluginLimits { compiled_mib: 0, ..PluginLimits::default() };
        Self { plugin_limits, ..Self::default() }
    }

    /// The settings of a joiner.
    ///
    /// # Errors
    /// `timeline.until` is neither a date nor a number.
    pub fn joiner(&self) -> Result<JoinerSettings> {
        Ok(JoinerSettings {
            state_dir: self.paths.state.join("join"),
            options: JoinerOptions {
                settings: self.join.clone(),
                history_len: self.fm.max_history,
                max_targets: self.fm.max_targets,
            },
            features: self.features,
            until_ms: self.timeline.until_ms()?,
            on_gap: self.engine.on_gap,
        })
    }

    /// The options for making examples of events without known times.
    pub fn pretraining(&self, until_ms: Option<i64>) -> PretrainingOptions {
        PretrainingOptions {
            until_ms,
            history_len: self.fm.max_history,
            chunk: PRETRAINING_CHUNK,
            passes: self.fm.pretraining_passes,
            seed: self.fm.seed,
            features: self.features,
        }
    }

    /// The options for making examples of the requests of a span of time.
    pub fn replay(&self, span: Span) -> ReplayOptions {
        ReplayOptions {
            span,
            history_len: self.fm.max_history,
            max_targets: self.fm.max_targets,
            features: self.features,
        }
    }

    /// The settings of the Wasm engine: its pool of instances, and its cache of compiled plugins.
    pub fn guests(&self) -> EngineConfig {
        let limits = &self.plugin_limits;
        let cache = CacheConfig {
            folder: self.paths.state.join("compiled"),
            bytes: limits.compiled_mib << 20,
        };
        EngineConfig { cache: (limits.compiled_mib > 0).then_some(cache), ..limits.engine() }
    }

    /// Memory for the bodies of all requests in flight, in bytes: `server.max_inflight_body_mib`,
    /// or more if a single body may have more.
    pub fn inflight_body_bytes(&self) -> usize {
        let most = self.server.max_inflight_body_mib << 20;
        self.body_limits().into_iter().map(|(_, bytes)| bytes).fold(most, usize::max)
    }

    /// The largest body of each kind, in bytes, by the key that sets it.
    pub fn body_limits(&self) -> [(&'static str, usize); 4] {
        [
            ("server.max_body_bytes", self.server.max_body_bytes),
            ("fm_serving.max_body_bytes", self.fm_serving.max_body_bytes),
            ("fm_logging.max_body_bytes", self.fm_logging.max_body_bytes),
            ("rollout.max_push_mib", self.rollout.max_push_mib << 20),
        ]
    }

    /// The limits for loading an expert beside content vectors of a width, 0 without any. That is
    /// the width of those that the caller has in memory: the file can be another one by now.
    /// Callers add what the FM determines.
    pub fn load_options(&self, expert: &str, content_dim: usize) -> LoadOptions {
        let own = self.experts.iter().find(|entry| entry.name == expert).map(|entry| &entry.limits);
        let limits =
            own.map_or_else(|| self.plugin_limits.clone(), |own| self.plugin_limits.with(own));
        let mut options = limits.load_options();
        options.registered = Some(expert.to_owned());
        options.content_dim = content_dim;
        let threads = self.server.threads as f64 * self.plugin_limits.threads_share;
        options.limits.gate.threads = (threads as u32).max(1);
        // Every thread of the server, one for shadows and one for a replay.
        let runs = self.server.threads + 2;
        let candidates = self.server.max_candidates;
        // A trainer's batch has up to four times as many rows to predict, in whole requests.
        let training = &self.expert_training;
        let batch = training.batch_rows.max(training.online_batch_rows).saturating_mul(4);
        let device = self.device;
        let graph = &mut options.graph_limits;
        graph.serving = NetworkUse { device, ..NetworkUse::serving(candidates, runs) };
        graph.training = NetworkUse {
            rows: batch.max(candidates),
            requests: batch,
            device,
            ..NetworkUse::training(batch)
        };
        options
    }

    /// The path of an expert's trained parameters.
    pub fn parameters(&self, entry: &ExpertEntry) -> PathBuf {
        self.paths.experts.join(&entry.name).join("parameters.safetensors")
    }

    fn resolve(&mut self, base: &Path) {
        let paths = &mut self.paths;
        let own = [
            &mut paths.dataset,
            &mut paths.fm_work,
            &mut paths.fm,
            &mut paths.logs,
            &mut paths.experts,
            &mut paths.state,
        ];
        let tiers = self.fm_serving.files().into_iter().chain(self.fm_logging.files());
        let own = own.into_iter().chain(self.server.files()).chain(self.engine.files());
        let own = own.chain(tiers);
        for path in own.chain(self.experts.iter_mut().map(|entry| &mut entry.plugin)) {
            if path.is_relative() && !path.as_os_str().is_empty() {
                *path = base.join(&*path);
            }
        }
    }

    fn validate(&self) -> std::result::Result<(), String> {
        check_positive([
            ("server.threads", self.server.threads),
            ("server.queue", self.server.queue),
            ("server.max_connections", self.server.max_connections),
            ("server.header_timeout_ms", self.server.header_timeout_ms as usize),
            ("server.max_candidates", self.server.max_candidates),
            ("server.max_events", self.server.max_events),
            ("server.max_body_bytes", self.server.max_body_bytes),
            ("server.max_inflight_body_mib", self.server.max_inflight_body_mib),
            ("fm_serving.queue", self.fm_serving.queue),
            ("fm_serving.batch_candidates", self.fm_serving.batch_candidates),
            ("fm_serving.max_body_bytes", self.fm_serving.max_body_bytes),
            ("fm_logging.queue", self.fm_logging.queue),
            ("fm_logging.batch_candidates", self.fm_logging.batch_candidates),
            ("fm_logging.max_body_bytes", self.fm_logging.max_body_bytes),
            ("features.history_events", self.features.history_events),
            ("features.max_users", self.features.max_users),
            ("features.max_items", self.features.max_items),
            ("features.max_counter_keys", self.features.max_counter_keys),
            ("engine.segment_mib", self.engine.segment_mib as usize),
            ("join.max_impressions", self.join.max_impressions),
            ("join.save_every_events", self.join.save_every_events as usize),
            ("logs.rows_per_file", self.logs.rows_per_file),
            ("expert_training.epochs", self.expert_training.epochs),
            ("expert_training.max_epochs", self.expert_training.max_epochs),
            ("expert_training.batch_rows", self.expert_training.batch_rows),
        ])?;
        self.server.validate()?;
        self.engine.validate()?;
        serving::validate_tiers(&self.fm_serving, &self.fm_logging)?;
        self.plugin_limits.validate()?;
        self.join.validate()?;
        check_share_above_0("publish.share", self.publish.share)?;
        self.fm_gate.validate()?;
        self.rollout.validate()?;
        self.recorded.validate()?;
        check_share_below_1("logs.skip_share", self.logs.skip_share)?;
        self.timeline.until_ms().map_err(|error| format!("timeline.until: {error}"))?;
        self.fm.validate().map_err(|error| error.to_string())?;
        plugins::validate_experts(&self.experts, &self.plugin_limits)
    }
}

/// Checks that counts and sizes are not 0.
fn check_positive<N: PartialEq + Default + Display>(
    values: impl IntoIterator<Item = (&'static str, N)>,
) -> std::result::Result<(), String> {
    let positive = |(key, value)| check(value != N::default(), key, value, "at least 1");
    values.into_iter().try_for_each(positive)
}

fn check_share(key: &str, share: f64) -> std::result::Result<(), String> {
    check((0.0..=1.0).contains(&share), key, share, "from 0 to 1")
}

fn check_share_above_0(key: &str, share: f64) -> std::result::Result<(), String> {
    check(share > 0.0 && share <= 1.0, key, share, "above 0 and at most 1")
}

fn check_share_below_1(key: &str, share: f64) -> std::result::Result<(), String> {
    check((0.0..1.0).contains(&share), key, share, "at least 0 and below 1")
}

/// The error for a value that does not fit says what it must be.
fn check(
    fits: bool,
    key: &str,
    value: impl Display,
    must_be: &str,
) -> std::result::Result<(), String> {
    if fits { Ok(()) } else { Err(format!("{key} is {value}; it must be {must_be}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hypercast.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused_with_their_place() {
        let error = read("[server]\nlisen = \"x\"\n").unwrap_err().to_string();
        assert!(error.contains("lisen") && error.contains("line 2"), "{error}");
        let error = read("[server]\nthreads = 0\n").unwrap_err().to_string();
        assert!(error.contains("server.threads"), "{error}");
        let error = read("[[experts]]\nname = \"a b\"\nplugin = \"x\"\n").unwrap_err().to_string();
        assert!(error.contains("experts[0].name"), "{error}");
    }

    #[test]
    fn a_logging_tier_keeps_its_own_defaults() {
        let config =
            read("[fm_logging]\nqueue = 7\n[fm_serving]\nqueue = 8\ndevice = \"cpu\"\n").unwrap();
        let logging = FmTierConfig { queue: 7, ..FmTierConfig::logging() };
        assert_eq!(config.fm_logging, logging);
        let serving = FmTierConfig::serving();
        let serving = FmTierConfig { queue: 8, device: Some(DeviceKind::Cpu), ..serving };
        assert_eq!(config.fm_serving, serving);
        assert_ne!(FmTierConfig::logging(), FmTierConfig::serving());
        let error = read("[fm_logging]\nquue = 7\n").unwrap_err().to_string();
        assert!(error.contains("quue") && error.contains("fm_logging"), "{error}");
        let error = read("[fm_logging]\nurl = \"http://x\"\n").unwrap_err().to_string();
        assert!(error.contains("fm_logging.url"), "{error}");
    }

    #[test]
    fn the_explained_file_has_every_key_at_its_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../hypercast.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let explained: toml::Value = toml::from_str(&text).unwrap();
        let mut config: Config = toml::from_str(&text).unwrap();
        assert!(!config.experts.is_empty(), "an example expert is shown");
        config.experts.clear();
        assert_eq!(config, Config::default(), "the file shows the defaults");
        let defaults = toml::Value::try_from(Config::default()).unwrap();
        for (table, keys) in defaults.as_table().unwrap() {
            let shown = explained.get(table).unwrap_or_else(|| panic!("{table} is missing"));
            for key in keys.as_table().into_iter().flat_map(|keys| keys.keys()) {
                assert!(shown.get(key).is_some(), "{table}.{key} is not explained");
            }
        }
    }
}
