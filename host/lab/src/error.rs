//! The crate's error: those of the crates below it, and the common ones.

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
    /// An import failed.
    #[error(transparent)]
    Import(#[from] hypercast_import::Error),
    /// An expert was refused, or failed outside of a request.
    #[error(transparent)]
    Expert(#[from] hypercast_expert::Error),
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] hypercast_config::Error),
    /// A stream, the join, a publication or the registry failed.
    #[error(transparent)]
    Stream(#[from] hypercast_stream::Error),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] hypercast_train::Error),
    /// Serving failed.
    #[error(transparent)]
    Serve(#[from] hypercast_serve::Error),
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
