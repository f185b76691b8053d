//! How the system lives: where its streams are, how long impressions wait for
//! their outcomes, and what is published when.

use std::path::PathBuf;

use hypercast_data::features::FeatureConfig;
use serde::{Deserialize, Serialize};

/// Where streams are kept: `[engine]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSettings {
    /// "directory" (one machine) or "nats" (NATS JetStream, across machines).
    pub kind: EngineKind,
    /// The directory.
    pub dir: PathBuf,
    /// The NATS server. Several are separated by commas.
    pub nats_url: String,
    /// Prefix of the stream names in NATS, so that several systems can share a server.
    pub nats_prefix: String,
    /// Whether an append to the directory waits for the disk. NATS has its own setting
    /// (sync_interval).
    pub fsync: bool,
    /// Size of a stream's file at which the next one is begun, in MiB.
    pub segment_mib: u64,
    /// The most that a stream keeps, in MiB; the oldest records go first. 0 keeps everything.
    pub retain_mib: u64,
    /// Newest record ids that a stream remembers, so that a record that is sent again is not stored
    /// twice.
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

/// The storage behind the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Files of this machine.
    #[default]
    Directory,
    /// NATS JetStream.
    Nats,
}

/// How long impressions wait for their outcomes: `[join]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinSettings {
    /// Whether the daemon joins. Otherwise run `hypercast join` as a process of its own.
    pub in_daemon: bool,
    /// A surface's window is as long as this share of its outcomes has taken so far.
    pub quantile: f64,
    /// The shortest window, in seconds.
    pub min_window_s: u64,
    /// The longest window, in seconds.
    pub max_window_s: u64,
    /// The window until enough delays were seen, in seconds.
    pub first_window_s: u64,
    /// Time after its example in which an outcome still makes a correction, in seconds.
    pub correction_s: u64,
    /// The most that an event's time may be ahead of the machine's clock, in seconds. The joiner's
    /// time never goes back, so one wrong time would close every window. 0 accepts any time.
    pub max_future_s: u64,
    /// Impressions that wait or can still be corrected. The oldest are released first.
    pub max_impressions: usize,
    /// Without events for so long, the machine's clock closes windows, in milliseconds. 0 leaves
    /// that to events, as a replay of the past needs.
    pub tick_ms: u64,
    /// Events between two saves of the joiner's state, so that a restart need not begin at the
    /// first event.
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
    /// The end of the past that features begin with, milliseconds since the epoch; none without
    /// one.
    pub until_ms: Option<i64>,
    /// Events of a user's history in an example, at most.
    pub history_len: usize,
    /// Targets of an example, at most.
    pub max_targets: usize,
}

/// What trainers publish, and how often: `[publish]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// The share of the weights in a delta: those that moved most.
    pub share: f64,
    /// After so many publications a weight that moved at all is sent, however little it moved.
    pub starve_after: u32,
    /// Seconds between publications.
    pub every_s: u64,
    /// Deltas between two snapshots. A new follower applies at most so many.
    pub snapshot_every: u32,
    /// Compression level of zstd.
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
