//! The machine that figures are of.

use hypercast_kernels::cpu::Isa;
use serde_json::{Value, json};

/// CPU, cores, memory and our versions.
pub fn describe() -> Value {
    let line = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let found = text.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        found.and_then(|line| line.split_once(':').map(|(_, value)| value.trim().to_owned()))
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    json!({
        "cpu": line("/proc/cpuinfo", "model name"),
        "threads": threads,
        "memory": line("/proc/meminfo", "MemTotal"),
        "instructions": format!("{:?}", Isa::best()),
        "os": std::env::consts::OS,
        "versions": { "hypercast": env!("CARGO_PKG_VERSION"), "burn": burn_version() },
    })
}

/// The pinned version: the workspace allows no other.
fn burn_version() -> &'static str {
    "0.21.0"
}
