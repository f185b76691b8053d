//! The forward kernel: one workgroup per block of queries and head.
//!
//! While one tile of keys and values is multiplied, the next one is copied to the other buffer. If
//! one warp has all keys of its queries, weights go from the registers of the first product to
//! those of the second without passing through memory.

use cubecl::prelude::*;

use super::fragment::{Summed, add_weighted, dot_products, place, put, sums, write};
use super::plan::{COLUMNS, MmaPlan};
use super::scores::{by_query, stash, weigh};
use super::shared::{SharedSource, Tile, arrival, tile};
use crate::gpu::forward::{ForwardItem, item, keys};
use crate::gpu::tile::{Operands, TileColumns, columns};

/// `out = A V`, `[H + R, heads * v]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(in crate::gpu) fn tensor_forward<E: Float>(
    operands: &Operands<E>,
    out: &mut Tensor<E>,
    #[comptime] plan: MmaPlan,
) {
    let rows = comptime!(plan.rows());
    let held = comptime!(plan.buffers * plan.columns);
    let mut q = tile::<E>(rows, plan.qk, plan);
    let mut k = tile::<E>(held, plan.qk, plan);
    let mut v = tile::<E>(held, plan.v, plan);
    let mut stash = stash::<E>(plan);
    let arrival = arrival(plan);
    let place = place(plan);
    let down = plan.row_fragments;
    let mut scores = sums(down, comptime!(plan.columns_a_warp() / COLUMNS));
    let v_a_warp = comptime!(plan.v / plan.column_warps);
    let mut outputs = sums(down, comptime!(v_a_warp / COLUMNS));
    let of_qk = columns(CUBE_POS_Y, operands.qk);
    let of_v = columns(CUBE_POS_Y, operands.v_dim);
    let column = place.across * comptime!(v_a_warp as u32);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        outputs.clear();
        if item.tiles > 0 {
            let queries = SharedSource { rows: item.queries, columns: of_qk };
            q.fill(&operands.q, queries, 0u32, rows, plan);
            fill_keys::<E>(operands, item, 0u32, of_qk, of_v, &mut k, &mut v, plan);
            arrival.expect();
        }
        for tile in 0..item.tiles {
            arrival.wait();
            let row = buffer(tile, plan);
            if comptime!(plan.buffers == 2) && tile + 1 < item.tiles {
                fill_keys::<E>(operands, item, tile + 1, of_qk, of_v, &mut k, &mut v, plan);
                arrival.expect();
            }
            let first = place.across * comptime!(plan.columns_a_warp() as u32);
            dot_products::<E>(&mut scores, &q, place.row, &k, row + first, plan);
            let keys = keys(item, tile, plan.columns);
            let pairs = by_query::<E>(operands, item.queries, keys, plan);
            weigh::<E>(&mut scores, operands, pairs, plan);
            put::<E>(&scores, &mut stash, place, plan);
            if comptime!(plan.stashes()) {
                sync_cube();
            }
            let summed = Summed { row, column };
            add_weighted::<E>(&mut outputs, &scores, &stash, place, &v, summed, plan);
            if comptime!(plan.buffers == 1) && tile + 1 < item.tiles {
                sync_cube();
                fill_keys::<E>(operands, item, tile + 1, of_qk, of_v, &mut k, &mut v, plan);
                arrival.expect();
            }
        }
        let to = SharedSource { rows: item.queries, columns: of_v };
        write::<E>(out, &outputs, place, to, column, 1.0f32);
        // The next item's first tiles go where slower warps may still read this one's last.
        sync_cube();
        index += CUBE_COUNT_X;
    }
}

/// The row of a tile's buffer.
#[cube]
pub(super) fn buffer(tile: u32, #[comptime] plan: MmaPlan) -> u32 {
    tile % comptime!(plan.buffers as u32) * comptime!(plan.columns as u32)
}

/// Starts to copy the keys and values of a tile.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn fill_keys<E: Float>(
    operands: &Operands<E>,
    item: ForwardItem,
    tile: u32,
    of_qk: TileColumns,
    of_v: TileColumns,
    k: &mut Tile<E>,
    v: &mut Tile<E>,
    #[comptime] plan: MmaPlan,
) {
    let rows = keys(item, tile, plan.columns);
    let at = buffer(tile, plan);
    k.fill(&operands.k, SharedSource { rows, columns: of_qk }, at, plan.columns, plan);
    v.fill(&operands.v, SharedSource { rows, columns: of_v }, at, plan.columns, plan);
}
