//! A training job fails with the errors of the streams, stores, models and experts that it uses.

pub(crate) use hypercast_core::error::CommonErrors;
pub use hypercast_stream::error::{Error, Result};
