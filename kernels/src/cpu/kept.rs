//! Kept histories on the CPU: keys and values are packed once, when tokens are appended, in the
//! layout that the attention kernel reads.

use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};

use super::lanes::MAX_LANES;
use super::task::{HeadColumns, KEYS, transpose};
use super::{Isa, borrow, forward_kept, matrix, readable, rows};
use crate::attention::{HstuAttention, HstuInputs};
use crate::history::{KeptHistory, KeptLayer};

/// Keys and values of one request's history at one layer, for all heads.
#[derive(Debug, Clone, Default)]
pub struct CpuKeptHistory {
    len: usize,
    heads: Vec<KeptHead>,
}

/// Keys and values of one head.
#[derive(Debug, Clone)]
struct KeptHead {
    qk: usize,
    v: usize,
    /// `[block of keys, qk, KEYS]`; entries after the last token are arbitrary.
    keys: Vec<f32>,
    /// `[len, v]`, each row padded to whole vectors of any instruction set.
    values: Vec<f32>,
}

impl KeptLayer<Flex> for CpuKeptHistory {
    fn keep(k: FlexTensor, v: FlexTensor, shape: &HstuAttention, kept: &mut [&mut Self]) {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let (k, v) = (readable(k), readable(v));
        let [qk, v_dim] = [&k, &v].map(|tensor| tensor.shape()[1] / shape.heads);
        let width = v_dim.next_multiple_of(MAX_LANES);
        for (b, kept) in kept.iter_mut().enumerate() {
            let new = shape.request(b).history;
            if kept.heads.is_empty() {
                let head = KeptHead { qk, v: v_dim, keys: Vec::new(), values: Vec::new() };
                kept.heads = vec![head; shape.heads];
            }
            assert_eq!(
                (kept.heads.len(), kept.heads[0].qk, kept.heads[0].v),
                (shape.heads, qk, v_dim),
                "the new tokens must have the widths of the kept history"
            );
            let grown = kept.len + new.len();
            for (index, head) in kept.heads.iter_mut().enumerate() {
                head.keys.resize(grown.div_ceil(KEYS) * KEYS * qk, 0.0);
                head.values.resize(grown * width, 0.0);
                let keys = HeadColumns::new(rows(&k), index, qk);
                transpose(&mut head.keys, kept.len, keys, new.clone());
                let values = HeadColumns::new(rows(&v), index, v_dim);
                let cells = head.values[kept.len * width..].chunks_exact_mut(width);
                for (cells, row) in cells.zip(new.clone()) {
                    cells[..v_dim].copy_from_slice(values.row(row));
                }
            }
            kept.len = grown;
        }
    }

    fn tokens(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        let floats = |head: &KeptHead| head.keys.capacity() + head.values.capacity();
        self.heads.iter().map(floats).sum::<usize>() * size_of::<f32>()
    }

    fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
        for head in &mut self.heads {
            head.keys.truncate(self.len.div_ceil(KEYS) * KEYS * head.qk);
            head.values.truncate(self.len * head.v.next_multiple_of(MAX_LANES));
        }
    }

    fn attend(
        inputs: HstuInputs<FlexTensor>,
        kept: &[KeptHistory<'_, Self>],
        shape: &Arc<HstuAttention>,
    ) -> FlexTensor {
        let dims = shape.dims(&inputs);
        let inputs = inputs.map(readable);
        let out = forward_kept(shape, dims, &borrow(&inputs), kept, Isa::best());
        matrix(out, dims.rows, shape.heads * dims.v)
    }
}

impl CpuKeptHistory {
    /// The packed keys and values of one head.
    #[inline(always)]
    pub(super) fn head(&self, index: usize) -> PackedHead<'_> {
        match self.heads.get(index) {
            Some(head) => PackedHead {
                keys: &head.keys,
                values: &head.values,
                stride: head.v.next_multiple_of(MAX_LANES),
            },
            None => PackedHead { keys: &[], values: &[], stride: MAX_LANES },
        }
    }
}

/// A head's packed keys and values.
#[derive(Clone, Copy)]
pub(super) struct PackedHead<'a> {
    /// `[block of keys, qk, KEYS]`.
    pub(super) keys: &'a [f32],
    /// `[n, stride]`.
    pub(super) values: &'a [f32],
    /// Distance between the first numbers of consecutive values.
    pub(super) stride: usize,
}
