//! The backward of one attention task. The scores are computed again, block by block.
//!
//! With s the scores, A = SiLU(s) / norm and g the gradient of the output:
//! `dA = g Vᵀ`, `dS = dA · SiLU'(s) / norm`, `dQ = α dS K`, `dK = α dSᵀ Q`,
//! `dV = Aᵀ g`, and each bias gets the sum of the dS that it was added to.

use super::isa::IsaKernel;
use super::lanes::Lanes;
use super::math::{Left, ProductExtent, Right, accumulate, dot, sigmoid};
use super::task::{
    AttentionTask, Biases, HeadColumns, KEYS, OutputSink, RowBlock, pack, pack_transposed, padded,
    zero,
};

/// Rows per block: a multiple of every tile height and vector length. The more rows, the fewer
/// times the gradients of keys and values are read and written.
const ROWS: usize = 32;

/// The outputs for the gradients of q, k and v.
pub(super) struct GradSinks<'a> {
    pub(super) q: OutputSink<'a>,
    pub(super) k: OutputSink<'a>,
    pub(super) v: OutputSink<'a>,
}

/// A task's gradients of the bias tables; empty for an absent table.
pub(super) struct BiasTableGrads {
    pub(super) position: Vec<f32>,
    pub(super) time: Vec<f32>,
}

/// A thread's buffers, which grow linearly with the length of a history.
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
    /// `[ROWS, padded qk]`, `[ROWS, padded v]` and `[ROWS, padded qk]`.
    queries: Vec<f32>,
    grads: Vec<f32>,
    queries_grad: Vec<f32>,
    /// `[ROWS, KEYS]`: scores, then weights A.
    weights: Vec<f32>,
    /// `[ROWS, KEYS]`: dA, then dS.
    scores_grad: Vec<f32>,
    /// Laid out as the reversed biases.
    reversed_grad: Vec<f32>,
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
        let mut tables = prepare::<V>(task, scratch);
        for block in task.blocks(ROWS) {
            let rows = block.first..block.first + block.count;
            pack(&mut scratch.queries, task.q, rows.clone(), padded::<V>(task.dims.qk), ROWS);
            pack(&mut scratch.grads, grad, rows.clone(), padded::<V>(task.dims.v), ROWS);
            zero(&mut scratch.queries_grad, ROWS * padded::<V>(task.dims.qk));
            for j0 in (0..block.end(block.count - 1)).step_by(KEYS) {
                if !task.skips(&block, j0) {
                    score::<V, R>(task, scratch, &block, j0, &mut tables);
                    spread::<V, R>(task, scratch, &block, j0);
                }
            }
            let packed = &scratch.queries_grad;
            write::<V>(&sinks.q, task.head, rows, packed, task.dims.qk, task.alpha);
            if block.is_targets() {
                differentiate_itself::<V>(task, grad, &block, sinks, &mut tables);
            }
        }
        let history = task.history.clone();
        let (head, keys_grad, values_grad) = (task.head, &scratch.keys_grad, &scratch.values_grad);
        write::<V>(&sinks.k, head, history.clone(), keys_grad, task.dims.qk, task.alpha);
        write::<V>(&sinks.v, head, history, values_grad, task.dims.v, 1.0);
        let last = tables.position.len().saturating_sub(1);
        if task.position.is_some() {
            for (x, grad) in scratch.reversed_grad[..=task.n()].iter().enumerate() {
                tables.position[(task.n() - x).min(last)] += grad;
            }
        }
        tables
    }
}

#[inline(always)]
fn prepare<V: Lanes>(task: &AttentionTask<'_>, scratch: &mut BackwardScratch) -> BiasTableGrads {
    let (qk, v) = (padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    let height = task.n().next_multiple_of(KEYS);
    scratch.biases.prepare(task);
    pack_transposed(&mut scratch.keys_t, task.k, task.history.clone());
    pack_transposed(&mut scratch.values_t, task.v, task.history.clone());
    pack(&mut scratch.keys, task.k, task.history.clone(), qk, 0);
    zero(&mut scratch.keys_grad, height * qk);
    zero(&mut scratch.values_grad, height * v);
    zero(&mut scratch.reversed_grad, task.n() + 1 + KEYS);
    BiasTableGrads {
        position: vec![0.0; task.position.map_or(0, <[f32]>::len)],
        time: vec![0.0; task.time.map_or(0, |time| time.table.len())],
    }
}

/// Computes the weights and dS of the block's rows and the keys `j0..j0 + KEYS`, with zeros where
/// masked, and adds dS to the table gradients.
#[inline(always)]
fn score<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    scratch: &mut BackwardScratch,
    block: &RowBlock,
    j0: usize,
    tables: &mut BiasTableGrads,
) {
    let (dims, qk, v) = (task.dims, padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    zero(&mut scratch.weights, ROWS * KEYS);
    zero(&mut scratch.scores_grad, ROWS * KEYS);
    for r in (0..block.count).step_by(R) {
        let columns = padded::<V>(seen(block, r + R, j0));
        accumulate::<V, R>(
            &mut scratch.weights[r * KEYS..],
            KEYS,
            Left { data: &scratch.queries[r * qk..], row: qk, step: 1 },
            Right { data: &scratch.keys_t[j0 * dims.qk..], stride: KEYS },
            ProductExtent { columns, steps: dims.qk },
        );
        accumulate::<V, R>(
            &mut scratch.scores_grad[r * KEYS..],
            KEYS,
            Left { data: &scratch.grads[r * v..], row: v, step: 1 },
            Right { data: &scratch.values_t[j0 * dims.v..], stride: KEYS },
            ProductExtent { columns, steps: dims.v },
        );
    }
    for r in 0..block.count {
        let (position, row) = (block.at(r), block.first + r);
        let own = seen(block, r + 1, j0);
        let keys = j0..j0 + padded::<V>(own);
        let weights = &mut scratch.weights[r * KEYS..][..KEYS];
        let grads = &mut scratch.scores_grad[r * KEYS..][..KEYS];
        let bias = task.bias(&mut scratch.biases, row, position, keys.clone());
        let (whole_weights, whole_grads) = (&mut weights[..keys.len()], &mut grads[..keys.len()]);
        differentiate::<V>(whole_weights, whole_grads, bias, task);
        task.mask(position, block.end(r), j0, weights);
        task.mask(position, block.end(r), j0, grads);
        if task.position.is_some() {
            let sums = &mut scratch.reversed_grad[j0 + task.n() - position..][..own];
            for (sum, grad) in sums.iter_mut().zip(&*grads) {
                *sum += grad;
            }
        }
        if let Some(times) = task.time {
            let sums = &mut tables.time;
            task.each_bucket(times, row, j0..j0 + own, |at, bucket| sums[bucket] += grads[at]);
        }
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
    for r in (0..block.count).step_by(R) {
        accumulate::<V, R>(
            &mut scratch.queries_grad[r * qk..],
            qk,
            Left { data: &scratch.scores_grad[r * KEYS..], row: KEYS, step: 1 },
            Right { data: &scratch.keys[j0 * qk..], stride: qk },
            ProductExtent { columns: qk, steps: seen(block, r + R, j0) },
        );
    }
    for j in (0..seen(block, block.count, j0)).step_by(R) {
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
/// and value's, which have no other part, are written.
#[inline(always)]
fn differentiate_itself<V: Lanes>(
    task: &AttentionTask<'_>,
    grad: HeadColumns<'_>,
    block: &RowBlock,
    sinks: &GradSinks<'_>,
    tables: &mut BiasTableGrads,
) {
    let rows = block.first..block.first + block.count;
    let (mut weights, mut scores_grad) = ([0.0; ROWS], [0.0; ROWS]);
    for (r, row) in rows.clone().enumerate() {
        weights[r] = dot::<V>(task.q.row(row), task.k.row(row));
        scores_grad[r] = dot::<V>(grad.row(row), task.v.row(row));
    }
    differentiate::<V>(&mut weights, &mut scores_grad, &[task.own_bias(); ROWS], task);
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
        for (cell, query) in k.iter_mut().zip(task.q.row(row)) {
            *cell = factor * query;
        }
        for (cell, grad) in v.iter_mut().zip(grad.row(row)) {
            *cell = weights[r] * grad;
        }
        for table in [&mut tables.position, &mut tables.time] {
            if let Some(nearest) = table.first_mut() {
                *nearest += scores_grad[r];
            }
        }
    }
}

/// Turns dot products into weights, and dA into dS, in whole vectors.
#[inline(always)]
fn differentiate<V: Lanes>(
    dots: &mut [f32],
    grads: &mut [f32],
    bias: &[f32],
    task: &AttentionTask<'_>,
) {
    let whole = dots.len().is_multiple_of(V::N);
    assert!(whole && dots.len() == grads.len() && dots.len() <= bias.len(), "not whole vectors");
    let (alpha, inverse_norm) = (V::splat(task.alpha), V::splat(task.inverse_norm));
    for at in (0..dots.len()).step_by(V::N) {
        // SAFETY: at + N is at most the length of all three, by the assertion.
        unsafe {
            let (cell, grad) = (dots.as_mut_ptr().add(at), grads.as_mut_ptr().add(at));
            let score = V::load(cell).mul_add(alpha, V::load(bias.as_ptr().add(at)));
            let sigmoid = sigmoid(score);
            let silu = score.mul(sigmoid);
            let slope = silu.mul(V::splat(1.0).sub(sigmoid)).add(sigmoid);
            silu.mul(inverse_norm).store(cell);
            V::load(grad).mul(slope).mul(inverse_norm).store(grad);
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
        for (cell, value) in out.iter_mut().zip(packed) {
            *cell = factor * value;
        }
    }
}

/// The number of keys in `j0..j0 + KEYS` that the block's rows before `r` see.
#[inline(always)]
fn seen(block: &RowBlock, r: usize, j0: usize) -> usize {
    block.end(r.min(block.count) - 1).saturating_sub(j0).min(KEYS)
}
