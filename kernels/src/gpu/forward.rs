//! The forward kernel: one workgroup per block of queries and head.
//!
//! It iterates over the tiles of keys that the block sees. Unlike softmax, SiLU weights need no
//! maximum and no rescaling, so a tile's weights are applied to its values at once and dropped.

use cubecl::prelude::*;

use super::tile::{
    Four, LANES, Operands, SIDE, TileRows, add_weighted, bias, columns, item_rows, multiply,
    put_weights, sees, shared, sigmoid, write, zero,
};
use super::work::{TILE, WORDS};

/// A `work::QueryItem`, as the kernel reads it.
#[derive(CubeType, Clone, Copy)]
pub(super) struct ForwardItem {
    pub(super) queries: TileRows,
    history: u32,
    end: u32,
    before: u32,
    skipped: u32,
    pub(super) tiles: u32,
}

#[cube]
pub(super) fn item(work: &Array<u32>, index: u32) -> ForwardItem {
    let at = index as usize * WORDS;
    ForwardItem {
        queries: item_rows(work, at),
        history: work[at + 4],
        end: work[at + 5],
        before: work[at + 6],
        skipped: work[at + 7],
        tiles: work[at + 8],
    }
}

/// The keys of a tile: the history's tiles except the skipped ones, then the targets themselves.
#[cube]
pub(super) fn keys(item: ForwardItem, tile: u32, #[comptime] columns: usize) -> TileRows {
    let columns = comptime!(columns as u32);
    let own = select(item.queries.step == 0, item.queries.count.div_ceil(columns), 0u32);
    let of_history = item.tiles - own;
    let itself = tile >= of_history;
    let index = select(tile < item.before, tile, tile + item.skipped);
    let position = index * columns;
    let target = (tile - of_history) * columns;
    let left = select(itself, item.queries.count - target, item.end - position);
    TileRows {
        first: select(itself, item.queries.first + target, item.history + position),
        count: left.min(columns),
        position: select(itself, item.queries.position, position),
        step: select(itself, 0u32, 1u32),
    }
}

/// `out = A V`, `[H + R, heads * v]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn forward<E: Float>(
    operands: &Operands<E>,
    out: &mut Tensor<E>,
    #[comptime] panels: usize,
) {
    let mut shared = shared();
    let mut scores = Array::<Four>::new(LANES);
    let mut sums = Array::<Four>::new(panels * LANES);
    let qk = columns(CUBE_POS_Y, operands.qk);
    let v = columns(CUBE_POS_Y, operands.v_dim);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        zero(&mut sums, panels * LANES);
        for tile in 0..item.tiles {
            let keys = keys(item, tile, TILE);
            let (queries_of, keys_of) = (&operands.q, &operands.k);
            multiply::<E>(&mut scores, queries_of, item.queries, keys_of, keys, qk, &mut shared);
            weigh::<E>(&mut scores, operands, item.queries, keys);
            put_weights(&scores, &mut shared);
            add_weighted::<E>(&mut sums, &operands.v, keys, v, &mut shared, panels);
        }
        write::<E>(out, &sums, item.queries, v, 1.0f32, panels);
        index += CUBE_COUNT_X;
    }
}

/// Turns the dot products of the unit's queries (rows) and keys (columns) into weights.
#[cube]
fn weigh<E: Float>(
    scores: &mut Array<Four>,
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for c in 0..LANES {
        let dots = scores[c];
        let mut weights = Four::new(0.0f32);
        let j = (x + c * SIDE) as u32;
        #[unroll]
        for lane in 0..LANES {
            let i = (y + lane * SIDE) as u32;
            if sees::<E>(operands, queries, keys, i, j) {
                let score = operands.alpha * dots[lane] + bias::<E>(operands, queries, keys, i, j);
                weights[lane] = score * sigmoid(score) * operands.inverse_norm;
            }
        }
        scores[c] = weights;
    }
}
