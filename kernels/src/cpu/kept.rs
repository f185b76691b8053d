//! A layer's history as the fused path reads it: keys and values packed once,
//! when tokens arrive, and not again by each request that attends to them.
//!
//! Nothing here decides whose history it is or how long it is kept.

use super::Rows;
use super::lanes::MAX_LANES;
use super::task::KEYS;

/// Keys and values of one layer and one request's history, for all heads.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    len: usize,
    heads: Vec<KeptHead>,
}

/// One head's.
#[derive(Debug, Clone)]
struct KeptHead {
    qk: usize,
    v: usize,
    /// `[block of keys, qk, KEYS]`; places after the last token are arbitrary.
    keys: Vec<f32>,
    /// `[len, v]`, each row padded to whole vectors of any instruction set.
    values: Vec<f32>,
}

impl Kept {
    /// Tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        let floats = |head: &KeptHead| head.keys.capacity() + head.values.capacity();
        self.heads.iter().map(floats).sum::<usize>() * size_of::<f32>()
    }

    /// Forgets all but the oldest `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for head in &mut self.heads {
            head.keys.truncate(self.len.div_ceil(KEYS) * KEYS * head.qk);
            head.values.truncate(self.len * head.v.next_multiple_of(MAX_LANES));
        }
    }

    /// Appends tokens `rows` of `k` and `v`, whose columns are those of `heads` heads of `qk` and `v` values.
    pub(super) fn append(&mut self, tokens: &Tokens<'_>) {
        let Tokens { k, v, rows, heads, qk, v_dim } = tokens;
        let fresh = KeptHead { qk: *qk, v: *v_dim, keys: Vec::new(), values: Vec::new() };
        if self.heads.is_empty() {
            self.heads = vec![fresh; *heads];
        }
        let sizes = (self.heads.len(), self.heads[0].qk, self.heads[0].v);
        assert_eq!(sizes, (*heads, *qk, *v_dim), "a kept history is of one layer");
        let width = v_dim.next_multiple_of(MAX_LANES);
        let grown = self.len + rows.len();
        for (index, head) in self.heads.iter_mut().enumerate() {
            head.keys.resize(grown.div_ceil(KEYS) * KEYS * qk, 0.0);
            head.values.resize(grown * width, 0.0);
            for (j, row) in (self.len..grown).zip(rows.clone()) {
                let key = &k.data[row * k.stride + index * qk..][..*qk];
                let block = &mut head.keys[(j / KEYS) * KEYS * qk..];
                for (d, value) in key.iter().enumerate() {
                    block[d * KEYS + j % KEYS] = *value;
                }
                let value = &v.data[row * v.stride + index * v_dim..][..*v_dim];
                head.values[j * width..][..*v_dim].copy_from_slice(value);
            }
        }
        self.len = grown;
    }

    /// One head, as the forward reads it.
    #[inline(always)]
    pub(super) fn head(&self, index: usize) -> Packed<'_> {
        match self.heads.get(index) {
            Some(head) => Packed {
                keys: &head.keys,
                values: &head.values,
                stride: head.v.next_multiple_of(MAX_LANES),
            },
            None => Packed { keys: &[], values: &[], stride: MAX_LANES },
        }
    }
}

/// Tokens to be kept: some rows of a layer's K and V.
pub(super) struct Tokens<'a> {
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) rows: std::ops::Range<usize>,
    pub(super) heads: usize,
    pub(super) qk: usize,
    pub(super) v_dim: usize,
}

/// A head's packed keys and values.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    /// `[block of keys, qk, KEYS]`.
    pub(super) keys: &'a [f32],
    /// `[n, stride]`.
    pub(super) values: &'a [f32],
    /// From one value's first number to the next one's.
    pub(super) stride: usize,
}
