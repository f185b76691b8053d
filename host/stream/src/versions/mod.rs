//! Versions: which FMs and experts there are, what state they are in, and which
//! of them answers whom (paper sections 3.3.3 and 3.3.4).
//!
//! The registry is a stream of decisions ([`crate::engine::Topic::versions`]); its state is their sum ([`Registry`]), and
//! a decision (`rules`) is appended only where the state it was made on still holds ([`Versions`]). It holds no weights.

mod describe;
mod own;
mod registry;
mod rules;
mod split;
mod stream;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::{
    describe::{NewExpert, keep},
    own::{OwnExpert, register_own_expert, register_own_fm},
    registry::{ExpertVersions, Registry},
    rules::Promotion,
    split::{choose, place},
    stream::{Follower, Versions, register_expert, register_fm},
};
use hypercast_data::schema::Schema;

/// What a version is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VersionState {
    /// It learns, and nobody is answered with it.
    Training,
    /// It sees real requests, and its answers are only measured.
    Shadow,
    /// It answers. Its embeddings are logged, as a shadow's are.
    Active,
    /// It is out of use.
    Retired,
}

/// Where a version's weights are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// In files that do not change: an FM's checkpoint folder, an expert's parameter file.
    Path(PathBuf),
    /// In the version's own stream, where its trainer publishes them ([`crate::publish`]).
    Published,
}

/// A version of the FM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmVersion {
    /// Semver, which experts' `fm-version` speaks of.
    pub version: String,
    /// What it is used for; a new one is training.
    pub state: VersionState,
    /// The version that it began as.
    #[serde(default)]
    pub parent: Option<String>,
    /// The checkpoint of it that it began from.
    #[serde(default)]
    pub from_checkpoint: Option<PathBuf>,
    /// [`schema_hash`] of the data that it learns from.
    pub schema: String,
    /// Values of its TAE.
    pub tae_dim: usize,
    /// When it was registered, milliseconds since the epoch.
    pub created_ms: i64,
    /// Time of the newest request that it had learned from then, milliseconds since the epoch; 0 for none.
    #[serde(default)]
    pub trained_ms: i64,
    /// Where its weights are.
    pub weights: Weights,
}

/// A version of an expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertVersion {
    /// The expert's name: versions of one name take turns, or share users.
    pub name: String,
    /// Semver.
    pub version: String,
    /// What it is used for; a new one is training.
    pub state: VersionState,
    /// The version that it began as.
    #[serde(default)]
    pub parent: Option<String>,
    /// The component.
    pub plugin: PathBuf,
    /// [`content_hash`] of the component: another file is not served as this version.
    pub plugin_hash: String,
    /// The version that the component says it has.
    pub plugin_version: String,
    /// The FM versions that the component accepts, a semver requirement.
    pub accepts_fm: String,
    /// The one FM version whose TAEs it learns and serves with.
    pub fm: String,
    /// [`schema_hash`] of the data that it learns from.
    pub schema: String,
    /// Values of the TAE that it reads.
    pub tae_dim: usize,
    /// Whether it goes without the TAE (zeros in its place).
    #[serde(default)]
    pub without_tae: bool,
    /// The surfaces that it serves, by name.
    pub surfaces: Vec<String>,
    /// When it was registered, milliseconds since the epoch.
    pub created_ms: i64,
    /// Time of the newest request that it had learned from then, milliseconds since the epoch; 0 if that is not known.
    #[serde(default)]
    pub trained_ms: i64,
    /// Where its parameters are.
    pub weights: Weights,
}

/// The users of an expert by version: shares above 0, which sum to 1.
pub type Shares = BTreeMap<String, f64>;

/// One thing that changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// There is a new FM version.
    FmRegistered {
        /// All of it.
        fm: FmVersion,
    },
    /// There is a new version of an expert.
    ExpertRegistered {
        /// All of it.
        expert: Box<ExpertVersion>,
    },
    /// An FM version is used for something else.
    FmState {
        /// Which.
        version: String,
        /// For what.
        state: VersionState,
    },
    /// An expert's version is used for something else.
    ExpertState {
        /// Whose.
        name: String,
        /// Which.
        version: String,
        /// For what.
        state: VersionState,
    },
    /// A training expert goes on with another FM version.
    Pinned {
        /// Whose.
        name: String,
        /// Which.
        version: String,
        /// The FM version.
        fm: String,
    },
    /// An expert's users are shared otherwise.
    Traffic {
        /// Whose.
        name: String,
        /// By version; empty where none answers any more.
        shares: Shares,
    },
    /// An expert's users are shared as they were before the last time that they were shared otherwise.
    RolledBack {
        /// Whose.
        name: String,
        /// As they were.
        shares: Shares,
    },
}

/// A record of the stream: changes that hold together or not at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// When, milliseconds since the epoch.
    pub at_ms: i64,
    /// In order.
    pub changes: Vec<Change>,
}

/// Names a schema by its content: models of one hash read the same columns.
pub fn schema_hash(schema: &Schema) -> String {
    content_hash(toml::to_string(schema).expect("a schema was TOML").as_bytes())
}

/// Names bytes by their content (64-bit FNV-1a, in hex). It tells what was changed by mistake, not by an enemy.
pub fn content_hash(bytes: &[u8]) -> String {
    format!("{:016x}", fnv(bytes))
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
