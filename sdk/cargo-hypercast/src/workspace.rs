//! The cargo workspace: its folders and its packages, as `cargo metadata` reports them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// A cargo workspace.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    /// The folder of the workspace's `Cargo.toml`.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Cargo's target folder.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    /// The workspace's members.
    pub packages: Vec<Package>,
}

/// A member of a workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// The name in its `Cargo.toml`.
    pub name: String,
    /// The version in its `Cargo.toml`.
    pub version: String,
    /// The path of its `Cargo.toml`.
    pub manifest_path: PathBuf,
    targets: Vec<PackageTarget>,
}

#[derive(Debug, Deserialize)]
struct PackageTarget {
    kind: Vec<String>,
    crate_types: Vec<String>,
}

impl Workspace {
    /// Loads the workspace of a manifest, or that of the current folder.
    ///
    /// # Errors
    /// `cargo metadata` fails, for example because there is no `Cargo.toml`.
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
        serde_json::from_slice(&output.stdout).context("cannot read the output of cargo metadata")
    }

    /// Whether this is HyperCast's own repository.
    pub fn is_hypercast(&self) -> bool {
        self.packages.iter().any(|package| package.name == "hypercast")
    }

    /// The plugins among the members in a folder of the workspace.
    pub fn plugins_in(&self, folder: &str) -> Vec<&Package> {
        let folder = self.root.join(folder);
        let in_folder = |p: &&Package| p.manifest_path.starts_with(&folder) && p.is_plugin();
        self.packages.iter().filter(in_folder).collect()
    }
}

impl Package {
    /// Whether the package has a library of type `cdylib`, from which a component can be made.
    pub fn is_plugin(&self) -> bool {
        let is_library = |t: &&PackageTarget| t.kind.iter().all(|kind| kind != "example");
        self.targets
            .iter()
            .filter(is_library)
            .any(|t| t.crate_types.iter().any(|kind| kind == "cdylib"))
    }
}

/// The cargo that runs this tool, or the one in the path.
pub fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
