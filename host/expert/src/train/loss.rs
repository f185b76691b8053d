//! Masked losses on the host: the mean over a task's valid samples only, and
//! its gradient by the logits (paper eq. 3, 4).
//!
//! The logits are read back anyway for progressive metrics; in f64 the loss is
//! exact, and its gradient seeds the backward pass on the device.

use crate::wasm::contract::TaskKind;

/// Labels of one task for a batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskTargets {
    /// `[rows]`; what is outside the sample space is not read.
    pub labels: Vec<f32>,
    /// `[rows]`: whether the row is in the task's sample space.
    pub mask: Vec<bool>,
    /// `[rows]`: loss weights, not negative.
    pub weights: Vec<f32>,
}

/// The loss of one task, and its gradient by each row's output.
///
/// Binary tasks: cross-entropy with logits. Regressions: squared error. The
/// weighted sum over valid rows is divided by their number; without any, loss
/// and gradients are exactly 0.
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
