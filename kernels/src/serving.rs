//! What serving needs of a backend.

use crate::attention::HstuBackend;
use crate::cpu::{CpuKeptHistory, CpuPreparedMlp, Prepared};
use crate::dense::PreparedLinear;
use crate::history::KeptLayer;
use crate::prepared_mlp::PreparedMlp;

/// A backend that can serve: it keeps histories between passes and has prepared weights.
pub trait ServingBackend: HstuBackend {
    /// Whether its tensors are in the host's memory.
    const IS_HOST: bool;
    /// Keys and values of one request's history at one layer.
    type Kept: KeptLayer<Self>;
    /// The weights of a linear layer, laid out for this backend's product.
    type Prepared: PreparedLinear<Self>;
    /// The weights of a network of two linear layers, laid out likewise.
    type Mlp: PreparedMlp<Self>;
}

impl ServingBackend for burn_flex::Flex {
    const IS_HOST: bool = true;
    type Kept = CpuKeptHistory;
    type Prepared = Prepared;
    type Mlp = CpuPreparedMlp;
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl<R, F, I, B> ServingBackend for burn_cubecl::CubeBackend<R, F, I, B>
where
    R: burn_cubecl::CubeRuntime,
    R::Server: cubecl::server::ComputeServer,
    R::Device: burn::tensor::backend::DeviceOps,
    F: burn_cubecl::FloatElement,
    I: burn_cubecl::IntElement,
    B: burn_cubecl::BoolElement,
{
    const IS_HOST: bool = false;
    type Kept = crate::history::JoinedHistory<Self>;
    type Prepared = crate::gpu::GpuDense<R>;
    type Mlp = crate::prepared_mlp::PlainMlp<Self>;
}
