//! Gradients of the bias tables: sums of dS by distance and by time bucket.
//!
//! Every workgroup of `queries` has its own row of partial sums, `[position entries, time
//! entries]`, in which every unit has its own entries. `column_sums` then adds the rows up. There
//! are no atomics, and the order of every sum is fixed.

use cubecl::prelude::*;

use super::tile::{Four, LANES, Operands, SIDE, TileMemory, TileRows, UNITS, sum_over_units};
use super::work::TILE;

/// One unit's sums by time bucket.
#[derive(CubeType)]
pub(super) struct BucketSums {
    sums: Array<f32>,
    #[cube(comptime)]
    len: usize,
}

#[cube]
pub(super) fn bucket_sums(#[comptime] len: usize) -> BucketSums {
    let mut sums = Array::<f32>::new(len);
    for i in 0..len {
        sums[i] = 0.0f32;
    }
    BucketSums { sums, len }
}

#[cube]
impl BucketSums {
    pub(super) fn add(&mut self, bucket: usize, value: f32) {
        self.sums[bucket] += value;
    }

    /// Writes the workgroup's sums to its row. All units must call it together.
    pub(super) fn write<E: Float>(
        &self,
        operands: &Operands<E>,
        partials: &mut Tensor<f32>,
        slot: usize,
        scratch: &mut SharedMemory<Four>,
    ) {
        #[comptime]
        match &operands.time {
            ComptimeOption::Some(table) => {
                let start = slot * partials.stride(0) + partials.shape(1) - table.len();
                for first in range_stepped(0usize, self.len, LANES) {
                    let mut four = Four::new(0.0f32);
                    #[unroll]
                    for lane in 0..LANES {
                        four[lane] = self.sums[first + lane];
                    }
                    let four = sum_over_units(four, scratch);
                    #[unroll]
                    for lane in 0..LANES {
                        if UNIT_POS == 0 && first + lane < table.len() {
                            partials[start + first + lane] = four[lane];
                        }
                    }
                }
                // No distance is so great that it had a bucket beyond these.
                let mut entry = self.len + UNIT_POS as usize;
                while entry < table.len() {
                    partials[start + entry] = 0.0f32;
                    entry += CUBE_DIM as usize;
                }
            }
            ComptimeOption::None => {}
        }
    }
}

/// Zeros the distances of the workgroup's row; unit u has those that leave u divided by the
/// number of units.
#[cube]
pub(super) fn begin_distances<E: Float>(
    operands: &Operands<E>,
    partials: &mut Tensor<f32>,
    slot: usize,
) {
    #[comptime]
    match &operands.position {
        ComptimeOption::Some(table) => {
            let start = slot * partials.stride(0);
            let mut entry = UNIT_POS as usize;
            while entry < table.len() {
                partials[start + entry] = 0.0f32;
                entry += CUBE_DIM as usize;
            }
        }
        ComptimeOption::None => {}
    }
}

/// Adds the tile's dS, rows queries and columns keys, to the row by distance. Returns the unit's
/// sum for the last entry, which many distances share. The whole tile must be in `shared`, and the
/// workgroup must have passed a barrier since it was written.
#[cube]
pub(super) fn add_distances<E: Float>(
    operands: &Operands<E>,
    partials: &mut Tensor<f32>,
    slot: usize,
    queries: TileRows,
    keys: TileRows,
    shared: &TileMemory,
) -> f32 {
    let mut far = 0.0f32;
    #[comptime]
    match &operands.position {
        ComptimeOption::Some(table) => {
            // The tile has fewer distances than there are units, so each has one at most.
            let spread = (queries.position - keys.position) as i32;
            let least = (spread - (TILE as i32 - 1) * keys.step as i32).max(0);
            let most = spread + (TILE as i32 - 1) * queries.step as i32;
            let turn = (UNIT_POS + UNITS - least as u32 % UNITS) % UNITS;
            let distance = least + turn as i32;
            if distance <= most {
                let sum = diagonal(shared, spread - distance, queries.step, keys.step);
                if (distance as usize) < table.len() - 1 {
                    partials[slot * partials.stride(0) + distance as usize] += sum;
                } else {
                    far += sum;
                }
            }
        }
        ComptimeOption::None => {}
    }
    far
}

/// The sum of dS over the queries i, each with key `first + i` (or key `first`, where
/// queries have no step; or key i, where keys have none) if the tile has it.
#[cube]
fn diagonal(shared: &TileMemory, first: i32, queries_step: u32, keys_step: u32) -> f32 {
    let mut sum = 0.0f32;
    let step = select(keys_step == 0, 1i32, queries_step as i32);
    for group in 0..SIDE {
        #[unroll]
        for lane in 0..LANES {
            let key = first + step * (group + lane * SIDE) as i32;
            if key >= 0 && key < TILE as i32 {
                sum += shared.weight(key as usize, group)[lane];
            }
        }
    }
    sum
}

/// Adds the units' sums for the last entry. All units must call it together.
#[cube]
pub(super) fn add_far<E: Float>(
    operands: &Operands<E>,
    partials: &mut Tensor<f32>,
    slot: usize,
    far: f32,
    scratch: &mut SharedMemory<Four>,
) {
    #[comptime]
    match &operands.position {
        ComptimeOption::Some(table) => {
            let sum = sum_over_units(Four::new(far), scratch);
            if UNIT_POS == 0 {
                partials[slot * partials.stride(0) + table.len() - 1] = sum[0];
            }
        }
        ComptimeOption::None => {}
    }
}
