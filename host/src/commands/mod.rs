//! The command line's subcommands, one a file: each an `Args` struct and a `run`.

pub mod import;
pub mod plugin;
pub mod simulate;
