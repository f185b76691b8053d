//! The operators of a program other than products, on a block of rows.
//!
//! The loops are plain Rust, which the compiler vectorises with the target features of the function
//! that they are inlined into.

use super::block::OperandRows;
use super::{Fold, Map, NO_ROW, Zip};
use crate::cpu::lanes::{Lanes, MAX_LANES};
use crate::cpu::math::{add_products, dot, logarithms, sigmoid, sum_by_halves, sum_of_lanes};
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
        Map::Log => in_vectors::<V>(Logarithms { least: TINY }, x, out),
        Map::Sqrt => pairs.for_each(|(out, x)| *out = x.max(TINY).sqrt()),
        Map::Neg => pairs.for_each(|(out, x)| *out = -x),
        Map::Abs => pairs.for_each(|(out, x)| *out = x.abs()),
        Map::Sigmoid => in_vectors::<V>(Sigmoids, x, out),
        Map::Silu => {
            in_vectors::<V>(Sigmoids, x, out);
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

/// A function of whole vectors. It is not a closure, since the compiler may leave one out of line,
/// and then compiles it without the kernel's instruction set.
trait VectorMap<V: Lanes> {
    /// The results of as many vectors as the values make.
    fn apply(&self, x: [f32; MAX_LANES]) -> [f32; MAX_LANES];
}

struct Sigmoids;

impl<V: Lanes> VectorMap<V> for Sigmoids {
    #[inline(always)]
    fn apply(&self, x: [f32; MAX_LANES]) -> [f32; MAX_LANES] {
        let mut out = [0.0; MAX_LANES];
        for at in (0..MAX_LANES).step_by(V::N) {
            // SAFETY: a vector's length divides that of the arrays.
            unsafe {
                let x = V::load(x.as_ptr().wrapping_add(at));
                sigmoid(x).store(out.as_mut_ptr().wrapping_add(at));
            }
        }
        out
    }
}

/// Of values that are clamped from below.
struct Logarithms {
    least: f32,
}

impl<V: Lanes> VectorMap<V> for Logarithms {
    #[inline(always)]
    fn apply(&self, x: [f32; MAX_LANES]) -> [f32; MAX_LANES] {
        logarithms::<V>(x.map(|x| x.max(self.least)))
    }
}

/// Applies a function to all values. Those that are left after whole vectors go through one as
/// well, so that a value's result is the same to the bit wherever it stands.
#[inline(always)]
fn in_vectors<V: Lanes>(map: impl VectorMap<V>, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "as many results as values");
    let (whole, rest) = x.as_chunks::<MAX_LANES>();
    let (out, out_rest) = out.as_chunks_mut::<MAX_LANES>();
    for (out, x) in out.iter_mut().zip(whole) {
        *out = map.apply(*x);
    }
    if !rest.is_empty() {
        let mut last = [0.0; MAX_LANES];
        last[..rest.len()].copy_from_slice(rest);
        out_rest.copy_from_slice(&map.apply(last)[..rest.len()]);
    }
}

/// The products of rows with one column of weights.
///
/// What is left of a row after whole vectors goes through one more, in place of a sum value by
/// value, which would take as long as the vectors.
#[inline(always)]
pub(super) fn dots<V: Lanes>(x: OperandRows<'_>, weights: &[f32], bias: f32, out: &mut [f32]) {
    let (whole, rest) = weights.as_chunks::<MAX_LANES>();
    if whole.is_empty() || rest.is_empty() {
        for (row, out) in out.iter_mut().enumerate() {
            *out = dot::<V>(x.row(row), weights) + bias;
        }
        return;
    }
    let (whole, skip) = (whole.as_flattened(), MAX_LANES - rest.len());
    let mut last = [0.0; MAX_LANES];
    last[skip..].copy_from_slice(rest);
    for (row, out) in out.iter_mut().enumerate() {
        let x = x.row(row);
        // The last values of the row, without those that the whole vectors have.
        let mut tail: [f32; MAX_LANES] = *x.last_chunk().expect("as long as the weights");
        for (lane, value) in tail.iter_mut().enumerate() {
            *value = if lane < skip { 0.0 } else { *value };
        }
        let sums = add_products(V::splat(0.0), &x[..whole.len()], whole);
        *out = sum_of_lanes(add_products(sums, &tail, &last)) + bias;
    }
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
    sum_by_halves(lanes) + rest.iter().sum::<f32>()
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
    use crate::cpu::isa::{Isa, IsaKernel};

    struct LogarithmsOf<'a>(&'a [f32]);

    impl IsaKernel for LogarithmsOf<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<V: Lanes, const R: usize>(self) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len()];
            mapped::<V>(Map::Log, self.0, &mut out);
            out
        }
    }

    #[test]
    fn the_logarithm_is_right_over_its_range() {
        let numbers = (0..60_003).map(|at| 1e-12f32 * 1.002f32.powi(at));
        let mut numbers: Vec<f32> = numbers.take_while(|x| x.is_finite()).collect();
        numbers.extend([f32::MIN_POSITIVE, 0.0, -1.0, 1.0, f32::MAX]);
        for isa in Isa::available() {
            let found = isa.checked().run(LogarithmsOf(&numbers));
            for (x, found) in numbers.iter().zip(found) {
                let (found, expected) = (f64::from(found), f64::from(x.max(1e-12)).ln());
                let error = (found - expected).abs();
                assert!(error < 2e-7 * (1.0 + expected.abs()), "{isa:?}, {x}: {found}");
            }
        }
    }

    struct Dots<'a>(&'a [f32], &'a [f32]);

    impl IsaKernel for Dots<'_> {
        type Output = f32;

        #[inline(always)]
        fn run<V: Lanes, const R: usize>(self) -> f32 {
            let (width, mut out) = (self.0.len(), [0.0]);
            let row = OperandRows { data: self.0, width, stride: width };
            dots::<V>(row, self.1, 0.5, &mut out);
            out[0]
        }
    }

    #[test]
    fn a_product_with_one_column_is_right_at_every_width() {
        for isa in Isa::available() {
            for width in 1..70 {
                let weights: Vec<f32> = (0..width).map(|at| (at % 7) as f32 - 2.5).collect();
                let mut row: Vec<f32> = (0..width).map(|at| (at % 5) as f32 - 1.5).collect();
                let dots = |row: &[f32]| isa.checked().run(Dots(row, &weights));
                let expected: f32 = row.iter().zip(&weights).map(|(a, b)| a * b).sum();
                assert_eq!(dots(&row), expected + 0.5, "{isa:?}, {width} columns");
                // No value counts where it does not stand, so infinity is not made a NaN.
                row[width / 2] = f32::INFINITY * weights[width / 2];
                assert_eq!(dots(&row), f32::INFINITY, "{isa:?}, {width} columns");
            }
        }
    }
}
