//! Masked losses, computed on the host: the mean over a task's valid samples, and its gradient by
//! the outputs (paper eq. 3, 4). Of a task whose loss the network computes, only the mean is the
//! host's.
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

/// What a step's losses are computed from.
pub(super) struct StepOutputs<'a> {
    /// For each task, the kind of its labels.
    pub(super) kinds: &'a [TaskKind],
    /// For each task, whether the network computes its loss.
    pub(super) has_loss: &'a [bool],
    pub(super) targets: &'a [TaskTargets],
    /// `[rows, tasks]`, with the base rates' logits.
    pub(super) outputs: &'a [f32],
    /// `[rows, losses]`: those of tasks that have one, then the extra loss, if there is one.
    pub(super) losses: &'a [f32],
}

/// Each task's loss, and the gradients of all outputs.
pub(super) fn all_losses(step: &StepOutputs) -> (Vec<f64>, OutputGradients) {
    let StepOutputs { kinds, has_loss, targets, outputs, losses } = *step;
    let tasks = kinds.len();
    let rows = outputs.len() / tasks;
    let width = losses.len() / rows.max(1);
    let column = |all: &[f32], width: usize, at: usize| -> Vec<f32> {
        all.iter().skip(at).step_by(width).copied().collect()
    };
    let mut values = Vec::with_capacity(tasks);
    let mut gradients =
        OutputGradients { tasks: vec![0.0; outputs.len()], losses: vec![0.0; losses.len()] };
    let mut own = 0;
    for (task, (kind, targets)) in kinds.iter().zip(targets).enumerate() {
        let value = if has_loss[task] {
            let (value, weights) = weighted_mean(&column(losses, width, own), targets);
            put(&mut gradients.losses, &weights, [width, own]);
            own += 1;
            value
        } else {
            let (value, slopes) = task_loss(*kind, &column(outputs, tasks, task), targets);
            put(&mut gradients.tasks, &slopes, [tasks, task]);
            value
        };
        values.push(value);
    }
    if width > own {
        put(&mut gradients.losses, &extra_weights(targets, rows), [width, own]);
    }
    (values, gradients)
}

/// Writes the column `at` of `[rows, width]`.
fn put(all: &mut [f32], column: &[f32], [width, at]: [usize; 2]) {
    all.iter_mut().skip(at).step_by(width).zip(column).for_each(|(to, from)| *to = *from);
}

/// The mean of a network's own loss over the valid rows, and the weight of each row in it: as
/// [`task_loss`] weights the host's.
fn weighted_mean(losses: &[f32], targets: &TaskTargets) -> (f64, Vec<f32>) {
    let valid = targets.mask.iter().filter(|valid| **valid).count();
    let share = 1.0 / valid.max(1) as f64;
    let weight = |row: usize| {
        if targets.mask[row] { (f64::from(targets.weights[row]) * share) as f32 } else { 0.0 }
    };
    let weights: Vec<f32> = (0..losses.len()).map(weight).collect();
    let counted = losses.iter().zip(&weights).filter(|(_, weight)| **weight > 0.0);
    (counted.map(|(loss, weight)| f64::from(*loss) * f64::from(*weight)).sum(), weights)
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
