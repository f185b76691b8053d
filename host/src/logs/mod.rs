//! Logs: what is written while the system runs.
