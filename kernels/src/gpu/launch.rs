//! Launches the kernels: uploads the work items, allocates the outputs and binds both.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::prelude::*;

use super::column_sums::add_up;
use super::mma::{self, MmaKernel, MmaPlan, PlanRequest};
use super::tile::{self, OperandsLaunch, PANEL, UNITS};
use super::uploaded_work::{UploadedWork, WorkOrder, upload};
use super::work::Tiling;
use super::{Family, GpuInputs, forward, keys, queries, runs};
use crate::attention::{Dims, HstuAttention, HstuInputs};

/// Workgroups along a grid's first axis that every runtime accepts.
const MOST_GROUPS: usize = 65_535;
/// Limit on the partial sums of the table gradients, in bytes; if there are more workgroups,
/// several share a row.
const PARTIAL_BYTES: usize = 64 << 20;

/// The settings of one call of the op.
pub(super) struct Launch<'a, R: CubeRuntime> {
    family: Family,
    client: ComputeClient<R>,
    device: R::Device,
    dtype: DType,
    dims: Dims,
    shape: &'a HstuAttention,
}

/// The tiling of a kernel's work: by its plan, or that of the scalar kernels.
fn tiling(plan: Option<MmaPlan>) -> Tiling {
    plan.map_or(Tiling::SQUARE, |plan| plan.tiling())
}

/// The units of a kernel's workgroup.
fn units(plan: Option<MmaPlan>) -> CubeDim {
    CubeDim::new_1d(plan.map_or(UNITS, |plan| plan.units() as u32))
}

impl<'a, R: CubeRuntime> Launch<'a, R> {
    /// A launch of kernels that can run.
    pub(super) fn new(
        family: Family,
        inputs: &GpuInputs<R>,
        dims: Dims,
        shape: &'a HstuAttention,
    ) -> Self {
        let (client, dtype) = (inputs.q.client.clone(), inputs.q.dtype);
        assert!(
            runs(family, &client, dims, dtype),
            "the {family:?} kernels do not run here with {dims:?} and {dtype:?}"
        );
        Launch { family, client, device: inputs.q.device.clone(), dtype, dims, shape }
    }

    pub(super) fn forward<E: Float + CubeElement>(&self, inputs: GpuInputs<R>) -> CubeTensor<R> {
        let out = self.matrix(self.dims.v);
        if self.dims.rows == 0 {
            return out;
        }
        let inputs = self.readable(inputs);
        let plan = self.plan(MmaKernel::Forward, &inputs, None);
        let work = self.upload(WorkOrder::ByQueries, plan);
        let address = address_type(&inputs, &[&out]);
        let grid = self.grid(work.items.min(MOST_GROUPS));
        let operands = self.operands(&inputs, &work);
        let written = out.clone().into_tensor_arg();
        let units = units(plan);
        // SAFETY: the items contain only rows of the matrices, `dims` has their widths, and every
        // index of the kernels is compared with one or the other.
        unsafe {
            match plan {
                None => forward::forward::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    written,
                    panels(self.dims.v),
                ),
                Some(plan) => mma::tensor_forward::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    written,
                    plan,
                ),
            }
        }
        out
    }

    pub(super) fn backward<E: Float + CubeElement>(
        &self,
        inputs: GpuInputs<R>,
        grad: CubeTensor<R>,
    ) -> GpuInputs<R> {
        let grads = HstuInputs {
            q: self.matrix(self.dims.qk),
            k: self.matrix(self.dims.qk),
            v: self.matrix(self.dims.v),
            position: inputs.position.as_ref().map(|table| self.empty(table.shape(), self.dtype)),
            time: inputs.time.as_ref().map(|table| self.empty(table.shape(), self.dtype)),
        };
        let inputs = self.readable(inputs);
        let grad = readable(grad, self.dtype);
        let partials = self.queries::<E>(&inputs, &grad, &grads.q);
        if self.dims.rows > 0 {
            self.keys::<E>(&inputs, &grad, &grads);
        }
        let positions = grads.position.as_ref().map_or(0, entries);
        for (table, first_column) in [(&grads.position, 0), (&grads.time, positions)] {
            if let Some(table) = table {
                add_up::<R, f32, E>(&partials, first_column, table);
            }
        }
        grads
    }

    /// Writes the gradient of the queries. Returns the tables' partial sums, `[workgroups,
    /// entries]`.
    fn queries<E: Float + CubeElement>(
        &self,
        inputs: &GpuInputs<R>,
        grad: &CubeTensor<R>,
        dq: &CubeTensor<R>,
    ) -> CubeTensor<R> {
        let plan = self.plan(MmaKernel::BackwardQueries, inputs, Some(grad));
        let work = self.upload(WorkOrder::ByQueries, plan);
        let tables = [&inputs.position, &inputs.time];
        let columns: usize = tables.into_iter().flatten().map(entries).sum();
        let room = PARTIAL_BYTES / (size_of::<f32>() * self.shape.heads * columns.max(1));
        let groups = work.items.min(MOST_GROUPS).min(room.max(1));
        let partials = Shape::new([groups * self.shape.heads, columns]);
        if self.dims.rows == 0 {
            return self.empty(partials, DType::F32);
        }
        // Runtimes cannot bind an empty buffer, so there is one column even without a table.
        let bound = Shape::new([partials[0], columns.max(1)]);
        let partials = self.empty(bound, DType::F32);
        let address = address_type(inputs, &[grad, dq, &partials]);
        let (grid, units) = (self.grid(groups), units(plan));
        let operands = self.operands(inputs, &work);
        let buckets = inputs.time.as_ref().map_or(tile::LANES, buckets);
        let (read, written) = (grad.clone().into_tensor_arg(), dq.clone().into_tensor_arg());
        let sums = partials.clone().into_tensor_arg();
        // SAFETY: as in `forward`; `partials` has a row for every workgroup and a column for every
        // entry of the tables.
        unsafe {
            match plan {
                None => queries::backward_queries::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    read,
                    written,
                    sums,
                    panels(self.dims.qk),
                    buckets,
                ),
                Some(plan) => mma::tensor_backward_queries::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    read,
                    written,
                    sums,
                    buckets,
                    plan,
                ),
            }
        }
        partials
    }

    /// Writes the gradients of the keys and values.
    fn keys<E: Float + CubeElement>(
        &self,
        inputs: &GpuInputs<R>,
        grad: &CubeTensor<R>,
        grads: &GpuInputs<R>,
    ) {
        let plan = self.plan(MmaKernel::BackwardKeys, inputs, Some(grad));
        let work = self.upload(WorkOrder::ByKeys, plan);
        let address = address_type(inputs, &[grad, &grads.k, &grads.v]);
        let grid = self.grid(work.items.min(MOST_GROUPS));
        let units = units(plan);
        let operands = self.operands(inputs, &work);
        let read = grad.clone().into_tensor_arg();
        let (dk, dv) = (grads.k.clone().into_tensor_arg(), grads.v.clone().into_tensor_arg());
        // SAFETY: as in `forward`.
        unsafe {
            match plan {
                None => keys::backward_keys::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    read,
                    dk,
                    dv,
                    panels(self.dims.qk),
                    panels(self.dims.v),
                ),
                Some(plan) => mma::tensor_backward_keys::launch_unchecked::<E, R>(
                    &self.client,
                    grid,
                    units,
                    address,
                    operands,
                    read,
                    dk,
                    dv,
                    plan,
                ),
            }
        }
    }

    /// How one kernel's work is divided; `None` for the fixed tiling of the scalar kernels.
    fn plan(
        &self,
        kernel: MmaKernel,
        inputs: &GpuInputs<R>,
        grad: Option<&CubeTensor<R>>,
    ) -> Option<MmaPlan> {
        if self.family == Family::Scalar {
            return None;
        }
        let matrices = [&inputs.q, &inputs.k, &inputs.v].into_iter().chain(grad);
        let wanted = PlanRequest {
            position: inputs.position.is_some(),
            aligned: self.heads_are_aligned() && matrices.into_iter().all(is_aligned),
            ..PlanRequest::of(self.dims, self.dtype)
        };
        let plan = mma::plan(kernel, &wanted, self.client.properties());
        Some(plan.expect("`runs` found a plan with room for more"))
    }

    /// Whether every head begins at a multiple of the copy size.
    fn heads_are_aligned(&self) -> bool {
        let bytes = [self.dims.qk, self.dims.v].map(|width| width * self.dtype.size());
        bytes.iter().all(|bytes| bytes.is_multiple_of(mma::CHUNK_BYTES))
    }

    fn grid(&self, groups: usize) -> CubeCount {
        CubeCount::Static(groups as u32, self.shape.heads as u32, 1)
    }

    fn upload(&self, order: WorkOrder, plan: Option<MmaPlan>) -> UploadedWork {
        upload::<R>(self.shape, order, tiling(plan), &self.device)
    }

    fn operands<E: Float>(
        &self,
        inputs: &GpuInputs<R>,
        work: &UploadedWork,
    ) -> OperandsLaunch<E, R> {
        // Beyond every distance, and small enough to be added to a position.
        let everything = 1u32 << 30;
        let bounded = |size: usize| size.min(everything as usize) as u32;
        let (recent, global) = self
            .shape
            .window
            .map_or((everything, 0), |window| (bounded(window.recent), bounded(window.global)));
        let table = |table: &Option<CubeTensor<R>>| match table {
            Some(table) => ComptimeOptionArgs::Some(table.clone().into_tensor_arg()),
            None => ComptimeOptionArgs::None,
        };
        OperandsLaunch::new(
            inputs.q.clone().into_tensor_arg(),
            inputs.k.clone().into_tensor_arg(),
            inputs.v.clone().into_tensor_arg(),
            table(&inputs.position),
            table(&inputs.time),
            // SAFETY: the buffer was made of as many words.
            unsafe { ArrayArg::from_raw_parts(work.handle.clone(), work.words) },
            work.items as u32,
            self.dims.rows as u32,
            self.shape.alpha,
            1.0 / self.shape.norm,
            recent,
            global,
            self.dims.qk as u32,
            self.dims.v as u32,
        )
    }

    fn matrix(&self, dim: usize) -> CubeTensor<R> {
        self.empty(Shape::new([self.dims.rows, self.shape.heads * dim]), self.dtype)
    }

    fn empty(&self, shape: Shape, dtype: DType) -> CubeTensor<R> {
        let (client, device) = (self.client.clone(), self.device.clone());
        empty_device_contiguous_dtype(client, device, shape, dtype)
    }

    fn readable(&self, inputs: GpuInputs<R>) -> GpuInputs<R> {
        inputs.map(|tensor| readable(tensor, self.dtype))
    }
}

/// Returns the tensor itself if its rows are contiguous, as in a slice of columns, otherwise a
/// copy.
pub(super) fn readable<R: CubeRuntime>(tensor: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    assert_eq!(tensor.dtype, dtype, "the inputs of HSTU attention must be of one type");
    if tensor.meta.strides().last() == Some(&1) { tensor } else { into_contiguous(tensor) }
}

/// Whether the tensor and each of its rows begin at a multiple of the copy size.
fn is_aligned<R: CubeRuntime>(tensor: &CubeTensor<R>) -> bool {
    let row = tensor.meta.strides()[0] * tensor.dtype.size();
    let start = tensor.handle.offset_start.unwrap_or_default();
    row.is_multiple_of(mma::CHUNK_BYTES) && start.is_multiple_of(mma::CHUNK_BYTES as u64)
}

fn entries<R: CubeRuntime>(table: &CubeTensor<R>) -> usize {
    table.shape()[0]
}

/// The number of bucket sums that a unit keeps: one of few values, to limit compiled variants. 63
/// is the last bucket of an i64.
fn buckets<R: CubeRuntime>(table: &CubeTensor<R>) -> usize {
    if entries(table) <= 32 { 32 } else { 64 }
}

fn panels(dim: usize) -> usize {
    dim.div_ceil(PANEL)
}

fn address_type<R: CubeRuntime>(inputs: &GpuInputs<R>, others: &[&CubeTensor<R>]) -> AddressType {
    let inputs = [&inputs.q, &inputs.k, &inputs.v];
    let all = inputs.into_iter().chain(others.iter().copied());
    all.map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}
