//! The operators of a program other than products, on a block of rows.
//!
//! The loops are plain Rust, which the compiler vectorises with the target features of the function
//! that they are inlined into.

use super::block::OperandRows;
use super::{Fold, Map, NO_ROW, Zip};
use crate::cpu::lanes::{Lanes, MAX_LANES};
use crate::cpu::math::sigmoid;
use crate::cpu::rowwise::{Stats, normalise};
use crate::layer::Affine;

#[inline(always)]
pub(super) fn each<V: Lanes>(map: Map, x: OperandRows<'_>, width: usize, out: &mut [f32]) {
    match x.flat(width) {
        Some(x) => mapped::<V>(map, x, out),
        None => {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                mapped::<V>(map, x.row(row), out);
            }
        }
    }
}

/// Applies an operator to each value. Each arm is a loop of its own, so that the compiler
/// vectorises it.
#[inline(always)]
fn mapped<V: Lanes>(map: Map, x: &[f32], out: &mut [f32]) {
    const TINY: f32 = 1e-12;
    let pairs = out.iter_mut().zip(x);
    match map {
        Map::Exp => pairs.for_each(|(out, x)| *out = x.exp()),
        Map::Log => pairs.for_each(|(out, x)| *out = ln(x.max(TINY))),
        Map::Sqrt => pairs.for_each(|(out, x)| *out = x.max(TINY).sqrt()),
        Map::Neg => pairs.for_each(|(out, x)| *out = -x),
        Map::Abs => pairs.for_each(|(out, x)| *out = x.abs()),
        Map::Sigmoid => sigmoids::<V>(x, out),
        Map::Silu => {
            sigmoids::<V>(x, out);
            out.iter_mut().zip(x).for_each(|(out, x)| *out *= x);
        }
        Map::Relu => pairs.for_each(|(out, x)| *out = x.max(0.0)),
        Map::Tanh => pairs.for_each(|(out, x)| *out = x.tanh()),
        Map::Softplus => {
            pairs.for_each(|(out, x)| *out = x.max(0.0) + (-x.abs()).exp().ln_1p());
        }
        Map::Clip(min, max) => pairs.for_each(|(out, x)| *out = x.max(min).min(max)),
    }
}

#[inline(always)]
fn sigmoids<V: Lanes>(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "as many results as values");
    let whole = x.len() - x.len() % V::N;
    for at in (0..whole).step_by(V::N) {
        // SAFETY: at + N <= whole <= the length of both.
        unsafe {
            let x = V::load(x.as_ptr().wrapping_add(at));
            sigmoid(x).store(out.as_mut_ptr().wrapping_add(at));
        }
    }
    for (out, x) in out[whole..].iter_mut().zip(&x[whole..]) {
        *out = 1.0 / (1.0 + (-x).exp());
    }
}

/// The natural logarithm of a positive normal number, to about 1e-7, without branches so that loops
/// vectorise.
/// The fraction between 1/√2 and √2 goes through a polynomial (Cephes, logf).
#[inline(always)]
fn ln(x: f32) -> f32 {
    const POLYNOMIAL: [f32; 9] = [
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
    let shifted = x.to_bits().wrapping_sub(0x3F35_04F3);
    let exponent = (shifted as i32 >> 23) as f32;
    let fraction = f32::from_bits((shifted & 0x007F_FFFF) + 0x3F35_04F3) - 1.0;
    let square = fraction * fraction;
    let sum = POLYNOMIAL.iter().fold(0.0, |sum, c| sum * fraction + c);
    let low = sum * fraction * square + exponent * -2.121_944_4e-4 - 0.5 * square;
    fraction + low + exponent * 0.693_359_4
}

#[inline(always)]
pub(super) fn pairs(
    zip: Zip,
    a: OperandRows<'_>,
    b: OperandRows<'_>,
    width: usize,
    out: &mut [f32],
) {
    match zip {
        Zip::Add => zipped(a, b, width, out, |a, b| a + b),
        Zip::Sub => zipped(a, b, width, out, |a, b| a - b),
        Zip::Mul => zipped(a, b, width, out, |a, b| a * b),
        Zip::Div => zipped(a, b, width, out, |a, b| a / b),
        Zip::Max => zipped(a, b, width, out, f32::max),
        Zip::Min => zipped(a, b, width, out, f32::min),
        Zip::Greater => zipped(a, b, width, out, |a, b| f32::from(u8::from(a > b))),
        Zip::Less => zipped(a, b, width, out, |a, b| f32::from(u8::from(a < b))),
        Zip::Equal => zipped(a, b, width, out, |a, b| f32::from(u8::from(a == b))),
    }
}

/// Applies `f` to each pair of values; an operand of one value per row is repeated.
#[inline(always)]
fn zipped(
    a: OperandRows<'_>,
    b: OperandRows<'_>,
    width: usize,
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32,
) {
    // Contiguous rows, or one value for all rows, need one loop instead of one per row.
    match (a.flat(width), b.flat(width)) {
        (Some(a), Some(b)) => zipped_row(a, b, out, f),
        (Some(a), None) if b.is_one() => zipped_row(a, &b.data[..1], out, f),
        (None, Some(b)) if a.is_one() => zipped_row(&a.data[..1], b, out, f),
        _ => {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                zipped_row(a.row(row), b.row(row), out, &f);
            }
        }
    }
}

#[inline(always)]
fn zipped_row(a: &[f32], b: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    match (a.len() == out.len(), b.len() == out.len()) {
        (true, true) => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = f(*a, *b);
            }
        }
        (true, false) => out.iter_mut().zip(a).for_each(|(out, a)| *out = f(*a, b[0])),
        (false, true) => out.iter_mut().zip(b).for_each(|(out, b)| *out = f(a[0], *b)),
        (false, false) => out.fill(f(a[0], b[0])),
    }
}

/// The value of a column, or the row's only value.
#[inline(always)]
pub(super) fn one(values: OperandRows<'_>, row: usize, column: usize) -> f32 {
    let row = values.row(row);
    if row.len() == 1 { row[0] } else { row[column] }
}

#[inline(always)]
pub(super) fn norm(x: &[f32], scale: &[f32], shift: &[f32], epsilon: f32, out: &mut [f32]) {
    let stats = Stats::of(x, epsilon);
    if scale.len() == x.len() && shift.len() == x.len() {
        normalise(x, stats, Affine { scale, shift }, out);
        return;
    }
    for (at, out) in out.iter_mut().enumerate() {
        let of = |weights: &[f32]| if weights.len() == 1 { weights[0] } else { weights[at] };
        let (mut one, scale, shift) = ([0.0], [of(scale)], [of(shift)]);
        normalise(&x[at..=at], stats, Affine { scale: &scale, shift: &shift }, &mut one);
        *out = one[0];
    }
}

#[inline(always)]
pub(super) fn folded(fold: Fold, x: &[f32]) -> f32 {
    match fold {
        Fold::Sum => sum(x),
        Fold::Mean => sum(x) / x.len() as f32,
        Fold::Max => x.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    }
}

/// The sum by lanes, so that additions do not depend on each other.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    let (whole, rest) = x.as_chunks::<MAX_LANES>();
    for values in whole {
        lanes.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

#[inline(always)]
pub(super) fn softmax(x: &[f32], out: &mut [f32]) {
    let largest = folded(Fold::Max, x);
    for (out, x) in out.iter_mut().zip(x) {
        *out = (x - largest).exp();
    }
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|out| *out /= sum);
}

/// The mean of rows of a table, without those that are `NO_ROW`; zeros if all are.
#[inline(always)]
pub(super) fn lookup(table: &[f32], rows: &[u32], out: &mut [f32]) {
    let width = out.len();
    let entry = |row: u32| &table[row as usize * width..][..width];
    match rows {
        [row] if *row != NO_ROW => out.copy_from_slice(entry(*row)),
        rows => {
            out.fill(0.0);
            let mut count = 0;
            for row in rows.iter().filter(|row| **row != NO_ROW) {
                out.iter_mut().zip(entry(*row)).for_each(|(sum, value)| *sum += value);
                count += 1;
            }
            let count = count.max(1) as f32;
            out.iter_mut().for_each(|sum| *sum /= count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_right_over_its_range() {
        for at in 0..40_000 {
            let x = 1e-12f32 * 1.003f32.powi(at % 30_000) + at as f32 * 1e-13;
            if x.is_finite() {
                let (found, expected) = (f64::from(ln(x)), f64::from(x).ln());
                assert!((found - expected).abs() < 2e-7 * (1.0 + expected.abs()), "{x}: {found}");
            }
        }
    }
}
