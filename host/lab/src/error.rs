//! A lab command fails with the errors of the daemon and of the jobs that it runs.

pub(crate) use hypercast_core::error::CommonErrors;
pub use hypercast_serve::error::{Error, Result};
