//! The backward of one attention task. The scores are computed again, block by block.
//!
//! With s the scores, A = SiLU(s) / norm and g the gradient of the output:
//! `dA = g Vᵀ`, `dS = dA · SiLU'(s) / norm`, `dQ = α dS K`, `dK = α dSᵀ Q`,
//! `dV = Aᵀ g`, and each bias gets the sum of the dS that it was added to. As all are linear in
//! g, it is divided by the norm once, when it is packed.

use super::bias::{BiasSums, BiasTableGrads, Biases, ScoreTile};
use super::forward::score;
use super::isa::IsaKernel;
use super::lanes::Lanes;
use super::math::{Left, ProductExtent, Right, accumulate, dot, product, sigmoid};
use super::task::{
    AttentionTask, HeadColumns, KEYS, OutputSink, ROWS, RowBlock, pack, pack_transposed, padded,
    scale, zero,
};

/// The outputs for the gradients of q, k and v.
pub(super) struct GradSinks<'a> {
    pub(super) q: OutputSink<'a>,
    pub(super) k: OutputSink<'a>,
    pub(super) v: OutputSink<'a>,
}

/// Buffers of some tasks, one after the other, which grow linearly with the length of a history.
#[derive(Default)]
pub(super) struct BackwardScratch {
    biases: Biases,
    /// `[block of keys, qk, KEYS]` and `[block of keys, v, KEYS]`.
    keys_t: Vec<f32>,
    values_t: Vec<f32>,
    /// `[n, padded qk]`.
    keys: Vec<f32>,
    /// `[n up to whole blocks, padded qk]` and `[.., padded v]`: sums over the rows.
    keys_grad: Vec<f32>,
    values_grad: Vec<f32>,
    /// `[ROWS, padded qk]`, times alpha.
    queries: Vec<f32>,
    /// `[ROWS, padded v]`: the output's gradient over the norm.
    grads: Vec<f32>,
    /// `[ROWS, padded qk]`.
    queries_grad: Vec<f32>,
    /// `[ROWS, KEYS]`: scores, then SiLU(s).
    weights: Vec<f32>,
    /// `[ROWS, KEYS]`: dA / norm, then dS.
    scores_grad: Vec<f32>,
    bias_sums: BiasSums,
}

/// Computes the gradients of a task.
pub(super) struct DifferentiateTask<'a> {
    pub(super) task: &'a AttentionTask<'a>,
    pub(super) scratch: &'a mut BackwardScratch,
    pub(super) sinks: &'a GradSinks<'a>,
}

impl IsaKernel for DifferentiateTask<'_> {
    type Output = BiasTableGrads;

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) -> BiasTableGrads {
        let DifferentiateTask { task, scratch, sinks } = self;
        let grad = task.grad.expect("a backward task is made with the output's gradient");
        let mut of_themselves = 0.0;
        prepare::<V>(task, scratch);
        for block in task.blocks(ROWS) {
            let rows = block.first..block.first + block.count;
            pack::<V>(&mut scratch.queries, task.q, rows.clone(), ROWS, task.alpha);
            pack::<V>(&mut scratch.grads, grad, rows.clone(), ROWS, task.inverse_norm);
            zero(&mut scratch.queries_grad, ROWS * padded::<V>(task.dims.qk));
            for j0 in (0..block.end(block.count - 1)).step_by(KEYS) {
                if !task.skips(&block, j0) {
                    differentiate_scores::<V, R>(task, scratch, &block, j0);
                    spread::<V, R>(task, scratch, &block, j0);
                }
            }
            let packed = &scratch.queries_grad;
            write::<V>(&sinks.q, task.head, rows, packed, task.dims.qk, task.alpha);
            if block.is_targets() {
                of_themselves += differentiate_itself::<V>(task, grad, &block, sinks);
            }
        }
        let history = task.history.clone();
        let (head, keys_grad, values_grad) = (task.head, &scratch.keys_grad, &scratch.values_grad);
        write::<V>(&sinks.k, head, history.clone(), keys_grad, task.dims.qk, 1.0);
        write::<V>(&sinks.v, head, history, values_grad, task.dims.v, 1.0);
        scratch.bias_sums.tables(task, of_themselves)
    }
}

#[inline(always)]
fn prepare<V: Lanes>(task: &AttentionTask<'_>, scratch: &mut BackwardScratch) {
    let (qk, v) = (padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    let height = task.n().next_multiple_of(KEYS);
    scratch.biases.prepare(task);
    scratch.bias_sums.clear(task);
    pack_transposed(&mut scratch.keys_t, task.k, task.history.clone());
    pack_transposed(&mut scratch.values_t, task.v, task.history.clone());
    pack::<V>(&mut scratch.keys, task.k, task.history.clone(), 0, 1.0);
    zero(&mut scratch.keys_grad, height * qk);
    zero(&mut scratch.values_grad, height * v);
    scratch.weights.resize(ROWS * KEYS, 0.0);
    scratch.scores_grad.resize(ROWS * KEYS, 0.0);
}

/// Computes the weights and dS of the block's rows and the keys `j0..j0 + KEYS`, with zeros where
/// masked, and adds dS to the sums for the tables.
#[inline(always)]
fn differentiate_scores<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    scratch: &mut BackwardScratch,
    block: &RowBlock,
    j0: usize,
) {
    let (dims, qk, v) = (task.dims, padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    for (r, rows) in block.tiles(R) {
        let columns = padded::<V>(rows.seen(j0));
        let tile = ScoreTile { rows, first_key: j0, columns };
        let weights = &mut scratch.weights[r * KEYS..][..R * KEYS];
        let grads = &mut scratch.scores_grad[r * KEYS..][..R * KEYS];
        let factors = [&scratch.queries[r * qk..], &scratch.keys_t[j0 * dims.qk..]];
        score::<V, R>(task, &scratch.biases, &tile, factors, weights);
        product::<V, R>(
            grads,
            KEYS,
            Left { data: &scratch.grads[r * v..], row: v, step: 1 },
            Right { data: &scratch.values_t[j0 * dims.v..], stride: KEYS },
            ProductExtent { columns, steps: dims.v },
        );
        let cells = weights.chunks_exact_mut(KEYS).zip(grads.chunks_exact_mut(KEYS));
        for (weights, grads) in cells.take(rows.count) {
            differentiate::<V>(&mut weights[..columns], &mut grads[..columns]);
        }
        task.mask(&rows, j0, weights);
        task.mask(&rows, j0, grads);
        grads[rows.count * KEYS..].fill(0.0);
        scratch.bias_sums.add::<V, R>(task, &scratch.biases, &tile, grads);
    }
}

/// Adds the block's share to the gradients of its queries and of the keys and values.
#[inline(always)]
fn spread<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    scratch: &mut BackwardScratch,
    block: &RowBlock,
    j0: usize,
) {
    let (qk, v) = (padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    for (r, tile) in block.tiles(R) {
        accumulate::<V, R>(
            &mut scratch.queries_grad[r * qk..],
            qk,
            Left { data: &scratch.scores_grad[r * KEYS..], row: KEYS, step: 1 },
            Right { data: &scratch.keys[j0 * qk..], stride: qk },
            ProductExtent { columns: qk, steps: tile.seen(j0) },
        );
    }
    for j in (0..block.seen(j0)).step_by(R) {
        // History rows before the tile's first key see none of it.
        let from = (j0 + j).saturating_sub(block.position) * block.step;
        let steps = block.count - from;
        accumulate::<V, R>(
            &mut scratch.keys_grad[(j0 + j) * qk..],
            qk,
            Left { data: &scratch.scores_grad[from * KEYS + j..], row: 1, step: KEYS },
            Right { data: &scratch.queries[from * qk..], stride: qk },
            ProductExtent { columns: qk, steps },
        );
        accumulate::<V, R>(
            &mut scratch.values_grad[(j0 + j) * v..],
            v,
            Left { data: &scratch.weights[from * KEYS + j..], row: 1, step: KEYS },
            Right { data: &scratch.grads[from * v..], stride: v },
            ProductExtent { columns: v, steps },
        );
    }
}

/// The gradients of each target's attention to itself. The query's gradient is added to; the key's
/// and value's, which have no other part, are written. Returns the sum of dS.
#[inline(always)]
fn differentiate_itself<V: Lanes>(
    task: &AttentionTask<'_>,
    grad: HeadColumns<'_>,
    block: &RowBlock,
    sinks: &GradSinks<'_>,
) -> f32 {
    let rows = block.first..block.first + block.count;
    let (mut weights, mut scores_grad) = ([0.0; ROWS], [0.0; ROWS]);
    for (r, row) in rows.clone().enumerate() {
        weights[r] = task.own_score::<V>(row);
        scores_grad[r] = dot::<V>(grad.row(row), task.v.row(row)) * task.inverse_norm;
    }
    differentiate::<V>(&mut weights, &mut scores_grad);
    for (r, row) in rows.enumerate() {
        let factor = task.alpha * scores_grad[r];
        // SAFETY: every row and head belongs to one task, and these borrows end with the loop's
        // body.
        let (q, k, v) = unsafe {
            let (qk, v) = (task.dims.qk, task.dims.v);
            let q = sinks.q.part(row, task.head, qk);
            (q, sinks.k.part(row, task.head, qk), sinks.v.part(row, task.head, v))
        };
        for (sum, key) in q.iter_mut().zip(task.k.row(row)) {
            *sum += factor * key;
        }
        scale::<V>(k, task.q.row(row), factor);
        scale::<V>(v, grad.row(row), weights[r] * task.inverse_norm);
    }
    scores_grad[..block.count].iter().sum()
}

/// Turns scores into SiLU(s), and dA into dS, in whole vectors.
#[inline(always)]
fn differentiate<V: Lanes>(scores: &mut [f32], grads: &mut [f32]) {
    let whole = scores.len().is_multiple_of(V::N);
    assert!(whole && scores.len() == grads.len(), "not whole vectors");
    for at in (0..scores.len()).step_by(V::N) {
        // SAFETY: at + N is at most the length of both, by the assertion.
        unsafe {
            let cell = scores.as_mut_ptr().wrapping_add(at);
            let grad = grads.as_mut_ptr().wrapping_add(at);
            let score = V::load(cell);
            let sigmoid = sigmoid(score);
            let silu = score.mul(sigmoid);
            let slope = silu.mul_add(V::splat(1.0).sub(sigmoid), sigmoid);
            silu.store(cell);
            V::load(grad).mul(slope).store(grad);
        }
    }
}

/// Writes packed gradients to `rows` of a sink: the first `width` columns of each, times `factor`.
#[inline(always)]
fn write<V: Lanes>(
    sink: &OutputSink<'_>,
    head: usize,
    rows: std::ops::Range<usize>,
    packed: &[f32],
    width: usize,
    factor: f32,
) {
    for (row, packed) in rows.zip(packed.chunks_exact(padded::<V>(width))) {
        // SAFETY: every row and head belongs to one task, and this borrow ends here.
        let out = unsafe { sink.part(row, head, width) };
        scale::<V>(out, &packed[..width], factor);
    }
}
