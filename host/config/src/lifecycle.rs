//! How the system lives: where its streams are, how long impressions wait for
//! their outcomes, and what is published when.

use std::path::PathBuf;

use hypercast_data::features::FeatureConfig;
use serde::{Deserialize, Serialize};

/// The streams (`hypercast_stream::engine`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSettings {
    /// A directory, or NATS JetStream.
    pub kind: EngineKind,
    /// The directory, where streams are kept in one; a folder each.
    pub dir: PathBuf,
    /// Where NATS is, as `nats://HOST:PORT`; several are separated by commas.
    pub nats_url: String,
    /// What the names of NATS' streams begin with, so that several systems can share a server.
    pub nats_prefix: String,
    /// Whether an append to the directory waits for the disk, or only for the operating system. NATS has a setting of its own.
    pub fsync: bool,
    /// Bytes of a stream's file before the next one is begun, in MiB.
    pub segment_mib: u64,
    /// The most that a stream keeps, in MiB, oldest records first to go; 0 keeps everything.
    pub retain_mib: u64,
    /// Ids of the newest records that a stream remembers, so that what is sent again is not kept twice.
    pub remembered_ids: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            kind: EngineKind::Directory,
            dir: "runs/streams".into(),
            nats_url: "nats://127.0.0.1:4222".into(),
            nats_prefix: "hypercast".into(),
            fsync: true,
            segment_mib: 64,
            retain_mib: 0,
            remembered_ids: 1_000_000,
        }
    }
}

/// What keeps the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Files of this machine.
    #[default]
    Directory,
    /// NATS JetStream.
    Nats,
}

/// Dynamic join (`hypercast_stream::join`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinSettings {
    /// Whether the daemon joins; else `hypercast join` does, in a process of its own.
    pub in_daemon: bool,
    /// The share of a surface's outcomes that its window waits for, by the delays seen so far.
    pub quantile: f64,
    /// The shortest window, in seconds.
    pub min_window_s: u64,
    /// The longest window, in seconds.
    pub max_window_s: u64,
    /// The window before enough delays were seen, in seconds.
    pub first_window_s: u64,
    /// How long after its example an outcome still makes a correction, in seconds.
    pub correction_s: u64,
    /// How far ahead of the machine's clock an event's time may be, in seconds: the joiner's clock never goes back, so one
    /// wrong time would close every window. 0 takes any time.
    pub max_future_s: u64,
    /// Impressions that wait, or can be corrected, at most; beyond it the oldest are let go.
    pub max_impressions: usize,
    /// After so long without events the clock of the machine closes windows, in milliseconds; 0 leaves that to events alone,
    /// as a replay of the past needs.
    pub tick_ms: u64,
    /// Events after which the state is saved, so that a restart need not begin at the first one.
    pub save_every_events: u64,
}

impl Default for JoinSettings {
    fn default() -> Self {
        Self {
            in_daemon: true,
            quantile: 0.99,
            min_window_s: 5,
            max_window_s: 3600,
            first_window_s: 600,
            correction_s: 86_400,
            max_future_s: 300,
            max_impressions: 1_000_000,
            tick_ms: 1000,
            save_every_events: 1_000_000,
        }
    }
}

/// What a joiner is opened with.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinerSettings {
    /// The folder of its state.
    pub state_dir: PathBuf,
    /// `[join]`.
    pub join: JoinSettings,
    /// `[features]`.
    pub features: FeatureConfig,
    /// The end of the past that features begin with, milliseconds since the epoch; none without one.
    pub until_ms: Option<i64>,
    /// Events of a user's history in an example, at most.
    pub history_len: usize,
    /// Targets of an example, at most.
    pub max_targets: usize,
}

/// Publishing (`hypercast_stream::publish`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// The share of the weights that a delta holds at most.
    pub share: f64,
    /// Publications after which what moved at all is sent, however little it moved.
    pub starve_after: u32,
    /// Seconds between publications.
    pub every_s: u64,
    /// Deltas after which everything is published again, so that who begins to follow has few to apply.
    pub snapshot_every: u32,
    /// zstd's level.
    pub zstd_level: i32,
}

impl Default for PublishSettings {
    fn default() -> Self {
        Self { share: 0.3, starve_after: 5, every_s: 60, snapshot_every: 100, zstd_level: 3 }
    }
}

impl JoinSettings {
    pub(super) fn validate(&self) -> Result<(), String> {
        if !(0.5..=1.0).contains(&self.quantile) {
            return Err(format!("join.quantile is {}; it must be from 0.5 to 1", self.quantile));
        }
        if self.min_window_s > self.max_window_s {
            return Err(format!(
                "join.min_window_s is {}, above join.max_window_s {}",
                self.min_window_s, self.max_window_s
            ));
        }
        Ok(())
    }
}

impl PublishSettings {
    pub(super) fn validate(&self) -> Result<(), String> {
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(format!("publish.share is {}; it must be above 0, at most 1", self.share));
        }
        Ok(())
    }
}
