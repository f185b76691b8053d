//! From dot products to weights, and from gradients of weights to those of scores, in registers.
//!
//! Rows of a tile are queries or keys, depending on the kernel. Most tiles are entirely visible,
//! which is checked once per tile instead of once per pair.

use cubecl::prelude::*;

use super::fragment::{FragmentPlace, FragmentSums, PairVector, place};
use super::plan::{COLUMNS, MmaPlan, STEP};
use super::shared::{Tile, tile};
use crate::gpu::queries::slope;
use crate::gpu::tables::BucketSums;
use crate::gpu::tile::{Operands, TileRows, bias, sees, sigmoid, time_bucket};

/// The queries and keys of a tile of scores.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Pairs {
    pub(super) queries: TileRows,
    pub(super) keys: TileRows,
    /// Whether every query sees every key, and there are as many of both as the tile has room for.
    full: bool,
    /// Whether rows of the tile are keys, and columns queries.
    #[cube(comptime)]
    turned: bool,
}

/// The pairs of a tile whose rows are queries.
#[cube]
pub(super) fn by_query<E: Float>(
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    #[comptime] plan: MmaPlan,
) -> Pairs {
    let (rows, columns) = comptime!((plan.rows() as u32, plan.columns as u32));
    let full = all_seen::<E>(operands, queries, keys, rows, columns);
    Pairs { queries, keys, full, turned: false }
}

/// The pairs of a tile whose rows are keys.
#[cube]
pub(super) fn by_key<E: Float>(
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    #[comptime] plan: MmaPlan,
) -> Pairs {
    let (rows, columns) = comptime!((plan.rows() as u32, plan.columns as u32));
    let full = all_seen::<E>(operands, queries, keys, columns, rows);
    Pairs { queries, keys, full, turned: true }
}

#[cube]
fn all_seen<E: Float>(
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    #[comptime] of_queries: u32,
    #[comptime] of_keys: u32,
) -> bool {
    let last_query = queries.position + comptime!(of_queries - 1) * queries.step;
    let last_key = keys.position + comptime!(of_keys - 1);
    let near = last_query < keys.position + operands.recent || last_key < operands.global;
    let all = queries.count == of_queries && keys.count == of_keys;
    all && keys.step == 1 && last_key <= queries.position && near
}

#[cube]
impl Pairs {
    fn query(&self, row: u32, column: u32) -> u32 {
        let turned = self.turned;
        if comptime!(turned) { column } else { row }
    }

    fn key(&self, row: u32, column: u32) -> u32 {
        let turned = self.turned;
        if comptime!(turned) { row } else { column }
    }

    fn seen<E: Float>(&self, operands: &Operands<E>, row: u32, column: u32) -> bool {
        let (i, j) = (self.query(row, column), self.key(row, column));
        self.full || sees::<E>(operands, self.queries, self.keys, i, j)
    }

    fn score<E: Float>(&self, operands: &Operands<E>, dot: f32, row: u32, column: u32) -> f32 {
        let (i, j) = (self.query(row, column), self.key(row, column));
        operands.alpha * dot + bias::<E>(operands, self.queries, self.keys, i, j)
    }
}

/// The row of the tile that the unit has in one fragment.
#[cube]
fn row_of(place: FragmentPlace, #[comptime] down: usize, #[comptime] lower: usize) -> u32 {
    place.row + comptime!((down * STEP + lower * 8) as u32) + place.lane_row
}

#[cube]
fn column_of(
    place: FragmentPlace,
    #[comptime] across: usize,
    #[comptime] side: usize,
    #[comptime] plan: MmaPlan,
) -> u32 {
    let first = place.across * comptime!(plan.columns_a_warp() as u32);
    first + comptime!((across * COLUMNS + side) as u32) + place.lane_column
}

/// Turns dot products into weights.
#[cube]
pub(super) fn weigh<E: Float>(
    scores: &mut FragmentSums,
    operands: &Operands<E>,
    pairs: Pairs,
    #[comptime] plan: MmaPlan,
) {
    let place = place(plan);
    #[unroll]
    for down in 0..comptime!(scores.down) {
        #[unroll]
        for across in 0..comptime!(scores.across) {
            #[unroll]
            for lower in 0..2usize {
                let dots = scores.pair(down, across, lower);
                let mut weights = PairVector::<f32>::new(0.0f32);
                #[unroll]
                for side in 0..2usize {
                    let row = row_of(place, down, lower);
                    let column = column_of(place, across, side, plan);
                    if pairs.seen::<E>(operands, row, column) {
                        let score = pairs.score::<E>(operands, dots[side], row, column);
                        weights[side] = score * sigmoid(score) * operands.inverse_norm;
                    }
                }
                scores.set(down, across, lower, weights);
            }
        }
    }
}

/// Turns dot products into weights, and the gradients of weights into those of scores.
#[cube]
pub(super) fn differentiate<E: Float>(
    scores: &mut FragmentSums,
    grads: &mut FragmentSums,
    operands: &Operands<E>,
    pairs: Pairs,
    #[comptime] plan: MmaPlan,
) {
    let place = place(plan);
    #[unroll]
    for down in 0..comptime!(scores.down) {
        #[unroll]
        for across in 0..comptime!(scores.across) {
            #[unroll]
            for lower in 0..2usize {
                let dots = scores.pair(down, across, lower);
                let of_weights = grads.pair(down, across, lower);
                let mut weights = PairVector::<f32>::new(0.0f32);
                let mut of_scores = PairVector::<f32>::new(0.0f32);
                #[unroll]
                for side in 0..2usize {
                    let row = row_of(place, down, lower);
                    let column = column_of(place, across, side, plan);
                    if pairs.seen::<E>(operands, row, column) {
                        let score = pairs.score::<E>(operands, dots[side], row, column);
                        weights[side] = score * sigmoid(score) * operands.inverse_norm;
                        of_scores[side] = of_weights[side] * slope(score) * operands.inverse_norm;
                    }
                }
                scores.set(down, across, lower, weights);
                grads.set(down, across, lower, of_scores);
            }
        }
    }
}

/// Adds dS to the unit's sums by time bucket.
#[cube]
pub(super) fn add_buckets<E: Float>(
    grads: &FragmentSums,
    operands: &Operands<E>,
    pairs: Pairs,
    by_bucket: &mut BucketSums,
    #[comptime] plan: MmaPlan,
) {
    #[comptime]
    match &operands.time {
        ComptimeOption::Some(table) => {
            let place = place(plan);
            #[unroll]
            for down in 0..comptime!(grads.down) {
                #[unroll]
                for across in 0..comptime!(grads.across) {
                    #[unroll]
                    for lower in 0..2usize {
                        let found = grads.pair(down, across, lower);
                        #[unroll]
                        for side in 0..2usize {
                            let row = row_of(place, down, lower);
                            let column = column_of(place, across, side, plan);
                            if pairs.seen::<E>(operands, row, column) {
                                let query = pairs.queries.first + pairs.query(row, column);
                                let key = pairs.keys.first + pairs.key(row, column);
                                let bucket = time_bucket::<E>(operands, query, key);
                                by_bucket.add(bucket.min(table.len() - 1), found[side]);
                            }
                        }
                    }
                }
            }
        }
        ComptimeOption::None => {}
    }
}

/// Stores dS for `Distances`: `[rows, columns + 1]`, so that a diagonal's banks differ.
#[cube]
pub(super) fn put_grads(
    grads: &FragmentSums,
    memory: &mut SharedMemory<f32>,
    #[comptime] plan: MmaPlan,
) {
    let place = place(plan);
    #[unroll]
    for down in 0..comptime!(grads.down) {
        #[unroll]
        for across in 0..comptime!(grads.across) {
            #[unroll]
            for lower in 0..2usize {
                let found = grads.pair(down, across, lower);
                #[unroll]
                for side in 0..2usize {
                    let row = row_of(place, down, lower) as usize;
                    let column = column_of(place, across, side, plan) as usize;
                    memory[row * comptime!(plan.columns + 1) + column] = found[side];
                }
            }
        }
    }
}

/// Shared memory to exchange weights between warps, if the plan needs it.
#[cube]
pub(super) fn stash<E: Float>(#[comptime] plan: MmaPlan) -> ComptimeOption<Tile<E>> {
    match comptime!(plan.stashes()) {
        true => {
            let tile = tile::<E>(comptime!(plan.rows()), plan.columns, plan);
            ComptimeOption::new_Some(tile)
        }
        false => ComptimeOption::new_None(),
    }
}
