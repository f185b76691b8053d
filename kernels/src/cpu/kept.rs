//! Kept histories on the CPU: keys and values are packed once, when tokens are appended, in the
//! layout that the attention kernel reads.

use super::StridedRows;
use super::lanes::MAX_LANES;
use super::task::KEYS;

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

impl CpuKeptHistory {
    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        let floats = |head: &KeptHead| head.keys.capacity() + head.values.capacity();
        self.heads.iter().map(floats).sum::<usize>() * size_of::<f32>()
    }

    /// Removes all but the oldest `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for head in &mut self.heads {
            head.keys.truncate(self.len.div_ceil(KEYS) * KEYS * head.qk);
            head.values.truncate(self.len * head.v.next_multiple_of(MAX_LANES));
        }
    }

    /// Appends tokens to every head.
    pub(super) fn append(&mut self, tokens: &NewTokens<'_>) {
        let NewTokens { k, v, rows, heads, qk, v_dim } = tokens;
        let fresh = KeptHead { qk: *qk, v: *v_dim, keys: Vec::new(), values: Vec::new() };
        if self.heads.is_empty() {
            self.heads = vec![fresh; *heads];
        }
        let sizes = (self.heads.len(), self.heads[0].qk, self.heads[0].v);
        assert_eq!(
            sizes,
            (*heads, *qk, *v_dim),
            "the new tokens must have the widths of the kept history"
        );
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

/// Tokens to append: some rows of a layer's K and V.
pub(super) struct NewTokens<'a> {
    pub(super) k: StridedRows<'a>,
    pub(super) v: StridedRows<'a>,
    pub(super) rows: std::ops::Range<usize>,
    pub(super) heads: usize,
    pub(super) qk: usize,
    pub(super) v_dim: usize,
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
