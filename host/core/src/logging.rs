//! Log lines of a process on standard error: text, or JSON lines if `HYPERCAST_LOG_FORMAT` is
//! `json`.
//!
//! `HYPERCAST_LOG` sets the levels by module, for example `warn,hypercast_serve=info`. Without it,
//! the daemon's configuration sets them.

use std::{
    fmt::Display,
    io::IsTerminal,
    sync::OnceLock,
    time::{Duration, Instant},
};

use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::{EnvFilter, Registry, prelude::*};

use crate::{
    clock,
    error::{CommonErrors as _, Error, Result},
};

/// The environment variable that overrides the configuration.
const VARIABLE: &str = "HYPERCAST_LOG";

/// A failure that did not come for this long is told when it comes again.
const QUIET: Duration = Duration::from_secs(600);

/// The most failures that are remembered; the oldest are forgotten first.
const MOST_TOLD: usize = 16;

static LEVELS: OnceLock<Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging: warnings and errors, or what `HYPERCAST_LOG` sets. A process calls this once,
/// before anything else.
///
/// # Panics
/// On a second call.
pub fn start() {
    let levels = std::env::var(VARIABLE)
        .ok()
        .and_then(|levels| filter(&levels).ok())
        .unwrap_or_else(|| EnvFilter::new("warn"));
    let (levels, handle) = reload::Layer::new(levels);
    // A journal or a file gets no colours.
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match std::env::var("HYPERCAST_LOG_FORMAT").as_deref() {
        Ok("json") => lines.json().boxed(),
        _ => lines.boxed(),
    };
    tracing_subscriber::registry().with(levels).with(lines).init();
    // Only this function sets it, and `init` has panicked if it ran twice.
    let _ = LEVELS.set(handle);
}

/// Checks a list of levels.
///
/// # Errors
/// What is wrong with it.
pub fn check_levels(levels: &str) -> std::result::Result<(), String> {
    filter(levels).map(drop)
}

/// Sets the levels, unless `HYPERCAST_LOG` has set them.
///
/// # Errors
/// [`check_levels`] refuses `levels`.
pub fn set_levels(levels: &str) -> Result<()> {
    let filter = filter(levels).map_err(Error::invalid)?;
    match LEVELS.get() {
        Some(levels) if std::env::var_os(VARIABLE).is_none() => {
            levels.reload(filter).map_err(|error| Error::internal(error.to_string()))
        }
        // Tests do not start logging.
        _ => Ok(()),
    }
}

/// The failures of something that is tried again and again. Each is told once, and once more when
/// it comes back after ten minutes without it, so that a failure that lasts does not fill the log.
#[derive(Debug, Default)]
pub struct RepeatedFailures {
    told: Vec<ToldFailure>,
}

#[derive(Debug)]
struct ToldFailure {
    words: String,
    came: Instant,
}

impl RepeatedFailures {
    /// Whether a failure is to be told: the same words were not told, or not lately.
    pub fn is_news(&mut self, failure: &impl Display) -> bool {
        self.is_news_at(failure.to_string(), clock::instant())
    }

    fn is_news_at(&mut self, words: String, now: Instant) -> bool {
        self.told.retain(|told| now.duration_since(told.came) < QUIET);
        if let Some(told) = self.told.iter_mut().find(|told| told.words == words) {
            told.came = now;
            return false;
        }
        if self.told.len() == MOST_TOLD {
            self.told.remove(0);
        }
        self.told.push(ToldFailure { words, came: now });
        true
    }
}

/// The filter for `levels`. Until 0.1 the host was one crate, so `hypercast::serve` still means
/// `hypercast_serve`.
fn filter(levels: &str) -> std::result::Result<EnvFilter, String> {
    EnvFilter::try_new(levels.replace("hypercast::", "hypercast_"))
        .map_err(|error| format!("{levels:?} is not a list of log levels: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked_before_they_are_set() {
        assert!(check_levels("warn,hypercast_serve=info").is_ok());
        assert!(check_levels("hypercast=loud").unwrap_err().contains("loud"));
        assert!(set_levels("hypercast=loud").is_err());
    }

    #[test]
    fn module_paths_of_earlier_releases_still_work() {
        let filter = filter("warn,hypercast::serve=info").unwrap().to_string();
        assert!(filter.contains("hypercast_serve=info"), "{filter}");
    }

    #[test]
    fn a_failure_that_lasts_is_told_once_and_again_after_a_pause() {
        let (mut failures, start) = (RepeatedFailures::default(), Instant::now());
        let mut at = |seconds: u64, words: &str| {
            failures.is_news_at(words.to_owned(), start + Duration::from_secs(seconds))
        };
        assert!(at(0, "held by process 7"));
        // Every five seconds for an hour, and another one in between.
        for attempt in 1..720 {
            assert!(!at(attempt * 5, "held by process 7"), "attempt {attempt}");
            assert_eq!(at(attempt * 5 + 1, "held by process 8"), attempt == 1);
        }
        assert!(at(3600 + QUIET.as_secs(), "held by process 7"), "it came back after a pause");
        let mut told = |words: usize| failures.is_news(&words);
        assert!((0..3 * MOST_TOLD).all(&mut told), "each is another one");
        assert!(failures.told.len() <= MOST_TOLD);
    }
}
