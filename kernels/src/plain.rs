//! The op composed of primitive Burn ops, for any backend.
//!
//! It is a correct stand-in where no fused kernel exists yet (CUDA), not a fast
//! one: requests are padded to the longest of their group and the scores of a
//! group are whole matrices in memory. Groups are kept small enough to bound
//! that. Masks and bias indices are made on the host.

use burn::tensor::activation::sigmoid;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData, TensorPrimitive};

use crate::attention::{Dims, HstuAttention, HstuInputs, time_bucket};

/// A sensible `group_scores`: 64 MiB a matrix of scores.
pub const GROUP_SCORES: usize = 1 << 24;

/// The op: `[H + R, heads * v]`, with at most `group_scores` scores at a time unless a single
/// request has more.
///
/// # Panics
/// Where `shape` and the inputs contradict each other.
pub fn forward<B: Backend>(
    inputs: HstuInputs<FloatTensor<B>>,
    shape: &HstuAttention,
    group_scores: usize,
) -> FloatTensor<B> {
    let dims = shape.dims(&inputs);
    let mut rows = Restored::default();
    let tensors = Tensors::<B>::new(inputs);
    for group in groups(shape, group_scores) {
        let group = Group::new(shape, dims, group, &tensors);
        let (scores, sigmoid) = group.scores(&tensors);
        let weights = scores * sigmoid * group.mask.clone();
        rows.push(&group, weights.matmul(group.gather(&tensors.v, dims.v)));
    }
    rows.into_primitive(tensors.v)
}

/// The gradients of the inputs, given the gradient of the output; `group_scores` as in `forward`.
///
/// # Panics
/// Where `shape` and the inputs contradict each other.
pub fn backward<B: Backend>(
    inputs: HstuInputs<FloatTensor<B>>,
    grad: FloatTensor<B>,
    shape: &HstuAttention,
    group_scores: usize,
) -> HstuInputs<FloatTensor<B>> {
    let dims = shape.dims(&inputs);
    let tensors = Tensors::<B>::new(inputs);
    let grad = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(grad));
    let (mut dq, mut dk, mut dv) = (Restored::default(), Restored::default(), Restored::default());
    let mut position = tensors.position.as_ref().map(Tensor::zeros_like);
    let mut time = tensors.time.as_ref().map(Tensor::zeros_like);
    for group in groups(shape, group_scores) {
        let group = Group::new(shape, dims, group, &tensors);
        let (scores, sigmoid) = group.scores(&tensors);
        let silu = scores * sigmoid.clone();
        let slope = silu.clone() * (sigmoid.clone().neg() + 1.0) + sigmoid;
        let grad = group.gather(&grad, dims.v);
        let weights_grad = grad.clone().matmul(group.gather(&tensors.v, dims.v).transpose());
        let scores_grad = weights_grad * slope * group.mask.clone();
        dv.push(&group, (silu * group.mask.clone()).transpose().matmul(grad));
        let products_grad = scores_grad.clone() * shape.alpha;
        let (q, k) = (group.gather(&tensors.q, dims.qk), group.gather(&tensors.k, dims.qk));
        dk.push(&group, products_grad.clone().transpose().matmul(q));
        dq.push(&group, products_grad.matmul(k));
        let of_pairs = scores_grad.sum_dim(1);
        position = group.add_to(position, &group.position, &of_pairs);
        time = group.add_to(time, &group.time, &of_pairs);
    }
    HstuInputs {
        q: dq.into_primitive(tensors.q),
        k: dk.into_primitive(tensors.k),
        v: dv.into_primitive(tensors.v),
        position: position.map(|table| table.into_primitive().tensor()),
        time: time.map(|table| table.into_primitive().tensor()),
    }
}

struct Tensors<B: Backend> {
    q: Tensor<B, 2>,
    k: Tensor<B, 2>,
    v: Tensor<B, 2>,
    position: Option<Tensor<B, 1>>,
    time: Option<Tensor<B, 1>>,
}

impl<B: Backend> Tensors<B> {
    fn new(inputs: HstuInputs<FloatTensor<B>>) -> Self {
        let table = |table| Tensor::from_primitive(TensorPrimitive::Float(table));
        Tensors {
            q: Tensor::from_primitive(TensorPrimitive::Float(inputs.q)),
            k: Tensor::from_primitive(TensorPrimitive::Float(inputs.k)),
            v: Tensor::from_primitive(TensorPrimitive::Float(inputs.v)),
            position: inputs.position.map(table),
            time: inputs.time.map(table),
        }
    }
}

/// Some requests, each padded to the longest one's `length` tokens: its history, its targets,
/// then padding.
struct Group<B: Backend> {
    dims: Dims,
    heads: usize,
    alpha: f32,
    requests: usize,
    length: usize,
    /// `[requests * length]`: each padded token's row; row 0 for padding.
    rows: Tensor<B, 1, Int>,
    /// The padded tokens that are not padding, and their rows.
    places: Vec<(i32, usize)>,
    /// `[requests, 1, length, length]`: `1 / norm` where the row sees the key, else 0.
    mask: Tensor<B, 4>,
    /// `[requests * length * length]`: each pair's entry of the table.
    position: Option<Tensor<B, 1, Int>>,
    time: Option<Tensor<B, 1, Int>>,
}

impl<B: Backend> Group<B> {
    fn new(
        shape: &HstuAttention,
        dims: Dims,
        group: std::ops::Range<usize>,
        tensors: &Tensors<B>,
    ) -> Self {
        let length = group.clone().map(|b| tokens(shape, b)).max().unwrap_or(0);
        let requests = group.len();
        let entries = |table: &Option<Tensor<B, 1>>| table.as_ref().map(|t| t.dims()[0]);
        let (positions, times) = (entries(&tensors.position), entries(&tensors.time));
        let pairs = requests * length * length;
        let (mut mask, mut rows) = (vec![0f32; pairs], vec![0i32; requests * length]);
        let (mut position, mut time) = (vec![0i32; pairs], vec![0i32; pairs]);
        let mut places = Vec::new();
        for (slot, b) in group.enumerate() {
            let request = shape.request(b);
            let n = request.history.len();
            for (i, row) in request.history.clone().chain(request.targets).enumerate() {
                rows[slot * length + i] = i32::try_from(row).expect("rows fit an i32");
                places.push(((slot * length + i) as i32, row));
                let keys = (0..n.min(i + 1)).map(|j| (j, request.history.start + j, i.min(n) - j));
                let attends = i >= n || !shape.targets_only;
                let seen = keys.filter(|&(j, ..)| attends && shape.sees(i.min(n), j));
                for (j, key, distance) in seen.chain((i >= n).then_some((i, row, 0))) {
                    let pair = (slot * length + i) * length + j;
                    mask[pair] = 1.0 / shape.norm;
                    position[pair] = positions.map_or(0, |len| distance.min(len - 1) as i32);
                    if let (Some(len), Some(times)) = (times, &shape.times_s) {
                        time[pair] = time_bucket(times[row].abs_diff(times[key]), len) as i32;
                    }
                }
            }
        }
        let device = tensors.q.device();
        let index = |values: Vec<i32>| {
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), &device)
        };
        let mask = TensorData::new(mask, [requests, 1, length, length]);
        Group {
            dims,
            heads: shape.heads,
            alpha: shape.alpha,
            requests,
            length,
            rows: index(rows),
            places,
            mask: Tensor::from_data(mask, &device),
            position: positions.map(|_| index(position)),
            time: times.map(|_| index(time)),
        }
    }

    /// The scores and their sigmoids, `[requests, heads, length, length]`, not masked.
    fn scores(&self, tensors: &Tensors<B>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let q = self.gather(&tensors.q, self.dims.qk);
        let k = self.gather(&tensors.k, self.dims.qk);
        let mut scores = q.matmul(k.transpose()) * self.alpha;
        let tables = [(&tensors.position, &self.position), (&tensors.time, &self.time)];
        for (table, index) in tables {
            if let (Some(table), Some(index)) = (table, index) {
                let shape = [self.requests, 1, self.length, self.length];
                scores = scores + table.clone().select(0, index.clone()).reshape(shape);
            }
        }
        (scores.clone(), sigmoid(scores))
    }

    /// The group's tokens of `[H + R, heads * dim]` as `[requests, heads, length, dim]`.
    fn gather(&self, tensor: &Tensor<B, 2>, dim: usize) -> Tensor<B, 4> {
        let tokens = tensor.clone().select(0, self.rows.clone());
        tokens.reshape([self.requests, self.length, self.heads, dim]).swap_dims(1, 2)
    }

    /// Adds the gradients of pairs, `[requests, 1, length, length]`, to their entries of a table.
    fn add_to(
        &self,
        table: Option<Tensor<B, 1>>,
        index: &Option<Tensor<B, 1, Int>>,
        of_pairs: &Tensor<B, 4>,
    ) -> Option<Tensor<B, 1>> {
        let (table, index) = (table?, index.clone()?);
        let values = of_pairs.clone().reshape([index.dims()[0]]);
        Some(table.select_assign(0, index, values, IndexingUpdateOp::Add))
    }
}

/// Results of groups on their way back to the order of the rows.
struct Restored<B: Backend> {
    padded: Vec<Tensor<B, 2>>,
    /// Row r of the result is row `places[r]` of the padded ones together.
    places: Vec<i32>,
    len: i32,
}

impl<B: Backend> Default for Restored<B> {
    fn default() -> Self {
        Restored { padded: Vec::new(), places: Vec::new(), len: 0 }
    }
}

impl<B: Backend> Restored<B> {
    fn push(&mut self, group: &Group<B>, result: Tensor<B, 4>) {
        let [requests, heads, length, dim] = result.dims();
        self.padded.push(result.swap_dims(1, 2).reshape([requests * length, heads * dim]));
        for &(place, row) in &group.places {
            self.places.resize(self.places.len().max(row + 1), 0);
            self.places[row] = self.len + place;
        }
        self.len += (requests * length) as i32;
    }

    /// The rows in order; `like`, which has as many, where there are none.
    fn into_primitive(self, like: Tensor<B, 2>) -> FloatTensor<B> {
        if self.places.is_empty() {
            return like.into_primitive().tensor();
        }
        let len = self.places.len();
        let index = Tensor::from_data(TensorData::new(self.places, [len]), &like.device());
        Tensor::cat(self.padded, 0).select(0, index).into_primitive().tensor()
    }
}

fn tokens(shape: &HstuAttention, b: usize) -> usize {
    let request = shape.request(b);
    request.history.len() + request.targets.len()
}

/// Consecutive requests whose padded scores stay within `group_scores`; without the empty groups.
fn groups(shape: &HstuAttention, group_scores: usize) -> Vec<std::ops::Range<usize>> {
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    let mut longest = 0;
    for b in 0..shape.requests() {
        let length = tokens(shape, b);
        if let Some(group) = groups.last_mut() {
            let together = longest.max(length);
            if (group.len() + 1) * shape.heads * together * together <= group_scores {
                (group.end, longest) = (b + 1, together);
                continue;
            }
        }
        groups.push(b..b + 1);
        longest = length;
    }
    groups.retain(|group| group.clone().any(|b| tokens(shape, b) > 0));
    groups
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::Arc;

    use burn::tensor::ops::FloatTensor;
    use burn_cuda::Cuda;

    use crate::attention::{HstuAttention, HstuBackend, HstuInputs};

    /// Composed of primitive ops: correct, but without a fused kernel yet.
    impl HstuBackend for Cuda {
        fn hstu_attention(
            inputs: HstuInputs<FloatTensor<Self>>,
            shape: Arc<HstuAttention>,
        ) -> FloatTensor<Self> {
            super::forward::<Self>(inputs, &shape, super::GROUP_SCORES)
        }

        fn hstu_attention_backward(
            inputs: HstuInputs<FloatTensor<Self>>,
            grad: FloatTensor<Self>,
            shape: Arc<HstuAttention>,
        ) -> HstuInputs<FloatTensor<Self>> {
            super::backward::<Self>(inputs, grad, &shape, super::GROUP_SCORES)
        }
    }
}
