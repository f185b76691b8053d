//! Versions: which FMs and experts there are, what state they are in, and which
//! of them answers whom (paper section 3.3.3).
//!
//! The registry is a stream of changes ([`crate::engine::Topic::versions`]); its state is their sum, and
//! a change is appended only where the state it was decided on still holds. It holds no weights.

use serde::{Deserialize, Serialize};

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
