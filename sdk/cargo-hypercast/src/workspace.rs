//! What `cargo metadata` says of the workspace: where it is and which guests it has.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// A cargo workspace.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    /// Its folder.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Where cargo builds.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    /// Its members.
    pub packages: Vec<Package>,
}

/// A member.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its `Cargo.toml`.
    pub manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    kind: Vec<String>,
    crate_types: Vec<String>,
}

impl Workspace {
    /// The workspace of a manifest, or of the current folder.
    pub fn load(manifest: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(cargo());
        command.args(["metadata", "--no-deps", "--format-version", "1"]);
        if let Some(manifest) = manifest {
            command.arg("--manifest-path").arg(manifest);
        }
        let output = command.output().context("cannot run cargo")?;
        ensure!(
            output.status.success(),
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).context("cargo metadata answered something else")
    }

    /// The members below a folder of the workspace that are plugins: libraries of type `cdylib`.
    pub fn plugins_in(&self, folder: &str) -> Vec<&Package> {
        let folder = self.root.join(folder);
        self.packages
            .iter()
            .filter(|p| p.manifest_path.starts_with(&folder) && p.is_plugin())
            .collect()
    }
}

impl Package {
    /// Whether its library is one that a component can be made of.
    pub fn is_plugin(&self) -> bool {
        let is_library = |t: &&Target| t.kind.iter().all(|kind| kind != "example");
        self.targets
            .iter()
            .filter(is_library)
            .any(|t| t.crate_types.iter().any(|kind| kind == "cdylib"))
    }
}

/// The cargo that runs us, or the one on the path.
pub fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
