//! The dense parts of an HSTU layer for serving: weights are prepared once, and norm, product and
//! activation are one pass.
//!
//! Two ops surround the attention (paper section 3.1.2): `mix` computes U, Q, V and K, and `gate`
//! the layer's output. Neither has gradients; training uses [`crate::layer`].

use std::fmt::Debug;

use burn::tensor::Tensor;
use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;

use crate::attention::{HstuBackend, primitive, tensor};
use crate::layer::{Affine, normalise};

/// A layer norm: its weights `[width]`, and what is added to the variance.
#[derive(Debug, Clone)]
pub struct NormWeights<T> {
    /// The scale and the shift.
    pub affine: Affine<T>,
    /// Added to the variance.
    pub epsilon: f32,
}

/// The inputs of [`PreparedLinear::gate`].
#[derive(Debug, Clone)]
pub struct GateInputs<T> {
    /// `[rows, d]`: the layer's input.
    pub x: T,
    /// `[rows, v]`: the output of attention.
    pub attended: T,
    /// `[rows, v]`: U.
    pub u: T,
}

/// The weights of a linear layer in a backend's prepared form.
pub trait PreparedLinear<B: HstuBackend>: Debug + Send + Sync + 'static {
    /// Lays out `weight` `[from, to]` and `bias` `[to]`.
    fn prepare(weight: FloatTensor<B>, bias: Option<FloatTensor<B>>) -> Self;

    /// `SiLU(LN(x) W + b)`: `[rows, from]` to `[rows, to]`.
    ///
    /// # Panics
    /// If widths do not match.
    fn mix(&self, x: FloatTensor<B>, norm: NormWeights<FloatTensor<B>>) -> FloatTensor<B>;

    /// `x + (LN(attended) ⊙ u) W + b`: `[rows, d]`.
    ///
    /// # Panics
    /// If widths do not match.
    fn gate(
        &self,
        gated: GateInputs<FloatTensor<B>>,
        norm: NormWeights<FloatTensor<B>>,
    ) -> FloatTensor<B>;
}

/// Unprepared weights and primitive ops, for a backend without kernels of its own.
#[derive(Debug)]
pub struct PlainDense<B: HstuBackend> {
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: HstuBackend> PreparedLinear<B> for PlainDense<B> {
    fn prepare(weight: FloatTensor<B>, bias: Option<FloatTensor<B>>) -> Self {
        Self { weight: tensor(weight), bias: bias.map(tensor) }
    }

    fn mix(&self, x: FloatTensor<B>, norm: NormWeights<FloatTensor<B>>) -> FloatTensor<B> {
        primitive(silu(self.product(normed(x, norm))))
    }

    fn gate(
        &self,
        gated: GateInputs<FloatTensor<B>>,
        norm: NormWeights<FloatTensor<B>>,
    ) -> FloatTensor<B> {
        let input = normed::<B>(gated.attended, norm) * tensor(gated.u);
        primitive(tensor::<B, 2>(gated.x) + self.product(input))
    }
}

impl<B: HstuBackend> PlainDense<B> {
    fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let product = x.matmul(self.weight.clone());
        match &self.bias {
            Some(bias) => product + bias.clone().unsqueeze(),
            None => product,
        }
    }
}

fn normed<B: HstuBackend>(x: FloatTensor<B>, norm: NormWeights<FloatTensor<B>>) -> Tensor<B, 2> {
    normalise(tensor(x), norm.affine.map(tensor), norm.epsilon)
}
