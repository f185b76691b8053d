//! The errors of this crate: its own, and those of the crates below it.

pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;

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
            Error::Core(error) => error.kind(),
            Error::Data(error) => error.kind(),
            Error::Config(error) => error.kind(),
            Error::Stream(error) => error.kind(),
            Error::Store(error) => error.kind(),
            Error::Fm(error) => error.kind(),
            Error::Expert(error) => error.kind(),
        }
    }
}
