//! The forward of one group: U, Q, V and K, attention, and the gated output.

use super::Layer;
use super::group::Group;
use crate::attention::{Dims, HstuInputs};
use crate::cpu::dense::PANEL;
use crate::cpu::isa::Kernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Matrix, multiply, multiply_activated};
use crate::cpu::rowwise::{Stats, drop_out, normalise};
use crate::cpu::task::{Sink, Task};
use crate::cpu::{CpuInputs, Rows, forward};
use crate::layer::LayerOutput;

/// A thread's memory: it grows with a group.
#[derive(Default)]
pub(super) struct Scratch {
    mixed: Mixed,
    attention: forward::Scratch,
    attended: Matrix,
    gated: Matrix,
}

/// U, Q, V and K of a group, and how they were made.
#[derive(Default)]
pub(super) struct Mixed {
    /// Of the rows of x.
    pub(super) stats: Vec<Stats>,
    /// LN(x).
    pub(super) normed: Matrix,
    pub(super) uvqk: Matrix,
    /// The slopes of the activation, in a backward.
    pub(super) slopes: Matrix,
}

pub(super) fn run(
    layer: &Layer<'_>,
    group: &Group,
    scratch: &mut Scratch,
    sinks: &LayerOutput<Sink<'_>>,
) {
    let Scratch { mixed, attention, attended, gated } = scratch;
    layer.isa.run(Mix { layer, group, mixed, sloped: false });
    attended.resize(group.rows(), layer.widths.v);
    gated.resize(group.rows(), layer.widths.v);
    let sink = Sink::new(&mut attended.data, attended.stride);
    let inputs = mixed.attention_inputs(layer);
    let dims = layer.dims(group);
    for index in 0..group.attention.requests() * group.attention.heads {
        let task = Task::new(&group.attention, dims, &inputs, index);
        layer.isa.run(forward::Attend { task: &task, scratch: attention, sink: &sink });
    }
    layer.isa.run(Gate { layer, group, uvqk: &mixed.uvqk, attended, gated, sinks });
}

impl Layer<'_> {
    /// What attention is told of a group.
    pub(super) fn dims(&self, group: &Group) -> Dims {
        let heads = group.attention.heads;
        Dims { rows: group.rows(), qk: self.widths.qk / heads, v: self.widths.v / heads }
    }

    /// A group's rows whose columns are needed from the same panel on, with that panel: of history
    /// tokens without an output, only V and K.
    #[inline(always)]
    pub(super) fn segments(&self, group: &Group) -> [(std::ops::Range<usize>, usize); 2] {
        let first = group.first_out();
        [(0..first, (self.widths.v + self.widths.qk) / PANEL), (first..group.rows(), 0)]
    }

    /// The group's row of x.
    #[inline(always)]
    pub(super) fn x(&self, group: &Group, row: usize) -> &[f32] {
        let x = self.inputs.x;
        &x.data[group.row(row) * x.stride..][..self.widths.dim]
    }
}

impl Mixed {
    pub(super) fn attention_inputs<'a>(&'a self, layer: &Layer<'a>) -> CpuInputs<'a> {
        let (v, qk) = (layer.widths.v, layer.widths.qk);
        let from =
            |column: usize| Rows { data: &self.uvqk.data[column..], stride: self.uvqk.stride };
        HstuInputs {
            q: from(v),
            v: from(v + qk),
            k: from(2 * v + qk),
            position: layer.inputs.position,
            time: layer.inputs.time,
        }
    }
}

/// Makes U, Q, V and K.
pub(super) struct Mix<'a> {
    pub(super) layer: &'a Layer<'a>,
    pub(super) group: &'a Group,
    pub(super) mixed: &'a mut Mixed,
    pub(super) sloped: bool,
}

impl Kernel for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Mix { layer, group, mixed: Mixed { stats, normed, uvqk, slopes }, sloped } = self;
        let (dim, width) = (layer.widths.dim, layer.mix.to);
        normed.resize(group.rows(), dim);
        uvqk.resize(group.rows(), width);
        if sloped {
            slopes.resize(group.rows(), width);
        }
        let weights = (layer.inputs.norm_in.scale, layer.inputs.norm_in.shift);
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

/// Makes the output.
struct Gate<'a> {
    layer: &'a Layer<'a>,
    group: &'a Group,
    uvqk: &'a Matrix,
    attended: &'a Matrix,
    gated: &'a mut Matrix,
    sinks: &'a LayerOutput<Sink<'a>>,
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let Gate { layer, group, uvqk, attended, gated, sinks } = self;
        let (dim, v) = (layer.widths.dim, layer.widths.v);
        let weights = (layer.inputs.norm_out.scale, layer.inputs.norm_out.shift);
        let rows = group.first_out()..group.rows();
        for row in rows.clone() {
            let (attended, gated) = (&attended.row(row)[..v], &mut gated.row_mut(row)[..v]);
            // SAFETY: every row belongs to one group, and this borrow ends here.
            unsafe { sinks.attended.part(group.out_row(row), 0, v) }.copy_from_slice(attended);
            normalise(attended, Stats::of(attended, layer.options.epsilon), weights, gated);
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
