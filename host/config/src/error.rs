//! The errors of this crate: its own, and those of the crates below it.

pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, an option, or a service that does not answer.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// A schema, a data set or a log is not usable.
    #[error(transparent)]
    Data(#[from] hypercast_data::Error),
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Core(error) => error.kind(),
            Error::Data(error) => error.kind(),
        }
    }
}
