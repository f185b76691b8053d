//! What measures and shows HyperCast: [`demo`] runs all of it end to end, [`evaluate`] measures it
//! without a daemon, [`experiment`] makes the paper's tables, and [`bench`] measures speed.
//!
//! The daemon links nothing of this crate; its binary is `hypercast-lab`.

pub mod bench;
pub mod commands;
pub mod demo;
pub mod error;
pub mod evaluate;
pub mod experiment;
pub mod program;

pub use error::{Error, Result};
