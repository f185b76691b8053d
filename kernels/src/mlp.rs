//! A network of two linear layers as one op: `SiLU(x W + b) W' + b'`.
//!
//! Token embeddings and prediction heads are such networks. The backward needs only the inputs and
//! computes the hidden layer again.

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata};

use crate::attention::{HstuBackend, primitive, tensor};

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

/// A backend's fused kernels for the op.
#[derive(Debug)]
pub struct FusedMlp<T> {
    /// The forward pass.
    pub forward: fn(MlpInputs<T>) -> T,
    /// The gradients of the inputs, given the gradient of the output; that of x only if the last
    /// argument asks for it.
    pub backward: fn(MlpInputs<T>, T, bool) -> MlpGrads<T>,
}

/// The op on tensors: `[rows, to]`.
///
/// # Panics
/// If widths do not match.
pub fn mlp<B: HstuBackend>(inputs: MlpInputs<Tensor<B, 2>, Tensor<B, 1>>) -> Tensor<B, 2> {
    tensor(B::mlp(inputs.map(primitive, primitive)))
}

/// The op, composed of the backend's own ops.
pub fn composed<B: HstuBackend>(inputs: MlpInputs<FloatTensor<B>>) -> FloatTensor<B> {
    inputs.widths();
    let MlpInputs { x, hidden, output } = inputs.map(tensor::<B, 2>, tensor::<B, 1>);
    let linear = |x: Tensor<B, 2>, weights: LinearWeights<Tensor<B, 2>, Tensor<B, 1>>| {
        x.matmul(weights.weight) + weights.bias.unsqueeze()
    };
    primitive(linear(silu(linear(x, hidden)), output))
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

impl<M, V> MlpInputs<M, V> {
    /// Applies `matrix` to each matrix and `table` to each vector.
    pub(crate) fn map<N, W>(
        self,
        matrix: impl Fn(M) -> N,
        table: impl Fn(V) -> W,
    ) -> MlpInputs<N, W> {
        let weights = |of: LinearWeights<M, V>| LinearWeights {
            weight: matrix(of.weight),
            bias: table(of.bias),
        };
        MlpInputs { x: matrix(self.x), hidden: weights(self.hidden), output: weights(self.output) }
    }
}

impl<T> MlpInputs<T> {
    /// The same inputs, by reference.
    pub(crate) fn as_ref(&self) -> MlpInputs<&T> {
        let Self { x, hidden, output } = self;
        MlpInputs {
            x,
            hidden: LinearWeights { weight: &hidden.weight, bias: &hidden.bias },
            output: LinearWeights { weight: &output.weight, bias: &output.bias },
        }
    }

    /// Applies `f` to each input.
    pub(crate) fn map_all<U>(self, f: impl FnMut(T) -> U) -> MlpInputs<U> {
        let f = std::cell::RefCell::new(f);
        self.map(|matrix| f.borrow_mut()(matrix), |table| f.borrow_mut()(table))
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
