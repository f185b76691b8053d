//! The op composed of primitive Burn ops, for any backend.
//!
//! This is the fallback where no fused kernel runs, and the baseline of benchmarks. It is not fast:
//! requests are padded to the longest of their group, and the scores of a block of queries are
//! matrices in memory. The sizes of groups and blocks bound that memory however long histories are.
//! Masks and bias indices are computed on the CPU.

use std::ops::Range;

use burn::tensor::activation::sigmoid;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::attention::{Dims, HstuAttention, HstuInputs, primitive, tensor, time_bucket};

/// A reasonable `group_scores`: 64 MiB for a matrix of scores.
pub const GROUP_SCORES: usize = 1 << 24;

/// The op: `[H + R, heads * v]`, with at most `group_scores` scores at a time unless a single
/// query has more.
///
/// # Panics
/// If `shape` and the inputs contradict each other.
pub fn forward<B: Backend>(
    inputs: HstuInputs<FloatTensor<B>>,
    shape: &HstuAttention,
    group_scores: usize,
) -> FloatTensor<B> {
    let dims = shape.dims(&inputs);
    let mut rows = RestoredRows::default();
    let tensors: PlainTensors<B> = inputs.map_both(tensor, tensor);
    for group in groups(shape, group_scores) {
        let group = PaddedGroup::new(shape, dims, group, &tensors);
        let v = group.keys.gather(&tensors.v, shape.heads, dims.v);
        for queries in group.blocks(group_scores) {
            let block = group.block(queries, &tensors);
            let (scores, sigmoid) = block.scores(&group, &tensors);
            let weights = scores * sigmoid * block.mask.clone();
            rows.push(&block.queries, weights.matmul(v.clone()));
        }
    }
    rows.into_primitive(tensors.v)
}

/// The gradients of the inputs, given the gradient of the output; `group_scores` as in `forward`.
///
/// # Panics
/// If `shape` and the inputs contradict each other.
pub fn backward<B: Backend>(
    inputs: HstuInputs<FloatTensor<B>>,
    grad: FloatTensor<B>,
    shape: &HstuAttention,
    group_scores: usize,
) -> HstuInputs<FloatTensor<B>> {
    let (dims, heads) = (shape.dims(&inputs), shape.heads);
    let tensors: PlainTensors<B> = inputs.map_both(tensor, tensor);
    let grad = tensor::<B, 2>(grad);
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| RestoredRows::default());
    let mut position = tensors.position.as_ref().map(Tensor::zeros_like);
    let mut time = tensors.time.as_ref().map(Tensor::zeros_like);
    for group in groups(shape, group_scores) {
        let group = PaddedGroup::new(shape, dims, group, &tensors);
        let k = group.keys.gather(&tensors.k, heads, dims.qk);
        let v = group.keys.gather(&tensors.v, heads, dims.v);
        let (mut k_sum, mut v_sum) = (k.zeros_like(), v.zeros_like());
        for queries in group.blocks(group_scores) {
            let block = group.block(queries, &tensors);
            let (scores, sigmoid) = block.scores(&group, &tensors);
            let silu = scores * sigmoid.clone();
            let slope = silu.clone() * (sigmoid.clone().neg() + 1.0) + sigmoid;
            let grad = block.queries.gather(&grad, heads, dims.v);
            let weights_grad = grad.clone().matmul(v.clone().transpose());
            let scores_grad = weights_grad * slope * block.mask.clone();
            v_sum = v_sum + (silu * block.mask.clone()).transpose().matmul(grad);
            let products_grad = scores_grad.clone() * shape.alpha;
            let q = block.queries.gather(&tensors.q, heads, dims.qk);
            k_sum = k_sum + products_grad.clone().transpose().matmul(q);
            dq.push(&block.queries, products_grad.matmul(k.clone()));
            let of_pairs = scores_grad.sum_dim(1);
            position = add_to(position, &block.position, &of_pairs);
            time = add_to(time, &block.time, &of_pairs);
        }
        dk.push(&group.keys, k_sum);
        dv.push(&group.keys, v_sum);
    }
    HstuInputs {
        q: dq.into_primitive(tensors.q),
        k: dk.into_primitive(tensors.k),
        v: dv.into_primitive(tensors.v),
        position: position.map(primitive),
        time: time.map(primitive),
    }
}

type PlainTensors<B> = HstuInputs<Tensor<B, 2>, Tensor<B, 1>>;

/// A range of tokens of each request of a group, padded to the same number of slots per request.
struct TokenSlots<B: Backend> {
    requests: usize,
    /// Slots per request.
    length: usize,
    /// `[requests * length]`: the row of each slot; row 0 for padding.
    rows: Tensor<B, 1, Int>,
    /// The slots that are not padding, and their rows.
    places: Vec<(i32, usize)>,
}

impl<B: Backend> TokenSlots<B> {
    /// Slots for the tokens `positions` of each request, counting its history and then its targets.
    fn new(
        shape: &HstuAttention,
        group: Range<usize>,
        positions: Range<usize>,
        device: &B::Device,
    ) -> Self {
        let (requests, length) = (group.len(), positions.len());
        let (mut rows, mut places) = (vec![0i32; requests * length], Vec::new());
        for (slot, b) in group.enumerate() {
            let request = shape.request(b);
            let tokens = request.history.chain(request.targets).skip(positions.start);
            for (i, row) in tokens.take(length).enumerate() {
                rows[slot * length + i] = i32::try_from(row).expect("rows fit an i32");
                places.push(((slot * length + i) as i32, row));
            }
        }
        TokenSlots { requests, length, rows: index(rows, device), places }
    }

    /// The slots' rows of `[H + R, heads * dim]` as `[requests, heads, length, dim]`.
    fn gather(&self, tensor: &Tensor<B, 2>, heads: usize, dim: usize) -> Tensor<B, 4> {
        let tokens = tensor.clone().select(0, self.rows.clone());
        tokens.reshape([self.requests, self.length, heads, dim]).swap_dims(1, 2)
    }
}

/// Requests that are processed together, padded to the longest one.
struct PaddedGroup<'a, B: Backend> {
    shape: &'a HstuAttention,
    dims: Dims,
    requests: Range<usize>,
    /// All tokens of the requests.
    keys: TokenSlots<B>,
}

/// A block of a group's queries, with the mask and bias indices for all keys.
struct QueryBlock<B: Backend> {
    queries: TokenSlots<B>,
    /// `[requests, 1, queries, keys]`: `1 / norm` where the query sees the key, else 0.
    mask: Tensor<B, 4>,
    /// `[requests * queries * keys]`: the index of each pair in the position table.
    position: Option<Tensor<B, 1, Int>>,
    time: Option<Tensor<B, 1, Int>>,
}

impl<'a, B: Backend> PaddedGroup<'a, B> {
    fn new(
        shape: &'a HstuAttention,
        dims: Dims,
        requests: Range<usize>,
        tensors: &PlainTensors<B>,
    ) -> Self {
        let length = requests.clone().map(|b| tokens(shape, b)).max().unwrap_or(0);
        let keys = TokenSlots::new(shape, requests.clone(), 0..length, &tensors.q.device());
        PaddedGroup { shape, dims, requests, keys }
    }

    /// Ranges of queries with at most `group_scores` scores each.
    fn blocks(&self, group_scores: usize) -> impl Iterator<Item = Range<usize>> + use<B> {
        let length = self.keys.length;
        let row = (self.requests.len() * self.shape.heads * length).max(1);
        let size = (group_scores / row).max(1);
        (0..length).step_by(size).map(move |start| start..length.min(start + size))
    }

    fn block(&self, queries: Range<usize>, tensors: &PlainTensors<B>) -> QueryBlock<B> {
        let (shape, length) = (self.shape, self.keys.length);
        let entries = |table: &Option<Tensor<B, 1>>| table.as_ref().map(|t| t.dims()[0]);
        let (positions, times) = (entries(&tensors.position), entries(&tensors.time));
        let pairs = self.requests.len() * queries.len() * length;
        let mut mask = vec![0f32; pairs];
        let mut position = vec![0i32; positions.map_or(0, |_| pairs)];
        let mut time = vec![0i32; times.map_or(0, |_| pairs)];
        for (slot, b) in self.requests.clone().enumerate() {
            let request = shape.request(b);
            let n = request.history.len();
            let rows = request.history.clone().chain(request.targets).enumerate();
            for (i, row) in rows.skip(queries.start).take(queries.len()) {
                let keys = (0..n.min(i + 1)).map(|j| (j, request.history.start + j, i.min(n) - j));
                let attends = i >= n || !shape.targets_only;
                let seen = keys.filter(|&(j, ..)| attends && shape.sees(i.min(n), j));
                for (j, key, distance) in seen.chain((i >= n).then_some((i, row, 0))) {
                    let pair = (slot * queries.len() + i - queries.start) * length + j;
                    mask[pair] = 1.0 / shape.norm;
                    if let Some(len) = positions {
                        position[pair] = distance.min(len - 1) as i32;
                    }
                    if let (Some(len), Some(times)) = (times, &shape.times_s) {
                        time[pair] = time_bucket(times[row].abs_diff(times[key]), len) as i32;
                    }
                }
            }
        }
        let device = tensors.q.device();
        let mask = TensorData::new(mask, [self.requests.len(), 1, queries.len(), length]);
        QueryBlock {
            queries: TokenSlots::new(shape, self.requests.clone(), queries, &device),
            mask: Tensor::from_data(mask, &device),
            position: positions.map(|_| index(position, &device)),
            time: times.map(|_| index(time, &device)),
        }
    }
}

impl<B: Backend> QueryBlock<B> {
    /// The unmasked scores and their sigmoids, `[requests, heads, queries, keys]`.
    fn scores(
        &self,
        group: &PaddedGroup<'_, B>,
        tensors: &PlainTensors<B>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let (heads, dim) = (group.shape.heads, group.dims.qk);
        let q = self.queries.gather(&tensors.q, heads, dim);
        let k = group.keys.gather(&tensors.k, heads, dim);
        let mut scores = q.matmul(k.transpose()) * group.shape.alpha;
        let tables = [(&tensors.position, &self.position), (&tensors.time, &self.time)];
        for (table, index) in tables {
            if let (Some(table), Some(index)) = (table, index) {
                let shape = self.mask.dims();
                scores = scores + table.clone().select(0, index.clone()).reshape(shape);
            }
        }
        (scores.clone(), sigmoid(scores))
    }
}

/// Adds the gradients of pairs, `[requests, 1, queries, keys]`, to their entries in a table.
fn add_to<B: Backend>(
    table: Option<Tensor<B, 1>>,
    index: &Option<Tensor<B, 1, Int>>,
    of_pairs: &Tensor<B, 4>,
) -> Option<Tensor<B, 1>> {
    let (table, index) = (table?, index.clone()?);
    let values = of_pairs.clone().reshape([index.dims()[0]]);
    Some(table.select_assign(0, index, values, IndexingUpdateOp::Add))
}

fn index<B: Backend>(values: Vec<i32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

/// Collects the results of groups and restores the order of the rows.
#[derive(Default)]
struct RestoredRows<B: Backend> {
    padded: Vec<Tensor<B, 2>>,
    /// Row r of the result is row `places[r]` of the concatenated `padded`.
    places: Vec<i32>,
    len: i32,
}

impl<B: Backend> RestoredRows<B> {
    fn push(&mut self, slots: &TokenSlots<B>, result: Tensor<B, 4>) {
        let [requests, heads, length, dim] = result.dims();
        self.padded.push(result.swap_dims(1, 2).reshape([requests * length, heads * dim]));
        for &(place, row) in &slots.places {
            self.places.resize(self.places.len().max(row + 1), 0);
            self.places[row] = self.len + place;
        }
        self.len += (requests * length) as i32;
    }

    /// The rows in order; `like`, which then has no rows either, if nothing was pushed.
    fn into_primitive(self, like: Tensor<B, 2>) -> FloatTensor<B> {
        if self.places.is_empty() {
            return primitive(like);
        }
        let index = index(self.places, &like.device());
        primitive(Tensor::cat(self.padded, 0).select(0, index))
    }
}

fn tokens(shape: &HstuAttention, b: usize) -> usize {
    let request = shape.request(b);
    request.history.len() + request.targets.len()
}

/// Groups of consecutive requests whose padded scores stay within `group_scores`; empty groups are
/// left out.
fn groups(shape: &HstuAttention, group_scores: usize) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
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
