//! `hypercast store check DIR`: reads an embedding store from end to end and says all that is wrong
//! with it.

use std::path::PathBuf;

use anyhow::Context;
use hypercast_store::Damage;

/// Look at embedding stores
#[derive(Debug, clap::Args)]
pub struct StoreArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: StoreCommand,
}

/// What can be done with a store.
#[derive(Debug, clap::Subcommand)]
pub enum StoreCommand {
    /// Verify every checksum of a store or snapshot; what is damaged is named, with what to do, and
    /// ends the command with 1
    Check(Args),
}

/// Arguments of `hypercast store check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The store's folder: `store` in a checkpoint or in the FM's work folder
    pub dir: PathBuf,
    /// How many damages to print; the rest is counted
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub print: usize,
}

/// Runs the chosen action.
pub fn run(args: StoreArgs) -> anyhow::Result<()> {
    match args.action {
        StoreCommand::Check(args) => check(&args),
    }
}

fn check(args: &Args) -> anyhow::Result<()> {
    let mut printed = 0;
    let mut print = |damage: Damage| {
        if printed < args.print {
            println!("{damage}");
        }
        printed += 1;
    };
    let checked = hypercast_store::check(&args.dir, &mut print)
        .with_context(|| format!("cannot check {}", args.dir.display()))?;
    let kind = if checked.trains { "training store" } else { "snapshot" };
    println!(
        "{}: a {kind} of generation {}, {} rows of {} values as {:?}, {} of them in the journal",
        args.dir.display(),
        checked.generation,
        checked.rows,
        checked.dim,
        checked.format,
        checked.journal_rows,
    );
    anyhow::ensure!(checked.damages == 0, "{} damages found", checked.damages);
    println!("every checksum matches");
    Ok(())
}
