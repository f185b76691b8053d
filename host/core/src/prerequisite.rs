//! What tests need beside the code: built plugins and hostile guests. Only tests use this.
//!
//! Without a prerequisite a test is skipped with the reason; if `CI` is `true` it fails instead, so
//! that no check is lost unnoticed.

use std::path::PathBuf;

/// The folder of the built plugins.
pub fn plugins(test: &str) -> Option<PathBuf> {
    folder(test, "HYPERCAST_PLUGINS")
}

/// The component of a hostile guest.
pub fn hostile(test: &str, name: &str) -> Option<PathBuf> {
    folder(test, "HYPERCAST_HOSTILE").map(|dir| dir.join(format!("{name}.wasm")))
}

/// Skips `test` with the reason.
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
