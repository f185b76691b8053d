//! The second backward kernel: gradients of the keys and values, by blocks of keys.
//!
//! The tiles are the transpose of those of the other kernels: rows are keys, columns the queries
//! that see them. One workgroup therefore sums a key's whole gradient without atomics, at the price
//! of computing the scores a second time.

use cubecl::prelude::*;

use super::queries::slope;
use super::tile::{
    Four, LANES, Operands, SIDE, TileRows, add_weighted, bias, columns, item_rows, multiply,
    put_weights, sees, shared, sigmoid, write, zero,
};
use super::work::{TILE, WORDS};

/// A `work::KeyItem`, as the kernel reads it.
#[derive(CubeType, Clone, Copy)]
pub(super) struct KeysItem {
    pub(super) keys: TileRows,
    history: u32,
    pub(super) from: u32,
    pub(super) to: u32,
    first_target: u32,
    pub(super) targets: u32,
    n: u32,
}

#[cube]
pub(super) fn item(work: &Array<u32>, index: u32) -> KeysItem {
    let at = index as usize * WORDS;
    KeysItem {
        keys: item_rows(work, at),
        history: work[at + 4],
        from: work[at + 5],
        to: work[at + 6],
        first_target: work[at + 7],
        targets: work[at + 8],
        n: work[at + 9],
    }
}

/// The queries of a tile: `of_history` tiles of history tokens, then the targets.
#[cube]
pub(super) fn queries(
    item: KeysItem,
    tile: u32,
    of_history: u32,
    #[comptime] columns: usize,
) -> TileRows {
    let columns = comptime!(columns as u32);
    let in_history = tile < of_history;
    let position = item.from + tile * columns;
    let target = (tile - of_history) * columns;
    let left = select(in_history, item.to - position, item.targets - target);
    TileRows {
        first: select(in_history, item.history + position, item.first_target + target),
        count: left.min(columns),
        position: select(in_history, position, item.n),
        step: select(in_history, 1u32, 0u32),
    }
}

#[cube]
pub(super) fn tiles(count: u32, #[comptime] columns: usize) -> u32 {
    count.div_ceil(comptime!(columns as u32))
}

/// `dK = α dSᵀ Q` and `dV = Aᵀ dO`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn backward_keys<E: Float>(
    operands: &Operands<E>,
    grad: &Tensor<E>,
    dk: &mut Tensor<E>,
    dv: &mut Tensor<E>,
    #[comptime] qk_panels: usize,
    #[comptime] v_panels: usize,
) {
    let mut shared = shared();
    let mut scores = Array::<Four>::new(LANES);
    let mut grads = Array::<Four>::new(LANES);
    let mut dk_sums = Array::<Four>::new(qk_panels * LANES);
    let mut dv_sums = Array::<Four>::new(v_panels * LANES);
    let qk = columns(CUBE_POS_Y, operands.qk);
    let v = columns(CUBE_POS_Y, operands.v_dim);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        let keys = item.keys;
        zero(&mut dk_sums, qk_panels * LANES);
        zero(&mut dv_sums, v_panels * LANES);
        let of_history = tiles(item.to - item.from, TILE);
        for tile in 0..of_history + tiles(item.targets, TILE) {
            let queries = queries(item, tile, of_history, TILE);
            multiply::<E>(&mut scores, &operands.k, keys, &operands.q, queries, qk, &mut shared);
            multiply::<E>(&mut grads, &operands.v, keys, grad, queries, v, &mut shared);
            differentiate::<E>(&mut scores, &mut grads, operands, queries, keys);
            put_weights(&scores, &mut shared);
            add_weighted::<E>(&mut dv_sums, grad, queries, v, &mut shared, v_panels);
            sync_cube();
            put_weights(&grads, &mut shared);
            add_weighted::<E>(&mut dk_sums, &operands.q, queries, qk, &mut shared, qk_panels);
        }
        write::<E>(dk, &dk_sums, keys, qk, operands.alpha, qk_panels);
        write::<E>(dv, &dv_sums, keys, v, 1.0f32, v_panels);
        index += CUBE_COUNT_X;
    }
}

/// Turns the dot products of the unit's keys (rows) and queries (columns) into weights, and dA into
/// dS.
#[cube]
fn differentiate<E: Float>(
    scores: &mut Array<Four>,
    grads: &mut Array<Four>,
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for c in 0..LANES {
        let (dots, weights_grad) = (scores[c], grads[c]);
        let mut weights = Four::new(0.0f32);
        let mut scores_grad = Four::new(0.0f32);
        let i = (x + c * SIDE) as u32;
        #[unroll]
        for lane in 0..LANES {
            let j = (y + lane * SIDE) as u32;
            if sees::<E>(operands, queries, keys, i, j) {
                let score = operands.alpha * dots[lane] + bias::<E>(operands, queries, keys, i, j);
                weights[lane] = score * sigmoid(score) * operands.inverse_norm;
                scores_grad[lane] = weights_grad[lane] * slope(score) * operands.inverse_norm;
            }
        }
        scores[c] = weights;
        grads[c] = scores_grad;
    }
}
