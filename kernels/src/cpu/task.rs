//! An attention task, which is one request and one head: its rows, what they see and their biases.
//! Forward and backward share it.

use std::marker::PhantomData;
use std::ops::Range;

use super::kept::CpuKeptHistory;
use super::lanes::Lanes;
use super::{CpuInputs, StridedRows};
use crate::attention::{AttentionWindow, Dims, HstuAttention, time_bucket};
use crate::history::{KeptHistory, KeptLayer};

/// Keys per block: a multiple of every vector length and tile height.
pub(super) const KEYS: usize = 64;

/// The columns of one head.
#[derive(Clone, Copy)]
pub(super) struct HeadColumns<'a> {
    rows: StridedRows<'a>,
    start: usize,
    width: usize,
}

impl<'a> HeadColumns<'a> {
    pub(super) fn new(rows: StridedRows<'a>, head: usize, width: usize) -> Self {
        HeadColumns { rows, start: head * width, width }
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        let start = row * self.rows.stride + self.start;
        &self.rows.data[start..start + self.width]
    }
}

/// One request and head of a batch.
pub(super) struct AttentionTask<'a> {
    pub(super) q: HeadColumns<'a>,
    pub(super) k: HeadColumns<'a>,
    pub(super) v: HeadColumns<'a>,
    /// The gradient of the output, in a backward.
    pub(super) grad: Option<HeadColumns<'a>>,
    pub(super) position: Option<&'a [f32]>,
    pub(super) time: Option<TimeBias<'a>>,
    /// The history's keys and values, if they are kept between passes; `history` is then only the
    /// rows of the newest tokens.
    pub(super) kept: Option<&'a CpuKeptHistory>,
    pub(super) dims: Dims,
    pub(super) alpha: f32,
    pub(super) inverse_norm: f32,
    pub(super) history: Range<usize>,
    pub(super) targets: Range<usize>,
    pub(super) head: usize,
    window: Option<AttentionWindow>,
    targets_only: bool,
}

/// The table of the time bias, and the tokens' times in seconds.
#[derive(Clone, Copy)]
pub(super) struct TimeBias<'a> {
    pub(super) table: &'a [f32],
    /// `[rows]`: the times of all rows.
    pub(super) rows_s: &'a [i64],
    /// `[n]`: the times of the history, oldest first.
    pub(super) keys_s: &'a [i64],
}

/// Some consecutive rows, all history tokens or all targets.
#[derive(Clone, Copy)]
pub(super) struct RowBlock {
    /// The first row in the tensors.
    pub(super) first: usize,
    /// The number of rows, at least 1.
    pub(super) count: usize,
    /// The first row's position.
    pub(super) position: usize,
    /// The difference between consecutive positions: 1 for history, 0 for targets.
    pub(super) step: usize,
}

impl RowBlock {
    /// The position of row r.
    #[inline(always)]
    pub(super) fn at(&self, r: usize) -> usize {
        self.position + r * self.step
    }

    /// Row r sees history keys below this: a history token also sees itself, a target sees all n.
    #[inline(always)]
    pub(super) fn end(&self, r: usize) -> usize {
        self.at(r) + self.step
    }

    #[inline(always)]
    pub(super) fn is_targets(&self) -> bool {
        self.step == 0
    }
}

impl<'a> AttentionTask<'a> {
    pub(super) fn new(
        shape: &'a HstuAttention,
        dims: Dims,
        inputs: &CpuInputs<'a>,
        index: usize,
    ) -> Self {
        let (request, head) = (shape.request(index / shape.heads), index % shape.heads);
        AttentionTask {
            q: HeadColumns::new(inputs.q, head, dims.qk),
            k: HeadColumns::new(inputs.k, head, dims.qk),
            v: HeadColumns::new(inputs.v, head, dims.v),
            grad: None,
            position: inputs.position,
            time: inputs.time.zip(shape.times_s.as_deref()).map(|(table, rows_s)| TimeBias {
                table,
                rows_s,
                keys_s: &rows_s[request.history.clone()],
            }),
            kept: None,
            dims,
            alpha: shape.alpha,
            inverse_norm: 1.0 / shape.norm,
            history: request.history,
            targets: request.targets,
            head,
            window: shape.window,
            targets_only: shape.targets_only,
        }
    }

    pub(super) fn with_grad(self, grad: StridedRows<'a>) -> Self {
        AttentionTask { grad: Some(HeadColumns::new(grad, self.head, self.dims.v)), ..self }
    }

    /// The task over a kept history, if there is one.
    pub(super) fn over(self, kept: Option<&KeptHistory<'a, CpuKeptHistory>>) -> Self {
        let Some(kept) = kept else { return self };
        let time = self.time.map(|times| TimeBias { keys_s: kept.times_s, ..times });
        AttentionTask { kept: Some(kept.layer), time, ..self }
    }

    /// n, the length of the history.
    #[inline(always)]
    pub(super) fn n(&self) -> usize {
        self.kept.map_or(self.history.len(), KeptLayer::tokens)
    }

    /// The rows that attend, in blocks of up to `size`: the history's, then the targets'.
    #[inline(always)]
    pub(super) fn blocks(&self, size: usize) -> impl Iterator<Item = RowBlock> + use<> {
        let (history, targets, n) = (self.history.clone(), self.targets.clone(), self.n());
        let attending = if self.targets_only { history.end..history.end } else { history.clone() };
        let of_history = attending.step_by(size).map(move |first| RowBlock {
            first,
            count: size.min(history.end - first),
            position: n - (history.end - first),
            step: 1,
        });
        let of_targets = targets.clone().step_by(size).map(move |first| RowBlock {
            first,
            count: size.min(targets.end - first),
            position: n,
            step: 0,
        });
        of_history.chain(of_targets)
    }

    /// Whether no row of the block sees a key of `j0..j0 + KEYS`.
    #[inline(always)]
    pub(super) fn skips(&self, block: &RowBlock, j0: usize) -> bool {
        let gap = self.gap(block.position);
        gap.start <= j0 && j0 + KEYS <= gap.end
    }

    /// Sets the cells of keys that a row at `position` does not see to 0. `cells` are for the keys
    /// from `j0` on, of which the row sees those below `end`.
    #[inline(always)]
    pub(super) fn mask(&self, position: usize, end: usize, j0: usize, cells: &mut [f32]) {
        let len = cells.len();
        cells[end.saturating_sub(j0).min(len)..].fill(0.0);
        let gap = self.gap(position);
        let to = gap.end.saturating_sub(j0).min(len);
        cells[gap.start.saturating_sub(j0).min(to)..to].fill(0.0);
    }

    /// The keys that the window hides from a row at `position`; its end grows with the position.
    #[inline(always)]
    fn gap(&self, position: usize) -> Range<usize> {
        match self.window {
            Some(window) => window.global..(position + 1).saturating_sub(window.recent),
            None => 0..0,
        }
    }

    /// The biases of `row` at `position` for the keys from `j0` on, at least `len` of them; those
    /// at and after key n are arbitrary.
    #[inline(always)]
    pub(super) fn bias<'s>(
        &self,
        biases: &'s mut Biases,
        row: usize,
        position: usize,
        keys: Range<usize>,
    ) -> &'s [f32] {
        let by_position = &biases.reversed[keys.start + self.n() - position..][..keys.len()];
        let Some(times) = self.time else {
            return by_position;
        };
        let sums = &mut biases.sums[..keys.len()];
        sums.copy_from_slice(by_position);
        self.each_bucket(times, row, keys, |at, bucket| sums[at] += times.table[bucket]);
        &biases.sums
    }

    /// Calls `f` with each key of `keys` below n, counted from `keys.start`, and its time bucket
    /// seen from `row`.
    #[inline(always)]
    pub(super) fn each_bucket(
        &self,
        times: TimeBias<'_>,
        row: usize,
        keys: Range<usize>,
        mut f: impl FnMut(usize, usize),
    ) {
        let keys_s = &times.keys_s[keys.start..keys.end.min(self.n())];
        let (row_s, buckets) = (times.rows_s[row], times.table.len());
        let mut found = [0u32; KEYS];
        for (bucket, key_s) in found.iter_mut().zip(keys_s) {
            *bucket = time_bucket(row_s.abs_diff(*key_s), buckets) as u32;
        }
        for (at, bucket) in found[..keys_s.len()].iter().enumerate() {
            f(at, *bucket as usize);
        }
    }

    /// The bias of a target for itself.
    #[inline(always)]
    pub(super) fn own_bias(&self) -> f32 {
        self.position.map_or(0.0, |table| table[0]) + self.time.map_or(0.0, |time| time.table[0])
    }
}

/// Buffers for a task's biases.
#[derive(Default)]
pub(super) struct Biases {
    /// Entry n - d is the bias at distance d, so that a row's biases for ascending keys are
    /// contiguous. Zeros follow, to fill whole vectors. All zeros without a table.
    reversed: Vec<f32>,
    /// A row's biases for a block of keys.
    sums: Vec<f32>,
}

impl Biases {
    pub(super) fn prepare(&mut self, task: &AttentionTask<'_>) {
        let n = task.n();
        self.sums.resize(KEYS, 0.0);
        zero(&mut self.reversed, n + 1 + KEYS);
        if let Some(table) = task.position {
            for (x, bias) in self.reversed[..=n].iter_mut().enumerate() {
                *bias = table[(n - x).min(table.len() - 1)];
            }
        }
    }
}

/// Makes a buffer `len` zeros.
#[inline(always)]
pub(super) fn zero(cells: &mut Vec<f32>, len: usize) {
    cells.clear();
    cells.resize(len, 0.0);
}

/// `len` rounded up to whole vectors.
#[inline(always)]
pub(super) fn padded<V: Lanes>(len: usize) -> usize {
    len.next_multiple_of(V::N)
}

/// Packs rows, each padded with zeros to `width`, into `packed`; at least `rows.len()` of them,
/// zeros up to `height`.
#[inline(always)]
pub(super) fn pack(
    packed: &mut Vec<f32>,
    head: HeadColumns<'_>,
    rows: Range<usize>,
    width: usize,
    height: usize,
) {
    zero(packed, height.max(rows.len()) * width);
    for (packed, row) in packed.chunks_exact_mut(width).zip(rows) {
        packed[..head.width].copy_from_slice(head.row(row));
    }
}

/// Packs rows transposed by blocks: value d of row `rows.start + j` goes to
/// `[j / KEYS, d, j % KEYS]`, zeros after the last row.
#[inline(always)]
pub(super) fn pack_transposed(packed: &mut Vec<f32>, head: HeadColumns<'_>, rows: Range<usize>) {
    zero(packed, rows.len().div_ceil(KEYS) * KEYS * head.width);
    transpose(packed, 0, head, rows);
}

/// Writes rows as packed keys from index `first` on, which `packed` has room for.
#[inline(always)]
pub(super) fn transpose(
    packed: &mut [f32],
    first: usize,
    head: HeadColumns<'_>,
    rows: Range<usize>,
) {
    for (j, row) in (first..).zip(rows) {
        let block = &mut packed[(j / KEYS) * KEYS * head.width..];
        for (d, value) in head.row(row).iter().enumerate() {
            block[d * KEYS + j % KEYS] = *value;
        }
    }
}

/// An output matrix whose parts of rows are written by different threads.
pub(super) struct OutputSink<'a> {
    start: *mut f32,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: `part` is the only access, and its callers write disjoint parts.
unsafe impl Sync for OutputSink<'_> {}
// SAFETY: it represents an exclusive borrow of f32, which may be sent to another thread.
unsafe impl Send for OutputSink<'_> {}

impl<'a> OutputSink<'a> {
    pub(super) fn new(out: &'a mut [f32], stride: usize) -> Self {
        OutputSink { start: out.as_mut_ptr(), len: out.len(), stride, borrowed: PhantomData }
    }

    /// The same matrix from column `start` on. Sinks of one matrix must be given disjoint columns.
    pub(super) fn columns_from(&self, start: usize) -> OutputSink<'a> {
        assert!(start <= self.len, "column outside its matrix");
        OutputSink { start: self.start.wrapping_add(start), len: self.len - start, ..*self }
    }

    /// Columns `head * width..(head + 1) * width` of `row`.
    ///
    /// # Safety
    /// No two live borrows may be of the same row and head.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, row: usize, head: usize, width: usize) -> &mut [f32] {
        let at = row * self.stride + head * width;
        assert!(
            (head + 1) * width <= self.stride && at + width <= self.len,
            "row outside its matrix"
        );
        // SAFETY: the assertion keeps the part inside the matrix, the caller guarantees exclusive
        // access.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), width) }
    }
}
