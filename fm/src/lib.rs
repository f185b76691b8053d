//! The foundation model (FM): HSTU over lifelong, cross-surface histories that
//! gives a target-aware embedding (TAE) for each candidate (paper, section 3.1).
//!
//! Data flows one way through the files: [`example`] (what happened) →
//! [`batch`] (jagged arrays) → [`model`] (embedding, HSTU, TAE, heads) →
//! [`loss`] → [`trainer`] (which may learn from a part: [`sampling`]), or [`inference`] for a checkpoint. The crate knows
//! nothing of experts, files of a data set, or servers.

pub mod alignment;
mod average;
pub mod batch;
mod chance;
pub mod checkpoint;
pub mod cost;
pub mod device;
pub mod example;
pub mod history;
pub mod hstu;
pub mod inference;
mod live;
pub mod loss;
pub mod metrics;
pub mod model;
pub mod priority;
mod probe;
mod resume;
pub mod sampling;
pub mod serving;
mod shard;
pub mod spec;
pub mod standardise;
pub mod trainer;
pub mod update;
mod warm;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration value that cannot work.
    #[error("FM configuration: {0}")]
    Config(String),
    /// An example that does not fit the model's specification.
    #[error("request {request}: {message}")]
    Example {
        /// The request's id.
        request: u64,
        /// What does not fit.
        message: String,
    },
    /// A checkpoint that cannot be read or written.
    #[error("FM checkpoint {path}: {message}")]
    Checkpoint {
        /// The file or folder.
        path: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// An update of a serving model that does not fit it; the model goes on as it is.
    #[error("update of the FM: {0}")]
    Update(String),
    /// The device is not available in this build.
    #[error("{0}")]
    Device(String),
    /// The embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
    /// Training went wrong in a way that more steps would not mend.
    #[error("FM training, step {step}: {message}")]
    Training {
        /// The optimizer step.
        step: u64,
        /// What happened.
        message: String,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
