//! The dense parts of an HSTU layer for serving: weights are prepared once, and norm, product and
//! activation are one pass.
//!
//! Two ops surround the attention (paper section 3.1.2): `mix` computes U, Q, V and K, and `gate`
//! the layer's output. Neither has gradients; training uses [`crate::layer`].

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use crate::attention::HstuBackend;

/// The weights of a layer norm.
#[derive(Debug, Clone)]
pub struct NormWeights<T> {
    /// `[width]`.
    pub scale: T,
    /// `[width]`.
    pub shift: T,
    /// Added to the variance.
    pub epsilon: f32,
}

/// The inputs of [`DenseBackend::gate`].
#[derive(Debug, Clone)]
pub struct GateInputs<T> {
    /// `[rows, d]`: the layer's input.
    pub x: T,
    /// `[rows, v]`: the output of attention.
    pub attended: T,
    /// `[rows, v]`: U.
    pub u: T,
}

/// A backend with a prepared form of linear weights.
pub trait DenseBackend: HstuBackend {
    /// The weights of a linear layer, laid out for this backend's product.
    type Prepared: std::fmt::Debug + Send + Sync + 'static;

    /// Lays out `weight` `[from, to]` and `bias` `[to]`.
    fn prepare(weight: FloatTensor<Self>, bias: Option<FloatTensor<Self>>) -> Self::Prepared;

    /// `SiLU(LN(x) W + b)`: `[rows, from]` to `[rows, to]`.
    ///
    /// # Panics
    /// If widths do not match.
    fn mix(
        x: FloatTensor<Self>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self>;

    /// `x + (LN(attended) ⊙ u) W + b`: `[rows, d]`.
    ///
    /// # Panics
    /// If widths do not match.
    fn gate(
        gated: GateInputs<FloatTensor<Self>>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self>;
}

/// Unprepared weights and primitive ops, for a backend without kernels of its own.
#[derive(Debug)]
pub struct PlainDense<B: HstuBackend> {
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: HstuBackend> PlainDense<B> {
    /// On this device as [`DenseBackend::prepare`] says.
    pub fn prepare(weight: FloatTensor<B>, bias: Option<FloatTensor<B>>) -> Self {
        Self { weight: matrix(weight), bias: bias.map(row) }
    }

    /// On this device as [`DenseBackend::mix`] says.
    pub fn mix(&self, x: FloatTensor<B>, norm: NormWeights<FloatTensor<B>>) -> FloatTensor<B> {
        silu(self.product(normalise(matrix(x), norm))).into_primitive().tensor()
    }

    /// On this device as [`DenseBackend::gate`] says.
    pub fn gate(
        &self,
        gated: GateInputs<FloatTensor<B>>,
        norm: NormWeights<FloatTensor<B>>,
    ) -> FloatTensor<B> {
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

fn normalise<B: HstuBackend>(x: Tensor<B, 2>, norm: NormWeights<FloatTensor<B>>) -> Tensor<B, 2> {
    let (variance, mean) = x.clone().var_mean_bias(1);
    let normed = (x - mean) / (variance + norm.epsilon).sqrt();
    normed * row::<B>(norm.scale).unsqueeze() + row::<B>(norm.shift).unsqueeze()
}

#[cfg(feature = "cuda")]
impl DenseBackend for burn_cuda::Cuda {
    type Prepared = PlainDense<Self>;

    fn prepare(weight: FloatTensor<Self>, bias: Option<FloatTensor<Self>>) -> Self::Prepared {
        PlainDense::prepare(weight, bias)
    }

    fn mix(
        x: FloatTensor<Self>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self> {
        linear.mix(x, norm)
    }

    fn gate(
        gated: GateInputs<FloatTensor<Self>>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Self::Prepared,
    ) -> FloatTensor<Self> {
        linear.gate(gated, norm)
    }
}
