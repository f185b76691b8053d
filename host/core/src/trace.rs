//! What a process says of itself, on standard error: as text, or as JSON lines where `HYPERCAST_LOG_FORMAT` is `json`.
//!
//! How much is said, `HYPERCAST_LOG` decides (levels by module, as `warn,hypercast::serve=info`); where it is not set, the daemon's
//! configuration does. Metrics and reports are elsewhere.

use std::{io::IsTerminal, sync::OnceLock};

use tracing_subscriber::EnvFilter;

use crate::error::{CommonErrors as _, Error, Result};

/// The variable that decides before everything else.
const VARIABLE: &str = "HYPERCAST_LOG";

type Change = Box<dyn Fn(EnvFilter) -> Result<()> + Send + Sync>;

static CHANGE: OnceLock<Change> = OnceLock::new();

/// Begins to say warnings and errors, or what `HYPERCAST_LOG` wants. A process does this once, first of all.
pub fn start() {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    // Colours are for people: a journal or a file gets none.
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter);
    let gone = |error: tracing_subscriber::reload::Error| Error::invalid(error.to_string());
    let change: Change = match std::env::var("HYPERCAST_LOG_FORMAT").as_deref() {
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
    let _ = CHANGE.set(change);
}

/// Whether a text says how much is logged.
///
/// # Errors
/// Why not.
pub fn check(levels: &str) -> std::result::Result<(), String> {
    match EnvFilter::try_new(levels) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{levels:?} does not say what is logged: {error}")),
    }
}

/// Says so much from now on, unless `HYPERCAST_LOG` decides.
///
/// # Errors
/// A text that [`check`] refuses.
pub fn set(levels: &str) -> Result<()> {
    let filter = EnvFilter::try_new(levels).map_err(|error| Error::invalid(error.to_string()))?;
    match CHANGE.get() {
        Some(change) if std::env::var_os(VARIABLE).is_none() => change(filter),
        // A test has no log of its own.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked_before_they_are_taken() {
        assert!(check("warn,hypercast::serve=info").is_ok());
        assert!(check("hypercast=loud").unwrap_err().contains("loud"));
        assert!(set("hypercast=loud").is_err());
    }
}
