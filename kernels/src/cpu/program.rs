//! Programs of row-wise operators: small networks over many rows, a block of
//! rows at a time, so that what one operator leaves is still in the cache when the
//! next one reads it.
//!
//! A program is made once: weights are laid out, places for intermediate values
//! are shared by those that do not live at the same time. A run allocates its
//! output alone; a thread's scratch does not grow with the rows. Where operands
//! come from, and what a program means, is decided above.

use rayon::prelude::*;

use super::dense::{PANEL, Prepared};
use super::isa::{Isa, Kernel};
use super::lanes::Lanes;
use super::math::{Extent, Left, Right, accumulate, sigmoid};
use super::rowwise::{Stats, normalise};

/// Rows of a block.
const BLOCK: usize = 64;

/// Multiply-adds of a run from which it goes to more than one thread.
const PARALLEL_FROM: usize = 2_000_000;

/// Where an operand's values are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operand {
    /// `[rows, width]`: an input of the run, by its place.
    Input {
        /// Its place among the run's inputs.
        index: usize,
        /// Its width.
        width: usize,
    },
    /// `[rows, width]`: what an earlier step left.
    Value {
        /// The step.
        step: usize,
        /// Its width.
        width: usize,
    },
    /// `[width]`: the same in every row, by its place among the program's constants.
    Constant {
        /// Its place.
        index: usize,
        /// Its width.
        width: usize,
    },
}

impl Operand {
    /// Values a row; an operand of one value is repeated where the result is wider.
    pub fn width(&self) -> usize {
        match *self {
            Self::Input { width, .. }
            | Self::Value { width, .. }
            | Self::Constant { width, .. } => width,
        }
    }
}

/// An operator. Its result is `[rows, width]`.
#[derive(Debug)]
pub enum Operator {
    /// The product with prepared weights, bias included.
    Linear(Prepared),
    /// Layer norm over the row: operands x, scale, shift.
    Norm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// Of one operand, value by value.
    Map(Map),
    /// Of two operands, value by value.
    Zip(Zip),
    /// The second operand where the first is not 0, else the third.
    Select,
    /// One operand after the other.
    Concat,
    /// Columns from this one on.
    Slice(usize),
    /// Over the row, to one value.
    Fold(Fold),
    /// Softmax over the row.
    Softmax,
    /// Rows of a table `[entries, width]`, by place among the run's indices: the mean of `bag` rows each.
    Lookup {
        /// The table.
        table: Vec<f32>,
        /// Place among the run's index lists.
        index: usize,
        /// Rows of the table a row of the result.
        bag: usize,
    },
}

/// Of one value.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Map {
    Exp,
    /// Of at least 1e-12.
    Log,
    /// Of at least 1e-12.
    Sqrt,
    Neg,
    Abs,
    Sigmoid,
    Silu,
    Relu,
    Tanh,
    Softplus,
    Clip(f32, f32),
}

/// Of two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Zip {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    /// 1 or 0.
    Greater,
    /// 1 or 0.
    Less,
    /// 1 or 0.
    Equal,
}

/// Of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Fold {
    Sum,
    Mean,
    Max,
}

/// A step of a program.
#[derive(Debug)]
pub struct Step {
    /// What it does.
    pub operator: Operator,
    /// To what.
    pub operands: Vec<Operand>,
    /// The width of its result.
    pub width: usize,
}

/// A program.
#[derive(Debug)]
pub struct Program {
    steps: Vec<Step>,
    constants: Vec<Vec<f32>>,
    outputs: Vec<Operand>,
    /// Where each step's result begins, in blocks' floats.
    places: Vec<usize>,
    /// Floats a row of a block.
    scratch: usize,
    /// Multiply-adds a row, about.
    work: usize,
}

/// What a run reads.
#[derive(Debug, Clone, Copy)]
pub struct Feed<'a> {
    /// Rows.
    pub rows: usize,
    /// Row-major, as wide as the program's operands say.
    pub inputs: &'a [&'a [f32]],
    /// Rows of tables: `[rows * bag]` each.
    pub indices: &'a [&'a [u32]],
}

impl Program {
    /// Plans steps, whose operands are inputs, constants and earlier steps, and outputs `[rows, 1]` each.
    ///
    /// # Panics
    /// If a step reads a later one or one of another width.
    pub fn new(steps: Vec<Step>, constants: Vec<Vec<f32>>, outputs: Vec<Operand>) -> Self {
        let (places, scratch) = plan(&steps, &outputs);
        let work = |step: &Step| match &step.operator {
            Operator::Linear(weights) => weights.from * weights.to,
            _ => step.width,
        };
        let work = steps.iter().map(work).sum();
        Self { steps, constants, outputs, places, scratch, work }
    }

    /// `[rows, outputs]`.
    ///
    /// # Panics
    /// If the feed is not what the steps read.
    pub fn run(&self, feed: &Feed<'_>, isa: Isa) -> Vec<f32> {
        let isa = isa.checked();
        let width = self.outputs.len();
        let mut out = vec![0.0; feed.rows * width];
        let block = |scratch: &mut Scratch, (index, out): (usize, &mut [f32])| {
            isa.run(Block { program: self, feed, first: index * BLOCK, scratch, out });
        };
        let size = (BLOCK * width).max(1);
        if feed.rows * self.work < PARALLEL_FROM {
            let mut scratch = Scratch::default();
            out.chunks_mut(size).enumerate().for_each(|part| block(&mut scratch, part));
        } else {
            out.par_chunks_mut(size).enumerate().for_each_init(Scratch::default, block);
        }
        out
    }
}

/// Where each step's result is; a place is given on after its last reader.
fn plan(steps: &[Step], outputs: &[Operand]) -> (Vec<usize>, usize) {
    let mut last = vec![0; steps.len()];
    for (at, step) in steps.iter().enumerate() {
        for operand in &step.operands {
            if let Operand::Value { step: read, width } = *operand {
                assert!(read < at && steps[read].width == width, "step {at} reads step {read}");
                last[read] = at;
            }
        }
    }
    for operand in outputs {
        if let Operand::Value { step, .. } = *operand {
            last[step] = usize::MAX;
        }
    }
    let mut free: Vec<(usize, usize)> = Vec::new();
    let (mut places, mut end) = (Vec::with_capacity(steps.len()), 0);
    for (at, step) in steps.iter().enumerate() {
        let found = free.iter().position(|(_, width)| *width == step.width);
        let place = match found {
            Some(found) => free.swap_remove(found).0,
            None => {
                let place = end;
                end += step.width;
                place
            }
        };
        places.push(place);
        // A result must not lie where the step still reads, so places are freed after it.
        for read in 0..=at {
            if last[read] == at && read < at {
                free.push((places[read], steps[read].width));
            }
        }
    }
    (places, end)
}

#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    tile: Vec<f32>,
}

/// A block of rows on its way through the program.
struct Block<'a, 'b> {
    program: &'a Program,
    feed: &'a Feed<'a>,
    first: usize,
    scratch: &'b mut Scratch,
    out: &'b mut [f32],
}

impl Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Block { program, feed, first, scratch, out } = self;
        let count = out.len() / program.outputs.len();
        scratch.values.resize(program.scratch * BLOCK, 0.0);
        scratch.tile.resize(R * PANEL, 0.0);
        for (at, step) in program.steps.iter().enumerate() {
            let start = program.places[at] * BLOCK;
            // The result's place is taken out of the scratch, so that operands can be read beside it.
            let (before, rest) = scratch.values.split_at_mut(start);
            let (result, after) = rest.split_at_mut(step.width * BLOCK);
            let sources = Sources {
                program,
                feed,
                first,
                count,
                before,
                after,
                gap: start..start + step.width * BLOCK,
            };
            step_block::<V, R>(
                step,
                &sources,
                &mut result[..step.width * count],
                &mut scratch.tile,
            );
        }
        let end = scratch.values.len();
        let sources = Sources {
            program,
            feed,
            first,
            count,
            before: &scratch.values,
            after: &[],
            gap: end..end,
        };
        for (column, output) in program.outputs.iter().enumerate() {
            let values = sources.of(*output);
            for (row, out) in out.chunks_exact_mut(program.outputs.len()).enumerate() {
                out[column] = values.row(row)[0];
            }
        }
    }
}

/// Where a block's operands are read.
struct Sources<'a> {
    program: &'a Program,
    feed: &'a Feed<'a>,
    first: usize,
    count: usize,
    /// The scratch before the result's place, and after it.
    before: &'a [f32],
    after: &'a [f32],
    gap: std::ops::Range<usize>,
}

/// An operand's rows in a block; a stride of 0 repeats one row.
#[derive(Clone, Copy)]
struct Values<'a> {
    data: &'a [f32],
    width: usize,
    stride: usize,
}

impl<'a> Values<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.width]
    }

    /// All rows as one slice, where they are of this width and lie one after the other.
    #[inline(always)]
    fn flat(&self, width: usize) -> Option<&'a [f32]> {
        (self.stride == width && self.width == width).then_some(self.data)
    }

    /// Whether it is one value for all rows.
    #[inline(always)]
    fn is_one(&self) -> bool {
        self.stride == 0 && self.width == 1
    }
}

impl<'a> Sources<'a> {
    #[inline(always)]
    fn of(&self, operand: Operand) -> Values<'a> {
        let width = operand.width();
        match operand {
            Operand::Input { index, .. } => {
                let data = &self.feed.inputs[index][self.first * width..][..self.count * width];
                Values { data, width, stride: width }
            }
            Operand::Constant { index, .. } => {
                Values { data: &self.program.constants[index], width, stride: 0 }
            }
            Operand::Value { step, .. } => {
                let start = self.program.places[step] * BLOCK;
                let data = match start < self.gap.start {
                    true => &self.before[start..][..self.count * width],
                    false => &self.after[start - self.gap.end..][..self.count * width],
                };
                Values { data, width, stride: width }
            }
        }
    }
}

#[inline(always)]
fn step_block<V: Lanes, const R: usize>(
    step: &Step,
    sources: &Sources<'_>,
    out: &mut [f32],
    tile: &mut [f32],
) {
    let operand = |at: usize| sources.of(step.operands[at]);
    let width = step.width;
    match &step.operator {
        Operator::Linear(weights) => linear::<V, R>(weights, operand(0), sources.count, out, tile),
        Operator::Map(map) => each::<V>(*map, operand(0), width, out),
        Operator::Zip(zip) => pairs(*zip, operand(0), operand(1), width, out),
        Operator::Norm { epsilon } => {
            let (x, scale, shift) = (operand(0), operand(1).row(0), operand(2).row(0));
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                norm(x.row(row), scale, shift, *epsilon, out);
            }
        }
        Operator::Select => {
            let (c, a, b) = (operand(0), operand(1), operand(2));
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                for (at, out) in out.iter_mut().enumerate() {
                    let pick = if one(c, row, at) != 0.0 { a } else { b };
                    *out = one(pick, row, at);
                }
            }
        }
        Operator::Concat => {
            let mut at = 0;
            for part in 0..step.operands.len() {
                let values = operand(part);
                for (row, out) in out.chunks_exact_mut(width).enumerate() {
                    out[at..at + values.width].copy_from_slice(values.row(row));
                }
                at += values.width;
            }
        }
        Operator::Slice(from) => {
            let x = operand(0);
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                out.copy_from_slice(&x.row(row)[*from..*from + width]);
            }
        }
        Operator::Fold(fold) => {
            let x = operand(0);
            for (row, out) in out.iter_mut().enumerate() {
                *out = folded(*fold, x.row(row));
            }
        }
        Operator::Softmax => {
            let x = operand(0);
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                softmax(x.row(row), out);
            }
        }
        Operator::Lookup { table, index, bag } => {
            let from = sources.first * bag;
            let index = &sources.feed.indices[*index][from..][..sources.count * bag];
            for (out, rows) in out.chunks_exact_mut(width).zip(index.chunks_exact(*bag)) {
                lookup(table, rows, out);
            }
        }
    }
}

/// The product, by panels of columns over the block's rows.
#[inline(always)]
fn linear<V: Lanes, const R: usize>(
    weights: &Prepared,
    x: Values<'_>,
    count: usize,
    out: &mut [f32],
    tile: &mut [f32],
) {
    let (from, to) = (weights.from, weights.to);
    for (panel, right) in weights.panels.chunks_exact(from * PANEL).enumerate() {
        let (column, bias) = (panel * PANEL, &weights.bias[panel * PANEL..][..PANEL]);
        let width = PANEL.min(to - column);
        // A panel that is mostly padding is computed to the vector that holds its last column.
        let columns = width.next_multiple_of(V::N);
        let mut row = 0;
        while row < count {
            // The last tile begins earlier rather than reading past the block's rows.
            let start = if count >= R { row.min(count - R) } else { row };
            let height = if count >= R { R } else { 1 };
            for tile in tile[..height * PANEL].chunks_exact_mut(PANEL) {
                tile.copy_from_slice(bias);
            }
            let left = Left { data: &x.data[start * x.stride..], row: x.stride, step: 1 };
            let right = Right { data: right, stride: PANEL };
            let extent = Extent { columns, steps: from };
            match height == R {
                true => accumulate::<V, R>(tile, PANEL, left, right, extent),
                false => accumulate::<V, 1>(tile, PANEL, left, right, extent),
            }
            for (r, tile) in tile[..height * PANEL].chunks_exact(PANEL).enumerate() {
                out[(start + r) * to + column..][..width].copy_from_slice(&tile[..width]);
            }
            row = start + height;
        }
    }
}

#[inline(always)]
fn each<V: Lanes>(map: Map, x: Values<'_>, width: usize, out: &mut [f32]) {
    match x.flat(width) {
        Some(x) => mapped::<V>(map, x, out),
        None => {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                mapped::<V>(map, x.row(row), out);
            }
        }
    }
}

/// Value by value. Each arm is a loop of its own, so that the compiler makes vector code of it.
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
        unsafe { sigmoid(V::load(x.as_ptr().add(at))).store(out.as_mut_ptr().add(at)) };
    }
    for (out, x) in out[whole..].iter_mut().zip(&x[whole..]) {
        *out = 1.0 / (1.0 + (-x).exp());
    }
}

/// The natural logarithm of a positive normal number, to about 1e-7; without a branch, for vectors.
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
fn pairs(zip: Zip, a: Values<'_>, b: Values<'_>, width: usize, out: &mut [f32]) {
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

/// Value by value; an operand of one value a row is repeated.
#[inline(always)]
fn zipped(
    a: Values<'_>,
    b: Values<'_>,
    width: usize,
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32,
) {
    // Rows that lie one after the other, or a value for all of them, are one loop and not one a row.
    match (a.flat(width), b.flat(width)) {
        (Some(a), Some(b)) => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = f(*a, *b);
            }
            return;
        }
        (Some(a), None) if b.is_one() => {
            out.iter_mut().zip(a).for_each(|(out, a)| *out = f(*a, b.data[0]));
            return;
        }
        (None, Some(b)) if a.is_one() => {
            out.iter_mut().zip(b).for_each(|(out, b)| *out = f(a.data[0], *b));
            return;
        }
        _ => {}
    }
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        let (a, b) = (a.row(row), b.row(row));
        match (a.len() == width, b.len() == width) {
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
}

/// The value of a column, or the only one.
#[inline(always)]
fn one(values: Values<'_>, row: usize, column: usize) -> f32 {
    let row = values.row(row);
    if row.len() == 1 { row[0] } else { row[column] }
}

#[inline(always)]
fn norm(x: &[f32], scale: &[f32], shift: &[f32], epsilon: f32, out: &mut [f32]) {
    let stats = Stats::of(x, epsilon);
    if scale.len() == x.len() && shift.len() == x.len() {
        normalise(x, stats, (scale, shift), out);
        return;
    }
    for (at, out) in out.iter_mut().enumerate() {
        let of = |weights: &[f32]| if weights.len() == 1 { weights[0] } else { weights[at] };
        let (mut one, weights) = ([0.0], ([of(scale)], [of(shift)]));
        normalise(&x[at..=at], stats, (&weights.0, &weights.1), &mut one);
        *out = one[0];
    }
}

#[inline(always)]
fn folded(fold: Fold, x: &[f32]) -> f32 {
    match fold {
        Fold::Sum => x.iter().sum(),
        Fold::Mean => x.iter().sum::<f32>() / x.len() as f32,
        Fold::Max => x.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    }
}

#[inline(always)]
fn softmax(x: &[f32], out: &mut [f32]) {
    let largest = folded(Fold::Max, x);
    for (out, x) in out.iter_mut().zip(x) {
        *out = (x - largest).exp();
    }
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|out| *out /= sum);
}

#[inline(always)]
fn lookup(table: &[f32], rows: &[u32], out: &mut [f32]) {
    let width = out.len();
    let entry = |row: u32| &table[row as usize * width..][..width];
    match rows {
        [row] => out.copy_from_slice(entry(*row)),
        rows => {
            out.fill(0.0);
            for row in rows {
                out.iter_mut().zip(entry(*row)).for_each(|(sum, value)| *sum += value);
            }
            out.iter_mut().for_each(|sum| *sum /= rows.len() as f32);
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
