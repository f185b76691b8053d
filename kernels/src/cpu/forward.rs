//! The forward of one attention task.

use super::bias::{Biases, ScoreTile};
use super::isa::IsaKernel;
use super::kept::PackedHead;
use super::lanes::{Lanes, MAX_LANES};
use super::math::{Left, ProductExtent, Right, accumulate, product};
use super::rowwise::activate;
use super::task::{
    AttentionTask, KEYS, OutputSink, ROWS, RowBlock, pack, pack_transposed, padded, scale, zero,
};

/// Buffers of some tasks, one after the other, which grow linearly with the length of a history.
#[derive(Default)]
pub(super) struct ForwardScratch {
    biases: Biases,
    /// `[block of keys, qk, KEYS]`.
    keys: Vec<f32>,
    /// `[n, padded v]`.
    values: Vec<f32>,
    /// `[ROWS, padded qk]`, times alpha.
    queries: Vec<f32>,
    /// `[ROWS, KEYS]`: scores, then weights.
    weights: Vec<f32>,
    /// `[ROWS, padded v]`.
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
        scratch.weights.resize(ROWS * KEYS, 0.0);
        // Taken out so that the rest of the scratch can be borrowed mutably.
        let (mut keys, mut values) =
            (std::mem::take(&mut scratch.keys), std::mem::take(&mut scratch.values));
        let history = match task.kept {
            Some(kept) => kept.head(task.head),
            None => {
                pack_transposed(&mut keys, task.k, task.history.clone());
                pack::<V>(&mut values, task.v, task.history.clone(), 0, 1.0);
                PackedHead { keys: &keys, values: &values, stride: width }
            }
        };
        for block in task.blocks(ROWS) {
            let rows = block.first..block.first + block.count;
            pack::<V>(&mut scratch.queries, task.q, rows.clone(), ROWS, task.alpha);
            zero(&mut scratch.out, ROWS * width);
            for j0 in (0..block.end(block.count - 1)).step_by(KEYS) {
                if !task.skips(&block, j0) {
                    attend::<V, R>(task, scratch, history, &block, j0);
                }
            }
            if block.is_targets() {
                attend_to_itself::<V>(task, scratch, &block);
            }
            for (row, out) in rows.zip(scratch.out.chunks_exact(width)) {
                // SAFETY: every row and head belongs to one task, and is written here only.
                let part = unsafe { sink.part(row, task.head, dims.v) };
                scale::<V>(part, &out[..dims.v], task.inverse_norm);
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
    let (qk, width) = (padded::<V>(task.dims.qk), padded::<V>(task.dims.v));
    let keys = &history.keys[j0 * task.dims.qk..];
    for (r, rows) in block.tiles(R) {
        let weights = &mut scratch.weights[r * KEYS..][..R * KEYS];
        let columns = padded::<V>(rows.seen(j0));
        let tile = ScoreTile { rows, first_key: j0, columns };
        let factors = [&scratch.queries[r * qk..], keys];
        score::<V, R>(task, &scratch.biases, &tile, factors, weights);
        for weights in weights.chunks_exact_mut(KEYS).take(rows.count) {
            activate::<V>(&mut weights[..columns], None);
        }
        task.mask(&rows, j0, weights);
    }
    for (r, tile) in block.tiles(R) {
        accumulate::<V, R>(
            &mut scratch.out[r * width..],
            width,
            Left { data: &scratch.weights[r * KEYS..], row: KEYS, step: 1 },
            Right { data: &history.values[j0 * history.stride..], stride: history.stride },
            ProductExtent { columns: width, steps: tile.seen(j0) },
        );
    }
}

/// Writes the scores of a tile's rows. `factors` are the rows' packed queries, times alpha, and the
/// packed keys; a row of `scores` has [`KEYS`] cells.
#[inline(always)]
pub(super) fn score<V: Lanes, const R: usize>(
    task: &AttentionTask<'_>,
    biases: &Biases,
    tile: &ScoreTile,
    factors: [&[f32]; 2],
    scores: &mut [f32],
) {
    let [queries, keys] = factors;
    let left = Left { data: queries, row: padded::<V>(task.dims.qk), step: 1 };
    let right = Right { data: keys, stride: KEYS };
    let extent = ProductExtent { columns: tile.columns, steps: task.dims.qk };
    if task.position.is_none() && task.time.is_none() {
        return product::<V, R>(scores, KEYS, left, right, extent);
    }
    biases.write::<V>(task, tile, scores);
    accumulate::<V, R>(scores, KEYS, left, right, extent);
}

/// Adds the contribution of each target to itself.
#[inline(always)]
fn attend_to_itself<V: Lanes>(
    task: &AttentionTask<'_>,
    scratch: &mut ForwardScratch,
    block: &RowBlock,
) {
    const { assert!(ROWS.is_multiple_of(MAX_LANES)) };
    let width = padded::<V>(task.dims.v);
    let mut weights = [0.0; ROWS];
    for (row, weight) in (block.first..block.first + block.count).zip(&mut weights) {
        *weight = task.own_score::<V>(row);
    }
    activate::<V>(&mut weights, None);
    for (r, out) in scratch.out.chunks_exact_mut(width).enumerate().take(block.count) {
        for (out, value) in out.iter_mut().zip(task.v.row(block.first + r)) {
            *out += weights[r] * value;
        }
    }
}
