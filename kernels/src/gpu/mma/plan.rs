//! Plans how a kernel's work is divided on a device: rows and columns of a tile of scores, warps,
//! buffers and instructions.
//!
//! A plan is a compile-time constant of its kernel. Everything that depends on a head's width or
//! on the device is decided here, once per launch.

use burn::tensor::DType;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, StorageType};

use crate::attention::Dims;
use crate::gpu::work::Tiling;

/// Rows of the instruction `mma.m16n8k16`, and its depth.
pub(super) const STEP: usize = 16;
/// Columns of the instruction.
pub(super) const COLUMNS: usize = 8;
/// Units per warp.
pub(super) const WARP: usize = 32;
/// Bytes that one asynchronous copy moves, and that rows in shared memory are padded by, so that
/// the eight rows of a fragment lie in different banks.
pub(in crate::gpu) const CHUNK_BYTES: usize = 16;
/// Padded widths of a head are multiples of this.
const WIDTH: usize = 32;

/// One of the three kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MmaKernel {
    /// The output, by blocks of queries.
    Forward,
    /// Gradients of the queries and of the tables, by blocks of queries.
    BackwardQueries,
    /// Gradients of the keys and values, by blocks of keys.
    BackwardKeys,
}

/// How a kernel's work is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmaPlan {
    /// Warps down the rows of a tile of scores.
    pub row_warps: usize,
    /// Fragments of 16 rows that each warp has.
    pub row_fragments: usize,
    /// Warps across the columns of a tile of scores and of an output.
    pub column_warps: usize,
    /// Columns of a tile of scores.
    pub columns: usize,
    /// Buffers for tiles, which are used in turn.
    pub buffers: usize,
    /// Padded columns of q and k per head.
    pub qk: usize,
    /// Padded columns of v per head.
    pub v: usize,
    /// Elements of 16 bytes: what one unit copies at once, and what pads a row.
    pub chunk: usize,
    /// Whether products run on tensor cores; else each unit computes the part of a product that a
    /// tensor core would leave in its registers.
    pub tensor_cores: bool,
    /// Whether tiles are copied to shared memory asynchronously, in chunks of 16 bytes.
    pub asynchronous: bool,
}

/// The requirements of a plan.
#[derive(Debug, Clone, Copy)]
pub struct PlanRequest {
    /// Columns of q and k per head.
    pub qk: usize,
    /// Columns of v per head.
    pub v: usize,
    /// The element type of the matrices.
    pub dtype: DType,
    /// Whether there is a table of biases by position, whose gradient needs the scores' in memory.
    pub position: bool,
    /// Whether every head's rows begin at a multiple of 16 bytes.
    pub aligned: bool,
}

impl PlanRequest {
    /// The requirements that take the most memory with these sizes: with a table, and all aligned.
    pub fn of(dims: Dims, dtype: DType) -> PlanRequest {
        PlanRequest { qk: dims.qk, v: dims.v, dtype, position: true, aligned: true }
    }
}

impl MmaPlan {
    /// Rows of a tile of scores.
    pub fn rows(&self) -> usize {
        self.row_warps * self.row_fragments * STEP
    }

    pub(in crate::gpu) fn tiling(&self) -> Tiling {
        Tiling { rows: self.rows(), columns: self.columns }
    }

    /// Units of a workgroup.
    pub fn units(&self) -> usize {
        self.row_warps * self.column_warps * WARP
    }

    /// Columns of a tile of scores that one warp computes.
    pub fn columns_a_warp(&self) -> usize {
        self.columns / self.column_warps
    }

    /// Whether weights pass through shared memory from the warp that computes them to the products
    /// that use them. Where one warp has all columns of its rows, a tensor core takes them from
    /// the registers in which another left them.
    pub fn stashes(&self) -> bool {
        !self.tensor_cores || self.column_warps > 1
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self, kernel: MmaKernel, wanted: &PlanRequest) -> usize {
        let size = wanted.dtype.size();
        let row = |width: usize| width * size + CHUNK_BYTES;
        let both = row(self.qk) + row(self.v);
        let turning = self.buffers * self.columns * both;
        let stash = if self.stashes() { self.rows() * row(self.columns) } else { 0 };
        let barrier = 16;
        let own = match kernel {
            MmaKernel::Forward => self.rows() * row(self.qk) + stash,
            MmaKernel::BackwardQueries => {
                let distances = self.rows() * (self.columns + 1) * size_of::<f32>();
                let scratch = self.units() * 4 * size_of::<f32>();
                let distances = if wanted.position { distances } else { 0 };
                self.rows() * both + stash + distances + scratch
            }
            MmaKernel::BackwardKeys => self.rows() * both + 2 * stash,
        };
        own + turning + barrier
    }
}

/// The best plan that fits the device, if any does. `runs` checks the type and the widths.
pub fn plan(kernel: MmaKernel, wanted: &PlanRequest, device: &DeviceProperties) -> Option<MmaPlan> {
    let [qk, v] = [wanted.qk, wanted.v].map(|width| width.next_multiple_of(WIDTH));
    let tensor_cores = has_tensor_cores(wanted.dtype.into(), device);
    let asynchronous = tensor_cores && device.features.copy_async && wanted.aligned;
    let hardware = &device.hardware;
    let best = tensor_cores.then(|| shapes(kernel, qk, v)).into_iter().flatten();
    best.chain(portable_shapes(kernel))
        .map(|[row_warps, row_fragments, column_warps, columns, buffers]| MmaPlan {
            row_warps,
            row_fragments,
            column_warps,
            columns,
            buffers,
            qk,
            v,
            chunk: CHUNK_BYTES / wanted.dtype.size(),
            tensor_cores,
            asynchronous,
        })
        .find(|plan| {
            plan.shared_bytes(kernel, wanted) <= hardware.max_shared_memory_size
                && plan.units() <= hardware.max_units_per_cube as usize
        })
}

/// Shapes from the best to the smallest: warps down, fragments a warp, warps across, columns,
/// buffers. What bounds them are registers: a unit's part of the sums takes
/// `fragments * width / 2` of its 255, and a fragment's scores `columns / 2` more.
fn shapes(kernel: MmaKernel, qk: usize, v: usize) -> impl Iterator<Item = [usize; 5]> {
    let best: &[[usize; 5]] = match kernel {
        // Two fragments a warp read every fragment of keys and values half as often.
        MmaKernel::Forward if v <= 64 => &[[4, 2, 1, 64, 2]],
        MmaKernel::Forward if v <= 128 => &[[4, 2, 1, 32, 2]],
        MmaKernel::Forward => &[[8, 1, 1, 64, 2], [8, 1, 1, 32, 2]],
        MmaKernel::BackwardQueries if qk <= 128 => &[[8, 1, 1, 64, 2]],
        MmaKernel::BackwardQueries => &[[8, 1, 1, 32, 2]],
        MmaKernel::BackwardKeys if qk + v <= 256 => &[[8, 1, 1, 64, 2]],
        MmaKernel::BackwardKeys => &[[4, 1, 2, 64, 2], [4, 1, 2, 64, 1], [4, 1, 2, 32, 1]],
    };
    let across = if matches!(kernel, MmaKernel::BackwardKeys) && qk + v > 256 { 2 } else { 1 };
    let small = [[4, 64, 2], [4, 32, 2], [4, 32, 1], [2, 32, 1], [1, 32, 1], [1, 16, 1]];
    let small = small.into_iter().map(move |[down, columns, buffers]| {
        let columns = columns.max(across * STEP);
        [down, 1, across, columns, buffers]
    });
    best.iter().copied().chain(small)
}

/// Shapes without tensor cores: small, because drivers take long to compile what is unrolled, and
/// between them all that the others have, two fragments a warp, two warps across and either number
/// of buffers.
fn portable_shapes(kernel: MmaKernel) -> [[usize; 5]; 3] {
    let best = match kernel {
        MmaKernel::Forward => [2, 2, 1, 16, 2],
        MmaKernel::BackwardQueries => [4, 1, 1, 16, 2],
        MmaKernel::BackwardKeys => [2, 1, 2, 32, 1],
    };
    [best, [2, 1, 1, 16, 1], [1, 1, 1, 16, 1]]
}

/// Whether the device multiplies 16 x 16 by 16 x 8 of this type in one instruction with f32 sums,
/// and loads its fragments from shared memory.
pub(in crate::gpu) fn has_tensor_cores(storage: StorageType, device: &DeviceProperties) -> bool {
    let instruction = MmaConfig {
        a_type: storage,
        b_type: storage,
        cd_type: ElemType::Float(FloatKind::F32).into(),
        m: STEP as u32,
        n: COLUMNS as u32,
        k: STEP as u32,
    };
    let matmul = &device.features.matmul;
    let warps = device.hardware.plane_size_min == WARP as u32
        && device.hardware.plane_size_max == WARP as u32;
    warps && matmul.mma.contains(&instruction) && matmul.ldmatrix.contains(&storage)
}
