//! The wall clock, as events and logs tell it. Nothing that must come out the same twice reads it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the epoch; 0 where the clock stands before it.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
