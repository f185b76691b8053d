//! Programs of row-wise operators: small networks that run over many rows, one block of rows at a
//! time, so that an operator's result is still in the cache when the next operator reads it.
//!
//! A program is planned once: weights are laid out, and intermediate values that do not live at the
//! same time share memory. A run allocates its output and results that all its rows share; each
//! thread keeps a scratch buffer, whose size does not depend on the number of rows. `once` runs the
//! steps that the rows share, `block` a block of rows through the others, and `ops` has the
//! operators other than products.

mod block;
mod once;
mod ops;

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use super::dense::Prepared;
use super::isa::Isa;
use block::ProgramBlock;
use once::{OncePass, OnceResults};

/// In a list of table rows: none, which does not count in a mean.
pub const NO_ROW: u32 = u32::MAX;

/// Rows per block.
const BLOCK: usize = 32;

/// Multiply-adds from which a run uses more than one thread.
const PARALLEL_FROM: usize = 2_000_000;

/// The source of an operand's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operand {
    /// `[rows, width]`: an input of the run.
    Input {
        /// The index among the run's inputs.
        index: usize,
        /// Values per row.
        width: usize,
    },
    /// `[rows, width]`: the result of an earlier step.
    Value {
        /// The step's index.
        step: usize,
        /// Values per row.
        width: usize,
    },
    /// `[width]`: the same values in every row.
    Constant {
        /// The index among the program's constants.
        index: usize,
        /// Values per row.
        width: usize,
    },
}

impl Operand {
    /// Values per row. An operand of one value is repeated if the result is wider.
    pub fn width(&self) -> usize {
        match *self {
            Self::Input { width, .. }
            | Self::Value { width, .. }
            | Self::Constant { width, .. } => width,
        }
    }
}

/// An operator, with a result of `[rows, width]`.
#[derive(Debug)]
pub enum RowOperator {
    /// The product with prepared weights, bias included.
    Linear(Prepared),
    /// The product with a single column of weights.
    Dot {
        /// One weight per value of the operand.
        weights: Vec<f32>,
        /// Added to the product.
        bias: f32,
    },
    /// Layer norm over the row: operands x, scale, shift.
    Norm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// An elementwise operator of one operand.
    Map(Map),
    /// An elementwise operator of two operands.
    Zip(Zip),
    /// Elementwise: the second operand where the first is not 0, else the third.
    Select,
    /// The concatenation of the operands' columns.
    Concat,
    /// The operand's columns from this one on.
    Slice(usize),
    /// A reduction of each row to one value.
    Fold(Fold),
    /// Softmax over each row.
    Softmax,
    /// An embedding lookup: the mean of up to `bag` rows of a table per row of the result.
    Lookup {
        /// `[entries, width]`, shared with the other lookups that read it.
        table: Arc<Vec<f32>>,
        /// The index among the run's lists of row numbers.
        index: usize,
        /// Rows of the table per row of the result.
        bag: usize,
    },
}

/// Elementwise operators of one operand.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Map {
    Exp,
    /// Of the operand clamped to at least 1e-12.
    Log,
    /// Of the operand clamped to at least 1e-12.
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

/// Elementwise operators of two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Zip {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    /// 1 if it holds, else 0.
    Greater,
    /// 1 if it holds, else 0.
    Less,
    /// 1 if it holds, else 0.
    Equal,
}

/// Reductions of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Fold {
    Sum,
    Mean,
    Max,
}

/// A step of a program. A program that is only planned has operators `O` without weights.
#[derive(Debug)]
pub struct ProgramStep<O = RowOperator> {
    /// The operation.
    pub operator: O,
    /// The operands, in the operator's order.
    pub operands: Vec<Operand>,
    /// Values per row of the result.
    pub width: usize,
}

/// A program with its buffers planned.
#[derive(Debug)]
pub struct Program {
    steps: Vec<ProgramStep>,
    constants: Vec<Arc<Vec<f32>>>,
    outputs: Vec<Operand>,
    /// Where each step's result begins in the scratch, in floats per row.
    offsets: Vec<usize>,
    /// Size of the scratch, in floats per row.
    scratch: usize,
    /// Approximate multiply-adds per row.
    work: usize,
}

/// The inputs of a run.
#[derive(Debug, Clone, Copy)]
pub struct ProgramFeed<'a> {
    /// The number of rows.
    pub rows: usize,
    /// Row-major inputs with the widths of the program's operands.
    pub inputs: &'a [&'a [f32]],
    /// Lists of table rows for lookups, `[rows * bag]` each, with [`NO_ROW`] for none.
    pub indices: &'a [&'a [u32]],
}

impl Program {
    /// Plans a program. The operands of a step are inputs, constants and results of earlier steps;
    /// each output is `[rows, 1]`.
    ///
    /// # Panics
    /// If a step reads the result of a later step, or reads a result with a wrong width.
    pub fn new(
        steps: Vec<ProgramStep>,
        constants: Vec<Arc<Vec<f32>>>,
        outputs: Vec<Operand>,
    ) -> Self {
        let (offsets, scratch) = plan(&steps, &outputs);
        let work = |step: &ProgramStep| match &step.operator {
            RowOperator::Linear(weights) => weights.from * weights.to,
            RowOperator::Dot { weights, .. } => weights.len(),
            _ => step.width,
        };
        let work = steps.iter().map(work).sum();
        Self { steps, constants, outputs, offsets, scratch, work }
    }

    /// The size in bytes of the scratch buffer that each thread keeps for a program of these steps.
    ///
    /// # Panics
    /// As [`Program::new`].
    pub fn scratch_bytes<O>(steps: &[ProgramStep<O>], outputs: &[Operand]) -> u64 {
        (plan(steps, outputs).1 as u64).saturating_mul((BLOCK * size_of::<f32>()) as u64)
    }

    /// The bytes that a run of a program of these steps takes for what it computes once.
    pub fn once_bytes<O>(steps: &[ProgramStep<O>]) -> u64 {
        OnceResults::bytes(steps)
    }

    /// Runs the program. Returns `[rows, outputs]`.
    ///
    /// # Panics
    /// If the inputs do not have the sizes that the steps read.
    pub fn run(&self, feed: &ProgramFeed<'_>, isa: Isa) -> Vec<f32> {
        let isa = isa.checked();
        let width = self.outputs.len();
        let mut out = vec![0.0; feed.rows * width];
        if feed.rows == 0 {
            return out;
        }
        let once = isa.run(OncePass { program: self, feed });
        let blocks = Mutex::new(out.chunks_mut((BLOCK * width).max(1)).enumerate());
        let work = |scratch: &mut Vec<f32>| {
            loop {
                let next = blocks.lock().expect("no holder panics").next();
                let Some((index, out)) = next else { return };
                let first = index * BLOCK;
                isa.run(ProgramBlock { program: self, feed, once: &once, first, scratch, out });
            }
        };
        let work = || SCRATCH.with_borrow_mut(work);
        if feed.rows * self.work < PARALLEL_FROM {
            work();
        } else {
            // The calling thread works too; other threads join as soon as they are awake.
            let helpers = rayon::current_num_threads().min(feed.rows.div_ceil(BLOCK)) - 1;
            rayon::in_place_scope(|scope| {
                (0..helpers).for_each(|_| scope.spawn(|_| work()));
                work();
            });
        }
        out
    }
}

thread_local! {
    /// This thread's scratch buffer.
    static SCRATCH: RefCell<Vec<f32>> = RefCell::default();
}

/// The offset of each step's result and the size of the scratch. Memory is reused after a result's
/// last reader.
fn plan<O>(steps: &[ProgramStep<O>], outputs: &[Operand]) -> (Vec<usize>, usize) {
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
    let (mut offsets, mut end) = (Vec::with_capacity(steps.len()), 0);
    for (at, step) in steps.iter().enumerate() {
        let found = free.iter().position(|(_, width)| *width == step.width);
        let offset = match found {
            Some(found) => free.swap_remove(found).0,
            None => {
                let offset = end;
                end += step.width;
                offset
            }
        };
        offsets.push(offset);
        // A result must not overwrite what its step reads, so memory is freed after the step, once.
        for operand in &step.operands {
            if let Operand::Value { step: read, width } = *operand
                && last[read] == at
            {
                last[read] = usize::MAX;
                free.push((offsets[read], width));
            }
        }
    }
    (offsets, end)
}
