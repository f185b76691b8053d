//! `cargo hypercast`: the tool with which a surface team creates, tests and ships an expert, and
//! which runs this repository's demo and checks.
//!
//! It creates crates, compiles plugins and wraps them into components. It does not load them:
//! whatever needs the host is a subcommand of `hypercast plugin`, which it runs with the component
//! that it built.
//!
//! ```text
//! new             the files of a new crate, from template/
//! onnx            those of a crate whose network is a model in ONNX
//! surface_schema  what a new crate reads of a schema
//! tasks           the other subcommands
//! guests          builds guest crates for Wasm
//! component       turns a core module into a component and checks it
//! wasm_toolchain  finds or installs a compiler for Wasm
//! watch           the same again after each change
//! workspace       what `cargo metadata` reports
//! host            finds, builds and runs the host's binary
//! ```

mod component;
mod guests;
mod host;
mod new;
mod onnx;
mod surface_schema;
mod tasks;
mod wasm_toolchain;
mod watch;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use tasks::{PackageChoice, PluginCrate};
use wasm_toolchain::ToolchainSource;

/// Create, test, measure and ship expert plugins for HyperCast.
#[derive(Parser)]
#[command(name = "cargo hypercast", bin_name = "cargo hypercast", version)]
struct CargoHypercast {
    /// Compiler to build guests with
    #[arg(long, value_enum, default_value = "auto", global = true)]
    wasm_toolchain: ToolchainSource,
    #[command(subcommand)]
    command: PluginCommand,
}

#[derive(Subcommand)]
enum PluginCommand {
    /// Create the crate of a new, working expert
    New(new::NewExpertArgs),
    /// Create the crate of an expert from a model in ONNX, with its weights
    FromOnnx(onnx::FromOnnxArgs),
    /// Build a plugin crate into a component
    Build {
        #[command(flatten)]
        package: PackageChoice,
        /// Component to write [default: target/hypercast/NAME.wasm]
        #[arg(short, long)]
        out: Option<PathBuf>,
    },
    /// Wrap a core module of any toolchain into a component, and check that it is an expert
    Componentize {
        /// Core module, linked with `wit-bindgen`'s bindings of the contract (see
        /// examples/c-expert)
        module: PathBuf,
        /// Component to write [default: MODULE with the extension .component.wasm]
        #[arg(short, long)]
        out: Option<PathBuf>,
    },
    /// Show what a plugin is, its share of the surface's budget and the columns that it receives
    /// (`hypercast plugin check`)
    Check(ComponentArgs),
    /// Build a plugin, then run its tests
    Test(ComponentArgs),
    /// Check and test a plugin, and again after each change of its files
    Watch(ComponentArgs),
    /// Rank one request: `run request.json` (`hypercast plugin run`)
    Run(ComponentArgs),
    /// Name the built component in a `hypercast.toml`, and tell a running daemon: `link` or
    /// `link --host HOST` (`hypercast plugin link`)
    Link(ComponentArgs),
    /// Measure a plugin's calls and network, and the headroom to each limit
    /// (`hypercast plugin bench`)
    Bench(ComponentArgs),
    /// Train a plugin on feature logs: `train --logs DIR` (`hypercast plugin train`)
    Train(ComponentArgs),
    /// Write the parameters that a plugin begins with, to serve it untrained: `init --fm VERSION`
    /// (`hypercast plugin init`)
    Init(ComponentArgs),
    /// Run recorded requests through a plugin: `replay --requests FILE` (`hypercast plugin replay`)
    Replay(ComponentArgs),
    /// Create a key pair for signing (`hypercast plugin keygen`)
    Keygen(ForwardedArgs),
    /// Sign a plugin (`hypercast plugin sign`)
    Sign(ComponentArgs),
    /// Send a plugin to a daemon: `push HOST` (`hypercast plugin push`)
    Push(ComponentArgs),
    /// Show the progress of a pushed version (`hypercast plugin logs`)
    Logs(ForwardedArgs),
    /// Return an expert's users to the previous version (`hypercast plugin rollback`)
    Rollback(ForwardedArgs),
    /// Build the in-tree plugins and the host, then run `hypercast-lab demo`
    Demo(ForwardedArgs),
    /// Build the in-tree plugins and hostile guests, then run all tests
    Verify(ForwardedArgs),
}

#[derive(Args)]
struct ComponentArgs {
    #[command(flatten)]
    package: PackageChoice,
    #[command(flatten)]
    rest: ForwardedArgs,
}

#[derive(Args)]
struct ForwardedArgs {
    /// Arguments passed on unchanged, from the first one that is not an option listed below
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

fn main() -> anyhow::Result<()> {
    let cli = CargoHypercast::parse_from(arguments(std::env::args_os()));
    let source = cli.wasm_toolchain;
    let on_component = |subcommand: &str, args: ComponentArgs| {
        tasks::on_component(source, &args.package, subcommand, &args.rest.args)
    };
    match cli.command {
        PluginCommand::New(args) => {
            let folder = new::new(&args)?.display().to_string();
            println!("created {folder}; next: cd {folder} && cargo hypercast test");
            Ok(())
        }
        PluginCommand::FromOnnx(args) => {
            let folder = onnx::from_onnx(&args)?.display().to_string();
            println!("created {folder}; next: cd {folder} && cargo hypercast test");
            Ok(())
        }
        PluginCommand::Build { package, out } => {
            let component = PluginCrate::load(&package)?.build(source, out)?;
            println!("{}", component.display());
            Ok(())
        }
        PluginCommand::Componentize { module, out } => {
            let out = out.unwrap_or_else(|| module.with_extension("component.wasm"));
            component::wrap(&module, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        PluginCommand::Test(args) => tasks::test(source, &args.package, &args.rest.args),
        PluginCommand::Watch(args) => watch::watch(source, &args.package, &args.rest.args),
        PluginCommand::Run(args) => on_component("run", args),
        PluginCommand::Link(args) => on_component("link", args),
        PluginCommand::Check(args) => on_component("check", args),
        PluginCommand::Bench(args) => on_component("bench", args),
        PluginCommand::Train(args) => on_component("train", args),
        PluginCommand::Init(args) => on_component("init", args),
        PluginCommand::Replay(args) => on_component("replay", args),
        PluginCommand::Sign(args) => on_component("sign", args),
        PluginCommand::Push(args) => on_component("push", args),
        PluginCommand::Keygen(args) => tasks::on_host("keygen", &args.args),
        PluginCommand::Logs(args) => tasks::on_host("logs", &args.args),
        PluginCommand::Rollback(args) => tasks::on_host("rollback", &args.args),
        PluginCommand::Demo(args) => tasks::demo(source, &args.args),
        PluginCommand::Verify(args) => tasks::verify(source, &args.args),
    }
}

// Cargo runs `cargo hypercast build` as `cargo-hypercast hypercast build`.
fn arguments(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<_> = args.collect();
    if args.get(1).is_some_and(|arg| arg == "hypercast") {
        args.remove(1);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_subcommand_and_direct_call_parse_alike() {
        for line in [&["cargo-hypercast", "hypercast", "build"][..], &["cargo-hypercast", "build"]]
        {
            let cli = CargoHypercast::parse_from(arguments(line.iter().map(OsString::from)));
            assert!(matches!(cli.command, PluginCommand::Build { .. }), "{line:?}");
        }
    }

    #[test]
    fn options_of_the_demo_are_passed_on() {
        let line =
            ["cargo-hypercast", "demo", "--data", "kuairand", "--port", "0"].map(OsString::from);
        let PluginCommand::Demo(demo) = CargoHypercast::parse_from(line).command else {
            panic!("not the demo")
        };
        assert_eq!(demo.args, ["--data", "kuairand", "--port", "0"]);
        let line = ["cargo-hypercast", "demo", "--", "--streaming"].map(OsString::from);
        let PluginCommand::Demo(demo) = CargoHypercast::parse_from(line).command else {
            panic!("not the demo")
        };
        assert_eq!(demo.args, ["--streaming"]);
    }

    #[test]
    fn options_of_the_host_follow_those_that_select_a_package() {
        let line =
            ["cargo-hypercast", "train", "-p", "feed", "--logs", "runs/logs", "--epochs", "1"];
        let PluginCommand::Train(train) = CargoHypercast::parse_from(line).command else {
            panic!("not training")
        };
        assert_eq!(train.package.package.as_deref(), Some("feed"));
        assert_eq!(train.rest.args, ["--logs", "runs/logs", "--epochs", "1"]);
        let line = ["cargo-hypercast", "push", "http://127.0.0.1:8570", "--key", "team.key"];
        let PluginCommand::Push(push) = CargoHypercast::parse_from(line).command else {
            panic!("not a push")
        };
        assert_eq!(push.rest.args, ["http://127.0.0.1:8570", "--key", "team.key"]);
    }
}
