//! Progress of long commands on standard error: a bar on a terminal, else a line every 15 s.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// The time between two lines when there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// The progress of one step of a command.
#[derive(Debug)]
pub struct Progress {
    name: String,
    total: u64,
    done: u64,
    bar: Option<ProgressBar>,
    last_line: Instant,
    started: Instant,
}

impl Progress {
    /// Starts a step of `total` units.
    pub fn start(name: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{prefix:<22} {wide_bar} {pos}/{len} {eta} {msg}")
                    .expect("a valid template");
            ProgressBar::new(total).with_style(style).with_prefix(name.to_owned())
        });
        let now = Instant::now();
        Self { name: name.into(), total, done: 0, bar, last_line: now, started: now }
    }

    /// Adds `units`. `message` is called only when something is drawn.
    pub fn advance(&mut self, units: u64, message: impl FnOnce() -> String) {
        self.done += units;
        match &self.bar {
            Some(bar) => {
                bar.inc(units);
                if self.last_line.elapsed() > Duration::from_millis(500) {
                    bar.set_message(message());
                    self.last_line = Instant::now();
                }
            }
            None if self.last_line.elapsed() > LINE_EVERY => {
                self.last_line = Instant::now();
                eprintln!("{}: {} of {} {}", self.name, self.done, self.total, message());
            }
            None => {}
        }
    }

    /// Ends the step, prints `message` with its duration, and returns the duration.
    pub fn finish(self, message: &str) -> Duration {
        let took = self.started.elapsed();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {message} ({:.1} s)", self.name, took.as_secs_f64());
        took
    }
}
