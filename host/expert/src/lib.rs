//! The expert runtime: plugins as descriptions that the host checks, trains and runs.
//!
//! ```text
//!   component.wasm                 examples and TAEs
//!        │                                │
//!      wasm      loads and calls it     batch       builds the network's inputs
//!        │                                │ normalise  standardises them
//!      graph     checks its network       │
//!        └──────────────┬─────────────────┘
//!          params  its trained parameters
//!        ┌──────────────┴──────────────┐
//!      train                        runtime    answers requests
//!        │                            │ breaker, cpu_budget  limit slow and failing plugins
//!        │                            │ counters             metrics and logs
//!        │                          network    on the CPU: compiled
//!        └────────── executor ────────┘        on a GPU, and for what is not compiled
//!          oracle  plain f64 loops for tests, with the bounds of what f32 may give
//! ```
//!
//! It is not the foundation model (an example comes with its TAEs), a server, a stream or a reader
//! of logs. It is the only crate that uses wasmtime.
//!
//! Every fault of a guest is data ([`ExpertFault`]), and a request with a fault falls back to the
//! FM's ranking. A component is checked before any of its code runs:
//!
//! ```
//! use hypercast_core::error::ErrorKind;
//! use hypercast_expert::{Engine, EngineConfig, Limits, Plugin};
//!
//! let engine = Engine::new(EngineConfig::default())?;
//! let refused = Plugin::from_bytes(&engine, "mine", b"hello", &Limits::default()).err().unwrap();
//! let said = refused.to_string();
//! assert!(said.starts_with("expert `mine` is refused: it is not a WebAssembly file."), "{said}");
//! assert_eq!(refused.kind(), ErrorKind::Unfit);
//! # Ok::<(), hypercast_expert::Error>(())
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Returns the broken rule as an error, with the arguments of `format!`, if the condition is true.
macro_rules! refuse_if {
    ($condition:expr, $($rule:tt)+) => {
        if $condition {
            return Err(format!($($rule)+));
        }
    };
}

pub mod batch;
pub mod breaker;
mod compiled;
pub mod counters;
pub mod cpu_budget;
mod error;
pub mod executor;
mod fm_rows;
pub mod graph;
mod guest_columns;
pub mod network;
pub mod normalise;
pub mod oracle;
pub mod params;
mod plan;
pub mod runtime;
#[cfg(test)]
mod tests;
pub mod train;
pub mod wasm;

pub use hypercast_fm::device::DeviceKind as Device;

pub use breaker::BreakerConfig;
pub use error::{Error, upgrade};
pub use fm_rows::{FmRows, InputScales, Tae};
pub use normalise::{FeatureStatistics, Normaliser};
pub use params::{Parameters, Provenance, SavedParameters};
pub use runtime::{
    Blueprint, ExpertPredictions, ExpertTimes, LoadOptions, RankOutcome, ServedExpert,
};
pub use train::{Chunk, ExpertTrainer, TrainerConfig};
pub use wasm::{CacheConfig, Engine, EngineConfig, ExpertFault, Fault, Limits, Plugin};

/// Locks counts, which a panic elsewhere cannot leave half-written.
fn lock<T>(counts: &Mutex<T>) -> MutexGuard<'_, T> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}
