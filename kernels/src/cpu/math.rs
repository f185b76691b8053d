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

/// The polynomial of a logarithm between 1/√2 and √2 (Cephes, logf), from the highest power on.
const LOGARITHM: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_9e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_8e-1,
    2.000_071_5e-1,
    -2.499_999_4e-1,
    3.333_333e-1,
];

/// The natural logarithms of positive normal numbers, to about 1e-7.
#[inline(always)]
pub(super) fn logarithms<V: Lanes>(x: [f32; MAX_LANES]) -> [f32; MAX_LANES] {
    // x is a power of two times a fraction between 1/√2 and √2. The fractions here are less 1.
    let (mut exponents, mut fractions) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
    for lane in 0..MAX_LANES {
        let shifted = x[lane].to_bits().wrapping_sub(0x3F35_04F3);
        exponents[lane] = (shifted as i32 >> 23) as f32;
        fractions[lane] = f32::from_bits((shifted & 0x007F_FFFF).wrapping_add(0x3F35_04F3)) - 1.0;
    }
    let mut out = [0.0; MAX_LANES];
    for at in (0..MAX_LANES).step_by(V::N) {
        // SAFETY: a vector's length divides that of the arrays.
        let (exponent, fraction) = unsafe {
            let [exponent, fraction] = [&exponents, &fractions].map(|of| of.as_ptr());
            (V::load(exponent.wrapping_add(at)), V::load(fraction.wrapping_add(at)))
        };
        let mut sum = V::splat(LOGARITHM[0]);
        for coefficient in &LOGARITHM[1..] {
            sum = sum.mul_add(fraction, V::splat(*coefficient));
        }
        let square = fraction.mul(fraction);
        let low = square.mul_add(V::splat(-0.5), exponent.mul(V::splat(-2.121_944_4e-4)));
        let low = sum.mul(fraction).mul_add(square, low);
        let sum = exponent.mul_add(V::splat(0.693_359_4), fraction.add(low));
        // SAFETY: as above.
        unsafe { sum.store(out.as_mut_ptr().wrapping_add(at)) };
    }
    out
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
    let sums = add_products(V::splat(0.0), &a[..whole], &b[..whole]);
    let tail: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    sum_of_lanes(sums) + tail
}

/// `sums`, and the products of two slices of one length, in whole vectors, by lane.
#[inline(always)]
pub(super) fn add_products<V: Lanes>(mut sums: V, a: &[f32], b: &[f32]) -> V {
    assert!(a.len() == b.len() && a.len().is_multiple_of(V::N), "not whole vectors");
    for at in (0..a.len()).step_by(V::N) {
        // SAFETY: at + N <= the length of both slices, by the assertions.
        let (a, b) =
            unsafe { (V::load(a.as_ptr().wrapping_add(at)), V::load(b.as_ptr().wrapping_add(at))) };
        sums = a.mul_add(b, sums);
    }
    sums
}

/// The sum of a vector's lanes.
#[inline(always)]
pub(super) fn sum_of_lanes<V: Lanes>(sums: V) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: no vector is longer than MAX_LANES.
    unsafe { sums.store(lanes.as_mut_ptr()) };
    sum_by_halves(lanes)
}

/// The sum of values by pairs, so that an addition waits for three others at most, not for all.
#[inline(always)]
pub(super) fn sum_by_halves(mut lanes: [f32; MAX_LANES]) -> f32 {
    let mut half = MAX_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
