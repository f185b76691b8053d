//! The forward of one group of requests: U, Q, V and K, attention, and the gated output.

use super::LayerPass;
use super::group::RequestGroup;
use crate::attention::{Dims, HstuInputs};
use crate::cpu::dense::PANEL;
use crate::cpu::isa::IsaKernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Matrix, multiply, multiply_activated};
use crate::cpu::rowwise::{Stats, drop_out, normalise};
use crate::cpu::task::{AttentionTask, OutputSink};
use crate::cpu::{CpuInputs, StridedRows, forward};
use crate::layer::LayerOutput;

/// A thread's buffers, which grow with a group.
#[derive(Default)]
pub(super) struct LayerForwardScratch {
    mixed: MixedRows,
    attention: forward::ForwardScratch,
    attended: Matrix,
    gated: Matrix,
}

/// U, Q, V and K of a group, with the intermediate values that the backward needs.
#[derive(Default)]
pub(super) struct MixedRows {
    /// Mean and deviation of the rows of x.
    pub(super) stats: Vec<Stats>,
    /// LN(x).
    pub(super) normed: Matrix,
    pub(super) uvqk: Matrix,
    /// The slopes of the activation, in a backward.
    pub(super) slopes: Matrix,
}

pub(super) fn run(
    layer: &LayerPass<'_>,
    group: &RequestGroup,
    scratch: &mut LayerForwardScratch,
    sinks: &LayerOutput<OutputSink<'_>>,
) {
    let LayerForwardScratch { mixed, attention, attended, gated } = scratch;
    layer.isa.run(MixGroup { layer, group, mixed, sloped: false });
    attended.resize(group.rows(), layer.widths.v);
    gated.resize(group.rows(), layer.widths.v);
    let sink = OutputSink::new(&mut attended.data, attended.stride);
    let inputs = mixed.attention_inputs(layer);
    let dims = layer.dims(group);
    for index in 0..group.attention.requests() * group.attention.heads {
        let task = AttentionTask::new(&group.attention, dims, &inputs, index);
        layer.isa.run(forward::AttendTask { task: &task, scratch: attention, sink: &sink });
    }
    layer.isa.run(GateGroup { layer, group, uvqk: &mixed.uvqk, attended, gated, sinks });
}

impl LayerPass<'_> {
    /// The attention sizes of a group.
    pub(super) fn dims(&self, group: &RequestGroup) -> Dims {
        let heads = group.attention.heads;
        Dims { rows: group.rows(), qk: self.widths.qk / heads, v: self.widths.v / heads }
    }

    /// The group's rows in two ranges, each with the first panel of columns that it needs: history
    /// tokens without an output need only V and K.
    #[inline(always)]
    pub(super) fn segments(&self, group: &RequestGroup) -> [(std::ops::Range<usize>, usize); 2] {
        let first = group.first_out();
        [(0..first, (self.widths.v + self.widths.qk) / PANEL), (first..group.rows(), 0)]
    }

    /// A row of x, by its index in the group.
    #[inline(always)]
    pub(super) fn x(&self, group: &RequestGroup, row: usize) -> &[f32] {
        let x = self.inputs.x;
        &x.data[group.row(row) * x.stride..][..self.widths.dim]
    }
}

impl MixedRows {
    pub(super) fn attention_inputs<'a>(&'a self, layer: &LayerPass<'a>) -> CpuInputs<'a> {
        let (v, qk) = (layer.widths.v, layer.widths.qk);
        let from = |column: usize| StridedRows {
            data: &self.uvqk.data[column..],
            stride: self.uvqk.stride,
        };
        HstuInputs {
            q: from(v),
            v: from(v + qk),
            k: from(2 * v + qk),
            position: layer.inputs.position,
            time: layer.inputs.time,
        }
    }
}

/// Computes U, Q, V and K of a group.
pub(super) struct MixGroup<'a> {
    pub(super) layer: &'a LayerPass<'a>,
    pub(super) group: &'a RequestGroup,
    pub(super) mixed: &'a mut MixedRows,
    pub(super) sloped: bool,
}

impl IsaKernel for MixGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let MixGroup { layer, group, mixed: MixedRows { stats, normed, uvqk, slopes }, sloped } =
            self;
        let (dim, width) = (layer.widths.dim, layer.mix.to);
        normed.resize(group.rows(), dim);
        uvqk.resize(group.rows(), width);
        if sloped {
            slopes.resize(group.rows(), width);
        }
        let weights = layer.inputs.norm_in;
        stats.clear();
        for row in 0..group.rows() {
            let x = layer.x(group, row);
            let of_row = Stats::of(x, layer.options.epsilon);
            normalise(x, of_row, weights, normed.row_mut(row));
            stats.push(of_row);
        }
        for (rows, first) in layer.segments(group) {
            let factor = normed.factor(rows);
            let panels = first..width.div_ceil(PANEL);
            let slopes = sloped.then_some(&mut *slopes);
            multiply_activated::<V, R>(&factor, &layer.mix, panels, uvqk, slopes);
        }
    }
}

/// Computes the gated output of a group.
struct GateGroup<'a> {
    layer: &'a LayerPass<'a>,
    group: &'a RequestGroup,
    uvqk: &'a Matrix,
    attended: &'a Matrix,
    gated: &'a mut Matrix,
    sinks: &'a LayerOutput<OutputSink<'a>>,
}

impl IsaKernel for GateGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let GateGroup { layer, group, uvqk, attended, gated, sinks } = self;
        let (dim, v) = (layer.widths.dim, layer.widths.v);
        let weights = layer.inputs.norm_out;
        let rows = group.first_out()..group.rows();
        for row in rows.clone() {
            let (attended, gated) = (&attended.row(row)[..v], &mut gated.row_mut(row)[..v]);
            // SAFETY: every row belongs to one group, and this borrow ends here.
            unsafe { sinks.attended.part(group.out_row(row), 0, v) }.copy_from_slice(attended);
            let stats = Stats::of(attended, layer.options.epsilon);
            normalise(attended, stats, weights, gated);
            for (gated, u) in gated.iter_mut().zip(uvqk.row(row)) {
                *gated *= u;
            }
            drop_out(layer.options.dropout, group.out_row(row), gated);
        }
        let (factor, panels) = (gated.factor(rows), 0..dim.div_ceil(PANEL));
        multiply::<V, R>(&factor, &layer.output, panels, Activation::None, |row, panel, values| {
            let columns = panel * PANEL..dim.min((panel + 1) * PANEL);
            // SAFETY: every row belongs to one group, and this borrow ends with the closure.
            let out = unsafe { sinks.out.part(group.out_row(row), 0, dim) };
            let x = &layer.x(group, row)[columns.clone()];
            for ((out, value), x) in out[columns].iter_mut().zip(values).zip(x) {
                *out = *value + x;
            }
        });
    }
}
