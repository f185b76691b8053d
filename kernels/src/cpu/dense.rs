//! Prepared weights on the CPU, and the products that use them: panels of
//! columns that stay in the first cache while a block of rows passes.
//!
//! What goes into a product (a norm, a gate) and what comes out of it (an
//! activation, a residual) is done on the block, and never written to memory between.

use burn::tensor::TensorMetadata;
use burn::tensor::ops::FloatTensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::lanes::{self, Lanes, MAX_LANES};
use super::math::{Extent, Left, Right, accumulate, sigmoid};
use super::{Isa, Rows, matrix, readable, rows, span};
use crate::dense::{DenseBackend, Gated, Norm};

/// Columns of a panel: two vectors of any instruction set, or more.
const PANEL: usize = 2 * MAX_LANES;

/// Rows of a block.
const BLOCK: usize = 64;

/// Multiply-adds from which a product goes to more than one thread.
const PARALLEL_FROM: usize = 2_000_000;

/// The weights of a linear layer, by panels of columns.
#[derive(Debug)]
pub struct Prepared {
    from: usize,
    to: usize,
    /// `[panels, from, PANEL]`, zeros after the last column.
    panels: Vec<f32>,
    /// `[panels, PANEL]`.
    bias: Vec<f32>,
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
    let isa = Isa::best();
    let block = |scratch: &mut Scratch, (index, out): (usize, &mut [f32])| {
        let job = Job { input, linear, output, first: index * BLOCK };
        match isa {
            Isa::Portable => run::<lanes::Portable, 2>(&job, scratch, out),
            // SAFETY: `Isa::best` found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { run_avx2(&job, scratch, out) },
            // SAFETY: `Isa::best` found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { run_avx512(&job, scratch, out) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("{isa:?} is not available here"),
        }
    };
    let size = (BLOCK * linear.to).max(1);
    if count * linear.from * linear.to < PARALLEL_FROM {
        let mut scratch = Scratch::default();
        out.chunks_mut(size).enumerate().for_each(|part| block(&mut scratch, part));
    } else {
        out.par_chunks_mut(size).enumerate().for_each_init(Scratch::default, block);
    }
    out
}

#[derive(Default)]
struct Scratch {
    /// `[BLOCK, from]`: the product's left factor.
    left: Vec<f32>,
    /// `[R, PANEL]`.
    tile: Vec<f32>,
}

/// A block of rows.
struct Job<'a> {
    input: Input<'a>,
    linear: &'a Prepared,
    output: Output<'a>,
    first: usize,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn run_avx2(job: &Job<'_>, scratch: &mut Scratch, out: &mut [f32]) {
    run::<lanes::F32x8, 4>(job, scratch, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt,avx512f,avx512cd")]
fn run_avx512(job: &Job<'_>, scratch: &mut Scratch, out: &mut [f32]) {
    run::<lanes::F32x16, 8>(job, scratch, out);
}

#[inline(always)]
fn run<V: Lanes, const R: usize>(job: &Job<'_>, scratch: &mut Scratch, out: &mut [f32]) {
    let Prepared { from, to, panels, bias } = job.linear;
    let (from, to) = (*from, *to);
    let count = out.len() / to;
    scratch.left.clear();
    scratch.left.resize(count.next_multiple_of(R) * from, 0.0);
    for (row, left) in scratch.left.chunks_exact_mut(from).take(count).enumerate() {
        prepare_row(&job.input, job.first + row, left);
    }
    scratch.tile.resize(R * PANEL, 0.0);
    for (panel, right) in panels.chunks_exact(from * PANEL).enumerate() {
        let (column, width) = (panel * PANEL, PANEL.min(to - panel * PANEL));
        let bias = &bias[column..][..PANEL];
        for row in (0..count).step_by(R) {
            for tile in scratch.tile.chunks_exact_mut(PANEL) {
                tile.copy_from_slice(bias);
            }
            accumulate::<V, R>(
                &mut scratch.tile,
                PANEL,
                Left { data: &scratch.left[row * from..], row: from, step: 1 },
                Right { data: right, stride: PANEL },
                Extent { columns: PANEL, steps: from },
            );
            for (r, tile) in scratch.tile.chunks_exact_mut(PANEL).enumerate().take(count - row) {
                let at = (row + r) * to + column;
                finish::<V>(job, tile, row + r, column, &mut out[at..at + width]);
            }
        }
    }
}

/// A row of a product to its place.
#[inline(always)]
fn finish<V: Lanes>(job: &Job<'_>, tile: &mut [f32], row: usize, column: usize, out: &mut [f32]) {
    match job.output {
        Output::Activated => {
            assert_eq!(tile.len() % V::N, 0, "a tile is of whole vectors");
            for at in (0..tile.len()).step_by(V::N) {
                // SAFETY: at + N <= tile.len(), by the assertion.
                unsafe {
                    let cell = tile.as_mut_ptr().add(at);
                    let x = V::load(cell);
                    x.mul(sigmoid(x)).store(cell);
                }
            }
            out.copy_from_slice(&tile[..out.len()]);
        }
        Output::Added(x) => {
            let x = &x.data[(job.first + row) * x.stride + column..][..out.len()];
            for ((out, tile), x) in out.iter_mut().zip(&*tile).zip(x) {
                *out = tile + x;
            }
        }
    }
}

/// The left factor's row: normalised, and gated where there is a gate.
#[inline(always)]
fn prepare_row(input: &Input<'_>, row: usize, left: &mut [f32]) {
    let width = left.len();
    let x = &input.x.data[row * input.x.stride..][..width];
    let mean = x.iter().sum::<f32>() / width as f32;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
    let factor = 1.0 / (variance + input.epsilon).sqrt();
    let weights = input.scale[..width].iter().zip(&input.shift[..width]);
    for ((left, x), (scale, shift)) in left.iter_mut().zip(x).zip(weights) {
        *left = (x - mean) * factor * scale + shift;
    }
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
