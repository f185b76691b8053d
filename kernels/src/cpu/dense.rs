//! Prepared weights on the CPU, and the products with them. Weights are stored in panels of columns
//! that stay in the L1 cache while a block of rows is multiplied.
//!
//! The operations before a product (norm, gate) and after it (activation, residual) are applied to
//! the block while it is in the cache.

use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use super::isa::IsaKernel;
use super::lanes::{Lanes, MAX_LANES};
use super::product::{Activation, Matrix, multiply};
use super::rowwise::{Stats, normalise};
use super::{Isa, StridedRows, matrix, readable, rows, values};
use crate::dense::{GateInputs, NormWeights, PreparedLinear};
use crate::layer::Affine;

/// Columns per panel: at least two vectors of any instruction set.
pub(super) const PANEL: usize = 2 * MAX_LANES;

/// Rows per block.
pub(super) const BLOCK: usize = 64;

/// Multiply-adds from which a product uses more than one thread.
pub(super) const PARALLEL_FROM: usize = 2_000_000;

/// The weights of a linear layer, in panels of columns.
#[derive(Debug)]
pub struct Prepared {
    pub(super) from: usize,
    pub(super) to: usize,
    /// `[panels, from, PANEL]`, zeros after the last column.
    pub(super) panels: Vec<f32>,
    /// `[panels, PANEL]`.
    pub(super) bias: Vec<f32>,
}

impl Prepared {
    /// Lays out `weight`, row-major `[from, to]`, and `bias`, `[to]` or empty.
    ///
    /// # Panics
    /// If the bias has another length.
    pub fn new(weight: StridedRows<'_>, [from, to]: [usize; 2], bias: &[f32]) -> Self {
        assert!(bias.is_empty() || bias.len() == to, "{} biases for {to} columns", bias.len());
        let panels = to.div_ceil(PANEL);
        let mut laid = vec![0.0; panels * from * PANEL];
        for row in 0..from {
            let values = &weight.data[row * weight.stride..][..to];
            for (panel, values) in values.chunks(PANEL).enumerate() {
                laid[(panel * from + row) * PANEL..][..values.len()].copy_from_slice(values);
            }
        }
        let mut padded = vec![0.0; panels * PANEL];
        padded[..bias.len()].copy_from_slice(bias);
        Self { from, to, panels: laid, bias: padded }
    }

    /// The size in bytes of prepared weights `[from, to]` with their bias.
    pub fn bytes(from: usize, to: usize) -> u64 {
        let columns = to.div_ceil(PANEL).saturating_mul(PANEL * size_of::<f32>()) as u64;
        columns.saturating_mul(from as u64 + 1)
    }

    /// Lays out the transpose of `weight`, row-major `[to, from]`, for the backward pass.
    pub(super) fn transposed(weight: StridedRows<'_>, [from, to]: [usize; 2]) -> Self {
        let panels = to.div_ceil(PANEL);
        let mut laid = vec![0.0; panels * from * PANEL];
        for column in 0..to {
            let values = &weight.data[column * weight.stride..][..from];
            let panel = &mut laid[(column / PANEL) * from * PANEL + column % PANEL..];
            for (cell, value) in panel.iter_mut().step_by(PANEL).zip(values) {
                *cell = *value;
            }
        }
        Self { from, to, panels: laid, bias: vec![0.0; panels * PANEL] }
    }
}

/// The inputs of a product of all rows: the left factor before its norm and gate.
#[derive(Clone, Copy)]
struct DenseInput<'a> {
    /// `[rows, from]`: normalised with the weights.
    x: StridedRows<'a>,
    norm: Affine<&'a [f32]>,
    epsilon: f32,
    /// `[rows, from]`: multiplied elementwise with the normalised x.
    gate: Option<StridedRows<'a>>,
    /// `[rows, to]`: added to the product; without it, the result is the product's SiLU.
    residual: Option<StridedRows<'a>>,
}

/// The product of all rows, `[count, to]`.
fn product(input: DenseInput<'_>, linear: &Prepared, count: usize) -> FlexTensor {
    let Affine { scale, shift } = input.norm;
    assert_eq!((scale.len(), shift.len()), (linear.from, linear.from), "norm's width");
    let mut out = vec![0.0; count * linear.to];
    let isa = Isa::best().checked();
    let block = |left: &mut Matrix, (index, out): (usize, &mut [f32])| {
        isa.run(DenseBlock { input: &input, linear, first: index * BLOCK, left, out });
    };
    let size = (BLOCK * linear.to).max(1);
    if count * linear.from * linear.to < PARALLEL_FROM {
        let mut left = Matrix::default();
        out.chunks_mut(size).enumerate().for_each(|part| block(&mut left, part));
    } else {
        out.par_chunks_mut(size).enumerate().for_each_init(Matrix::default, block);
    }
    matrix(out, count, linear.to)
}

/// Computes a block of rows.
struct DenseBlock<'a> {
    input: &'a DenseInput<'a>,
    linear: &'a Prepared,
    first: usize,
    /// Buffer for the product's left factor.
    left: &'a mut Matrix,
    out: &'a mut [f32],
}

impl IsaKernel for DenseBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let DenseBlock { input, linear, first, left, out } = self;
        let (from, to) = (linear.from, linear.to);
        let count = out.len() / to;
        left.resize(count, from);
        for row in 0..count {
            prepare_row(input, first + row, &mut left.row_mut(row)[..from]);
        }
        let activation = match input.residual {
            None => Activation::Silu,
            Some(_) => Activation::None,
        };
        let (factor, panels) = (left.factor(0..count), 0..to.div_ceil(PANEL));
        multiply::<V, R>(&factor, linear, panels, activation, |row, panel, values| {
            let columns = panel * PANEL..to.min((panel + 1) * PANEL);
            let out = &mut out[row * to..][columns.clone()];
            match input.residual {
                None => out.copy_from_slice(&values[..out.len()]),
                Some(x) => {
                    let x = &x.data[(first + row) * x.stride..][columns];
                    for ((out, value), x) in out.iter_mut().zip(values).zip(x) {
                        *out = *value + x;
                    }
                }
            }
        });
    }
}

/// Computes a row of the left factor: normalised, and gated if there is a gate.
#[inline(always)]
fn prepare_row(input: &DenseInput<'_>, row: usize, left: &mut [f32]) {
    let width = left.len();
    let x = &input.x.data[row * input.x.stride..][..width];
    let Affine { scale, shift } = input.norm;
    let weights = Affine { scale: &scale[..width], shift: &shift[..width] };
    normalise(x, Stats::of(x, input.epsilon), weights, left);
    if let Some(gate) = input.gate {
        for (left, gate) in left.iter_mut().zip(&gate.data[row * gate.stride..][..width]) {
            *left *= gate;
        }
    }
}

impl PreparedLinear<Flex> for Prepared {
    fn prepare(weight: FlexTensor, bias: Option<FlexTensor>) -> Self {
        let shape = [weight.shape()[0], weight.shape()[1]];
        let (weight, bias) = (readable(weight), bias.map(readable));
        Prepared::new(rows(&weight), shape, bias.as_ref().map_or(&[], values))
    }

    fn mix(&self, x: FlexTensor, norm: NormWeights<FlexTensor>) -> FlexTensor {
        assert_eq!(x.shape()[1], self.from, "the width of x");
        let (count, x, affine) = (x.shape()[0], readable(x), norm.affine.map(readable));
        let (x, epsilon, norm) = (rows(&x), norm.epsilon, affine.as_ref().map(values));
        let input = DenseInput { x, norm, epsilon, gate: None, residual: None };
        product(input, self, count)
    }

    fn gate(&self, gated: GateInputs<FlexTensor>, norm: NormWeights<FlexTensor>) -> FlexTensor {
        let GateInputs { x, attended, u } = gated;
        let count = x.shape()[0];
        assert_eq!(x.shape()[..], [count, self.to], "the layer's input");
        assert_eq!(attended.shape()[..], [count, self.from], "the output of attention");
        assert_eq!(u.shape()[..], [count, self.from], "U");
        let [x, attended, u] = [x, attended, u].map(readable);
        let affine = norm.affine.map(readable);
        let (epsilon, norm) = (norm.epsilon, affine.as_ref().map(values));
        let (gate, residual) = (Some(rows(&u)), Some(rows(&x)));
        product(DenseInput { x: rows(&attended), norm, epsilon, gate, residual }, self, count)
    }
}
