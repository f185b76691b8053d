//! An A/B test in a closed loop.

pub mod world;
