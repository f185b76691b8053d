//! The host's one error type. It names what was wrong and where; what a plugin
//! does wrong is not an error of the host and has its own type.

use std::path::{Path, PathBuf};

/// Anything that the host can refuse or fail at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A Parquet file could not be read or written.
    #[error("{}: {source}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The reader's reason.
        source: parquet::errors::ParquetError,
    },
    /// A file's content is not what it should be.
    #[error("{}: {reason}", path.display())]
    Data {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do about it.
        reason: String,
    },
    /// A stream's records that are no longer kept.
    #[error(
        "stream {topic}: position {position} is no longer kept; the first that is kept is {first}"
    )]
    Gone {
        /// The stream.
        topic: String,
        /// What was asked for.
        position: u64,
        /// The first record that is kept.
        first: u64,
    },
    /// A server that does not answer, or refuses.
    #[error("{0}")]
    Unreachable(String),
    /// A schema that contradicts itself.
    #[error("schema: {0}")]
    Schema(String),
    /// The foundation model failed.
    #[error(transparent)]
    Fm(#[from] hypercast_fm::Error),
    /// An embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
    /// An expert was refused, or failed outside of a request.
    #[error(transparent)]
    Expert(#[from] crate::expert::Error),
    /// A change of versions that a rule forbids.
    #[error("refused: {0}")]
    Refused(String),
    /// An option outside its range, or a tool that failed.
    #[error("{0}")]
    Invalid(String),
}

/// The host's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An input/output error at `path`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A Parquet error at `path`.
    pub fn parquet(path: impl AsRef<Path>) -> impl FnOnce(parquet::errors::ParquetError) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Parquet { path, source }
    }

    /// Bad content in `path`.
    pub fn data(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Data { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }
}
