//! Prepared weights on the CPU, and the products with them. Weights are stored in panels of columns
//! that stay in the L1 cache while a block of rows is multiplied.
//!
//! The operations before a product (norm, gate) and after it (activation, residual) are applied to
//! the block while it is in the cache.

use burn::tensor::TensorMetadata;
use burn::tensor::ops::FloatTensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::isa::IsaKernel;
use super::lanes::{Lanes, MAX_LANES};
use super::product::{Activation, Matrix, multiply};
use super::rowwise::{Stats, normalise};
use super::{Isa, StridedRows, matrix, readable, rows, span};
use crate::dense::{DenseBackend, GateInputs, NormWeights};
use crate::layer::Affine;

/// Columns per panel: at least two vectors of any instruction set.
pub(super) const PANEL: usize = 2 * MAX_LANES;

/// Rows per block.
const BLOCK: usize = 64;

/// Multiply-adds from which a product uses more than one thread.
const PARALLEL_FROM: usize = 2_000_000;

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

/// The left factor of a product, before its norm and gate.
#[derive(Clone, Copy)]
struct DenseInput<'a> {
    /// `[rows, from]`: normalised with the scale and shift.
    x: StridedRows<'a>,
    scale: &'a [f32],
    shift: &'a [f32],
    epsilon: f32,
    /// `[rows, from]`: multiplied elementwise with the normalised x.
    gate: Option<StridedRows<'a>>,
}

/// The operation after a product.
#[derive(Clone, Copy)]
enum DenseOutput<'a> {
    /// SiLU of the product.
    Activated,
    /// The product plus a residual `[rows, to]`.
    Added(StridedRows<'a>),
}

/// The product of all rows, `[count, to]`.
fn product(
    input: DenseInput<'_>,
    linear: &Prepared,
    output: DenseOutput<'_>,
    count: usize,
) -> Vec<f32> {
    assert_eq!((input.scale.len(), input.shift.len()), (linear.from, linear.from), "norm's width");
    let mut out = vec![0.0; count * linear.to];
    let isa = Isa::best().checked();
    let block = |left: &mut Matrix, (index, out): (usize, &mut [f32])| {
        let job = DenseJob { input, linear, output, first: index * BLOCK };
        isa.run(DenseBlock { job: &job, left, out });
    };
    let size = (BLOCK * linear.to).max(1);
    if count * linear.from * linear.to < PARALLEL_FROM {
        let mut left = Matrix::default();
        out.chunks_mut(size).enumerate().for_each(|part| block(&mut left, part));
    } else {
        out.par_chunks_mut(size).enumerate().for_each_init(Matrix::default, block);
    }
    out
}

/// The inputs of a block of rows.
struct DenseJob<'a> {
    input: DenseInput<'a>,
    linear: &'a Prepared,
    output: DenseOutput<'a>,
    first: usize,
}

/// Computes a block.
struct DenseBlock<'a> {
    job: &'a DenseJob<'a>,
    /// Buffer for the product's left factor.
    left: &'a mut Matrix,
    out: &'a mut [f32],
}

impl IsaKernel for DenseBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        run::<V, R>(self.job, self.left, self.out);
    }
}

#[inline(always)]
fn run<V: Lanes, const R: usize>(job: &DenseJob<'_>, left: &mut Matrix, out: &mut [f32]) {
    let (from, to) = (job.linear.from, job.linear.to);
    let count = out.len() / to;
    left.resize(count, from);
    for row in 0..count {
        prepare_row(&job.input, job.first + row, &mut left.row_mut(row)[..from]);
    }
    let activation = match job.output {
        DenseOutput::Activated => Activation::Silu,
        DenseOutput::Added(_) => Activation::None,
    };
    let (factor, panels) = (left.factor(0..count), 0..to.div_ceil(PANEL));
    multiply::<V, R>(&factor, job.linear, panels, activation, |row, panel, values| {
        let columns = panel * PANEL..to.min((panel + 1) * PANEL);
        let out = &mut out[row * to..][columns.clone()];
        match job.output {
            DenseOutput::Activated => out.copy_from_slice(&values[..out.len()]),
            DenseOutput::Added(x) => {
                let x = &x.data[(job.first + row) * x.stride..][columns];
                for ((out, value), x) in out.iter_mut().zip(values).zip(x) {
                    *out = *value + x;
                }
            }
        }
    });
}

/// Computes a row of the left factor: normalised, and gated if there is a gate.
#[inline(always)]
fn prepare_row(input: &DenseInput<'_>, row: usize, left: &mut [f32]) {
    let width = left.len();
    let x = &input.x.data[row * input.x.stride..][..width];
    let stats = Stats::of(x, input.epsilon);
    let weights = Affine { scale: &input.scale[..width], shift: &input.shift[..width] };
    normalise(x, stats, weights, left);
    if let Some(gate) = input.gate {
        for (left, gate) in left.iter_mut().zip(&gate.data[row * gate.stride..][..width]) {
            *left *= gate;
        }
    }
}

impl DenseBackend for Flex {
    type Prepared = Prepared;

    fn prepare(weight: FloatTensor<Self>, bias: Option<FloatTensor<Self>>) -> Prepared {
        let shape = [weight.shape()[0], weight.shape()[1]];
        let (weight, bias) = (readable(weight), bias.map(readable));
        let bias = bias.as_ref().map_or(&[][..], |bias| &bias.storage()[span(bias)]);
        Prepared::new(rows(&weight), shape, bias)
    }

    fn mix(
        x: FloatTensor<Self>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Prepared,
    ) -> FloatTensor<Self> {
        assert_eq!(x.shape()[1], linear.from, "the width of x");
        let (count, x, norm) = (x.shape()[0], readable(x), readable_norm(norm));
        let input = input(&x, &norm, None);
        matrix(product(input, linear, DenseOutput::Activated, count), count, linear.to)
    }

    fn gate(
        gated: GateInputs<FloatTensor<Self>>,
        norm: NormWeights<FloatTensor<Self>>,
        linear: &Prepared,
    ) -> FloatTensor<Self> {
        let GateInputs { x, attended, u } = gated;
        let count = x.shape()[0];
        assert_eq!(x.shape()[..], [count, linear.to], "the layer's input");
        assert_eq!(attended.shape()[..], [count, linear.from], "the output of attention");
        assert_eq!(u.shape()[..], [count, linear.from], "U");
        let (x, attended, u) = (readable(x), readable(attended), readable(u));
        let norm = readable_norm(norm);
        let input = input(&attended, &norm, Some(rows(&u)));
        matrix(product(input, linear, DenseOutput::Added(rows(&x)), count), count, linear.to)
    }
}

fn readable_norm(norm: NormWeights<FloatTensor<Flex>>) -> NormWeights<FloatTensor<Flex>> {
    NormWeights { scale: readable(norm.scale), shift: readable(norm.shift), epsilon: norm.epsilon }
}

fn input<'a>(
    x: &'a FloatTensor<Flex>,
    norm: &'a NormWeights<FloatTensor<Flex>>,
    gate: Option<StridedRows<'a>>,
) -> DenseInput<'a> {
    DenseInput {
        x: rows(x),
        scale: &norm.scale.storage()[span(&norm.scale)],
        shift: &norm.shift.storage()[span(&norm.shift)],
        epsilon: norm.epsilon,
        gate,
    }
}
