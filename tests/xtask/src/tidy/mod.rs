//! `cargo xtask tidy`: rules of the repository that neither rustc nor Clippy know.
//!
//! Each check takes the [`Sources`] and returns its [`TidyFinding`]s, so a test can make up a tree.

mod documents;
mod durable;
mod items;
mod layers;
mod lines;
mod seams;

use std::fmt;

use anyhow::Result;

use crate::{
    options::Options,
    process::repository_root,
    sources::{RustFile, Sources},
};

/// Something that is wrong at a place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TidyFinding {
    /// From the root.
    pub path: String,
    /// From 1 on.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for TidyFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}; {}", self.path, self.line, self.problem, self.remedy)
    }
}

/// A check by its name. The parsed files are those of the sources.
type Check = fn(&Sources, &[RustFile<'_>]) -> Result<Vec<TidyFinding>>;

const CHECKS: [(&str, Check); 10] = [
    ("layers", layers::check),
    ("width", lines::width),
    ("size", lines::size),
    ("tuples", items::tuple_parameters),
    ("names", items::doubled_names),
    ("prose", items::short_docs),
    ("durable", durable::whole_files),
    ("seams", seams::bypassed),
    ("keys", documents::config_keys),
    ("invariants", documents::invariants),
];

/// Runs the checks that `--only` names, or all. `false` if there are findings.
pub fn run(options: Options) -> Result<bool> {
    let names = CHECKS.map(|(name, _)| name);
    let chosen = options.choice("only", &names)?;
    let sources = Sources::of_working_tree(&repository_root()?)?;
    let parsed = sources.rust()?;
    let mut total = 0;
    for (name, check) in CHECKS.into_iter().filter(|(name, _)| chosen.contains(name)) {
        let mut findings = check(&sources, &parsed)?;
        findings.sort();
        for finding in &findings {
            println!("{finding}");
        }
        if !findings.is_empty() {
            println!("-- {name}: {} findings", findings.len());
        }
        total += findings.len();
    }
    println!("cargo xtask tidy: {} files, {total} findings", sources.len());
    Ok(total == 0)
}

/// The places of a check's findings, for tests.
#[cfg(test)]
fn places(check: Check, files: &[(&str, &str)]) -> Vec<(String, usize)> {
    let sources = Sources::of(files);
    let parsed = sources.rust().unwrap();
    let mut findings = check(&sources, &parsed).unwrap();
    findings.sort();
    findings.into_iter().map(|finding| (finding.path, finding.line)).collect()
}
