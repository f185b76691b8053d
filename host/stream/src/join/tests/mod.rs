//! Tests of the joiner: as a state machine over handwritten and random events, and
//! at work over streams in memory, stopped and killed wherever it may be.

mod machine;
mod runner;
mod world;
