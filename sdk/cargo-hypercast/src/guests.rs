//! Builds guest crates for Wasm and writes them as components.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::component;
use crate::wasm_toolchain::{TARGET, Toolchain};

// Set on the command line, so that a plugin's workspace needs no profile of its own. Only the
// plugins': optimising two dozen hostile guests as a whole would take minutes and help nobody.
const PLUGIN_PROFILE: [&str; 3] =
    ["profile.release.opt-level=3", "profile.release.lto=true", "profile.release.codegen-units=1"];

/// Which guests of a workspace to build.
pub struct Guests<'a> {
    /// A manifest of the workspace.
    pub manifest: &'a Path,
    /// Packages by name.
    pub packages: Vec<&'a str>,
    /// What of them.
    pub kind: Kind,
    /// Where cargo may build; not the caller's own target folder, whose lock it may hold.
    pub target: PathBuf,
}

/// What of a package is a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Its library, which may import only what the contract gives.
    Plugin,
    /// Each of its examples, unchecked: the hostile guests of the tests.
    Hostile,
}

/// A component that was built.
pub struct Component {
    /// Its file's name, without extension.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds guests; cargo shows its progress on stderr.
pub fn build(toolchain: &Toolchain, guests: &Guests<'_>) -> Result<Vec<Component>> {
    modules(toolchain, guests)?.iter().map(|(name, file)| wrap(name, file, guests.kind)).collect()
}

/// Makes `folder` hold these components and no others.
pub fn write_all(folder: &Path, components: &[Component]) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)
            .with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    components.iter().try_for_each(|c| write(&folder.join(format!("{}.wasm", c.name)), c))
}

/// Writes one component.
pub fn write(file: &Path, component: &Component) -> Result<()> {
    std::fs::write(file, &component.bytes)
        .with_context(|| format!("cannot write {}", file.display()))
}

// Cargo itself says which files it made: (name, file) each.
fn modules(toolchain: &Toolchain, guests: &Guests<'_>) -> Result<Vec<(String, PathBuf)>> {
    let mut command = toolchain.cargo();
    command.args([
        "build",
        "--release",
        "--target",
        TARGET,
        "--message-format=json-render-diagnostics",
    ]);
    match guests.kind {
        Kind::Plugin => {
            command.arg("--lib");
            command.args(PLUGIN_PROFILE.iter().flat_map(|setting| ["--config", setting]));
        }
        Kind::Hostile => {
            command.arg("--examples");
        }
    }
    command.arg("--manifest-path").arg(guests.manifest).arg("--target-dir").arg(&guests.target);
    command.args(toolchain.build_args());
    for package in &guests.packages {
        command.args(["--package", package]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "building {} for {TARGET} failed", guests.packages.join(", "));
    let mut modules = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Message>(line) else {
            continue;
        };
        let (Some(target), "compiler-artifact") = (message.target, message.reason.as_str()) else {
            continue;
        };
        if !target.kind.iter().any(|kind| kind == "cdylib" || kind == "example") {
            continue;
        }
        if let Some(file) =
            message.filenames.into_iter().find(|f| f.extension().is_some_and(|e| e == "wasm"))
        {
            modules.push((target.name, file));
        }
    }
    if modules.is_empty() {
        bail!(
            "{} made no Wasm module: set `crate-type = [\"cdylib\", \"rlib\"]` under [lib]",
            guests.packages.join(", ")
        );
    }
    Ok(modules)
}

fn wrap(target: &str, file: &Path, kind: Kind) -> Result<Component> {
    let module = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let bytes =
        component::encode(&module).with_context(|| format!("{target}: cannot make a component"))?;
    if kind == Kind::Hostile {
        return Ok(Component { name: target.into(), bytes });
    }
    component::check(&bytes).with_context(|| format!("{target}: refused"))?;
    // Cargo's libraries have underscores where their packages have hyphens.
    Ok(Component { name: target.replace('_', "-"), bytes })
}
