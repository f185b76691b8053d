//! The joiner as a state machine over handwritten and random events, and its runner over streams in
//! memory that fail at any moment.

mod clocks;
mod content;
mod growth;
mod machine;
mod runner;
mod world;
