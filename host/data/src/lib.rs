//! From files to examples: the [`schema`], the [`dataset`] and its timeline, [`import`]ers, live
//! [`features`], and the feature [`logs`] that experts train on.
//!
//! Nothing here runs a model or serves a request.

pub mod dataset;
pub mod error;
pub mod features;
pub mod import;
pub mod labels;
pub mod logs;
pub mod schema;
pub mod synthetic;
pub mod tae;

pub use error::{Error, Result};
