//! A whole layer on the CPU, one group of requests at a time, so that intermediate values stay in
//! the L2 cache and are not stored.
//!
//! A group goes through the whole layer before the next one. The backward computes the group's U,
//! Q, V and K again. Groups form parts, which are distributed over threads. The parts depend only
//! on the batch and their gradients are summed in order, so results do not depend on the number of
//! threads. The kernels are in `forward`, `backward` and `product`.

mod backward;
mod forward;
mod group;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::dense::Prepared;
use super::isa::{DetectedIsa, Isa};
use super::task::OutputSink;
use super::{StridedRows, matrix, readable, rows, values, vector};
use crate::layer::{FusedLayer, HstuLayerWidths, LayerInputs, LayerOptions, LayerOutput};
use group::{RequestGroup, parts};

/// A layer's inputs on the CPU.
pub type CpuLayer<'a> = LayerInputs<StridedRows<'a>, &'a [f32]>;

/// The fused kernels of the Flex backend.
pub(super) const FUSED: FusedLayer<FlexTensor> = FusedLayer { forward, backward };

/// The settings that all groups of a pass share.
struct LayerPass<'a> {
    inputs: &'a CpuLayer<'a>,
    options: &'a LayerOptions,
    widths: HstuLayerWidths,
    isa: DetectedIsa,
    /// The prepared weights W with b, and W_o.
    mix: Prepared,
    output: Prepared,
}

impl<'a> LayerPass<'a> {
    fn new(
        inputs: &'a CpuLayer<'a>,
        widths: HstuLayerWidths,
        options: &'a LayerOptions,
        isa: Isa,
    ) -> Self {
        let HstuLayerWidths { dim, v, qk, .. } = widths;
        let mix = Prepared::new(inputs.uvqk, [dim, 2 * (v + qk)], inputs.bias);
        let output = Prepared::new(inputs.output, [v, dim], &[]);
        LayerPass { inputs, options, widths, isa: isa.checked(), mix, output }
    }

    /// The number of rows of the output.
    fn out_rows(&self) -> usize {
        let attention = &self.options.attention;
        let skipped = if attention.targets_only { attention.history_rows() } else { 0 };
        self.widths.rows - skipped
    }

    /// Runs `run` for every part, on the thread pool. The results are in order.
    fn each_part<T: Send>(&self, run: impl Fn(&[RequestGroup]) -> T + Sync) -> Vec<T> {
        let parts = parts(&self.options.attention);
        match parts.as_slice() {
            [one] => vec![run(one)],
            _ => parts.par_iter().map(|part| run(part)).collect(),
        }
    }
}

/// A layer's output and the output of its attention, both row-major.
///
/// # Panics
/// If the machine lacks `isa`, or the inputs do not match `widths` and `options`.
pub fn layer_forward(
    inputs: &CpuLayer<'_>,
    widths: HstuLayerWidths,
    options: &LayerOptions,
    isa: Isa,
) -> LayerOutput<Vec<f32>> {
    let layer = LayerPass::new(inputs, widths, options, isa);
    let mut out = vec![0.0; layer.out_rows() * widths.dim];
    let mut attended = vec![0.0; layer.out_rows() * widths.v];
    let sinks = LayerOutput {
        out: OutputSink::new(&mut out, widths.dim),
        attended: OutputSink::new(&mut attended, widths.v),
    };
    layer.each_part(|part| {
        let mut scratch = forward::LayerForwardScratch::default();
        part.iter().for_each(|group| forward::run(&layer, group, &mut scratch, &sinks));
    });
    LayerOutput { out, attended }
}

/// The gradients of the inputs, each row-major, given the gradient of the output and the
/// output of attention.
///
/// # Panics
/// As [`layer_forward`].
pub fn layer_backward(
    inputs: &CpuLayer<'_>,
    widths: HstuLayerWidths,
    given: &LayerOutput<StridedRows<'_>>,
    options: &LayerOptions,
    isa: Isa,
) -> LayerInputs<Vec<f32>> {
    let HstuLayerWidths { rows, dim, v, qk } = widths;
    let pass = backward::LayerBackwardPass {
        layer: LayerPass::new(inputs, widths, options, isa),
        mix: Prepared::transposed(inputs.uvqk, [2 * (v + qk), dim]),
        output: Prepared::transposed(inputs.output, [dim, v]),
        given,
    };
    let mut x = vec![0.0; rows * dim];
    let sink = OutputSink::new(&mut x, dim);
    let sums = pass.layer.each_part(|part| {
        let mut scratch = backward::LayerBackwardScratch::default();
        let mut sums = backward::LayerGradSums::new(&pass.layer);
        part.iter().for_each(|group| backward::run(&pass, group, &mut scratch, &mut sums, &sink));
        sums
    });
    let mut sums = sums.into_iter();
    let mut all = sums.next().unwrap_or_else(|| backward::LayerGradSums::new(&pass.layer));
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
    let HstuLayerWidths { dim, v, qk, .. } = widths;
    let inputs = inputs.map_all(readable);
    let given = LayerOutput { out: readable(given.out), attended: readable(given.attended) };
    let given = LayerOutput { out: rows(&given.out), attended: rows(&given.attended) };
    let found = layer_backward(&borrow(&inputs), widths, &given, options, Isa::best());
    LayerInputs {
        x: matrix(found.x, widths.rows, dim),
        norm_in: found.norm_in.map(vector),
        uvqk: matrix(found.uvqk, dim, 2 * (v + qk)),
        bias: vector(found.bias),
        position: found.position.map(vector),
        time: found.time.map(vector),
        norm_out: found.norm_out.map(vector),
        output: matrix(found.output, v, dim),
    }
}

fn borrow(inputs: &LayerInputs<FlexTensor>) -> CpuLayer<'_> {
    inputs.as_ref().map(rows, values)
}
