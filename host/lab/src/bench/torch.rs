//! PyTorch as a rival: a script beside this file runs the same shapes on the
//! same number of threads, where a Python with torch is at hand.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use serde_json::Value;

const SCRIPT: &str = include_str!("torch_rival.py");

/// What PyTorch found.
pub struct Torch {
    /// Its version.
    pub version: String,
    /// Median seconds of each case, in order.
    pub seconds: Vec<f64>,
}

/// Runs cases, which `torch_rival.py` describes.
///
/// # Errors
/// Why there is no result: no Python, no torch, or the script's own words.
pub fn run(python: &str, cases: &[Value], runs: usize) -> Result<Torch, String> {
    let threads = rayon::current_num_threads();
    let request = serde_json::json!({ "threads": threads, "runs": runs, "cases": cases });
    let missing = |error: std::io::Error| {
        format!("PyTorch: cannot run {python:?} ({error}); name a Python with torch by --python")
    };
    let mut child = Command::new(python)
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    let mut input = child.stdin.take().expect("it was piped");
    // A script that ends early says why on its error output, which is read below.
    let _ = input.write_all(request.to_string().as_bytes());
    drop(input);
    let output = child.wait_with_output().map_err(missing)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default();
        return Err(format!("PyTorch: {last}; name a Python with torch by --python"));
    }
    let answer: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("PyTorch: {error}"))?;
    let seconds = answer["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64);
    let version = answer["torch"].as_str().unwrap_or("unknown").to_owned();
    Ok(Torch { version, seconds: seconds.collect() })
}
