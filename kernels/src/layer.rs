//! A whole HSTU layer as one op (paper section 3.1.2), for training.
//!
//! ```text
//! U, Q, V, K = split(SiLU(LN(x) W + b))
//! A = attention(Q, K, V)
//! y = x + dropout(LN(A) ⊙ U) W_o
//! ```
//!
//! If only targets attend, as in the last layer, history tokens need only V and K, and `y` has only
//! the targets' rows. A backend without fused kernels composes the layer from its own ops
//! ([`composed`]), with the same results.

use std::sync::Arc;

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorData, TensorMetadata};

use crate::attention::{HstuAttention, HstuBackend, HstuInputs, hstu_attention, primitive, tensor};

/// The weights of a layer norm.
#[derive(Debug, Clone, Copy)]
pub struct Affine<T> {
    /// `[width]`.
    pub scale: T,
    /// `[width]`.
    pub shift: T,
}

/// The inputs of a layer, or their gradients. v and qk are widths over all heads.
#[derive(Debug, Clone)]
pub struct LayerInputs<M, V = M> {
    /// `[H + R, d]`.
    pub x: M,
    /// `[d]`: the norm before the first product.
    pub norm_in: Affine<V>,
    /// W `[d, 2 v + 2 qk]`, the columns of U, Q, V, K.
    pub uvqk: M,
    /// b `[2 v + 2 qk]`.
    pub bias: V,
    /// As [`HstuInputs::position`].
    pub position: Option<V>,
    /// As [`HstuInputs::time`].
    pub time: Option<V>,
    /// `[v]`: the norm of the output of attention.
    pub norm_out: Affine<V>,
    /// W_o `[v, d]`.
    pub output: M,
}

/// The settings of a layer besides its tensors.
#[derive(Debug, Clone)]
pub struct LayerOptions {
    /// The batch's layout; with `targets_only`, the layer's output has only the targets' rows.
    pub attention: Arc<HstuAttention>,
    /// Added to the variances of both norms.
    pub epsilon: f32,
    /// None outside training.
    pub dropout: Option<SeededDropout>,
}

/// Dropout whose mask is a function of a seed, the output's row and the column, so that equal seeds
/// give equal masks on any backend and in any order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SeededDropout {
    seed: u64,
    /// The rate, in units of 2^-32.
    pub(crate) dropped: u32,
    /// The factor of the values that are not dropped.
    pub(crate) scale: f32,
}

/// The mask of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropoutRow {
    low: u32,
    high: u32,
    dropout: SeededDropout,
}

impl SeededDropout {
    /// `None` at a `rate` of 0.
    ///
    /// # Panics
    /// If `rate` is not in `[0, 1)`.
    pub fn new(rate: f64, seed: u64) -> Option<Self> {
        assert!(
            (0.0..1.0).contains(&rate),
            "a dropout rate of {rate}; it must be at least 0 and below 1"
        );
        let dropped = (rate * 2f64.powi(32)) as u32;
        (rate > 0.0).then(|| Self { seed, dropped, scale: (1.0 / (1.0 - rate)) as f32 })
    }

    /// `[rows * columns]`: 0 where a value is dropped, else the scale.
    pub fn mask(self, [rows, columns]: [usize; 2]) -> Vec<f32> {
        let row = |row| {
            let row = self.row(row);
            (0..columns).map(move |column| row.factor(column))
        };
        (0..rows).flat_map(row).collect()
    }

    /// `[rows * 2]`: what the masks of so many rows are made of.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub(crate) fn keys(self, rows: usize) -> Vec<u32> {
        (0..rows).map(|row| self.row(row)).flat_map(|row| [row.low, row.high]).collect()
    }

    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> DropoutRow {
        // SplitMix64's finaliser.
        let mut key = self.seed.wrapping_add((row as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        key = (key ^ (key >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        key = (key ^ (key >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        key ^= key >> 31;
        DropoutRow { low: key as u32, high: (key >> 32) as u32, dropout: self }
    }
}

impl DropoutRow {
    /// The factor of a column: 0 or the scale. 32-bit arithmetic, so that loops vectorise.
    #[inline(always)]
    pub(crate) fn factor(self, column: usize) -> f32 {
        let mut bits = self.low.wrapping_add((column as u32).wrapping_mul(0x9E37_79B9));
        bits = (bits ^ (bits >> 16)).wrapping_mul(0x7FEB_352D);
        bits = (bits ^ (bits >> 15) ^ self.high).wrapping_mul(0x846C_A68B);
        bits ^= bits >> 16;
        if bits < self.dropout.dropped { 0.0 } else { self.dropout.scale }
    }
}

/// The output of a forward pass, and what its backward pass needs.
#[derive(Debug)]
pub struct LayerOutput<T> {
    /// `[H + R, d]`, or `[R, d]` if only targets attend.
    pub out: T,
    /// The output of attention, with the same rows: `[.., v]`.
    pub attended: T,
}

/// A backend's fused kernels for a layer.
#[derive(Debug)]
pub struct FusedLayer<T> {
    /// The forward pass.
    pub forward: fn(LayerInputs<T>, &LayerOptions) -> LayerOutput<T>,
    /// The gradients of the inputs, given the gradient of `out` and the output of attention.
    pub backward: fn(LayerInputs<T>, LayerOutput<T>, &LayerOptions) -> LayerInputs<T>,
}

/// A layer on tensors: `[H + R, d]`, or `[R, d]` if only targets attend.
///
/// # Panics
/// If the options and the inputs contradict each other.
pub fn hstu_layer<B: HstuBackend>(
    inputs: LayerInputs<Tensor<B, 2>, Tensor<B, 1>>,
    options: &LayerOptions,
) -> Tensor<B, 2> {
    tensor(B::hstu_layer(inputs.map(primitive, primitive), options))
}

/// The layer, composed of the backend's own ops and its attention.
///
/// # Panics
/// As [`hstu_layer`], and without an output row.
pub fn composed<B: HstuBackend>(
    inputs: LayerInputs<FloatTensor<B>>,
    options: &LayerOptions,
) -> FloatTensor<B> {
    let widths = inputs.widths(options);
    let LayerInputs { x, norm_in, uvqk, bias, position, time, norm_out, output } =
        inputs.map(tensor::<B, 2>, tensor::<B, 1>);
    let (v, qk, history) = (widths.v, widths.qk, options.attention.history_rows());
    let first = if options.attention.targets_only { history } else { 0 };
    let rows = widths.rows - first;
    let normed = normalise(x.clone(), norm_in, options.epsilon);
    let own = silu(normed.clone().narrow(0, first, rows).matmul(uvqk.clone()) + row(bias.clone()));
    let columns = |from: usize, width: usize| own.clone().narrow(1, from, width);
    let (mut queries, mut values, mut keys) =
        (columns(v, qk), columns(v + qk, v), columns(2 * v + qk, qk));
    if first > 0 {
        // Other tokens see only V and K of history tokens, which are the last columns.
        let seen = normed.narrow(0, 0, first).matmul(uvqk.narrow(1, v + qk, v + qk));
        let past = silu(seen + row(bias.narrow(0, v + qk, v + qk)));
        let joint = |past, own| Tensor::cat(vec![past, own], 0);
        queries = joint(Tensor::zeros([first, qk], &x.device()), queries);
        values = joint(past.clone().narrow(1, 0, v), values);
        keys = joint(past.narrow(1, v, qk), keys);
    }
    let inputs = HstuInputs { q: queries, k: keys, v: values, position, time };
    let attended = hstu_attention(inputs, &options.attention).narrow(0, first, rows);
    let mut gate = columns(0, v);
    if let Some(dropout) = options.dropout {
        // Dropout of U equals dropout of the product.
        let mask = TensorData::new(dropout.mask([rows, v]), [rows, v]);
        gate = gate * Tensor::from_data(mask, &x.device());
    }
    let gated = normalise(attended, norm_out, options.epsilon) * gate;
    primitive(x.narrow(0, first, rows) + gated.matmul(output))
}

fn normalise<B: HstuBackend>(
    x: Tensor<B, 2>,
    weights: Affine<Tensor<B, 1>>,
    epsilon: f32,
) -> Tensor<B, 2> {
    let (variance, mean) = x.clone().var_mean_bias(1);
    (x - mean) / (variance + epsilon).sqrt() * row(weights.scale) + row(weights.shift)
}

fn row<B: HstuBackend>(table: Tensor<B, 1>) -> Tensor<B, 2> {
    table.unsqueeze()
}

/// The sizes of a layer; v and qk are over all heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HstuLayerWidths {
    /// H + R, the number of tokens.
    pub rows: usize,
    /// d, the width of x.
    pub dim: usize,
    /// Columns of U and of V.
    pub v: usize,
    /// Columns of Q and of K.
    pub qk: usize,
}

impl<T: TensorMetadata> LayerInputs<T> {
    /// The sizes of the inputs.
    ///
    /// # Panics
    /// If the inputs do not match each other or the layout.
    pub(crate) fn widths(&self, options: &LayerOptions) -> HstuLayerWidths {
        let [rows, dim] = self.x.shape().dims::<2>();
        let [v, out] = self.output.shape().dims::<2>();
        let [from, columns] = self.uvqk.shape().dims::<2>();
        assert_eq!((from, out), (dim, dim), "HSTU layer: W and W_o are of x's width");
        assert!(
            columns > 2 * v && columns.is_multiple_of(2),
            "HSTU layer: W has {columns} columns"
        );
        let qk = columns / 2 - v;
        let heads = options.attention.heads;
        assert!(v.is_multiple_of(heads) && qk.is_multiple_of(heads), "HSTU layer: {heads} heads");
        assert_eq!(rows, options.attention.rows(), "HSTU layer: rows of the layout");
        let tables = [
            (&self.norm_in.scale, dim),
            (&self.norm_in.shift, dim),
            (&self.bias, columns),
            (&self.norm_out.scale, v),
            (&self.norm_out.shift, v),
        ];
        for (table, width) in tables {
            assert_eq!(table.shape()[..], [width], "HSTU layer: a weight's width");
        }
        HstuLayerWidths { rows, dim, v, qk }
    }
}

impl<M, V> LayerInputs<M, V> {
    /// The same inputs, by reference.
    pub fn as_ref(&self) -> LayerInputs<&M, &V> {
        LayerInputs {
            x: &self.x,
            norm_in: self.norm_in.as_ref(),
            uvqk: &self.uvqk,
            bias: &self.bias,
            position: self.position.as_ref(),
            time: self.time.as_ref(),
            norm_out: self.norm_out.as_ref(),
            output: &self.output,
        }
    }

    /// Applies `matrix` to each matrix and `table` to each vector.
    pub fn map<N, W>(
        self,
        mut matrix: impl FnMut(M) -> N,
        mut table: impl FnMut(V) -> W,
    ) -> LayerInputs<N, W> {
        LayerInputs {
            x: matrix(self.x),
            norm_in: self.norm_in.map(&mut table),
            uvqk: matrix(self.uvqk),
            bias: table(self.bias),
            position: self.position.map(&mut table),
            time: self.time.map(&mut table),
            norm_out: self.norm_out.map(&mut table),
            output: matrix(self.output),
        }
    }
}

impl<T> LayerInputs<T> {
    /// Applies `f` to each input.
    pub fn map_all<U>(self, f: impl FnMut(T) -> U) -> LayerInputs<U> {
        let f = std::cell::RefCell::new(f);
        self.map(|matrix| f.borrow_mut()(matrix), |table| f.borrow_mut()(table))
    }

    /// The inputs in the order of the fields; `None` for an absent table.
    pub(crate) fn into_array(self) -> [Option<T>; 10] {
        let Self { x, norm_in, uvqk, bias, position, time, norm_out, output } = self;
        [
            Some(x),
            Some(norm_in.scale),
            Some(norm_in.shift),
            Some(uvqk),
            Some(bias),
            position,
            time,
            Some(norm_out.scale),
            Some(norm_out.shift),
            Some(output),
        ]
    }
}

impl<T> Affine<T> {
    /// The same weights, by reference.
    pub fn as_ref(&self) -> Affine<&T> {
        Affine { scale: &self.scale, shift: &self.shift }
    }

    /// Applies `f` to both vectors.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Affine<U> {
        Affine { scale: f(self.scale), shift: f(self.shift) }
    }
}
