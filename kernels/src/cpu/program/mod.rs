//! Programs of row-wise operators: small networks over many rows, a block of
//! rows at a time, so that what one operator leaves is still in the cache when the
//! next one reads it.
//!
//! A program is made once: weights are laid out, places for intermediate values
//! are shared by those that do not live at the same time. A run allocates its
//! output alone; a thread keeps its scratch, which does not grow with the rows. Where operands
//! come from, and what a program means, is decided above; `block` runs a block of rows
//! through the steps, and `ops` computes what is not a product.

mod block;
mod ops;

use std::cell::RefCell;
use std::sync::Mutex;

use super::dense::Prepared;
use super::isa::Isa;
use block::{Block, Scratch};

/// Rows of a block.
const BLOCK: usize = 32;

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
    /// The product with a single column of weights.
    Dot {
        /// As many as the operand is wide.
        weights: Vec<f32>,
        /// Added to it.
        bias: f32,
    },
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
            Operator::Dot { weights, .. } => weights.len(),
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
        let blocks = Mutex::new(out.chunks_mut((BLOCK * width).max(1)).enumerate());
        let work = |scratch: &mut Scratch| {
            loop {
                let next = blocks.lock().expect("no holder panics").next();
                let Some((index, out)) = next else { return };
                isa.run(Block { program: self, feed, first: index * BLOCK, scratch, out });
            }
        };
        let work = || SCRATCH.with_borrow_mut(work);
        if feed.rows * self.work < PARALLEL_FROM {
            work();
        } else {
            // The caller works too: other threads help it as soon as they are awake.
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
    /// What this thread works in.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
        // A result must not lie where the step still reads, so places are freed after it: once each.
        for operand in &step.operands {
            if let Operand::Value { step: read, width } = *operand
                && last[read] == at
            {
                last[read] = usize::MAX;
                free.push((places[read], width));
            }
        }
    }
    (places, end)
}
