//! A configuration that cannot be read or used fails with the errors of the schemas and data sets
//! that it names.

pub(crate) use hypercast_core::error::CommonErrors;
pub use hypercast_data::error::{Error, Result};
