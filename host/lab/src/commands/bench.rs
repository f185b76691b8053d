//! `hypercast-lab bench` (see [`crate::bench`]).

use anyhow::Context;

use crate::bench::{self, BenchOptions};

/// Measures, prints each figure as it comes, and writes them.
pub fn run(options: BenchOptions) -> anyhow::Result<()> {
    let report = bench::run(&options)?;
    println!("{report}");
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
