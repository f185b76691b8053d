//! The daemon: it ranks candidates over HTTP, receives events, and changes the versions that serve
//! while requests run.
//!
//! It does not train models and has no command line: the binary in `host/src` starts it. Which
//! version is promoted is an operator's decision, made by a command or by signing a push.
//!
//! The way of a rank request. The three numbered stages have threads of their own, and no thread
//! waits for another stage:
//!
//! ```text
//!  client ── http::listen ── http::auth ── http::routes       one async task a connection
//!             TLS, limits     tokens          │
//!                                             ▼
//!                               request::admission            refused here if it would be late
//!                                             │
//!          ┌──────────────────────────────────┤
//!          ▼                                  │
//!   request::service::fetch ── feature_state  │               1. features, on a worker thread
//!          │                                  │
//!          ▼                                  │
//!   fm::batcher (or fm::remote)               │               2. the FM: TAEs and main tasks
//!          │                                  │
//!          ▼                                  │
//!   request::service::rank ── versions::serving_set           3. the expert, on a worker thread
//!          │
//!          ├── answer (http::respond)
//!          ├── metrics, metrics::prediction_log               counted; waits for the outcome
//!          ├── request_log                                    a sample, for replays
//!          └── versions::shadow                               versions that only measure
//! ```
//!
//! Beside requests, [`versions`] follows the registry and published weights, [`request::streams`]
//! follows events and outcomes, and [`rollout`] brings pushed versions into service step by step.
//! Each folder's first paragraph says what is in it.

pub mod error;
pub mod fm;
pub mod http;
pub mod metrics;
pub mod request;
pub mod request_log;
pub mod rollout;
mod threads;
pub mod versions;

pub use error::{Error, Result};
pub use http::{admin, client, reload};
pub use request::{api, convert};

#[cfg(test)]
mod fixtures {
    use hypercast_stream::registry::{ExpertVersion, FmVersion, VersionState, WeightsLocation};

    /// An expert version that trains and publishes its weights.
    pub(crate) fn expert_version(name: &str, version: &str) -> ExpertVersion {
        ExpertVersion {
            name: name.into(),
            version: version.into(),
            state: VersionState::Training,
            parent: None,
            plugin: "p.wasm".into(),
            plugin_hash: "1".into(),
            sha256: None,
            plugin_version: "0.1.0".into(),
            accepts_fm: "*".into(),
            fm: "1.0.0".into(),
            schema: "a".into(),
            earlier_schemas: Vec::new(),
            columns: None,
            tae_dim: 32,
            flops: None,
            without_tae: false,
            surfaces: vec!["feed".into()],
            created_ms: 1,
            trained_ms: 1,
            weights: WeightsLocation::Published,
        }
    }

    /// An FM version that trains and publishes its weights.
    pub(crate) fn fm_version(version: &str) -> FmVersion {
        FmVersion {
            version: version.into(),
            state: VersionState::Training,
            parent: None,
            from_checkpoint: None,
            schema: "a".into(),
            earlier_schemas: Vec::new(),
            columns: Vec::new(),
            tae_dim: 32,
            one_stage_flops: None,
            created_ms: 1,
            trained_ms: 1,
            weights: WeightsLocation::Published,
        }
    }

    /// A rollout of an expert version that was just accepted, under the default policy.
    pub(crate) fn rollout(expert: ExpertVersion) -> crate::rollout::Rollout {
        use crate::rollout::{PolicyOverrides, Rollout, RolloutPolicy, RolloutStep};
        let settings = hypercast_config::RolloutSettings::default();
        Rollout {
            expert,
            key: "k".into(),
            created_ms: 1,
            begun_ms: 1,
            step: RolloutStep::Replay,
            since_ms: 1,
            lasted_ms: 0,
            previous: None,
            displaced: Vec::new(),
            limits: RolloutPolicy::new(&settings, &PolicyOverrides::default()).unwrap(),
            before_us: None,
            settled: false,
            cause: None,
            log: Vec::new(),
        }
    }
}
