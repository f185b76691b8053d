//! The ops within the rows of each request, by the batch's offsets. No row of another request is
//! read.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape as Dims, TensorMetadata};
use hypercast_kernels::attention::HstuBackend;
use hypercast_kernels::pairs::{PairFunction, PairInputs, PairSum};

use super::{download, jagged, ops, upload};
use crate::batch::ExpertBatch;
use crate::graph::Fold;

/// The sum, mean or maximum of each request's rows, repeated for its rows: `[rows, d]`.
pub(super) fn fold<B: HstuBackend>(
    batch: &ExpertBatch,
    kind: Fold,
    x: FloatTensor<B>,
) -> FloatTensor<B> {
    let offsets = &batch.target_offsets;
    let folded = match kind {
        Fold::Max => return max::<B>(offsets, x),
        Fold::Sum => jagged::total::<B>(offsets, x),
        Fold::Mean => jagged::mean::<B>(offsets, x),
    };
    let owners = jagged::owners::<B>(offsets, &B::float_device(&folded));
    B::float_select(folded, 0, owners)
}

/// The values of the first row of each request that is largest, column by column. Where they are is
/// found on the host, so that memory does not grow with the longest request.
fn max<B: HstuBackend>(offsets: &[u32], x: FloatTensor<B>) -> FloatTensor<B> {
    let (device, dims) = (B::float_device(&x), x.shape());
    let width = dims.as_slice()[1];
    let values = download::<B>(x.clone());
    let mut index = vec![0; values.len()];
    for rows in segments(offsets) {
        for column in 0..width {
            let at = |row: usize| row * width + column;
            let larger = |most: usize, at: usize| if values[at] > values[most] { at } else { most };
            let Some(most) = rows.clone().map(at).reduce(larger) else { continue };
            rows.clone().for_each(|row| index[at(row)] = most as i64);
        }
    }
    let flat = B::float_reshape(x, Dims::from(vec![values.len(), 1]));
    let most = B::float_select(flat, 0, ops::indices::<B>(index, &device));
    B::float_reshape(most, dims)
}

/// How many rows of its request come before each row if the largest is the first, column by column;
/// of equal rows the earlier one does.
pub(super) fn rank<B: HstuBackend>(batch: &ExpertBatch, x: FloatTensor<B>) -> FloatTensor<B> {
    let (device, dims) = (B::float_device(&x), x.shape());
    let width = dims.as_slice()[1];
    let values = download::<B>(x);
    let mut ranks = vec![0.0; values.len()];
    for rows in segments(&batch.target_offsets) {
        for column in 0..width {
            let mut order: Vec<usize> = rows.clone().map(|row| row * width + column).collect();
            // Stable, and with one zero.
            let value = |at: usize| values[at] + 0.0;
            order.sort_by(|one, other| value(*other).total_cmp(&value(*one)));
            order.iter().enumerate().for_each(|(rank, at)| ranks[*at] = rank as f32);
        }
    }
    upload::<B>(ranks, dims.as_slice(), &device)
}

/// For each row, the sum over the other rows of its request of a function of both: `[rows, 1]`.
pub(super) fn pair_sum<B: HstuBackend>(
    batch: &ExpertBatch,
    [a, b]: [FloatTensor<B>; 2],
    functions: &[PairFunction],
) -> FloatTensor<B> {
    let pairs = PairSum { offsets: batch.target_offsets.clone(), functions: functions.to_vec() };
    B::pair_sum(PairInputs { a, b }, Arc::new(pairs))
}

fn segments(offsets: &[u32]) -> impl Iterator<Item = Range<usize>> {
    offsets.windows(2).map(|segment| segment[0] as usize..segment[1] as usize)
}
