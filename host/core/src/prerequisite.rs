//! What tests need beside the code: built plugins and guests that misbehave. For tests alone.
//!
//! A prerequisite that is missing skips its test with the reason; where `CI` is `true` it fails it,
//! so that no check is lost unnoticed.

use std::path::PathBuf;

/// The folder of the built plugins.
pub fn plugins(test: &str) -> Option<PathBuf> {
    folder(test, "HYPERCAST_PLUGINS")
}

/// The component of a guest that misbehaves.
pub fn hostile(test: &str, name: &str) -> Option<PathBuf> {
    folder(test, "HYPERCAST_HOSTILE").map(|dir| dir.join(format!("{name}.wasm")))
}

/// Skips `test`, and says why.
///
/// # Panics
/// Where `CI` is `true`.
pub fn skip(test: &str, reason: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} cannot be skipped in CI: {reason}"
    );
    eprintln!("SKIPPED {test}: {reason}");
}

fn folder(test: &str, variable: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map(PathBuf::from);
    if dir.is_none() {
        skip(test, &format!("{variable} names no folder; `cargo verify` builds it"));
    }
    dir
}
