//! Log lines, the only thing that a guest can send out of its sandbox between
//! calls. The host marks them with the plugin's name and limits their rate.

use crate::raw::types::Level;

/// A line for the plugin's author.
pub fn debug(message: &str) {
    write(Level::Debug, message);
}

/// A line for the operator's log.
pub fn info(message: &str) {
    write(Level::Info, message);
}

/// Something that a person should look at.
pub fn warn(message: &str) {
    write(Level::Warn, message);
}

/// Something that went wrong; a fault of `rank` is returned as `Err`, not logged.
pub fn error(message: &str) {
    write(Level::Error, message);
}

#[cfg(target_arch = "wasm32")]
fn write(level: Level, message: &str) {
    crate::raw::log(level, message);
}

// There is no host behind a native build, as in a plugin's unit tests.
#[cfg(not(target_arch = "wasm32"))]
fn write(level: Level, message: &str) {
    eprintln!("{level:?}: {message}");
}
