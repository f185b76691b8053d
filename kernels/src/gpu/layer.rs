//! A whole layer on a GPU: CubeCL's products, attention, and one kernel for what is between two of
//! them.
//!
//! As on the CPU, the backward pass computes again what it needs of the forward pass.

use std::sync::Arc;

use burn::tensor::{Shape, Tensor, TensorMetadata};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::{CubeElement, Float};

use super::launch::readable;
use super::rowwise_launch::{
    RowGate, RowNorm, RowNormOutput, SiluBlock, SiluOutputGradients, column_sums, silu,
    silu_backward,
};
use crate::attention::{HstuAttention, HstuBackend, HstuInputs, primitive, tensor};
use crate::layer::{HstuLayerWidths, LayerInputs, LayerOptions, LayerOutput};

/// A layer on a device, with what both passes compute.
struct DeviceLayer<'a, B: HstuBackend, R: CubeRuntime> {
    inputs: &'a LayerInputs<CubeTensor<R>>,
    options: &'a LayerOptions,
    widths: HstuLayerWidths,
    /// The rows that come before those of the output.
    first: usize,
    input_norm: RowNorm<R>,
    /// The rows of `x` after the first norm.
    normed: Tensor<B, 2>,
    /// `[out rows, 2 v + 2 qk]`: the product with W.
    own: CubeTensor<R>,
    /// `[first, v + qk]`: the same of the rows before, of V and K.
    past: Option<CubeTensor<R>>,
    /// U, Q, V, K of all rows.
    activated: Tensor<B, 2>,
}

/// The backend of a runtime, whose tensors are those of the kernels.
pub(super) trait GpuBackend<R: CubeRuntime>:
    HstuBackend<FloatTensorPrimitive = CubeTensor<R>>
{
}

impl<R, F, I, B> GpuBackend<R> for CubeBackend<R, F, I, B>
where
    R: CubeRuntime,
    R::Server: cubecl::server::ComputeServer,
    R::Device: burn::tensor::backend::DeviceOps,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
}

impl<'a, B: GpuBackend<R>, R: CubeRuntime> DeviceLayer<'a, B, R> {
    fn new<E: Float + CubeElement>(
        inputs: &'a LayerInputs<CubeTensor<R>>,
        options: &'a LayerOptions,
    ) -> Self {
        let widths = inputs.widths(options);
        let first =
            if options.attention.targets_only { options.attention.history_rows() } else { 0 };
        let HstuLayerWidths { rows, v, qk, .. } = widths;
        let (weights, epsilon) = (inputs.norm_in.clone(), options.epsilon);
        let input_norm = RowNorm { weights, gate: None, epsilon };
        let normed: Tensor<B, 2> = tensor(input_norm.forward::<E>(&inputs.x));
        let mix: Tensor<B, 2> = tensor(inputs.uvqk.clone());
        let own = primitive(normed.clone().narrow(0, first, rows - first).matmul(mix.clone()));
        let past = || {
            let seen = mix.narrow(1, v + qk, v + qk);
            primitive(normed.clone().narrow(0, 0, first).matmul(seen))
        };
        let past = (first > 0).then(past);
        let activated = tensor(silu::<R, E>(&own, past.as_ref(), &inputs.bias));
        Self { inputs, options, widths, first, input_norm, normed, own, past, activated }
    }

    fn out_rows(&self) -> usize {
        self.widths.rows - self.first
    }

    /// Some columns of U, Q, V, K.
    fn columns(&self, from: usize, width: usize) -> Tensor<B, 2> {
        self.activated.clone().narrow(1, from, width)
    }

    fn attention(&self) -> HstuInputs<CubeTensor<R>> {
        let HstuLayerWidths { v, qk, .. } = self.widths;
        let columns = |from, width| primitive(self.columns(from, width));
        let (position, time) = (self.inputs.position.clone(), self.inputs.time.clone());
        let (q, k) = (columns(v, qk), columns(2 * v + qk, qk));
        HstuInputs { q, k, v: columns(v + qk, v), position, time }
    }

    /// The norm of the output of attention, which U gates.
    fn output_norm(&self) -> RowNorm<R> {
        let gate = self.columns(0, self.widths.v).narrow(0, self.first, self.out_rows());
        // Dropout of U equals dropout of the product.
        let gate = RowGate::new(readable_rows(primitive(gate)), self.options.dropout);
        let (weights, epsilon) = (self.inputs.norm_out.clone(), self.options.epsilon);
        RowNorm { weights, gate: Some(gate), epsilon }
    }
}

/// A layer's output and the output of its attention.
pub(super) fn forward<B: GpuBackend<R>, R: CubeRuntime, E: Float + CubeElement>(
    inputs: LayerInputs<CubeTensor<R>>,
    options: &LayerOptions,
) -> LayerOutput<CubeTensor<R>> {
    let attention = &options.attention;
    if attention.targets_only && attention.rows() == attention.history_rows() {
        let none = |of: &CubeTensor<R>, columns| {
            B::float_zeros(Shape::new([0, columns]), &B::float_device(of), of.dtype.into())
        };
        let HstuLayerWidths { dim, v, .. } = inputs.widths(options);
        return LayerOutput { out: none(&inputs.x, dim), attended: none(&inputs.x, v) };
    }
    let inputs = inputs.map_all(readable_rows);
    let layer = DeviceLayer::<B, R>::new::<E>(&inputs, options);
    let (first, rows) = (layer.first, layer.out_rows());
    let attended = B::hstu_attention(layer.attention(), options.attention.clone());
    let attended = tensor::<B, 2>(attended).narrow(0, first, rows);
    let attended = readable_rows(primitive(attended));
    let gated: Tensor<B, 2> = tensor(layer.output_norm().forward::<E>(&attended));
    let x = tensor::<B, 2>(inputs.x.clone()).narrow(0, first, rows);
    let out = primitive(x + gated.matmul(tensor(inputs.output.clone())));
    LayerOutput { out, attended }
}

/// The gradients of the inputs, given that of the output and the output of attention.
pub(super) fn backward<B: GpuBackend<R>, R: CubeRuntime, E: Float + CubeElement>(
    inputs: LayerInputs<CubeTensor<R>>,
    given: LayerOutput<CubeTensor<R>>,
    options: &LayerOptions,
) -> LayerInputs<CubeTensor<R>> {
    if given.out.shape()[0] == 0 {
        let zeros =
            |of: CubeTensor<R>| B::float_zeros(of.shape(), &B::float_device(&of), of.dtype.into());
        return inputs.map_all(zeros);
    }
    let inputs = inputs.map_all(readable_rows);
    let layer = DeviceLayer::<B, R>::new::<E>(&inputs, options);
    let (dy, attended) = (readable_rows(given.out), readable_rows(given.attended));
    let output_norm = layer.output_norm();
    let gated: Tensor<B, 2> = tensor(output_norm.forward::<E>(&attended));
    let of_out: Tensor<B, 2> = tensor(dy.clone());
    let output = primitive(gated.transpose().matmul(of_out.clone()));
    let of_gated = of_out.matmul(tensor::<B, 2>(inputs.output.clone()).transpose());
    let rows = RowNormOutput { rows: layer.widths.rows, residual: None };
    let of_norm = output_norm.backward::<E>(&attended, &primitive(of_gated), rows);
    let shape: Arc<HstuAttention> = options.attention.clone();
    let of_attention = B::hstu_attention_backward(layer.attention(), of_norm.x, shape);

    let HstuInputs { q, k, v, position, time } = of_attention;
    let of_gate = of_norm.gate.expect("U gates the norm");
    let of_silu = SiluOutputGradients { u: &of_gate, qvk: Some([&q, &v, &k]) };
    let of_mix = layer.mix_gradients::<E>(&of_silu);
    let (rows, residual) = (layer.widths.rows, Some(&dy));
    let of_input =
        layer.input_norm.backward::<E>(&inputs.x, &of_mix.normed, RowNormOutput { rows, residual });
    LayerInputs {
        x: of_input.x,
        norm_in: of_input.weights,
        uvqk: of_mix.uvqk,
        bias: of_mix.bias,
        position,
        time,
        norm_out: of_norm.weights,
        output,
    }
}

/// The gradients of the product with W and of what goes into it.
struct MixGradients<R: CubeRuntime> {
    normed: CubeTensor<R>,
    uvqk: CubeTensor<R>,
    bias: CubeTensor<R>,
}

impl<B: GpuBackend<R>, R: CubeRuntime> DeviceLayer<'_, B, R> {
    fn mix_gradients<E: Float + CubeElement>(
        &self,
        of_silu: &SiluOutputGradients<'_, R>,
    ) -> MixGradients<R> {
        let HstuLayerWidths { v, qk, .. } = self.widths;
        let (bias, first) = (&self.inputs.bias, self.first);
        let weights: Tensor<B, 2> = tensor(self.inputs.uvqk.clone());
        let own = SiluBlock { x: &self.own, first_row: first, first_column: 0 };
        let own = silu_backward::<R, E>(own, bias, of_silu);
        let mut of_bias: Tensor<B, 1> = tensor(column_sums::<R, E>(&own));
        let own: Tensor<B, 2> = tensor(own);
        let rows = self.normed.clone().narrow(0, first, self.out_rows());
        let mut uvqk = rows.transpose().matmul(own.clone());
        let mut normed = own.matmul(weights.clone().transpose());
        if let Some(past) = &self.past {
            let past = SiluBlock { x: past, first_row: 0, first_column: v + qk };
            let past = silu_backward::<R, E>(past, bias, of_silu);
            let sums: Tensor<B, 1> = tensor(column_sums::<R, E>(&past));
            let past: Tensor<B, 2> = tensor(past);
            let seen = weights.narrow(1, v + qk, v + qk);
            let rows = self.normed.clone().narrow(0, 0, first);
            let of_seen = rows.transpose().matmul(past.clone());
            let last = |all: Tensor<B, 2>, more: Tensor<B, 2>| {
                let [rows, columns] = all.dims();
                let place = [0..rows, v + qk..columns];
                let sum = all.clone().slice(place.clone()) + more;
                all.slice_assign(place, sum)
            };
            uvqk = last(uvqk, of_seen);
            of_bias = last(of_bias.unsqueeze(), sums.unsqueeze()).squeeze_dim(0);
            normed = Tensor::cat(vec![past.matmul(seen.transpose()), normed], 0);
        }
        MixGradients {
            normed: readable_rows(primitive(normed)),
            uvqk: primitive(uvqk),
            bias: primitive(of_bias),
        }
    }
}

pub(super) fn readable_rows<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let dtype = tensor.dtype;
    readable(tensor, dtype)
}
