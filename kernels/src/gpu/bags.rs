//! Embedding bags: a unit computes one value of a bag, or of a row's gradient, as a sum in f32.
//!
//! Sums run over what [`BagsByRow`] and the bags list, so no two units write to one place.

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::tile::UNITS;
use super::words::{UploadedWords, option};
use crate::embedding_bag::{BagsByRow, EmbeddingBags};

/// Writes the means of bags `[bags, dim]`. `ends` has where each bag's rows begin and end, unless
/// each has one.
#[cube(launch_unchecked, address_type = "dynamic")]
fn bag_means<E: Float>(
    table: &Tensor<E>,
    index: &Array<u32>,
    ends: &ComptimeOption<Array<u32>>,
    out: &mut Tensor<E>,
    dim: u32,
) {
    let dim = dim as usize;
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let bag = ABSOLUTE_POS / dim;
    let column = ABSOLUTE_POS % dim;
    #[comptime]
    match ends {
        ComptimeOption::Some(ends) => {
            let first = ends[bag] as usize;
            let end = ends[bag + 1] as usize;
            let mut sum = 0.0f32;
            for at in first..end {
                sum += f32::cast_from(table[index[at] as usize * dim + column]);
            }
            out[ABSOLUTE_POS] = E::cast_from(sum / f32::cast_from((end - first).max(1)));
        }
        ComptimeOption::None => {
            out[ABSOLUTE_POS] = table[index[bag] as usize * dim + column];
        }
    }
}

/// Writes the gradient of the table `[rows, dim]`. `first_bags` has where each row's bags begin in
/// `bags`, `ends` what it has in [`bag_means`].
#[cube(launch_unchecked, address_type = "dynamic")]
fn row_sums<E: Float>(
    gradient: &Tensor<E>,
    first_bags: &Array<u32>,
    bags: &Array<u32>,
    ends: &ComptimeOption<Array<u32>>,
    out: &mut Tensor<E>,
    dim: u32,
) {
    let dim = dim as usize;
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let row = ABSOLUTE_POS / dim;
    let column = ABSOLUTE_POS % dim;
    let first = first_bags[row] as usize;
    let end = first_bags[row + 1] as usize;
    let mut sum = 0.0f32;
    for at in first..end {
        let bag = bags[at] as usize;
        let value = f32::cast_from(gradient[bag * dim + column]);
        #[comptime]
        match ends {
            ComptimeOption::Some(ends) => {
                sum += value / f32::cast_from(ends[bag + 1] - ends[bag]);
            }
            ComptimeOption::None => {
                sum += value;
            }
        }
    }
    out[ABSOLUTE_POS] = E::cast_from(sum);
}

/// The means of bags, `[bags, dim]`.
pub(super) fn forward<R: CubeRuntime>(table: CubeTensor<R>, bags: &EmbeddingBags) -> CubeTensor<R> {
    match table.dtype {
        DType::F32 => forward_of::<R, f32>(table, bags),
        DType::F16 => forward_of::<R, f16>(table, bags),
        DType::BF16 => forward_of::<R, bf16>(table, bags),
        other => unreachable!("{other:?} is no type of embeddings"),
    }
}

/// The gradient of the table, `[rows, dim]`.
pub(super) fn backward<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    bags: &EmbeddingBags,
) -> CubeTensor<R> {
    match gradient.dtype {
        DType::F32 => backward_of::<R, f32>(gradient, bags),
        DType::F16 => backward_of::<R, f16>(gradient, bags),
        DType::BF16 => backward_of::<R, bf16>(gradient, bags),
        other => unreachable!("{other:?} is no type of embeddings"),
    }
}

fn forward_of<R: CubeRuntime, E: Float + CubeElement>(
    table: CubeTensor<R>,
    bags: &EmbeddingBags,
) -> CubeTensor<R> {
    let dim = table.shape()[1];
    let out = empty_like(&table, bags.bags());
    if bags.bags() == 0 || dim == 0 {
        return out;
    }
    // Runtimes cannot bind an empty buffer; without a row in any bag, none is read.
    let index = UploadedWords::new(&table, bags.index());
    let ends = bags.offsets().map(|offsets| UploadedWords::new(&table, offsets));
    let units = CubeDim::new_1d(UNITS);
    let grid = calculate_cube_count_elemwise(&table.client, bags.bags() * dim, units);
    let client = table.client.clone();
    let address = table.required_address_type().max(out.required_address_type());
    let read = into_contiguous(table).into_tensor_arg();
    // SAFETY: every unit has one value of `out` or none; `EmbeddingBags` checked that its indices
    // are rows of the table, and its offsets ascend to the length of the index.
    unsafe {
        bag_means::launch_unchecked::<E, R>(
            &client,
            grid,
            units,
            address,
            read,
            index.arg(),
            option(ends.as_ref()),
            out.clone().into_tensor_arg(),
            dim as u32,
        );
    }
    out
}

fn backward_of<R: CubeRuntime, E: Float + CubeElement>(
    gradient: CubeTensor<R>,
    bags: &EmbeddingBags,
) -> CubeTensor<R> {
    let dim = gradient.shape()[1];
    let out = empty_like(&gradient, bags.rows());
    if bags.rows() == 0 || dim == 0 {
        return out;
    }
    let by_row = bags.by_row();
    let BagsByRow { offsets, bags: of_rows } = &by_row;
    let [first_bags, of_rows] = [offsets, of_rows].map(|all| UploadedWords::new(&gradient, all));
    let ends = bags.offsets().map(|offsets| UploadedWords::new(&gradient, offsets));
    let units = CubeDim::new_1d(UNITS);
    let grid = calculate_cube_count_elemwise(&gradient.client, bags.rows() * dim, units);
    let client = gradient.client.clone();
    let address = gradient.required_address_type().max(out.required_address_type());
    let read = into_contiguous(gradient).into_tensor_arg();
    // SAFETY: every unit has one value of `out` or none; `by_row` has an offset for each row and
    // one more, and bags alone, each of which has a part of the gradient.
    unsafe {
        row_sums::launch_unchecked::<E, R>(
            &client,
            grid,
            units,
            address,
            read,
            first_bags.arg(),
            of_rows.arg(),
            option(ends.as_ref()),
            out.clone().into_tensor_arg(),
            dim as u32,
        );
    }
    out
}

/// A new matrix of so many rows beside one of as many columns.
fn empty_like<R: CubeRuntime>(beside: &CubeTensor<R>, rows: usize) -> CubeTensor<R> {
    let shape = Shape::new([rows, beside.shape()[1]]);
    let (client, device) = (beside.client.clone(), beside.device.clone());
    empty_device_contiguous_dtype(client, device, shape, beside.dtype)
}
