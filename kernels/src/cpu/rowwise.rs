//! Operations on one row at a time: layer norm and its gradient, activation and dropout.
//!
//! Sums are by lanes in a fixed order. The loops are plain Rust, which the compiler vectorises with
//! the target features of the function that they are inlined into.

use super::lanes::{Lanes, MAX_LANES};
use super::math::{sigmoid, sum_by_halves};
use crate::layer::{Affine, SeededDropout};

/// The mean of a row and one over its standard deviation.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stats {
    mean: f32,
    factor: f32,
}

impl Stats {
    #[inline(always)]
    pub(super) fn of(x: &[f32], epsilon: f32) -> Self {
        let width = x.len() as f32;
        let mean = sum(x, x, |x, _| x) / width;
        let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) / width;
        Stats { mean, factor: 1.0 / (variance + epsilon).sqrt() }
    }
}

/// The layer norm of a row.
#[inline(always)]
pub(super) fn normalise(x: &[f32], stats: Stats, weights: Affine<&[f32]>, out: &mut [f32]) {
    let weights = weights.scale.iter().zip(weights.shift);
    for ((out, x), (scale, shift)) in out.iter_mut().zip(x).zip(weights) {
        *out = (x - stats.mean) * stats.factor * scale + shift;
    }
}

/// The gradients of a layer norm's weights, summed over rows.
pub(super) type NormGrads = Affine<Vec<f32>>;

impl NormGrads {
    pub(super) fn zeros(width: usize) -> Self {
        Affine { scale: vec![0.0; width], shift: vec![0.0; width] }
    }

    /// Turns the gradient of a norm's output into that of its input `x` in place, and adds to the
    /// gradients of the weights.
    ///
    /// With x̂ the normalised row and h = grad · scale: `dx = (h - mean(h) - x̂ mean(h x̂)) / σ`.
    #[inline(always)]
    pub(super) fn differentiate(
        &mut self,
        x: &[f32],
        stats: Stats,
        scale: &[f32],
        grad: &mut [f32],
    ) {
        let Stats { mean, factor } = stats;
        let sums = self.scale.iter_mut().zip(&mut self.shift);
        for ((grad, x), (by_scale, by_shift)) in grad.iter().zip(x).zip(sums) {
            *by_scale += grad * ((x - mean) * factor);
            *by_shift += grad;
        }
        for (grad, scale) in grad.iter_mut().zip(scale) {
            *grad *= scale;
        }
        let width = grad.len() as f32;
        let plain = sum(grad, grad, |grad, _| grad) / width;
        let along = sum(grad, x, |grad, x| grad * ((x - mean) * factor)) / width;
        for (grad, x) in grad.iter_mut().zip(x) {
            *grad = (*grad - plain - (x - mean) * factor * along) * factor;
        }
    }
}

/// SiLU in place, in whole vectors, and its slopes if `slopes` is given.
#[inline(always)]
pub(super) fn activate<V: Lanes>(cells: &mut [f32], slopes: Option<&mut [f32]>) {
    assert!(cells.len().is_multiple_of(V::N), "not whole vectors");
    let slopes = slopes.map(|slopes| {
        assert_eq!(slopes.len(), cells.len(), "a slope for each cell");
        slopes.as_mut_ptr()
    });
    for at in (0..cells.len()).step_by(V::N) {
        // SAFETY: at + N is at most the length of both, by the assertions.
        unsafe {
            let cell = cells.as_mut_ptr().wrapping_add(at);
            let x = V::load(cell);
            let sigmoid = sigmoid(x);
            let silu = x.mul(sigmoid);
            silu.store(cell);
            if let Some(slopes) = slopes {
                silu.mul(V::splat(1.0).sub(sigmoid)).add(sigmoid).store(slopes.wrapping_add(at));
            }
        }
    }
}

/// Multiplies a row by its dropout mask.
#[inline(always)]
pub(super) fn drop_out(dropout: Option<SeededDropout>, row: usize, cells: &mut [f32]) {
    if let Some(dropout) = dropout {
        let row = dropout.row(row);
        for (column, cell) in cells.iter_mut().enumerate() {
            *cell *= row.factor(column);
        }
    }
}

/// The sum of `f` over the pairs, by lanes.
#[inline(always)]
fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    let (a, b) = (a.chunks_exact(MAX_LANES), b.chunks_exact(MAX_LANES));
    let tails = a.remainder().iter().zip(b.remainder());
    let tail: f32 = tails.map(|(a, b)| f(*a, *b)).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..MAX_LANES {
            lanes[lane] += f(a[lane], b[lane]);
        }
    }
    sum_by_halves(lanes) + tail
}
