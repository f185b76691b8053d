//! Runs the host's own code over a simulated clock, network and disk, and breaks them.

pub mod disk;
pub mod host;
pub mod trace;
