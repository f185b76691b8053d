//! The arithmetic of the fused kernels: exp, sigmoid and products of tiles, generic over the vector
//! type.

use super::lanes::{Lanes, MAGIC, MAX_LANES, value_at};

/// Coefficients of 2^x on `[-1/2, 1/2]`, fitted for the least relative error and rounded to f32
/// (1.6e-7). The first is exact, for the sigmoid of 0 to be 1/2.
const EXP_2: [f32; 6] =
    [1.0, std::f32::consts::LN_2, 0.240_222_83, 0.055_505_585, 0.009_669_691, 0.001_330_060_5];

/// The sigmoid, `1 / (1 + exp(-x))`, with an error of about 2e-7. x is clamped to ±87, so that the
/// power stays normal.
#[inline(always)]
pub(super) fn sigmoid<V: Lanes>(x: V) -> V {
    let (x, minus_log2_e) = (x.clamp_abs(87.0), V::splat(-std::f32::consts::LOG2_E));
    let k_plus_magic = x.mul_add(minus_log2_e, V::splat(MAGIC));
    let minus_k = V::splat(MAGIC).sub(k_plus_magic);
    let r = x.mul_add(minus_log2_e, minus_k);
    let mut p = V::splat(EXP_2[5]);
    for i in (0..5).rev() {
        p = p.mul_add(r, V::splat(EXP_2[i]));
    }
    p.scale_by_power(k_plus_magic).add(V::splat(1.0)).recip()
}

/// The left factor of a tile product: element (r, k) is at `data[r * row + k * step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) step: usize,
}

/// A row-major matrix, or a part of one.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

/// `out[r, c] += Σ_{k < steps} left[r, k] * right[k, c]` for R rows and `columns` (a multiple of
/// the vector's length) columns; `stride` is out's.
///
/// Each element is summed in the order of k, one product after the other, whatever its tile: a
/// row's result does not depend on the rows beside it.
#[inline(always)]
pub(super) fn accumulate<V: Lanes, const R: usize>(
    out: &mut [f32],
    stride: usize,
    left: Left<'_>,
    right: Right<'_>,
    extent: ProductExtent,
) {
    each_tile::<V, R, true>(out, stride, left, right, extent);
}

/// As [`accumulate`], but writes the sums over what `out` has. There must be a step.
#[inline(always)]
pub(super) fn product<V: Lanes, const R: usize>(
    out: &mut [f32],
    stride: usize,
    left: Left<'_>,
    right: Right<'_>,
    extent: ProductExtent,
) {
    each_tile::<V, R, false>(out, stride, left, right, extent);
}

#[inline(always)]
fn each_tile<V: Lanes, const R: usize, const ADDS: bool>(
    out: &mut [f32],
    stride: usize,
    left: Left<'_>,
    right: Right<'_>,
    extent: ProductExtent,
) {
    let mut column = 0;
    while column + 2 * V::N <= extent.columns {
        let (out, right) = (&mut out[column..], right.from(column));
        tile::<V, R, 2, ADDS>(out, stride, left, right, extent.steps);
        column += 2 * V::N;
    }
    if column < extent.columns {
        let (out, right) = (&mut out[column..], right.from(column));
        tile::<V, R, 1, ADDS>(out, stride, left, right, extent.steps);
    }
}

/// The part of the factors to multiply.
#[derive(Clone, Copy)]
pub(super) struct ProductExtent {
    pub(super) columns: usize,
    pub(super) steps: usize,
}

impl<'a> Right<'a> {
    #[inline(always)]
    fn from(self, column: usize) -> Right<'a> {
        Right { data: &self.data[column.min(self.data.len())..], ..self }
    }
}

#[inline(always)]
fn tile<V: Lanes, const R: usize, const C: usize, const ADDS: bool>(
    out: &mut [f32],
    stride: usize,
    left: Left<'_>,
    right: Right<'_>,
    steps: usize,
) {
    if steps == 0 && ADDS {
        return;
    }
    assert!((R - 1) * stride + C * V::N <= out.len(), "tile outside its output");
    assert!(
        (R - 1) * left.row + (steps - 1) * left.step < left.data.len(),
        "left factor too short"
    );
    assert!((steps - 1) * right.stride + C * V::N <= right.data.len(), "right factor too short");
    let mut sums = [[V::splat(0.0); C]; R];
    if ADDS {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                // SAFETY: r < R and c < C, so the first assertion bounds the load.
                *sum = unsafe { V::load(out.as_ptr().wrapping_add(r * stride + c * V::N)) };
            }
        }
    }
    // Pointers instead of indices, because the build checks index arithmetic for overflow.
    let (mut a, mut b) = (left.data.as_ptr(), right.data.as_ptr());
    let mut a_rows = [0; R];
    a_rows.iter_mut().enumerate().for_each(|(r, row)| *row = r * left.row);
    for _ in 0..steps {
        let mut values = [V::splat(0.0); C];
        for (c, value) in values.iter_mut().enumerate() {
            // SAFETY: after k < steps moves, the third assertion bounds the load.
            *value = unsafe { V::load(b.wrapping_add(c * V::N)) };
        }
        for (sums, a_row) in sums.iter_mut().zip(a_rows) {
            // SAFETY: after k < steps moves, the second assertion bounds the index.
            let factor = V::splat(unsafe { value_at(a.wrapping_add(a_row)) });
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = factor.mul_add(value, *sum);
            }
        }
        (a, b) = (a.wrapping_add(left.step), b.wrapping_add(right.stride));
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            // SAFETY: r < R and c < C, so the first assertion bounds the store.
            unsafe { sum.store(out.as_mut_ptr().wrapping_add(r * stride + c * V::N)) };
        }
    }
}

/// The dot product of two slices of one length.
#[inline(always)]
pub(super) fn dot<V: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "a dot product needs two slices of one length");
    let whole = a.len() - a.len() % V::N;
    let mut sums = V::splat(0.0);
    for at in (0..whole).step_by(V::N) {
        // SAFETY: at + N <= whole <= the length of both slices.
        let (a, b) =
            unsafe { (V::load(a.as_ptr().wrapping_add(at)), V::load(b.as_ptr().wrapping_add(at))) };
        sums = a.mul_add(b, sums);
    }
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: no vector is longer than MAX_LANES.
    unsafe { sums.store(lanes.as_mut_ptr()) };
    let tail: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + tail
}
