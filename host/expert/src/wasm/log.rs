//! What guests wrote of late: a bounded ring a plugin, kept beside the host's own log so that authors can be shown theirs.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use hypercast_core::clock::now_ms;

/// Lines a plugin.
const LINES: usize = 256;

/// Plugins; one more makes room for itself by the one that has been silent for longest.
const PLUGINS: usize = 256;

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When, milliseconds since the epoch.
    pub at_ms: i64,
    /// The plugin that wrote it.
    pub plugin: String,
    /// debug, info, warn or error.
    pub level: String,
    /// What it wrote.
    pub text: String,
}

/// The lines of all plugins of an engine.
#[derive(Debug, Default)]
pub struct GuestLog {
    lines: Mutex<HashMap<String, VecDeque<LogLine>>>,
}

impl GuestLog {
    /// Keeps a line; the plugin's oldest makes room.
    pub fn keep(&self, plugin: &str, level: &str, text: &str) {
        let line = LogLine {
            at_ms: now_ms(),
            plugin: plugin.to_owned(),
            level: level.to_owned(),
            text: text.to_owned(),
        };
        let mut all = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(plugin) && all.len() == PLUGINS {
            let silent = all.iter().min_by_key(|(_, lines)| lines.back().map(|line| line.at_ms));
            let silent = silent.expect("there are many").0.clone();
            all.remove(&silent);
        }
        let lines = all.entry(plugin.to_owned()).or_default();
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// A plugin's lines, oldest first.
    pub fn lines(&self, plugin: &str) -> Vec<LogLine> {
        let all = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(plugin).into_iter().flatten().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_plugins_are_bounded() {
        let log = GuestLog::default();
        for at in 0..LINES + 10 {
            log.keep("a", "info", &at.to_string());
        }
        let lines = log.lines("a");
        assert_eq!((lines.len(), lines[0].text.as_str()), (LINES, "10"));
        for plugin in 0..PLUGINS * 2 {
            log.keep(&plugin.to_string(), "warn", "x");
        }
        assert_eq!(log.lines.lock().unwrap().len(), PLUGINS);
        assert_eq!(log.lines(&(PLUGINS * 2 - 1).to_string()).len(), 1);
        assert!(log.lines("nobody").is_empty());
    }
}
