//! Tests of an expert, in the runtime of an installed `hypercast`.
//!
//! A test starts `hypercast plugin harness` and asks it questions, so that it links no part of the
//! host: the first test of a new expert is green within a minute, most of which goes into compiling
//! the SDK. The checks are those of a daemon's own runtime: its engine, executor and trainer.
//!
//! ```text
//! TestWorld    what an expert is tested in: schema, embeddings, limits, seed
//! TestRequest  a request; what a test leaves out is generated
//! TestExpert   an expert in a world: check_all, rank, predict, ...
//! ```
//!
#![doc = include_str!("../README.md")]

mod expert;
mod process;
mod request;
mod world;

use std::path::{Path, PathBuf};

pub use expert::{FailedChecks, TestExpert, TestRanking};
pub use process::HostError;
pub use request::TestRequest;
pub use world::TestWorld;

/// Returns the component of a package, which `cargo hypercast test` has built.
///
/// # Panics
/// There is no such component.
#[track_caller]
pub fn component(package: &str) -> PathBuf {
    let given = std::env::var_os("HYPERCAST_COMPONENT").map(PathBuf::from);
    let file = format!("{package}.wasm");
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|name| name == file.as_str());
    let folder = std::env::var_os("HYPERCAST_PLUGINS").map(|folder| Path::new(&folder).join(&file));
    let found = given.filter(is_it).into_iter().chain(folder).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "cannot find {file}: run `cargo hypercast test`, which builds it, instead of `cargo test`"
        )
    })
}
