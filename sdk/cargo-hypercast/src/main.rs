//! `cargo hypercast`: what a surface team calls from an expert's first file to its
//! promotion, and this repository's demo and checks.
//!
//! It makes, compiles and wraps plugins; it does not load them. Whatever needs a host
//! is `hypercast plugin`, which it calls with the component that it built.

mod component;
mod guests;
mod host;
mod new;
mod tasks;
mod wasm_toolchain;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use wasm_toolchain::Route;

/// Makes, tests, measures and ships expert plugins for HyperCast.
#[derive(Parser)]
#[command(name = "cargo hypercast", bin_name = "cargo hypercast", version)]
struct Cli {
    /// Which compiler builds the guests: the first that works, rustup's, or Debian's packages
    #[arg(long, value_enum, default_value = "auto", global = true)]
    wasm_toolchain: Route,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes an expert's crate: a working expert with its test
    New(new::New),
    /// Builds a plugin crate into a component
    Build(Build),
    /// Wraps a core module that another toolchain built into a component, and checks that it is an expert
    Componentize(Componentize),
    /// Says what a plugin is, what it costs of its surface's budget and which columns it is sent (`hypercast plugin check`)
    Check(OnComponent),
    /// Builds a plugin, then runs its tests
    Test(OnComponent),
    /// Measures a plugin's calls and network, and the headroom to each limit (`hypercast plugin bench`)
    Bench(OnComponent),
    /// Trains a plugin on feature logs: `train --logs DIR` (`hypercast plugin train`)
    Train(OnComponent),
    /// Runs recorded requests through a plugin: `replay --requests FILE` (`hypercast plugin replay`)
    Replay(OnComponent),
    /// Makes a pair of keys to sign with (`hypercast plugin keygen`)
    Keygen(Forwarded),
    /// Signs a plugin (`hypercast plugin sign`)
    Sign(OnComponent),
    /// Sends a plugin to a daemon: `push HOST` (`hypercast plugin push`)
    Push(OnComponent),
    /// Says how a pushed version fares (`hypercast plugin logs`)
    Logs(Forwarded),
    /// Gives an expert's users back to the version before (`hypercast plugin rollback`)
    Rollback(Forwarded),
    /// Builds the in-tree plugins and the host, then runs `hypercast demo`
    Demo(Forwarded),
    /// Builds the in-tree plugins and hostile guests, then runs all tests
    Verify(Forwarded),
}

#[derive(Args)]
struct Build {
    #[command(flatten)]
    package: Choice,
    /// The component to write; `target/hypercast/NAME.wasm` by default
    #[arg(short, long)]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct Componentize {
    /// The module, linked with the bindings that `wit-bindgen` makes of the contract (see examples/c-expert)
    module: PathBuf,
    /// The component to write; MODULE with `.component.wasm` by default
    #[arg(short, long)]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct Choice {
    /// The plugin's Cargo.toml; the one of the current folder by default
    #[arg(long)]
    manifest_path: Option<PathBuf>,
    /// The plugin's package, in a workspace of several
    #[arg(short, long)]
    package: Option<String>,
}

#[derive(Args)]
struct OnComponent {
    #[command(flatten)]
    package: Choice,
    #[command(flatten)]
    rest: Forwarded,
}

#[derive(Args)]
struct Forwarded {
    /// Handed on as they are, from the first that is not one of the options above
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl From<Choice> for tasks::PackageChoice {
    fn from(choice: Choice) -> Self {
        Self { manifest: choice.manifest_path, name: choice.package }
    }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    let route = cli.wasm_toolchain;
    let on_component = |subcommand: &str, OnComponent { package, rest }| {
        tasks::on_component(route, &package.into(), (subcommand, &rest.args))
    };
    match cli.command {
        Command::New(args) => {
            let folder = new::new(&args)?.display().to_string();
            println!("{folder}: now `cd {folder} && cargo hypercast test`");
            Ok(())
        }
        Command::Build(build) => {
            let component = tasks::build(route, &build.package.into(), build.out)?;
            println!("{}", component.display());
            Ok(())
        }
        Command::Componentize(Componentize { module, out }) => {
            let out = out.unwrap_or_else(|| module.with_extension("component.wasm"));
            component::wrap(&module, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Command::Test(OnComponent { package, rest }) => {
            tasks::test(route, &package.into(), &rest.args)
        }
        Command::Check(args) => on_component("check", args),
        Command::Bench(args) => on_component("bench", args),
        Command::Train(args) => on_component("train", args),
        Command::Replay(args) => on_component("replay", args),
        Command::Sign(args) => on_component("sign", args),
        Command::Push(args) => on_component("push", args),
        Command::Keygen(args) => tasks::on_host("keygen", &args.args),
        Command::Logs(args) => tasks::on_host("logs", &args.args),
        Command::Rollback(args) => tasks::on_host("rollback", &args.args),
        Command::Demo(demo) => tasks::demo(route, &demo.args),
        Command::Verify(verify) => tasks::verify(route, &verify.args),
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
    fn both_ways_of_calling_parse_alike() {
        for line in [&["cargo-hypercast", "hypercast", "build"][..], &["cargo-hypercast", "build"]]
        {
            let cli = Cli::parse_from(arguments(line.iter().map(OsString::from)));
            assert!(matches!(cli.command, Command::Build(_)), "{line:?}");
        }
    }

    #[test]
    fn options_of_the_demo_are_handed_on() {
        let line =
            ["cargo-hypercast", "demo", "--data", "kuairand", "--port", "0"].map(OsString::from);
        let Command::Demo(demo) = Cli::parse_from(line).command else { panic!("not the demo") };
        assert_eq!(demo.args, ["--data", "kuairand", "--port", "0"]);
        let line = ["cargo-hypercast", "demo", "--", "--streaming"].map(OsString::from);
        let Command::Demo(demo) = Cli::parse_from(line).command else { panic!("not the demo") };
        assert_eq!(demo.args, ["--streaming"]);
    }

    #[test]
    fn options_of_the_host_follow_those_that_choose_a_package() {
        let line =
            ["cargo-hypercast", "train", "-p", "feed", "--logs", "runs/logs", "--epochs", "1"];
        let Command::Train(train) = Cli::parse_from(line).command else { panic!("not training") };
        assert_eq!(train.package.package.as_deref(), Some("feed"));
        assert_eq!(train.rest.args, ["--logs", "runs/logs", "--epochs", "1"]);
        let line = ["cargo-hypercast", "push", "http://127.0.0.1:8570", "--key", "team.key"];
        let Command::Push(push) = Cli::parse_from(line).command else { panic!("not a push") };
        assert_eq!(push.rest.args, ["http://127.0.0.1:8570", "--key", "team.key"]);
    }
}
