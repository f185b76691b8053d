//! `hypercast-lab bench`: how fast each part is, beside rivals that do the same work in the same
//! run on the same machine.
//!
//! Each part has a file. It makes its inputs, times itself and its rivals in turns, and adds
//! [`BenchFigure`]s to the report. No figure fails a build: these are not tests.

mod body_forms;
mod device;
mod direct_reads;
mod engine;
mod expert;
mod fm;
mod ids;
mod import;
mod isolation;
mod kernels;
mod kuairand_files;
mod lifecycle;
mod load;
mod rank_columns;
mod report;
mod rivals;
mod seams;
mod serving;
mod stages;
mod store;
mod timing;
mod torch;
mod workload;

use std::path::{Path, PathBuf};

use clap::ValueEnum as _;
use hypercast_config::EngineKind;
use hypercast_data::simulate::SimulateOptions;

pub use self::report::{BenchFigure, BenchReport};
use crate::error::{CommonErrors as _, Error, Result};

/// The parts that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchPart {
    /// HSTU attention and the FM, beside PyTorch, plain Burn operators and uncached histories
    Kernels,
    /// An expert's network and its ranking in Wasm, beside PyTorch and native Rust
    Expert,
    /// The daemon under load from another process
    Serving,
    /// The stream engines: a directory, and NATS where it is installed; the seams of the simulator
    Engine,
    /// The embedding store, beside a raw copy of rows and other embedded stores
    Store,
    /// Bodies with ids that are numbers or strings, and the dictionary of strings
    Ids,
    /// What a faulty plugin costs the others, and what a plugin costs
    Isolation,
    /// Events ingested, joined, trained on and published, by real processes
    Lifecycle,
    /// What the FM asks of a GPU, counted and not timed: launches, bytes to it and back
    Device,
    /// A log that is imported, beside DuckDB, which sorts and casts it
    Import,
}

/// Measure how fast a part is, beside rivals on the same machine
#[derive(Debug, Clone, clap::Args)]
pub struct BenchOptions {
    /// The part to measure
    #[arg(value_enum)]
    pub part: BenchPart,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Timed repetitions of each figure; the median is reported
    #[arg(long, value_name = "N", default_value_t = 21)]
    pub runs: usize,
    /// A Python that has PyTorch and DuckDB, for the rivals that need them
    #[arg(long, value_name = "PYTHON", default_value = "python3")]
    pub python: String,
    /// The folder of built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// The folder of built guests that misbehave
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/hostile")]
    pub hostile: PathBuf,
    /// Measure one group of figures only. kernels: attention, window, shared, step, history;
    /// expert: network, rank, columns; store: reads, disk, open, writer, formats, rivals; serving:
    /// logging, stages, load; engine: seams, directory, nats; lifecycle: ingest, latency, follow,
    /// publish; isolation: rank, faults, plugins, neighbours; ids: bodies, dictionary; device:
    /// step, serving
    #[arg(long, value_name = "GROUP")]
    pub only: Option<String>,
    /// Rows of the store and of its rivals; each takes about 290 bytes on disk and in memory, and
    /// as much again for a rival. import: rows of the log; each takes about 200 bytes on disk.
    /// lifecycle: rows of the trainer's store, up to 500,000
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    pub rows: usize,
    /// serving: users of the simulated world, 50 requests each
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub users: usize,
    /// lifecycle: seconds during which events are sent, or learned from; serving: seconds per rate,
    /// up to 8
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub seconds: u64,
    /// lifecycle: publications that are applied under load
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub publications: usize,
    /// lifecycle: milliseconds between publications; an FM's trainer publishes every minute by
    /// default
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    pub publish_every_ms: u64,
    /// lifecycle: the stream engine; `nats` starts a nats-server from PATH
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineKind,
    /// Measure although this build has debug assertions; the figures are then not comparable
    #[arg(long)]
    pub allow_debug: bool,
}

impl BenchOptions {
    /// A component in the plugins' folder.
    fn plugin(&self, name: &str) -> Result<PathBuf> {
        let build = format!(
            "build it with `cargo run -p cargo-hypercast -- build -p {name} --out {}`, or pass \
             --plugins",
            self.plugins.display()
        );
        component(&self.plugins, name, &build)
    }

    /// A guest that misbehaves.
    fn hostile(&self, name: &str) -> Result<PathBuf> {
        component(&self.hostile, name, "build it with `cargo verify`, or pass --hostile")
    }

    /// Whether a group of figures is measured.
    fn wants(&self, group: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == group)
    }

    fn check(&self) -> Result<()> {
        let wrong = if cfg!(debug_assertions) && !self.allow_debug {
            "this build has debug assertions, so its figures would not be comparable with a \
             rival's: run it with `cargo run --release`, or pass --allow-debug"
        } else if self.runs == 0 || self.rows == 0 || self.users == 0 {
            "--runs, --rows and --users must be at least 1"
        } else if self.seconds == 0 {
            "--seconds must be at least 1"
        } else if self.publications < 4 {
            "--publications must be at least 4"
        } else {
            return Ok(());
        };
        Err(Error::invalid(wrong))
    }
}

/// A folder that is removed when it is dropped.
fn temporary() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))
}

/// A small simulated world in the folder `data`.
fn world(dir: &Path) -> SimulateOptions {
    let into = dir.join("data");
    SimulateOptions { into, users: 300, items: 200, requests: 500, surfaces: 2, seed: 1 }
}

fn component(folder: &Path, name: &str, build: &str) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.wasm"));
    if path.is_file() {
        return path.canonicalize().map_err(Error::io(&path));
    }
    Err(Error::invalid(format!("{} is missing: {build}", path.display())))
}

/// Adds the figures of a group, or of several after a look at which of them are wanted.
type GroupMeasure = fn(&BenchOptions, &mut BenchReport) -> Result<()>;

/// Measures a part.
///
/// # Errors
/// Whatever its set-up fails with. A rival that is not installed is no error: the report notes it.
pub fn run(options: &BenchOptions) -> Result<BenchReport> {
    options.check()?;
    let part = options.part.to_possible_value().expect("no part is hidden");
    let part = part.get_name();
    let mut report = BenchReport::new(part);
    let groups = groups(options.part);
    let names: Vec<&str> = groups.iter().flat_map(|(names, _)| *names).copied().collect();
    if let Some(only) = options.only.as_deref().filter(|only| !names.contains(only)) {
        let known = match names.join(", ") {
            names if names.is_empty() => "it has none, so leave out --only".to_owned(),
            names => format!("it has {names}"),
        };
        return Err(Error::invalid(format!("{part} has no group {only:?} of figures: {known}")));
    }
    for (names, measure) in groups {
        if names.is_empty() || names.iter().any(|name| options.wants(name)) {
            measure(options, &mut report)?;
        }
    }
    Ok(report)
}

/// A part's groups, and how they are measured.
fn groups(part: BenchPart) -> &'static [(&'static [&'static str], GroupMeasure)] {
    match part {
        BenchPart::Expert => &[
            (&["network"], expert::network),
            (&["rank"], expert::ranking),
            (&["columns"], rank_columns::measure),
        ],
        BenchPart::Store => &[(&store::GROUPS, store::measure)],
        BenchPart::Import => &[(&[], import::measure)],
        BenchPart::Device => &[(&["step"], device::step), (&["serving"], device::serving)],
        BenchPart::Serving => {
            &[(&["logging"], fm::logging), (&["stages", "load"], serving::measure)]
        }
        BenchPart::Engine => &[
            (&["seams"], seams::measure),
            (&["directory"], engine::directory),
            (&["nats"], engine::nats),
        ],
        BenchPart::Kernels => &[
            (&["attention"], kernels::attention),
            (&["window"], kernels::window),
            (&["shared"], kernels::shared),
            (&["step"], fm::step),
            (&["history"], fm::history),
        ],
        BenchPart::Isolation => &[
            (&["rank"], expert::ranking),
            (&["faults"], isolation::faults),
            (&["plugins"], isolation::plugins),
            (&["neighbours"], isolation::neighbours),
        ],
        BenchPart::Ids => &[(&["bodies"], ids::bodies), (&["dictionary"], ids::dictionary)],
        BenchPart::Lifecycle => &[
            (&["ingest"], lifecycle::ingest::measure),
            (&["latency"], lifecycle::latency::measure),
            (&["follow"], lifecycle::follow::measure),
            (&["publish"], lifecycle::publish::measure),
        ],
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct BenchCli {
        #[command(flatten)]
        options: BenchOptions,
    }

    #[test]
    fn a_group_that_a_part_does_not_have_is_refused_with_those_that_it_has() {
        let refused = |part: BenchPart| {
            let part = part.to_possible_value().unwrap();
            let line = ["bench", part.get_name(), "--only", "parts", "--allow-debug"];
            run(&BenchCli::parse_from(line).options).unwrap_err().to_string()
        };
        for &part in BenchPart::value_variants() {
            let said = refused(part);
            assert!(said.contains("no group \"parts\""), "{said}");
            for name in groups(part).iter().flat_map(|(names, _)| *names) {
                assert!(said.contains(name), "{said}");
            }
        }
        assert!(refused(BenchPart::Import).contains("leave out --only"));
    }

    #[test]
    fn the_help_names_every_group() {
        let help = BenchCli::command().render_long_help().to_string();
        for (names, _) in BenchPart::value_variants().iter().flat_map(|part| groups(*part)) {
            names.iter().for_each(|name| assert!(help.contains(name), "{name}"));
        }
    }
}
