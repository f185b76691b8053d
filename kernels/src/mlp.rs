//! A network of two linear layers as one op: `SiLU(x W + b) W' + b'`.
//!
//! Token embeddings and prediction heads are such networks. The backward needs only the inputs and
//! computes the hidden layer again.

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use crate::attention::HstuBackend;

/// The weights of a linear layer.
#[derive(Debug, Clone)]
pub struct LinearWeights<M, V = M> {
    /// `[from, to]`.
    pub weight: M,
    /// `[to]`.
    pub bias: V,
}

/// The inputs of the op.
#[derive(Debug, Clone)]
pub struct MlpInputs<M, V = M> {
    /// `[rows, from]`.
    pub x: M,
    /// The layer before the activation.
    pub hidden: LinearWeights<M, V>,
    /// The layer after the activation.
    pub output: LinearWeights<M, V>,
}

/// The gradients of the inputs.
#[derive(Debug, Clone)]
pub struct MlpGrads<T> {
    /// `[rows, from]`, if it was requested.
    pub x: Option<T>,
    /// The layer before the activation.
    pub hidden: LinearWeights<T>,
    /// The layer after the activation.
    pub output: LinearWeights<T>,
}

/// The gradients to compute besides those of the weights.
#[derive(Debug, Clone, Copy)]
pub struct MlpGradsWanted {
    /// The gradient of x.
    pub x: bool,
}

/// A backend's fused kernels for the op.
#[derive(Debug)]
pub struct FusedMlp<T> {
    /// The forward pass.
    pub forward: fn(MlpInputs<T>) -> T,
    /// The gradients of the inputs, given the gradient of the output.
    pub backward: fn(MlpInputs<T>, T, MlpGradsWanted) -> MlpGrads<T>,
}

/// The op on tensors: `[rows, to]`.
///
/// # Panics
/// If widths do not match.
pub fn mlp<B: HstuBackend>(inputs: MlpInputs<Tensor<B, 2>, Tensor<B, 1>>) -> Tensor<B, 2> {
    let MlpInputs { x, hidden, output } = inputs;
    let weights = |weights: LinearWeights<Tensor<B, 2>, Tensor<B, 1>>| LinearWeights {
        weight: weights.weight.into_primitive().tensor(),
        bias: weights.bias.into_primitive().tensor(),
    };
    let x = x.into_primitive().tensor();
    matrix(B::mlp(MlpInputs { x, hidden: weights(hidden), output: weights(output) }))
}

/// The op, composed of the backend's own ops.
pub fn composed<B: HstuBackend>(inputs: MlpInputs<FloatTensor<B>>) -> FloatTensor<B> {
    inputs.widths();
    let linear = |x: Tensor<B, 2>, weights: LinearWeights<FloatTensor<B>>| {
        let bias = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(weights.bias));
        x.matmul(matrix(weights.weight)) + bias.unsqueeze()
    };
    let hidden = silu(linear(matrix(inputs.x), inputs.hidden));
    linear(hidden, inputs.output).into_primitive().tensor()
}

fn matrix<B: HstuBackend>(tensor: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// The sizes of a two-layer network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpWidths {
    /// Rows of x and of the output.
    pub rows: usize,
    /// Width of x.
    pub from: usize,
    /// Width between the layers.
    pub hidden: usize,
    /// Width of the output.
    pub to: usize,
}

impl<T: TensorMetadata> MlpInputs<T> {
    /// The sizes of the inputs.
    ///
    /// # Panics
    /// If the inputs do not match each other.
    pub(crate) fn widths(&self) -> MlpWidths {
        let [rows, from] = self.x.shape().dims::<2>();
        let [into, hidden] = self.hidden.weight.shape().dims::<2>();
        let [between, to] = self.output.weight.shape().dims::<2>();
        assert_eq!((into, between), (from, hidden), "MLP: W is of x's width, W' of W's");
        assert_eq!(self.hidden.bias.shape()[..], [hidden], "MLP: b");
        assert_eq!(self.output.bias.shape()[..], [to], "MLP: b'");
        MlpWidths { rows, from, hidden, to }
    }
}

impl<T> MlpInputs<T> {
    /// The inputs, borrowed.
    pub fn as_ref(&self) -> MlpInputs<&T> {
        MlpInputs { x: &self.x, hidden: self.hidden.as_ref(), output: self.output.as_ref() }
    }

    /// Applies `f` to each input.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> MlpInputs<U> {
        MlpInputs { x: f(self.x), hidden: self.hidden.map(&mut f), output: self.output.map(&mut f) }
    }

    /// The inputs in the order of the fields.
    pub(crate) fn into_array(self) -> [T; 5] {
        let Self { x, hidden, output } = self;
        [x, hidden.weight, hidden.bias, output.weight, output.bias]
    }
}

impl<T> MlpGrads<T> {
    /// The gradients in the order of the inputs' fields.
    pub(crate) fn into_array(self) -> [Option<T>; 5] {
        let Self { x, hidden, output } = self;
        let [a, b, c, d] = [hidden.weight, hidden.bias, output.weight, output.bias].map(Some);
        [x, a, b, c, d]
    }
}

impl<T> LinearWeights<T> {
    /// The weights, borrowed.
    pub fn as_ref(&self) -> LinearWeights<&T> {
        LinearWeights { weight: &self.weight, bias: &self.bias }
    }

    /// Applies `f` to both tensors.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> LinearWeights<U> {
        LinearWeights { weight: f(self.weight), bias: f(self.bias) }
    }
}
