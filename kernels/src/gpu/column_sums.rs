//! Sums of a matrix's columns, in a fixed order and without atomics: a unit adds some rows up, and
//! what is left is added up again.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::tile::UNITS;

/// The number of rows that one pass adds up.
pub(super) const ROWS_A_PASS: usize = 64;

/// Writes to `out` the sums of as many columns of `values` as it has, from `first_column` on.
pub(super) fn add_up<R: CubeRuntime, In: Float + CubeElement, Out: Float + CubeElement>(
    values: &CubeTensor<R>,
    first_column: usize,
    out: &CubeTensor<R>,
) {
    let (rows, columns) = (values.shape()[0], out.shape().num_elements());
    if rows <= ROWS_A_PASS {
        return add_rows_once::<R, In, Out>(values, first_column, columns, out);
    }
    let shape = Shape::new([rows.div_ceil(ROWS_A_PASS), columns]);
    let (client, device) = (values.client.clone(), values.device.clone());
    let sums = empty_device_contiguous_dtype(client, device, shape, DType::F32);
    add_rows_once::<R, In, f32>(values, first_column, columns, &sums);
    add_up::<R, f32, Out>(&sums, 0, out);
}

fn add_rows_once<R: CubeRuntime, In: Float + CubeElement, Out: Float + CubeElement>(
    values: &CubeTensor<R>,
    first_column: usize,
    columns: usize,
    out: &CubeTensor<R>,
) {
    let units = CubeDim::new_1d(UNITS);
    let count = out.shape().num_elements();
    // SAFETY: every unit has one entry of `out` or none, and reads no row beyond the last.
    unsafe {
        add_rows::launch_unchecked::<In, Out, R>(
            &values.client,
            calculate_cube_count_elemwise(&values.client, count, units),
            units,
            values.required_address_type().max(out.required_address_type()),
            values.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            first_column as u32,
            columns as u32,
        );
    }
}

/// Adds up the columns of `values` from `first_column` on, as many as a row of `out` has,
/// [`ROWS_A_PASS`] rows into each row of `out`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn add_rows<In: Float, Out: Float>(
    values: &Tensor<In>,
    out: &mut Tensor<Out>,
    first_column: u32,
    columns: u32,
) {
    let columns = columns as usize;
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let first_row = ABSOLUTE_POS / columns * ROWS_A_PASS;
    let column = ABSOLUTE_POS % columns + first_column as usize;
    let end = (first_row + ROWS_A_PASS).min(values.shape(0));
    let mut sum = 0.0f32;
    for row in first_row..end {
        sum += f32::cast_from(values[row * values.stride(0) + column]);
    }
    out[ABSOLUTE_POS] = Out::cast_from(sum);
}
