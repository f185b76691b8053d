//! The cargo workspace: its folders and its packages, as `cargo metadata` reports them, and how
//! files are read and written.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// A cargo workspace, as `cargo metadata` describes it.
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
        let mut command = cargo();
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

    /// The folder of a plugin's component: below the target folder, in a folder of this workspace
    /// alone where others share that, because their plugins may have the same name.
    pub fn output(&self) -> PathBuf {
        let folder = self.target.join("hypercast");
        if self.target.starts_with(&self.root) {
            return folder;
        }
        let mut hasher = DefaultHasher::new();
        self.root.hash(&mut hasher);
        folder.join(format!("{:016x}", hasher.finish()))
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

/// Reads a file; an error names it.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Writes a file, and creates its folder if that is missing.
pub fn write(file: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create the folder {}", folder.display()))?;
    std::fs::write(file, content).with_context(|| format!("cannot write {}", file.display()))
}

/// A target that cargo built.
#[derive(Deserialize)]
pub struct Artifact {
    /// The target's name and kind.
    pub target: ArtifactTarget,
    /// The files that belong to it.
    pub filenames: Vec<PathBuf>,
    /// The executable among them.
    pub executable: Option<PathBuf>,
}

/// The name and kind of a target that cargo built.
#[derive(Deserialize)]
pub struct ArtifactTarget {
    /// The name in its `Cargo.toml`.
    pub name: String,
    /// What it is, such as `bin`, `cdylib` or `example`.
    pub kind: Vec<String>,
}

/// Runs `cargo build`, which prints its progress on stderr, and returns what it built. An error
/// names `what`.
///
/// # Errors
/// The build fails.
pub fn artifacts(build: &mut Command, what: &str) -> Result<Vec<Artifact>> {
    build.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = build.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "building {what} failed: see cargo's messages above");
    // Messages about anything but artifacts have no file names.
    let lines = output.stdout.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

/// Replaces this process by a command.
///
/// # Errors
/// The command cannot be run.
pub fn replace(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// The cargo that runs this program, or the one in the path. It does not get what cargo told this
/// program of its package: build scripts that read it, as ring's does, would run again, and all
/// that is built on them would be built again.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_of_one_name_have_their_own_files_in_a_shared_target_folder() {
        let output = |root: &str, target: &str| {
            Workspace { root: root.into(), target: target.into(), packages: Vec::new() }.output()
        };
        assert_eq!(output("/a/feed", "/a/feed/target"), Path::new("/a/feed/target/hypercast"));
        let shared = output("/a/feed", "/shared");
        assert!(shared.starts_with("/shared/hypercast"), "{}", shared.display());
        assert_eq!(shared, output("/a/feed", "/shared"));
        assert_ne!(shared, output("/b/feed", "/shared"));
    }
}
