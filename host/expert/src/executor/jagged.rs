//! The ops that cross between rows and history by the batch's offsets: HSTU attention and pooling.
//! Beside `segments`, no other part of the executor reads offsets.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{FloatDType, Shape as Dims, TensorMetadata, get_device_settings};
use hypercast_kernels::attention::{HstuAttention, HstuBackend, HstuInputs};

use super::{ops, upload};
use crate::batch::ExpertBatch;
use crate::graph::Fold;

/// `HstuAttention` of qh, kh, vh, q, k, v: `[rows, heads * d]`.
pub(super) fn attention<B: HstuBackend>(
    batch: &ExpertBatch,
    inputs: Vec<FloatTensor<B>>,
    heads: usize,
    max_len: usize,
) -> FloatTensor<B> {
    let [qh, kh, vh, q, k, v] = super::exactly(inputs);
    let history = batch.history_events();
    // A batch without history has one event of zeros, which belongs to no request.
    let joint = |past, rows| {
        if history == 0 { rows } else { B::float_cat(vec![past, rows], 0) }
    };
    let qkv = [joint(qh, q), joint(kh, k), joint(vh, v)];
    let joint = hstu::<B>(batch, qkv, batch.target_offsets.clone(), heads, max_len);
    let end = joint.shape().as_slice()[0];
    if history == 0 { joint } else { ops::slice::<B>(joint, 0, history..end) }
}

/// `HstuHistory` of qh, kh, vh: `[history, heads * d]`.
pub(super) fn history_attention<B: HstuBackend>(
    batch: &ExpertBatch,
    inputs: Vec<FloatTensor<B>>,
    heads: usize,
    max_len: usize,
) -> FloatTensor<B> {
    let [q, k, v] = super::exactly(inputs);
    if batch.history_events() == 0 {
        return B::float_zeros(v.shape(), &B::float_device(&v), FloatDType::F32);
    }
    let no_targets = vec![0; batch.target_offsets.len()].into();
    hstu::<B>(batch, [q, k, v], no_targets, heads, max_len)
}

fn hstu<B: HstuBackend>(
    batch: &ExpertBatch,
    qkv: [FloatTensor<B>; 3],
    target_offsets: Arc<[u32]>,
    heads: usize,
    max_len: usize,
) -> FloatTensor<B> {
    let [q, k, v] = qkv;
    let d = q.shape().as_slice()[1] / heads;
    let shape = HstuAttention {
        history_offsets: batch.history_offsets.clone(),
        heads,
        alpha: 1.0 / (d as f32).sqrt(),
        norm: max_len as f32,
        window: None,
        // With targets the graph reads only their rows, without targets the history's.
        targets_only: target_offsets.last() != Some(&0),
        times_s: None,
        target_offsets,
    };
    B::hstu_attention(HstuInputs { q, k, v, position: None, time: None }, Arc::new(shape))
}

/// Pools each request's history and repeats the result for its rows: `[rows, d]`.
pub(super) fn pool<B: HstuBackend>(
    batch: &ExpertBatch,
    kind: Fold,
    x: FloatTensor<B>,
) -> FloatTensor<B> {
    let (device, width) = (B::float_device(&x), x.shape().as_slice()[1]);
    let (events, requests) = (batch.history_events(), batch.target_offsets.len() - 1);
    if events == 0 {
        let rows = batch.target_offsets[requests] as usize;
        return B::float_zeros(Dims::from(vec![rows, width]), &device, FloatDType::F32);
    }
    let pooled = match kind {
        Fold::Max => pool_max::<B>(batch, x),
        Fold::Sum => total::<B>(&batch.history_offsets, x),
        Fold::Mean => mean::<B>(&batch.history_offsets, x),
    };
    B::float_select(pooled, 0, owners::<B>(&batch.target_offsets, &device))
}

/// The maximum of each request's history: `[requests, d]`. Histories are padded to the longest
/// one with their own first event, which does not change the maximum. Empty ones give 0.
fn pool_max<B: HstuBackend>(batch: &ExpertBatch, x: FloatTensor<B>) -> FloatTensor<B> {
    let (device, width) = (B::float_device(&x), x.shape().as_slice()[1]);
    let spans: Vec<Range<u32>> =
        batch.history_offsets.windows(2).map(|span| span[0]..span[1]).collect();
    let longest = spans.iter().map(Range::len).max().unwrap_or(0).max(1);
    let last = batch.history_events() as u32 - 1;
    let padded = spans.iter().flat_map(|span| {
        let padding = std::iter::repeat(span.start.min(last));
        span.clone().chain(padding).take(longest)
    });
    let padded = ops::indices::<B>(padded.map(i64::from).collect(), &device);
    let dims = Dims::from(vec![spans.len(), longest, width]);
    let most = B::float_max_dim(B::float_reshape(B::float_select(x, 0, padded), dims), 1);
    let most = B::float_reshape(most, Dims::from(vec![spans.len(), width]));
    let empty = spans.iter().map(|span| f32::from(u8::from(span.is_empty())));
    let empty = upload::<B>(
        empty.flat_map(|flag| std::iter::repeat_n(flag, width)).collect(),
        &[spans.len(), width],
        &device,
    );
    let bool_dtype = get_device_settings::<B>(&device).bool_dtype;
    B::float_mask_fill(most, B::float_greater_elem(empty, 0.5f32.into(), bool_dtype), 0f32.into())
}

/// The sum of each request's entries: `[requests, d]`.
pub(super) fn total<B: HstuBackend>(offsets: &[u32], x: FloatTensor<B>) -> FloatTensor<B> {
    let (device, width) = (B::float_device(&x), x.shape().as_slice()[1]);
    let dims = Dims::from(vec![offsets.len() - 1, width]);
    let zeros = B::float_zeros(dims, &device, FloatDType::F32);
    B::float_select_add(zeros, 0, owners::<B>(offsets, &device), x)
}

/// The mean of each request's entries: `[requests, d]`, with zeros where it has none.
pub(super) fn mean<B: HstuBackend>(offsets: &[u32], x: FloatTensor<B>) -> FloatTensor<B> {
    let share = |span: &[u32]| {
        let length = (span[1] - span[0]) as usize;
        std::iter::repeat_n(1.0 / length.max(1) as f32, length)
    };
    let shares: Vec<f32> = offsets.windows(2).flat_map(share).collect();
    let dims = [shares.len(), 1];
    let shares = upload::<B>(shares, &dims, &B::float_device(&x));
    total::<B>(offsets, B::float_mul(x, shares))
}

/// The request that each entry belongs to.
pub(super) fn owners<B: HstuBackend>(offsets: &[u32], device: &B::Device) -> IntTensor<B> {
    let spans = offsets.windows(2).enumerate();
    let owners = spans.flat_map(|(request, span)| {
        std::iter::repeat_n(request as i64, (span[1] - span[0]) as usize)
    });
    ops::indices::<B>(owners.collect(), device)
}
