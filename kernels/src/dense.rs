//! The dense parts of an HSTU layer for serving: weights are prepared once, and norm, product and
//! activation are one pass.
//!
//! Two ops surround the attention (paper section 3.1.2): `mix` computes U, Q, V and K, and `gate`
//! the layer's output. Neither has gradients; training uses [`crate::layer`].

use std::fmt::Debug;

use burn::tensor::ops::FloatTensor;

use crate::attention::HstuBackend;
use crate::layer::Affine;

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
