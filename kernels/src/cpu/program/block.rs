//! A block of rows on its way through a program: where each step reads and writes.

use std::ops::Range;

use super::ops::{each, folded, lookup, norm, one, pairs, softmax};
use super::{BLOCK, Feed, Operand, Operator, Program, Step};
use crate::cpu::Rows;
use crate::cpu::dense::{PANEL, Prepared};
use crate::cpu::isa::Kernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::math::dot;
use crate::cpu::product::{Activation, Factor, multiply};

/// A thread's memory.
#[derive(Default)]
pub(super) struct Scratch {
    values: Vec<f32>,
}

/// A block of rows on its way through the program.
pub(super) struct Block<'a, 'b> {
    pub(super) program: &'a Program,
    pub(super) feed: &'a Feed<'a>,
    /// Its first row in the feed.
    pub(super) first: usize,
    pub(super) scratch: &'b mut Scratch,
    pub(super) out: &'b mut [f32],
}

impl Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Block { program, feed, first, scratch, out } = self;
        let count = out.len() / program.outputs.len();
        let scratch = room(&mut scratch.values, program.scratch * BLOCK);
        for (at, step) in program.steps.iter().enumerate() {
            let start = program.places[at] * BLOCK;
            // The result's place is taken out of the scratch, so that operands can be read beside it.
            let (before, rest) = scratch.split_at_mut(start);
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
            step_block::<V, R>(step, &sources, &mut result[..step.width * count]);
        }
        let end = scratch.len();
        let sources =
            Sources { program, feed, first, count, before: scratch, after: &[], gap: end..end };
        for (column, output) in program.outputs.iter().enumerate() {
            let values = sources.of(*output);
            for (row, out) in out.chunks_exact_mut(program.outputs.len()).enumerate() {
                out[column] = values.row(row)[0];
            }
        }
    }
}

/// So many floats of a buffer, which may be longer.
#[inline(always)]
fn room(buffer: &mut Vec<f32>, floats: usize) -> &mut [f32] {
    if buffer.len() < floats {
        buffer.resize(floats, 0.0);
    }
    &mut buffer[..floats]
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
    gap: Range<usize>,
}

/// An operand's rows in a block; a stride of 0 repeats one row.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    pub(super) data: &'a [f32],
    pub(super) width: usize,
    pub(super) stride: usize,
}

impl<'a> Values<'a> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.width]
    }

    /// All rows as one slice, where they are of this width and lie one after the other.
    #[inline(always)]
    pub(super) fn flat(&self, width: usize) -> Option<&'a [f32]> {
        (self.stride == width && self.width == width).then_some(self.data)
    }

    /// Whether it is one value for all rows.
    #[inline(always)]
    pub(super) fn is_one(&self) -> bool {
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
fn step_block<V: Lanes, const R: usize>(step: &Step, sources: &Sources<'_>, out: &mut [f32]) {
    let operand = |at: usize| sources.of(step.operands[at]);
    let width = step.width;
    match &step.operator {
        Operator::Linear(weights) => linear::<V, R>(weights, operand(0), sources.count, out),
        Operator::Dot { weights, bias } => {
            let x = operand(0);
            for (row, out) in out.iter_mut().enumerate() {
                *out = dot::<V>(x.row(row), weights) + bias;
            }
        }
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
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let mut at = 0;
                for part in 0..step.operands.len() {
                    let values = operand(part).row(row);
                    out[at..at + values.len()].copy_from_slice(values);
                    at += values.len();
                }
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

/// The product with weights.
#[inline(always)]
fn linear<V: Lanes, const R: usize>(
    weights: &Prepared,
    x: Values<'_>,
    count: usize,
    out: &mut [f32],
) {
    let to = weights.to;
    let data = Rows { data: x.data, stride: x.stride };
    let (factor, panels) = (Factor { data, rows: 0..count, first: 0 }, 0..to.div_ceil(PANEL));
    multiply::<V, R>(&factor, weights, panels, Activation::None, |row, panel, values| {
        let columns = panel * PANEL..to.min((panel + 1) * PANEL);
        let out = &mut out[row * to..][columns];
        out.copy_from_slice(&values[..out.len()]);
    });
}
