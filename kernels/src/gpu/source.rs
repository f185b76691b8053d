//! The CUDA C++ that the tensor-core kernels become, made without a device.
//!
//! It is what CubeCL's CUDA runtime would hand to NVRTC, so that a machine without a GPU can see
//! whether the kernels compile for one, with which instructions and how many registers. Nothing
//! that computes attention uses it.

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

pub use super::mma::{Kernel, Plan, Wanted, plan};
use super::mma::{tensor_backward_keys, tensor_backward_queries, tensor_forward};
use super::tile::{Operands, OperandsCompilationArg};
use super::work::{self, Tiling};
use crate::attention::HstuAttention;

/// A kernel as CUDA C++.
#[derive(Debug, Clone)]
pub struct Source {
    /// The translation unit, with one kernel.
    pub code: String,
    /// Bytes of shared memory that a launch must give it.
    pub shared_bytes: usize,
}

/// Which of the tables of biases a kernel reads.
#[derive(Debug, Clone, Copy)]
pub struct Tables {
    /// By distance.
    pub position: bool,
    /// By time bucket.
    pub time: bool,
}

/// What CubeCL says of an NVIDIA GPU of compute capability 8.0 or above with `shared_bytes` of
/// shared memory a workgroup, as far as plans and kernels ask.
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

/// A kernel in bf16 by a plan.
///
/// # Errors
/// What CubeCL's compiler says.
pub fn cuda(
    kernel: Kernel,
    plan: Plan,
    tables: Tables,
    device: &DeviceProperties,
) -> Result<Source, cubecl::CompilationError> {
    let mut builder = KernelBuilder::default();
    builder.runtime_properties(CudaRuntime::target_properties());
    builder.device_properties(device);
    let address = AddressType::U32;
    address.register(&mut builder.scope);
    let operands = <Operands<bf16> as LaunchArg>::expand(&operands(tables), &mut builder);
    let input = |builder: &mut KernelBuilder| Tensor::<bf16>::expand(&tensor(), builder);
    let output = |builder: &mut KernelBuilder| Tensor::<bf16>::expand_output(&tensor(), builder);
    let name = match kernel {
        Kernel::Forward => {
            let out = output(&mut builder);
            tensor_forward::expand::<bf16>(&mut builder.scope, operands, out, plan);
            "forward"
        }
        Kernel::BackwardQueries => {
            let (grad, dq) = (input(&mut builder), output(&mut builder));
            let sums = Tensor::<f32>::expand_output(&tensor(), &mut builder);
            let scope = &mut builder.scope;
            tensor_backward_queries::expand::<bf16>(scope, operands, grad, dq, sums, 32, plan);
            "backward_queries"
        }
        Kernel::BackwardKeys => {
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
    Ok(Source { code: found.to_string(), shared_bytes: found.shared_memory_size() })
}

/// The words that a launch of the kernel uploads, and how many workgroups a head has.
pub fn work(kernel: Kernel, plan: Plan, shape: &HstuAttention) -> (Vec<u32>, usize) {
    let tiling = Tiling { rows: plan.rows(), columns: plan.columns };
    let times = shape.times_s.as_deref();
    match kernel {
        Kernel::Forward | Kernel::BackwardQueries => {
            let items = work::query_items(shape, tiling);
            (work::upload(&items, times), items.len())
        }
        Kernel::BackwardKeys => {
            let items = work::key_items(shape, tiling);
            (work::upload(&items, times), items.len())
        }
    }
}

fn tensor() -> TensorCompilationArg {
    TensorCompilationArg { inplace: None }
}

fn operands(tables: Tables) -> OperandsCompilationArg<bf16> {
    let table = |given: bool| match given {
        true => ComptimeOptionCompilationArg::Some(tensor()),
        false => ComptimeOptionCompilationArg::None,
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
