//! Training, resuming and serving on a GPU's backend, through wgpu, beside the CPU.
//!
//! A software Vulkan adapter suffices. Without one the tests are skipped; in CI they fail.

mod fixtures;

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use fixtures::{batch, config, spec};
use hypercast_fm::{
    device::DeviceKind,
    example::{Event, Example},
    inference::{self, FmOutput, FmServingOptions, FoundationModel},
    metrics::{ScoredPrediction, binary_metrics},
    spec::FmConfig,
    trainer::{self, FmTrainer, ResumePaths, StepOutput},
};
use hypercast_kernels::device_trace::{DeviceOp, DeviceTrace};

/// Held by a test that can run: one at a time, because a trace has the requests of all.
///
/// # Panics
/// If it cannot run, in CI.
fn adapter(test: &str) -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    if let Err(reason) = DeviceKind::Wgpu.check() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{test}: {reason}");
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Everything that a step can have but dropout, which the CPU draws for each of its threads.
fn full() -> FmConfig {
    FmConfig {
        layers: 2,
        window: 6,
        global: 2,
        position_buckets: 8,
        time_buckets: 12,
        average_decay: 0.5,
        learning_rate: 2e-2,
        stochastic_length_alpha: 1.3,
        sample_negatives: [("shop".to_string(), 0.5)].into(),
        ..config()
    }
}

fn create(work: &Path, device: DeviceKind) -> Box<dyn FmTrainer> {
    trainer::create(work, &full(), &spec(), device).unwrap()
}

/// A step with a late outcome among its examples.
fn step(trainer: &mut dyn FmTrainer, at: u64) -> StepOutput {
    let (examples, late) = (batch(at * 16), batch(at * 16 + 400));
    trainer.step_with_corrections(&examples.iter().collect::<Vec<_>>(), &[&late[3]]).unwrap()
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let apart = (found - expected).abs();
        let both_missing = found.is_nan() && expected.is_nan();
        assert!(
            both_missing || apart <= tolerance * (1.0 + expected.abs()),
            "{what}: at {at}, {found} should be {expected}"
        );
    }
}

fn assert_same(what: &str, found: &FmOutput, expected: &FmOutput, tolerance: f32) {
    assert_close(&format!("{what}, TAE"), &found.tae, &expected.tae, tolerance);
    assert_close(&format!("{what}, predictions"), &found.main, &expected.main, tolerance);
}

/// The progressive NE of clicks.
fn ne(steps: &[StepOutput]) -> f64 {
    let rows = steps.iter().flat_map(|step| step.predictions.chunks(2).zip(step.labels.chunks(2)));
    let scored = rows.enumerate().map(|(row, (predictions, labels))| ScoredPrediction {
        user: row as u64,
        probability: predictions[0],
        label: labels[0] == 1.0,
    });
    binary_metrics(&scored.collect::<Vec<_>>()).ne.expect("both outcomes")
}

#[test]
fn gpu_training_is_that_of_the_cpu() {
    let Some(_alone) = adapter("training on wgpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut cpu = create(&dir.path().join("cpu"), DeviceKind::Cpu);
    let mut gpu = create(&dir.path().join("gpu"), DeviceKind::Wgpu);
    let (mut on_cpu, mut on_gpu) = (Vec::new(), Vec::new());
    for at in 0..12 {
        // The same requests again and again, so that a few steps move much.
        let (expected, found) = (step(&mut *cpu, at % 3), step(&mut *gpu, at % 3));
        // What differs by rounding at first is learned from in all later steps.
        let tolerance = if at == 0 { 1e-5 } else { 2e-3 };
        assert_close(&format!("step {at}, loss"), &[found.loss], &[expected.loss], tolerance);
        let what = format!("step {at}, predictions");
        assert_close(&what, &found.predictions, &expected.predictions, tolerance);
        assert_eq!(found.mask, expected.mask);
        on_cpu.push(expected);
        on_gpu.push(found);
    }
    let moved = on_cpu[9].predictions.iter().zip(&on_cpu[0].predictions);
    assert!(moved.filter(|(late, early)| (*late - *early).abs() > 0.05).count() > 10);
    let (found, expected) = (ne(&on_gpu), ne(&on_cpu));
    assert!((found / expected - 1.0).abs() < 1e-3, "NE {found}, on the CPU {expected}");
}

#[test]
fn gpu_steps_ask_for_no_result_before_their_backward_pass() {
    let Some(_alone) = adapter("a trace of a step on wgpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut gpu = create(dir.path(), DeviceKind::Wgpu);
    let (_, trace) = DeviceTrace::record(|| step(&mut *gpu, 0));
    let is_last = |op: &DeviceOp| matches!(op, DeviceOp::Launch(name) if name.contains("row_sums"));
    let of_rows = trace.ops.iter().position(is_last).expect("the gradient of the rows");
    let result = trace.ops.iter().position(|op| matches!(op, DeviceOp::Download(_)));
    assert!(result.expect("predictions") > of_rows, "{:?}", trace.ops);
}

#[test]
fn gpu_training_goes_on_after_a_resume_bit_for_bit() {
    let Some(_alone) = adapter("resuming on wgpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut whole = create(&path("whole"), DeviceKind::Wgpu);
    for at in 0..2 {
        step(&mut *whole, at);
    }
    whole.save(&path("saved")).unwrap();
    let from = ResumePaths { saved: &path("saved"), work: &path("resumed"), growths: &[] };
    let mut resumed = trainer::resume(from, &full(), &spec(), DeviceKind::Wgpu).unwrap();
    for at in 2..4 {
        let (found, expected) = (step(&mut *resumed, at), step(&mut *whole, at));
        let bits = |step: &StepOutput| {
            let values = step.predictions.iter().chain(&step.tae).chain([&step.loss]);
            values.map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(bits(&found), bits(&expected), "step {at}");
    }
}

/// A checkpoint of a model that the CPU trained, on two devices.
fn served(dir: &Path, history_cache_bytes: usize) -> [Box<dyn FoundationModel>; 2] {
    let mut trainer = create(&dir.join("work"), DeviceKind::Cpu);
    for at in 0..10 {
        step(&mut *trainer, at);
    }
    trainer.checkpoint(&dir.join("fm"), "1.0.0").unwrap();
    [DeviceKind::Cpu, DeviceKind::Wgpu].map(|device| {
        let options =
            FmServingOptions { device, history_cache_bytes, ..FmServingOptions::default() };
        inference::load(&dir.join("fm"), options).unwrap()
    })
}

#[test]
fn gpu_serving_is_that_of_the_cpu() {
    let Some(_alone) = adapter("serving on wgpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let [cpu, gpu] = served(dir.path(), 0);
    for from in [0, 16, 32] {
        let examples = batch(from);
        let examples: Vec<&Example> = examples.iter().collect();
        let (found, expected) = (gpu.infer(&examples).unwrap(), cpu.infer(&examples).unwrap());
        assert!(expected.tae.iter().any(|value| value.abs() > 0.01), "nothing to compare");
        assert_same("together", &found, &expected, 1e-5);
        let alone = gpu.infer(&examples[3..4]).unwrap();
        let width = expected.tae.len() / 16;
        assert_close("alone", &alone.tae, &expected.tae[3 * width..][..width], 1e-5);
    }
}

#[test]
fn gpu_histories_that_are_kept_change_nothing() {
    let Some(_alone) = adapter("kept histories on wgpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let [cpu, gpu] = served(dir.path(), 64 << 20);
    let past = fixtures::example(12, &[1]).history;
    for events in [3, 3, 4, 9, 15, 16] {
        let mut request = fixtures::example(40, &[0, 1, 2, 3, 4]);
        let event =
            |at: usize| Event { time_ms: at as i64 * 90_000, ..past[at % past.len()].clone() };
        request.history = (0..events).map(event).collect();
        request.time_ms = events as i64 * 90_000 + 1;
        let (found, expected) = (gpu.infer(&[&request]).unwrap(), cpu.infer(&[&request]).unwrap());
        assert_same(&format!("{events} events"), &found, &expected, 1e-5);
    }
    assert!(gpu.cache_counts().full_hits > 0, "{:?}", gpu.cache_counts());
    assert_eq!(gpu.cache_counts().encoded_tokens, cpu.cache_counts().encoded_tokens);
}
