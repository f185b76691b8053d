//! `hypercast data`: a team's own files become a data set directory.

use std::path::PathBuf;

use clap::Subcommand;
use hypercast_import::mapping::{self, Mapping};

use super::import::print_report;

/// Make a data set of a team's own files
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: DataCommand,
}

/// What is done with files.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Import files as a mapping says: CSV, TSV, lines of JSON or Parquet of any size
    Import {
        /// Which columns are what (see examples/own-data)
        #[arg(long, value_name = "FILE")]
        mapping: PathBuf,
        /// The data set directory to make; sorting needs space in it, too
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
    },
}

/// Runs a command on files.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        DataCommand::Import { mapping, into } => {
            let report = mapping::import(&Mapping::load(&mapping)?, &into)?;
            print_report(&report, &into);
            Ok(())
        }
    }
}
