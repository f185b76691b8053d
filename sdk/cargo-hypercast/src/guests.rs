//! Builds guest crates for Wasm and turns them into components.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::component;
use crate::wasm_toolchain::{TARGET, Toolchain};
use crate::workspace::{Artifact, artifacts, read, write};

// Set on the command line, so that a plugin's workspace does not have to define a profile.
const PLUGIN_PROFILE: [&str; 3] =
    ["profile.release.opt-level=3", "profile.release.lto=true", "profile.release.codegen-units=1"];

// Link-time optimisation of some fifty guests would take minutes.
const HOSTILE_PROFILE: [&str; 2] =
    ["profile.release.lto=\"off\"", "profile.release.codegen-units=16"];

/// Selects the guests of a workspace to build.
pub struct GuestBuild<'a> {
    /// The path of a `Cargo.toml` in the workspace.
    pub manifest: &'a Path,
    /// The names of the packages.
    pub packages: Vec<&'a str>,
    /// Which of the packages' targets to build.
    pub kind: GuestKind,
    /// Cargo's target folder for this build. It must not be the caller's, which the cargo that runs
    /// this tool may have locked.
    pub target: PathBuf,
}

/// Which targets of a package are guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKind {
    /// The library. It is checked to import nothing but the contract's functions.
    Plugin,
    /// The examples. They are not checked: these are the hostile guests of the tests.
    Hostile,
}

/// A component, not yet written to a file.
pub struct BuiltComponent {
    /// The file name without its extension.
    pub name: String,
    /// The content of the file.
    pub bytes: Vec<u8>,
}

/// Builds guests. Cargo prints its progress on stderr.
pub fn build(toolchain: Toolchain, build: &GuestBuild<'_>) -> Result<Vec<BuiltComponent>> {
    modules(toolchain, build)?.iter().map(|(name, file)| wrap(name, file, build.kind)).collect()
}

/// Makes `folder` hold the components and nothing else. Those that it has stay as they are, because
/// tests of another run may read them.
pub fn write_all(folder: &Path, components: &[BuiltComponent]) -> Result<()> {
    let files: Vec<(PathBuf, &[u8])> = components
        .iter()
        .map(|component| (folder.join(format!("{}.wasm", component.name)), &component.bytes[..]))
        .collect();
    for (file, bytes) in &files {
        if std::fs::read(file).ok().as_deref() != Some(*bytes) {
            write(file, bytes)?;
        }
    }
    let entries = std::fs::read_dir(folder);
    let entries = entries.with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if files.iter().all(|(file, _)| *file != path) {
            std::fs::remove_file(&path)
                .with_context(|| format!("cannot delete {}", path.display()))?;
        }
    }
    Ok(())
}

// Builds the guests and returns the target name and file of each, as cargo reports them.
fn modules(toolchain: Toolchain, build: &GuestBuild<'_>) -> Result<Vec<(String, PathBuf)>> {
    let mut command = toolchain.cargo();
    command.args(["build", "--release", "--target", TARGET]);
    let (targets, profile): (_, &[&str]) = match build.kind {
        GuestKind::Plugin => ("--lib", &PLUGIN_PROFILE),
        GuestKind::Hostile => ("--examples", &HOSTILE_PROFILE),
    };
    command.arg(targets).args(profile.iter().flat_map(|setting| ["--config", setting]));
    command.arg("--manifest-path").arg(build.manifest).arg("--target-dir").arg(&build.target);
    command.args(toolchain.build_args());
    command.args(build.packages.iter().flat_map(|package| ["--package", package]));
    let packages = build.packages.join(", ");
    let module = |artifact: Artifact| {
        let Artifact { target, filenames, .. } = artifact;
        let is_guest = target.kind.iter().any(|kind| kind == "cdylib" || kind == "example");
        let mut files = filenames.into_iter().filter(|_| is_guest);
        Some((target.name, files.find(|f| f.extension().is_some_and(|e| e == "wasm"))?))
    };
    let artifacts = artifacts(&mut command, &format!("{packages} for {TARGET}"))
        .with_context(|| unfit_dependencies(build.manifest))?;
    let modules: Vec<_> = artifacts.into_iter().filter_map(module).collect();
    ensure!(
        !modules.is_empty(),
        "{packages} built no Wasm module: set `crate-type = [\"cdylib\", \"rlib\"]` under [lib] in Cargo.toml"
    );
    Ok(modules)
}

fn wrap(target: &str, file: &Path, kind: GuestKind) -> Result<BuiltComponent> {
    let bytes = component::encode(&read(file)?)
        .with_context(|| format!("cannot make a component of {target}"))?;
    if kind == GuestKind::Hostile {
        return Ok(BuiltComponent { name: target.into(), bytes });
    }
    component::check(&bytes).with_context(|| format!("{target} is not a valid expert"))?;
    // Cargo replaces the hyphens of a package name by underscores in the name of its library.
    Ok(BuiltComponent { name: target.replace('_', "-"), bytes })
}

/// Crates that ask for random numbers, or fail to build where there are none.
const WANT_ENTROPY: [&str; 5] = ["getrandom", "rand", "uuid", "ahash", "ring"];

/// What to look for after a build that failed: a sandbox has no source of random numbers, and the
/// crate that asks for them is often one that the author never named.
fn unfit_dependencies(manifest: &Path) -> String {
    let failed = format!("the plugin does not build for {TARGET}");
    let tree = ["tree", "--target", TARGET, "--edges", "normal", "--prefix", "none"];
    let mut command = Command::new("cargo");
    let output = command.args(tree).arg("--manifest-path").arg(manifest).output();
    let output = output.map(|output| output.stdout).unwrap_or_default();
    let tree = String::from_utf8_lossy(&output);
    let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = tree.lines().map(name).collect();
    let found: Vec<&str> = WANT_ENTROPY.into_iter().filter(|name| names.contains(*name)).collect();
    let [first, ..] = found[..] else { return failed };
    format!(
        "{failed}. `cargo tree --target {TARGET} --invert {first}` shows which dependency brings in \
         {}: leave it or its feature out, because a plugin's sandbox has no random numbers",
        found.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_that_a_folder_has_stay_and_others_go() {
        let dir = tempfile::tempdir().unwrap();
        let component =
            |name: &str, bytes: &[u8]| BuiltComponent { name: name.into(), bytes: bytes.into() };
        write_all(dir.path(), &[component("a", b"1"), component("b", b"2")]).unwrap();
        let changed = |name: &str| dir.path().join(name).metadata().unwrap().modified().unwrap();
        let before = changed("a.wasm");
        std::fs::write(dir.path().join("old.wasm"), b"3").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        write_all(dir.path(), &[component("a", b"1"), component("b", b"4")]).unwrap();
        assert_eq!(changed("a.wasm"), before);
        assert_eq!(std::fs::read(dir.path().join("b.wasm")).unwrap(), b"4");
        assert!(!dir.path().join("old.wasm").exists());
    }
}
