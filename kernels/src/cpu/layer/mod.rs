//! A whole layer on the CPU, some requests at a time: what lies between its
//! input and its output stays in the second cache and is never kept.
//!
//! A group of requests goes through all of the layer before the next one does;
//! the backward computes the group's U, Q, V and K again. Groups are joined
//! into parts that threads share, by a rule that knows only the batch, and the
//! parts' gradients are summed in order: results do not depend on the number
//! of threads. The kernels are in `forward`, `backward` and `product`.

mod backward;
mod forward;
mod group;

use burn::tensor::{Shape, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::dense::Prepared;
use super::isa::{Checked, Isa};
use super::task::Sink;
use super::{Rows, matrix, readable, rows, span};
use crate::layer::{FusedLayer, LayerInputs, LayerOptions, LayerOutput, Widths};
use group::{Group, parts};

/// A layer's inputs on the CPU.
pub type CpuLayer<'a> = LayerInputs<Rows<'a>, &'a [f32]>;

/// The kernels of the Flex backend.
pub(super) const FUSED: FusedLayer<FlexTensor> = FusedLayer { forward, backward };

/// What all groups of a pass share.
struct Layer<'a> {
    inputs: &'a CpuLayer<'a>,
    options: &'a LayerOptions,
    widths: Widths,
    isa: Checked,
    /// W and b, and W_o.
    mix: Prepared,
    output: Prepared,
}

impl<'a> Layer<'a> {
    fn new(inputs: &'a CpuLayer<'a>, widths: Widths, options: &'a LayerOptions, isa: Isa) -> Self {
        let Widths { dim, v, qk, .. } = widths;
        let mix = Prepared::new(inputs.uvqk, [dim, 2 * (v + qk)], inputs.bias);
        let output = Prepared::new(inputs.output, [v, dim], &[]);
        Layer { inputs, options, widths, isa: isa.checked(), mix, output }
    }

    /// Rows of the output.
    fn out_rows(&self) -> usize {
        match self.options.attention.targets_only {
            true => self.widths.rows - self.options.attention.history_rows(),
            false => self.widths.rows,
        }
    }

    /// `run` of every part, on the threads there are; the results come in order.
    fn each_part<T: Send>(&self, run: impl Fn(&[Group]) -> T + Sync) -> Vec<T> {
        let parts = parts(&self.options.attention);
        match parts.as_slice() {
            [one] => vec![run(one)],
            _ => parts.par_iter().map(|part| run(part)).collect(),
        }
    }
}

/// A layer's output and what attention gave, both row-major.
///
/// # Panics
/// If the machine lacks `isa`, or the inputs do not fit `widths` and `options`.
pub fn layer_forward(
    inputs: &CpuLayer<'_>,
    widths: Widths,
    options: &LayerOptions,
    isa: Isa,
) -> LayerOutput<Vec<f32>> {
    let layer = Layer::new(inputs, widths, options, isa);
    let mut out = vec![0.0; layer.out_rows() * widths.dim];
    let mut attended = vec![0.0; layer.out_rows() * widths.v];
    let sinks = LayerOutput {
        out: Sink::new(&mut out, widths.dim),
        attended: Sink::new(&mut attended, widths.v),
    };
    layer.each_part(|part| {
        let mut scratch = forward::Scratch::default();
        part.iter().for_each(|group| forward::run(&layer, group, &mut scratch, &sinks));
    });
    LayerOutput { out, attended }
}

/// The gradients of the inputs, each row-major, given the output's gradient and what attention gave.
///
/// # Panics
/// As `layer_forward`.
pub fn layer_backward(
    inputs: &CpuLayer<'_>,
    widths: Widths,
    given: &LayerOutput<Rows<'_>>,
    options: &LayerOptions,
    isa: Isa,
) -> LayerInputs<Vec<f32>> {
    let Widths { rows, dim, v, qk } = widths;
    let pass = backward::Pass {
        layer: Layer::new(inputs, widths, options, isa),
        mix: Prepared::transposed(inputs.uvqk, [2 * (v + qk), dim]),
        output: Prepared::transposed(inputs.output, [dim, v]),
        given,
    };
    let mut x = vec![0.0; rows * dim];
    let sink = Sink::new(&mut x, dim);
    let sums = pass.layer.each_part(|part| {
        let mut scratch = backward::Scratch::default();
        let mut sums = backward::Sums::new(&pass.layer);
        part.iter().for_each(|group| backward::run(&pass, group, &mut scratch, &mut sums, &sink));
        sums
    });
    let mut sums = sums.into_iter();
    let mut all = sums.next().unwrap_or_else(|| backward::Sums::new(&pass.layer));
    sums.for_each(|part| all.add(&part));
    all.into_grads(x, &pass.layer)
}

fn forward(inputs: LayerInputs<FlexTensor>, options: &LayerOptions) -> LayerOutput<FlexTensor> {
    let widths = inputs.widths(options);
    let inputs = inputs.map_all(readable);
    let found = layer_forward(&borrow(&inputs), widths, options, Isa::best());
    let rows = found.attended.len() / widths.v;
    LayerOutput {
        out: matrix(found.out, rows, widths.dim),
        attended: matrix(found.attended, rows, widths.v),
    }
}

fn backward(
    inputs: LayerInputs<FlexTensor>,
    given: LayerOutput<FlexTensor>,
    options: &LayerOptions,
) -> LayerInputs<FlexTensor> {
    let widths = inputs.widths(options);
    let Widths { dim, v, qk, .. } = widths;
    let inputs = inputs.map_all(readable);
    let given = LayerOutput { out: readable(given.out), attended: readable(given.attended) };
    let given = LayerOutput { out: rows(&given.out), attended: rows(&given.attended) };
    let found = layer_backward(&borrow(&inputs), widths, &given, options, Isa::best());
    let table = |values: Vec<f32>| {
        let entries = values.len();
        FlexTensor::from_data(TensorData::new(values, Shape::new([entries])))
    };
    LayerInputs {
        x: matrix(found.x, widths.rows, dim),
        norm_in: found.norm_in.map(table),
        uvqk: matrix(found.uvqk, dim, 2 * (v + qk)),
        bias: table(found.bias),
        position: found.position.map(table),
        time: found.time.map(table),
        norm_out: found.norm_out.map(table),
        output: matrix(found.output, v, dim),
    }
}

fn borrow(inputs: &LayerInputs<FlexTensor>) -> CpuLayer<'_> {
    inputs.as_ref().map(rows, |table| &table.storage()[span(table)])
}
