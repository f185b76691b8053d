//! What each subcommand of `cargo hypercast` does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::guests::{self, GuestBuild, GuestKind};
use crate::host;
use crate::wasm_toolchain::{Toolchain, ToolchainSource};
use crate::workspace::{Package, Workspace, cargo, replace, write};

/// The package of the hostile guests.
const HOSTILE: &str = "hypercast-hostile";

/// Selects the plugin's package.
#[derive(Args)]
pub struct PackageChoice {
    /// Path to the plugin's Cargo.toml [default: the one in the current folder]
    #[arg(long)]
    pub manifest_path: Option<PathBuf>,
    /// Package name of the plugin, in a workspace with several
    #[arg(short, long)]
    pub package: Option<String>,
}

/// A plugin that can be built: its package and where it is.
pub struct PluginCrate {
    workspace: Workspace,
    package: Package,
}

impl PluginCrate {
    /// Finds the package that the user selected.
    pub fn load(choice: &PackageChoice) -> Result<Self> {
        let mut workspace = Workspace::load(choice.manifest_path.as_deref())?;
        let index = choose(&workspace.packages, choice)?;
        let package = workspace.packages.swap_remove(index);
        Ok(Self { workspace, package })
    }

    /// Builds the component into `out`, or into the target folder. Returns its file.
    pub fn build(&self, source: ToolchainSource, out: Option<PathBuf>) -> Result<PathBuf> {
        let toolchain = Toolchain::ensure(source)?;
        let build = GuestBuild {
            manifest: &self.package.manifest_path,
            packages: vec![&self.package.name],
            kind: GuestKind::Plugin,
            target: guest_target(&self.workspace, toolchain),
        };
        let components = guests::build(toolchain, &build)?;
        let [component] = components.as_slice() else {
            bail!(
                "{} built {} components: a plugin must have exactly one `cdylib` library",
                self.package.name,
                components.len()
            )
        };
        let file =
            out.unwrap_or_else(|| self.workspace.output().join(format!("{}.wasm", component.name)));
        write(&file, &component.bytes)?;
        Ok(file)
    }

    /// The path of its `Cargo.toml`.
    pub fn manifest(&self) -> &Path {
        &self.package.manifest_path
    }
}

/// Builds one plugin and runs the tests of its package. An environment variable tells them where
/// the component is.
pub fn test(source: ToolchainSource, choice: &PackageChoice, args: &[OsString]) -> Result<()> {
    let plugin = PluginCrate::load(choice)?;
    let tests = || {
        let mut command = cargo();
        command.args(["test", "--manifest-path"]).arg(&plugin.package.manifest_path);
        command.args(["--package", &plugin.package.name]);
        command
    };
    // The tests are compiled while the component is built: on their own both leave cores idle.
    // Whatever fails is shown when the tests are run.
    let mut compile = tests();
    compile.args(["--no-run", "--quiet"]).args(args.iter().take_while(|arg| *arg != "--"));
    let compile = compile.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let component = plugin.build(source, None);
    if let Ok(mut compile) = compile {
        compile.wait()?;
    }
    let mut command = tests();
    command.args(args);
    // The test kit starts the binary that this tool would run.
    if let Some(binary) = host::installed()? {
        command.env("HYPERCAST", binary);
    }
    replace(command.env("HYPERCAST_COMPONENT", component?))
}

/// Builds one plugin and replaces this process by `hypercast plugin SUBCOMMAND COMPONENT ARGS`.
pub fn on_component(
    source: ToolchainSource,
    choice: &PackageChoice,
    subcommand: &str,
    args: &[OsString],
) -> Result<()> {
    let plugin = PluginCrate::load(choice)?;
    let binary = host::binary()?;
    let component = plugin.build(source, None)?;
    let args = with_defaults(&plugin.package, subcommand, args);
    host::plugin(&binary, subcommand, [component.into()].into_iter().chain(args))
}

/// Replaces this process by `hypercast plugin SUBCOMMAND ARGS`.
pub fn on_host(subcommand: &str, args: &[OsString]) -> Result<()> {
    host::plugin(&host::binary()?, subcommand, args.iter().cloned())
}

/// Adds the package's own schema, configuration, name and version to the arguments of subcommands
/// that need them, unless they are given.
fn with_defaults(package: &Package, subcommand: &str, args: &[OsString]) -> Vec<OsString> {
    let wanted: &[(&str, &str)] = match subcommand {
        "check" | "bench" | "init" => {
            &[("--schema", "schema.toml"), ("--config", "hypercast.toml")]
        }
        "run" => &[("--schema", "schema.toml")],
        "link" | "train" => &[("--config", "hypercast.toml")],
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
    // A push without a key sends an existing signature, which contains name and version.
    let is_signed_here = subcommand == "sign" || subcommand == "push" && is_given("--key");
    let own = [("--name", &package.name), ("--version", &package.version)];
    let own = own.into_iter().filter(|_| is_signed_here).map(|(flag, text)| (flag, text.into()));
    let missing = files
        .chain(own)
        .filter(|(flag, _)| !is_given(flag))
        .flat_map(|(flag, value)| [OsString::from(flag), value]);
    args.iter().cloned().chain(missing).collect()
}

/// Builds the in-tree plugins and the host, then replaces this process by `hypercast-lab demo`.
pub fn demo(source: ToolchainSource, args: &[OsString]) -> Result<()> {
    let workspace = repository()?;
    let toolchain = Toolchain::ensure(source)?;
    let plugins = build_plugins(&workspace, toolchain, &["plugins"])?;
    let lab = host::build(&workspace)?.with_file_name("hypercast-lab");
    replace(Command::new(lab).arg("demo").arg("--plugins").arg(plugins).args(args))
}

/// Builds the in-tree plugins, the hello expert and the hostile guests, then runs all tests.
pub fn verify(source: ToolchainSource, args: &[OsString]) -> Result<()> {
    let workspace = repository()?;
    let toolchain = Toolchain::ensure(source)?;
    let plugins = build_plugins(&workspace, toolchain, &["plugins", "examples"])?;
    let hostile =
        build_guests(&workspace, toolchain, "hostile", vec![HOSTILE], GuestKind::Hostile)?;
    // `cargo test` builds only test executables, and the black-box tests run the binary itself.
    host::build(&workspace)?;
    let mut command = cargo();
    // The guests are built above, for Wasm, and have no tests.
    command.args(["test", "--workspace", "--exclude", HOSTILE]).args(args);
    command.current_dir(&workspace.root);
    replace(command.env("HYPERCAST_PLUGINS", plugins).env("HYPERCAST_HOSTILE", hostile))
}

fn build_plugins(workspace: &Workspace, toolchain: Toolchain, folders: &[&str]) -> Result<PathBuf> {
    let packages = folders.iter().flat_map(|folder| workspace.plugins_in(folder));
    let names = packages.map(|package| package.name.as_str()).collect();
    build_guests(workspace, toolchain, "plugins", names, GuestKind::Plugin)
}

/// Builds guests of this repository into `target/hypercast/FOLDER` and returns that folder.
fn build_guests(
    workspace: &Workspace,
    toolchain: Toolchain,
    folder: &str,
    packages: Vec<&str>,
    kind: GuestKind,
) -> Result<PathBuf> {
    let build = GuestBuild {
        manifest: &workspace.root.join("Cargo.toml"),
        packages,
        kind,
        target: guest_target(workspace, toolchain),
    };
    let folder = workspace.target.join("hypercast").join(folder);
    guests::write_all(&folder, &guests::build(toolchain, &build)?)?;
    Ok(folder)
}

// `demo` and `verify` work in any folder of HyperCast's repository.
fn repository() -> Result<Workspace> {
    let workspace = Workspace::load(None)?;
    ensure!(
        workspace.is_hypercast(),
        "this command runs in HyperCast's repository only, and {} is another workspace",
        workspace.root.display()
    );
    Ok(workspace)
}

/// The index of the package that the user selected.
fn choose(packages: &[Package], choice: &PackageChoice) -> Result<usize> {
    let at_manifest = |manifest: PathBuf| packages.iter().position(|p| p.manifest_path == manifest);
    let chosen = match (&choice.package, &choice.manifest_path) {
        (Some(name), _) => packages.iter().position(|p| p.name == *name),
        (None, Some(manifest)) => at_manifest(std::fs::canonicalize(manifest)?),
        (None, None) => at_manifest(std::env::current_dir()?.join("Cargo.toml")),
    };
    let chosen = chosen.filter(|&index| packages[index].is_plugin());
    let only = (choice.package.is_none() && packages.len() == 1).then_some(0);
    chosen.or(only).with_context(|| {
        let plugins = packages.iter().filter(|package| package.is_plugin());
        let names: Vec<_> = plugins.map(|package| package.name.as_str()).collect();
        format!(
            "cannot tell which plugin to use: name one with `-p`; this workspace has: {}",
            names.join(", ")
        )
    })
}

fn guest_target(workspace: &Workspace, toolchain: Toolchain) -> PathBuf {
    workspace.target.join("hypercast").join(format!("wasm-{}", toolchain.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_arguments_are_taken_from_the_package() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("schema.toml"), "").unwrap();
        let package: Package = serde_json::from_value(serde_json::json!({
            "name": "a", "version": "1.2.3", "manifest_path": dir.path().join("Cargo.toml"), "targets": [],
        }))
        .unwrap();
        let args_of = |subcommand, args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            let all = with_defaults(&package, subcommand, &args);
            all.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let schema = dir.path().join("schema.toml").display().to_string();
        assert_eq!(args_of("check", &["--json"]), ["--json", "--schema", &schema]);
        assert_eq!(args_of("check", &["--schema=x"]), ["--schema=x"]);
        assert_eq!(args_of("bench", &["--schema", "x"]), ["--schema", "x"]);
        assert_eq!(args_of("push", &["http://host"]), ["http://host"]);
        assert_eq!(args_of("sign", &["--name", "b"]), ["--name", "b", "--version", "1.2.3"]);
        let pushed = args_of("push", &["http://host", "--key", "k"]);
        assert_eq!(pushed, ["http://host", "--key", "k", "--name", "a", "--version", "1.2.3"]);
    }
}
