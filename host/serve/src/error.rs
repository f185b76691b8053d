//! The errors of this crate: its own, and those of the crates below it.

use hypercast_core::error::ErrorKind;

pub(crate) use hypercast_core::error::CommonErrors;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another error, with what it happened to in front.
    #[error("{what}: {source}")]
    Context {
        /// What failed, as the beginning of a sentence.
        what: String,
        /// What a caller can do about it.
        kind: ErrorKind,
        /// The error itself.
        source: Box<Error>,
    },
    /// A failure of the crates below, which do not know of requests.
    #[error(transparent)]
    Below(hypercast_stream::Error),
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl<E: Into<hypercast_stream::Error>> From<E> for Error {
    fn from(error: E) -> Self {
        Error::Below(error.into())
    }
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Context { kind, .. } => *kind,
            Error::Below(error) => error.kind(),
        }
    }

    /// Puts what failed in front of the error; its kind stays.
    pub(crate) fn within(self, what: impl Into<String>) -> Self {
        Error::Context { what: what.into(), kind: self.kind(), source: Box::new(self) }
    }

    /// Marks an error in something that the host provides itself, such as its configuration or a
    /// version that it serves. It is internal, whatever its kind is for the operator. Refusals by a
    /// rule and services that do not answer keep their kind.
    pub(crate) fn of_the_host(self) -> Self {
        let kind = match self.kind() {
            kind @ (ErrorKind::Refused | ErrorKind::Unavailable) => kind,
            ErrorKind::Invalid | ErrorKind::Unfit | ErrorKind::Internal => ErrorKind::Internal,
        };
        Error::Context { what: "on the host's side".into(), kind, source: Box::new(self) }
    }
}
