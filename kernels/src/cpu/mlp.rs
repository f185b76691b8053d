//! A network of two linear layers on the CPU, a block of rows at a time:
//! what is between the layers stays in the second cache.
//!
//! Blocks are joined into parts that threads share, by a rule that knows only
//! the number of rows, and the parts' gradients are summed in order.

use std::ops::Range;

use burn::tensor::{Shape, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::dense::{PANEL, Prepared};
use super::isa::{Checked, Isa, Kernel};
use super::lanes::Lanes;
use super::product::{Activation, Factor, Matrix, WeightGrad, multiply, multiply_activated};
use super::task::Sink;
use super::{Rows, add_to, matrix, readable, rows, span};
use crate::mlp::{FusedMlp, MlpGrads, MlpInputs, MlpWidths, Wanted, Weights};

/// Rows of a block.
const BLOCK: usize = 128;

/// Rows of a part: fewer are not worth a thread.
const PART: usize = 2048;

/// The op's inputs on the CPU.
pub type CpuMlp<'a> = MlpInputs<Rows<'a>, &'a [f32]>;

/// The kernels of the Flex backend.
pub(super) const FUSED: FusedMlp<FlexTensor> = FusedMlp { forward, backward };

/// What all blocks share.
struct Network<'a> {
    x: Rows<'a>,
    hidden: Prepared,
    isa: Checked,
}

/// A thread's memory.
#[derive(Default)]
struct Scratch {
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
    let sink = &Sink::new(&mut out, widths.to);
    each_part(widths.rows, |part| {
        let mut scratch = Scratch::default();
        for rows in blocks(part) {
            let scratch = &mut scratch;
            network.isa.run(Forward { network, linear, rows, scratch, sink });
        }
    });
    out
}

/// The gradients of the inputs, each row-major, given the output's.
///
/// # Panics
/// As `mlp_forward`.
pub fn mlp_backward(
    inputs: &CpuMlp<'_>,
    widths: MlpWidths,
    grad: Rows<'_>,
    wanted: Wanted,
    isa: Isa,
) -> MlpGrads<Vec<f32>> {
    let MlpWidths { rows, from, hidden, to } = widths;
    let mut x = vec![0.0; if wanted.x { rows * from } else { 0 }];
    let pass = Pass {
        network: network(inputs, widths, isa),
        hidden: Prepared::transposed(inputs.hidden.weight, [hidden, from]),
        output: Prepared::transposed(inputs.output.weight, [to, hidden]),
        grad,
        x_grads: wanted.x.then(|| Sink::new(&mut x, from)),
    };
    let sums = each_part(rows, |part| {
        let (mut scratch, mut sums) = (Scratch::default(), Sums::new(widths));
        for rows in blocks(part) {
            let (scratch, sums) = (&mut scratch, &mut sums);
            pass.network.isa.run(Backward { pass: &pass, rows, scratch, sums });
        }
        sums
    });
    drop(pass);
    let mut all = Sums::new(widths);
    sums.iter().for_each(|part| all.add(part));
    all.hidden.bias.truncate(hidden);
    all.output.bias.truncate(to);
    let weights = |of: Weights<WeightGrad, Vec<f32>>| Weights {
        weight: of.weight.row_major(),
        bias: of.bias,
    };
    let x = wanted.x.then_some(x);
    MlpGrads { x, hidden: weights(all.hidden), output: weights(all.output) }
}

fn network<'a>(inputs: &CpuMlp<'a>, widths: MlpWidths, isa: Isa) -> Network<'a> {
    let MlpWidths { from, hidden, .. } = widths;
    let linear = Prepared::new(inputs.hidden.weight, [from, hidden], inputs.hidden.bias);
    Network { x: inputs.x, hidden: linear, isa: isa.checked() }
}

/// `run` of every part of some rows, on the threads there are; the results come in order.
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
fn load(matrix: &mut Matrix, source: Rows<'_>, rows: Range<usize>, width: usize) {
    matrix.resize(rows.len(), width);
    for (at, row) in rows.enumerate() {
        matrix.row_mut(at)[..width].copy_from_slice(&source.data[row * source.stride..][..width]);
    }
}

impl Network<'_> {
    /// Fills the scratch with the block's inputs and what they become, and slopes where they are wanted.
    #[inline(always)]
    fn activate<V: Lanes, const R: usize>(
        &self,
        rows: Range<usize>,
        scratch: &mut Scratch,
        sloped: bool,
    ) {
        let Scratch { input, hidden, slopes, .. } = scratch;
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

/// Computes a block of rows.
struct Forward<'a> {
    network: &'a Network<'a>,
    linear: &'a Prepared,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
    sink: &'a Sink<'a>,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Forward { network, linear, rows, scratch, sink } = self;
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
    sink: &Sink<'_>,
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

/// What all blocks of a backward share.
struct Pass<'a> {
    network: Network<'a>,
    /// The weights, transposed.
    hidden: Prepared,
    output: Prepared,
    grad: Rows<'a>,
    x_grads: Option<Sink<'a>>,
}

/// The gradients of the weights: sums over blocks. Biases are up to whole panels.
struct Sums {
    hidden: Weights<WeightGrad, Vec<f32>>,
    output: Weights<WeightGrad, Vec<f32>>,
}

impl Sums {
    fn new(widths: MlpWidths) -> Self {
        let weights = |from: usize, to: usize| Weights {
            weight: WeightGrad::new([from, to]),
            bias: vec![0.0; to.next_multiple_of(PANEL)],
        };
        let MlpWidths { from, hidden, to, .. } = widths;
        Sums { hidden: weights(from, hidden), output: weights(hidden, to) }
    }

    fn add(&mut self, other: &Sums) {
        add_to(Some(&mut self.hidden.weight.sums), &other.hidden.weight.sums);
        add_to(Some(&mut self.hidden.bias), &other.hidden.bias);
        add_to(Some(&mut self.output.weight.sums), &other.output.weight.sums);
        add_to(Some(&mut self.output.bias), &other.output.bias);
    }
}

/// Differentiates a block of rows.
struct Backward<'a> {
    pass: &'a Pass<'a>,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
    sums: &'a mut Sums,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Backward { pass, rows, scratch, sums } = self;
        pass.network.activate::<V, R>(rows.clone(), scratch, true);
        let Scratch { input, hidden, slopes, grad, hidden_grad } = scratch;
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
    let inputs = inputs.map(readable);
    matrix(mlp_forward(&borrow(&inputs), widths, Isa::best()), widths.rows, widths.to)
}

fn backward(
    inputs: MlpInputs<FlexTensor>,
    grad: FlexTensor,
    wanted: Wanted,
) -> MlpGrads<FlexTensor> {
    let widths = inputs.widths();
    let MlpWidths { rows: count, from, hidden, to } = widths;
    let (inputs, grad) = (inputs.map(readable), readable(grad));
    let found = mlp_backward(&borrow(&inputs), widths, rows(&grad), wanted, Isa::best());
    let weights = |of: Weights<Vec<f32>>, [from, to]: [usize; 2]| Weights {
        weight: matrix(of.weight, from, to),
        bias: FlexTensor::from_data(TensorData::new(of.bias, Shape::new([to]))),
    };
    MlpGrads {
        x: found.x.map(|x| matrix(x, count, from)),
        hidden: weights(found.hidden, [from, hidden]),
        output: weights(found.output, [hidden, to]),
    }
}

fn borrow(inputs: &MlpInputs<FlexTensor>) -> CpuMlp<'_> {
    let MlpInputs { x, hidden, output } = inputs;
    MlpInputs { x: rows(x), hidden: borrow_weights(hidden), output: borrow_weights(output) }
}

fn borrow_weights(weights: &Weights<FlexTensor>) -> Weights<Rows<'_>, &[f32]> {
    Weights { weight: rows(&weights.weight), bias: &weights.bias.storage()[span(&weights.bias)] }
}
