//! The Wasm boundary: the only place that knows wasmtime.
//!
//! A [`Plugin`] is a checked component. Every call runs in a fresh pooled
//! instance under a deadline, a memory cap and an output cap, and everything a
//! guest can do wrong comes back as an [`ExpertFault`]. Calls are synchronous
//! and may take as long as their deadline: run them on a blocking thread, never
//! on an async worker. Nothing here knows graphs or models.

mod cache;
mod check;
pub mod contract;
mod engine;
mod fault;
mod log;
mod plugin;
mod usage;

pub use cache::CacheConfig;
pub use engine::{Engine, EngineConfig};
pub use fault::{Call, ExpertFault, Fault};
pub use log::{GuestLog, LogLine};
pub use plugin::{Instance, Limits, Plugin};
pub use usage::{LogRate, Spent, UsageSnapshot};
