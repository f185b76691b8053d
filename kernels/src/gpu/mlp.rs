//! A network of two linear layers on a GPU: CubeCL's products, and one kernel for the activation.

use burn::tensor::Tensor;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{CubeElement, Float};

use super::layer::GpuBackend;
use super::rowwise_launch::{SiluBlock, SiluOutputGradients, column_sums, silu, silu_backward};
use crate::attention::{primitive, tensor};
use crate::mlp::{LinearWeights, MlpGrads, MlpInputs};

/// The output, `[rows, to]`.
pub(super) fn forward<B: GpuBackend<R>, R: CubeRuntime, E: Float + CubeElement>(
    inputs: MlpInputs<CubeTensor<R>>,
) -> CubeTensor<R> {
    inputs.widths();
    let MlpInputs { x, hidden, output } = inputs;
    let before = product::<B, R>(x, hidden.weight);
    let activated: Tensor<B, 2> = tensor(silu::<R, E>(&before, None, &hidden.bias));
    let bias = tensor::<B, 1>(output.bias).unsqueeze();
    primitive(activated.matmul(tensor(output.weight)) + bias)
}

/// The gradients of the inputs, given that of the output; that of x only if `wants_x`.
pub(super) fn backward<B: GpuBackend<R>, R: CubeRuntime, E: Float + CubeElement>(
    inputs: MlpInputs<CubeTensor<R>>,
    gradient: CubeTensor<R>,
    wants_x: bool,
) -> MlpGrads<CubeTensor<R>> {
    let MlpInputs { x, hidden, output } = inputs;
    let before = product::<B, R>(x.clone(), hidden.weight.clone());
    let activated: Tensor<B, 2> = tensor(silu::<R, E>(&before, None, &hidden.bias));
    let of_out: Tensor<B, 2> = tensor(gradient.clone());
    let of_output = LinearWeights {
        weight: primitive(activated.transpose().matmul(of_out.clone())),
        bias: column_sums::<R, E>(&gradient),
    };
    let of_activated = of_out.matmul(tensor::<B, 2>(output.weight).transpose());
    let of_silu = SiluOutputGradients { u: &primitive(of_activated), qvk: None };
    let block = SiluBlock { x: &before, first_row: 0, first_column: 0 };
    let of_before = silu_backward::<R, E>(block, &hidden.bias, &of_silu);
    let bias = column_sums::<R, E>(&of_before);
    let of_before: Tensor<B, 2> = tensor(of_before);
    let weight = primitive(tensor::<B, 2>(x).transpose().matmul(of_before.clone()));
    let of_x = || primitive(of_before.matmul(tensor::<B, 2>(hidden.weight).transpose()));
    MlpGrads { x: wants_x.then(of_x), hidden: LinearWeights { weight, bias }, output: of_output }
}

fn product<B: GpuBackend<R>, R: CubeRuntime>(a: CubeTensor<R>, b: CubeTensor<R>) -> CubeTensor<R> {
    primitive(tensor::<B, 2>(a).matmul(tensor(b)))
}
