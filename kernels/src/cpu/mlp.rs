//! A network of two linear layers on the CPU, one block of rows at a time, so that the hidden layer
//! stays in the L2 cache.
//!
//! Blocks form parts, which are distributed over threads. The parts depend only on the number of
//! rows and their gradients are summed in order, so results do not depend on the number of threads.

use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::dense::{PANEL, Prepared};
use super::isa::{DetectedIsa, Isa, IsaKernel};
use super::lanes::Lanes;
use super::product::{Activation, Factor, Matrix, WeightGrad, multiply, multiply_activated};
use super::task::OutputSink;
use super::{StridedRows, add_to, matrix, readable, rows, values, vector};
use crate::mlp::{FusedMlp, LinearWeights, MlpGrads, MlpInputs, MlpWidths};

/// Rows per block.
const BLOCK: usize = 128;

/// Rows per part: fewer do not repay a thread.
const PART: usize = 2048;

/// The op's inputs on the CPU.
pub type CpuMlp<'a> = MlpInputs<StridedRows<'a>, &'a [f32]>;

/// The fused kernels of the Flex backend.
pub(super) const FUSED: FusedMlp<FlexTensor> = FusedMlp { forward, backward };

/// The settings that all blocks share.
struct MlpPass<'a> {
    x: StridedRows<'a>,
    hidden: Prepared,
    isa: DetectedIsa,
}

/// Buffers that a thread uses again.
#[derive(Default)]
struct MlpScratch {
    input: Matrix,
    hidden: Matrix,
    slopes: Matrix,
    /// The output's gradient.
    grad: Matrix,
    hidden_grad: Matrix,
}

/// The op: `[rows, to]`, row-major.
///
/// # Panics
/// If the machine lacks `isa`, or the inputs do not fit `widths`.
pub fn mlp_forward(inputs: &CpuMlp<'_>, widths: MlpWidths, isa: Isa) -> Vec<f32> {
    let network = &network(inputs, widths, isa);
    let linear =
        &Prepared::new(inputs.output.weight, [widths.hidden, widths.to], inputs.output.bias);
    let mut out = vec![0.0; widths.rows * widths.to];
    let sink = &OutputSink::new(&mut out, widths.to);
    each_part(widths.rows, |part| {
        let mut scratch = MlpScratch::default();
        for rows in blocks(part) {
            let scratch = &mut scratch;
            network.isa.run(MlpForwardBlock { network, linear, rows, scratch, sink });
        }
    });
    out
}

/// The gradients of the inputs, each row-major, given the output's; that of x if `x_wanted`.
///
/// # Panics
/// As [`mlp_forward`].
pub fn mlp_backward(
    inputs: &CpuMlp<'_>,
    widths: MlpWidths,
    grad: StridedRows<'_>,
    x_wanted: bool,
    isa: Isa,
) -> MlpGrads<Vec<f32>> {
    let MlpWidths { rows, from, hidden, to } = widths;
    let mut x = vec![0.0; if x_wanted { rows * from } else { 0 }];
    let pass = MlpBackwardPass {
        network: network(inputs, widths, isa),
        hidden: Prepared::transposed(inputs.hidden.weight, [hidden, from]),
        output: Prepared::transposed(inputs.output.weight, [to, hidden]),
        grad,
        x_grads: x_wanted.then(|| OutputSink::new(&mut x, from)),
    };
    let sums = each_part(rows, |part| {
        let (mut scratch, mut sums) = (MlpScratch::default(), MlpGradSums::new(widths));
        for rows in blocks(part) {
            let (scratch, sums) = (&mut scratch, &mut sums);
            pass.network.isa.run(MlpBackwardBlock { pass: &pass, rows, scratch, sums });
        }
        sums
    });
    drop(pass);
    let mut all = MlpGradSums::new(widths);
    sums.iter().for_each(|part| all.add(part));
    all.hidden.bias.truncate(hidden);
    all.output.bias.truncate(to);
    let weights = |of: LinearWeights<WeightGrad, Vec<f32>>| LinearWeights {
        weight: of.weight.row_major(),
        bias: of.bias,
    };
    let x = x_wanted.then_some(x);
    MlpGrads { x, hidden: weights(all.hidden), output: weights(all.output) }
}

fn network<'a>(inputs: &CpuMlp<'a>, widths: MlpWidths, isa: Isa) -> MlpPass<'a> {
    let MlpWidths { from, hidden, .. } = widths;
    let linear = Prepared::new(inputs.hidden.weight, [from, hidden], inputs.hidden.bias);
    MlpPass { x: inputs.x, hidden: linear, isa: isa.checked() }
}

/// Runs `run` for every part of some rows, on the thread pool. The results are in order.
fn each_part<T: Send>(rows: usize, run: impl Fn(Range<usize>) -> T + Sync + Send) -> Vec<T> {
    if rows <= PART {
        return vec![run(0..rows)];
    }
    let part = |at: usize| run(at * PART..rows.min((at + 1) * PART));
    (0..rows.div_ceil(PART)).into_par_iter().map(part).collect()
}

fn blocks(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(BLOCK).map(move |first| first..rows.end.min(first + BLOCK))
}

/// Fills the rows of `matrix` with `rows` of `source`.
#[inline(always)]
pub(super) fn load(matrix: &mut Matrix, source: StridedRows<'_>, rows: Range<usize>, width: usize) {
    matrix.resize(rows.len(), width);
    for (at, row) in rows.enumerate() {
        matrix.row_mut(at)[..width].copy_from_slice(&source.data[row * source.stride..][..width]);
    }
}

impl MlpPass<'_> {
    /// Fills the scratch with the block's inputs and hidden layer, and with the activation's slopes
    /// if `sloped`.
    #[inline(always)]
    fn activate<V: Lanes, const R: usize>(
        &self,
        rows: Range<usize>,
        scratch: &mut MlpScratch,
        sloped: bool,
    ) {
        let MlpScratch { input, hidden, slopes, .. } = scratch;
        load(input, self.x, rows.clone(), self.hidden.from);
        hidden.resize(rows.len(), self.hidden.to);
        if sloped {
            slopes.resize(rows.len(), self.hidden.to);
        }
        let factor = input.factor(0..rows.len());
        let panels = 0..self.hidden.to.div_ceil(PANEL);
        let slopes = sloped.then_some(slopes);
        multiply_activated::<V, R>(&factor, &self.hidden, panels, hidden, slopes);
    }
}

/// The forward of a block of rows.
struct MlpForwardBlock<'a> {
    network: &'a MlpPass<'a>,
    linear: &'a Prepared,
    rows: Range<usize>,
    scratch: &'a mut MlpScratch,
    sink: &'a OutputSink<'a>,
}

impl IsaKernel for MlpForwardBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let MlpForwardBlock { network, linear, rows, scratch, sink } = self;
        network.activate::<V, R>(rows.clone(), scratch, false);
        let factor = scratch.hidden.factor(0..rows.len());
        store::<V, R>(&factor, linear, rows.start, sink);
    }
}

/// Writes a product's rows from row `first` of `sink` on.
#[inline(always)]
fn store<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    first: usize,
    sink: &OutputSink<'_>,
) {
    let to = right.to;
    let panels = 0..to.div_ceil(PANEL);
    multiply::<V, R>(factor, right, panels, Activation::None, |row, panel, values| {
        let columns = panel * PANEL..to.min((panel + 1) * PANEL);
        // SAFETY: every row belongs to one block, and this borrow ends here.
        let out = unsafe { sink.part(first + row, 0, to) };
        out[columns.clone()].copy_from_slice(&values[..columns.len()]);
    });
}

/// The settings that all blocks of a backward share.
struct MlpBackwardPass<'a> {
    network: MlpPass<'a>,
    /// The transposed weights of both layers.
    hidden: Prepared,
    output: Prepared,
    grad: StridedRows<'a>,
    x_grads: Option<OutputSink<'a>>,
}

/// The gradients of the weights, summed over blocks. Biases are padded to whole panels.
struct MlpGradSums {
    hidden: LinearWeights<WeightGrad, Vec<f32>>,
    output: LinearWeights<WeightGrad, Vec<f32>>,
}

impl MlpGradSums {
    fn new(widths: MlpWidths) -> Self {
        let weights = |from: usize, to: usize| LinearWeights {
            weight: WeightGrad::new([from, to]),
            bias: vec![0.0; to.next_multiple_of(PANEL)],
        };
        let MlpWidths { from, hidden, to, .. } = widths;
        MlpGradSums { hidden: weights(from, hidden), output: weights(hidden, to) }
    }

    fn add(&mut self, other: &MlpGradSums) {
        add_to(Some(&mut self.hidden.weight.sums), &other.hidden.weight.sums);
        add_to(Some(&mut self.hidden.bias), &other.hidden.bias);
        add_to(Some(&mut self.output.weight.sums), &other.output.weight.sums);
        add_to(Some(&mut self.output.bias), &other.output.bias);
    }
}

/// The backward of a block of rows.
struct MlpBackwardBlock<'a> {
    pass: &'a MlpBackwardPass<'a>,
    rows: Range<usize>,
    scratch: &'a mut MlpScratch,
    sums: &'a mut MlpGradSums,
}

impl IsaKernel for MlpBackwardBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let MlpBackwardBlock { pass, rows, scratch, sums } = self;
        pass.network.activate::<V, R>(rows.clone(), scratch, true);
        let MlpScratch { input, hidden, slopes, grad, hidden_grad } = scratch;
        let (between, to) = (pass.network.hidden.to, pass.output.from);
        let all = 0..rows.len();
        load(grad, pass.grad, rows.clone(), to);
        for row in all.clone() {
            add_to(Some(&mut sums.output.bias), &grad.row(row)[..to]);
        }
        hidden_grad.resize(rows.len(), between);
        let (factor, none) = (grad.factor(all.clone()), Activation::None);
        let panels = 0..between.div_ceil(PANEL);
        multiply::<V, R>(&factor, &pass.output, panels.clone(), none, |row, panel, values| {
            let columns = panel * PANEL..(panel + 1) * PANEL;
            let slopes = &slopes.row(row)[columns.clone()];
            let cells = &mut hidden_grad.row_mut(row)[columns];
            for ((cell, value), slope) in cells.iter_mut().zip(values).zip(slopes) {
                *cell = *value * slope;
            }
        });
        for row in all.clone() {
            add_to(Some(&mut sums.hidden.bias), &hidden_grad.row(row)[..between]);
        }
        sums.output.weight.add::<V, R>([hidden, grad], all.clone(), 0..to.div_ceil(PANEL));
        sums.hidden.weight.add::<V, R>([input, hidden_grad], all.clone(), panels);
        if let Some(sink) = &pass.x_grads {
            let factor = hidden_grad.factor(all);
            store::<V, R>(&factor, &pass.hidden, rows.start, sink);
        }
    }
}

fn forward(inputs: MlpInputs<FlexTensor>) -> FlexTensor {
    let widths = inputs.widths();
    let inputs = inputs.map_all(readable);
    matrix(mlp_forward(&borrow(&inputs), widths, Isa::best()), widths.rows, widths.to)
}

fn backward(
    inputs: MlpInputs<FlexTensor>,
    grad: FlexTensor,
    x_wanted: bool,
) -> MlpGrads<FlexTensor> {
    let widths = inputs.widths();
    let MlpWidths { rows: count, from, hidden, to } = widths;
    let (inputs, grad) = (inputs.map_all(readable), readable(grad));
    let found = mlp_backward(&borrow(&inputs), widths, rows(&grad), x_wanted, Isa::best());
    let weights = |of: LinearWeights<Vec<f32>>, [from, to]: [usize; 2]| LinearWeights {
        weight: matrix(of.weight, from, to),
        bias: vector(of.bias),
    };
    MlpGrads {
        x: found.x.map(|x| matrix(x, count, from)),
        hidden: weights(found.hidden, [from, hidden]),
        output: weights(found.output, [hidden, to]),
    }
}

fn borrow(inputs: &MlpInputs<FlexTensor>) -> CpuMlp<'_> {
    inputs.as_ref().map(rows, values)
}
