//! The ops in terms of Burn's primitives; each is differentiable if the backend is. No function
//! here reads offsets, so rows cannot mix.

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{
    FloatDType, Shape as Dims, Slice, TensorData, TensorMetadata, get_device_settings,
};
use rand::RngCore;
use rand::rngs::SmallRng;

use super::dims_of;
use super::ids::NO_ROW;
use crate::graph::{Fold, Unary, Zip};

/// `Log` and `Sqrt` raise smaller inputs to this value.
const TINY: f32 = 1e-12;

pub(super) fn unary<B: Backend>(op: Unary, x: FloatTensor<B>) -> FloatTensor<B> {
    match op {
        Unary::Exp => B::float_exp(x),
        Unary::Log => B::float_log(B::float_clamp_min(x, TINY.into())),
        Unary::Sqrt => B::float_sqrt(B::float_clamp_min(x, TINY.into())),
        Unary::Neg => B::float_neg(x),
        Unary::Abs => B::float_abs(x),
        Unary::Sigmoid => B::sigmoid(x),
        Unary::Silu => B::float_mul(x.clone(), B::sigmoid(x)),
        Unary::Relu => B::relu(x),
        Unary::Gelu => gelu::<B>(x),
        Unary::Tanh => B::float_tanh(x),
        // Stable at both ends, and the gradient at 0 is 0.5.
        Unary::Softplus => B::float_neg(B::log_sigmoid(B::float_neg(x))),
    }
}

/// `x · Φ(x)`, spelled out: on GPUs the gradient of Burn's operator is that of an approximation.
fn gelu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let scaled = B::float_mul_scalar(x.clone(), std::f32::consts::FRAC_1_SQRT_2.into());
    let doubled_share = B::float_add_scalar(B::float_erf(scaled), 1.0.into());
    B::float_mul_scalar(B::float_mul(x, doubled_share), 0.5.into())
}

/// An elementwise op of two inputs, which broadcast to `rank` dimensions.
pub(super) fn zip<B: Backend>(
    op: Zip,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    rank: usize,
) -> FloatTensor<B> {
    let (a, b) = (with_rank::<B>(a, rank), with_rank::<B>(b, rank));
    match op {
        Zip::Add => B::float_add(a, b),
        Zip::Sub => B::float_sub(a, b),
        Zip::Mul => B::float_mul(a, b),
        Zip::Div => B::float_div(a, b),
        Zip::Max | Zip::Min | Zip::Greater | Zip::Less | Zip::Equal => {
            let (a, b) = expand_both::<B>(a, b);
            let bool_dtype = get_device_settings::<B>(&B::float_device(&a)).bool_dtype;
            let truth = match op {
                Zip::Max | Zip::Less => B::float_lower(a.clone(), b.clone(), bool_dtype),
                Zip::Equal => B::float_equal(a.clone(), b.clone(), bool_dtype),
                _ => B::float_greater(a.clone(), b.clone(), bool_dtype),
            };
            match op {
                Zip::Max | Zip::Min => B::float_mask_where(a, truth, b),
                _ => B::bool_into_float(truth, FloatDType::F32),
            }
        }
    }
}

/// `a` where `c` is not 0, else `b`. All three have the same shape.
pub(super) fn select_where<B: Backend>(
    c: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
) -> FloatTensor<B> {
    let bool_dtype = get_device_settings::<B>(&B::float_device(&c)).bool_dtype;
    let zero = B::float_equal_elem(c, 0f32.into(), bool_dtype);
    B::float_mask_where(a, zero, b)
}

/// `a [.., m, k]` times `b [k, n]`: the leading dimensions of `a` become rows.
pub(super) fn matmul<B: Backend>(
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    result: &[usize],
) -> FloatTensor<B> {
    let dims = dims_of(&a);
    if dims.len() == 2 {
        return B::float_matmul(a, b);
    }
    let k = dims[dims.len() - 1];
    let rows = dims[..dims.len() - 1].iter().product::<usize>();
    let flat = B::float_matmul(B::float_reshape(a, Dims::from(vec![rows, k])), b);
    B::float_reshape(flat, Dims::from(result.to_vec()))
}

pub(super) fn softmax<B: Backend>(x: FloatTensor<B>, axis: usize) -> FloatTensor<B> {
    // The result does not depend on the shift, so the shift needs no gradient.
    let shift = B::float_max_dim(B::float_set_require_grad(x.clone(), false), axis);
    let e = B::float_exp(B::float_sub(x, shift));
    let sum = B::float_sum_dim(e.clone(), axis);
    B::float_div(e, sum)
}

pub(super) fn slice<B: Backend>(
    x: FloatTensor<B>,
    axis: usize,
    range: Range<usize>,
) -> FloatTensor<B> {
    let mut slices: Vec<Slice> =
        x.shape().as_slice().iter().map(|dim| Slice::from(0..*dim)).collect();
    slices[axis] = Slice::from(range);
    B::float_slice(x, &slices)
}

pub(super) fn reduce<B: Backend>(kind: Fold, x: FloatTensor<B>, axis: usize) -> FloatTensor<B> {
    match kind {
        Fold::Sum => B::float_sum_dim(x, axis),
        Fold::Mean => B::float_mean_dim(x, axis),
        Fold::Max => B::float_max_dim(x, axis),
    }
}

pub(super) fn layer_norm<B: Backend>(
    x: FloatTensor<B>,
    scale: FloatTensor<B>,
    bias: FloatTensor<B>,
    epsilon: f32,
) -> FloatTensor<B> {
    let rank = x.shape().as_slice().len();
    let last = rank - 1;
    let centred = B::float_sub(x.clone(), B::float_mean_dim(x, last));
    let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), last);
    let deviation = B::float_sqrt(B::float_add_scalar(variance, epsilon.into()));
    let normal = B::float_div(centred, deviation);
    B::float_add(B::float_mul(normal, with_rank::<B>(scale, rank)), with_rank::<B>(bias, rank))
}

/// Zeroes values (or whole rows) with probability `rate`, and scales the others so that the
/// expectation does not change.
pub(super) fn dropout<B: Backend>(
    x: FloatTensor<B>,
    rate: f32,
    per_row: bool,
    rng: &mut SmallRng,
) -> FloatTensor<B> {
    if rate == 0.0 {
        return x;
    }
    let mut dims = dims_of(&x);
    if per_row {
        dims[1..].fill(1);
    }
    let scale = 1.0 / (1.0 - rate);
    let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
    let keep = |_| {
        if rng.next_u32() >= threshold { scale } else { 0.0 }
    };
    let mask = (0..dims.iter().product()).map(keep).collect();
    let device = B::float_device(&x);
    B::float_mul(x, super::upload::<B>(mask, &dims, &device))
}

/// The means of groups of rows of the table, `[s, d]`; `index` has `s` groups of equal size, in
/// which [`NO_ROW`] does not count.
pub(super) fn embedding_bag<B: Backend>(
    table: FloatTensor<B>,
    index: &[i64],
    s: usize,
) -> FloatTensor<B> {
    let width = table.shape().as_slice()[1];
    let device = B::float_device(&table);
    let k = index.len() / s;
    let some_row = index.iter().map(|row| (*row).max(0)).collect();
    let rows = B::float_select(table, 0, indices::<B>(some_row, &device));
    if !index.contains(&NO_ROW) {
        if k == 1 {
            return rows;
        }
        let rows = B::float_reshape(rows, Dims::from(vec![s, k, width]));
        return B::float_reshape(B::float_mean_dim(rows, 1), Dims::from(vec![s, width]));
    }
    let share = super::upload::<B>(shares(index, k), &[s, k, 1], &device);
    let rows = B::float_reshape(rows, Dims::from(vec![s, k, width]));
    let shares = B::float_expand(share, Dims::from(vec![s, k, width]));
    let sums = B::float_sum_dim(B::float_mul(rows, shares), 1);
    B::float_reshape(sums, Dims::from(vec![s, width]))
}

/// What each row of groups of `k` counts in its group's mean.
fn shares(index: &[i64], k: usize) -> Vec<f32> {
    let of_group = |group: &[i64]| {
        let count = group.iter().filter(|row| **row != NO_ROW).count();
        let share = 1.0 / count.max(1) as f32;
        group.iter().map(|row| if *row == NO_ROW { 0.0 } else { share }).collect::<Vec<f32>>()
    };
    index.chunks_exact(k).flat_map(of_group).collect()
}

/// Indices on the device, in its own integer type.
pub(super) fn indices<B: Backend>(index: Vec<i64>, device: &B::Device) -> IntTensor<B> {
    let dims = Dims::from(vec![index.len()]);
    let dtype = get_device_settings::<B>(device).int_dtype;
    B::int_from_data(TensorData::new(index, dims).convert_dtype(dtype.into()), device)
}

/// Prepends dimensions of size 1 up to `rank`.
fn with_rank<B: Backend>(x: FloatTensor<B>, rank: usize) -> FloatTensor<B> {
    let dims = dims_of(&x);
    if dims.len() == rank {
        return x;
    }
    let padded = std::iter::repeat_n(1, rank - dims.len()).chain(dims).collect::<Vec<_>>();
    B::float_reshape(x, Dims::from(padded))
}

fn expand_both<B: Backend>(
    a: FloatTensor<B>,
    b: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, y) = (dims_of(&a), dims_of(&b));
    let dims: Vec<usize> = x.iter().zip(&y).map(|(x, y)| *x.max(y)).collect();
    let expand = |tensor, from: &[usize]| {
        if from == dims { tensor } else { B::float_expand(tensor, Dims::from(dims.clone())) }
    };
    (expand(a, &x), expand(b, &y))
}
