//! The dense parts of an HSTU layer as a server runs them: weights prepared once,
//! norm, product and activation in one pass.
//!
//! Two ops surround the attention (paper section 3.1.2): `mix`, which makes U, Q, V
//! and K, and `gate`, which makes the layer's output. Both are without
//! gradients: training composes them of the backend's own operators.

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use crate::attention::HstuBackend;

/// The weights of a layer norm.
#[derive(Debug, Clone)]
pub struct Norm<T> {
    /// `[width]`.
    pub scale: T,
    /// `[width]`.
    pub shift: T,
    /// Added to the variance.
    pub epsilon: f32,
}

/// What `gate` joins.
#[derive(Debug, Clone)]
pub struct Gated<T> {
    /// `[rows, d]`: the layer's input.
    pub x: T,
    /// `[rows, v]`: what attention gave.
    pub attended: T,
    /// `[rows, v]`: U.
    pub u: T,
}

/// A backend with prepared weights.
pub trait DenseBackend: HstuBackend {
    /// The weights of a linear layer, laid out for this backend's product.
    type Prepared: std::fmt::Debug + Send + Sync + 'static;

    /// Lays out `weight` `[from, to]` and `bias` `[to]`.
    fn prepare(weight: FloatTensor<Self>, bias: Option<FloatTensor<Self>>) -> Self::Prepared;

    /// `SiLU(LN(x) W + b)`: `[rows, from]` to `[rows, to]`.
    ///
    /// # Panics
    /// Where widths do not fit.
    fn mix(
        x: FloatTensor<Self>,
        norm: Norm<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self>;

    /// `x + (LN(attended) ⊙ u) W + b`: `[rows, d]`.
    ///
    /// # Panics
    /// Where widths do not fit.
    fn gate(
        gated: Gated<FloatTensor<Self>>,
        norm: Norm<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self>;
}

/// Weights as they are, for a backend without a kernel of its own here.
#[derive(Debug)]
pub struct Plain<B: HstuBackend> {
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: HstuBackend> Plain<B> {
    /// See [`DenseBackend::prepare`].
    pub fn prepare(weight: FloatTensor<B>, bias: Option<FloatTensor<B>>) -> Self {
        Self { weight: matrix(weight), bias: bias.map(row) }
    }

    /// See [`DenseBackend::mix`].
    pub fn mix(&self, x: FloatTensor<B>, norm: Norm<FloatTensor<B>>) -> FloatTensor<B> {
        silu(self.product(normalise(matrix(x), norm))).into_primitive().tensor()
    }

    /// See [`DenseBackend::gate`].
    pub fn gate(&self, gated: Gated<FloatTensor<B>>, norm: Norm<FloatTensor<B>>) -> FloatTensor<B> {
        let input = normalise::<B>(matrix(gated.attended), norm) * matrix(gated.u);
        (matrix(gated.x) + self.product(input)).into_primitive().tensor()
    }

    fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let product = x.matmul(self.weight.clone());
        match &self.bias {
            Some(bias) => product + bias.clone().unsqueeze(),
            None => product,
        }
    }
}

fn matrix<B: HstuBackend>(tensor: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

fn row<B: HstuBackend>(tensor: FloatTensor<B>) -> Tensor<B, 1> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

fn normalise<B: HstuBackend>(x: Tensor<B, 2>, norm: Norm<FloatTensor<B>>) -> Tensor<B, 2> {
    let (variance, mean) = x.clone().var_mean_bias(1);
    let normed = (x - mean) / (variance + norm.epsilon).sqrt();
    normed * row::<B>(norm.scale).unsqueeze() + row::<B>(norm.shift).unsqueeze()
}

#[cfg(feature = "cuda")]
impl DenseBackend for burn_cuda::Cuda {
    type Prepared = Plain<Self>;

    fn prepare(weight: FloatTensor<Self>, bias: Option<FloatTensor<Self>>) -> Self::Prepared {
        Plain::prepare(weight, bias)
    }

    fn mix(
        x: FloatTensor<Self>,
        norm: Norm<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self> {
        linear.mix(x, norm)
    }

    fn gate(
        gated: Gated<FloatTensor<Self>>,
        norm: Norm<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self> {
        linear.gate(gated, norm)
    }
}
