//! What the FM asks of a GPU: kernels, and bytes that cross to it and back, counted where CubeCL
//! hands them over. They are the same on every machine, so Vulkan in software will do. Times are
//! not measured; a model of a named GPU bounds them.

use hypercast_fm::{
    batch::{BatchBuilder, ColumnStatistics, FmBatch},
    cost::{self, TokenCounts},
    device::DeviceKind,
    example::Example,
    inference::{self, FmServingOptions},
    row_keys::RowKeys,
    spec::FmConfig,
    trainer,
};
use hypercast_kernels::device_trace::{DeviceOp, DeviceTrace};

use super::{
    BenchOptions, BenchReport,
    workload::{self, RequestSize},
};
use crate::error::{CommonErrors as _, Error, Result};

/// Events of each history.
const HISTORY: usize = 128;
const TARGETS: usize = 16;
const REQUESTS: u64 = 16;

/// An H100 SXM5 by its data sheet, and a usual time of a launch.
const GPU: GpuModel =
    GpuModel { name: "an H100", f32_flops: 67e12, bus_bytes: 64e9, launch_s: 4e-6 };

/// What bounds the time of a step on a GPU.
struct GpuModel {
    name: &'static str,
    /// Operations a second in f32, without tensor cores.
    f32_flops: f64,
    /// Bytes a second from the host, one way.
    bus_bytes: f64,
    /// What a launch takes a host, about.
    launch_s: f64,
}

/// The device that the build has.
fn device() -> Result<DeviceKind> {
    let all = [DeviceKind::Cuda, DeviceKind::Wgpu];
    let device = all.into_iter().find(|device| device.is_in_build()).ok_or_else(|| {
        let why = "this build runs nothing on a GPU: add `--features wgpu` (any GPU with a Vulkan \
                   driver, also one in software) or `--features cuda`";
        Error::invalid(why)
    })?;
    device.check()?;
    Ok(device)
}

fn config(layers: usize) -> FmConfig {
    FmConfig { layers, max_history: HISTORY, ..FmConfig::default() }
}

fn examples() -> Vec<Example> {
    let items = workload::items();
    let size = |user| RequestSize { user, events: HISTORY, candidates: TARGETS };
    (1..=REQUESTS).map(|user| workload::example(&items, size(user))).collect()
}

/// Adds the counts of a training step with the default settings, and of a layer's part in it.
pub fn step(_: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let device = device()?;
    let examples = examples();
    let examples: Vec<&Example> = examples.iter().collect();
    let shipped = step_trace(&config(2), device, &examples)?;
    let name = format!("FM training step, B{REQUESTS} N{HISTORY} M{TARGETS} d64, 2 layers");
    let passes = launches_of_passes(&shipped);
    report.figure(format!("{name}: launches of its passes"), passes as f64, "launches");
    let optimizer = shipped.launches() - passes;
    report.figure("of its optimizer and average", optimizer as f64, "launches");
    let needed = needed_bytes(&config(2), &examples)?;
    report.versus(
        format!("{name}: from the host"),
        shipped.uploaded_bytes() as f64,
        "bytes",
        "its distinct rows, indices and columns",
        needed as f64,
    );
    report.figure("to the host", shipped.downloaded_bytes() as f64, "bytes");

    // Without an average, the only forward pass is that of learning.
    let alone = |layers| FmConfig { average_decay: 0.0, ..config(layers) };
    let of_step = |layers| {
        let trace = step_trace(&alone(layers), device, &examples)?;
        Ok::<_, Error>(launches_of_passes(&trace))
    };
    let of_prediction = |layers| {
        let trace = predict_trace(&alone(layers), device, &examples)?;
        Ok::<_, Error>(trace.launches())
    };
    let both = of_step(3)? - of_step(2)?;
    let forward = of_prediction(3)? - of_prediction(2)?;
    report.figure("a layer more, forward", forward as f64, "launches");
    report.figure("a layer more, backward", (both - forward) as f64, "launches");
    report.note(bound(&shipped, REQUESTS as f64));
    Ok(())
}

/// The launches before the host asks for a result: those of the forward and backward passes.
fn launches_of_passes(trace: &DeviceTrace) -> usize {
    let is_launch = |op: &&DeviceOp| matches!(op, DeviceOp::Launch(_));
    let passes = trace.ops.iter().take_while(|op| !matches!(op, DeviceOp::Download(_)));
    passes.filter(is_launch).count()
}

/// Adds the counts of a request whose history is kept on the device.
pub fn serving(_: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let (device, config) = (device()?, config(2));
    let examples = examples();
    let dir = super::temporary()?;
    let spec = workload::spec();
    let mut trainer = trainer::create(&dir.path().join("work"), &config, &spec, DeviceKind::Cpu)?;
    trainer.step(&examples.iter().collect::<Vec<_>>())?;
    let checkpoint = dir.path().join("fm");
    trainer.checkpoint(&checkpoint, "1.0.0")?;
    let options =
        FmServingOptions { device, history_cache_bytes: 64 << 20, ..FmServingOptions::default() };
    let fm = inference::load(&checkpoint, options)?;
    fm.infer(&[&examples[0]])?;
    let (output, trace) = DeviceTrace::record(|| fm.infer(&[&examples[0]]));
    output?;
    let name = format!("{TARGETS} candidates over a kept history of {HISTORY}, 2 layers d64");
    report.figure(format!("{name}: launches"), trace.launches() as f64, "launches");
    let candidates = TARGETS as f64;
    let [up, down] = [trace.uploaded_bytes(), trace.downloaded_bytes()];
    report.figure("from the host, a candidate", up as f64 / candidates, "bytes");
    report.figure("to the host, a candidate", down as f64 / candidates, "bytes");
    Ok(())
}

/// A step after one that compiled its kernels.
fn step_trace(config: &FmConfig, device: DeviceKind, examples: &[&Example]) -> Result<DeviceTrace> {
    let dir = super::temporary()?;
    let mut trainer = trainer::create(dir.path(), config, &workload::spec(), device)?;
    trainer.step(examples)?;
    let (output, trace) = DeviceTrace::record(|| trainer.step(examples));
    output?;
    Ok(trace)
}

/// Predictions after ones that compiled their kernels.
fn predict_trace(
    config: &FmConfig,
    device: DeviceKind,
    examples: &[&Example],
) -> Result<DeviceTrace> {
    let dir = super::temporary()?;
    let trainer = trainer::create(dir.path(), config, &workload::spec(), device)?;
    trainer.predict(examples)?;
    let (output, trace) = DeviceTrace::record(|| trainer.predict(examples));
    output?;
    Ok(trace)
}

/// What a step must know of a batch: its distinct rows, where each token has them, and its numbers.
fn needed_bytes(config: &FmConfig, examples: &[&Example]) -> Result<usize> {
    let spec = workload::spec();
    let builder = BatchBuilder::new(&spec, config, RowKeys::Whole);
    let batch = builder.build(examples, &ColumnStatistics::new(&spec))?;
    let FmBatch { history_offsets, target_offsets, key_index, profile_index, .. } = &batch;
    let indices = [history_offsets, target_offsets, key_index, profile_index];
    let columns =
        [&batch.dense, &batch.outcomes, &batch.features, &batch.learned_labels, &batch.weights];
    let words = batch.keys.len() * config.embedding_dim
        + indices.iter().map(|all| all.len()).sum::<usize>()
        + columns.iter().map(|all| all.len()).sum::<usize>()
        + 2 * batch.times_s.len();
    Ok(size_of::<f32>() * words + batch.mask.len())
}

/// The least that a step takes on [`GPU`], by what it asks for. A step is three times a forward
/// pass.
fn bound(trace: &DeviceTrace, requests: f64) -> String {
    let tokens = TokenCounts { history: HISTORY, targets: TARGETS };
    let products = 3.0 * requests * cost::flops(&config(2), &workload::spec(), tokens);
    let crossing = (trace.uploaded_bytes() + trace.downloaded_bytes()) as f64;
    let waits = trace.ops.iter().filter(|op| matches!(op, DeviceOp::Download(_))).count();
    format!(
        "estimate: on {} a step takes at least {:.0} us of products in f32, {:.0} us of transfers \
         and {:.0} us of launches at {:.0} us each; it waits for the device {waits} times",
        GPU.name,
        products / GPU.f32_flops * 1e6,
        crossing / GPU.bus_bytes * 1e6,
        trace.launches() as f64 * GPU.launch_s * 1e6,
        GPU.launch_s * 1e6,
    )
}
