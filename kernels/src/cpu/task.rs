//! An attention task, which is one request and one head: its rows, what they see and their biases.
//! Forward and backward share it.

use std::marker::PhantomData;
use std::ops::Range;

use super::bias::TimeBias;
use super::kept::CpuKeptHistory;
use super::lanes::{Lanes, prefetch, transpose_tile};
use super::math::dot;
use super::{CpuInputs, StridedRows};
use crate::attention::{AttentionWindow, Dims, HstuAttention};
use crate::history::{KeptHistory, KeptLayer};

/// Keys per block: a multiple of every vector length and tile height.
pub(super) const KEYS: usize = 64;

/// Rows per block: a multiple of every tile height and vector length. The more rows, the fewer
/// times keys and values, and in a backward their gradients, are read.
pub(super) const ROWS: usize = 32;

/// How many rows ahead packing fetches.
const AHEAD: usize = 16;

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

    /// Fetches a row that is read soon. The CPU does not by itself: the rows of a head are short
    /// and far apart.
    #[inline(always)]
    fn prefetch(&self, row: usize) {
        prefetch(
            self.rows.data.as_ptr().wrapping_add(row * self.rows.stride + self.start),
            self.width,
        );
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

    /// The number of keys from `j0` on, up to [`KEYS`], that the last row sees.
    #[inline(always)]
    pub(super) fn seen(&self, j0: usize) -> usize {
        self.end(self.count - 1).saturating_sub(j0).min(KEYS)
    }

    /// The block in tiles of up to `height` rows, each with its first row in the block.
    #[inline(always)]
    pub(super) fn tiles(self, height: usize) -> impl Iterator<Item = (usize, RowBlock)> {
        (0..self.count).step_by(height).map(move |r| {
            let (first, count) = (self.first + r, height.min(self.count - r));
            (r, RowBlock { first, count, position: self.at(r), ..self })
        })
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

    /// Whether every row of the block sees every key of `j0..j0 + KEYS`.
    #[inline(always)]
    fn sees_all(&self, block: &RowBlock, j0: usize) -> bool {
        let gap = self.gap(block.at(block.count - 1));
        block.end(0) >= j0 + KEYS && (gap.end <= j0.max(gap.start) || gap.start >= j0 + KEYS)
    }

    /// Sets the cells of keys that their row does not see to 0. `cells` has [`KEYS`] of each of the
    /// block's rows, for the keys from `j0` on.
    #[inline(always)]
    pub(super) fn mask(&self, block: &RowBlock, j0: usize, cells: &mut [f32]) {
        if !self.sees_all(block, j0) {
            for (r, cells) in cells.chunks_exact_mut(KEYS).enumerate().take(block.count) {
                self.mask_row(block.at(r), block.end(r), j0, cells);
            }
        }
    }

    /// Sets the cells of keys that a row at `position` does not see to 0. `cells` are for the keys
    /// from `j0` on, of which the row sees those below `end`.
    #[inline(always)]
    fn mask_row(&self, position: usize, end: usize, j0: usize, cells: &mut [f32]) {
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

    /// The score of a target's attention to itself.
    #[inline(always)]
    pub(super) fn own_score<V: Lanes>(&self, row: usize) -> f32 {
        let tables = [self.position, self.time.map(|time| time.table)];
        let bias = tables.into_iter().flatten().map(|table| table[0]).sum::<f32>();
        self.alpha * dot::<V>(self.q.row(row), self.k.row(row)) + bias
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

/// Packs rows times `factor`, each padded with zeros to whole vectors, and rows of zeros up to
/// `height`.
#[inline(always)]
pub(super) fn pack<V: Lanes>(
    packed: &mut Vec<f32>,
    head: HeadColumns<'_>,
    rows: Range<usize>,
    height: usize,
    factor: f32,
) {
    let width = padded::<V>(head.width);
    packed.resize(height.max(rows.len()) * width, 0.0);
    let (filled, rest) = packed.split_at_mut(rows.len() * width);
    for (packed, row) in filled.chunks_exact_mut(width).zip(rows) {
        head.prefetch(row + AHEAD);
        let (values, padding) = packed.split_at_mut(head.width);
        scale::<V>(values, head.row(row), factor);
        padding.fill(0.0);
    }
    rest.fill(0.0);
}

/// Writes `from`, of the same length, times `factor`.
#[inline(always)]
pub(super) fn scale<V: Lanes>(to: &mut [f32], from: &[f32], factor: f32) {
    assert_eq!(to.len(), from.len(), "scaling needs two slices of one length");
    let whole = to.len() - to.len() % V::N;
    for at in (0..whole).step_by(V::N) {
        // SAFETY: at + N <= whole <= the length of both slices.
        unsafe {
            let values = V::load(from.as_ptr().wrapping_add(at)).mul(V::splat(factor));
            values.store(to.as_mut_ptr().wrapping_add(at));
        }
    }
    for (to, from) in to[whole..].iter_mut().zip(&from[whole..]) {
        *to = from * factor;
    }
}

/// Adds `from`, in whole vectors.
#[inline(always)]
pub(super) fn add_values<V: Lanes>(to: &mut [f32], from: &[f32]) {
    assert!(to.len() == from.len() && to.len().is_multiple_of(V::N), "not whole vectors");
    for at in (0..to.len()).step_by(V::N) {
        // SAFETY: at + N is at most the length of both, by the assertion.
        unsafe {
            let to = to.as_mut_ptr().wrapping_add(at);
            V::load(to).add(V::load(from.as_ptr().wrapping_add(at))).store(to);
        }
    }
}

/// Packs rows transposed by blocks: value d of row `rows.start + j` goes to
/// `[j / KEYS, d, j % KEYS]`. Entries after the last row are arbitrary.
#[inline(always)]
pub(super) fn pack_transposed(packed: &mut Vec<f32>, head: HeadColumns<'_>, rows: Range<usize>) {
    packed.resize(rows.len().div_ceil(KEYS) * KEYS * head.width, 0.0);
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
    let whole = head.width - head.width % 4;
    let mut row = rows.start;
    while row < rows.end {
        let j = first + row - rows.start;
        let block = &mut packed[(j / KEYS) * KEYS * head.width..][..KEYS * head.width];
        let four = rows.end - row >= 4 && j.is_multiple_of(4);
        if four {
            let rows = [0, 1, 2, 3].map(|r| head.row(row + r).as_ptr());
            for d in (0..whole).step_by(4) {
                // SAFETY: d + 4 is at most the length of a row, and the tile is in the block.
                unsafe {
                    let to = block.as_mut_ptr().wrapping_add(d * KEYS + j % KEYS);
                    transpose_tile(rows.map(|row| row.wrapping_add(d)), to, KEYS);
                }
            }
        }
        let (count, done) = if four { (4, whole) } else { (1, 0) };
        for r in 0..count {
            head.prefetch(row + AHEAD + r);
            for (d, value) in head.row(row + r).iter().enumerate().skip(done) {
                block[d * KEYS + j % KEYS + r] = *value;
            }
        }
        row += count;
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
