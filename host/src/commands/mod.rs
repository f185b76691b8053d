//! The command line's subcommands, one a file: each an `Args` struct and a `run`.

pub mod data;
pub mod dead_letters;
mod follow;
pub mod ids;
pub mod import;
pub mod join;
pub mod plugin;
pub mod schema;
pub mod serve;
pub mod simulate;
pub mod store;
pub mod train;
pub mod versions;
