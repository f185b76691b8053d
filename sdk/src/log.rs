//! Log lines. Apart from the results of its calls, they are all that a guest can send out of its
//! sandbox. The host adds the plugin's name to each line and limits their rate.

use crate::raw::types::Level;

/// Logs details that help the plugin's author.
pub fn debug(message: &str) {
    write(Level::Debug, message);
}

/// Logs an ordinary event for the operator.
pub fn info(message: &str) {
    write(Level::Info, message);
}

/// Logs something that a person should look at.
pub fn warn(message: &str) {
    write(Level::Warn, message);
}

/// Logs a failure. Return a fault of `rank` as `Err` instead of logging it.
pub fn error(message: &str) {
    write(Level::Error, message);
}

/// From now on a panic's message and place go to the host as a logged error. The host shows them as
/// the reason of the fault.
pub(crate) fn report_panics() {
    // A native build prints them itself.
    #[cfg(target_arch = "wasm32")]
    std::panic::set_hook(Box::new(|panic| error(&panic.to_string().replacen('\n', " ", 1))));
}

#[cfg(target_arch = "wasm32")]
fn write(level: Level, message: &str) {
    crate::raw::log(level, message);
}

// A native build (for unit tests) has no host to log to.
#[cfg(not(target_arch = "wasm32"))]
fn write(level: Level, message: &str) {
    eprintln!("{level:?}: {message}");
}
