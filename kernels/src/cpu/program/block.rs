//! Runs a block of rows through the steps of a program.

use std::ops::Range;

use super::once::OnceResults;
use super::ops::{dots, each, folded, lookup, norm, one, pairs, softmax};
use super::{BLOCK, Operand, Program, ProgramFeed, ProgramStep, RowOperator};
use crate::cpu::StridedRows;
use crate::cpu::dense::{PANEL, Prepared};
use crate::cpu::isa::IsaKernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Factor, multiply};

/// A block of rows to run through a program.
pub(super) struct ProgramBlock<'a, 'b> {
    pub(super) program: &'a Program,
    pub(super) feed: &'a ProgramFeed<'a>,
    pub(super) once: &'a OnceResults,
    /// The block's first row in the inputs.
    pub(super) first: usize,
    /// A thread's buffer for intermediate values.
    pub(super) scratch: &'b mut Vec<f32>,
    pub(super) out: &'b mut [f32],
}

impl IsaKernel for ProgramBlock<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let ProgramBlock { program, feed, once, first, scratch, out } = self;
        let count = out.len() / program.outputs.len();
        let scratch = room(scratch, program.scratch * BLOCK);
        for (at, step) in program.steps.iter().enumerate().filter(|(at, _)| !once.has(*at)) {
            let start = program.offsets[at] * BLOCK;
            // Split off the result, so that operands can be read from the rest of the scratch.
            let (before, rest) = scratch.split_at_mut(start);
            let (result, after) = rest.split_at_mut(step.width * BLOCK);
            let gap = start..start + result.len();
            let sources = OperandSources { program, feed, once, first, count, before, after, gap };
            step_block::<V, R>(step, &sources, &mut result[..step.width * count]);
        }
        let (before, after, gap) = (&*scratch, &[][..], scratch.len()..scratch.len());
        let sources = OperandSources { program, feed, once, first, count, before, after, gap };
        for (column, output) in program.outputs.iter().enumerate() {
            let values = sources.of(*output);
            for (row, out) in out.chunks_exact_mut(program.outputs.len()).enumerate() {
                out[column] = values.row(row)[0];
            }
        }
    }
}

/// The first `floats` of a buffer, which grows if needed.
#[inline(always)]
fn room(buffer: &mut Vec<f32>, floats: usize) -> &mut [f32] {
    if buffer.len() < floats {
        buffer.resize(floats, 0.0);
    }
    &mut buffer[..floats]
}

/// The memory from which a block's operands are read.
pub(super) struct OperandSources<'a> {
    program: &'a Program,
    feed: &'a ProgramFeed<'a>,
    once: &'a OnceResults,
    first: usize,
    count: usize,
    /// The scratch before the step's result, and after it.
    before: &'a [f32],
    after: &'a [f32],
    gap: Range<usize>,
}

/// An operand's rows in a block; a stride of 0 repeats one row.
#[derive(Clone, Copy)]
pub(super) struct OperandRows<'a> {
    pub(super) data: &'a [f32],
    pub(super) width: usize,
    pub(super) stride: usize,
}

impl<'a> OperandRows<'a> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.width]
    }

    /// All rows as one slice, if they have this width and are contiguous.
    #[inline(always)]
    pub(super) fn flat(&self, width: usize) -> Option<&'a [f32]> {
        (self.stride == width && self.width == width).then_some(self.data)
    }

    /// Whether the operand is a single value for all rows.
    #[inline(always)]
    pub(super) fn is_one(&self) -> bool {
        self.stride == 0 && self.width == 1
    }
}

impl<'a> OperandSources<'a> {
    /// What a step reads that has one result for all rows.
    #[inline(always)]
    pub(super) fn of_first_row(
        program: &'a Program,
        feed: &'a ProgramFeed<'a>,
        once: &'a OnceResults,
    ) -> Self {
        let (before, after) = (&[][..], &[][..]);
        Self { program, feed, once, first: 0, count: 1, before, after, gap: 0..0 }
    }

    #[inline(always)]
    fn of(&self, operand: Operand) -> OperandRows<'a> {
        let width = operand.width();
        match operand {
            Operand::Input { index, .. } => {
                let data = &self.feed.inputs[index][self.first * width..][..self.count * width];
                OperandRows { data, width, stride: width }
            }
            Operand::Constant { index, .. } => {
                OperandRows { data: &self.program.constants[index], width, stride: 0 }
            }
            Operand::Value { step, .. } => {
                if let Some(once) = self.once.of(step, width) {
                    // A single row does not repeat, so that no product computes it several times.
                    return OperandRows { stride: if self.count == 1 { width } else { 0 }, ..once };
                }
                let start = self.program.offsets[step] * BLOCK;
                let data = if start < self.gap.start {
                    &self.before[start..][..self.count * width]
                } else {
                    &self.after[start - self.gap.end..][..self.count * width]
                };
                OperandRows { data, width, stride: width }
            }
        }
    }
}

#[inline(always)]
pub(super) fn step_block<V: Lanes, const R: usize>(
    step: &ProgramStep,
    sources: &OperandSources<'_>,
    out: &mut [f32],
) {
    let operand = |at: usize| sources.of(step.operands[at]);
    let width = step.width;
    match &step.operator {
        RowOperator::Linear(weights) => linear::<V, R>(weights, operand(0), sources.count, out),
        RowOperator::Dot { weights, bias } => {
            dots::<V>(operand(0), weights, *bias, out);
        }
        RowOperator::Map(map) => each::<V>(*map, operand(0), width, out),
        RowOperator::Zip(zip) => pairs(*zip, operand(0), operand(1), width, out),
        RowOperator::Norm { epsilon } => {
            let (x, scale, shift) = (operand(0), operand(1).row(0), operand(2).row(0));
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                norm(x.row(row), scale, shift, *epsilon, out);
            }
        }
        RowOperator::Select => {
            let (c, a, b) = (operand(0), operand(1), operand(2));
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                for (at, out) in out.iter_mut().enumerate() {
                    let pick = if one(c, row, at) != 0.0 { a } else { b };
                    *out = one(pick, row, at);
                }
            }
        }
        RowOperator::Concat => {
            let mut at = 0;
            for part in 0..step.operands.len() {
                let x = operand(part);
                match x.width {
                    8 => copy_columns::<8>(x, at, width, out),
                    16 => copy_columns::<16>(x, at, width, out),
                    _ => {
                        for (row, out) in out.chunks_exact_mut(width).enumerate() {
                            out[at..at + x.width].copy_from_slice(x.row(row));
                        }
                    }
                }
                at += x.width;
            }
        }
        RowOperator::Slice(from) => {
            let x = operand(0);
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                out.copy_from_slice(&x.row(row)[*from..*from + width]);
            }
        }
        RowOperator::Fold(fold) => {
            let x = operand(0);
            for (row, out) in out.iter_mut().enumerate() {
                *out = folded(*fold, x.row(row));
            }
        }
        RowOperator::Softmax => {
            let x = operand(0);
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                softmax(x.row(row), out);
            }
        }
        RowOperator::Lookup { table, index, bag } => {
            let from = sources.first * bag;
            let index = &sources.feed.indices[*index][from..][..sources.count * bag];
            for (out, rows) in out.chunks_exact_mut(width).zip(index.chunks_exact(*bag)) {
                lookup(table, rows, out);
            }
        }
    }
}

/// Copies rows of N values, an embedding's usual widths, to the columns from `at` on: one vector
/// each, where a copy of any width is a call.
#[inline(always)]
fn copy_columns<const N: usize>(x: OperandRows<'_>, at: usize, width: usize, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        let values: [f32; N] = x.row(row).try_into().expect("N values a row");
        out[at..at + N].copy_from_slice(&values);
    }
}

/// The product with prepared weights.
#[inline(always)]
fn linear<V: Lanes, const R: usize>(
    weights: &Prepared,
    x: OperandRows<'_>,
    count: usize,
    out: &mut [f32],
) {
    let to = weights.to;
    let data = StridedRows { data: x.data, stride: x.stride };
    let (factor, panels) = (Factor { data, rows: 0..count, first: 0 }, 0..to.div_ceil(PANEL));
    multiply::<V, R>(&factor, weights, panels, Activation::None, |row, panel, values| {
        let columns = panel * PANEL..to.min((panel + 1) * PANEL);
        let out = &mut out[row * to..][columns];
        out.copy_from_slice(&values[..out.len()]);
    });
}
