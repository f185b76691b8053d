//! The products of fused ops and of their gradients, over some rows at a time.

use std::ops::Range;

use super::dense::{PANEL, Prepared};
use super::lanes::Lanes;
use super::math::{Extent, Left, Right, accumulate};
use super::rowwise::activate;

/// No tile is higher.
const TALLEST: usize = 8;

/// Rows of a product of weights' gradients whose factors stay in the first cache.
const BLOCK: usize = 128;

/// Some rows of something, with room for whole tiles after them.
#[derive(Default)]
pub(super) struct Matrix {
    pub(super) data: Vec<f32>,
    pub(super) stride: usize,
}

impl Matrix {
    /// For `rows` rows of `width` values; what was in it is anything now.
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        // Not a power of two, so that the rows of a column do not meet in one set of the cache.
        self.stride = width.next_multiple_of(PANEL) + 16;
        self.data.resize((rows + TALLEST) * self.stride, 0.0);
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

/// A product's left factor: some rows, and the columns from `first` on, which meet the weights' rows
/// from `first` on.
#[derive(Clone)]
pub(super) struct Factor<'a> {
    pub(super) matrix: &'a Matrix,
    pub(super) rows: Range<usize>,
    pub(super) first: usize,
}

/// Gives each row of `factor · right + bias` to `finish`, by panels of columns: `(row, panel, values)`.
#[inline(always)]
pub(super) fn multiply<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    panels: Range<usize>,
    mut finish: impl FnMut(usize, usize, &mut [f32]),
) {
    const { assert!(R <= TALLEST) };
    let mut tile = [0.0; TALLEST * PANEL];
    let (Factor { matrix, rows, first }, steps) = (factor, right.from - factor.first);
    for panel in panels {
        let weights = &right.panels[(panel * right.from + first) * PANEL..][..steps * PANEL];
        let bias = &right.bias[panel * PANEL..][..PANEL];
        for row in rows.clone().step_by(R) {
            for tile in tile[..R * PANEL].chunks_exact_mut(PANEL) {
                tile.copy_from_slice(bias);
            }
            accumulate::<V, R>(
                &mut tile,
                PANEL,
                Left {
                    data: &matrix.data[row * matrix.stride + first..],
                    row: matrix.stride,
                    step: 1,
                },
                Right { data: weights, stride: PANEL },
                Extent { columns: PANEL, steps },
            );
            let count = R.min(rows.end - row);
            for (r, values) in tile.chunks_exact_mut(PANEL).enumerate().take(count) {
                finish(row + r, panel, values);
            }
        }
    }
}

/// Writes `SiLU(factor · right + bias)` to the same rows of `out`, and the activation's slopes where
/// there is room for them. The activation takes a pass of its own, because the compiler may leave a
/// closure a function, which would be without the kernel's instruction set.
#[inline(always)]
pub(super) fn multiply_activated<V: Lanes, const R: usize>(
    factor: &Factor<'_>,
    right: &Prepared,
    panels: Range<usize>,
    out: &mut Matrix,
    mut slopes: Option<&mut Matrix>,
) {
    let columns = panels.start * PANEL..panels.end * PANEL;
    multiply::<V, R>(factor, right, panels, |row, panel, values| {
        out.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
    });
    for row in factor.rows.clone() {
        let slopes = slopes.as_mut().map(|slopes| &mut slopes.row_mut(row)[columns.clone()]);
        activate::<V>(&mut out.row_mut(row)[columns.clone()], slopes);
    }
}

/// The gradient of weights `[from, to]`, by panels as [`Prepared`] has them.
pub(super) struct WeightGrad {
    from: usize,
    to: usize,
    /// `[panels, from up to whole tiles, PANEL]`.
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
                        Extent { columns: PANEL, steps },
                    );
                }
            }
        }
    }

    /// `[from, to]`, row-major.
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
