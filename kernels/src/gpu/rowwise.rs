//! What a layer does to rows between its products: norms with a gate, SiLU with a bias, and their
//! gradients.
//!
//! Some units share a row and add up its sums in a fixed order. Sums over rows, for the gradients
//! of weights, are partial sums of blocks, which [`super::column_sums`] adds up: no atomics.

use cubecl::prelude::*;

use super::column_sums::ROWS_A_PASS;
use super::tile::{UNITS, sigmoid};

/// The units that share a row.
pub(super) const ROW_UNITS: usize = 32;

/// The base-2 logarithm of [`ROW_UNITS`].
const ROW_STEPS: usize = 5;

/// A gate of the rows of a norm: each is multiplied by a row of it, and by a mask of dropout.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Gate<E: Float> {
    /// `[rows, at least width]`.
    pub(super) values: Tensor<E>,
    /// `[rows, 2]`: what a row's mask is made of ([`crate::layer::SeededDropout`]).
    pub(super) keys: ComptimeOption<Array<u32>>,
    /// The rate, in units of 2^-32.
    pub(super) dropped: u32,
    /// The factor of values that are not dropped.
    pub(super) kept: f32,
}

#[cube]
impl<E: Float> Gate<E> {
    fn value(&self, row: usize, column: usize) -> f32 {
        f32::cast_from(self.values[row * self.values.stride(0) + column])
    }

    /// 0 or the scale, as `DropoutRow::factor` has it.
    fn mask(&self, row: usize, column: usize) -> f32 {
        let mut factor = 1.0f32;
        #[comptime]
        match &self.keys {
            ComptimeOption::Some(keys) => {
                let mut bits = keys[2 * row] + column as u32 * 0x9E37_79B9u32;
                bits = (bits ^ (bits >> 16u32)) * 0x7FEB_352Du32;
                bits = (bits ^ (bits >> 15u32) ^ keys[2 * row + 1]) * 0x846C_A68Bu32;
                bits = bits ^ (bits >> 16u32);
                factor = select(bits < self.dropped, 0.0f32, self.kept);
            }
            ComptimeOption::None => {}
        }
        factor
    }
}

/// A value times what the gate, if there is one, has in its place.
#[cube]
fn gated<E: Float>(gate: &ComptimeOption<Gate<E>>, value: f32, row: usize, column: usize) -> f32 {
    let mut product = value;
    #[comptime]
    match gate {
        ComptimeOption::Some(gate) => {
            product *= gate.value(row, column) * gate.mask(row, column);
        }
        ComptimeOption::None => {}
    }
    product
}

/// The sum of the values of the units that share a row, returned to each. All units of the
/// workgroup must call it together.
#[cube]
fn sum_of_row(value: f32, scratch: &mut SharedMemory<f32>) -> f32 {
    let unit = UNIT_POS as usize;
    let lane = unit % ROW_UNITS;
    sync_cube();
    scratch[unit] = value;
    #[unroll]
    for step in 0..ROW_STEPS {
        let half = comptime!(ROW_UNITS >> (step + 1));
        sync_cube();
        if lane < half {
            let other = scratch[unit + half];
            scratch[unit] += other;
        }
    }
    sync_cube();
    scratch[unit - lane]
}

/// The mean of a row and the inverse of its standard deviation.
#[derive(CubeType, Clone, Copy)]
struct RowMoments {
    mean: f32,
    inverse: f32,
}

/// The moments of the row that begins at `start`. All units must call it together.
#[cube]
fn moments<E: Float>(
    x: &Tensor<E>,
    start: usize,
    width: usize,
    epsilon: f32,
    scratch: &mut SharedMemory<f32>,
) -> RowMoments {
    let lane = UNIT_POS as usize % ROW_UNITS;
    let mut sum = 0.0f32;
    for column in range_stepped(lane, width, ROW_UNITS) {
        sum += f32::cast_from(x[start + column]);
    }
    let mean = sum_of_row(sum, scratch) / f32::cast_from(width as u32);
    let mut squares = 0.0f32;
    for column in range_stepped(lane, width, ROW_UNITS) {
        let apart = f32::cast_from(x[start + column]) - mean;
        squares += apart * apart;
    }
    let variance = sum_of_row(squares, scratch) / f32::cast_from(width as u32);
    RowMoments { mean, inverse: 1.0f32 / (variance + epsilon).sqrt() }
}

/// The layer norm of each row of `x`, times the gate's row: `[rows, width]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn normalise<E: Float>(
    x: &Tensor<E>,
    scale: &Tensor<E>,
    shift: &Tensor<E>,
    gate: &ComptimeOption<Gate<E>>,
    out: &mut Tensor<E>,
    epsilon: f32,
) {
    let mut scratch = SharedMemory::<f32>::new(UNITS as usize);
    let width = x.shape(1);
    let row = ABSOLUTE_POS / ROW_UNITS;
    let is_row = row < x.shape(0);
    let start = select(is_row, row, 0usize) * x.stride(0);
    let moments = moments::<E>(x, start, width, epsilon, &mut scratch);
    if is_row {
        for column in range_stepped(UNIT_POS as usize % ROW_UNITS, width, ROW_UNITS) {
            let apart = (f32::cast_from(x[start + column]) - moments.mean) * moments.inverse;
            let value = apart * f32::cast_from(scale[column]) + f32::cast_from(shift[column]);
            let value = gated::<E>(gate, value, row, column);
            out[row * out.stride(0) + column] = E::cast_from(value);
        }
    }
}

/// The gradients of `normalise`, given that of its output: of `x` into the rows of `dx` from
/// `first` on, with zeros before them, and of the gate into `dgate`. `residual` is added to the
/// rows of `dx` from the number on by which it is shorter. Writes the mean and the inverse standard
/// deviation of each row of `x` to `stats` `[rows, 2]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn normalise_backward<E: Float>(
    x: &Tensor<E>,
    scale: &Tensor<E>,
    shift: &Tensor<E>,
    gate: &ComptimeOption<Gate<E>>,
    gradient: &Tensor<E>,
    residual: &ComptimeOption<Tensor<E>>,
    dx: &mut Tensor<E>,
    dgate: &mut ComptimeOption<Tensor<E>>,
    stats: &mut Tensor<f32>,
    epsilon: f32,
) {
    let mut scratch = SharedMemory::<f32>::new(UNITS as usize);
    let lane = UNIT_POS as usize % ROW_UNITS;
    let width = x.shape(1);
    let first = dx.shape(0) - x.shape(0);
    let out_row = ABSOLUTE_POS / ROW_UNITS;
    let is_row = out_row >= first && out_row < dx.shape(0);
    let row = select(is_row, out_row - first, 0usize);
    let start = row * x.stride(0);
    let moments = moments::<E>(x, start, width, epsilon, &mut scratch);
    // Of the gradient of what is scaled: its sum, and the sum of its products with it.
    let mut sum = 0.0f32;
    let mut products = 0.0f32;
    for column in range_stepped(lane, width, ROW_UNITS) {
        let apart = (f32::cast_from(x[start + column]) - moments.mean) * moments.inverse;
        let own = f32::cast_from(gradient[row * gradient.stride(0) + column]);
        let own = gated::<E>(gate, own, row, column);
        let own = own * f32::cast_from(scale[column]);
        sum += own;
        products += own * apart;
    }
    let sum = sum_of_row(sum, &mut scratch) / f32::cast_from(width as u32);
    let products = sum_of_row(products, &mut scratch) / f32::cast_from(width as u32);
    if is_row {
        if lane == 0 {
            stats[2 * row] = moments.mean;
            stats[2 * row + 1] = moments.inverse;
        }
        for column in range_stepped(lane, width, ROW_UNITS) {
            let apart = (f32::cast_from(x[start + column]) - moments.mean) * moments.inverse;
            let mut own = f32::cast_from(gradient[row * gradient.stride(0) + column]);
            #[comptime]
            match gate {
                ComptimeOption::Some(gate) => {
                    let masked = own * gate.mask(row, column);
                    let normed =
                        apart * f32::cast_from(scale[column]) + f32::cast_from(shift[column]);
                    #[comptime]
                    match dgate {
                        ComptimeOption::Some(dgate) => {
                            dgate[row * dgate.stride(0) + column] = E::cast_from(masked * normed);
                        }
                        ComptimeOption::None => {}
                    }
                    own = masked * gate.value(row, column);
                }
                ComptimeOption::None => {}
            }
            let own = own * f32::cast_from(scale[column]);
            let mut value = moments.inverse * (own - sum - apart * products);
            #[comptime]
            match residual {
                ComptimeOption::Some(residual) => {
                    let before = dx.shape(0) - residual.shape(0);
                    if out_row >= before {
                        let at = (out_row - before) * residual.stride(0) + column;
                        value += f32::cast_from(residual[at]);
                    }
                }
                ComptimeOption::None => {}
            }
            dx[out_row * dx.stride(0) + column] = E::cast_from(value);
        }
    } else if out_row < first {
        for column in range_stepped(lane, width, ROW_UNITS) {
            dx[out_row * dx.stride(0) + column] = E::cast_from(0.0f32);
        }
    }
}

/// Partial sums of the gradients of a norm's scale and shift, `[blocks, 2 * width]`: a unit has one
/// column of [`ROWS_A_PASS`] rows.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn norm_weight_sums<E: Float>(
    x: &Tensor<E>,
    stats: &Tensor<f32>,
    gate: &ComptimeOption<Gate<E>>,
    gradient: &Tensor<E>,
    partials: &mut Tensor<f32>,
) {
    let width = x.shape(1);
    let block = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    if block >= partials.shape(0) {
        terminate!();
    }
    let first = block * ROWS_A_PASS;
    let end = (first + ROWS_A_PASS).min(x.shape(0));
    let mut of_scale = 0.0f32;
    let mut of_shift = 0.0f32;
    for row in first..end {
        let value = f32::cast_from(x[row * x.stride(0) + column]);
        let apart = (value - stats[2 * row]) * stats[2 * row + 1];
        let own = f32::cast_from(gradient[row * gradient.stride(0) + column]);
        let own = gated::<E>(gate, own, row, column);
        of_scale += own * apart;
        of_shift += own;
    }
    partials[block * partials.stride(0) + column] = of_scale;
    partials[block * partials.stride(0) + width + column] = of_shift;
}

/// SiLU of `own` plus the bias, `[past rows + own rows, columns]`. The past's rows come first and
/// have the last columns alone; their others are zeros.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn silu<E: Float>(
    own: &Tensor<E>,
    past: &ComptimeOption<Tensor<E>>,
    bias: &Tensor<E>,
    out: &mut Tensor<E>,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let columns = out.shape(1);
    let row = ABSOLUTE_POS / columns;
    let column = ABSOLUTE_POS % columns;
    let history = out.shape(0) - own.shape(0);
    if row >= history {
        let x = f32::cast_from(own[(row - history) * own.stride(0) + column])
            + f32::cast_from(bias[column]);
        out[ABSOLUTE_POS] = E::cast_from(x * sigmoid(x));
    } else {
        #[comptime]
        match past {
            ComptimeOption::Some(past) => {
                let skipped = columns - past.shape(1);
                let mut value = 0.0f32;
                if column >= skipped {
                    let x = f32::cast_from(past[row * past.stride(0) + column - skipped])
                        + f32::cast_from(bias[column]);
                    value = x * sigmoid(x);
                }
                out[ABSOLUTE_POS] = E::cast_from(value);
            }
            ComptimeOption::None => {}
        }
    }
}

/// The gradient of a block of what SiLU was applied to: SiLU's slope there times the gradient of
/// its output. The block's columns are those of the bias and the gradients from `first_column` on;
/// its rows are those of attention's gradients from `first_row` on.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn silu_backward<E: Float>(
    x: &Tensor<E>,
    bias: &Tensor<E>,
    gradients: &SiluGradients<E>,
    out: &mut Tensor<E>,
    first_row: u32,
    first_column: u32,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let columns = out.shape(1);
    let row = ABSOLUTE_POS / columns;
    let column = ABSOLUTE_POS % columns;
    let of_all = column + first_column as usize;
    let x = f32::cast_from(x[row * x.stride(0) + column]) + f32::cast_from(bias[of_all]);
    let sigmoid = sigmoid(x);
    let slope = sigmoid + x * sigmoid * (1.0f32 - sigmoid);
    let gradient = gradients.at(row, first_row as usize, of_all);
    out[ABSOLUTE_POS] = E::cast_from(gradient * slope);
}

/// The gradient of SiLU's output: of U, Q, V and K, one beside the other.
#[derive(CubeType, CubeLaunch)]
pub(super) struct SiluGradients<E: Float> {
    /// Has no rows before `first_row`.
    pub(super) u: Tensor<E>,
    pub(super) qvk: ComptimeOption<AttentionGradients<E>>,
}

/// The gradients that attention gives.
#[derive(CubeType, CubeLaunch)]
pub(super) struct AttentionGradients<E: Float> {
    pub(super) q: Tensor<E>,
    pub(super) v: Tensor<E>,
    pub(super) k: Tensor<E>,
}

#[cube]
impl<E: Float> SiluGradients<E> {
    /// The gradient of a column in a row, which is `first_row` rows later in attention's.
    fn at(&self, row: usize, first_row: usize, column: usize) -> f32 {
        let mut value = 0.0f32;
        #[comptime]
        match &self.qvk {
            ComptimeOption::Some(of) => {
                let late = row + first_row;
                let of_u = self.u.shape(1);
                let of_q = of.q.shape(1);
                let of_v = of.v.shape(1);
                if column < of_u {
                    value += f32::cast_from(self.u[row * self.u.stride(0) + column]);
                } else if column < of_u + of_q {
                    value += f32::cast_from(of.q[late * of.q.stride(0) + column - of_u]);
                } else if column < of_u + of_q + of_v {
                    value += f32::cast_from(of.v[late * of.v.stride(0) + column - of_u - of_q]);
                } else {
                    let column = column - of_u - of_q - of_v;
                    value += f32::cast_from(of.k[late * of.k.stride(0) + column]);
                }
            }
            ComptimeOption::None => {
                value += f32::cast_from(self.u[row * self.u.stride(0) + column]);
            }
        }
        value
    }
}
