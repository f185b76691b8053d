//! The errors of this crate: its own, and those of the crates below it.

pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;

use crate::streams::StreamGap;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An error that any crate can have.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// An embedding store failed.
    #[error(transparent)]
    Store(#[from] hypercast_store::Error),
    /// The foundation model failed.
    #[error(transparent)]
    Fm(#[from] hypercast_fm::Error),
    /// A schema, a data set or a log cannot be used.
    #[error(transparent)]
    Data(#[from] hypercast_data::Error),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] hypercast_config::Error),
    /// An expert could not be loaded, or failed outside a request.
    #[error(transparent)]
    Expert(#[from] hypercast_expert::Error),
    /// Records of a stream are missing.
    #[error("{0}; restore the stream, or go on without them (engine.on_gap in hypercast.toml)")]
    Gap(StreamGap),
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
            Error::Store(error) => error.kind(),
            Error::Fm(error) => error.kind(),
            Error::Gap(_) => ErrorKind::Internal,
            Error::Expert(_) => ErrorKind::Unfit,
        }
    }
}
