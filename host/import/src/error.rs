//! The errors of this crate: its own, and those of the crates below it.

pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;

/// A failure to read files or to write a data set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, an option, or an external program.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// The data set could not be written, or its schema contradicts itself.
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
