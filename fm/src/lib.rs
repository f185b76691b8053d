//! The foundation model (under way).
pub mod example;
