//! The subcommands.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::guests::{self, Guests, Kind};
use crate::host::{self, Host};
use crate::wasm_toolchain::{Route, Toolchain};
use crate::workspace::{Package, Workspace, cargo};

/// The package of the guests that misbehave.
const HOSTILE: &str = "hypercast-hostile";

/// Which package to build, as the user named it.
pub struct PackageChoice {
    /// Its `Cargo.toml`.
    pub manifest: Option<PathBuf>,
    /// Its name.
    pub name: Option<String>,
}

/// Builds one plugin into `out`, or into the target folder. Returns the file.
pub fn build(route: Route, choice: &PackageChoice, out: Option<PathBuf>) -> Result<PathBuf> {
    let workspace = Workspace::load(choice.manifest.as_deref())?;
    build_package(route, (&workspace, choose(&workspace, choice)?), out)
}

/// Builds one plugin and runs its package's tests, which find the component in the environment.
pub fn test(route: Route, choice: &PackageChoice, args: &[OsString]) -> Result<()> {
    let workspace = Workspace::load(choice.manifest.as_deref())?;
    let package = choose(&workspace, choice)?;
    let component = build_package(route, (&workspace, package), None)?;
    let error = Command::new(cargo())
        .args(["test", "--manifest-path"])
        .arg(&package.manifest_path)
        .args(["--package", &package.name])
        .args(args)
        .env("HYPERCAST_COMPONENT", component)
        .exec();
    Err(error).context("cannot run cargo test")
}

/// Builds one plugin and becomes `hypercast plugin SUBCOMMAND COMPONENT ARGS`.
pub fn on_component(
    route: Route,
    choice: &PackageChoice,
    (subcommand, args): (&str, &[OsString]),
) -> Result<()> {
    let workspace = Workspace::load(choice.manifest.as_deref())?;
    let package = choose(&workspace, choice)?;
    let binary = host_binary()?;
    let component = build_package(route, (&workspace, package), None)?;
    let given = filled_in(package, subcommand, args);
    host::plugin(&binary, subcommand, [component.into()].into_iter().chain(given))
}

/// Becomes `hypercast plugin SUBCOMMAND ARGS`.
pub fn on_host(subcommand: &str, args: &[OsString]) -> Result<()> {
    host::plugin(&host_binary()?, subcommand, args.iter().cloned())
}

/// The arguments, and the package's own schema, configuration, name and version where they are wanted and not given.
fn filled_in(package: &Package, subcommand: &str, args: &[OsString]) -> Vec<OsString> {
    let wanted: &[(&str, &str)] = match subcommand {
        "check" | "bench" => &[("--schema", "schema.toml"), ("--config", "hypercast.toml")],
        "train" => &[("--config", "hypercast.toml")],
        _ => &[],
    };
    let folder = package.manifest_path.parent().unwrap_or(Path::new("."));
    let is_given = |flag: &str| {
        let set = format!("{flag}=");
        args.iter().any(|arg| arg == flag || arg.to_string_lossy().starts_with(&set))
    };
    let files = wanted
        .iter()
        .filter(|(_, file)| folder.join(file).is_file())
        .map(|(flag, file)| (*flag, folder.join(file).into_os_string()));
    // A push that brings a signature says in it what it is.
    let is_signed_here = subcommand == "sign" || subcommand == "push" && is_given("--key");
    let own = [("--name", &package.name), ("--version", &package.version)];
    let own = own.into_iter().filter(|_| is_signed_here).map(|(flag, text)| (flag, text.into()));
    let missing = files
        .chain(own)
        .filter(|(flag, _)| !is_given(flag))
        .flat_map(|(flag, value)| [OsString::from(flag), value]);
    args.iter().cloned().chain(missing).collect()
}

fn host_binary() -> Result<PathBuf> {
    match host::find()? {
        Host::Binary(path) => Ok(path),
        Host::Workspace(workspace) => build_host(&workspace),
    }
}

fn build_package(
    route: Route,
    (workspace, package): (&Workspace, &Package),
    out: Option<PathBuf>,
) -> Result<PathBuf> {
    let toolchain = Toolchain::ensure(route)?;
    let guests = Guests {
        manifest: &package.manifest_path,
        packages: vec![&package.name],
        kind: Kind::Plugin,
        target: guest_target(workspace, &toolchain),
    };
    let components = guests::build(&toolchain, &guests)?;
    let [component] = components.as_slice() else {
        bail!("{} made several components", package.name)
    };
    let file =
        out.unwrap_or_else(|| folder(workspace, "").join(format!("{}.wasm", component.name)));
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("cannot make {}", parent.display()))?;
    }
    guests::write(&file, component)?;
    Ok(file)
}

/// Builds the in-tree plugins and the host, then becomes `hypercast-lab demo`.
pub fn demo(route: Route, args: &[OsString]) -> Result<()> {
    let workspace = repository()?;
    let toolchain = Toolchain::ensure(route)?;
    let plugins = build_plugins(&workspace, &toolchain, &["plugins"])?;
    let lab = build_host(&workspace)?.with_file_name("hypercast-lab");
    let error = Command::new(&lab).arg("demo").arg("--plugins").arg(plugins).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", lab.display()))
}

/// Builds the in-tree plugins, the hello expert and the hostile guests, then runs all tests.
pub fn verify(route: Route, args: &[OsString]) -> Result<()> {
    let workspace = repository()?;
    let toolchain = Toolchain::ensure(route)?;
    let plugins = build_plugins(&workspace, &toolchain, &["plugins", "examples"])?;
    let hostile = build_hostile(&workspace, &toolchain)?;
    // `cargo test` makes test harnesses, and the black-box tests want the binary itself.
    build_host(&workspace)?;
    let error = Command::new(cargo())
        .args(["test", "--workspace"])
        .args(args)
        .current_dir(&workspace.root)
        .env("HYPERCAST_PLUGINS", plugins)
        .env("HYPERCAST_HOSTILE", hostile)
        .exec();
    Err(error).context("cannot run cargo test")
}

fn build_plugins(
    workspace: &Workspace,
    toolchain: &Toolchain,
    folders: &[&str],
) -> Result<PathBuf> {
    let packages = folders.iter().flat_map(|folder| workspace.plugins_in(folder));
    let guests = Guests {
        manifest: &workspace.root.join("Cargo.toml"),
        packages: packages.map(|p| p.name.as_str()).collect(),
        kind: Kind::Plugin,
        target: guest_target(workspace, toolchain),
    };
    let folder = folder(workspace, "plugins");
    guests::write_all(&folder, &guests::build(toolchain, &guests)?)?;
    Ok(folder)
}

fn build_hostile(workspace: &Workspace, toolchain: &Toolchain) -> Result<PathBuf> {
    let guests = Guests {
        manifest: &workspace.root.join("Cargo.toml"),
        packages: vec![HOSTILE],
        kind: Kind::Hostile,
        target: guest_target(workspace, toolchain),
    };
    let folder = folder(workspace, "hostile");
    guests::write_all(&folder, &guests::build(toolchain, &guests)?)?;
    Ok(folder)
}

// The host's binary, by cargo's own word.
fn build_host(workspace: &Workspace) -> Result<PathBuf> {
    let output = Command::new(cargo())
        // With these packages beside it, shared dependencies get the features that `cargo test --workspace`
        // gives them, so that demo and tests share one build.
        .args(["build", "-p", "hypercast", "-p", "hypercast-lab"])
        .args(["-p", "cargo-hypercast", "-p", "hypercast-sdk"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(&workspace.root)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "building the host failed");
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_host = message["target"]["name"] == "hypercast";
        message["executable"].as_str().filter(|_| is_host).map(PathBuf::from)
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(executable)
        .context("cargo made no `hypercast`")
}

// The demo and the tests are this repository's, wherever the command is called in it.
fn repository() -> Result<Workspace> {
    let workspace = Workspace::load(None)?;
    let is_ours = workspace.packages.iter().any(|p| p.name == "hypercast");
    ensure!(
        is_ours,
        "this runs in HyperCast's repository; {} is another",
        workspace.root.display()
    );
    Ok(workspace)
}

fn choose<'a>(workspace: &'a Workspace, choice: &PackageChoice) -> Result<&'a Package> {
    let package = match (&choice.name, &choice.manifest) {
        (Some(name), _) => workspace.packages.iter().find(|p| p.name == *name),
        (None, Some(manifest)) => at_manifest(workspace, &std::fs::canonicalize(manifest)?),
        (None, None) => at_manifest(workspace, &std::env::current_dir()?.join("Cargo.toml")),
    };
    let package =
        package.filter(|p| p.is_plugin()).or_else(|| match workspace.packages.as_slice() {
            [only] if choice.name.is_none() => Some(only),
            _ => None,
        });
    package.with_context(|| {
        let plugins = workspace.packages.iter().filter(|p| p.is_plugin());
        let names: Vec<_> = plugins.map(|p| p.name.as_str()).collect();
        format!("which plugin? name one with `-p`; this workspace has: {}", names.join(", "))
    })
}

fn at_manifest<'a>(workspace: &'a Workspace, manifest: &Path) -> Option<&'a Package> {
    workspace.packages.iter().find(|p| p.manifest_path == manifest)
}

fn folder(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join("hypercast").join(name)
}

fn guest_target(workspace: &Workspace, toolchain: &Toolchain) -> PathBuf {
    folder(workspace, &format!("wasm-{}", toolchain.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packages_schema_and_configuration_are_filled_in_where_they_are_not_given() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("schema.toml"), "").unwrap();
        let package: Package = serde_json::from_value(serde_json::json!({
            "name": "a", "version": "1.2.3", "manifest_path": dir.path().join("Cargo.toml"), "targets": [],
        }))
        .unwrap();
        let filled = |subcommand, args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            let all = filled_in(&package, subcommand, &args);
            all.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let schema = dir.path().join("schema.toml").display().to_string();
        assert_eq!(filled("check", &["--json"]), ["--json", "--schema", &schema]);
        assert_eq!(filled("check", &["--schema=x"]), ["--schema=x"]);
        assert_eq!(filled("bench", &["--schema", "x"]), ["--schema", "x"]);
        assert_eq!(filled("push", &["http://host"]), ["http://host"]);
        assert_eq!(filled("sign", &["--name", "b"]), ["--name", "b", "--version", "1.2.3"]);
        let pushed = filled("push", &["http://host", "--key", "k"]);
        assert_eq!(pushed, ["http://host", "--key", "k", "--name", "a", "--version", "1.2.3"]);
    }
}
