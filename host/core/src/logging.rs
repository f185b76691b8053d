//! Log lines of a process on standard error: text, or JSON lines if `HYPERCAST_LOG_FORMAT` is
//! `json`.
//!
//! `HYPERCAST_LOG` sets the levels by module, for example `warn,hypercast_serve=info`. Without it,
//! the daemon's configuration sets them.

use std::{io::IsTerminal, sync::OnceLock};

use tracing_subscriber::EnvFilter;

use crate::error::{CommonErrors as _, Error, Result};

/// The environment variable that overrides the configuration.
const VARIABLE: &str = "HYPERCAST_LOG";

type LevelSetter = Box<dyn Fn(EnvFilter) -> Result<()> + Send + Sync>;

static LEVEL_SETTER: OnceLock<LevelSetter> = OnceLock::new();

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
    // A journal or a file gets no colours.
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(levels);
    let gone = |error: tracing_subscriber::reload::Error| Error::internal(error.to_string());
    let change: LevelSetter = match std::env::var("HYPERCAST_LOG_FORMAT").as_deref() {
        Ok("json") => {
            let builder = builder.json().with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(gone))
        }
        _ => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(gone))
        }
    };
    // Only this function sets it, and `init` has panicked if it ran twice.
    let _ = LEVEL_SETTER.set(change);
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
    match LEVEL_SETTER.get() {
        Some(change) if std::env::var_os(VARIABLE).is_none() => change(filter),
        // Tests do not start logging.
        _ => Ok(()),
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
}
