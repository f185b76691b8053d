//! Products of blocks of rows with prepared weights, and the gradients of such weights.

use std::ops::Range;

use super::StridedRows;
use super::dense::{PANEL, Prepared};
use super::lanes::Lanes;
use super::math::{Left, ProductExtent, Right, accumulate};
use super::rowwise::activate;

/// The largest tile height of any instruction set.
const TALLEST: usize = 8;

/// Rows per step of a weight gradient, so that its factors stay in the L1 cache.
const BLOCK: usize = 128;

/// A buffer of rows, with padding for whole tiles at the end.
#[derive(Default)]
pub(super) struct Matrix {
    pub(super) data: Vec<f32>,
    pub(super) stride: usize,
}

impl Matrix {
    /// Resizes to `rows` rows of `width` values, whose content is then arbitrary.
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        // Not a power of two, so that the rows of a column do not share one set of the cache.
        self.stride = width.next_multiple_of(PANEL) + 16;
        self.data.resize((rows + TALLEST) * self.stride, 0.0);
    }

    /// A left factor of some rows with all columns.
    #[inline(always)]
    pub(super) fn factor(&self, rows: Range<usize>) -> Factor<'_> {
        Factor { data: StridedRows { data: &self.data, stride: self.stride }, rows, first: 0 }
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.stride]
    }

    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.stride..][..self.stride]
    }
}

/// The left factor of a product: some rows, and their columns from `first` on, which are multiplied
/// with the weights' rows from `first` on. A stride of 0 repeats one row.
#[derive(Clone)]
pub(super) struct Factor<'a> {
    pub(super) data: StridedRows<'a>,
    pub(super) rows: Range<usize>,
    pub(super) first: usize,
}

/// The activation of a product. This is not left to the `finish` closure, because the compiler may
/// not inline a closure, which would then be compiled without the kernel's instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    None,
    Silu,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(super) enum TileBase<'a> {
    /// The bias of its weights.
    Bias,
    /// Rows that were computed before: `row_of` has that of each row of the factor.
    Rows { sums: &'a Matrix, row_of: &'a [u32] },
}

/// Computes `factor · right + bias` with its activation, and calls `finish(row, panel, values)` for
/// each row and panel of columns.
#[inline(always)]
pub(super) fn multiply<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    panels: Range<usize>,
    activation: Activation,
    finish: impl FnMut(usize, usize, &mut [f32]),
) {
    multiply_onto::<V, R>(factor, right, panels, TileBase::Bias, activation, finish);
}

/// The same, added to `base`.
#[inline(always)]
pub(super) fn multiply_onto<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    panels: Range<usize>,
    base: TileBase<'_>,
    activation: Activation,
    mut finish: impl FnMut(usize, usize, &mut [f32]),
) {
    const { assert!(R <= TALLEST) };
    let mut tile = [0.0; TALLEST * PANEL];
    let (rows, steps) = (&factor.rows, right.from - factor.first);
    for panel in panels {
        let weights = &right.panels[(panel * right.from + factor.first) * PANEL..][..steps * PANEL];
        let weights = Right { data: weights, stride: PANEL };
        let bias = &right.bias[panel * PANEL..][..PANEL];
        // A panel that is mostly padding is computed to the vector that holds its last column.
        let columns = PANEL.min(right.to - panel * PANEL).next_multiple_of(V::N);
        let extent = ProductExtent { columns, steps };
        let mut row = rows.start;
        while row < rows.end {
            let (start, height) = factor.tile::<R>(row, steps);
            let tile = &mut tile[..height * PANEL];
            for (at, tile) in (start..).zip(tile.chunks_exact_mut(PANEL)) {
                tile.copy_from_slice(match base {
                    TileBase::Bias => bias,
                    // A tile can end behind the last row.
                    TileBase::Rows { sums, row_of } => {
                        let row = row_of[at.min(row_of.len() - 1)] as usize;
                        &sums.row(row)[panel * PANEL..][..PANEL]
                    }
                });
            }
            if height == R {
                accumulate::<V, R>(tile, PANEL, factor.left(start), weights, extent);
            } else {
                accumulate::<V, 1>(tile, PANEL, factor.left(start), weights, extent);
            }
            if activation == Activation::Silu {
                activate::<V>(tile, None);
            }
            let end = rows.end.min(start + height);
            let fresh = tile[(row - start) * PANEL..].chunks_exact_mut(PANEL);
            for (row, values) in (row..end).zip(fresh) {
                finish(row, panel, values);
            }
            row = end;
        }
    }
}

impl<'a> Factor<'a> {
    /// The first row and the height of the tile that computes `row`. Near the end of the data a
    /// tile begins earlier instead of reading beyond the end, or has one row if there are too few.
    #[inline(always)]
    fn tile<const R: usize>(&self, row: usize, steps: usize) -> (usize, usize) {
        let reach = (row + R - 1) * self.data.stride + self.first + steps;
        match self.rows.end.checked_sub(R) {
            _ if reach <= self.data.data.len() => (row, R),
            Some(earlier) if earlier >= self.rows.start => (row.min(earlier), R),
            _ => (row, 1),
        }
    }

    #[inline(always)]
    fn left(&self, row: usize) -> Left<'a> {
        let stride = self.data.stride;
        Left { data: &self.data.data[row * stride + self.first..], row: stride, step: 1 }
    }
}

/// Writes `SiLU(factor · right + bias)` to the same rows of `out`, and the activation's slopes to
/// `slopes` if given.
#[inline(always)]
pub(super) fn multiply_activated<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    panels: Range<usize>,
    out: &mut Matrix,
    slopes: Option<&mut Matrix>,
) {
    let columns = panels.start * PANEL..panels.end * PANEL;
    let activation = if slopes.is_some() { Activation::None } else { Activation::Silu };
    multiply::<V, R>(factor, right, panels, activation, |row, panel, values| {
        out.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
    });
    if let Some(slopes) = slopes {
        for row in factor.rows.clone() {
            let slopes = &mut slopes.row_mut(row)[columns.clone()];
            activate::<V>(&mut out.row_mut(row)[columns.clone()], Some(slopes));
        }
    }
}

/// The gradient of weights `[from, to]`, in the panels of [`Prepared`].
pub(super) struct WeightGrad {
    from: usize,
    to: usize,
    /// `[panels, from rounded up to whole tiles, PANEL]`.
    pub(super) sums: Vec<f32>,
}

impl WeightGrad {
    pub(super) fn new([from, to]: [usize; 2]) -> Self {
        let size = to.div_ceil(PANEL) * from.next_multiple_of(TALLEST) * PANEL;
        WeightGrad { from, to, sums: vec![0.0; size] }
    }

    /// Adds `inputᵀ · grad` over some rows, for the columns of `grad` in these panels.
    #[inline(always)]
    pub(super) fn add<V: Lanes, const R: usize>(
        &mut self,
        [input, grad]: [&Matrix; 2],
        rows: Range<usize>,
        panels: Range<usize>,
    ) {
        let height = self.from.next_multiple_of(TALLEST);
        for start in rows.clone().step_by(BLOCK) {
            let steps = BLOCK.min(rows.end - start);
            for panel in panels.clone() {
                let sums = &mut self.sums[panel * height * PANEL..][..height * PANEL];
                let right = &grad.data[start * grad.stride + panel * PANEL..];
                for from in (0..self.from).step_by(R) {
                    accumulate::<V, R>(
                        &mut sums[from * PANEL..],
                        PANEL,
                        Left {
                            data: &input.data[start * input.stride + from..],
                            row: 1,
                            step: input.stride,
                        },
                        Right { data: right, stride: grad.stride },
                        ProductExtent { columns: PANEL, steps },
                    );
                }
            }
        }
    }

    /// The matrix `[from, to]` in row-major order.
    pub(super) fn row_major(&self) -> Vec<f32> {
        let height = self.from.next_multiple_of(TALLEST);
        let mut values = vec![0.0; self.from * self.to];
        for (row, values) in values.chunks_exact_mut(self.to.max(1)).enumerate() {
            for (panel, values) in values.chunks_mut(PANEL).enumerate() {
                let sums = &self.sums[(panel * height + row) * PANEL..];
                values.copy_from_slice(&sums[..values.len()]);
            }
        }
        values
    }
}
