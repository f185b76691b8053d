//! Words that every crate of HyperCast uses: errors, the clock, shutdown, the lock of a work
//! directory, logging and progress.
//!
//! Nothing here knows what HyperCast does.

pub mod clock;
pub mod error;
pub mod hash;
pub mod hex;
pub mod owner;
pub mod prerequisite;
pub mod progress;
pub mod quantile;
pub mod stop;
pub mod trace;

pub use error::{Error, Result};
