//! Products of tiles, sixteen rows by eight columns at a time.
//!
//! A warp has its sums in registers, in the layout of `mma.m16n8k16`: lane l holds, of each
//! fragment, rows `l / 4` and `l / 4 + 8` and the two columns from `2 (l % 4)`. On tensor cores
//! one instruction updates a fragment; without them each unit computes the same four values from
//! shared memory. The rest of the kernels does not depend on which of the two it is.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::plan::{COLUMNS, MmaPlan, STEP, WARP};
use super::shared::{SharedSource, Tile};

/// Two neighbouring values in a row.
pub(super) type PairVector<T> = Vector<T, Const<2>>;

/// A warp's part of a product.
#[derive(CubeType)]
pub(super) struct FragmentSums {
    fragments: Sequence<Array<PairVector<f32>>>,
    #[cube(comptime)]
    pub(super) down: usize,
    #[cube(comptime)]
    pub(super) across: usize,
}

/// The position of a warp in the tile of scores, and of a unit in the warp.
#[derive(CubeType, Clone, Copy)]
pub(super) struct FragmentPlace {
    /// The warp's first row.
    pub(super) row: u32,
    /// The warp's index across the columns.
    pub(super) across: u32,
    /// The unit's row in a fragment; its other one is 8 below.
    pub(super) lane_row: u32,
    /// The unit's first column in a fragment.
    pub(super) lane_column: u32,
}

#[cube]
pub(super) fn place(#[comptime] plan: MmaPlan) -> FragmentPlace {
    let lane = UNIT_POS % WARP as u32;
    let warp = UNIT_POS / WARP as u32;
    let rows = comptime!((plan.row_fragments * STEP) as u32);
    let across = comptime!(plan.column_warps as u32);
    FragmentPlace {
        row: warp / across * rows,
        across: warp % across,
        lane_row: lane / 4,
        lane_column: lane % 4 * 2,
    }
}

/// Zero sums of `down` by `across` fragments.
#[cube]
pub(super) fn sums(#[comptime] down: usize, #[comptime] across: usize) -> FragmentSums {
    let mut fragments = Sequence::<Array<PairVector<f32>>>::new();
    #[unroll]
    for _ in 0..comptime!(down * across) {
        fragments.push(Array::<PairVector<f32>>::new(2usize));
    }
    FragmentSums { fragments, down, across }
}

#[cube]
impl FragmentSums {
    pub(super) fn clear(&mut self) {
        #[unroll]
        for fragment in 0..comptime!(self.down * self.across) {
            let values = self.fragments.index_mut(fragment);
            values[0] = PairVector::<f32>::new(0.0f32);
            values[1] = PairVector::<f32>::new(0.0f32);
        }
    }

    /// The unit's pair of one fragment: of its upper row (0) or its lower one (1).
    pub(super) fn pair(
        &self,
        #[comptime] down: usize,
        #[comptime] across: usize,
        #[comptime] lower: usize,
    ) -> PairVector<f32> {
        let at = comptime!(down * self.across + across);
        self.fragments.index(at)[lower]
    }

    /// Adds a pair of the right factor, times the left one's two rows.
    fn add(
        &mut self,
        #[comptime] down: usize,
        #[comptime] across: usize,
        pair: PairVector<f32>,
        upper: f32,
        lower: f32,
    ) {
        let sum = self.pair(down, across, 0usize) + pair * PairVector::<f32>::new(upper);
        self.set(down, across, 0usize, sum);
        let sum = self.pair(down, across, 1usize) + pair * PairVector::<f32>::new(lower);
        self.set(down, across, 1usize, sum);
    }

    pub(super) fn set(
        &mut self,
        #[comptime] down: usize,
        #[comptime] across: usize,
        #[comptime] lower: usize,
        pair: PairVector<f32>,
    ) {
        let at = comptime!(down * self.across + across);
        let values = self.fragments.index_mut(at);
        values[lower] = pair;
    }
}

/// Sets `sums` to the dot products of the left tile's rows from `left_row` on with the right
/// tile's from `right_row` on.
#[cube]
pub(super) fn dot_products<E: Float>(
    sums: &mut FragmentSums,
    left: &Tile<E>,
    left_row: u32,
    right: &Tile<E>,
    right_row: u32,
    #[comptime] plan: MmaPlan,
) {
    sums.clear();
    if comptime!(plan.tensor_cores) {
        let instruction = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
        for step in 0..comptime!(left.width / STEP) {
            let depth = (step * STEP) as u32;
            let mut lefts = Sequence::<Array<PairVector<E>>>::new();
            #[unroll]
            for down in 0..comptime!(sums.down) {
                let row = left_row + comptime!((down * STEP) as u32);
                lefts.push(left_fragment::<E>(left, row, depth));
            }
            #[unroll]
            for two in 0..comptime!(sums.across / 2) {
                let row = right_row + comptime!((two * STEP) as u32);
                let rights = right_fragments::<E>(right, row, depth);
                multiply::<E>(sums, &lefts, &rights, two, &instruction);
            }
        }
    } else {
        let lane = UNIT_POS % WARP as u32;
        for k in 0..left.width {
            #[unroll]
            for down in 0..comptime!(sums.down) {
                let row = left_row + comptime!((down * STEP) as u32) + lane / 4;
                let upper_at = row as usize * left.pitch + k;
                let upper = f32::cast_from(left.memory[upper_at]);
                let lower = f32::cast_from(left.memory[upper_at + comptime!(8 * left.pitch)]);
                #[unroll]
                for across in 0..comptime!(sums.across) {
                    let other = right_row + comptime!((across * COLUMNS) as u32) + lane % 4 * 2;
                    let right_at = other as usize * right.pitch + k;
                    let mut pair = PairVector::<f32>::new(0.0f32);
                    pair[0] = f32::cast_from(right.memory[right_at]);
                    pair[1] = f32::cast_from(right.memory[right_at + right.pitch]);
                    sums.add(down, across, pair, upper, lower);
                }
            }
        }
    }
}

/// The rows of a matrix that are summed with weights.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Summed {
    /// The first row in the tile.
    pub(super) row: u32,
    /// The first column of the warp's part of the output.
    pub(super) column: u32,
}

/// Adds `weights * right` to `sums`, where the weights are the warp's `scores`.
///
/// If the plan stashes weights they are read from `stash`, and the workgroup must have passed a
/// barrier since `put`.
#[cube]
pub(super) fn add_weighted<E: Float>(
    sums: &mut FragmentSums,
    scores: &FragmentSums,
    stash: &ComptimeOption<Tile<E>>,
    place: FragmentPlace,
    right: &Tile<E>,
    summed: Summed,
    #[comptime] plan: MmaPlan,
) {
    #[comptime]
    match stash {
        ComptimeOption::Some(stash) => {
            if comptime!(plan.tensor_cores) {
                let instruction = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
                for step in 0..comptime!(plan.columns / STEP) {
                    let depth = (step * STEP) as u32;
                    let mut lefts = Sequence::<Array<PairVector<E>>>::new();
                    #[unroll]
                    for down in 0..comptime!(sums.down) {
                        let row = place.row + comptime!((down * STEP) as u32);
                        lefts.push(left_fragment::<E>(stash, row, depth));
                    }
                    add_step::<E>(sums, &lefts, right, summed, depth, &instruction);
                }
            } else {
                add_weighted_portable::<E>(sums, stash, place, right, summed, plan);
            }
        }
        ComptimeOption::None => {
            let instruction = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
            #[unroll]
            for step in 0..comptime!(plan.columns / STEP) {
                let mut lefts = Sequence::<Array<PairVector<E>>>::new();
                #[unroll]
                for down in 0..comptime!(sums.down) {
                    lefts.push(packed::<E>(scores, down, step));
                }
                let depth = comptime!((step * STEP) as u32).runtime();
                add_step::<E>(sums, &lefts, right, summed, depth, &instruction);
            }
        }
    }
}

/// Adds sixteen rows of the right tile, times the weights in `lefts`.
#[cube]
fn add_step<E: Float>(
    sums: &mut FragmentSums,
    lefts: &Sequence<Array<PairVector<E>>>,
    right: &Tile<E>,
    summed: Summed,
    depth: u32,
    instruction: &MmaDefinition<E, E, f32>,
) {
    #[unroll]
    for two in 0..comptime!(sums.across / 2) {
        let column = summed.column + comptime!((two * STEP) as u32);
        let rights = turned_fragments::<E>(right, summed.row + depth, column);
        multiply::<E>(sums, lefts, &rights, two, instruction);
    }
}

#[cube]
fn add_weighted_portable<E: Float>(
    sums: &mut FragmentSums,
    stash: &Tile<E>,
    place: FragmentPlace,
    right: &Tile<E>,
    summed: Summed,
    #[comptime] plan: MmaPlan,
) {
    for k in 0..plan.columns {
        #[unroll]
        for down in 0..comptime!(sums.down) {
            let row = place.row + comptime!((down * STEP) as u32) + place.lane_row;
            let upper_at = row as usize * stash.pitch + k;
            let upper = f32::cast_from(stash.memory[upper_at]);
            let lower = f32::cast_from(stash.memory[upper_at + comptime!(8 * stash.pitch)]);
            #[unroll]
            for across in 0..comptime!(sums.across) {
                let column =
                    summed.column + comptime!((across * COLUMNS) as u32) + place.lane_column;
                let right_at = (summed.row as usize + k) * right.pitch + column as usize;
                let mut pair = PairVector::<f32>::new(0.0f32);
                pair[0] = f32::cast_from(right.memory[right_at]);
                pair[1] = f32::cast_from(right.memory[right_at + 1]);
                sums.add(down, across, pair, upper, lower);
            }
        }
    }
}

/// Stores the warp's weights for all warps; the caller waits at a barrier.
#[cube]
pub(super) fn put<E: Float>(
    scores: &FragmentSums,
    stash: &mut ComptimeOption<Tile<E>>,
    place: FragmentPlace,
    #[comptime] plan: MmaPlan,
) {
    #[comptime]
    match stash {
        ComptimeOption::Some(stash) => {
            let first = place.across * comptime!(plan.columns_a_warp() as u32) + place.lane_column;
            #[unroll]
            for down in 0..comptime!(scores.down) {
                #[unroll]
                for across in 0..comptime!(scores.across) {
                    #[unroll]
                    for lower in 0..2usize {
                        let row = place.row
                            + comptime!((down * STEP + lower * 8) as u32)
                            + place.lane_row;
                        let column = first + comptime!((across * COLUMNS) as u32);
                        let at = row as usize * stash.pitch + column as usize;
                        let pair = scores.pair(down, across, lower);
                        stash.memory[at] = E::cast_from(pair[0]);
                        stash.memory[at + 1] = E::cast_from(pair[1]);
                    }
                }
            }
        }
        ComptimeOption::None => {}
    }
}

/// Writes `factor * sums` to rows of a matrix: as many as there are, from the warp's row on.
#[cube]
pub(super) fn write<E: Float>(
    out: &mut Tensor<E>,
    sums: &FragmentSums,
    place: FragmentPlace,
    to: SharedSource,
    column: u32,
    factor: f32,
) {
    #[unroll]
    for down in 0..comptime!(sums.down) {
        #[unroll]
        for lower in 0..2usize {
            let row = place.row + comptime!((down * STEP + lower * 8) as u32) + place.lane_row;
            if row < to.rows.count {
                let start = (to.rows.first + row) as usize * out.stride(0);
                #[unroll]
                for across in 0..comptime!(sums.across) {
                    let pair = sums.pair(down, across, lower);
                    #[unroll]
                    for side in 0..2usize {
                        let column = column
                            + comptime!((across * COLUMNS + side) as u32)
                            + place.lane_column;
                        if column < to.columns.count {
                            let at = start + (to.columns.first + column) as usize;
                            out[at] = E::cast_from(factor * pair[side]);
                        }
                    }
                }
            }
        }
    }
}

/// Updates the two fragments of each row of `sums` from `2 two` on.
#[cube]
fn multiply<E: Float>(
    sums: &mut FragmentSums,
    lefts: &Sequence<Array<PairVector<E>>>,
    rights: &Array<PairVector<E>>,
    #[comptime] two: usize,
    instruction: &MmaDefinition<E, E, f32>,
) {
    #[unroll]
    for side in 0..2usize {
        let mut right = Array::<PairVector<E>>::new(2usize);
        right[0] = rights[comptime!(2 * side)];
        right[1] = rights[comptime!(2 * side + 1)];
        #[unroll]
        for down in 0..comptime!(sums.down) {
            let at = comptime!(down * sums.across + 2 * two + side);
            instruction.execute_inplace(lefts.index(down), &right, sums.fragments.index_mut(at));
        }
    }
}

/// Sixteen rows by sixteen columns, as a left factor.
#[cube]
fn left_fragment<E: Float>(tile: &Tile<E>, row: u32, depth: u32) -> Array<PairVector<E>> {
    let lane = UNIT_POS % WARP as u32;
    load::<E>(tile, row + lane % 16, depth + lane / 16 * 8, false)
}

/// Sixteen rows by sixteen columns, as two right factors whose columns the rows are.
#[cube]
fn right_fragments<E: Float>(tile: &Tile<E>, row: u32, depth: u32) -> Array<PairVector<E>> {
    let lane = UNIT_POS % WARP as u32;
    load::<E>(tile, row + lane / 16 * 8 + lane % 8, depth + lane / 8 % 2 * 8, false)
}

/// Sixteen rows by sixteen columns, as two right factors whose rows the rows are.
#[cube]
fn turned_fragments<E: Float>(tile: &Tile<E>, row: u32, column: u32) -> Array<PairVector<E>> {
    let lane = UNIT_POS % WARP as u32;
    load::<E>(tile, row + lane % 16, column + lane / 16 * 8, true)
}

/// Four matrices of 8 x 8, of which lane l gives the address of row `l % 8` of matrix `l / 8`.
#[cube]
fn load<E: Float>(
    tile: &Tile<E>,
    row: u32,
    column: u32,
    #[comptime] transposed: bool,
) -> Array<PairVector<E>> {
    let instruction = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let start = row as usize * tile.pitch + column as usize;
    let found = instruction.load_matrix::<E, Const<2>>(
        &tile.memory.slice(start, start + 8),
        MatrixIdent::A,
        4usize,
        transposed,
    );
    let mut fragments = Array::<PairVector<E>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        fragments[i] = PairVector::<E>::cast_from(found[i]);
    }
    fragments
}

/// Sixteen columns of weights as a left factor: where two fragments of sums hold them is where
/// the instruction takes them.
#[cube]
fn packed<E: Float>(
    scores: &FragmentSums,
    #[comptime] down: usize,
    #[comptime] step: usize,
) -> Array<PairVector<E>> {
    let mut fragment = Array::<PairVector<E>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let across = comptime!(2 * step + i / 2);
        fragment[i] = PairVector::<E>::cast_from(scores.pair(down, across, comptime!(i % 2)));
    }
    fragment
}
