//! The forward of one attention task.

use super::isa::IsaKernel;
use super::kept::PackedHead;
use super::lanes::{Lanes, MAX_LANES};
use super::math::{Left, ProductExtent, Right, accumulate, dot, sigmoid};
use super::task::{
    AttentionTask, Biases, KEYS, OutputSink, RowBlock, pack, pack_transposed, padded, zero,
};

/// A thread's buffers, which grow linearly with the length of a history.
#[derive(Default)]
pub(super) struct ForwardScratch {
    biases: Biases,
    /// `[block of keys, qk, KEYS]`.
    keys: Vec<f32>,
    /// `[n, padded v]`.
    values: Vec<f32>,
    /// `[R, qk]`.
    queries: Vec<f32>,
    /// `[R, KEYS]`: scores, then weights.
    weights: Vec<f32>,
    /// `[R, padded v]`.
    out: Vec<f32>,
}

/// Computes the output of a task.
pub(super) struct AttendTask<'a> {
    pub(super) task: &'a AttentionTask<'a>,
    pub(super) scratch: &'a mut ForwardScratch,
    pub(super) sink: &'a OutputSink<'a>,
}

impl IsaKernel for AttendTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let AttendTask { task, scratch, sink } = self;
        let (dims, width) = (task.dims, padded::<V>(task.dims.v));
        scratch.biases.prepare(task);
        // Taken out so that the rest of the scratch can be borrowed mutably.
        let (mut keys, mut values) =
            (std::mem::take(&mut scratch.keys), std::mem::take(&mut scratch.values));
        let history = match task.kept {
            Some(kept) => kept.head(task.head),
            None => {
                pack_transposed(&mut keys, task.k, task.history.clone());
                pack(&mut values, task.v, task.history.clone(), width, 0);
                PackedHead { keys: &keys, values: &values, stride: width }
            }
        };
        for block in task.blocks(R) {
            let rows = block.first..block.first + block.count;
            pack(&mut scratch.queries, task.q, rows.clone(), dims.qk, R);
            zero(&mut scratch.out, R * width);
            for j0 in (0..block.end(block.count - 1)).step_by(KEYS) {
                if !task.skips(&block, j0) {
                    attend::<V, R>(task, scratch, history, &block, j0);
                }
            }
            if block.is_targets() {
                attend_to_itself::<V, R>(task, scratch, &block);
            }
            for (row, out) in rows.zip(scratch.out.chunks_exact(width)) {
                // SAFETY: every row and head belongs to one task, and is written here only.
                unsafe { sink.part(row, task.head, dims.v) }.copy_from_slice(&out[..dims.v]);
            }
        }
        (scratch.keys, scratch.values) = (keys, values);
    }
}

/// Adds the contribution of the keys `j0..j0 + KEYS` to the block's rows.
#[inline(always)]
fn attend<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    scratch: &mut ForwardScratch,
    history: PackedHead<'_>,
    block: &RowBlock,
    j0: usize,
) {
    let (dims, width) = (task.dims, padded::<V>(task.dims.v));
    let seen = (block.end(block.count - 1) - j0).min(KEYS);
    let weights = &mut scratch.weights;
    zero(weights, R * KEYS);
    accumulate::<V, R>(
        weights,
        KEYS,
        Left { data: &scratch.queries, row: dims.qk, step: 1 },
        Right { data: &history.keys[j0 * dims.qk..], stride: KEYS },
        ProductExtent { columns: padded::<V>(seen), steps: dims.qk },
    );
    for (r, weights) in weights.chunks_exact_mut(KEYS).enumerate().take(block.count) {
        let (position, end) = (block.at(r), block.end(r));
        let own = padded::<V>(end.saturating_sub(j0).min(KEYS));
        let bias = task.bias(&mut scratch.biases, block.first + r, position, j0..j0 + own);
        activate::<V>(&mut weights[..own], bias, task.alpha, task.inverse_norm);
        task.mask(position, end, j0, weights);
    }
    accumulate::<V, R>(
        &mut scratch.out,
        width,
        Left { data: weights, row: KEYS, step: 1 },
        Right { data: &history.values[j0 * history.stride..], stride: history.stride },
        ProductExtent { columns: width, steps: seen },
    );
}

/// Adds the contribution of each target to itself.
#[inline(always)]
fn attend_to_itself<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    scratch: &mut ForwardScratch,
    block: &RowBlock,
) {
    const { assert!(R <= MAX_LANES) };
    let width = padded::<V>(task.dims.v);
    let mut weights = [0.0; MAX_LANES];
    for (row, weight) in (block.first..block.first + block.count).zip(&mut weights) {
        *weight = dot::<V>(task.q.row(row), task.k.row(row));
    }
    let bias = [task.own_bias(); MAX_LANES];
    activate::<V>(&mut weights, &bias, task.alpha, task.inverse_norm);
    for (r, out) in scratch.out.chunks_exact_mut(width).enumerate().take(block.count) {
        for (out, value) in out.iter_mut().zip(task.v.row(block.first + r)) {
            *out += weights[r] * value;
        }
    }
}

/// Turns dot products into weights: `SiLU(alpha * dot + bias) * inverse_norm`, in whole vectors.
#[inline(always)]
fn activate<V: Lanes>(dots: &mut [f32], bias: &[f32], alpha: f32, inverse_norm: f32) {
    assert!(dots.len().is_multiple_of(V::N) && dots.len() <= bias.len(), "not whole vectors");
    for at in (0..dots.len()).step_by(V::N) {
        // SAFETY: at + N <= dots.len() <= bias.len(), by the assertion.
        unsafe {
            let cell = dots.as_mut_ptr().wrapping_add(at);
            let bias = V::load(bias.as_ptr().wrapping_add(at));
            let score = V::load(cell).mul_add(V::splat(alpha), bias);
            score.mul(sigmoid(score)).mul(V::splat(inverse_norm)).store(cell);
        }
    }
}
