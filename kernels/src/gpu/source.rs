//! Generates the CUDA C++ of the tensor-core kernels without a device.
//!
//! It is the source that CubeCL's CUDA runtime would pass to NVRTC. A machine without a GPU can
//! thus check that the kernels compile for one, with which instructions and how many registers.
//! Only tests and tools use this module.

use burn::tensor::bf16;
use cubecl::cuda::CudaRuntime;
use cubecl::features::TypeUsage;
use cubecl::ir::features::{Features, MmaConfig};
use cubecl::ir::{
    DeviceProperties, ElemType, FloatKind, HardwareProperties, MemoryDeviceProperties,
};
use cubecl::prelude::*;
use cubecl::profile::TimingMethod;
use cubecl::{Compiler, Runtime};

pub use super::mma::{MmaKernel, MmaPlan, PlanRequest, plan};
use super::mma::{tensor_backward_keys, tensor_backward_queries, tensor_forward};
use super::tile::{Operands, OperandsCompilationArg};
use super::work;
use crate::attention::HstuAttention;

/// A kernel as CUDA C++ source.
#[derive(Debug, Clone)]
pub struct CudaSource {
    /// The translation unit, with one kernel.
    pub code: String,
    /// Bytes of shared memory that a launch must provide.
    pub shared_bytes: usize,
}

/// The bias tables that a kernel reads.
#[derive(Debug, Clone, Copy)]
pub struct BiasTables {
    /// Whether it reads the biases by distance.
    pub position: bool,
    /// Whether it reads the biases by time bucket.
    pub time: bool,
}

/// The CubeCL properties that plans and kernels need, of an NVIDIA GPU of compute capability 8.0 or
/// above with `shared_bytes` of shared memory per workgroup.
pub fn nvidia(shared_bytes: usize) -> DeviceProperties {
    let memory = MemoryDeviceProperties { max_page_size: 1 << 32, alignment: 512 };
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: shared_bytes,
        max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: None,
        num_cpu_cores: None,
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        max_vector_size: VectorSize::MAX,
    };
    let mut device =
        DeviceProperties::new(Features::default(), memory, hardware, TimingMethod::System);
    let float = |kind: FloatKind| -> StorageType { ElemType::Float(kind).into() };
    for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        device.register_type_usage(float(kind), TypeUsage::all());
    }
    for kind in [FloatKind::F16, FloatKind::BF16] {
        let of = float(kind);
        let cd_type = float(FloatKind::F32);
        let instruction = MmaConfig { a_type: of, b_type: of, cd_type, m: 16, n: 8, k: 16 };
        device.features.matmul.mma.insert(instruction);
        device.features.matmul.ldmatrix.insert(of);
    }
    device.features.copy_async = true;
    device.features.alignment = true;
    device
}

/// Generates a kernel in bf16 with a plan.
///
/// # Errors
/// Errors of CubeCL's compiler.
pub fn cuda(
    kernel: MmaKernel,
    plan: MmaPlan,
    tables: BiasTables,
    device: &DeviceProperties,
) -> Result<CudaSource, cubecl::CompilationError> {
    let mut builder = KernelBuilder::default();
    builder.runtime_properties(CudaRuntime::target_properties());
    builder.device_properties(device);
    let address = AddressType::U32;
    address.register(&mut builder.scope);
    let operands = <Operands<bf16> as LaunchArg>::expand(&operands(tables), &mut builder);
    let input = |builder: &mut KernelBuilder| Tensor::<bf16>::expand(&tensor(), builder);
    let output = |builder: &mut KernelBuilder| Tensor::<bf16>::expand_output(&tensor(), builder);
    let name = match kernel {
        MmaKernel::Forward => {
            let out = output(&mut builder);
            tensor_forward::expand::<bf16>(&mut builder.scope, operands, out, plan);
            "forward"
        }
        MmaKernel::BackwardQueries => {
            let (grad, dq) = (input(&mut builder), output(&mut builder));
            let sums = Tensor::<f32>::expand_output(&tensor(), &mut builder);
            let scope = &mut builder.scope;
            tensor_backward_queries::expand::<bf16>(scope, operands, grad, dq, sums, 32, plan);
            "backward_queries"
        }
        MmaKernel::BackwardKeys => {
            let grad = input(&mut builder);
            let (dk, dv) = (output(&mut builder), output(&mut builder));
            let scope = &mut builder.scope;
            tensor_backward_keys::expand::<bf16>(scope, operands, grad, dk, dv, plan);
            "backward_keys"
        }
    };
    let settings = KernelSettings::default()
        .cube_dim(CubeDim::new_1d(plan.units() as u32))
        .address_type(address)
        .kernel_name(name);
    let definition = builder.build(settings);
    let mut compiler = <CudaRuntime as Runtime>::Compiler::default();
    let mut options =
        <<CudaRuntime as Runtime>::Compiler as Compiler>::CompilationOptions::default();
    options.supports_features.grid_constants = true;
    options.supports_features.fast_math = true;
    let mode = ExecutionMode::Unchecked;
    let found = compiler.compile(definition, &options, mode, address.unsigned_type())?;
    Ok(CudaSource { code: found.to_string(), shared_bytes: found.shared_memory_size() })
}

/// The words that a launch of the kernel uploads, and the number of workgroups per head.
pub fn work(kernel: MmaKernel, plan: MmaPlan, shape: &HstuAttention) -> (Vec<u32>, usize) {
    let times = shape.times_s.as_deref();
    match kernel {
        MmaKernel::Forward | MmaKernel::BackwardQueries => {
            let items = work::query_items(shape, plan.tiling());
            (work::upload(&items, times), items.len())
        }
        MmaKernel::BackwardKeys => {
            let items = work::key_items(shape, plan.tiling());
            (work::upload(&items, times), items.len())
        }
    }
}

fn tensor() -> TensorCompilationArg {
    TensorCompilationArg { inplace: None }
}

fn operands(tables: BiasTables) -> OperandsCompilationArg<bf16> {
    let table = |given: bool| {
        if given {
            ComptimeOptionCompilationArg::Some(tensor())
        } else {
            ComptimeOptionCompilationArg::None
        }
    };
    OperandsCompilationArg {
        q: tensor(),
        k: tensor(),
        v: tensor(),
        position: table(tables.position),
        time: table(tables.time),
        work: ArrayCompilationArg { inplace: None },
        items: (),
        rows: (),
        alpha: (),
        inverse_norm: (),
        recent: (),
        global: (),
        qk: (),
        v_dim: (),
    }
}
