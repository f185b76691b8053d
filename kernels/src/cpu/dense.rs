//! Prepared weights on the CPU, and the products that use them: panels of
//! columns that stay in the first cache while a block of rows passes.
//!
//! What goes into a product (a norm, a gate) and what comes out of it (an
//! activation, a residual) is done on the block, and never written to memory between.

use burn::tensor::TensorMetadata;
use burn::tensor::ops::FloatTensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::isa::Kernel;
use super::lanes::{Lanes, MAX_LANES};
use super::product::{Activation, Matrix, multiply};
use super::rowwise::{Stats, normalise};
use super::{Isa, Rows, matrix, readable, rows, span};
use crate::dense::{DenseBackend, Gated, Norm};

/// Columns of a panel: two vectors of any instruction set, or more.
pub(super) const PANEL: usize = 2 * MAX_LANES;

/// Rows of a block.
const BLOCK: usize = 64;

/// Multiply-adds from which a product goes to more than one thread.
const PARALLEL_FROM: usize = 2_000_000;

/// The weights of a linear layer, by panels of columns.
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
    /// Lays out `weight`, row-major `[from, to]`, and `bias` `[to]` or nothing.
    ///
    /// # Panics
    /// If the bias has another length.
    pub fn new(weight: Rows<'_>, [from, to]: [usize; 2], bias: &[f32]) -> Self {
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

    /// Lays out the transpose of `weight`, row-major `[to, from]`: what a gradient goes back through.
    pub(super) fn transposed(weight: Rows<'_>, [from, to]: [usize; 2]) -> Self {
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

/// What a product is of.
#[derive(Clone, Copy)]
struct Input<'a> {
    /// `[rows, from]`: normalised first.
    x: Rows<'a>,
    scale: &'a [f32],
    shift: &'a [f32],
    epsilon: f32,
    /// `[rows, from]`: multiplied with what is normalised.
    gate: Option<Rows<'a>>,
}

/// What becomes of a product.
#[derive(Clone, Copy)]
enum Output<'a> {
    /// SiLU.
    Activated,
    /// Added to `[rows, to]`.
    Added(Rows<'a>),
}

/// `[count, to]`.
fn product(input: Input<'_>, linear: &Prepared, output: Output<'_>, count: usize) -> Vec<f32> {
    assert_eq!((input.scale.len(), input.shift.len()), (linear.from, linear.from), "norm's width");
    let mut out = vec![0.0; count * linear.to];
    let isa = Isa::best().checked();
    let block = |left: &mut Matrix, (index, out): (usize, &mut [f32])| {
        let job = Job { input, linear, output, first: index * BLOCK };
        isa.run(Block { job: &job, left, out });
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

/// A block of rows.
struct Job<'a> {
    input: Input<'a>,
    linear: &'a Prepared,
    output: Output<'a>,
    first: usize,
}

/// Computes a block.
struct Block<'a> {
    job: &'a Job<'a>,
    /// The product's left factor.
    left: &'a mut Matrix,
    out: &'a mut [f32],
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        run::<V, R>(self.job, self.left, self.out);
    }
}

#[inline(always)]
fn run<V: Lanes, const R: usize>(job: &Job<'_>, left: &mut Matrix, out: &mut [f32]) {
    let (from, to) = (job.linear.from, job.linear.to);
    let count = out.len() / to;
    left.resize(count, from);
    for row in 0..count {
        prepare_row(&job.input, job.first + row, &mut left.row_mut(row)[..from]);
    }
    let activation = match job.output {
        Output::Activated => Activation::Silu,
        Output::Added(_) => Activation::None,
    };
    let (factor, panels) = (left.factor(0..count), 0..to.div_ceil(PANEL));
    multiply::<V, R>(&factor, job.linear, panels, activation, |row, panel, values| {
        let columns = panel * PANEL..to.min((panel + 1) * PANEL);
        let out = &mut out[row * to..][columns.clone()];
        match job.output {
            Output::Activated => out.copy_from_slice(&values[..out.len()]),
            Output::Added(x) => {
                let x = &x.data[(job.first + row) * x.stride..][columns];
                for ((out, value), x) in out.iter_mut().zip(values).zip(x) {
                    *out = *value + x;
                }
            }
        }
    });
}

/// The left factor's row: normalised, and gated where there is a gate.
#[inline(always)]
fn prepare_row(input: &Input<'_>, row: usize, left: &mut [f32]) {
    let width = left.len();
    let x = &input.x.data[row * input.x.stride..][..width];
    let stats = Stats::of(x, input.epsilon);
    normalise(x, stats, (&input.scale[..width], &input.shift[..width]), left);
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
        norm: Norm<FloatTensor<Self>>,
        linear: &Prepared,
    ) -> FloatTensor<Self> {
        assert_eq!(x.shape()[1], linear.from, "the width of x");
        let (count, x, norm) = (x.shape()[0], readable(x), readable_norm(norm));
        let input = input(&x, &norm, None);
        matrix(product(input, linear, Output::Activated, count), count, linear.to)
    }

    fn gate(
        gated: Gated<FloatTensor<Self>>,
        norm: Norm<FloatTensor<Self>>,
        linear: &Prepared,
    ) -> FloatTensor<Self> {
        let Gated { x, attended, u } = gated;
        let count = x.shape()[0];
        assert_eq!(x.shape()[..], [count, linear.to], "the layer's input");
        assert_eq!(attended.shape()[..], [count, linear.from], "what attention gave");
        assert_eq!(u.shape()[..], [count, linear.from], "U");
        let (x, attended, u) = (readable(x), readable(attended), readable(u));
        let norm = readable_norm(norm);
        let input = input(&attended, &norm, Some(rows(&u)));
        matrix(product(input, linear, Output::Added(rows(&x)), count), count, linear.to)
    }
}

fn readable_norm(norm: Norm<FloatTensor<Flex>>) -> Norm<FloatTensor<Flex>> {
    Norm { scale: readable(norm.scale), shift: readable(norm.shift), epsilon: norm.epsilon }
}

fn input<'a>(
    x: &'a FloatTensor<Flex>,
    norm: &'a Norm<FloatTensor<Flex>>,
    gate: Option<Rows<'a>>,
) -> Input<'a> {
    Input {
        x: rows(x),
        scale: &norm.scale.storage()[span(&norm.scale)],
        shift: &norm.shift.storage()[span(&norm.shift)],
        epsilon: norm.epsilon,
        gate,
    }
}
