//! `hypercast schema`: whether a schema has grown from another one, and how a data set takes it
//! over.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use hypercast_data::schema::Schema;
use hypercast_data::schema::growth::{AppendedEntry, EntryKind, SchemaGrowth};
use serde_json::json;

/// Let the schema of a data set grow while its models and streams go on
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A schema grows: surfaces, actions, values, tasks, features and counters are appended to their lists. A feature
that is no longer used is named in `retired`, and stays. Ranges and the alignment modules of surfaces may change
in any way. Everything else is refused, because what is stored has the numbers of the entries.")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: SchemaCommand,
}

/// What is done with schemas.
#[derive(Debug, Subcommand)]
pub enum SchemaCommand {
    /// Say what a schema has gained over another, what is refused, and what has to be done
    Diff {
        /// The schema of before: a file, or a data set's directory
        old: PathBuf,
        /// The schema to be
        new: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace a data set's schema by one that has grown from it; the old one stays beside it as
    /// schema.previous.toml
    Apply {
        /// The schema to be
        new: PathBuf,
        /// The data set's directory
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs a command on schemas.
///
/// # Errors
/// A file that is no schema, or changes that are no growth.
pub fn run(args: Args) -> anyhow::Result<()> {
    let (old, new, json, data) = match &args.command {
        SchemaCommand::Diff { old, new, json } => (old, new, *json, None),
        SchemaCommand::Apply { new, data, json } => (data, new, *json, Some(data)),
    };
    let (old, new) = (Schema::load(&file(old))?, Schema::load(&file(new))?);
    let growth = match SchemaGrowth::between(&old, &new) {
        Ok(growth) => growth,
        Err(refused) => {
            if json {
                println!("{}", json!({ "refused": refused }));
            } else {
                refused.iter().for_each(|change| println!("refused: {change}"));
            }
            anyhow::bail!("{} changes are no growth; nothing was written", refused.len());
        }
    };
    if let Some(dir) = data {
        SchemaGrowth::apply(dir, &new)?;
    }
    if json {
        println!("{}", json!({ "growth": growth, "next": next_steps(&growth, &new) }));
    } else {
        print(&growth, &new);
    }
    Ok(())
}

/// The file of a schema, which may be named by its directory.
fn file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("schema.toml") } else { path.to_owned() }
}

fn print(growth: &SchemaGrowth, new: &Schema) {
    if growth.is_empty() {
        return println!("the schemas are the same");
    }
    for AppendedEntry { kind, name, number, owner } in &growth.appended {
        let whose = owner.as_ref().map(|surface| format!(", of surface `{surface}` alone"));
        println!("new {kind} `{name}`: number {number}{}", whose.unwrap_or_default());
    }
    growth.retired.iter().for_each(|name| println!("retired: feature `{name}`"));
    growth.restored.iter().for_each(|name| println!("used again: feature `{name}`"));
    if growth.ranges_changed {
        println!("ranges changed");
    }
    for surface in &growth.realigned {
        println!("the alignment module of surface `{surface}` changed");
    }
    println!("next:");
    for (at, step) in next_steps(growth, new).iter().enumerate() {
        println!("{}. {step}", at + 1);
    }
}

/// What has to be done, in its order.
fn next_steps(growth: &SchemaGrowth, new: &Schema) -> Vec<String> {
    if growth.is_empty() {
        return Vec::new();
    }
    if growth.is_for_fm_trainer() {
        let step = "run `hypercast schema apply` where the FM is trained: its trainer takes the \
                    alignment modules over while it runs, and nothing else reads them";
        return vec![step.to_owned()];
    }
    let mut steps = vec![
        "run `hypercast schema apply`: every process of this machine takes the schema over while \
         it runs. With copies of the data set on several machines, stop the joiner first, apply on \
         each, and start it again"
            .to_owned(),
        "POST /v1/admin/reload to the daemons: it answers once the schema is used, or why it cannot \
         be"
            .to_owned(),
    ];
    let of_entities = [EntryKind::ItemFeature, EntryKind::UserFeature];
    let is_required = |entry: &&AppendedEntry| {
        let is_optional =
            |name: &str| new.features().any(|feature| feature.name == name && feature.optional);
        of_entities.contains(&entry.kind) && !is_optional(&entry.name)
    };
    let required = growth.appended.iter().filter(is_required);
    steps.extend(required.map(|AppendedEntry { kind, name, .. }| {
        format!(
            "callers that update without {kind} `{name}` are refused from then on: append it with \
             `optional = true`, or let them send it"
        )
    }));
    if !growth.is_layout_same() {
        steps.push("let callers send the new names; until then a daemon refuses them".to_owned());
    }
    steps
}
