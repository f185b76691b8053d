//! The first backward kernel: gradients of the queries and of the tables, by blocks of queries.
//!
//! A workgroup keeps its queries' gradient in registers. It adds its part of the tables' gradients
//! to its own row of partial sums, which `tables` adds up in a fixed order, so results do not
//! depend on the order in which workgroups run.

use cubecl::prelude::*;

use super::forward::{item, keys};
use super::tables::{BucketSums, add_distances, add_far, begin_distances, bucket_sums};
use super::tile::{
    Four, LANES, Operands, SIDE, TileRows, add_weighted, bias, columns, multiply, put_weights,
    sees, shared, sigmoid, time_bucket, write, zero,
};
use super::work::TILE;

/// `dQ = α dS K`, and dS summed by distance and by time bucket into `partials`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn backward_queries<E: Float>(
    operands: &Operands<E>,
    grad: &Tensor<E>,
    dq: &mut Tensor<E>,
    partials: &mut Tensor<f32>,
    #[comptime] panels: usize,
    #[comptime] buckets: usize,
) {
    let mut shared = shared();
    let mut scores = Array::<Four>::new(LANES);
    let mut grads = Array::<Four>::new(LANES);
    let mut sums = Array::<Four>::new(panels * LANES);
    let mut by_bucket = bucket_sums(buckets);
    let mut far = 0.0f32;
    let qk = columns(CUBE_POS_Y, operands.qk);
    let v = columns(CUBE_POS_Y, operands.v_dim);
    let slot = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize;
    begin_distances::<E>(operands, partials, slot);
    let mut index = CUBE_POS_X;
    while index < operands.items {
        let item = item(&operands.work, index);
        let queries = item.queries;
        zero(&mut sums, panels * LANES);
        for tile in 0..item.tiles {
            let keys = keys(item, tile, TILE);
            multiply::<E>(&mut scores, &operands.q, queries, &operands.k, keys, qk, &mut shared);
            multiply::<E>(&mut grads, grad, queries, &operands.v, keys, v, &mut shared);
            differentiate::<E>(&scores, &mut grads, operands, queries, keys, &mut by_bucket);
            put_weights(&grads, &mut shared);
            add_weighted::<E>(&mut sums, &operands.k, keys, qk, &mut shared, panels);
            far += add_distances::<E>(operands, partials, slot, queries, keys, &shared);
        }
        write::<E>(dq, &sums, queries, qk, operands.alpha, panels);
        index += CUBE_COUNT_X;
    }
    add_far::<E>(operands, partials, slot, far, &mut shared.weights);
    by_bucket.write::<E>(operands, partials, slot, &mut shared.weights);
}

/// Turns dA into dS, given the dot products of the unit's queries (rows) and keys (columns).
#[cube]
fn differentiate<E: Float>(
    scores: &Array<Four>,
    grads: &mut Array<Four>,
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    by_bucket: &mut BucketSums,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for c in 0..LANES {
        let (dots, weights_grad) = (scores[c], grads[c]);
        let mut scores_grad = Four::new(0.0f32);
        let j = (x + c * SIDE) as u32;
        #[unroll]
        for lane in 0..LANES {
            let i = (y + lane * SIDE) as u32;
            if sees::<E>(operands, queries, keys, i, j) {
                let score = operands.alpha * dots[lane] + bias::<E>(operands, queries, keys, i, j);
                let found = weights_grad[lane] * slope(score) * operands.inverse_norm;
                scores_grad[lane] = found;
                #[comptime]
                match &operands.time {
                    ComptimeOption::Some(table) => {
                        let (row, key) = (queries.first + i, keys.first + j);
                        let bucket = time_bucket::<E>(operands, row, key);
                        by_bucket.add(bucket.min(table.len() - 1), found);
                    }
                    ComptimeOption::None => {}
                }
            }
        }
        grads[c] = scores_grad;
    }
}

/// The derivative of SiLU.
#[cube]
pub(super) fn slope(score: f32) -> f32 {
    let sigmoid = sigmoid(score);
    sigmoid + score * sigmoid * (1.0f32 - sigmoid)
}
