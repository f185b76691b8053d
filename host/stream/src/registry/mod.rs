//! The version registry: which versions of FMs and experts exist, what state they are in, and which
//! of them answers which user (paper sections 3.3.3 and 3.3.4).
//!
//! The registry is a stream of decisions ([`crate::streams::Topic::versions`]). Its state follows
//! from all decisions ([`Registry`]). A decision obeys the rules (`rules`), and it is appended only
//! if the state that it was made on is still current ([`RegistryClient`]). The registry has no
//! weights.
//!
//! A newer version of hypercast may write decisions that this one does not know, and a stream can
//! lose records. Such decisions are reported ([`UnappliedDecisions`]), those after them apply, and
//! the process decides nothing more.

mod client;
mod describe;
mod flops_share;
mod rules;
mod self_register;
mod state;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, path::PathBuf};

use hypercast_core::clock::now_ms;
use hypercast_data::schema::Schema;
use serde::{Deserialize, Serialize};

pub use self::{
    client::{RegistryClient, RegistryFollower},
    describe::{NewExpert, ReadExpert, read_version_file},
    rules::Promotion,
    self_register::{SelfRegisteredExpert, self_register_expert, self_register_fm},
    state::{ExpertVersions, Registry, UnappliedDecisions, choose_version, user_bucket},
};

/// What a version is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VersionState {
    /// It is trained and answers no request.
    Training,
    /// It predicts for real requests, but its predictions are only measured.
    Shadow,
    /// It answers requests. Its embeddings are logged, as a shadow's are.
    Active,
    /// It is out of use.
    Retired,
}

impl fmt::Display for VersionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{self:?}").to_lowercase())
    }
}

/// Where a version's weights are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsLocation {
    /// In files that do not change: an FM's checkpoint directory, or an expert's parameter file.
    Path(PathBuf),
    /// In the version's own stream, where its trainer publishes them ([`crate::publish`]).
    Published,
}

/// A version of the FM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmVersion {
    /// The version (semver), which experts' `fm-version` must accept.
    pub version: String,
    /// Its state; a new version is in training.
    pub state: VersionState,
    /// The version that its training began with.
    #[serde(default)]
    pub parent: Option<String>,
    /// The parent's checkpoint that its training began with.
    #[serde(default)]
    pub from_checkpoint: Option<PathBuf>,
    /// [`schema_hash`] of its training data.
    pub schema: String,
    /// The same of the layouts that its schema had before: what was made under one of them goes
    /// with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_schemas: Vec<String>,
    /// The columns of that schema's core, by kind and name; none of a version that was registered
    /// before they were noted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// The width of its TAE.
    pub tae_dim: usize,
    /// Floating-point operations a candidate of a one-stage model of its size
    /// ([`hypercast_fm::cost::one_stage_flops`]); none of a version that was registered before they
    /// were noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_stage_flops: Option<u64>,
    /// When it was registered, milliseconds since the epoch.
    pub created_ms: i64,
    /// The time of the newest request in its training at registration, milliseconds since the
    /// epoch; 0 for none.
    #[serde(default)]
    pub trained_ms: i64,
    /// Where its weights are.
    pub weights: WeightsLocation,
}

/// SHA-256 of the files of an expert's version, in hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHashes {
    /// Of the plugin file.
    pub component: String,
    /// Of the parameter file; none if its trainer publishes its weights.
    #[serde(default)]
    pub parameters: Option<String>,
}

/// A version of an expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertVersion {
    /// The expert's name: versions of one name replace each other, or share users.
    pub name: String,
    /// The version (semver).
    pub version: String,
    /// Its state; a new version is in training.
    pub state: VersionState,
    /// The version that its training began with.
    #[serde(default)]
    pub parent: Option<String>,
    /// The plugin file.
    pub plugin: PathBuf,
    /// [`content_hash`] of the plugin file: another file is not served as this version.
    pub plugin_hash: String,
    /// What its files are, checked on the bytes of each load; none of a version that was registered
    /// before 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<FileHashes>,
    /// The version in the plugin's description.
    pub plugin_version: String,
    /// The FM versions that the plugin accepts, a semver requirement.
    pub accepts_fm: String,
    /// The one FM version whose TAEs it is trained and served with.
    pub fm: String,
    /// [`schema_hash`] of its training data.
    pub schema: String,
    /// The same of the layouts that its schema had before: what was made under one of them goes
    /// with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_schemas: Vec<String>,
    /// The columns of that schema's core that it reads, by kind and name; none if that was not
    /// noted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// The width of the TAE that it reads.
    pub tae_dim: usize,
    /// Floating-point operations a candidate of its network; none if they were not noted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops: Option<u64>,
    /// Whether it runs without the TAE (with zeros instead).
    #[serde(default)]
    pub without_tae: bool,
    /// The surfaces that it serves, by name.
    pub surfaces: Vec<String>,
    /// When it was registered, milliseconds since the epoch.
    pub created_ms: i64,
    /// The time of the newest request in its training at registration, milliseconds since the
    /// epoch; 0 if unknown.
    #[serde(default)]
    pub trained_ms: i64,
    /// Where its parameters are.
    pub weights: WeightsLocation,
}

/// The shares of an expert's users by version: each above 0, in total 1.
pub type Shares = BTreeMap<String, f64>;

/// One change of the registry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// An FM version was registered.
    FmRegistered {
        /// The version.
        fm: FmVersion,
    },
    /// A version of an expert was registered.
    ExpertRegistered {
        /// The version.
        expert: Box<ExpertVersion>,
    },
    /// The state of an FM version changed.
    FmState {
        /// The version.
        version: String,
        /// The new state.
        state: VersionState,
    },
    /// The state of a version of an expert changed.
    ExpertState {
        /// The expert's name.
        name: String,
        /// The version.
        version: String,
        /// The new state.
        state: VersionState,
    },
    /// An expert in training continues with another FM version.
    Pinned {
        /// The expert's name.
        name: String,
        /// The version.
        version: String,
        /// The FM version.
        fm: String,
    },
    /// The shares of an expert's users changed.
    Traffic {
        /// The expert's name.
        name: String,
        /// The new shares; empty if no version answers.
        shares: Shares,
    },
    /// The shares of an expert's users went back to those before the last change.
    RolledBack {
        /// The expert's name.
        name: String,
        /// The previous shares.
        shares: Shares,
    },
}

/// A record of the stream: changes that apply together or not at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// When it was made, milliseconds since the epoch.
    pub at_ms: i64,
    /// The changes in order.
    pub changes: Vec<Change>,
    /// The version of hypercast that made it; empty if that was before 0.2.
    #[serde(default)]
    pub made_by: String,
}

impl Decision {
    /// A decision of this version of hypercast, made now.
    pub fn new(changes: Vec<Change>) -> Self {
        Self { at_ms: now_ms(), changes, made_by: env!("CARGO_PKG_VERSION").into() }
    }
}

/// A hash of a schema's layout: models with the same hash read the same columns.
pub fn schema_hash(schema: &Schema) -> String {
    content_hash(toml::to_string(&schema.layout()).expect("a schema was TOML").as_bytes())
}

/// The hashes of the layouts that a schema had before it grew.
pub fn earlier_schema_hashes(schema: &Schema) -> Vec<String> {
    schema.layouts().skip(1).map(|layout| schema_hash(&layout)).collect()
}

/// A hash of bytes (64-bit FNV-1a, in hex). It detects accidental changes, not attacks.
pub fn content_hash(bytes: &[u8]) -> String {
    format!("{:016x}", fnv(bytes))
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
