//! The kernels for tensor cores: 16-bit floats in and out, sums in f32.
//!
//! A workgroup holds a block of rows in shared memory and iterates over tiles of the other side,
//! copying one ahead (`shared`). Its warps each own rows of the tile of scores and of the output,
//! in the layout of the instruction that multiplies (`fragment`), in which biases, masks and SiLU
//! are applied (`scores`). SiLU weights need no maximum and no rescaling, so a weight is used once
//! and dropped. `plan` has everything that depends on the device. Without tensor cores the same
//! kernels run with only the instruction replaced, so all but that is tested on any device.

mod forward;
mod fragment;
mod keys;
mod plan;
mod queries;
mod scores;
mod shared;

pub(super) use forward::tensor_forward;
pub(super) use keys::tensor_backward_keys;
pub(super) use plan::{CHUNK_BYTES, has_tensor_cores};
pub use plan::{MmaKernel, MmaPlan, PlanRequest, plan};
pub(super) use queries::tensor_backward_queries;

/// All kernels of the family.
pub(super) const KERNELS: [MmaKernel; 3] =
    [MmaKernel::Forward, MmaKernel::BackwardQueries, MmaKernel::BackwardKeys];
