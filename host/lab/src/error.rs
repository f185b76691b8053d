//! The crate's error is that of whichever crate below it failed: its caller only prints it.

pub use anyhow::{Error, Result};
pub(crate) use hypercast_core::error::CommonErrors;
