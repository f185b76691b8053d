//! The first backward kernel: gradients of the queries and of the tables, by blocks of queries.
//!
//! Like the forward kernel it copies one tile ahead. Its part of the tables' gradients goes to the
//! workgroup's row of partial sums, as described in `tables`.

use cubecl::prelude::*;

use super::forward::{buffer, fill_keys};
use super::fragment::{FragmentSums, Summed, add_weighted, dot_products, place, put, sums, write};
use super::plan::{COLUMNS, MmaPlan};
use super::scores::{Pairs, add_buckets, by_query, differentiate, put_grads, stash};
use super::shared::{SharedSource, arrival, tile};
use crate::gpu::forward::{item, keys};
use crate::gpu::tables::{add_far, begin_distances, bucket_sums};
use crate::gpu::tile::{Four, Operands, columns};

/// `dQ = α dS K`, and dS summed by distance and by time bucket into `partials`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(in crate::gpu) fn tensor_backward_queries<E: Float>(
    operands: &Operands<E>,
    grad: &Tensor<E>,
    dq: &mut Tensor<E>,
    partials: &mut Tensor<f32>,
    #[comptime] buckets: usize,
    #[comptime] plan: MmaPlan,
) {
    let rows = comptime!(plan.rows());
    let held = comptime!(plan.buffers * plan.columns);
    let mut q = tile::<E>(rows, plan.qk, plan);
    let mut g = tile::<E>(rows, plan.v, plan);
    let mut k = tile::<E>(held, plan.qk, plan);
    let mut v = tile::<E>(held, plan.v, plan);
    let mut stash = stash::<E>(plan);
    let mut scratch = SharedMemory::<Four>::new(comptime!(plan.units()));
    let mut by_pair = by_pair(operands.position.is_some(), plan);
    let arrival = arrival(plan);
    let place = place(plan);
    let down = plan.row_fragments;
    let mut scores = sums(down, comptime!(plan.columns_a_warp() / COLUMNS));
    let mut grads = sums(down, comptime!(plan.columns_a_warp() / COLUMNS));
    let qk_a_warp = comptime!(plan.qk / plan.column_warps);
    let mut outputs = sums(down, comptime!(qk_a_warp / COLUMNS));
    let mut by_bucket = bucket_sums(buckets);
    let mut far = 0.0f32;
    let of_qk = columns(CUBE_POS_Y, operands.qk);
    let of_v = columns(CUBE_POS_Y, operands.v_dim);
    let column = place.across * comptime!(qk_a_warp as u32);
    let slot = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize;
    begin_distances::<E>(operands, partials, slot);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        outputs.clear();
        if item.tiles > 0 {
            let rows_of = item.queries;
            q.fill(&operands.q, SharedSource { rows: rows_of, columns: of_qk }, 0u32, rows, plan);
            g.fill(grad, SharedSource { rows: rows_of, columns: of_v }, 0u32, rows, plan);
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
            let first = row + place.across * comptime!(plan.columns_a_warp() as u32);
            dot_products::<E>(&mut scores, &q, place.row, &k, first, plan);
            dot_products::<E>(&mut grads, &g, place.row, &v, first, plan);
            let keys = keys(item, tile, plan.columns);
            let pairs = by_query::<E>(operands, item.queries, keys, plan);
            differentiate::<E>(&mut scores, &mut grads, operands, pairs, plan);
            add_buckets::<E>(&grads, operands, pairs, &mut by_bucket, plan);
            put::<E>(&grads, &mut stash, place, plan);
            far += add_distances::<E>(operands, partials, slot, &grads, pairs, &mut by_pair, plan);
            if comptime!(plan.stashes()) {
                sync_cube();
            }
            let summed = Summed { row, column };
            add_weighted::<E>(&mut outputs, &grads, &stash, place, &k, summed, plan);
            if comptime!(plan.buffers == 1) && tile + 1 < item.tiles {
                sync_cube();
                fill_keys::<E>(operands, item, tile + 1, of_qk, of_v, &mut k, &mut v, plan);
                arrival.expect();
            }
        }
        let to = SharedSource { rows: item.queries, columns: of_qk };
        write::<E>(dq, &outputs, place, to, column, operands.alpha);
        // The next item's first tiles go where slower warps may still read this one's last.
        sync_cube();
        index += CUBE_COUNT_X;
    }
    add_far::<E>(operands, partials, slot, far, &mut scratch);
    by_bucket.write::<E>(operands, partials, slot, &mut scratch);
}

/// Shared memory for dS by row and column, from which distances are summed.
#[cube]
fn by_pair(
    #[comptime] needed: bool,
    #[comptime] plan: MmaPlan,
) -> ComptimeOption<SharedMemory<f32>> {
    match comptime!(needed) {
        true => ComptimeOption::new_Some(SharedMemory::<f32>::new(comptime!(
            plan.rows() * (plan.columns + 1)
        ))),
        false => ComptimeOption::new_None(),
    }
}

/// Adds the tile's dS to the workgroup's row by distance; returns the unit's sum for the
/// last entry, which many distances share. All units must call it together.
#[cube]
fn add_distances<E: Float>(
    operands: &Operands<E>,
    partials: &mut Tensor<f32>,
    slot: usize,
    grads: &FragmentSums,
    pairs: Pairs,
    by_pair: &mut ComptimeOption<SharedMemory<f32>>,
    #[comptime] plan: MmaPlan,
) -> f32 {
    let mut far = 0.0f32;
    #[comptime]
    match &operands.position {
        ComptimeOption::Some(table) =>
        {
            #[comptime]
            match by_pair {
                ComptimeOption::Some(memory) => {
                    far = add_diagonals(table.len(), partials, slot, grads, pairs, memory, plan);
                }
                ComptimeOption::None => {}
            }
        }
        ComptimeOption::None => {}
    }
    far
}

/// Adds the sums of the tile's diagonals; returns the unit's sum of those beyond the table.
#[cube]
fn add_diagonals(
    entries: usize,
    partials: &mut Tensor<f32>,
    slot: usize,
    grads: &FragmentSums,
    pairs: Pairs,
    memory: &mut SharedMemory<f32>,
    #[comptime] plan: MmaPlan,
) -> f32 {
    let mut far = 0.0f32;
    // The last tile's sums are read to the end before this barrier's other side.
    sync_cube();
    put_grads(grads, memory, plan);
    sync_cube();
    let spread = (pairs.queries.position - pairs.keys.position) as i32;
    let (rows, columns) = comptime!((plan.rows() as i32, plan.columns as i32));
    let least = (spread - (columns - 1) * pairs.keys.step as i32).max(0);
    let most = spread + (rows - 1) * pairs.queries.step as i32;
    // Each unit has the distances that leave its number, divided by their number.
    let turn = (UNIT_POS + CUBE_DIM - least as u32 % CUBE_DIM) % CUBE_DIM;
    let mut distance = least + turn as i32;
    while distance <= most {
        let sum = diagonal(memory, pairs, spread - distance, plan);
        if (distance as usize) < entries - 1 {
            partials[slot * partials.stride(0) + distance as usize] += sum;
        } else {
            far += sum;
        }
        distance += CUBE_DIM as i32;
    }
    far
}

/// The sum of dS over the queries i, each with key `first + i` (or key `first`, where queries have
/// no step; or itself, where keys have none) if the tile has it.
#[cube]
fn diagonal(
    memory: &SharedMemory<f32>,
    pairs: Pairs,
    first: i32,
    #[comptime] plan: MmaPlan,
) -> f32 {
    let mut sum = 0.0f32;
    let alone = pairs.keys.step == 0;
    let step = select(alone, 1i32, pairs.queries.step as i32);
    let first = select(alone, pairs.queries.first as i32 - pairs.keys.first as i32, first);
    for row in 0..comptime!(plan.rows()) {
        let key = first + step * row as i32;
        if key >= 0 && key < comptime!(plan.columns as i32) {
            sum += memory[row * comptime!(plan.columns + 1) + key as usize];
        }
    }
    sum
}
