//! The dense parts of a layer for serving: CubeCL's products, and one kernel for what is before or
//! after each.

use burn::tensor::{DType, Tensor, bf16, f16};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{CubeElement, Float};

use super::layer::{GpuBackend, readable_rows};
use super::rowwise_launch::{RowGate, RowNorm, silu};
use crate::attention::{primitive, tensor};
use crate::dense::{GateInputs, NormWeights, PreparedLinear};

/// The weights of a linear layer on a device.
#[derive(Debug)]
pub struct GpuDense<R: CubeRuntime> {
    /// `[from, to]`.
    weight: CubeTensor<R>,
    /// `[to]`; zeros where a layer has none.
    bias: CubeTensor<R>,
}

impl<B: GpuBackend<R>, R: CubeRuntime> PreparedLinear<B> for GpuDense<R> {
    fn prepare(weight: CubeTensor<R>, bias: Option<CubeTensor<R>>) -> Self {
        let weight = readable_rows(weight);
        let none = || {
            let weight: Tensor<B, 2> = tensor(weight.clone());
            primitive(Tensor::<B, 1>::zeros([weight.dims()[1]], &weight.device()))
        };
        let bias = bias.unwrap_or_else(none);
        Self { weight, bias }
    }

    fn mix(&self, x: CubeTensor<R>, norm: NormWeights<CubeTensor<R>>) -> CubeTensor<R> {
        match x.dtype {
            DType::F32 => self.mix_of::<B, f32>(x, norm),
            DType::F16 => self.mix_of::<B, f16>(x, norm),
            DType::BF16 => self.mix_of::<B, bf16>(x, norm),
            other => unreachable!("{other:?} is no type of a layer"),
        }
    }

    fn gate(
        &self,
        gated: GateInputs<CubeTensor<R>>,
        norm: NormWeights<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        match gated.x.dtype {
            DType::F32 => self.gate_of::<B, f32>(gated, norm),
            DType::F16 => self.gate_of::<B, f16>(gated, norm),
            DType::BF16 => self.gate_of::<B, bf16>(gated, norm),
            other => unreachable!("{other:?} is no type of a layer"),
        }
    }
}

impl<R: CubeRuntime> GpuDense<R> {
    fn mix_of<B: GpuBackend<R>, E: Float + CubeElement>(
        &self,
        x: CubeTensor<R>,
        NormWeights { affine, epsilon }: NormWeights<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        let norm = RowNorm { weights: affine, gate: None, epsilon };
        let normed = norm.forward::<E>(&readable_rows(x));
        silu::<R, E>(&self.product::<B>(normed), None, &self.bias)
    }

    fn gate_of<B: GpuBackend<R>, E: Float + CubeElement>(
        &self,
        GateInputs { x, attended, u }: GateInputs<CubeTensor<R>>,
        NormWeights { affine, epsilon }: NormWeights<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        let gate = Some(RowGate::new(readable_rows(u), None));
        let norm = RowNorm { weights: affine, gate, epsilon };
        let gated = norm.forward::<E>(&readable_rows(attended));
        let bias: Tensor<B, 1> = tensor(self.bias.clone());
        let x: Tensor<B, 2> = tensor(x);
        primitive(x + tensor(self.product::<B>(gated)) + bias.unsqueeze())
    }

    fn product<B: GpuBackend<R>>(&self, x: CubeTensor<R>) -> CubeTensor<R> {
        primitive(tensor::<B, 2>(x).matmul(tensor(self.weight.clone())))
    }
}
