//! Finds or builds the host's binary, and runs `hypercast plugin`.
//!
//! This tool does not link the host, so that it installs quickly. Whatever needs the host runs in
//! its binary.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, artifacts, cargo, replace};

/// The name of the host's binary and package.
const NAME: &str = "hypercast";

/// Returns the host's binary: an installed one, or in HyperCast's own repository one that it
/// builds.
///
/// # Errors
/// No binary was found. The message says how to install one.
pub fn binary() -> Result<PathBuf> {
    if let Some(found) = installed()? {
        return Ok(found);
    }
    let workspace = Workspace::load(None).ok().filter(Workspace::is_hypercast).context(
        "cannot find the `hypercast` binary: install it with `cargo install --locked hypercast` \
         (in a checkout, `cargo install --locked --path host`), or set $HYPERCAST to it",
    )?;
    build(&workspace)
}

/// Returns `$HYPERCAST`, or the binary beside this executable or in the path, if there is one.
///
/// # Errors
/// `$HYPERCAST` is not a file.
pub fn installed() -> Result<Option<PathBuf>> {
    if let Some(given) = std::env::var_os("HYPERCAST") {
        let path = PathBuf::from(given);
        ensure!(
            path.is_file(),
            "$HYPERCAST is {}, which is not a file: set it to the `hypercast` binary, or unset it",
            path.display()
        );
        return Ok(Some(path));
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = beside.into_iter().chain(std::env::split_paths(&path));
    Ok(folders.map(|folder| folder.join(NAME)).find(|file| file.is_file()))
}

/// Builds the host in HyperCast's own repository and returns its binary.
///
/// # Errors
/// The build fails.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut command = cargo();
    // With these packages, shared dependencies get the features that `cargo test --workspace`
    // gives them, so the demo and the tests share one build.
    command.args(["build", "-p", NAME, "-p", "hypercast-lab"]);
    command.args(["-p", "cargo-hypercast", "-p", "hypercast-sdk"]).current_dir(&workspace.root);
    artifacts(&mut command, "the host")?
        .into_iter()
        .filter(|artifact| artifact.target.name == NAME)
        .find_map(|artifact| artifact.executable)
        .with_context(|| format!("cargo build reported no `{NAME}` executable"))
}

/// Replaces this process by `hypercast plugin SUBCOMMAND ARGS`.
///
/// # Errors
/// The binary cannot be run.
pub fn plugin(
    binary: &Path,
    subcommand: &str,
    args: impl IntoIterator<Item = OsString>,
) -> Result<()> {
    replace(Command::new(binary).args(["plugin", subcommand]).args(args))
}
