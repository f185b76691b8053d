//! Durable streams ([`engine`]) and what travels in them: event records ([`ingest`]), joined
//! examples ([`join`]), published weights ([`publish`]) and decisions on versions ([`versions`]).
//!
//! Nothing here trains, and nothing here answers requests.

pub mod engine;
pub mod error;
pub mod ingest;
pub mod join;
pub mod publish;
pub mod versions;

pub use error::{Error, Result};
