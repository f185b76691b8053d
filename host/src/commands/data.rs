//! `hypercast data`: a team's own files become a data set directory.

use std::path::PathBuf;

use clap::Subcommand;
use hypercast_import::infer::{ColumnHints, InferOptions, infer};
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
    /// Propose a mapping for files, each line with its reason
    Infer {
        /// The log of what was shown: names of files, with * and **
        #[arg(long, value_name = "FILES", required = true, num_args = 1..)]
        impressions: Vec<String>,
        /// Files with the features of items
        #[arg(long, value_name = "FILES", num_args = 1..)]
        items: Vec<String>,
        /// Files with the features of users
        #[arg(long, value_name = "FILES", num_args = 1..)]
        users: Vec<String>,
        /// The log's column of users, if it is not found
        #[arg(long, value_name = "COLUMN")]
        user: Option<String>,
        /// The log's column of items, if it is not found
        #[arg(long, value_name = "COLUMN")]
        item: Option<String>,
        /// The log's column of times, if it is not found
        #[arg(long, value_name = "COLUMN")]
        time: Option<String>,
        /// The log's column of surfaces, if it is not found
        #[arg(long, value_name = "COLUMN")]
        surface: Option<String>,
        /// The mapping to write
        #[arg(long, value_name = "FILE")]
        into: PathBuf,
    },
    /// Import files as a mapping says: CSV, TSV, lines of JSON or Parquet of any size
    Import {
        /// Which columns are what (`hypercast data infer` proposes one)
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
        DataCommand::Infer { impressions, items, users, user, item, time, surface, into } => {
            let hints = ColumnHints { user, item, time, surface };
            infer(&InferOptions { impressions, items, users, hints, into: into.clone() })?;
            println!("written to {}; look at each line before you import", into.display());
            Ok(())
        }
        DataCommand::Import { mapping, into } => {
            let report = mapping::import(&Mapping::load(&mapping)?, &into)?;
            print_report(&report, &into);
            Ok(())
        }
    }
}
