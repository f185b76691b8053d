//! The arithmetic of the fused kernels: exp, sigmoid and products of tiles, generic over the vector
//! type.

use super::lanes::{Lanes, MAGIC, MAX_LANES, value_at};

/// Coefficients of exp on `[-ln 2 / 2, ln 2 / 2]`, fitted for the least relative error and rounded
/// to f32 (4e-8).
const EXP: [f32; 7] =
    [1.0, 1.0, 0.499_999_93, 0.166_664_2, 0.041_668_225, 0.008_374_824, 0.001_383_683_6];

/// ln 2 in two parts. The first has few bits, so that its product with a small integer is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// exp(x) to about 1e-7 relative, x clamped to ±87 so that the result stays normal.
#[inline(always)]
pub(super) fn exp<V: Lanes>(x: V) -> V {
    let x = x.clamp_abs(87.0);
    let k_plus_magic = x.mul_add(V::splat(std::f32::consts::LOG2_E), V::splat(MAGIC));
    let k = k_plus_magic.sub(V::splat(MAGIC));
    let r = k.mul_add(V::splat(-LN_2_HIGH), x);
    let r = k.mul_add(V::splat(-LN_2_LOW), r);
    let mut p = V::splat(EXP[6]);
    for i in (0..6).rev() {
        p = p.mul_add(r, V::splat(EXP[i]));
    }
    p.scale_by_power(k_plus_magic)
}

/// The sigmoid, `1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid<V: Lanes>(x: V) -> V {
    exp(V::splat(0.0).sub(x)).add(V::splat(1.0)).recip()
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
    let mut column = 0;
    while column + 2 * V::N <= extent.columns {
        tile::<V, R, 2>(&mut out[column..], stride, left, right.from(column), extent.steps);
        column += 2 * V::N;
    }
    if column < extent.columns {
        tile::<V, R, 1>(&mut out[column..], stride, left, right.from(column), extent.steps);
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
fn tile<V: Lanes, const R: usize, const C: usize>(
    out: &mut [f32],
    stride: usize,
    left: Left<'_>,
    right: Right<'_>,
    steps: usize,
) {
    if steps == 0 {
        return;
    }
    assert!((R - 1) * stride + C * V::N <= out.len(), "tile outside its output");
    assert!(
        (R - 1) * left.row + (steps - 1) * left.step < left.data.len(),
        "left factor too short"
    );
    assert!((steps - 1) * right.stride + C * V::N <= right.data.len(), "right factor too short");
    let mut sums = [[V::splat(0.0); C]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            // SAFETY: r < R and c < C, so the first assertion bounds the load.
            *sum = unsafe { V::load(out.as_ptr().wrapping_add(r * stride + c * V::N)) };
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
