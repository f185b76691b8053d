//! The laboratory of HyperCast: everything that measures or shows the product.
//!
//! - [`demo`] runs it end to end on real data, or with `--streaming` the whole loop live,
//! - [`evaluate`] measures FM and experts on a data set without a daemon,
//! - [`experiment`] makes the paper's tables,
//! - [`verdict`] says in words what FM and experts bring,
//! - [`bench`] measures speed beside rivals.
//!
//! Its binary is `hypercast-lab`. It is not part of the product: the daemon links nothing of this
//! crate, and demo and benches start the installed `hypercast` program, as an operator does
//! ([`processes`]). No model code is here; metrics are those of `hypercast_fm::metrics`.
//!
//! ```
//! use hypercast_lab::bench::BenchReport;
//!
//! let mut report = BenchReport::new("lab");
//! report.versus("a read", 2.0, "ms", "a rival", 6.0);
//! assert_eq!(report.results[0].ratio, Some(3.0), "3 times better");
//! ```

pub mod bench;
mod bootstrap;
pub mod commands;
pub mod demo;
pub mod error;
pub mod evaluate;
pub mod experiment;
pub mod metrics;
pub mod processes;
pub mod ranking;
pub mod reliability;
mod tally;
pub mod verdict;

pub use error::{Error, Result};
