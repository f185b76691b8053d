//! The Wasm boundary, and the only module that knows wasmtime.
//!
//! A [`Plugin`] is a checked component. Every call runs in a fresh instance from a pool, with a
//! deadline, a memory limit and an output limit, and every fault of a guest becomes an
//! [`ExpertFault`]. A call blocks until its deadline at most: run it on a blocking thread, never on
//! an async worker. Graphs and models are outside this module.
//!
//! A plugin of an earlier contract is a [`Plugin`] as any other: `contract` has the types of the
//! present one, `contract2` turns those of the contract before into them, and `guest` chooses.
//!
//! To add a limit: a field of [`Limits`] in `plugin` (or of [`EngineConfig`], if the pool has to
//! know it), its check where the resource is used, and a [`Fault`] for a guest that exceeds it.

mod cache;
mod check;
mod column;
pub mod contract;
mod contract2;
mod description;
mod engine;
mod fault;
mod guest;
mod plugin;
mod usage;

pub use cache::CacheConfig;
pub use engine::{Engine, EngineConfig};
pub use fault::{Call, ExpertFault, Fault};
pub use plugin::{Instance, Limits, Plugin};
pub use usage::{CallTotals, GuestLog, LogLine, LogRate, UsageSnapshot};
