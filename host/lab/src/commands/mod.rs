//! The commands of `hypercast-lab`: their options, and the printing of their reports.

pub mod bench;
pub mod demo;
pub mod evaluate;
pub mod experiment;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Serialize;

use crate::demo::DatasetChoice;

/// The default work folder of a command on a data set.
fn default_work(command: &str, data: DatasetChoice) -> PathBuf {
    let name = format!("{command}-{data:?}").to_lowercase();
    Path::new("target/hypercast").join(name)
}

/// Prints a report, and writes it to `json` if given.
fn print_report(report: &(impl Serialize + Display), json: Option<&Path>) -> anyhow::Result<()> {
    print!("{report}");
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_vec_pretty(report)?)
            .with_context(|| format!("writing --json {}", path.display()))?;
    }
    Ok(())
}
