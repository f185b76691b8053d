//! (under way)
fn main() {}
