//! `hypercast.toml`: everything an operator chooses, in one file.
//!
//! Unknown keys are refused, paths are relative to the file, and every key has
//! a default that works. The file at the root of the repository explains each
//! key; a test keeps it complete.

pub mod error;
mod keys;
mod lifecycle;
mod plugins;
mod reload;
mod rollout;
mod serving;

use std::path::{Path, PathBuf};

pub use self::keys::{PublicKey, sha256};
pub use self::lifecycle::{
    EngineKind, EngineSettings, JoinSettings, JoinerSettings, PublishSettings,
};
pub use self::plugins::{ExpertLimits, PluginLimits};
pub use self::reload::Reloaded;
pub use self::rollout::{RecordedSettings, RolloutSettings, StopAfter};
pub use self::serving::{FmTierConfig, Server, Tier};

use hypercast_fm::{device::DeviceKind, spec::FmConfig};
use serde::{Deserialize, Serialize};

use crate::error::CommonErrors as _;
pub use crate::error::{Error, Result};
use hypercast_data::features::{
    FeatureConfig,
    replay::{PRETRAINING_CHUNK, PretrainingOptions},
};
use hypercast_data::logs::{LogOptions, TaeStorage};
use hypercast_data::schema::Schema;
use hypercast_expert::{CacheConfig, EngineConfig, LoadOptions};

/// The content of `hypercast.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Files and folders.
    pub paths: Paths,
    /// The HTTP server, and the tier of experts behind it.
    pub server: Server,
    /// The tier that runs the FM for candidates.
    pub fm_serving: FmTierConfig,
    /// The tier that runs the FM for served items.
    #[serde(default = "FmTierConfig::logging", deserialize_with = "serving::logging_keys")]
    pub fm_logging: FmTierConfig,
    /// The part of the data set that is the past.
    pub timeline: Timeline,
    /// Bounds of the live features: histories and counters.
    pub features: FeatureConfig,
    /// The foundation model's size and training.
    pub fm: FmConfig,
    /// Where models run.
    pub device: DeviceKind,
    /// The streams that carry events, examples, weights and versions.
    pub engine: EngineSettings,
    /// How long impressions wait for their outcomes.
    pub join: JoinSettings,
    /// What trainers publish, and how often.
    pub publish: PublishSettings,
    /// What is logged for expert training.
    pub logs: Logs,
    /// How experts are trained.
    pub expert_training: ExpertTraining,
    /// Limits of every plugin.
    pub plugin_limits: PluginLimits,
    /// How pushed versions come to serve.
    pub rollout: RolloutSettings,
    /// Which answered requests are recorded.
    pub recorded: RecordedSettings,
    /// Which plugin serves which surfaces.
    pub experts: Vec<ExpertEntry>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            paths: Paths::default(),
            server: Server::default(),
            fm_serving: FmTierConfig::serving(),
            fm_logging: FmTierConfig::logging(),
            timeline: Timeline::default(),
            features: FeatureConfig::default(),
            fm: FmConfig::default(),
            device: DeviceKind::default(),
            engine: EngineSettings::default(),
            join: JoinSettings::default(),
            publish: PublishSettings::default(),
            logs: Logs::default(),
            expert_training: ExpertTraining::default(),
            plugin_limits: PluginLimits::default(),
            rollout: RolloutSettings::default(),
            recorded: RecordedSettings::default(),
            experts: Vec::new(),
        }
    }
}

/// Files and folders; relative paths start at the configuration file.
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
    /// What the joiner and the daemon save, so that a restart is quick. Daemons on one machine need
    /// different folders.
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

/// The part of the data set that is the past.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeline {
    /// Training, and the state that `serve` starts from, end before this time: a date
    /// ("2022-04-29") or milliseconds since 1970. "" takes the whole data set.
    pub until: String,
    /// The offset of that date's time zone from UTC, in hours.
    pub utc_offset_h: i32,
}

impl Timeline {
    /// `until` in milliseconds since the epoch; none for the whole data set.
    ///
    /// # Errors
    /// A text that is neither a date nor a number.
    pub fn until_ms(&self) -> Result<Option<i64>> {
        match self.until.as_str() {
            "" => Ok(None),
            text => parse_time_ms(text, self.utc_offset_h).map(Some),
        }
    }
}

/// Parses a date (`2022-04-29`, meaning its midnight) or milliseconds since 1970.
///
/// # Errors
/// A text that is neither.
pub fn parse_time_ms(text: &str, utc_offset_h: i32) -> Result<i64> {
    if let Ok(ms) = text.parse::<i64>() {
        return Ok(ms);
    }
    let wrong = || {
        Error::invalid(format!(
            "{text:?} is neither a date like 2022-04-29 nor milliseconds since the epoch"
        ))
    };
    let parts: Vec<i64> = text
        .split('-')
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| wrong())?;
    let [year, month @ 1..=12, day @ 1..=31] = parts[..] else { return Err(wrong()) };
    // Days since the epoch in the proleptic Gregorian calendar, counting years from March.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day
            - 1
            - 719_468;
    Ok(days * 86_400_000 - i64::from(utc_offset_h) * 3_600_000)
}

/// What is logged for expert training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Logs {
    /// The share of the training stream, from its start, that is not logged because its TAEs are
    /// still poor.
    pub skip_share: f64,
    /// Events of the same surface that are logged with a request, for the experts' short histories.
    pub history_len: usize,
    /// Rows in a file.
    pub rows_per_file: usize,
    /// Time after which the logging tier (`hypercast materialise --follow`) ends a file, in
    /// seconds. Experts that follow wait that long. 0 ends files by rows alone.
    pub file_seconds: u64,
    /// How TAEs are stored: "f32", or "bf16" with about half the bytes.
    pub tae: TaeStorage,
}

impl Config {
    /// What a joiner is opened with.
    ///
    /// # Errors
    /// `timeline.until` is not a time.
    pub fn joiner(&self) -> Result<JoinerSettings> {
        Ok(JoinerSettings {
            state_dir: self.paths.state.join("join"),
            join: self.join.clone(),
            features: self.features,
            until_ms: self.timeline.until_ms()?,
            history_len: self.fm.max_history,
            max_targets: self.fm.max_targets,
        })
    }

    /// How events without known times become examples for the FM.
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
}

impl Logs {
    /// The settings of a log writer.
    pub fn options(&self) -> LogOptions {
        LogOptions {
            history_len: self.history_len,
            rows_per_file: self.rows_per_file,
            file_seconds: self.file_seconds,
            tae: self.tae,
        }
    }
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            skip_share: 0.3,
            history_len: 32,
            rows_per_file: 100_000,
            file_seconds: 60,
            tae: TaeStorage::F32,
        }
    }
}

/// How experts are trained, on a past and behind a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertTraining {
    /// Passes over the logs.
    pub epochs: usize,
    /// Rows in a batch, in whole requests.
    pub batch_rows: usize,
    /// AdamW's peak learning rate; it warms up and then falls to a tenth. An expert's `schedule`
    /// scales it.
    pub learning_rate: f64,
    /// The constant learning rate of an expert that follows the stream.
    pub online_learning_rate: f64,
    /// Rows in a batch of an expert that follows the stream, in whole requests.
    pub online_batch_rows: usize,
    /// Decay of the moving average of dense parameters, which predicts and serves. 0 turns it off.
    pub average_decay: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Limit of the gradient norm.
    pub clip_norm: f64,
    /// Seed of initial values, dropout and order.
    pub seed: u64,
}

impl Default for ExpertTraining {
    fn default() -> Self {
        Self {
            epochs: 2,
            batch_rows: 512,
            learning_rate: 2e-3,
            online_learning_rate: 5e-4,
            online_batch_rows: 128,
            average_decay: 0.99,
            weight_decay: 1e-4,
            clip_norm: 5.0,
            seed: 7,
        }
    }
}

/// One expert in service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertEntry {
    /// Names its parameter folder, and appears in metrics and responses.
    pub name: String,
    /// The component, as `cargo hypercast build -p mlp-fusion --out FILE` writes it.
    pub plugin: PathBuf,
    /// The surfaces that it serves, by name. [] means every surface that no other expert names.
    #[serde(default)]
    pub surfaces: Vec<String>,
    /// Train and run it with zeros in place of the TAE: a baseline that shows what the TAE is
    /// worth.
    #[serde(default)]
    pub without_tae: bool,
    /// Run beside the serving expert of its surfaces and only report, for a comparison before a
    /// switch.
    #[serde(default)]
    pub shadow: bool,
    /// The rows that it learns from: "own" surfaces, or "all" (for surfaces with few rows of their
    /// own).
    #[serde(default)]
    pub train_on: TrainOn,
    /// Limits of this plugin that are stricter than [plugin_limits]: deadline_ms, memory_mib,
    /// output_mib, instances_each, log_lines_per_s, log_bytes_per_s. Weaker ones are refused.
    #[serde(default)]
    pub limits: ExpertLimits,
}

/// Which surfaces' rows an expert learns from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// The surfaces it serves.
    #[default]
    Own,
    /// Every surface in the logs: for surfaces with few rows of their own.
    All,
}

impl Config {
    /// Reads a configuration file. Relative paths in it start at the file.
    ///
    /// # Errors
    /// The file is missing, or has an unknown key or a bad value; the error names file, line and
    /// key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::data(path, format!("{error}; start from the hypercast.toml of the repository"))
        })?;
        let mut config: Self =
            toml::from_str(&text).map_err(|error| Error::data(path, error.to_string()))?;
        config.validate().map_err(|message| Error::data(path, message))?;
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        Ok(config)
    }

    /// Writes the configuration.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text =
            toml::to_string_pretty(self).map_err(|error| Error::data(path, error.to_string()))?;
        std::fs::write(path, text).map_err(|error| Error::data(path, error.to_string()))
    }

    /// The entry of an expert.
    ///
    /// # Errors
    /// There is no such expert; the error lists those that there are.
    pub fn expert(&self, name: &str) -> Result<&ExpertEntry> {
        self.experts.iter().find(|entry| entry.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.experts.iter().map(|entry| entry.name.as_str()).collect();
            Error::invalid(format!("no expert {name:?} in the configuration; there are {names:?}"))
        })
    }

    /// The surfaces that an expert serves, by index: its own, or all that no other expert of its
    /// kind (serving or shadow) names.
    ///
    /// # Errors
    /// A surface that the schema lacks.
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

    /// The surfaces whose rows an expert learns from, by index.
    ///
    /// # Errors
    /// A surface that the schema lacks.
    pub fn training_surfaces(&self, entry: &ExpertEntry, schema: &Schema) -> Result<Vec<u16>> {
        match entry.train_on {
            TrainOn::Own => self.serving_surfaces(entry, schema),
            TrainOn::All => Ok((0..schema.surfaces.len() as u16).collect()),
        }
    }

    /// The defaults, for a command without a configuration file. Compiled plugins are not kept
    /// then, because no folder belongs to the configuration.
    pub fn without_folder() -> Self {
        let plugin_limits = PluginLimits { compiled_mib: 0, ..PluginLimits::default() };
        Self { plugin_limits, ..Self::default() }
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

    /// The limits that an expert is loaded with, but for what the FM decides.
    pub fn load_options(&self, expert: &str) -> LoadOptions {
        let own = self.experts.iter().find(|entry| entry.name == expert).map(|entry| &entry.limits);
        let limits =
            own.map_or_else(|| self.plugin_limits.clone(), |own| self.plugin_limits.with(own));
        let mut options = limits.load_options();
        let threads = self.server.threads as f64 * self.plugin_limits.threads_share;
        options.limits.gate.threads = (threads as u32).max(1);
        options
    }

    /// An expert's parameter file.
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
            &mut self.engine.dir,
        ];
        let tiers = self.fm_serving.files().into_iter().chain(self.fm_logging.files());
        let own = own.into_iter().chain(self.server.files()).chain(tiers);
        for path in own.chain(self.experts.iter_mut().map(|entry| &mut entry.plugin)) {
            if path.is_relative() && !path.as_os_str().is_empty() {
                *path = base.join(&*path);
            }
        }
    }

    fn validate(&self) -> std::result::Result<(), String> {
        let server = &self.server;
        let positive = [
            ("server.threads", server.threads),
            ("server.queue", server.queue),
            ("server.max_connections", server.max_connections),
            ("server.header_timeout_ms", server.header_timeout_ms as usize),
            ("server.max_candidates", server.max_candidates),
            ("server.max_events", server.max_events),
            ("server.max_body_bytes", server.max_body_bytes),
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
            ("expert_training.batch_rows", self.expert_training.batch_rows),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; it must be at least 1"));
        }
        if !(0.0..1.0).contains(&self.logs.skip_share) {
            return Err(format!(
                "logs.skip_share is {}; it must be at least 0 and below 1",
                self.logs.skip_share
            ));
        }
        if !self.fm_logging.url.is_empty() {
            return Err("fm_logging.url is set, but nothing asks a logging tier in another process yet: `hypercast materialise` runs the FM itself; leave it empty".into());
        }
        let tier = &self.fm_serving;
        if tier.url.starts_with("http:") && !tier.ca.as_os_str().is_empty() {
            return Err(format!(
                "fm_serving.ca is set, but fm_serving.url is {:?}, which is asked without TLS: begin it with https://, or leave ca empty",
                tier.url
            ));
        }
        server.validate()?;
        self.plugin_limits.validate()?;
        self.join.validate()?;
        self.publish.validate()?;
        self.rollout.validate()?;
        self.recorded.validate()?;
        self.timeline.until_ms().map_err(|error| format!("timeline.until: {error}"))?;
        self.fm.validate().map_err(|error| error.to_string())?;
        for (at, entry) in self.experts.iter().enumerate() {
            if entry.name.is_empty()
                || !entry.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            {
                return Err(format!(
                    "experts[{at}].name is {:?}; use letters, digits, - _ .",
                    entry.name
                ));
            }
            if self.experts[..at].iter().any(|other| other.name == entry.name) {
                return Err(format!("two experts are named {:?}", entry.name));
            }
            entry
                .limits
                .validate(&self.plugin_limits)
                .map_err(|why| format!("experts[{at}].limits.{why}"))?;
        }
        Ok(())
    }
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
    fn dates_are_read_by_the_given_clock() {
        assert_eq!(parse_time_ms("1970-01-01", 0).unwrap(), 0);
        assert_eq!(parse_time_ms("2022-04-29", 8).unwrap(), 1_651_161_600_000);
        assert_eq!(parse_time_ms("2000-02-29", 0).unwrap(), 951_782_400_000);
        assert_eq!(parse_time_ms("1651161600000", 8).unwrap(), 1_651_161_600_000);
        assert!(parse_time_ms("29 April", 0).is_err());
        assert!(parse_time_ms("2022-13-01", 0).is_err());
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
