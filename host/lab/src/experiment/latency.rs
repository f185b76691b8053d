//! How long one request takes, model by model, on this machine.
//!
//! Requests go one at a time through what a server would run: a checkpoint's
//! inference and an expert's network. HTTP, features and Wasm are the daemon's.

use std::{path::Path, sync::Arc, time::Instant};

use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FoundationModel, Serving},
};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_expert::{Blueprint, BreakerConfig, Expert, Parameters, Tae};

/// Requests that warm up, before those that are timed.
const WARM_UP: usize = 20;

/// Requests that are asked for.
pub const REQUESTS: usize = 220;

/// Median milliseconds a request.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    /// The one-stage model.
    pub one_stage_ms: f64,
    /// The FM alone.
    pub fm_ms: f64,
    /// The expert alone.
    pub expert_ms: f64,
    /// The FM, then the expert.
    pub both_ms: f64,
}

/// The models to time.
pub struct Models<'a> {
    /// A checkpoint.
    pub one_stage: &'a Path,
    /// A checkpoint.
    pub fm: &'a Path,
    /// The expert's network.
    pub blueprint: Arc<Blueprint>,
    /// Its parameters.
    pub parameters: Parameters,
    /// Where they run.
    pub device: DeviceKind,
}

/// Times `examples`, one request at a time.
///
/// # Errors
/// A checkpoint that cannot be loaded, an expert that faults.
pub fn measure(models: Models<'_>, examples: &[Example]) -> Result<Latency> {
    // Nothing is kept between requests: both models are told all of a history each time.
    let serving = Serving { device: models.device, history_cache_bytes: 0, ..Serving::default() };
    let one_stage = inference::load(models.one_stage, serving)?;
    let fm = inference::load(models.fm, serving)?;
    let Models { blueprint, parameters, device, .. } = models;
    let expert = Expert::new(blueprint, parameters, device, BreakerConfig::default())?;
    let mut took: [Vec<f64>; 4] = Default::default();
    for example in examples {
        let (_, alone) = timed(|| infer(&*one_stage, example))?;
        let (tae, of_fm) = timed(|| infer(&*fm, example))?;
        let ((), of_expert) = timed(|| {
            let said = expert.predict(&[example], Tae::Rows(&tae));
            said.map(drop).map_err(|fault| Error::invalid(fault.to_string()))
        })?;
        for (all, ms) in took.iter_mut().zip([alone, of_fm, of_expert, of_fm + of_expert]) {
            all.push(ms);
        }
    }
    let [one_stage_ms, fm_ms, expert_ms, both_ms] = took.map(median);
    Ok(Latency { one_stage_ms, fm_ms, expert_ms, both_ms })
}

fn infer(model: &dyn FoundationModel, example: &Example) -> Result<Vec<f32>> {
    Ok(model.infer(&[example])?.tae)
}

fn timed<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = Instant::now();
    let result = run()?;
    Ok((result, start.elapsed().as_secs_f64() * 1e3))
}

fn median(took: Vec<f64>) -> f64 {
    let warm = if took.len() > WARM_UP { WARM_UP } else { 0 };
    let mut took = took[warm..].to_vec();
    took.sort_unstable_by(f64::total_cmp);
    took.get(took.len() / 2).copied().unwrap_or(f64::NAN)
}
