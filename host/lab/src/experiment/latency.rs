//! The latency of one request in each model, on this machine.
//!
//! Requests go one at a time through a checkpoint's inference and an expert's network, as in a
//! server, but without HTTP, features and Wasm.

use std::time::Instant;

use hypercast_core::quantile::quantile;
use hypercast_data::schema::CoreColumns;
use hypercast_expert::{BreakerConfig, ServedExpert, Tae};
use hypercast_fm::{
    example::Example,
    inference::{self, FmServingOptions, FoundationModel},
};

use super::ExperimentContext;
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::expert::TrainedExpert,
};

/// The first requests, which only warm up.
const WARM_UP: usize = 20;

/// Requests that a measurement needs.
pub const REQUESTS: usize = 220;

/// Median milliseconds per request.
#[derive(Debug, Clone, Copy)]
pub struct ModelLatency {
    /// The one-stage model.
    pub one_stage_ms: f64,
    /// The FM alone.
    pub fm_ms: f64,
    /// The expert alone.
    pub expert_ms: f64,
    /// The FM, then the expert.
    pub both_ms: f64,
}

/// Times `examples`, one request at a time.
///
/// # Errors
/// A checkpoint that cannot be loaded, an expert that faults.
pub fn measure(
    context: &ExperimentContext<'_>,
    expert: &TrainedExpert,
    examples: &[Example],
) -> Result<ModelLatency> {
    let device = context.config.device;
    // Without a cache, both models read the whole history each time.
    let serving =
        FmServingOptions { device, history_cache_bytes: 0, ..FmServingOptions::default() };
    let one_stage = inference::load(&context.checkpoint_dir("one-stage"), serving.clone())?;
    let fm = inference::load(&context.checkpoint_dir("fm"), serving)?;
    let (blueprint, parameters) =
        (expert.stream.blueprint.clone(), expert.stream.trainer.parameters().clone());
    let expert = ServedExpert::new(blueprint, parameters, device, BreakerConfig::default())?;
    let mut took: [Vec<f64>; 4] = Default::default();
    let core = CoreColumns::new(&context.dataset.schema);
    for example in examples {
        let shown = &*core.example(example);
        let (_, alone) = timed(|| infer(&*one_stage, shown))?;
        let (tae, of_fm) = timed(|| infer(&*fm, shown))?;
        let ((), of_expert) = timed(|| {
            let predictions = expert.predict(&[example], Tae::Rows(&tae));
            predictions.map(drop).map_err(|fault| Error::internal(fault.to_string()))
        })?;
        for (all, ms) in took.iter_mut().zip([alone, of_fm, of_expert, of_fm + of_expert]) {
            all.push(ms);
        }
    }
    let [one_stage_ms, fm_ms, expert_ms, both_ms] = took.map(median);
    Ok(ModelLatency { one_stage_ms, fm_ms, expert_ms, both_ms })
}

fn infer(model: &dyn FoundationModel, example: &Example) -> Result<Vec<f32>> {
    Ok(model.infer(&[example])?.tae)
}

fn timed<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = Instant::now();
    let result = run()?;
    Ok((result, start.elapsed().as_secs_f64() * 1e3))
}

fn median(times_ms: Vec<f64>) -> f64 {
    let warm_up = if times_ms.len() > WARM_UP { WARM_UP } else { 0 };
    let mut times_ms = times_ms[warm_up..].to_vec();
    if times_ms.is_empty() { f64::NAN } else { quantile(&mut times_ms, 0.5) }
}
