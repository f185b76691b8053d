//! Experts: plugins as descriptions that the host checks, trains and runs.
//!
//! The way of an expert: [`wasm`] loads and calls its component, [`graph`]
//! checks its network, [`executor`] runs it on a device, [`params`] owns its
//! parameters, [`train`] trains them, [`runtime`] serves it. Nothing here knows
//! the FM but for the TAE that comes with an example, nor HTTP or files of logs.

pub mod batch;
pub mod breaker;
mod compiled;
pub mod counters;
mod error;
pub mod executor;
pub mod gate;
pub mod graph;
pub mod long_call;
pub mod network;
pub mod normalise;
pub mod params;
mod pool;
pub mod runtime;
#[cfg(test)]
mod tests;
pub mod train;
pub mod wasm;

pub use batch::Tae;
pub use breaker::BreakerConfig;
pub use error::Error;
pub use error::upgrade;
pub use hypercast_fm::device::DeviceKind as Device;
pub use normalise::{FeatureStatistics, Normaliser};
pub use params::{Parameters, Provenance, SavedParameters};
pub use runtime::{Blueprint, Expert, ExpertTimes, LoadOptions, Predictions, RankOutcome};
pub use train::{Chunk, ExpertTrainer, TrainerConfig};
pub use wasm::{CacheConfig, Engine, EngineConfig, ExpertFault, Fault, Limits, Plugin};
