//! Tiles of scores: their products, their sums and what is visible in them.
//!
//! A workgroup of [`UNITS`] units computes one tile of [`TILE`] x [`TILE`] pairs at a time. Unit
//! (y, x) of its 16 x 16 grid has the 4 x 4 pairs of rows y, y + 16, ... and columns x, x + 16, ...
//! in registers, so that the fourth part of a block is one vector everywhere. The
//! kernels choose which side is queries and which is keys.

use cubecl::prelude::*;

use super::work::TILE;

/// Units per workgroup.
pub(super) const UNITS: u32 = 256;
/// Units along a side of the workgroup's grid.
pub(super) const SIDE: usize = 16;
/// Rows of a block per unit, and values per vector.
pub(super) const LANES: usize = TILE / SIDE;
/// Distance between lines of shared memory: one more than a line, so that units that write a column
/// do not all use the same bank.
const PITCH: usize = SIDE + 1;
/// Steps of a product that are unrolled: enough for a unit to load ahead, and few enough for
/// drivers to compile the kernels in a second or two.
const QUAD: usize = 4;
/// Columns of an output that one pass over a tile sums.
pub(super) const PANEL: usize = SIDE * LANES;

/// Shared memory of a workgroup, in bytes.
pub(super) const SHARED_BYTES: usize = (2 * SIDE + TILE) * PITCH * LANES * size_of::<f32>();

/// Four values that are loaded together.
pub(super) type Four = Vector<f32, Const<4>>;

/// The inputs of every kernel: the op's inputs, the work items and the options.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Operands<E: Float> {
    pub(super) q: Tensor<E>,
    pub(super) k: Tensor<E>,
    pub(super) v: Tensor<E>,
    pub(super) position: ComptimeOption<Tensor<E>>,
    pub(super) time: ComptimeOption<Tensor<E>>,
    /// The work items, then the lower and upper halves of the times.
    pub(super) work: Array<u32>,
    pub(super) items: u32,
    pub(super) rows: u32,
    pub(super) alpha: f32,
    pub(super) inverse_norm: f32,
    /// The window; without one, a value above any distance.
    pub(super) recent: u32,
    pub(super) global: u32,
    pub(super) qk: u32,
    pub(super) v_dim: u32,
}

/// Consecutive rows of the matrices.
#[derive(CubeType, Clone, Copy)]
pub(super) struct TileRows {
    pub(super) first: u32,
    /// At most [`TILE`].
    pub(super) count: u32,
    /// The first row's position; its successors' are `step` apart.
    pub(super) position: u32,
    pub(super) step: u32,
}

/// The rows of a work item, which begins at `at`.
#[cube]
pub(super) fn item_rows(work: &Array<u32>, at: usize) -> TileRows {
    TileRows { first: work[at], count: work[at + 1], position: work[at + 2], step: work[at + 3] }
}

/// The columns of a head.
#[derive(CubeType, Clone, Copy)]
pub(super) struct TileColumns {
    pub(super) first: u32,
    pub(super) count: u32,
}

/// The shared memory of a workgroup.
#[derive(CubeType)]
pub(super) struct TileMemory {
    /// Steps of the left factor of a product, transposed: `[SIDE, PITCH]`.
    left: SharedMemory<Four>,
    /// Steps of the right factor, or rows of a matrix to sum.
    right: SharedMemory<Four>,
    /// The weights of the tile's pairs, `[columns, PITCH]`, a vector four of its rows.
    pub(super) weights: SharedMemory<Four>,
}

#[cube]
pub(super) fn shared() -> TileMemory {
    TileMemory {
        left: SharedMemory::<Four>::new(SIDE * PITCH),
        right: SharedMemory::<Four>::new(SIDE * PITCH),
        weights: SharedMemory::<Four>::new(TILE * PITCH),
    }
}

#[cube]
pub(super) fn columns(head: u32, count: u32) -> TileColumns {
    TileColumns { first: head * count, count }
}

#[cube]
pub(super) fn zero(values: &mut Array<Four>, #[comptime] len: usize) {
    #[unroll]
    for i in 0..len {
        values[i] = Four::new(0.0f32);
    }
}

/// Sets `products[c]` to the dot products of the unit's four left rows with its right row c.
///
/// All units of the workgroup must call it together: it waits for them.
#[cube]
pub(super) fn multiply<E: Float>(
    products: &mut Array<Four>,
    left: &Tensor<E>,
    left_rows: TileRows,
    right: &Tensor<E>,
    right_rows: TileRows,
    columns: TileColumns,
    shared: &mut TileMemory,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    zero(products, LANES);
    for step in range_stepped(0u32, columns.count, 16u32) {
        let column = step + x as u32;
        let inside = column < columns.count;
        let column = (columns.first + column) as usize;
        let four_left = gather::<E>(left, left_rows, y, column, inside);
        let four_right = gather::<E>(right, right_rows, y, column, inside);
        sync_cube();
        shared.left[x * PITCH + y] = four_left;
        shared.right[x * PITCH + y] = four_right;
        sync_cube();
        for quad in 0..quads(columns.count - step) {
            #[unroll]
            for k in 0..QUAD {
                let line = (quad * QUAD + k) * PITCH;
                let rows = shared.left[line + y];
                let others = shared.right[line + x];
                #[unroll]
                for c in 0..LANES {
                    products[c] += rows * Four::new(others[c]);
                }
            }
        }
    }
}

/// How many times [`QUAD`] staged lines hold the next of `left` steps; the rest is zero.
#[cube]
fn quads(left: u32) -> usize {
    left.min(16u32).div_ceil(QUAD as u32) as usize
}

/// Rows `group`, `group + 16`, ... of a block, in one column; zeros past its end.
#[cube]
fn gather<E: Float>(
    matrix: &Tensor<E>,
    rows: TileRows,
    group: usize,
    column: usize,
    inside: bool,
) -> Four {
    let mut four = Four::new(0.0f32);
    #[unroll]
    for lane in 0..LANES {
        let row = (group + lane * SIDE) as u32;
        if inside && row < rows.count {
            let at = (rows.first + row) as usize * matrix.stride(0) + column;
            four[lane] = f32::cast_from(matrix[at]);
        }
    }
    four
}

/// Stores the unit's weights for `add_weighted`. Every unit must have passed a barrier since the
/// previous weights were read.
#[cube]
pub(super) fn put_weights(weights: &Array<Four>, shared: &mut TileMemory) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for c in 0..LANES {
        shared.weights[(x + c * SIDE) * PITCH + y] = weights[c];
    }
}

/// Adds `weights * matrix[rows, columns]` to the unit's part of an output: `sums[panel * 4 + lane]`
/// has row y + 16 lane and the four columns from `panel * PANEL + 4 x`.
///
/// All units of the workgroup must call it together: it waits for them.
#[cube]
pub(super) fn add_weighted<E: Float>(
    sums: &mut Array<Four>,
    matrix: &Tensor<E>,
    rows: TileRows,
    columns: TileColumns,
    shared: &mut TileMemory,
    #[comptime] panels: usize,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for panel in 0..panels {
        for step in range_stepped(0u32, rows.count, 16u32) {
            let row = step + y as u32;
            let mut four = Four::new(0.0f32);
            #[unroll]
            for lane in 0..LANES {
                let column = (panel * PANEL + x * LANES + lane) as u32;
                if row < rows.count && column < columns.count {
                    let start = (rows.first + row) as usize * matrix.stride(0);
                    let at = start + (columns.first + column) as usize;
                    four[lane] = f32::cast_from(matrix[at]);
                }
            }
            sync_cube();
            shared.right[y * PITCH + x] = four;
            sync_cube();
            for quad in 0..quads(rows.count - step) {
                #[unroll]
                for k in 0..QUAD {
                    let line = quad * QUAD + k;
                    let weights = shared.weights[(step as usize + line) * PITCH + y];
                    let values = shared.right[line * PITCH + x];
                    #[unroll]
                    for lane in 0..LANES {
                        sums[panel * LANES + lane] += Four::new(weights[lane]) * values;
                    }
                }
            }
        }
    }
}

/// Writes `factor * sums`, laid out as `add_weighted` leaves them.
#[cube]
pub(super) fn write<E: Float>(
    out: &mut Tensor<E>,
    sums: &Array<Four>,
    rows: TileRows,
    columns: TileColumns,
    factor: f32,
    #[comptime] panels: usize,
) {
    let unit = UNIT_POS as usize;
    let (y, x) = (unit / SIDE, unit % SIDE);
    #[unroll]
    for panel in 0..panels {
        #[unroll]
        for lane in 0..LANES {
            let row = (y + lane * SIDE) as u32;
            let values = sums[panel * LANES + lane];
            #[unroll]
            for c in 0..LANES {
                let column = (panel * PANEL + x * LANES + c) as u32;
                if row < rows.count && column < columns.count {
                    let start = (rows.first + row) as usize * out.stride(0);
                    let at = start + (columns.first + column) as usize;
                    out[at] = E::cast_from(factor * values[c]);
                }
            }
        }
    }
}

/// Whether query i sees key j. Keys without a step are targets, which only they themselves see.
#[cube]
pub(super) fn sees<E: Float>(
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    i: u32,
    j: u32,
) -> bool {
    let position = queries.position + i * queries.step;
    let key = keys.position + j * keys.step;
    let inside = i < queries.count && j < keys.count;
    let near = position < key + operands.recent || key < operands.global;
    let itself = queries.first + i == keys.first + j;
    inside && key <= position && near && (keys.step == 1 || itself)
}

/// The biases of a pair that `sees` allows.
#[cube]
pub(super) fn bias<E: Float>(
    operands: &Operands<E>,
    queries: TileRows,
    keys: TileRows,
    i: u32,
    j: u32,
) -> f32 {
    let mut bias = 0.0f32;
    #[comptime]
    match &operands.position {
        ComptimeOption::Some(table) => {
            let distance = queries.position + i * queries.step - keys.position - j * keys.step;
            bias += f32::cast_from(table[(distance as usize).min(table.len() - 1)]);
        }
        ComptimeOption::None => {}
    }
    #[comptime]
    match &operands.time {
        ComptimeOption::Some(table) => {
            let bucket = time_bucket::<E>(operands, queries.first + i, keys.first + j);
            bias += f32::cast_from(table[bucket.min(table.len() - 1)]);
        }
        ComptimeOption::None => {}
    }
    bias
}

/// `floor(log2(max(1, d)))` of the seconds d between two rows: `attention::time_bucket` before it
/// is bounded by the table.
#[cube]
pub(super) fn time_bucket<E: Float>(operands: &Operands<E>, query: u32, key: u32) -> usize {
    let rows = operands.rows as usize;
    let low_at = operands.work.len() - 2 * rows;
    let query_low = operands.work[low_at + query as usize];
    let query_high = operands.work[low_at + rows + query as usize];
    let key_low = operands.work[low_at + key as usize];
    let key_high = operands.work[low_at + rows + key as usize];
    let before = query_high < key_high || (query_high == key_high && query_low < key_low);
    let later_low = select(before, key_low, query_low);
    let earlier_low = select(before, query_low, key_low);
    let later_high = select(before, key_high, query_high);
    let earlier_high = select(before, query_high, key_high);
    let borrow = select(later_low < earlier_low, 1u32, 0u32);
    let low = later_low - earlier_low;
    let high = later_high - earlier_high - borrow;
    let of_low = 31u32 - (low | 1u32).leading_zeros();
    let of_high = 63u32 - (high | 1u32).leading_zeros();
    select(high == 0u32, of_low, of_high) as usize
}

/// `1 / (1 + exp(-x))`; where exp would overflow, the quotient is 0 or 1 up to rounding.
#[cube]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0f32 / (1.0f32 + (-x.clamp(-87.0f32, 87.0f32)).exp())
}

/// The sums of all units' values, returned to every unit. All units must call it together.
///
/// The memory has a place for every unit, and the order of the sums is fixed.
#[cube]
pub(super) fn sum_over_units(values: Four, scratch: &mut SharedMemory<Four>) -> Four {
    let unit = UNIT_POS as usize;
    sync_cube();
    scratch[unit] = values;
    let mut half = CUBE_DIM as usize / 2;
    while half > 0 {
        sync_cube();
        if unit < half {
            let other = scratch[unit + half];
            scratch[unit] += other;
        }
        half /= 2;
    }
    sync_cube();
    scratch[0]
}

#[cube]
impl TileMemory {
    /// The weights of one column of the tile and of rows `group`, `group + 16`, ....
    pub(super) fn weight(&self, column: usize, group: usize) -> Four {
        self.weights[column * PITCH + group]
    }
}
