//! `cargo hypercast`: builds experts, and this repository's demo and checks with them.
//!
//! It compiles and wraps plugins; it does not load them. Whether a host admits a
//! component is the host's word (`hypercast`).

mod component;
mod guests;
mod tasks;
mod wasm_toolchain;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use wasm_toolchain::Route;

/// Builds expert plugins for HyperCast.
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
    /// Builds a plugin crate into a component
    Build(Build),
    /// Wraps a core module that another toolchain built into a component, and checks that it is an expert
    Componentize(Componentize),
    /// Builds the in-tree plugins and the host, then runs `hypercast demo`
    Demo(Forwarded),
    /// Builds the in-tree plugins and hostile guests, then runs all tests
    Verify(Forwarded),
}

#[derive(Args)]
struct Build {
    /// The plugin's Cargo.toml; the one of the current folder by default
    #[arg(long)]
    manifest_path: Option<PathBuf>,
    /// The plugin's package, in a workspace of several
    #[arg(short, long)]
    package: Option<String>,
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
struct Forwarded {
    /// Handed on as they are, to `hypercast demo` or `cargo test --workspace`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    match cli.command {
        Command::Build(build) => {
            let package =
                tasks::PackageChoice { manifest: build.manifest_path, name: build.package };
            let component = tasks::build(cli.wasm_toolchain, &package, build.out)?;
            println!("{}", component.display());
            Ok(())
        }
        Command::Componentize(Componentize { module, out }) => {
            let out = out.unwrap_or_else(|| module.with_extension("component.wasm"));
            component::wrap(&module, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Command::Demo(demo) => tasks::demo(cli.wasm_toolchain, &demo.args),
        Command::Verify(verify) => tasks::verify(cli.wasm_toolchain, &verify.args),
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
}
