//! A network of two linear layers as one op: `SiLU(x W + b) W' + b'`.
//!
//! Tokens and heads are made by such networks. The gradients want nothing but
//! the inputs: what is between the layers is computed again.

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use crate::attention::HstuBackend;

/// The weights of a linear layer.
#[derive(Debug, Clone)]
pub struct Weights<M, V = M> {
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
    /// Before the activation.
    pub hidden: Weights<M, V>,
    /// After it.
    pub output: Weights<M, V>,
}

/// The gradients of the inputs.
#[derive(Debug, Clone)]
pub struct MlpGrads<T> {
    /// `[rows, from]`, where it was asked for.
    pub x: Option<T>,
    /// Before the activation.
    pub hidden: Weights<T>,
    /// After it.
    pub output: Weights<T>,
}

/// Which gradients are asked for, besides those of weights.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// That of x.
    pub x: bool,
}

/// A backend's kernels of the op, over its tensors.
#[derive(Debug)]
pub struct FusedMlp<T> {
    /// The op.
    pub forward: fn(MlpInputs<T>) -> T,
    /// Its gradients, given the output's.
    pub backward: fn(MlpInputs<T>, T, Wanted) -> MlpGrads<T>,
}

/// The op on tensors: `[rows, to]`.
///
/// # Panics
/// Where widths do not fit.
pub fn mlp<B: HstuBackend>(inputs: MlpInputs<Tensor<B, 2>, Tensor<B, 1>>) -> Tensor<B, 2> {
    let MlpInputs { x, hidden, output } = inputs;
    let weights = |weights: Weights<Tensor<B, 2>, Tensor<B, 1>>| Weights {
        weight: weights.weight.into_primitive().tensor(),
        bias: weights.bias.into_primitive().tensor(),
    };
    let x = x.into_primitive().tensor();
    matrix(B::mlp(MlpInputs { x, hidden: weights(hidden), output: weights(output) }))
}

/// The op of the backend's own operators.
pub fn composed<B: HstuBackend>(inputs: MlpInputs<FloatTensor<B>>) -> FloatTensor<B> {
    inputs.widths();
    let linear = |x: Tensor<B, 2>, weights: Weights<FloatTensor<B>>| {
        let bias = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(weights.bias));
        x.matmul(matrix(weights.weight)) + bias.unsqueeze()
    };
    let hidden = silu(linear(matrix(inputs.x), inputs.hidden));
    linear(hidden, inputs.output).into_primitive().tensor()
}

fn matrix<B: HstuBackend>(tensor: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// The sizes of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpWidths {
    /// Of the batch.
    pub rows: usize,
    /// Of x.
    pub from: usize,
    /// Between the layers.
    pub hidden: usize,
    /// Of the output.
    pub to: usize,
}

impl<T: TensorMetadata> MlpInputs<T> {
    /// The sizes of tensors that must fit.
    ///
    /// # Panics
    /// If they do not.
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

    /// `f` of each input.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> MlpInputs<U> {
        MlpInputs { x: f(self.x), hidden: self.hidden.map(&mut f), output: self.output.map(&mut f) }
    }

    /// In the order of the fields.
    pub(crate) fn all(self) -> [T; 5] {
        let Self { x, hidden, output } = self;
        [x, hidden.weight, hidden.bias, output.weight, output.bias]
    }
}

impl<T> MlpGrads<T> {
    /// In the order of the inputs' fields.
    pub(crate) fn into_array(self) -> [Option<T>; 5] {
        let Self { x, hidden, output } = self;
        let [a, b, c, d] = [hidden.weight, hidden.bias, output.weight, output.bias].map(Some);
        [x, a, b, c, d]
    }
}

impl<T> Weights<T> {
    /// The weights, borrowed.
    pub fn as_ref(&self) -> Weights<&T> {
        Weights { weight: &self.weight, bias: &self.bias }
    }

    /// `f` of each.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Weights<U> {
        Weights { weight: f(self.weight), bias: f(self.bias) }
    }
}
