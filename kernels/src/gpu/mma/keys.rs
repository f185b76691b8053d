//! The second backward kernel: gradients of the keys and values, by blocks of keys.
//!
//! Rows of its tiles are keys, columns the queries that see them. One workgroup sums a key's whole
//! gradient, without atomics and in a fixed order.

use cubecl::prelude::*;

use super::forward::buffer;
use super::fragment::{Summed, add_weighted, dot_products, place, put, sums, write};
use super::plan::{COLUMNS, MmaPlan};
use super::scores::{by_key, differentiate, stash};
use super::shared::{SharedSource, Tile, arrival, tile};
use crate::gpu::keys::{KeysItem, item, queries, tiles};
use crate::gpu::tile::{Operands, TileColumns, columns};

/// `dK = α dSᵀ Q` and `dV = Aᵀ dO`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(in crate::gpu) fn tensor_backward_keys<E: Float>(
    operands: &Operands<E>,
    grad: &Tensor<E>,
    dk: &mut Tensor<E>,
    dv: &mut Tensor<E>,
    #[comptime] plan: MmaPlan,
) {
    let rows = comptime!(plan.rows());
    let held = comptime!(plan.buffers * plan.columns);
    let mut k = tile::<E>(rows, plan.qk, plan);
    let mut v = tile::<E>(rows, plan.v, plan);
    let mut q = tile::<E>(held, plan.qk, plan);
    let mut g = tile::<E>(held, plan.v, plan);
    let mut weights_stash = stash::<E>(plan);
    let mut grads_stash = stash::<E>(plan);
    let arrival = arrival(plan);
    let place = place(plan);
    let down = plan.row_fragments;
    let mut scores = sums(down, comptime!(plan.columns_a_warp() / COLUMNS));
    let mut grads = sums(down, comptime!(plan.columns_a_warp() / COLUMNS));
    let qk_a_warp = comptime!(plan.qk / plan.column_warps);
    let v_a_warp = comptime!(plan.v / plan.column_warps);
    let mut dk_sums = sums(down, comptime!(qk_a_warp / COLUMNS));
    let mut dv_sums = sums(down, comptime!(v_a_warp / COLUMNS));
    let of_qk = columns(CUBE_POS_Y, operands.qk);
    let of_v = columns(CUBE_POS_Y, operands.v_dim);
    let qk_column = place.across * comptime!(qk_a_warp as u32);
    let v_column = place.across * comptime!(v_a_warp as u32);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        dk_sums.clear();
        dv_sums.clear();
        let of_history = tiles(item.to - item.from, plan.columns);
        let all = of_history + tiles(item.targets, plan.columns);
        if all > 0 {
            let rows_of = item.keys;
            k.fill(&operands.k, SharedSource { rows: rows_of, columns: of_qk }, 0u32, rows, plan);
            v.fill(&operands.v, SharedSource { rows: rows_of, columns: of_v }, 0u32, rows, plan);
            let (q, g) = (&mut q, &mut g);
            fill_queries::<E>(operands, grad, item, 0u32, of_history, of_qk, of_v, q, g, plan);
            arrival.expect();
        }
        for tile in 0..all {
            arrival.wait();
            let row = buffer(tile, plan);
            let next = tile + 1;
            if comptime!(plan.buffers == 2) && next < all {
                let (q, g) = (&mut q, &mut g);
                fill_queries::<E>(operands, grad, item, next, of_history, of_qk, of_v, q, g, plan);
                arrival.expect();
            }
            let first = row + place.across * comptime!(plan.columns_a_warp() as u32);
            dot_products::<E>(&mut scores, &k, place.row, &q, first, plan);
            dot_products::<E>(&mut grads, &v, place.row, &g, first, plan);
            let queries = queries(item, tile, of_history, plan.columns);
            let pairs = by_key::<E>(operands, queries, item.keys, plan);
            differentiate::<E>(&mut scores, &mut grads, operands, pairs, plan);
            put::<E>(&scores, &mut weights_stash, place, plan);
            put::<E>(&grads, &mut grads_stash, place, plan);
            if comptime!(plan.stashes()) {
                sync_cube();
            }
            let summed = Summed { row, column: v_column };
            add_weighted::<E>(&mut dv_sums, &scores, &weights_stash, place, &g, summed, plan);
            let summed = Summed { row, column: qk_column };
            add_weighted::<E>(&mut dk_sums, &grads, &grads_stash, place, &q, summed, plan);
            if comptime!(plan.buffers == 1) && next < all {
                sync_cube();
                let (q, g) = (&mut q, &mut g);
                fill_queries::<E>(operands, grad, item, next, of_history, of_qk, of_v, q, g, plan);
                arrival.expect();
            }
        }
        let to = SharedSource { rows: item.keys, columns: of_qk };
        write::<E>(dk, &dk_sums, place, to, qk_column, operands.alpha);
        let to = SharedSource { rows: item.keys, columns: of_v };
        write::<E>(dv, &dv_sums, place, to, v_column, 1.0f32);
        // The next item's first tiles go where slower warps may still read this one's last.
        sync_cube();
        index += CUBE_COUNT_X;
    }
}

/// Starts to copy the queries of a tile and the gradients of their outputs.
#[cube]
#[allow(clippy::too_many_arguments)]
fn fill_queries<E: Float>(
    operands: &Operands<E>,
    grad: &Tensor<E>,
    item: KeysItem,
    tile: u32,
    of_history: u32,
    of_qk: TileColumns,
    of_v: TileColumns,
    q: &mut Tile<E>,
    g: &mut Tile<E>,
    #[comptime] plan: MmaPlan,
) {
    let rows = queries(item, tile, of_history, plan.columns);
    let at = buffer(tile, plan);
    q.fill(&operands.q, SharedSource { rows, columns: of_qk }, at, plan.columns, plan);
    g.fill(grad, SharedSource { rows, columns: of_v }, at, plan.columns, plan);
}
