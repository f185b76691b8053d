//! HyperCast's host: everything around the foundation model and the experts.
pub mod commands;
pub mod dataset;
pub mod error;
pub mod expert;
pub mod features;
pub mod import;
pub mod logs;
pub mod schema;
