//! The fused GPU path: HSTU attention in CubeCL kernels, one source for every runtime.
//!
//! Work is split by head and block of rows over workgroups (`work`), each of
//! which goes over tiles of pairs (`tile`) in shared memory and registers: no score ever reaches
//! global memory. Sums are f32 whatever the tensors are. This file chooses, checks and launches;
//! what a device cannot run goes to `plain`. The kernels use no tensor cores yet.

mod forward;
mod keys;
mod queries;
mod tables;
mod tile;
mod work;

use std::sync::Arc;

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::client::ComputeClient;
use cubecl::features::TypeUsage;
use cubecl::prelude::*;

use crate::attention::{Dims, HstuAttention, HstuBackend, HstuInputs};
use crate::plain;
use tables::ROWS_A_PASS;
use tile::{OperandsLaunch, PANEL, SHARED_BYTES, UNITS};
use work::Words;

/// The widest head that the kernels have registers for.
const WIDEST: usize = 256;
/// Workgroups along a grid's first axis that every runtime accepts.
const MOST_GROUPS: usize = 65_535;
/// Bytes of partial sums for the tables' gradients; more workgroups than have room take turns.
const PARTIAL_BYTES: usize = 64 << 20;
/// Buffers that a kernel binds, with those in which the runtime passes scalars and shapes.
const BINDINGS: u32 = 12;

type Inputs<R> = HstuInputs<CubeTensor<R>>;

impl<R, F, I, B> HstuBackend for CubeBackend<R, F, I, B>
where
    R: CubeRuntime,
    R::Server: cubecl::server::ComputeServer,
    R::Device: burn::tensor::backend::DeviceOps,
    F: FloatElement,
    I: IntElement,
    B: BoolElement,
{
    fn hstu_attention(inputs: Inputs<R>, shape: Arc<HstuAttention>) -> CubeTensor<R> {
        let dims = shape.dims(&inputs);
        match Launch::new(&inputs, dims, &shape).map(|launch| (launch, inputs.q.dtype)) {
            Some((launch, DType::F32)) => launch.forward::<f32>(inputs),
            Some((launch, DType::F16)) => launch.forward::<f16>(inputs),
            Some((launch, DType::BF16)) => launch.forward::<bf16>(inputs),
            _ => plain::forward::<Self>(inputs, &shape, plain::GROUP_SCORES),
        }
    }

    fn hstu_attention_backward(
        inputs: Inputs<R>,
        grad: CubeTensor<R>,
        shape: Arc<HstuAttention>,
    ) -> Inputs<R> {
        let dims = shape.dims(&inputs);
        let expected = [dims.rows, shape.heads * dims.v];
        assert_eq!(grad.shape()[..], expected, "the gradient must have the output's shape");
        match Launch::new(&inputs, dims, &shape).map(|launch| (launch, inputs.q.dtype)) {
            Some((launch, DType::F32)) => launch.backward::<f32>(inputs, grad),
            Some((launch, DType::F16)) => launch.backward::<f16>(inputs, grad),
            Some((launch, DType::BF16)) => launch.backward::<bf16>(inputs, grad),
            _ => plain::backward::<Self>(inputs, grad, &shape, plain::GROUP_SCORES),
        }
    }
}

/// Whether the kernels run on this device with these sizes and this element type; else the op is
/// composed of primitive ops.
pub fn fuses<R: Runtime>(client: &ComputeClient<R>, dims: Dims, dtype: DType) -> bool {
    let hardware = &client.properties().hardware;
    let usage = client.properties().type_usage(dtype.into());
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && usage.is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
        && dims.qk.max(dims.v) <= WIDEST
        && hardware.max_shared_memory_size >= SHARED_BYTES
        && hardware.max_units_per_cube >= UNITS
        && hardware.max_bindings >= BINDINGS
}

/// One call of the op.
struct Launch<'a, R: CubeRuntime> {
    client: ComputeClient<R>,
    device: R::Device,
    dtype: DType,
    dims: Dims,
    shape: &'a HstuAttention,
}

/// A list of items on the device.
struct Uploaded {
    handle: cubecl::server::Handle,
    words: usize,
    items: usize,
}

impl<'a, R: CubeRuntime> Launch<'a, R> {
    /// A launch where the kernels can run.
    fn new(inputs: &Inputs<R>, dims: Dims, shape: &'a HstuAttention) -> Option<Self> {
        let client = inputs.q.client.clone();
        let dtype = inputs.q.dtype;
        let device = inputs.q.device.clone();
        fuses(&client, dims, dtype).then_some(Launch { client, device, dtype, dims, shape })
    }

    fn forward<E: Float + CubeElement>(&self, inputs: Inputs<R>) -> CubeTensor<R> {
        let out = self.matrix(self.dims.v);
        if self.dims.rows == 0 {
            return out;
        }
        let inputs = self.readable(inputs);
        let work = self.upload(&work::query_items(self.shape));
        let address = address_type(&inputs, &[&out]);
        // SAFETY: the items name rows of the matrices alone, `dims` has their widths, and every
        // index of the kernel is compared with one or the other.
        unsafe {
            forward::forward::launch_unchecked::<E, R>(
                &self.client,
                self.grid(work.items.min(MOST_GROUPS)),
                CubeDim::new_1d(UNITS),
                address,
                self.operands(&inputs, &work),
                out.clone().into_tensor_arg(),
                panels(self.dims.v),
            );
        }
        out
    }

    fn backward<E: Float + CubeElement>(
        &self,
        inputs: Inputs<R>,
        grad: CubeTensor<R>,
    ) -> Inputs<R> {
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
                self.add_up::<E>(partials.clone(), table, first_column);
            }
        }
        grads
    }

    /// Writes the gradient of the queries; gives the tables' partial sums, `[workgroups, entries]`.
    fn queries<E: Float + CubeElement>(
        &self,
        inputs: &Inputs<R>,
        grad: &CubeTensor<R>,
        dq: &CubeTensor<R>,
    ) -> CubeTensor<R> {
        let work = self.upload(&work::query_items(self.shape));
        let tables = [&inputs.position, &inputs.time];
        let columns: usize = tables.into_iter().flatten().map(entries).sum();
        let room = PARTIAL_BYTES / (size_of::<f32>() * self.shape.heads * columns.max(1));
        let groups = work.items.min(MOST_GROUPS).min(room.max(1));
        let partials = Shape::new([groups * self.shape.heads, columns]);
        if self.dims.rows == 0 {
            return self.empty(partials, DType::F32);
        }
        // A runtime binds no empty buffer, so there is one column where there is no table.
        let bound = Shape::new([partials[0], columns.max(1)]);
        let partials = self.empty(bound, DType::F32);
        let address = address_type(inputs, &[grad, dq, &partials]);
        // SAFETY: as in `forward`; `partials` has a row for every workgroup and a column for every
        // entry of the tables.
        unsafe {
            queries::backward_queries::launch_unchecked::<E, R>(
                &self.client,
                self.grid(groups),
                CubeDim::new_1d(UNITS),
                address,
                self.operands(inputs, &work),
                grad.clone().into_tensor_arg(),
                dq.clone().into_tensor_arg(),
                partials.clone().into_tensor_arg(),
                panels(self.dims.qk),
                inputs.time.as_ref().map_or(tile::LANES, buckets),
            );
        }
        partials
    }

    /// Writes the gradients of the keys and values.
    fn keys<E: Float + CubeElement>(
        &self,
        inputs: &Inputs<R>,
        grad: &CubeTensor<R>,
        grads: &Inputs<R>,
    ) {
        let work = self.upload(&work::key_items(self.shape));
        let address = address_type(inputs, &[grad, &grads.k, &grads.v]);
        // SAFETY: as in `forward`.
        unsafe {
            keys::backward_keys::launch_unchecked::<E, R>(
                &self.client,
                self.grid(work.items.min(MOST_GROUPS)),
                CubeDim::new_1d(UNITS),
                address,
                self.operands(inputs, &work),
                grad.clone().into_tensor_arg(),
                grads.k.clone().into_tensor_arg(),
                grads.v.clone().into_tensor_arg(),
                panels(self.dims.qk),
                panels(self.dims.v),
            );
        }
    }

    /// Adds up the partial sums of one table.
    fn add_up<E: Float + CubeElement>(
        &self,
        mut partials: CubeTensor<R>,
        table: &CubeTensor<R>,
        mut first_column: usize,
    ) {
        while partials.shape()[0] > ROWS_A_PASS {
            let rows = partials.shape()[0].div_ceil(ROWS_A_PASS);
            let sums = self.empty(Shape::new([rows, entries(table)]), DType::F32);
            self.add_rows::<f32>(&partials, &sums, first_column, entries(table));
            (partials, first_column) = (sums, 0);
        }
        self.add_rows::<E>(&partials, table, first_column, entries(table));
    }

    fn add_rows<E: Float + CubeElement>(
        &self,
        partials: &CubeTensor<R>,
        out: &CubeTensor<R>,
        first_column: usize,
        columns: usize,
    ) {
        let groups = out.shape().num_elements().div_ceil(UNITS as usize);
        let address = partials.required_address_type();
        // SAFETY: every unit has one entry of `out` or none, and reads no row beyond the last.
        unsafe {
            tables::add_rows::launch_unchecked::<E, R>(
                &self.client,
                CubeCount::Static(groups as u32, 1, 1),
                CubeDim::new_1d(UNITS),
                address,
                partials.clone().into_tensor_arg(),
                out.clone().into_tensor_arg(),
                first_column as u32,
                columns as u32,
            );
        }
    }

    fn grid(&self, groups: usize) -> CubeCount {
        CubeCount::Static(groups as u32, self.shape.heads as u32, 1)
    }

    fn upload(&self, items: &[impl Words]) -> Uploaded {
        let words = work::upload(items, self.shape.times_s.as_deref());
        let handle = self.client.create_from_slice(u32::as_bytes(&words));
        Uploaded { handle, words: words.len(), items: items.len() }
    }

    fn operands<E: Float>(&self, inputs: &Inputs<R>, work: &Uploaded) -> OperandsLaunch<E, R> {
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

    fn readable(&self, inputs: Inputs<R>) -> Inputs<R> {
        inputs.map(|tensor| readable(tensor, self.dtype))
    }
}

/// The tensor as it is where its rows are contiguous (a slice of columns is), else a copy.
fn readable<R: CubeRuntime>(tensor: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    assert_eq!(tensor.dtype, dtype, "the inputs of HSTU attention must be of one type");
    if tensor.meta.strides().last() == Some(&1) { tensor } else { into_contiguous(tensor) }
}

fn entries<R: CubeRuntime>(table: &CubeTensor<R>) -> usize {
    table.shape()[0]
}

/// Sums a unit keeps by bucket: few compiled variants, and 63 is the last bucket of an i64.
fn buckets<R: CubeRuntime>(table: &CubeTensor<R>) -> usize {
    if entries(table) <= 32 { 32 } else { 64 }
}

fn panels(dim: usize) -> usize {
    dim.div_ceil(PANEL)
}

fn address_type<R: CubeRuntime>(inputs: &Inputs<R>, others: &[&CubeTensor<R>]) -> AddressType {
    let inputs = [&inputs.q, &inputs.k, &inputs.v];
    let all = inputs.into_iter().chain(others.iter().copied());
    all.map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}
