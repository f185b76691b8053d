//! What every crate of HyperCast uses, and nothing that knows what HyperCast does: errors, files
//! that are replaced as a whole, locks of work directories, shutdown, supervised threads, logging,
//! progress, the clock, hashing and quantiles.
//!
//! ```text
//! error         the errors that any crate can meet, and what a caller can do about each
//! atomic_file   replace a file as a whole      atomic_dir the same for a folder
//! dir_lock      one process a work directory
//! shutdown      finish the step and save       clock      wall clock, processor time, priority
//! supervised_thread   a thread whose panic is not missed
//! background_job      a job on a thread of its own
//! logging       lines on standard error        progress   bars of long commands
//! disk          files, by the names of std::fs    entropy  numbers that nobody can guess
//! simulated     the hook by which a simulator owns clock, disk and entropy of a thread
//! hash          SplitMix64                     hex        bytes as text
//! quantile      the one definition             prerequisite   what tests need beside the code
//! secret_file   tokens and keys, read only if other users cannot read them
//! text_table    tables for people, whose columns fit their cells
//! ```
//!
//! ```
//! use hypercast_core::error::{CommonErrors as _, Error, ErrorKind};
//!
//! let error = Error::invalid("--minutes is 0; it must be above 0");
//! assert_eq!(error.kind(), ErrorKind::Invalid);
//! ```

pub mod atomic_dir;
pub mod atomic_file;
pub mod background_job;
pub mod clock;
pub mod dir_lock;
pub mod disk;
pub mod entropy;
pub mod error;
pub mod hash;
pub mod hex;
pub mod logging;
pub mod prerequisite;
pub mod progress;
pub mod quantile;
pub mod secret_file;
pub mod shutdown;
pub mod simulated;
pub mod supervised_thread;
pub mod text_table;

pub use error::{Error, Result};
