//! Finds or builds the host's binary, and runs `hypercast plugin`.
//!
//! This tool does not link the host, so that it installs quickly. Whatever needs the host runs in
//! its binary.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo};

/// The name of the host's binary and package.
const NAME: &str = "hypercast";

/// Returns the host's binary: `$HYPERCAST`, or the one beside this executable or in the path. In
/// HyperCast's own repository, builds it if none is installed.
///
/// # Errors
/// No binary was found. The message says how to install one.
pub fn binary() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("HYPERCAST") {
        let path = PathBuf::from(given);
        ensure!(
            path.is_file(),
            "$HYPERCAST is {}, which is not a file: set it to the `hypercast` binary, or unset it",
            path.display()
        );
        return Ok(path);
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = beside.into_iter().chain(std::env::split_paths(&path));
    if let Some(found) = folders.map(|folder| folder.join(NAME)).find(|file| file.is_file()) {
        return Ok(found);
    }
    let workspace = Workspace::load(None).ok().filter(Workspace::is_hypercast).context(
        "cannot find the `hypercast` binary: install it with \
         `cargo install --locked --path host` in HyperCast's checkout, or set $HYPERCAST to it",
    )?;
    build(&workspace)
}

/// Builds the host in HyperCast's own repository and returns its binary.
///
/// # Errors
/// The build fails.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let output = Command::new(cargo())
        // With these packages, shared dependencies get the features that `cargo test --workspace`
        // gives them, so the demo and the tests share one build.
        .args(["build", "-p", NAME, "-p", "hypercast-lab"])
        .args(["-p", "cargo-hypercast", "-p", "hypercast-sdk"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(&workspace.root)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "building the host failed: see cargo's messages above");
    // Cargo reports the path of each executable that it builds.
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_host = message["target"]["name"] == NAME;
        message["executable"].as_str().filter(|_| is_host).map(PathBuf::from)
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(executable)
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
    let error = Command::new(binary).args(["plugin", subcommand]).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", binary.display()))
}
