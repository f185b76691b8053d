//! Errors that any crate can meet, and the distinction that every caller needs: what the caller
//! did wrong apart from what failed here.
//!
//! A crate's own error enum wraps [`Error`], or the enum of a crate below it that does.
//! [`CommonErrors`] gives all of them the same constructors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller's input is wrong; the same call fails again.
    Invalid,
    /// A rule forbids it in the present state.
    Refused,
    /// An expert does not fit what serves.
    Unfit,
    /// Something that is needed does not answer at the moment; try again.
    Unavailable,
    /// The failure is ours.
    Internal,
}

/// An error that is not specific to one crate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: Arc<std::io::Error>,
    },
    /// A file's content is not what it should be.
    #[error("{}: {reason}", path.display())]
    Data {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do about it.
        reason: String,
    },
    /// An option or argument is outside its range.
    #[error("{0}")]
    Invalid(String),
    /// A rule forbids what was asked for.
    #[error("refused: {0}")]
    Refused(String),
    /// A server does not answer, or a queue is full.
    #[error("{0}")]
    Unreachable(String),
    /// Something failed that no caller can mend.
    #[error("{0}")]
    Internal(String),
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Invalid(_) => ErrorKind::Invalid,
            Error::Refused(_) => ErrorKind::Refused,
            Error::Unreachable(_) => ErrorKind::Unavailable,
            Error::Io { .. } | Error::Data { .. } | Error::Internal(_) => ErrorKind::Internal,
        }
    }
}

/// Constructors that the error enums of all crates share, because each wraps [`Error`].
pub trait CommonErrors: From<Error> {
    /// An input/output error at `path`.
    fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source: Arc::new(source) }.into()
    }

    /// What a call gave at `path`; `None` if nothing is there.
    ///
    /// # Errors
    /// Every other input/output error.
    fn found<T>(
        path: impl AsRef<Path>,
        given: std::io::Result<T>,
    ) -> std::result::Result<Option<T>, Self> {
        match given {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            given => given.map(Some).map_err(Self::io(path)),
        }
    }

    /// Bad content in `path`.
    fn data(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().to_path_buf(), reason: reason.into() }.into()
    }

    /// An option or argument of the caller that is outside its range.
    fn invalid(reason: impl Into<String>) -> Self {
        Error::Invalid(reason.into()).into()
    }

    /// Something that a rule forbids.
    fn refused(reason: impl Into<String>) -> Self {
        Error::Refused(reason.into()).into()
    }

    /// A server that does not answer, or a full queue.
    fn unreachable(reason: impl Into<String>) -> Self {
        Error::Unreachable(reason.into()).into()
    }

    /// A failure that is ours.
    fn internal(reason: impl Into<String>) -> Self {
        Error::Internal(reason.into()).into()
    }
}

impl<E: From<Error>> CommonErrors for E {}
