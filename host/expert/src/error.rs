//! The errors of loading, building and training an expert.
//!
//! A guest's fault while it serves is data ([`ExpertFault`]), not an error: the request falls back
//! to the FM's ranking.

pub(crate) use hypercast_core::error::CommonErrors;
use hypercast_core::error::ErrorKind;

use super::wasm::ExpertFault;
use super::wasm::contract::{EARLIER_VERSION, VERSION, major};

/// An expert could not be loaded, built or trained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written, or an option is invalid.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// The Wasm engine did not start.
    #[error("the Wasm engine did not start: {0}")]
    Engine(String),
    /// A component that the host does not accept.
    #[error("expert `{plugin}` is refused: {why}. {REFUSED}")]
    Refused {
        /// The plugin's name.
        plugin: String,
        /// The rule that it breaks.
        why: String,
    },
    /// Logs, a saved state or a limit of the operator that do not fit the expert, whose component
    /// is in order.
    #[error("expert `{plugin}`: {why}")]
    Misfit {
        /// The plugin's name.
        plugin: String,
        /// What does not fit, and what to do.
        why: String,
    },
    /// A component of a contract that the host does not speak.
    #[error(
        "expert `{plugin}` is refused: it was built for expert contract {found}, and this host \
         speaks {VERSION} and {EARLIER_VERSION}; {}",
        upgrade(found)
    )]
    ContractVersion {
        /// The plugin's name.
        plugin: String,
        /// The contract version that the component imports.
        found: String,
    },
    /// A guest failed while its expert was loaded or trained.
    #[error("{fault}{trace}\n{advice}", fault = .0, trace = .0.backtrace(), advice = .0.advice())]
    Fault(#[from] ExpertFault),
    /// A parameter file that is damaged or belongs to another network or FM.
    #[error("{}: {why}", path.display())]
    Parameters {
        /// The parameter file.
        path: std::path::PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Published weights that do not fit the expert that serves, which keeps its own.
    #[error(
        "published weights of expert `{plugin}` are refused: {why}. Its author trains this network \
         anew, or pushes the one that the weights are of; operators need do nothing: until then it \
         serves with the weights that it has"
    )]
    Published {
        /// The plugin's name.
        plugin: String,
        /// What does not fit.
        why: String,
    },
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Core(error) => error.kind(),
            Error::Engine(_) => ErrorKind::Internal,
            _ => ErrorKind::Unfit,
        }
    }

    /// Refuses `plugin` because of the rule in `why`.
    pub fn refused(plugin: &str, why: impl Into<String>) -> Error {
        Error::Refused { plugin: plugin.to_owned(), why: why.into() }
    }

    /// Says that something else than the component of `plugin` does not fit, and what to do.
    pub fn misfit(plugin: &str, why: impl Into<String>) -> Error {
        Error::Misfit { plugin: plugin.to_owned(), why: why.into() }
    }

    pub(crate) fn engine(error: wasmtime::Error) -> Error {
        Error::Engine(format!("{error:#}"))
    }
}

/// What a refusal means to the author of an expert, and to who operates the host. The rule that is
/// broken says what has to change.
const REFUSED: &str = "Its author changes that, and meets the same refusal in \
                       `cargo hypercast check` until it is right; operators need do nothing: none \
                       of it runs, and the version of before serves, or the FM's ranking answers";

/// Says which side is older, what its author does, and what its operator does until then.
pub fn upgrade(found: &str) -> String {
    let newest = major(VERSION).unwrap_or_default();
    if major(found) > Some(newest) {
        format!(
            "the host is older. Operators update it (`cargo install --locked --path host` in a \
             newer HyperCast); until then its author builds the expert with the SDK of contract \
             {newest}.x, and the version of before goes on serving"
        )
    } else {
        format!(
            "the expert is older. Its author rebuilds it with the SDK of contract {newest}.x (`git \
             pull` in the checkout that its Cargo.toml names, or `cargo update -p hypercast-sdk` \
             where it names a repository; then `cargo hypercast build`); until then operators keep \
             a version of before, or the FM's ranking answers"
        )
    }
}
