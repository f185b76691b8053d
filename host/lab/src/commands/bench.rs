//! `hypercast-lab bench` (see [`crate::bench`]).

use super::print_report;
use crate::bench::{self, BenchOptions};

/// Measures, prints each figure as it comes, and writes them.
pub fn run(options: BenchOptions) -> anyhow::Result<()> {
    print_report(&bench::run(&options)?, options.json.as_deref())
}
