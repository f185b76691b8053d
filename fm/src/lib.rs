//! The foundation model (FM): HSTU over lifelong, cross-surface user histories. For each candidate
//! of a request it computes a target-aware embedding (TAE, paper section 3.1), on which experts
//! build, and predictions of the main tasks.
//!
//! The crate holds the model, its training and its inference. It knows nothing of experts, of data
//! set files, of streams or of servers: callers hand it [`example::Example`]s and get numbers.
//!
//! ```text
//!  example ──> sampling ──> batch ──> model ──> loss ──> trainer ──> checkpoint ──> inference
//!  (request,   (what a      (jagged   (tokens,  (eq. 3)  (AdamW,     (fm.json,      (encoded
//!   history,    step         arrays)   HSTU,              Adagrad,    weights,       histories,
//!   targets)    learns)                TAE,               resume)     store/)        candidates)
//!                                      heads)                │                          ^
//!                                                            └────── update ────────────┘
//!                                                              (new weights, while serving)
//! ```
//!
//! A model is trained, written as a checkpoint and served:
//!
//! ```
//! use std::sync::Arc;
//!
//! use hypercast_fm::{
//!     device::DeviceKind,
//!     example::{Example, Item, Outcome, Target, User},
//!     inference::{self, FmServingOptions},
//!     label_scale::LabelTransform,
//!     spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
//!     trainer,
//! };
//!
//! let config = FmConfig { dim: 8, heads: 1, qk_dim: 8, v_dim: 8, ..FmConfig::default() };
//! let spec = FmSpec {
//!     surfaces: vec!["home".into()],
//!     actions: 1,
//!     values: 0,
//!     item_ids: 0,
//!     item_dense: 0,
//!     item_optional: Vec::new(),
//!     features: 0,
//!     profile_ids: vec![],
//!     id_widths: Default::default(),
//!     tasks: vec![TaskSpec {
//!         name: "click".into(),
//!         main: true,
//!         label: TaskLabel::Action(0),
//!         transform: LabelTransform::Identity,
//!         surfaces: vec![true],
//!         weight: 1.0,
//!     }],
//!     content: 0,
//!     training_only: Default::default(),
//!     alignments: Default::default(),
//! };
//! let candidate = |id| Target {
//!     item: Arc::new(Item { id, ..Item::default() }),
//!     ids: vec![],
//!     features: vec![],
//!     outcome: Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN },
//!     truth: vec![],
//! };
//! let request = Example {
//!     request: 1,
//!     user: Arc::new(User::default()),
//!     surface: 0,
//!     time_ms: 0,
//!     history: vec![],
//!     targets: vec![candidate(7), candidate(8)],
//! };
//!
//! let dir = tempfile::tempdir()?;
//! let mut trainer = trainer::create(&dir.path().join("work"), &config, &spec, DeviceKind::Cpu)?;
//! trainer.step(&[&request])?; // predicts, then learns
//! trainer.checkpoint(&dir.path().join("fm"), "1.0.0")?;
//!
//! let fm = inference::load(&dir.path().join("fm"), FmServingOptions::default())?;
//! let output = fm.infer(&[&request])?;
//! assert_eq!(output.main.len(), 2); // a click probability for each candidate
//! assert_eq!(output.tae.len(), 2 * config.tae_width());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod alignment;
pub mod alignment_spec;
pub mod base_rate;
pub mod batch;
mod cache_warmup;
pub mod checkpoint;
pub mod cost;
pub mod device;
mod ema;
pub mod example;
pub mod fields;
pub mod growth;
pub mod harm;
mod hash_rng;
pub mod history;
pub mod hstu;
pub mod inference;
mod influence;
pub mod label_scale;
mod live_model;
pub mod loss;
pub mod metrics;
pub mod model;
mod resume;
pub mod row_keys;
pub mod runtime;
pub mod sampling;
pub mod serving;
mod serving_batch;
mod shard;
pub mod spec;
pub mod standardise;
mod step_output;
pub mod threads;
pub mod trainer;
pub mod training_only;
pub mod update;

use hypercast_core::error::ErrorKind;

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration value that is out of range or contradicts another.
    #[error("FM configuration: {0}")]
    Config(String),
    /// An example whose features or surface do not match the model's specification.
    #[error("request {request}: {message}")]
    Example {
        /// The request's id.
        request: u64,
        /// What does not match, with both values.
        message: String,
    },
    /// A checkpoint that cannot be read or written.
    #[error("FM checkpoint {path}: {message}")]
    Checkpoint {
        /// The file or folder at fault.
        path: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// An update that a serving model refused; the weights in service did not change.
    #[error("update of the FM: {0}")]
    Update(String),
    /// A folder could not be replaced or removed, or the device is not in this build.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// The embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Core(error) => error.kind(),
            Error::Store(error) => error.kind(),
            _ => ErrorKind::Internal,
        }
    }
}

/// A result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
