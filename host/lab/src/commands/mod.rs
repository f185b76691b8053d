//! The command line's subcommands, one a file: each an `Args` struct and a `run`.

pub mod bench;
pub mod demo;
pub mod evaluate;
pub mod experiment;
