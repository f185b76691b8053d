//! Masked losses, computed on the host: the mean over a task's valid samples, and its gradient by
//! the outputs (paper eq. 3, 4).
//!
//! The outputs are copied to the host anyway, for progressive metrics. The loss is computed in f64,
//! and its gradient starts the backward pass on the device.

use super::step::OutputGradients;
use crate::wasm::contract::TaskKind;

/// Labels of one task for a batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskTargets {
    /// `[rows]`; rows outside the sample space are not read.
    pub labels: Vec<f32>,
    /// `[rows]`: whether the row is in the task's sample space.
    pub mask: Vec<bool>,
    /// `[rows]`: loss weights, not negative.
    pub weights: Vec<f32>,
}

/// The loss of one task and its gradient by each row's output.
///
/// It is cross-entropy with logits for a binary task, and squared error for a regression: the
/// weighted sum over the valid rows, divided by their number. Without a valid row, loss and
/// gradients are exactly 0.
pub fn task_loss(kind: TaskKind, outputs: &[f32], targets: &TaskTargets) -> (f64, Vec<f32>) {
    let mut gradient = vec![0.0; outputs.len()];
    let valid = targets.mask.iter().filter(|valid| **valid).count();
    if valid == 0 {
        return (0.0, gradient);
    }
    let share = 1.0 / valid as f64;
    let mut loss = 0.0;
    for row in (0..outputs.len()).filter(|row| targets.mask[*row]) {
        let (x, y) = (f64::from(outputs[row]), f64::from(targets.labels[row]));
        let weight = f64::from(targets.weights[row]) * share;
        let (value, slope) = match kind {
            TaskKind::Binary => (x.max(0.0) - x * y + (-x.abs()).exp().ln_1p(), sigmoid(x) - y),
            TaskKind::Regression => ((x - y) * (x - y), 2.0 * (x - y)),
        };
        loss += weight * value;
        gradient[row] = (weight * slope) as f32;
    }
    (loss, gradient)
}

/// The logistic function, without overflow.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// Each task's loss, and the gradients of all outputs.
pub(super) fn all_losses(
    kinds: &[TaskKind],
    targets: &[TaskTargets],
    outputs: &[f32],
    extra: &[f32],
) -> (Vec<f64>, OutputGradients) {
    let tasks = kinds.len();
    let rows = outputs.len() / tasks;
    let mut losses = Vec::with_capacity(tasks);
    let mut gradient = vec![0.0; outputs.len()];
    for (task, (kind, targets)) in kinds.iter().zip(targets).enumerate() {
        let column: Vec<f32> = outputs.iter().skip(task).step_by(tasks).copied().collect();
        let (loss, slopes) = task_loss(*kind, &column, targets);
        losses.push(loss);
        for (row, slope) in slopes.into_iter().enumerate() {
            gradient[row * tasks + task] = slope;
        }
    }
    let extra_loss = if extra.is_empty() { Vec::new() } else { extra_weights(targets, rows) };
    (losses, OutputGradients { tasks: gradient, extra_loss })
}

/// The weights of the extra loss. It is a mean over rows, each weighted by its largest weight of
/// any task. Rows outside all sample spaces have weight 0.
fn extra_weights(targets: &[TaskTargets], rows: usize) -> Vec<f32> {
    let weight = |row: usize| {
        let weights = targets.iter().filter(|task| task.mask[row]).map(|task| task.weights[row]);
        weights.fold(0.0f32, f32::max)
    };
    let weights: Vec<f32> = (0..rows).map(weight).collect();
    let total: f32 = weights.iter().sum();
    if total > 0.0 { weights.iter().map(|weight| weight / total).collect() } else { weights }
}

/// The prediction of an output: the probability of a binary task, the value of a regression.
pub(crate) fn prediction(kind: TaskKind, output: f32) -> f32 {
    match kind {
        TaskKind::Binary => sigmoid(f64::from(output)) as f32,
        TaskKind::Regression => output,
    }
}
