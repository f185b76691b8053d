//! The errors of this crate: its own, and those of the crates below it.

use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;
use serde::Serialize;

/// A failure to read, check or write data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, an option, or an external program.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// An embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
    /// The foundation model failed.
    #[error(transparent)]
    Fm(#[from] hypercast_fm::Error),
    /// A Parquet file could not be read or written.
    #[error("{}: {source}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the Parquet library reports.
        source: parquet::errors::ParquetError,
    },
    /// Two ids that are texts have one key, so one of them cannot be taken.
    #[error(
        "the ids {given:?} and {taken:?} have the same key {key}; give one of them another name"
    )]
    IdCollision {
        /// The key of both.
        key: u64,
        /// The id that has it already.
        taken: String,
        /// The id that is refused.
        given: String,
    },
    /// A schema contradicts itself; the message names the entry.
    #[error("schema: {0}")]
    Schema(String),
}

/// Writes a file of readable JSON, which replaces an older one at once.
///
/// # Errors
/// The value cannot be JSON, or the file system fails.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::data(path, error.to_string()))?;
    atomic_file::write(path, (text + "\n").as_bytes()).map_err(Error::io(path))
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Core(error) => error.kind(),
            Error::Store(error) => error.kind(),
            Error::Fm(error) => error.kind(),
            Error::Parquet { .. } => ErrorKind::Internal,
            Error::IdCollision { .. } | Error::Schema(_) => ErrorKind::Invalid,
        }
    }

    /// A Parquet error at `path`.
    pub fn parquet(path: impl AsRef<Path>) -> impl FnOnce(parquet::errors::ParquetError) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Parquet { path, source }
    }
}
