//! Rollouts of pushed versions (`hypercast_serve::rollout`): the keys that may push, the conditions
//! that a version must meet, and the sample of requests that is recorded for replays. Private keys
//! and the signed content belong to the rollout itself.

use hypercast_core::hex::{hex, unhex};
use ring::digest;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use crate::error::{CommonErrors as _, Error};
use crate::{check_share, check_share_above_0, check_share_below_1};

/// The step after which a rollout waits for an operator.
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
    /// After enough requests as a shadow
    Shadow,
    /// After enough requests as a canary
    Canary,
    /// After no step
    #[default]
    Never,
}

/// Whose pushes are accepted, and the conditions that a version must meet before it answers all
/// users: `[rollout]`. A push may ask for stricter conditions, never for weaker ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutSettings {
    /// Public keys whose signatures are accepted, as "ed25519:HEX" (`hypercast plugin keygen`
    /// prints one). Names of experts after a space, separated by commas, are all that the key may
    /// push: "ed25519:HEX feed,search". A key has one entry. Without keys, nothing can be pushed.
    pub trusted_keys: Vec<String>,
    /// The name of this deployment. A signature that names another one is refused, and with a name
    /// here also one that names none (`hypercast plugin sign --audience`).
    pub audience: String,
    /// The largest push, component and parameters together, in MiB.
    pub max_push_mib: usize,
    /// The most disk space for all pushed files, in MiB. Files of retired versions are removed
    /// first.
    pub repository_mib: u64,
    /// Earlier versions that stay loaded for a rollback. Older versions are retired.
    pub keep_versions: usize,
    /// The step after which a rollout waits for `hypercast versions promote`: "shadow", "canary" or
    /// "never".
    pub stop_after: StopAfter,
    /// Recorded requests that are replayed with a version before it receives others. 0 replays
    /// none.
    pub replay_requests: usize,
    /// Requests that a version must receive as a shadow.
    pub shadow_requests: u64,
    /// The share of users that a version answers as a canary. 1.0 skips the canary.
    pub canary_share: f64,
    /// The fewest requests that a version must answer as a canary.
    pub canary_requests: u64,
    /// The shortest time that a version is a canary, in seconds.
    pub canary_s: u64,
    /// The longest time for a step, in seconds. A version without enough requests by then is
    /// rejected.
    pub step_most_s: u64,
    /// A version is rejected or rolled back if more than this share of its requests in a window
    /// fault.
    pub fault_share: f64,
    /// A version is also rejected or rolled back if its p99 latency in a window is above that of
    /// the version before it, times this factor, plus `latency_slack_ms`.
    pub latency_factor: f64,
    /// The constant part of that limit, in milliseconds.
    pub latency_slack_ms: f64,
    /// The window for faults and latency, in seconds.
    pub window_s: u64,
    /// Time after a promotion in which a version can still be rolled back automatically, in
    /// seconds.
    pub watch_s: u64,
}

impl Default for RolloutSettings {
    fn default() -> Self {
        Self {
            trusted_keys: Vec::new(),
            audience: String::new(),
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

/// The sample of answered requests that is recorded for replays: `[recorded]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordedSettings {
    /// The share of requests that is recorded. 0.0 records none.
    pub share: f64,
    /// Requests that may wait to be written. Further requests are skipped and counted.
    pub queue: usize,
    /// The number of files. When all are full, the oldest is overwritten.
    pub files: usize,
    /// Size of all files together, in MiB.
    pub mib: u64,
}

impl Default for RecordedSettings {
    fn default() -> Self {
        Self { share: 0.01, queue: 32, files: 16, mib: 256 }
    }
}

impl RolloutSettings {
    /// The keys whose signatures are accepted.
    ///
    /// # Errors
    /// An entry is not a key, or not a list of names after it; two entries give one key different
    /// names.
    pub fn keys(&self) -> crate::Result<Vec<TrustedKey>> {
        let mut keys: Vec<TrustedKey> = Vec::new();
        for (at, text) in self.trusted_keys.iter().enumerate() {
            let own = TrustedKey::parse(text)?;
            if let Some(first) = keys.iter().position(|other| other.key == own.key)
                && keys[first].names != own.names
            {
                return Err(Error::invalid(format!(
                    "entries {} and {} give the key {} different names; write one entry with all \
                     that it may push",
                    first + 1,
                    at + 1,
                    own.key.text()
                )));
            }
            keys.push(own);
        }
        Ok(keys)
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        self.keys().map_err(|error| format!("rollout.trusted_keys: {error}"))?;
        check_share_above_0("rollout.canary_share", self.canary_share)?;
        check_share_below_1("rollout.fault_share", self.fault_share)?;
        if !(self.latency_factor >= 1.0 && self.latency_slack_ms >= 0.0) {
            return Err(
                "rollout.latency_factor must be at least 1, latency_slack_ms at least 0".into()
            );
        }
        if self.max_push_mib == 0 || self.window_s == 0 || self.step_most_s == 0 {
            return Err("rollout.max_push_mib, window_s and step_most_s must be at least 1".into());
        }
        Ok(())
    }
}

impl RecordedSettings {
    pub(super) fn validate(&self) -> Result<(), String> {
        check_share("recorded.share", self.share)?;
        if self.queue == 0 || self.files < 2 || self.mib == 0 {
            return Err(
                "recorded.queue and mib must be at least 1, recorded.files at least 2".into()
            );
        }
        Ok(())
    }
}

/// A key whose signatures are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedKey {
    /// The key.
    pub key: PublicKey,
    /// The experts that it may push; empty for any.
    pub names: Vec<String>,
}

impl TrustedKey {
    /// Parses an entry of `rollout.trusted_keys`.
    ///
    /// # Errors
    /// The text is not a key, or a name after it is empty.
    pub fn parse(text: &str) -> crate::Result<Self> {
        let Some((key, names)) = text.trim().split_once(char::is_whitespace) else {
            return Ok(Self { key: PublicKey::parse(text)?, names: Vec::new() });
        };
        let names: Vec<String> = names.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(|name| name.is_empty() || name.contains(char::is_whitespace)) {
            return Err(Error::invalid(format!(
                "{text:?} has an empty name, or one with a space; expected \"{PUBLIC_KEY}HEX\" and \
                 names separated by commas"
            )));
        }
        Ok(Self { key: PublicKey::parse(key)?, names })
    }

    /// Whether it may push the expert `name`.
    pub fn may_push(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|allowed| allowed == name)
    }
}

/// The prefix of a public key in text; 64 hex digits follow.
const PUBLIC_KEY: &str = "ed25519:";

/// An Ed25519 key that verifies the signatures of pushes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// Parses a key as a configuration contains it.
    ///
    /// # Errors
    /// The text is not `ed25519:` and 64 hex digits.
    pub fn parse(text: &str) -> crate::Result<Self> {
        let bytes = text.trim().strip_prefix(PUBLIC_KEY).and_then(unhex);
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
            Error::invalid(format!(
                "{text:?} is not a public key; expected \"{PUBLIC_KEY}\" and 64 hex digits, as \
                 `hypercast plugin keygen` prints it"
            ))
        })
    }

    /// The key as a configuration contains it: `ed25519:` and 64 hex digits.
    pub fn text(&self) -> String {
        format!("{PUBLIC_KEY}{}", hex(&self.0))
    }

    /// A short name for logs and responses: the first 16 hex digits of its SHA-256.
    pub fn id(&self) -> String {
        sha256(&self.0)[..16].to_owned()
    }

    /// Whether this key made `signature` (64 bytes) over `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

/// The SHA-256 of `bytes`, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_stands_twice_must_say_the_same() {
        let key = |letter: &str| format!("{PUBLIC_KEY}{}", letter.repeat(64));
        let settings = |keys: &[String]| RolloutSettings {
            trusted_keys: keys.to_vec(),
            ..RolloutSettings::default()
        };
        let [a, upper, b] = [key("a"), key("A"), key("b")];
        for other in [format!("{upper} feed"), format!("{a} feed,search")] {
            let why = settings(&[a.clone(), b.clone(), other]).validate().unwrap_err();
            assert!(why.contains("trusted_keys") && why.contains("entries 1 and 3"), "{why}");
            assert!(why.contains(&a), "{why}");
        }
        settings(&[a.clone(), upper, b]).validate().unwrap();
    }
}
