//! The errors of this crate: its own, and those of the crates below it.

use hypercast_core::error::ErrorKind;

pub(crate) use hypercast_core::error::CommonErrors;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, an option, or a service that does not answer.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// An embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
    /// The foundation model failed.
    #[error(transparent)]
    Fm(#[from] hypercast_fm::Error),
    /// A schema, a data set or a log is not usable.
    #[error(transparent)]
    Data(#[from] hypercast_data::Error),
    /// An expert was refused, or failed outside of a request.
    #[error(transparent)]
    Expert(#[from] hypercast_expert::Error),
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] hypercast_config::Error),
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
    /// A stream, the join, a publication or the registry failed.
    #[error(transparent)]
    Stream(#[from] hypercast_stream::Error),
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Context { kind, .. } => *kind,
            Error::Core(error) => error.kind(),
            Error::Data(error) => error.kind(),
            Error::Config(error) => error.kind(),
            Error::Stream(error) => error.kind(),
            Error::Store(_) | Error::Fm(_) => ErrorKind::Internal,
            Error::Expert(_) => ErrorKind::Unfit,
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
