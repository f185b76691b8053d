//! The fused CPU implementation: HSTU attention without a score matrix in memory.
//!
//! Work is split by request and head. Each task packs its keys and values once and iterates over
//! tiles of rows and blocks of keys. The instruction set is chosen at run time (`isa`). `task`
//! decides what a row sees, `bias` has the position and time biases, and `math` the arithmetic.

mod backward;
mod bias;
mod dense;
mod forward;
mod isa;
mod kept;
mod lanes;
mod layer;
mod math;
mod mlp;
mod prepared_mlp;
mod product;
pub mod program;
mod rowwise;
mod task;

use std::sync::Arc;

use burn::tensor::{DType, TensorData, TensorMetadata};
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use crate::attention::{Dims, HstuAttention, HstuBackend, HstuInputs};
use crate::history::{KeptHistory, KeptLayer};
use crate::layer::FusedLayer;
use crate::mlp::FusedMlp;
pub use dense::Prepared;
pub use isa::Isa;
pub use kept::CpuKeptHistory;
pub use layer::{CpuLayer, layer_backward, layer_forward};
pub use mlp::{CpuMlp, mlp_backward, mlp_forward};
pub use prepared_mlp::CpuPreparedMlp;
use task::{AttentionTask, OutputSink};

/// The rows of a matrix, `stride` values apart.
#[derive(Debug, Clone, Copy)]
pub struct StridedRows<'a> {
    /// The values, starting with the first row.
    pub data: &'a [f32],
    /// Distance between the first values of consecutive rows.
    pub stride: usize,
}

/// The op's inputs on the CPU.
pub type CpuInputs<'a> = HstuInputs<StridedRows<'a>, &'a [f32]>;

/// Below this many multiply-adds, using other threads costs more than it saves.
const PARALLEL_FROM: usize = 200_000;

/// The op: `[H + R, heads * v]`, row-major.
///
/// # Panics
/// If the machine lacks `isa`, or `shape`, `dims` and the inputs contradict each other.
pub fn forward(shape: &HstuAttention, dims: Dims, inputs: &CpuInputs<'_>, isa: Isa) -> Vec<f32> {
    forward_of(shape, dims, inputs, None, isa)
}

/// The op over kept histories: see [`KeptLayer::attend`].
///
/// # Panics
/// As [`forward`], and if `kept` does not match the batch.
pub fn forward_kept(
    shape: &HstuAttention,
    dims: Dims,
    inputs: &CpuInputs<'_>,
    kept: &[KeptHistory<'_, CpuKeptHistory>],
    isa: Isa,
) -> Vec<f32> {
    assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
    for (b, kept) in kept.iter().enumerate() {
        let newest = shape.request(b).history.len();
        assert!(kept.layer.tokens() >= newest, "request {b}'s {newest} newest tokens must be kept");
        let times = kept.times_s.len();
        let needed = inputs.time.map_or(times, |_| kept.layer.tokens());
        assert_eq!(times, needed, "request {b}: a time for each kept token");
    }
    forward_of(shape, dims, inputs, Some(kept), isa)
}

fn forward_of(
    shape: &HstuAttention,
    dims: Dims,
    inputs: &CpuInputs<'_>,
    kept: Option<&[KeptHistory<'_, CpuKeptHistory>]>,
    isa: Isa,
) -> Vec<f32> {
    let isa = isa.checked();
    let width = shape.heads * dims.v;
    let mut out = vec![0.0; dims.rows * width];
    let sink = OutputSink::new(&mut out, width);
    let work = work(shape, dims, kept);
    run(shape, work, forward::ForwardScratch::default, |scratch, index| {
        let kept = kept.map(|kept| &kept[index / shape.heads]);
        let task = &AttentionTask::new(shape, dims, inputs, index).over(kept);
        isa.run(forward::AttendTask { task, scratch, sink: &sink });
    });
    out
}

/// The gradients of the inputs, given the gradient of the output, each row-major.
///
/// The order of every sum is fixed, so the result does not depend on the number of threads.
///
/// # Panics
/// As [`forward`].
pub fn backward(
    shape: &HstuAttention,
    dims: Dims,
    inputs: &CpuInputs<'_>,
    grad: StridedRows<'_>,
    isa: Isa,
) -> HstuInputs<Vec<f32>> {
    let isa = isa.checked();
    let (qk, v) = (shape.heads * dims.qk, shape.heads * dims.v);
    let mut grads = HstuInputs {
        q: vec![0.0; dims.rows * qk],
        k: vec![0.0; dims.rows * qk],
        v: vec![0.0; dims.rows * v],
        position: inputs.position.map(|table| vec![0.0; table.len()]),
        time: inputs.time.map(|table| vec![0.0; table.len()]),
    };
    let sinks = backward::GradSinks {
        q: OutputSink::new(&mut grads.q, qk),
        k: OutputSink::new(&mut grads.k, qk),
        v: OutputSink::new(&mut grads.v, v),
    };
    let tables = run(
        shape,
        work(shape, dims, None),
        backward::BackwardScratch::default,
        |scratch, index| {
            let task = &AttentionTask::new(shape, dims, inputs, index).with_grad(grad);
            isa.run(backward::DifferentiateTask { task, scratch, sinks: &sinks })
        },
    );
    for found in tables {
        add_to(grads.position.as_deref_mut(), &found.position);
        add_to(grads.time.as_deref_mut(), &found.time);
    }
    grads
}

#[inline(always)]
fn add_to(table: Option<&mut [f32]>, found: &[f32]) {
    for (sum, found) in table.into_iter().flatten().zip(found) {
        *sum += found;
    }
}

/// Approximate multiply-adds of a forward.
fn work(
    shape: &HstuAttention,
    dims: Dims,
    kept: Option<&[KeptHistory<'_, CpuKeptHistory>]>,
) -> usize {
    let pairs = |b: usize| {
        let request = shape.request(b);
        let (own, targets) = (request.history.len(), request.targets.len());
        match kept {
            Some(kept) => kept[b].layer.tokens() * (own + targets),
            None => own * (own / 2 + targets),
        }
    };
    shape.heads * (dims.qk + dims.v) * (0..shape.requests()).map(pairs).sum::<usize>()
}

/// Runs a task for every request and head. The results are in that order.
fn run<S, T: Send>(
    shape: &HstuAttention,
    work: usize,
    scratch: impl Fn() -> S + Sync + Send,
    task: impl Fn(&mut S, usize) -> T + Sync + Send,
) -> Vec<T> {
    let count = shape.requests() * shape.heads;
    let tasks = 0..count;
    if work < PARALLEL_FROM {
        let mut scratch = scratch();
        return tasks.map(|index| task(&mut scratch, index)).collect();
    }
    // Requests differ in length, so that large pieces end at different times; small ones cost more
    // than they share out.
    let piece = (count * PARALLEL_FROM / work).max(1);
    tasks.into_par_iter().with_max_len(piece).map_init(scratch, task).collect()
}

impl HstuBackend for Flex {
    const FUSED_LAYER: Option<FusedLayer<FlexTensor>> = Some(layer::FUSED);
    const FUSED_MLP: Option<FusedMlp<FlexTensor>> = Some(mlp::FUSED);

    fn hstu_attention(inputs: HstuInputs<FlexTensor>, shape: Arc<HstuAttention>) -> FlexTensor {
        let dims = shape.dims(&inputs);
        let inputs = inputs.map(readable);
        let out = forward(&shape, dims, &borrow(&inputs), Isa::best());
        matrix(out, dims.rows, shape.heads * dims.v)
    }

    fn hstu_attention_backward(
        inputs: HstuInputs<FlexTensor>,
        grad: FlexTensor,
        shape: Arc<HstuAttention>,
    ) -> HstuInputs<FlexTensor> {
        let dims = shape.dims(&inputs);
        let expected = [dims.rows, shape.heads * dims.v];
        assert_eq!(grad.shape()[..], expected, "the gradient must have the output's shape");
        let (inputs, grad) = (inputs.map(readable), readable(grad));
        let found = backward(&shape, dims, &borrow(&inputs), rows(&grad), Isa::best());
        HstuInputs {
            q: matrix(found.q, dims.rows, shape.heads * dims.qk),
            k: matrix(found.k, dims.rows, shape.heads * dims.qk),
            v: matrix(found.v, dims.rows, shape.heads * dims.v),
            position: found.position.map(vector),
            time: found.time.map(vector),
        }
    }
}

fn matrix(values: Vec<f32>, rows: usize, columns: usize) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, [rows, columns]))
}

fn vector(values: Vec<f32>) -> FlexTensor {
    let entries = values.len();
    FlexTensor::from_data(TensorData::new(values, [entries]))
}

/// Returns the tensor itself if its rows are contiguous, as in a slice of columns, otherwise a
/// copy.
fn readable(tensor: FlexTensor) -> FlexTensor {
    assert_eq!(tensor.dtype(), DType::F32, "HSTU attention on the CPU computes in f32");
    let (inner, outer) = match tensor.layout().strides() {
        [outer, inner] => (*inner, *outer),
        [inner] => (*inner, 0),
        strides => {
            unreachable!("checked shapes have one or two dimensions, not strides {strides:?}")
        }
    };
    if inner == 1 && outer >= 0 { tensor } else { tensor.to_contiguous() }
}

fn borrow(inputs: &HstuInputs<FlexTensor>) -> CpuInputs<'_> {
    inputs.as_ref().map_both(rows, values)
}

fn rows(tensor: &FlexTensor) -> StridedRows<'_> {
    let stride = tensor.layout().strides()[0];
    let stride = usize::try_from(stride).expect("`readable` leaves no negative stride");
    StridedRows { data: values(tensor), stride }
}

/// The storage from a tensor's first value to its last.
fn values(tensor: &FlexTensor) -> &[f32] {
    let layout = tensor.layout();
    let storage = &tensor.storage()[layout.start_offset()..];
    if layout.num_elements() == 0 {
        return &storage[..0];
    }
    let reach = layout.shape().iter().zip(layout.strides());
    let last: usize = reach.map(|(&size, &stride)| (size - 1) * stride.unsigned_abs()).sum();
    &storage[..=last]
}
