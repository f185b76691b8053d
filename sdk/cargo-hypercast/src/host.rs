//! The host's binary, whose `hypercast plugin ...` does what this tool only
//! prepares: this tool links no host, so that it installs in a moment.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// The host's binary by name.
const NAME: &str = "hypercast";

/// A binary, or the workspace that has one to be built.
pub enum Host {
    /// The file.
    Binary(PathBuf),
    /// HyperCast's own repository.
    Workspace(Workspace),
}

/// Finds the host: `$HYPERCAST`, beside this executable, in the path, or in a workspace that has it as a member.
///
/// # Errors
/// There is none, with what to do.
pub fn find() -> Result<Host> {
    if let Some(given) = std::env::var_os("HYPERCAST") {
        let path = PathBuf::from(given);
        anyhow::ensure!(path.is_file(), "HYPERCAST names {}, which is no file", path.display());
        return Ok(Host::Binary(path));
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = beside.into_iter().chain(std::env::split_paths(&path));
    if let Some(found) = folders.map(|folder| folder.join(NAME)).find(|file| file.is_file()) {
        return Ok(Host::Binary(found));
    }
    let workspace = Workspace::load(None).ok();
    workspace
        .filter(|workspace| workspace.packages.iter().any(|package| package.name == NAME))
        .map(Host::Workspace)
        .context(
            "there is no `hypercast`: install the host with `cargo install --locked --path host` in HyperCast's checkout, \
             or name its binary in $HYPERCAST",
        )
}

/// Becomes `hypercast plugin SUBCOMMAND ARGS`.
///
/// # Errors
/// The binary cannot be run.
pub fn plugin(
    binary: &Path,
    subcommand: &str,
    args: impl IntoIterator<Item = OsString>,
) -> Result<()> {
    let error = Command::new(binary).args(["plugin", subcommand]).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", binary.display()))
}
