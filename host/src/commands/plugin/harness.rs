//! `hypercast plugin harness`: answers the questions that tests of a plugin ask, on standard input
//! and output. `hypercast-testkit` starts it and documents what a test can ask.

use std::io::{stdin, stdout};

use hypercast_harness::session;

/// Answers until standard input ends.
pub fn run() -> anyhow::Result<()> {
    Ok(session::serve(stdin().lock(), stdout().lock())?)
}
