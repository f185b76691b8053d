//! The GPU implementation: CubeCL kernels, one source for all runtimes.
//!
//! A layer and a network of two linear layers (`layer`, `mlp`) are CubeCL's products with one
//! kernel between two of them: attention, or what `rowwise` has. `bags` are embedding bags.
//!
//! Attention's work is split by head and block of rows over workgroups (`work`), each of which
//! iterates over tiles of pairs in shared memory and registers: no score reaches global memory, and
//! sums are f32 for all element types. There are two families of kernels. Those of `mma` are for
//! 16-bit floats on tensor cores; those beside it (`forward`, `queries`, `keys`, over `tile`) for
//! f32, and for devices without tensor cores. This module chooses the family and `launch` launches
//! it; what neither can run is computed by [`crate::plain`].

mod bags;
mod column_sums;
mod dense;
mod forward;
mod keys;
mod launch;
mod layer;
mod mlp;
mod mma;
mod queries;
mod rowwise;
mod rowwise_launch;
#[cfg(feature = "cuda")]
pub mod source;
mod tables;
mod tile;
pub mod traced;
mod uploaded_work;
mod words;
mod work;

use std::sync::Arc;
#[cfg(feature = "wgpu")]
use std::sync::OnceLock;

use burn::tensor::{DType, TensorMetadata, bf16, f16};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::features::TypeUsage;

use crate::attention::{Dims, HstuAttention, HstuBackend, HstuInputs};
use crate::embedding_bag::EmbeddingBags;
use crate::layer::{FusedLayer, LayerInputs, LayerOptions, LayerOutput};
use crate::mlp::{FusedMlp, MlpGrads, MlpInputs};
use crate::plain;
pub use dense::GpuDense;
use launch::Launch;
use layer::GpuBackend;
use tile::{SHARED_BYTES, UNITS};
use traced::TracedRuntime;

/// The widest head that the kernels have registers for.
const WIDEST: usize = 256;
/// The number of buffers that a kernel binds, including those for scalars and shapes.
const BINDINGS: u32 = 12;

type GpuInputs<R> = HstuInputs<CubeTensor<R>>;

/// The Burn backend of CUDA devices.
#[cfg(feature = "cuda")]
pub type CudaBackend = CubeBackend<TracedRuntime<cubecl::cuda::CudaRuntime>, f32, i32, u8>;

/// The Burn backend of what wgpu finds: on Linux, devices with a Vulkan driver.
#[cfg(feature = "wgpu")]
pub type WgpuBackend = CubeBackend<TracedRuntime<cubecl::wgpu::WgpuRuntime>, f32, i32, u32>;

/// A family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Each unit sums four rows by four columns in f32.
    Scalar,
    /// Each warp sums fragments of sixteen rows by eight columns: on tensor cores if the device has
    /// them for the element type, otherwise slowly, for tests, with scalar arithmetic in the same
    /// layout.
    Fragments,
}

/// Whether wgpu finds a device: on Linux, one with a Vulkan driver. It is looked for once.
#[cfg(feature = "wgpu")]
pub fn wgpu_finds_a_device() -> bool {
    use burn_wgpu::WgpuRuntime;
    use burn_wgpu::graphics::{AutoGraphicsApi, GraphicsApi};
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = || !WgpuRuntime::enumerate_all_devices(&AutoGraphicsApi::backend()).is_empty();
    *FOUND.get_or_init(found)
}

impl<R, F, I, B> HstuBackend for CubeBackend<R, F, I, B>
where
    R: CubeRuntime,
    R::Server: cubecl::server::ComputeServer,
    R::Device: burn::tensor::backend::DeviceOps,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    fn hstu_attention(inputs: GpuInputs<R>, shape: Arc<HstuAttention>) -> CubeTensor<R> {
        match family(&inputs.q.client, shape.dims(&inputs), inputs.q.dtype) {
            Some(family) => forward(family, inputs, &shape),
            None => plain::forward::<Self>(inputs, &shape, plain::GROUP_SCORES),
        }
    }

    fn hstu_attention_backward(
        inputs: GpuInputs<R>,
        grad: CubeTensor<R>,
        shape: Arc<HstuAttention>,
    ) -> GpuInputs<R> {
        match family(&inputs.q.client, shape.dims(&inputs), inputs.q.dtype) {
            Some(family) => backward(family, inputs, grad, &shape),
            None => plain::backward::<Self>(inputs, grad, &shape, plain::GROUP_SCORES),
        }
    }

    const FUSED_LAYER: Option<FusedLayer<CubeTensor<R>>> =
        Some(FusedLayer { forward: layer_forward::<Self, R>, backward: layer_backward::<Self, R> });
    const FUSED_MLP: Option<FusedMlp<CubeTensor<R>>> =
        Some(FusedMlp { forward: mlp_forward::<Self, R>, backward: mlp_backward::<Self, R> });

    fn embedding_bag(table: CubeTensor<R>, bags: Arc<EmbeddingBags>) -> CubeTensor<R> {
        bags::forward(table, &bags)
    }

    fn embedding_bag_backward(grad: CubeTensor<R>, bags: &EmbeddingBags) -> CubeTensor<R> {
        bags::backward(grad, bags)
    }
}

fn layer_forward<B: GpuBackend<R>, R: CubeRuntime>(
    inputs: LayerInputs<CubeTensor<R>>,
    options: &LayerOptions,
) -> LayerOutput<CubeTensor<R>> {
    match inputs.x.dtype {
        DType::F32 => layer::forward::<B, R, f32>(inputs, options),
        DType::F16 => layer::forward::<B, R, f16>(inputs, options),
        DType::BF16 => layer::forward::<B, R, bf16>(inputs, options),
        other => unreachable!("{other:?} is no type of a layer"),
    }
}

fn layer_backward<B: GpuBackend<R>, R: CubeRuntime>(
    inputs: LayerInputs<CubeTensor<R>>,
    given: LayerOutput<CubeTensor<R>>,
    options: &LayerOptions,
) -> LayerInputs<CubeTensor<R>> {
    match inputs.x.dtype {
        DType::F32 => layer::backward::<B, R, f32>(inputs, given, options),
        DType::F16 => layer::backward::<B, R, f16>(inputs, given, options),
        DType::BF16 => layer::backward::<B, R, bf16>(inputs, given, options),
        other => unreachable!("{other:?} is no type of a layer"),
    }
}

fn mlp_forward<B: GpuBackend<R>, R: CubeRuntime>(
    inputs: MlpInputs<CubeTensor<R>>,
) -> CubeTensor<R> {
    match inputs.x.dtype {
        DType::F32 => mlp::forward::<B, R, f32>(inputs),
        DType::F16 => mlp::forward::<B, R, f16>(inputs),
        DType::BF16 => mlp::forward::<B, R, bf16>(inputs),
        other => unreachable!("{other:?} is no type of a network"),
    }
}

fn mlp_backward<B: GpuBackend<R>, R: CubeRuntime>(
    inputs: MlpInputs<CubeTensor<R>>,
    gradient: CubeTensor<R>,
    wants_x: bool,
) -> MlpGrads<CubeTensor<R>> {
    match inputs.x.dtype {
        DType::F32 => mlp::backward::<B, R, f32>(inputs, gradient, wants_x),
        DType::F16 => mlp::backward::<B, R, f16>(inputs, gradient, wants_x),
        DType::BF16 => mlp::backward::<B, R, bf16>(inputs, gradient, wants_x),
        other => unreachable!("{other:?} is no type of a network"),
    }
}

/// The family that runs on this device with these sizes and this element type. Without one, the op
/// is composed of primitive ops.
pub fn family<R: Runtime>(client: &ComputeClient<R>, dims: Dims, dtype: DType) -> Option<Family> {
    if has_tensor_cores(client, dims, dtype) {
        return Some(Family::Fragments);
    }
    runs(Family::Scalar, client, dims, dtype).then_some(Family::Scalar)
}

/// Whether a family's kernels run on this device with these sizes and this element type.
pub fn runs<R: Runtime>(
    family: Family,
    client: &ComputeClient<R>,
    dims: Dims,
    dtype: DType,
) -> bool {
    let hardware = &client.properties().hardware;
    let usage = client.properties().type_usage(dtype.into());
    let fits = || match family {
        Family::Scalar => {
            hardware.max_shared_memory_size >= SHARED_BYTES && hardware.max_units_per_cube >= UNITS
        }
        Family::Fragments => mma::KERNELS.into_iter().all(|kernel| {
            mma::plan(kernel, &mma::PlanRequest::of(dims, dtype), client.properties()).is_some()
        }),
    };
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && usage.is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
        && dims.qk.max(dims.v) <= WIDEST
        && hardware.max_bindings >= BINDINGS
        && fits()
}

/// Whether the kernels' products run on tensor cores.
pub fn has_tensor_cores<R: Runtime>(client: &ComputeClient<R>, dims: Dims, dtype: DType) -> bool {
    mma::has_tensor_cores(dtype.into(), client.properties())
        && runs(Family::Fragments, client, dims, dtype)
}

/// The op by one family's kernels: `[H + R, heads * v_dim]`.
///
/// # Panics
/// If `shape` and the inputs contradict each other, or the family cannot run with them.
pub fn forward<R: CubeRuntime>(
    family: Family,
    inputs: GpuInputs<R>,
    shape: &HstuAttention,
) -> CubeTensor<R> {
    let dims = shape.dims(&inputs);
    let launch = Launch::new(family, &inputs, dims, shape);
    match inputs.q.dtype {
        DType::F32 => launch.forward::<f32>(inputs),
        DType::F16 => launch.forward::<f16>(inputs),
        DType::BF16 => launch.forward::<bf16>(inputs),
        other => unreachable!("{other:?} runs on no family"),
    }
}

/// The gradients of the inputs by one family's kernels, given the gradient of the output.
///
/// # Panics
/// If `shape`, the inputs and the gradient contradict each other, or the family cannot run with
/// them.
pub fn backward<R: CubeRuntime>(
    family: Family,
    inputs: GpuInputs<R>,
    grad: CubeTensor<R>,
    shape: &HstuAttention,
) -> GpuInputs<R> {
    let dims = shape.dims(&inputs);
    let expected = [dims.rows, shape.heads * dims.v];
    assert_eq!(grad.shape()[..], expected, "the gradient must have the output's shape");
    let launch = Launch::new(family, &inputs, dims, shape);
    match inputs.q.dtype {
        DType::F32 => launch.backward::<f32>(inputs, grad),
        DType::F16 => launch.backward::<f16>(inputs, grad),
        DType::BF16 => launch.backward::<bf16>(inputs, grad),
        other => unreachable!("{other:?} runs on no family"),
    }
}
