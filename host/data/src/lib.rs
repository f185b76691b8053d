//! From files to examples: the meaning of a data set, what was known at each moment, and the logs
//! on which experts train.
//!
//! Nothing here runs a model, serves a request or reads a stream: callers pass impressions,
//! predictions and embeddings.
//!
//! ```text
//! importers (hypercast-import), simulation
//!        │
//!        ▼
//! data set (Parquet) ── dataset ── timeline: requests and outcomes in time order
//!        │ schema                        │ features: histories, counters, effects
//!        ▼                               ▼
//! synthetic requests              examples ── FM ──► logs (Parquet with TAEs) ──► experts
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`schema`] | the meaning of a data set's columns, and the labels of its tasks |
//! | [`dataset`] | the data set's directory, and the order in which its events became known |
//! | [`check`] | what is wrong with a data set, before a model learns it |
//! | [`simulate`] | a data set whose true probabilities are known |
//! | [`features`] | the state that turns a request into an example, in training and serving |
//! | [`logs`] | feature logs with target-aware embeddings |
//! | [`ranked_place`] | where a daemon ranked an item that was shown |
//! | [`tae`] | the precision of embeddings on the wire and in logs |
//! | [`synthetic`] | made-up requests of any size, for benches and tests of one expert |
//!
//! ```
//! use hypercast_data::{
//!     dataset::Dataset,
//!     features::FeatureConfig,
//!     features::replay::{Replay, ReplayOptions},
//!     simulate::{SimulateOptions, simulate},
//! };
//!
//! let dir = tempfile::tempdir()?;
//! let into = dir.path().join("data");
//! let size = SimulateOptions { into, users: 9, items: 16, requests: 20, surfaces: 2, seed: 7 };
//! simulate(&size)?;
//! let dataset = Dataset::open(&size.into)?;
//! let options = ReplayOptions {
//!     span: Default::default(),
//!     history_len: 8,
//!     max_targets: 16,
//!     features: FeatureConfig::default(),
//! };
//! let examples = Replay::new(&dataset, options)?.collect::<Result<Vec<_>, _>>()?;
//! assert_eq!((examples.len(), examples[0].targets.len()), (20, 6));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod check;
pub mod dataset;
pub mod error;
pub mod features;
pub mod logs;
pub mod ranked_place;
pub mod schema;
pub mod simulate;
pub mod synthetic;
pub mod tae;
pub mod versioned;

pub use error::{Error, Result};
