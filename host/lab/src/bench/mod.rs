//! `hypercast bench`: how fast each part is, beside a rival that does the same
//! work in the same run on the same machine.
//!
//! Each part has a file: it makes its inputs, times itself and its rivals in
//! turns, and gives [`Figure`]s. Nothing here is a test: no figure fails a build.

mod engine;
mod expert;
mod fm;
mod isolation;
mod kernels;
mod lifecycle;
mod load;
mod machine;
mod report;
mod rivals;
mod serving;
mod stages;
mod store;
pub(crate) mod timing;
mod torch;
mod world;

use std::path::PathBuf;

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::EngineKind;

pub use self::report::{Figure, Report, Rival};

/// The parts that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// HSTU attention and the FM, beside PyTorch, plain Burn operators and histories that are not kept
    Kernels,
    /// An expert's network and its ranking in Wasm, beside PyTorch and native Rust
    Expert,
    /// The daemon under load from another process
    Serving,
    /// The engines of streams: a directory, and NATS where it is installed
    Engine,
    /// The embedding store, beside a raw copy of rows and other embedded stores
    Store,
    /// What a bad plugin costs the others, and what a plugin costs
    Isolation,
    /// Events in, joined, learned from and published, by real processes
    Lifecycle,
}

/// What to measure, and how thoroughly.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which part.
    pub part: Part,
    /// Timed repetitions of each figure; the median counts.
    pub runs: usize,
    /// A Python with PyTorch, for the rivals that need one.
    pub python: String,
    /// Built plugins.
    pub plugins: PathBuf,
    /// Built guests that misbehave.
    pub hostile: PathBuf,
    /// The one group of figures to take; all if missing.
    pub only: Option<String>,
    /// Rows of the store.
    pub rows: usize,
    /// How long events are offered to ingest, in seconds.
    pub seconds: u64,
    /// Publications that are applied under load.
    pub publications: usize,
    /// Between two publications, in milliseconds.
    pub publish_every_ms: u64,
    /// What keeps the streams of the lifecycle.
    pub engine: EngineKind,
}

impl Options {
    /// A component in the plugins' folder.
    fn plugin(&self, name: &str) -> Result<PathBuf> {
        let path = self.plugins.join(format!("{name}.wasm"));
        match path.is_file() {
            true => path.canonicalize().map_err(Error::io(&path)),
            false => Err(Error::invalid(format!(
                "{} is missing: build it with `cargo run -p cargo-hypercast -- build -p {name} --out {}`, or name its folder by --plugins",
                path.display(),
                path.display()
            ))),
        }
    }

    /// A guest that misbehaves.
    fn hostile(&self, name: &str) -> Result<PathBuf> {
        let path = self.hostile.join(format!("{name}.wasm"));
        match path.is_file() {
            true => path.canonicalize().map_err(Error::io(&path)),
            false => Err(Error::invalid(format!(
                "{} is missing: `cargo verify` builds it; or name its folder by --hostile",
                path.display()
            ))),
        }
    }

    /// Whether a group of figures is asked for.
    fn wants(&self, group: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == group)
    }
}

/// Measures a part.
///
/// # Errors
/// What the part's own set-up meets. A rival that is not installed is no error: its figures say so.
pub fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new(machine::describe());
    match options.part {
        Part::Engine => engine::measure(options, &mut report)?,
        Part::Expert => expert::measure(options, &mut report)?,
        Part::Serving => serving::measure(options, &mut report)?,
        Part::Kernels => {
            kernels::measure(options, &mut report);
            if options.wants("step") {
                fm::step(options, &mut report)?;
            }
            if options.wants("history") {
                fm::history(options, &mut report)?;
            }
        }
        Part::Isolation => isolation::measure(options, &mut report)?,
        Part::Store => store::measure(options, &mut report)?,
        Part::Lifecycle => lifecycle::measure(options, &mut report)?,
    }
    Ok(report)
}
