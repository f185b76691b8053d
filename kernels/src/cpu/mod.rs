//! The fused CPU path: HSTU attention without a score matrix in memory.
//!
//! Work is split by request and head; each task packs its keys and values
//! once and goes over tiles of rows and blocks of keys. The instruction set is
//! chosen at run time. What a row sees is decided in `task`, the arithmetic is
//! in `math`, and this file only dispatches.

mod backward;
mod dense;
mod forward;
mod kept;
mod lanes;
mod math;
mod task;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Shape, TensorData, TensorMetadata};
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use crate::attention::{Dims, HstuAttention, HstuBackend, HstuInputs};
use crate::history::{HistoryBackend, KeptHistory, KeptSize};
pub use dense::Prepared;
pub use kept::Kept;
use kept::Tokens;
use task::{Sink, Task};

/// An instruction set that the fused path is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// What the target guarantees.
    Portable,
    /// x86-64 with AVX2, FMA and LZCNT.
    Avx2,
    /// The above with AVX-512 F and CD.
    Avx512,
}

/// The rows of a matrix, `stride` values apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The values, beginning with the first row's.
    pub data: &'a [f32],
    /// From one row's first value to the next row's.
    pub stride: usize,
}

/// The op's inputs on the CPU.
pub type CpuInputs<'a> = HstuInputs<Rows<'a>, &'a [f32]>;

impl Isa {
    /// Those that this machine has, the best last.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("lzcnt")
            {
                found.push(Isa::Avx2);
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512cd") {
                    found.push(Isa::Avx512);
                }
            }
        }
        found
    }

    /// The best that this machine has.
    pub fn best() -> Isa {
        Self::available().pop().unwrap_or(Isa::Portable)
    }
}

/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 200_000;

/// The op: `[H + R, heads * v]`, row-major.
///
/// # Panics
/// If the machine lacks `isa`, or `shape`, `dims` and the inputs do not belong together.
pub fn forward(shape: &HstuAttention, dims: Dims, inputs: &CpuInputs<'_>, isa: Isa) -> Vec<f32> {
    let task = |index| Task::new(shape, dims, inputs, index);
    forward_of(shape, dims, work(shape, dims, None), task, isa)
}

/// The op over kept histories: see [`HistoryBackend::attend`].
///
/// # Panics
/// As `forward`, and if `kept` does not fit the batch.
pub fn forward_kept(
    shape: &HstuAttention,
    dims: Dims,
    inputs: &CpuInputs<'_>,
    kept: &[KeptHistory<'_, Kept>],
    isa: Isa,
) -> Vec<f32> {
    assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
    for (b, kept) in kept.iter().enumerate() {
        let newest = shape.request(b).history.len();
        assert!(kept.layer.len() >= newest, "request {b}'s {newest} newest tokens must be kept");
        let times = kept.times_s.len();
        let needed = inputs.time.map_or(times, |_| kept.layer.len());
        assert_eq!(times, needed, "request {b}: a time for each kept token");
    }
    let task = |index| Task::new(shape, dims, inputs, index).over(kept[index / shape.heads]);
    forward_of(shape, dims, work(shape, dims, Some(kept)), task, isa)
}

fn forward_of<'a>(
    shape: &HstuAttention,
    dims: Dims,
    work: usize,
    task: impl Fn(usize) -> Task<'a> + Sync + Send,
    isa: Isa,
) -> Vec<f32> {
    assert!(Isa::available().contains(&isa), "this machine lacks {isa:?}");
    let width = shape.heads * dims.v;
    let mut out = vec![0.0; dims.rows * width];
    let sink = Sink::new(&mut out, width);
    run(shape, work, forward::Scratch::default, |scratch, index| {
        let task = task(index);
        match isa {
            Isa::Portable => forward::run::<lanes::Portable, 2>(&task, scratch, &sink),
            // SAFETY: the assertion above found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { forward_avx2(&task, scratch, &sink) },
            // SAFETY: the assertion above found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { forward_avx512(&task, scratch, &sink) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("the assertion above refuses {isa:?} here"),
        }
    });
    out
}

/// The gradients of the inputs, given the gradient of the output, each row-major.
///
/// The order of every sum is fixed, so the result does not depend on the number of threads.
///
/// # Panics
/// As `forward`.
pub fn backward(
    shape: &HstuAttention,
    dims: Dims,
    inputs: &CpuInputs<'_>,
    grad: Rows<'_>,
    isa: Isa,
) -> HstuInputs<Vec<f32>> {
    assert!(Isa::available().contains(&isa), "this machine lacks {isa:?}");
    let (qk, v) = (shape.heads * dims.qk, shape.heads * dims.v);
    let mut grads = HstuInputs {
        q: vec![0.0; dims.rows * qk],
        k: vec![0.0; dims.rows * qk],
        v: vec![0.0; dims.rows * v],
        position: inputs.position.map(|table| vec![0.0; table.len()]),
        time: inputs.time.map(|table| vec![0.0; table.len()]),
    };
    let sinks = backward::Sinks {
        q: Sink::new(&mut grads.q, qk),
        k: Sink::new(&mut grads.k, qk),
        v: Sink::new(&mut grads.v, v),
    };
    let tables =
        run(shape, work(shape, dims, None), backward::Scratch::default, |scratch, index| {
            let task = Task::new(shape, dims, inputs, index).with_grad(grad);
            match isa {
                Isa::Portable => backward::run::<lanes::Portable, 2>(&task, scratch, &sinks),
                // SAFETY: the assertion above found the features.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { backward_avx2(&task, scratch, &sinks) },
                // SAFETY: the assertion above found the features.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { backward_avx512(&task, scratch, &sinks) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("the assertion above refuses {isa:?} here"),
            }
        });
    for found in tables {
        add_to(grads.position.as_deref_mut(), &found.position);
        add_to(grads.time.as_deref_mut(), &found.time);
    }
    grads
}

fn add_to(table: Option<&mut [f32]>, found: &[f32]) {
    for (sum, found) in table.into_iter().flatten().zip(found) {
        *sum += found;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn forward_avx2(task: &Task<'_>, scratch: &mut forward::Scratch, sink: &Sink<'_>) {
    forward::run::<lanes::F32x8, 4>(task, scratch, sink);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt,avx512f,avx512cd")]
fn forward_avx512(task: &Task<'_>, scratch: &mut forward::Scratch, sink: &Sink<'_>) {
    forward::run::<lanes::F32x16, 8>(task, scratch, sink);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn backward_avx2(
    task: &Task<'_>,
    scratch: &mut backward::Scratch,
    sinks: &backward::Sinks<'_>,
) -> backward::Tables {
    backward::run::<lanes::F32x8, 4>(task, scratch, sinks)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt,avx512f,avx512cd")]
fn backward_avx512(
    task: &Task<'_>,
    scratch: &mut backward::Scratch,
    sinks: &backward::Sinks<'_>,
) -> backward::Tables {
    backward::run::<lanes::F32x16, 8>(task, scratch, sinks)
}

/// Multiply-adds of a forward, about.
fn work(shape: &HstuAttention, dims: Dims, kept: Option<&[KeptHistory<'_, Kept>]>) -> usize {
    let pairs = |b: usize| {
        let request = shape.request(b);
        let (own, targets) = (request.history.len(), request.targets.len());
        match kept {
            Some(kept) => kept[b].layer.len() * (own + targets),
            None => own * (own / 2 + targets),
        }
    };
    shape.heads * (dims.qk + dims.v) * (0..shape.requests()).map(pairs).sum::<usize>()
}

/// Runs a task for every request and head, and gives the results in that order.
fn run<S, T: Send>(
    shape: &HstuAttention,
    work: usize,
    scratch: impl Fn() -> S + Sync + Send,
    task: impl Fn(&mut S, usize) -> T + Sync + Send,
) -> Vec<T> {
    let tasks = 0..shape.requests() * shape.heads;
    if work < PARALLEL_FROM {
        let mut scratch = scratch();
        return tasks.map(|index| task(&mut scratch, index)).collect();
    }
    tasks.into_par_iter().map_init(scratch, task).collect()
}

impl HstuBackend for Flex {
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
        let table = |values: Vec<f32>| {
            let entries = values.len();
            FlexTensor::from_data(TensorData::new(values, Shape::new([entries])))
        };
        HstuInputs {
            q: matrix(found.q, dims.rows, shape.heads * dims.qk),
            k: matrix(found.k, dims.rows, shape.heads * dims.qk),
            v: matrix(found.v, dims.rows, shape.heads * dims.v),
            position: found.position.map(table),
            time: found.time.map(table),
        }
    }
}

impl HistoryBackend for Flex {
    type Kept = Kept;

    fn keep(k: FlexTensor, v: FlexTensor, shape: &HstuAttention, kept: &mut [&mut Kept]) {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let (k, v) = (readable(k), readable(v));
        let columns = |tensor: &FlexTensor| tensor.shape()[1] / shape.heads;
        for (b, kept) in kept.iter_mut().enumerate() {
            kept.append(&Tokens {
                k: rows(&k),
                v: rows(&v),
                rows: shape.request(b).history,
                heads: shape.heads,
                qk: columns(&k),
                v_dim: columns(&v),
            });
        }
    }

    fn kept_size(kept: &Kept) -> KeptSize {
        KeptSize { tokens: kept.len(), bytes: kept.bytes() }
    }

    fn truncate(kept: &mut Kept, tokens: usize) {
        kept.truncate(tokens);
    }

    fn attend(
        inputs: HstuInputs<FlexTensor>,
        kept: &[KeptHistory<'_, Kept>],
        shape: &Arc<HstuAttention>,
    ) -> FlexTensor {
        let dims = shape.dims(&inputs);
        let inputs = inputs.map(readable);
        let out = forward_kept(shape, dims, &borrow(&inputs), kept, Isa::best());
        matrix(out, dims.rows, shape.heads * dims.v)
    }
}

fn matrix(values: Vec<f32>, rows: usize, columns: usize) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::new([rows, columns])))
}

/// The tensor as it is where its rows are contiguous (a slice of columns is), else a copy.
fn readable(tensor: FlexTensor) -> FlexTensor {
    assert_eq!(tensor.dtype(), DType::F32, "HSTU attention on the CPU computes in f32");
    let (inner, outer) = match tensor.layout().strides() {
        [outer, inner] => (*inner, *outer),
        [inner] => (*inner, 0),
        strides => unreachable!("the shapes were checked, yet here are strides {strides:?}"),
    };
    if inner == 1 && outer >= 0 { tensor } else { tensor.to_contiguous() }
}

fn borrow(inputs: &HstuInputs<FlexTensor>) -> CpuInputs<'_> {
    HstuInputs {
        q: rows(&inputs.q),
        k: rows(&inputs.k),
        v: rows(&inputs.v),
        position: inputs.position.as_ref().map(|t| &t.storage()[span(t)]),
        time: inputs.time.as_ref().map(|t| &t.storage()[span(t)]),
    }
}

fn rows(tensor: &FlexTensor) -> Rows<'_> {
    let stride = tensor.layout().strides()[0];
    let stride = usize::try_from(stride).expect("`readable` leaves no negative stride");
    Rows { data: &tensor.storage()[span(tensor)], stride }
}

/// The storage from a tensor's first value to its last.
fn span(tensor: &FlexTensor) -> Range<usize> {
    let layout = tensor.layout();
    let start = layout.start_offset();
    if layout.num_elements() == 0 {
        return start..start;
    }
    let reach = layout.shape().iter().zip(layout.strides());
    let last: usize = reach.map(|(&size, &stride)| (size - 1) * stride.unsigned_abs()).sum();
    start..start + last + 1
}
