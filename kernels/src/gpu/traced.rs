//! A CubeCL runtime whose requests can be recorded: what CubeCL hands to the server of another
//! runtime is noted ([`crate::device_trace`]) and passed on.
//!
//! It knows of one device: what goes from device to device goes through the host.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cubecl::Runtime;
use cubecl::bytes::Bytes;
use cubecl::client::ComputeClient;
use cubecl::device::{DeviceId, DeviceService, ServerUtilitiesHandle};
use cubecl::future::DynFut;
use cubecl::ir::TargetProperties;
use cubecl::profile::ProfileDuration;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, CubeCount, ExecutionMode, Handle, KernelArguments,
    MemoryLayout, MemoryLayoutDescriptor, MemoryLayoutPolicy, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::stream_id::StreamId;
use cubecl::zspace::{Shape, Strides};
use cubecl::{MemoryAllocationMode, MemoryUsage};
use cubecl_runtime::kernel::KernelMetadata;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::ManagedMemoryHandle;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};

use crate::device_trace::{DeviceOp, note};

fn bytes_of(descriptor: &CopyDescriptor) -> usize {
    descriptor.shape.iter().product::<usize>() * descriptor.elem_size
}

/// A runtime whose requests can be recorded.
pub struct TracedRuntime<R>(PhantomData<R>);

impl<R> fmt::Debug for TracedRuntime<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TracedRuntime")
    }
}

impl<R> Clone for TracedRuntime<R> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<R> Runtime for TracedRuntime<R>
where
    R: Runtime,
    InfoOf<R>: Clone,
{
    type Compiler = R::Compiler;
    type Server = TracedServer<R>;
    type Device = R::Device;

    fn client(device: &Self::Device) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_client: &ComputeClient<Self>) -> &'static str {
        std::any::type_name::<R>()
    }

    fn require_array_lengths() -> bool {
        R::require_array_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        R::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        R::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        R::target_properties()
    }

    fn enumerate_devices(type_id: u16, info: &InfoOf<R>) -> Vec<DeviceId> {
        R::enumerate_devices(type_id, info)
    }
}

type InfoOf<R> = <<R as Runtime>::Server as ComputeServer>::Info;

/// The server of a [`TracedRuntime`]: that of the runtime inside.
pub struct TracedServer<R: Runtime>
where
    InfoOf<R>: Clone,
{
    server: R::Server,
    utilities: Arc<ServerUtilities<Self>>,
}

impl<R: Runtime> fmt::Debug for TracedServer<R>
where
    InfoOf<R>: Clone,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.server.fmt(f)
    }
}

/// The layout of memory of the server inside.
pub struct TracedLayout<R: Runtime>(Arc<ServerUtilities<R::Server>>);

impl<R: Runtime> MemoryLayoutPolicy for TracedLayout<R> {
    fn apply(
        &self,
        stream_id: StreamId,
        descriptors: &[MemoryLayoutDescriptor],
    ) -> (Handle, Vec<MemoryLayout>) {
        self.0.layout_policy.apply(stream_id, descriptors)
    }
}

impl<R: Runtime> DeviceService for TracedServer<R>
where
    InfoOf<R>: Clone,
{
    fn init(device_id: DeviceId) -> Self {
        let server = R::Server::init(device_id);
        let inside = ComputeServer::utilities(&server);
        let (properties, info) = (inside.properties.clone(), inside.info.clone());
        let layout = TracedLayout(inside);
        let utilities = ServerUtilities::new(properties, server.logger(), info, layout);
        Self { server, utilities: Arc::new(utilities) }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl<R: Runtime> ServerCommunication for TracedServer<R>
where
    InfoOf<R>: Clone,
{
    const SERVER_COMM_ENABLED: bool = false;
}

impl<R: Runtime> ComputeServer for TracedServer<R>
where
    InfoOf<R>: Clone,
{
    type Kernel = <R::Server as ComputeServer>::Kernel;
    type Info = InfoOf<R>;
    type MemoryLayoutPolicy = TracedLayout<R>;
    type Storage = <R::Server as ComputeServer>::Storage;

    fn read(
        &mut self,
        descriptors: Vec<CopyDescriptor>,
        stream_id: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        note(|| DeviceOp::Download(descriptors.iter().map(bytes_of).sum()));
        self.server.read(descriptors, stream_id)
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, stream_id: StreamId) {
        note(|| DeviceOp::Upload(descriptors.iter().map(|(to, _)| bytes_of(to)).sum()));
        self.server.write(descriptors, stream_id);
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        bindings: KernelArguments,
        kind: ExecutionMode,
        stream_id: StreamId,
    ) {
        note(|| DeviceOp::Launch(kernel.name()));
        // SAFETY: the caller promises for the kernel and its bindings what the server inside asks.
        unsafe { self.server.launch(kernel, count, bindings, kind, stream_id) };
    }

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, stream_id: StreamId) {
        self.server.initialize_memory(memory, size, stream_id);
    }

    fn staging(&mut self, sizes: &[usize], stream: StreamId) -> Result<Vec<Bytes>, ServerError> {
        self.server.staging(sizes, stream)
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.server.logger()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn sync(&mut self, stream_id: StreamId) -> DynFut<Result<(), ServerError>> {
        self.server.sync(stream_id)
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        stream_id: StreamId,
    ) -> Result<ManagedResource<<Self::Storage as ComputeStorage>::Resource>, ServerError> {
        self.server.get_resource(binding, stream_id)
    }

    fn flush(&mut self, stream_id: StreamId) -> Result<(), ServerError> {
        self.server.flush(stream_id)
    }

    fn memory_usage(&mut self, stream_id: StreamId) -> Result<MemoryUsage, ServerError> {
        self.server.memory_usage(stream_id)
    }

    fn memory_cleanup(&mut self, stream_id: StreamId) {
        self.server.memory_cleanup(stream_id);
    }

    fn start_profile(&mut self, stream_id: StreamId) -> Result<ProfilingToken, ServerError> {
        self.server.start_profile(stream_id)
    }

    fn end_profile(
        &mut self,
        stream_id: StreamId,
        token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        self.server.end_profile(stream_id, token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, stream_id: StreamId) {
        self.server.allocation_mode(mode, stream_id);
    }
}
