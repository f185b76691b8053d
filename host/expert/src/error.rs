//! The errors of the expert runtime: what an operator or a plugin's author can
//! do something about. A guest's fault while serving is data
//! ([`ExpertFault`]); it becomes an error only where an expert is loaded or
//! trained.

use std::path::PathBuf;

use super::wasm::ExpertFault;

/// An expert could not be loaded, built or trained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Wasm engine did not start.
    #[error("the Wasm engine did not start: {0}")]
    Engine(String),
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A component that the host does not admit.
    #[error("expert `{plugin}` is refused: {why}")]
    Refused {
        /// The plugin.
        plugin: String,
        /// The rule it breaks.
        why: String,
    },
    /// A component of another contract.
    #[error(
        "expert `{plugin}` is refused: it was built for expert contract {found}, and this host speaks {host}; {}",
        upgrade(found, host)
    )]
    ContractVersion {
        /// The plugin.
        plugin: String,
        /// Its contract.
        found: String,
        /// The host's contract.
        host: &'static str,
    },
    /// A guest failed while its expert was loaded or trained.
    #[error("{fault}{trace}", fault = .0, trace = .0.backtrace())]
    Fault(#[from] ExpertFault),
    /// A parameter file that is damaged or belongs to something else.
    #[error("{}: {why}", path.display())]
    Parameters {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Published weights that do not fit the expert in service, which goes on with its own.
    #[error("published weights of expert `{plugin}` are refused: {why}")]
    Published {
        /// The plugin.
        plugin: String,
        /// What does not fit.
        why: String,
    },
    /// A device that this binary or machine does not have.
    #[error("{0}")]
    Device(String),
}

impl Error {
    /// A component that a rule refuses.
    pub fn refused(plugin: &str, why: String) -> Error {
        Error::Refused { plugin: plugin.to_owned(), why }
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn without_cuda() -> Error {
        Error::Device(
            "device `cuda` needs a binary built with `--features cuda`; use device `cpu`"
                .to_owned(),
        )
    }

    pub(crate) fn engine(error: wasmtime::Error) -> Error {
        Error::Engine(format!("{error:#}"))
    }
}

/// Who is behind, and the command that upgrades.
pub fn upgrade(found: &str, host: &str) -> String {
    let major = |version: &str| version.split('.').next().and_then(|own| own.parse::<u64>().ok());
    match major(found) > major(host) {
        true => {
            "the host is older: update it (`cargo install --locked --path host` in a newer HyperCast), or build the expert with an older SDK".into()
        }
        false => format!(
            "the expert is older: rebuild it with the SDK of contract {}.x (`git pull` in the checkout that its Cargo.toml names, or `cargo update -p hypercast-sdk` where it names a repository; then `cargo hypercast build`)",
            major(host).unwrap_or_default()
        ),
    }
}
