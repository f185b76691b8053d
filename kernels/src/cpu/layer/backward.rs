//! The backward of one group.
//!
//! With g the output's gradient, N = LN(A), D the dropout's mask and G = N ⊙ U ⊙ D:
//! `dG = g W_oᵀ`, `dU = dG ⊙ D ⊙ N`, `dN = dG ⊙ D ⊙ U`, `dW_o = Gᵀ g`; attention's
//! backward gives dQ, dK and dV; with Z what the activation was of,
//! `dZ = d(U, Q, V, K) ⊙ SiLU'(Z)`, `db = Σ dZ`, `dW = LN(x)ᵀ dZ`, and x gets g and
//! what comes through its norm of `dZ Wᵀ`.

use super::Layer;
use super::forward::{Mix, Mixed};
use super::group::Group;
use crate::cpu::dense::{PANEL, Prepared};
use crate::cpu::isa::Kernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Factor, Matrix, WeightGrad, multiply};
use crate::cpu::rowwise::{NormGrads, Stats, drop_out, normalise};
use crate::cpu::task::{Sink, Task};
use crate::cpu::{Rows, add_to, backward};
use crate::layer::{Affine, LayerInputs, LayerOutput};

/// What all groups share.
pub(super) struct Pass<'a> {
    pub(super) layer: Layer<'a>,
    /// Wᵀ and W_oᵀ.
    pub(super) mix: Prepared,
    pub(super) output: Prepared,
    /// The output's gradient, and what attention gave.
    pub(super) given: &'a LayerOutput<Rows<'a>>,
}

/// A thread's memory: it grows with a group.
#[derive(Default)]
pub(super) struct Scratch {
    mixed: Mixed,
    attention: backward::Scratch,
    /// g.
    grad: Matrix,
    /// N, then G.
    gated: Matrix,
    /// dG, then dN, then attention's dA.
    attended_grad: Matrix,
    /// d(U, Q, V, K), then dZ.
    mixed_grad: Matrix,
    /// Of LN(x), then of x.
    x_grad: Matrix,
}

/// The gradients of the weights: sums over groups.
pub(super) struct Sums {
    norm_in: NormGrads,
    mix: WeightGrad,
    /// Up to whole panels.
    bias: Vec<f32>,
    position: Option<Vec<f32>>,
    time: Option<Vec<f32>>,
    norm_out: NormGrads,
    output: WeightGrad,
}

impl Sums {
    pub(super) fn new(layer: &Layer<'_>) -> Self {
        let (dim, v, width) = (layer.widths.dim, layer.widths.v, layer.mix.to);
        let table = |table: &[f32]| vec![0.0; table.len()];
        Sums {
            norm_in: NormGrads::new(dim),
            mix: WeightGrad::new([dim, width]),
            bias: vec![0.0; width.next_multiple_of(PANEL)],
            position: layer.inputs.position.map(table),
            time: layer.inputs.time.map(table),
            norm_out: NormGrads::new(v),
            output: WeightGrad::new([v, dim]),
        }
    }

    pub(super) fn add(&mut self, other: &Sums) {
        add_to(Some(&mut self.norm_in.scale), &other.norm_in.scale);
        add_to(Some(&mut self.norm_in.shift), &other.norm_in.shift);
        add_to(Some(&mut self.mix.sums), &other.mix.sums);
        add_to(Some(&mut self.bias), &other.bias);
        add_to(self.position.as_deref_mut(), other.position.as_deref().unwrap_or(&[]));
        add_to(self.time.as_deref_mut(), other.time.as_deref().unwrap_or(&[]));
        add_to(Some(&mut self.norm_out.scale), &other.norm_out.scale);
        add_to(Some(&mut self.norm_out.shift), &other.norm_out.shift);
        add_to(Some(&mut self.output.sums), &other.output.sums);
    }

    /// All gradients, with x's.
    pub(super) fn into_grads(mut self, x: Vec<f32>, layer: &Layer<'_>) -> LayerInputs<Vec<f32>> {
        self.bias.truncate(layer.mix.to);
        let affine = |norm: NormGrads| Affine { scale: norm.scale, shift: norm.shift };
        LayerInputs {
            x,
            norm_in: affine(self.norm_in),
            uvqk: self.mix.row_major(),
            bias: self.bias,
            position: self.position,
            time: self.time,
            norm_out: affine(self.norm_out),
            output: self.output.row_major(),
        }
    }
}

pub(super) fn run(
    pass: &Pass<'_>,
    group: &Group,
    scratch: &mut Scratch,
    sums: &mut Sums,
    x_grads: &Sink<'_>,
) {
    let layer = &pass.layer;
    layer.isa.run(Mix { layer, group, mixed: &mut scratch.mixed, sloped: true });
    layer.isa.run(Ungate { pass, group, scratch: &mut *scratch, sums: &mut *sums });
    differentiate_attention(layer, group, scratch, sums);
    layer.isa.run(Unmix { pass, group, scratch, sums, x_grads });
}

fn differentiate_attention(
    layer: &Layer<'_>,
    group: &Group,
    scratch: &mut Scratch,
    sums: &mut Sums,
) {
    let Scratch { mixed, attention, attended_grad, mixed_grad, .. } = scratch;
    let (v, qk) = (layer.widths.v, layer.widths.qk);
    let whole = Sink::new(&mut mixed_grad.data, mixed_grad.stride);
    let sinks = backward::Sinks {
        q: whole.columns_from(v),
        v: whole.columns_from(v + qk),
        k: whole.columns_from(2 * v + qk),
    };
    let inputs = mixed.attention_inputs(layer);
    let grad = Rows { data: &attended_grad.data, stride: attended_grad.stride };
    let dims = layer.dims(group);
    for index in 0..group.attention.requests() * group.attention.heads {
        let task = &Task::new(&group.attention, dims, &inputs, index).with_grad(grad);
        let kernel = backward::Differentiate { task, scratch: attention, sinks: &sinks };
        let found = layer.isa.run(kernel);
        add_to(sums.position.as_deref_mut(), &found.position);
        add_to(sums.time.as_deref_mut(), &found.time);
    }
}

/// From the output's gradient to those of U, A, W_o and the norm of A.
struct Ungate<'a> {
    pass: &'a Pass<'a>,
    group: &'a Group,
    scratch: &'a mut Scratch,
    sums: &'a mut Sums,
}

impl Kernel for Ungate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Ungate { pass: Pass { layer, output, given, .. }, group, scratch, sums } = self;
        let Scratch { mixed, grad, gated, attended_grad, mixed_grad, .. } = scratch;
        let (dim, v, qk) = (layer.widths.dim, layer.widths.v, layer.widths.qk);
        let rows = group.first_out()..group.rows();
        grad.resize(group.rows(), dim);
        gated.resize(group.rows(), v);
        attended_grad.resize(group.rows(), v);
        mixed_grad.resize(group.rows(), layer.mix.to);
        for row in rows.clone() {
            let given = &given.out.data[group.out_row(row) * given.out.stride..][..dim];
            grad.row_mut(row)[..dim].copy_from_slice(given);
        }
        let (factor, panels) = (grad.factor(rows.clone()), 0..v.div_ceil(PANEL));
        multiply::<V, R>(&factor, output, panels, Activation::None, |row, panel, values| {
            attended_grad.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
        });
        let norm = &layer.inputs.norm_out;
        for row in rows.clone() {
            let out_row = group.out_row(row);
            let attended = &given.attended.data[out_row * given.attended.stride..][..v];
            let (gated, grad) =
                (&mut gated.row_mut(row)[..v], &mut attended_grad.row_mut(row)[..v]);
            let stats = Stats::of(attended, layer.options.epsilon);
            normalise(attended, stats, (norm.scale, norm.shift), gated);
            drop_out(layer.options.dropout, out_row, gated);
            let (u, u_grad) = (&mixed.uvqk.row(row)[..v], &mut mixed_grad.row_mut(row)[..v]);
            for ((u_grad, grad), gated) in u_grad.iter_mut().zip(&*grad).zip(&*gated) {
                *u_grad = grad * gated;
            }
            drop_out(layer.options.dropout, out_row, grad);
            for ((gated, grad), u) in gated.iter_mut().zip(&mut *grad).zip(u) {
                *gated *= u;
                *grad *= u;
            }
            sums.norm_out.differentiate(attended, stats, norm.scale, grad);
        }
        // History tokens without an output have no U and attend to nothing.
        for row in 0..rows.start {
            mixed_grad.row_mut(row)[..v + qk].fill(0.0);
        }
        sums.output.add::<V, R>([gated, grad], rows, 0..dim.div_ceil(PANEL));
    }
}

/// From the gradients of U, Q, V and K to those of x, W, b and the norm of x.
struct Unmix<'a> {
    pass: &'a Pass<'a>,
    group: &'a Group,
    scratch: &'a mut Scratch,
    sums: &'a mut Sums,
    x_grads: &'a Sink<'a>,
}

impl Kernel for Unmix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Unmix { pass: Pass { layer, mix, .. }, group, scratch, sums, x_grads } = self;
        let Scratch { mixed, grad, mixed_grad, x_grad, .. } = scratch;
        let (dim, width) = (layer.widths.dim, layer.mix.to);
        x_grad.resize(group.rows(), dim);
        for (rows, first) in layer.segments(group) {
            let columns = first * PANEL..width;
            for row in rows.clone() {
                let slopes = &mixed.slopes.row(row)[columns.clone()];
                let cells = mixed_grad.row_mut(row)[columns.clone()].iter_mut();
                let bias = &mut sums.bias[columns.clone()];
                for ((cell, slope), bias) in cells.zip(slopes).zip(bias) {
                    *cell *= slope;
                    *bias += *cell;
                }
            }
            let panels = first..width.div_ceil(PANEL);
            sums.mix.add::<V, R>([&mixed.normed, mixed_grad], rows.clone(), panels);
            let factor = Factor { first: columns.start, ..mixed_grad.factor(rows) };
            let panels = 0..dim.div_ceil(PANEL);
            multiply::<V, R>(&factor, mix, panels, Activation::None, |row, panel, values| {
                x_grad.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
            });
        }
        for row in 0..group.rows() {
            let cells = &mut x_grad.row_mut(row)[..dim];
            let scale = layer.inputs.norm_in.scale;
            sums.norm_in.differentiate(layer.x(group, row), mixed.stats[row], scale, cells);
            // SAFETY: every row belongs to one group, and this borrow ends with the loop's body.
            let out = unsafe { x_grads.part(group.row(row), 0, dim) };
            out.copy_from_slice(cells);
            if row >= group.first_out() {
                for (out, grad) in out.iter_mut().zip(grad.row(row)) {
                    *out += grad;
                }
            }
        }
    }
}
