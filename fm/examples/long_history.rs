//! Trains and serves with histories of 10,000 events, and prints time and peak memory.
//!
//! Run it: `cargo run -p hypercast-fm --example long_history`
//!
//! Fails if a variant takes 4 GiB of memory or more.

use std::time::Instant;

use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FmServingOptions},
    spec::FmConfig,
    trainer,
};

#[path = "../tests/fixtures/requests.rs"]
mod fixtures;

/// Events per history.
const HISTORY: usize = 10_000;
/// Targets per request.
const TARGETS: usize = 16;
/// Requests per training batch: several times what fits in memory at once.
const REQUESTS: u64 = 24;
const STEPS: u64 = 1;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plain = FmConfig { max_history: HISTORY, ..FmConfig::default() };
    let variants = [
        ("window 256, global 32", FmConfig { window: 256, global: 32, ..plain.clone() }),
        (
            "dense, stochastic length 1.6",
            FmConfig { stochastic_length_alpha: 1.6, ..plain.clone() },
        ),
        ("dense", plain),
    ];
    println!("{:<30} {:>12} {:>12} {:>12}", "attention", "train s/req", "serve s/req", "peak MiB");
    for (name, config) in variants {
        let peak = variant(name, &config)?;
        if peak >= 4096 {
            return Err(format!("{name}: {peak} MiB exceeds the limit of 4 GiB").into());
        }
    }
    Ok(())
}

/// Trains and serves one variant. Returns the process's peak memory in MiB.
fn variant(name: &str, config: &FmConfig) -> Result<u64, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    reset_peak();
    let mut trainer = trainer::create(dir.path(), config, &fixtures::spec(), DeviceKind::Cpu)?;
    let started = Instant::now();
    for step in 0..STEPS {
        let batch: Vec<Example> = (0..REQUESTS).map(|i| request(step * REQUESTS + i)).collect();
        let output = trainer.step(&batch.iter().collect::<Vec<_>>())?;
        assert!(output.tae.iter().all(|x| x.is_finite()));
    }
    let training_s = started.elapsed().as_secs_f64() / (STEPS * REQUESTS) as f64;
    trainer.checkpoint(&dir.path().join("fm"), "1.0.0")?;
    drop(trainer);
    let fm = inference::load(&dir.path().join("fm"), FmServingOptions::default())?;
    let batch: Vec<Example> = (0..REQUESTS).map(request).collect();
    let started = Instant::now();
    let output = fm.infer(&batch.iter().collect::<Vec<_>>())?;
    let serving_s = started.elapsed().as_secs_f64() / REQUESTS as f64;
    assert_eq!(output.main.len(), REQUESTS as usize * TARGETS);
    let peak = peak_mib()?;
    println!("{name:<30} {training_s:>12.3} {serving_s:>12.3} {peak:>12}");
    Ok(peak)
}

/// A request like those of the tests, with a long history.
fn request(request: u64) -> Example {
    let id = |i: usize| (request * 7919 + i as u64 * 104_729) % 50_000;
    let targets: Vec<u64> = (HISTORY..HISTORY + TARGETS).map(id).collect();
    Example {
        time_ms: HISTORY as i64 * 60_000,
        history: (0..HISTORY).map(|i| fixtures::event(request, id(i), i)).collect(),
        ..fixtures::example(request, &targets)
    }
}

/// Resets the kernel's record of peak memory. If that fails, the peak is that of all variants so
/// far.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn peak_mib() -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).ok_or("no VmHWM")?;
    let kib: u64 = line.split_whitespace().nth(1).ok_or("no number in VmHWM")?.parse()?;
    Ok(kib / 1024)
}
