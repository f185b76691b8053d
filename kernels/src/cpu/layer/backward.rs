//! The backward of one group of requests.
//!
//! With g the output's gradient, N = LN(A), D the dropout's mask and G = N ⊙ U ⊙ D:
//! `dG = g W_oᵀ`, `dU = dG ⊙ D ⊙ N`, `dN = dG ⊙ D ⊙ U`, `dW_o = Gᵀ g`; attention's
//! backward gives dQ, dK and dV; with Z the input of the activation,
//! `dZ = d(U, Q, V, K) ⊙ SiLU'(Z)`, `db = Σ dZ`, `dW = LN(x)ᵀ dZ`, and dx is g plus
//! the gradient of `dZ Wᵀ` through the norm of x.

use super::LayerPass;
use super::forward::{MixGroup, MixedRows};
use super::group::RequestGroup;
use crate::cpu::dense::{PANEL, Prepared};
use crate::cpu::isa::IsaKernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Factor, Matrix, WeightGrad, multiply};
use crate::cpu::rowwise::{NormGrads, Stats, drop_out, normalise};
use crate::cpu::task::{AttentionTask, OutputSink};
use crate::cpu::{StridedRows, add_to, backward};
use crate::layer::{LayerInputs, LayerOutput};

/// The settings that all groups share.
pub(super) struct LayerBackwardPass<'a> {
    pub(super) layer: LayerPass<'a>,
    /// The transposed weights Wᵀ and W_oᵀ.
    pub(super) mix: Prepared,
    pub(super) output: Prepared,
    /// The gradient of the output, and the output of attention.
    pub(super) given: &'a LayerOutput<StridedRows<'a>>,
}

/// A thread's buffers, which grow with a group.
#[derive(Default)]
pub(super) struct LayerBackwardScratch {
    mixed: MixedRows,
    attention: backward::BackwardScratch,
    /// g.
    grad: Matrix,
    /// N, then G.
    gated: Matrix,
    /// dG, then dN, then attention's dA.
    attended_grad: Matrix,
    /// d(U, Q, V, K), then dZ.
    mixed_grad: Matrix,
    /// The gradient of LN(x), then of x.
    x_grad: Matrix,
}

/// The gradients of the weights, summed over groups.
pub(super) struct LayerGradSums {
    norm_in: NormGrads,
    mix: WeightGrad,
    /// Padded to whole panels.
    bias: Vec<f32>,
    position: Option<Vec<f32>>,
    time: Option<Vec<f32>>,
    norm_out: NormGrads,
    output: WeightGrad,
}

impl LayerGradSums {
    pub(super) fn new(layer: &LayerPass<'_>) -> Self {
        let (dim, v, width) = (layer.widths.dim, layer.widths.v, layer.mix.to);
        let table = |table: &[f32]| vec![0.0; table.len()];
        LayerGradSums {
            norm_in: NormGrads::zeros(dim),
            mix: WeightGrad::new([dim, width]),
            bias: vec![0.0; width.next_multiple_of(PANEL)],
            position: layer.inputs.position.map(table),
            time: layer.inputs.time.map(table),
            norm_out: NormGrads::zeros(v),
            output: WeightGrad::new([v, dim]),
        }
    }

    pub(super) fn add(&mut self, other: &LayerGradSums) {
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

    /// The gradients of all inputs, given that of x.
    pub(super) fn into_grads(
        mut self,
        x: Vec<f32>,
        layer: &LayerPass<'_>,
    ) -> LayerInputs<Vec<f32>> {
        self.bias.truncate(layer.mix.to);
        LayerInputs {
            x,
            norm_in: self.norm_in,
            uvqk: self.mix.row_major(),
            bias: self.bias,
            position: self.position,
            time: self.time,
            norm_out: self.norm_out,
            output: self.output.row_major(),
        }
    }
}

pub(super) fn run(
    pass: &LayerBackwardPass<'_>,
    group: &RequestGroup,
    scratch: &mut LayerBackwardScratch,
    sums: &mut LayerGradSums,
    x_grads: &OutputSink<'_>,
) {
    let layer = &pass.layer;
    layer.isa.run(MixGroup { layer, group, mixed: &mut scratch.mixed, sloped: true });
    layer.isa.run(UngateGroup { pass, group, scratch: &mut *scratch, sums: &mut *sums });
    differentiate_attention(layer, group, scratch, sums);
    layer.isa.run(UnmixGroup { pass, group, scratch, sums, x_grads });
}

fn differentiate_attention(
    layer: &LayerPass<'_>,
    group: &RequestGroup,
    scratch: &mut LayerBackwardScratch,
    sums: &mut LayerGradSums,
) {
    let LayerBackwardScratch { mixed, attention, attended_grad, mixed_grad, .. } = scratch;
    let (v, qk) = (layer.widths.v, layer.widths.qk);
    let whole = OutputSink::new(&mut mixed_grad.data, mixed_grad.stride);
    let sinks = backward::GradSinks {
        q: whole.columns_from(v),
        v: whole.columns_from(v + qk),
        k: whole.columns_from(2 * v + qk),
    };
    let inputs = mixed.attention_inputs(layer);
    let grad = StridedRows { data: &attended_grad.data, stride: attended_grad.stride };
    let dims = layer.dims(group);
    for index in 0..group.attention.requests() * group.attention.heads {
        let task = &AttentionTask::new(&group.attention, dims, &inputs, index).with_grad(grad);
        let kernel = backward::DifferentiateTask { task, scratch: attention, sinks: &sinks };
        let found = layer.isa.run(kernel);
        add_to(sums.position.as_deref_mut(), &found.position);
        add_to(sums.time.as_deref_mut(), &found.time);
    }
}

/// Computes the gradients of U, A, W_o and the norm of A from that of the output.
struct UngateGroup<'a> {
    pass: &'a LayerBackwardPass<'a>,
    group: &'a RequestGroup,
    scratch: &'a mut LayerBackwardScratch,
    sums: &'a mut LayerGradSums,
}

impl IsaKernel for UngateGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let UngateGroup {
            pass: LayerBackwardPass { layer, output, given, .. },
            group,
            scratch,
            sums,
        } = self;
        let LayerBackwardScratch { mixed, grad, gated, attended_grad, mixed_grad, .. } = scratch;
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
            normalise(attended, stats, *norm, gated);
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

/// Computes the gradients of x, W, b and the norm of x from those of U, Q, V and K.
struct UnmixGroup<'a> {
    pass: &'a LayerBackwardPass<'a>,
    group: &'a RequestGroup,
    scratch: &'a mut LayerBackwardScratch,
    sums: &'a mut LayerGradSums,
    x_grads: &'a OutputSink<'a>,
}

impl IsaKernel for UnmixGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let UnmixGroup {
            pass: LayerBackwardPass { layer, mix, .. },
            group,
            scratch,
            sums,
            x_grads,
        } = self;
        let LayerBackwardScratch { mixed, grad, mixed_grad, x_grad, .. } = scratch;
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
