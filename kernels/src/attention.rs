//! HSTU attention: the jagged layout, its options and the op's trait.
//!
//! A batch's tokens are one block of all histories followed by one block of
//! all targets: rows `[0, H)` are the history tokens of request 0, then of
//! request 1, and so on; rows `[H, H + R)` the targets likewise. Per request
//! and head, with α the scale, `rab` the learned biases and `norm` the
//! normaliser (paper section 3.1.2):
//!
//! ```text
//! A_ij  = SiLU(α q_i·k_j + rab_ij) / norm   where i sees j, else 0
//! out_i = Σ_j A_ij v_j
//! ```
//!
//! History token i sees history j <= i. A target sees the history of its
//! request and itself, never another target, and no history token sees a
//! target. How this is computed is left to the backends.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use crate::embedding_bag::{self, EmbeddingBags};
use crate::layer::{self, FusedLayer, LayerInputs, LayerOptions};
use crate::mlp::{self, FusedMlp, MlpInputs};
pub use crate::oracle;
use crate::pairs::{self, PairInputs, PairSum};

/// A layout that contradicts itself, or tensors that do not match it.
#[derive(Debug, thiserror::Error)]
#[error("HSTU attention: `{field}` {problem}")]
pub struct Error {
    /// The field or input at fault.
    pub field: &'static str,
    /// What is wrong with the field.
    pub problem: String,
}

/// Sparse attention: a token at position i sees position j only if
/// `i - j < recent` or `j < global` (Longformer's window with a global prefix).
/// Targets are at position n and always see themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionWindow {
    /// The number of recent tokens that are seen, including the token itself; at least 1.
    pub recent: usize,
    /// The number of oldest tokens that every token sees.
    pub global: usize,
}

/// The layout of a jagged batch of B requests and the options of the op.
#[derive(Debug, Clone, PartialEq)]
pub struct HstuAttention {
    /// `[B + 1]`, from 0: request b's history is rows `offsets[b]..offsets[b + 1]`.
    pub history_offsets: Arc<[u32]>,
    /// `[B + 1]`, from 0, relative to the target block, which begins at row H.
    pub target_offsets: Arc<[u32]>,
    /// The number of heads in the columns, head-major.
    pub heads: usize,
    /// α: the scale of `q·k`.
    pub alpha: f32,
    /// The divisor of the attention weights. It is a constant of the model (its longest history),
    /// so that passes over a part of a request agree with passes over the whole.
    pub norm: f32,
    /// Sparse attention, or none.
    pub window: Option<AttentionWindow>,
    /// Whether only targets attend; the outputs of history tokens are then zero. For a model's last
    /// layer, whose history outputs are unused.
    pub targets_only: bool,
    /// `[H + R]`: when each token happened, in seconds. The time bias needs it.
    pub times_s: Option<Arc<[i64]>>,
}

/// The five inputs of the op, or their five gradients.
///
/// `q` and `k` are `[H + R, heads * qk_dim]`, `v` is `[H + R, heads * v_dim]`.
#[derive(Debug, Clone)]
pub struct HstuInputs<T, Table = T> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// `[P]`: a bias by distance, shared by the heads. History token i is at position i, a
    /// target at position n (0 from itself); distances from P - 1 up share the last entry.
    pub position: Option<Table>,
    /// `[T]`: a bias by [`time_bucket`] of the seconds between two tokens, shared by the heads.
    pub time: Option<Table>,
}

/// A backend that computes HSTU attention and its gradients.
pub trait HstuBackend: Backend {
    /// The op: `[H + R, heads * v_dim]`.
    ///
    /// # Panics
    /// If `shape` and the inputs contradict each other, which `HstuAttention::check` reports as an
    /// error.
    fn hstu_attention(
        inputs: HstuInputs<FloatTensor<Self>>,
        shape: Arc<HstuAttention>,
    ) -> FloatTensor<Self>;

    /// The gradients of the inputs, given the gradient of the output `[H + R, heads * v_dim]`.
    fn hstu_attention_backward(
        inputs: HstuInputs<FloatTensor<Self>>,
        grad: FloatTensor<Self>,
        shape: Arc<HstuAttention>,
    ) -> HstuInputs<FloatTensor<Self>>;

    /// Sums over the pairs of rows of each segment: `[rows, 1]`. No intermediate value has an
    /// element a pair, in the backward pass neither.
    ///
    /// # Panics
    /// As [`PairSum::forward`].
    fn pair_sum(inputs: PairInputs<FloatTensor<Self>>, pairs: Arc<PairSum>) -> FloatTensor<Self> {
        pairs::forward::<Self>(inputs, &pairs)
    }

    /// The means of bags of a table's rows, `[bags, dim]`; on the host, unless the backend has a
    /// kernel.
    fn embedding_bag(table: FloatTensor<Self>, bags: Arc<EmbeddingBags>) -> FloatTensor<Self> {
        embedding_bag::forward::<Self>(table, &bags)
    }

    /// The gradient of the table `[rows, dim]`, given that of the means.
    fn embedding_bag_backward(grad: FloatTensor<Self>, bags: &EmbeddingBags) -> FloatTensor<Self> {
        embedding_bag::backward::<Self>(grad, bags)
    }

    /// Fused kernels for the whole layer around the op, if the backend has them.
    const FUSED_LAYER: Option<FusedLayer<FloatTensor<Self>>> = None;

    /// The whole layer: `[H + R, d]`, or `[R, d]` where the attention is of targets only.
    ///
    /// # Panics
    /// If the options and the inputs contradict each other.
    fn hstu_layer(
        inputs: LayerInputs<FloatTensor<Self>>,
        options: &LayerOptions,
    ) -> FloatTensor<Self> {
        match Self::FUSED_LAYER {
            Some(layer) => (layer.forward)(inputs, options).out,
            None => layer::composed::<Self>(inputs, options),
        }
    }

    /// Fused kernels for a network of two linear layers, if the backend has them.
    const FUSED_MLP: Option<FusedMlp<FloatTensor<Self>>> = None;

    /// A network of two linear layers: `[rows, from]` to `[rows, to]`.
    ///
    /// # Panics
    /// If widths do not match.
    fn mlp(inputs: MlpInputs<FloatTensor<Self>>) -> FloatTensor<Self> {
        match Self::FUSED_MLP {
            Some(mlp) => (mlp.forward)(inputs),
            None => mlp::composed::<Self>(inputs),
        }
    }
}

/// HSTU attention on tensors: `[H + R, heads * v_dim]`.
///
/// # Panics
/// If `shape` and the inputs contradict each other, which `HstuAttention::check` reports as an
/// error.
pub fn hstu_attention<B: HstuBackend>(
    inputs: HstuInputs<Tensor<B, 2>, Tensor<B, 1>>,
    shape: &Arc<HstuAttention>,
) -> Tensor<B, 2> {
    tensor(B::hstu_attention(inputs.into_primitives(), shape.clone()))
}

/// The tensor of a backend's primitive.
pub fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// The backend's primitive of a tensor.
pub fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

/// The bucket of a time bias for two tokens `distance_s` seconds apart:
/// `floor(log2(max(1, distance_s)))`, at most `buckets - 1`.
#[inline(always)]
pub fn time_bucket(distance_s: u64, buckets: usize) -> usize {
    (63 - (distance_s | 1).leading_zeros() as usize).min(buckets - 1)
}

/// The sizes of an op's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// H + R, the number of tokens.
    pub rows: usize,
    /// Columns of q and k per head.
    pub qk: usize,
    /// Columns of v per head.
    pub v: usize,
}

/// The rows of one request of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRows {
    /// The rows of its history tokens.
    pub history: Range<usize>,
    /// The rows of its targets.
    pub targets: Range<usize>,
}

impl HstuAttention {
    /// The number of requests in the batch.
    pub fn requests(&self) -> usize {
        self.history_offsets.len() - 1
    }

    /// H, the rows of the history block.
    pub fn history_rows(&self) -> usize {
        self.history_offsets.last().map_or(0, |&rows| rows as usize)
    }

    /// H + R, the number of tokens.
    pub fn rows(&self) -> usize {
        self.history_rows() + self.target_offsets.last().map_or(0, |&rows| rows as usize)
    }

    /// The rows of request `b`.
    pub fn request(&self, b: usize) -> RequestRows {
        let (h, t, base) = (&self.history_offsets, &self.target_offsets, self.history_rows());
        RequestRows {
            history: h[b] as usize..h[b + 1] as usize,
            targets: base + t[b] as usize..base + t[b + 1] as usize,
        }
    }

    /// Whether a token at `position` sees the history token at `key <= position`.
    pub fn sees(&self, position: usize, key: usize) -> bool {
        self.window.is_none_or(|w| position - key < w.recent || key < w.global)
    }

    /// Returns the layout, ready for the op, if [`HstuAttention::validate`] accepts it.
    pub fn checked(self) -> Result<Arc<Self>, Error> {
        self.validate()?;
        Ok(Arc::new(self))
    }

    /// Checks that the layout does not contradict itself.
    pub fn validate(&self) -> Result<(), Error> {
        check_offsets("history_offsets", &self.history_offsets)?;
        check_offsets("target_offsets", &self.target_offsets)?;
        let (history, targets) = (self.history_offsets.len(), self.target_offsets.len());
        if history != targets {
            let problem = format!("has {targets} entries, history_offsets has {history}");
            return fault("target_offsets", problem);
        }
        if self.heads == 0 {
            return fault("heads", "is 0; it must be at least 1".into());
        }
        if !self.alpha.is_finite() {
            return fault("alpha", format!("is {}; it must be finite", self.alpha));
        }
        if !(self.norm.is_finite() && self.norm > 0.0) {
            return fault("norm", format!("is {}; it must be finite and above 0", self.norm));
        }
        if self.window.is_some_and(|window| window.recent == 0) {
            return fault("window", "has recent 0; a token must at least see itself".into());
        }
        match &self.times_s {
            Some(times) if times.len() != self.rows() => {
                fault("times_s", format!("has {} entries for {} rows", times.len(), self.rows()))
            }
            _ => Ok(()),
        }
    }

    /// Checks the layout, and that inputs of these shapes match it.
    pub fn check(&self, inputs: &HstuInputs<&[usize]>) -> Result<Dims, Error> {
        self.validate()?;
        let rows = self.rows();
        let head_dim = |field, shape: &[usize]| match shape {
            [r, columns] if *r == rows && *columns > 0 && columns % self.heads == 0 => {
                Ok(columns / self.heads)
            }
            _ => {
                let heads = self.heads;
                let expected = format!("[{rows}, {heads} heads * a dimension from 1 up]");
                fault(field, format!("has shape {shape:?}; it must be {expected}"))
            }
        };
        let qk = head_dim("q", inputs.q)?;
        if inputs.k != inputs.q {
            return fault("k", format!("has shape {:?}, q has {:?}", inputs.k, inputs.q));
        }
        for (field, table) in [("position", inputs.position), ("time", inputs.time)] {
            if let Some(shape) = table
                && (shape.len() != 1 || shape[0] == 0)
            {
                return fault(field, format!("has shape {shape:?}; it must be [entries]"));
            }
        }
        if inputs.time.is_some() && self.times_s.is_none() {
            return fault("times_s", "is missing; the time bias needs it".into());
        }
        Ok(Dims { rows, qk, v: head_dim("v", inputs.v)? })
    }

    /// The sizes of the inputs.
    ///
    /// # Panics
    /// If the inputs do not match the layout.
    pub(crate) fn dims<T: TensorMetadata>(&self, inputs: &HstuInputs<T>) -> Dims {
        let shapes = inputs.as_ref().map(|tensor| tensor.shape());
        let shapes = shapes.as_ref().map(|shape| &shape[..]);
        self.check(&shapes).unwrap_or_else(|error| panic!("{error}"))
    }
}

impl<T> HstuInputs<T> {
    /// The same inputs, by reference.
    pub fn as_ref(&self) -> HstuInputs<&T> {
        HstuInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            position: self.position.as_ref(),
            time: self.time.as_ref(),
        }
    }

    /// Applies `f` to each input.
    pub fn map<U>(self, f: impl FnMut(T) -> U) -> HstuInputs<U> {
        let f = std::cell::RefCell::new(f);
        self.map_both(|matrix| f.borrow_mut()(matrix), |table| f.borrow_mut()(table))
    }

    /// The inputs in the order of the fields; `None` for an absent table.
    pub(crate) fn into_array(self) -> [Option<T>; 5] {
        [Some(self.q), Some(self.k), Some(self.v), self.position, self.time]
    }
}

impl<T, Table> HstuInputs<T, Table> {
    /// Applies `matrix` to each matrix and `table` to each table.
    pub(crate) fn map_both<U, V>(
        self,
        matrix: impl Fn(T) -> U,
        table: impl Fn(Table) -> V,
    ) -> HstuInputs<U, V> {
        HstuInputs {
            q: matrix(self.q),
            k: matrix(self.k),
            v: matrix(self.v),
            position: self.position.map(&table),
            time: self.time.map(&table),
        }
    }
}

impl<B: Backend> HstuInputs<Tensor<B, 2>, Tensor<B, 1>> {
    /// The inputs as backend primitives.
    pub fn into_primitives(self) -> HstuInputs<FloatTensor<B>> {
        self.map_both(primitive, primitive)
    }
}

fn fault<T>(field: &'static str, problem: String) -> Result<T, Error> {
    Err(Error { field, problem })
}

fn check_offsets(field: &'static str, offsets: &[u32]) -> Result<(), Error> {
    if offsets.first() != Some(&0) {
        return fault(field, "must begin with 0".into());
    }
    match offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        Some(b) => {
            fault(field, format!("decreases from {} to {} at {b}", offsets[b], offsets[b + 1]))
        }
        None => Ok(()),
    }
}
