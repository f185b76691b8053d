//! How pushed versions come to serve (`hypercast_serve::rollout`), and which requests are
//! recorded for their replays (`hypercast_serve::request_log`).

use serde::{Deserialize, Serialize};

use crate::keys::PublicKey;

/// Where a rollout waits for an operator.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Default,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum StopAfter {
    /// After it has seen enough requests as a shadow
    Shadow,
    /// After it has answered enough users as a canary
    Canary,
    /// Nowhere
    #[default]
    Never,
}

/// Rollouts: whose pushes are taken, and what a version must stand before it answers everybody. A push may ask for more
/// care than this, never for less.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutSettings {
    /// Public keys whose signatures are taken, as `ed25519:HEX`. Without any, nothing can be pushed.
    pub trusted_keys: Vec<String>,
    /// The largest push: component and parameters together, in MiB.
    pub max_push_mib: usize,
    /// What pushed components and parameters may take on the disk, in MiB; those of retired versions go first.
    pub repository_mib: u64,
    /// Versions that answered before and stay loaded for a rollback; older ones are retired.
    pub keep_versions: usize,
    /// Where a rollout waits for `hypercast versions promote`: never, or after its shadow or canary.
    pub stop_after: StopAfter,
    /// Recorded requests that a version is tried with before it sees any other, at most.
    pub replay_requests: usize,
    /// Requests that it sees as a shadow.
    pub shadow_requests: u64,
    /// The share of the users that it answers as a canary; 1 leaves the canary out.
    pub canary_share: f64,
    /// Requests that it answers as a canary, at least.
    pub canary_requests: u64,
    /// How long it is a canary at least, in seconds.
    pub canary_s: u64,
    /// How long a step may last, in seconds; a version without enough requests by then is given up.
    pub step_most_s: u64,
    /// The share of its requests that may fault, over the window.
    pub fault_share: f64,
    /// How many times the p99 of the version before its own may be, in the same window.
    pub latency_factor: f64,
    /// And how much beyond that, in milliseconds.
    pub latency_slack_ms: f64,
    /// The window that faults and latency are looked at over, in seconds.
    pub window_s: u64,
    /// How long a promoted version is watched, and rolled back where it fails, in seconds.
    pub watch_s: u64,
}

impl Default for RolloutSettings {
    fn default() -> Self {
        Self {
            trusted_keys: Vec::new(),
            max_push_mib: 128,
            repository_mib: 4096,
            keep_versions: 1,
            stop_after: StopAfter::Never,
            replay_requests: 200,
            shadow_requests: 200,
            canary_share: 0.1,
            canary_requests: 200,
            canary_s: 60,
            step_most_s: 3600,
            fault_share: 0.01,
            latency_factor: 1.5,
            latency_slack_ms: 5.0,
            window_s: 60,
            watch_s: 900,
        }
    }
}

/// Recorded requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordedSettings {
    /// The share of the answered requests that is recorded; 0 for none.
    pub share: f64,
    /// Requests that may wait to be written; more are not recorded, and counted.
    pub queue: usize,
    /// Files of the ring, the oldest first to go.
    pub files: usize,
    /// What they may take together, in MiB.
    pub mib: u64,
}

impl Default for RecordedSettings {
    fn default() -> Self {
        Self { share: 0.01, queue: 32, files: 16, mib: 256 }
    }
}

impl RolloutSettings {
    /// The keys whose signatures are taken.
    ///
    /// # Errors
    /// A text that is no key.
    pub fn keys(&self) -> crate::error::Result<Vec<PublicKey>> {
        self.trusted_keys.iter().map(|text| PublicKey::parse(text)).collect()
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        self.keys().map_err(|error| format!("rollout.trusted_keys: {error}"))?;
        if !(self.canary_share > 0.0 && self.canary_share <= 1.0) {
            let share = self.canary_share;
            return Err(format!("rollout.canary_share is {share}; it must be above 0, at most 1"));
        }
        if !(0.0..1.0).contains(&self.fault_share) {
            let share = self.fault_share;
            return Err(format!("rollout.fault_share is {share}; it must be at least 0, below 1"));
        }
        if !(self.latency_factor >= 1.0 && self.latency_slack_ms >= 0.0) {
            return Err(
                "rollout.latency_factor must be at least 1, latency_slack_ms at least 0".into()
            );
        }
        match [self.max_push_mib, self.window_s as usize, self.step_most_s as usize].contains(&0) {
            true => Err("rollout.max_push_mib, window_s and step_most_s must be at least 1".into()),
            false => Ok(()),
        }
    }
}

impl RecordedSettings {
    pub(super) fn validate(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.share) {
            return Err(format!("recorded.share is {}; it must be from 0 to 1", self.share));
        }
        match self.queue == 0 || self.files < 2 || self.mib == 0 {
            true => {
                Err("recorded.queue and mib must be at least 1, recorded.files at least 2".into())
            }
            false => Ok(()),
        }
    }
}
