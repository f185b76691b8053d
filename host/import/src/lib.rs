//! From the files that a team has to the directory that `hypercast_data::dataset` reads.
//!
//! An importer reads what is there and decides nothing about models. A row that cannot be used is
//! counted and reported in `import-report.json`; a missing file or column ends the import.
//!
//! | module | content |
//! |---|---|
//! | [`action_table`] | what a policy does in each situation, or a model expects |
//! | [`events`] | bodies of `POST /v1/events` |
//! | [`infer`] | a first mapping, from what is in the files |
//! | [`mapping`] | any files, by a mapping of their columns |
//! | [`preset`] | public data sets: mappings that we ship |

pub mod action_table;
mod cell;
pub mod error;
pub mod events;
mod id_collector;
pub mod infer;
mod input;
pub mod mapping;
mod packed_row;
mod prefetch;
pub mod preset;
mod ranges;
mod report;
mod requests;
mod sort;
mod sorted_dataset;
mod text;

pub use cell::TimeUnit;
pub use error::{Error, Result};
pub use input::{FileFormat, InputOptions};
pub use ranges::InferredRange;
pub use report::{BadRow, FileReport, ImportReport};
