//! Lists of numbers that kernels read.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// A list of numbers on the device.
pub(super) struct UploadedWords {
    handle: Handle,
    words: usize,
}

impl UploadedWords {
    /// Uploads numbers to the device of a tensor; of none, one that nobody reads, since runtimes
    /// cannot bind an empty buffer.
    pub(super) fn new<R: CubeRuntime>(beside: &CubeTensor<R>, numbers: &[u32]) -> Self {
        let numbers = if numbers.is_empty() { &[0] } else { numbers };
        let handle = beside.client.create_from_slice(u32::as_bytes(numbers));
        Self { handle, words: numbers.len() }
    }

    pub(super) fn arg<R: CubeRuntime>(&self) -> ArrayArg<R> {
        // SAFETY: the buffer was made of as many words.
        unsafe { ArrayArg::from_raw_parts(self.handle.clone(), self.words) }
    }
}

pub(super) fn option<R: CubeRuntime>(
    of: Option<&UploadedWords>,
) -> ComptimeOptionArgs<Array<u32>, R> {
    match of {
        Some(of) => ComptimeOptionArgs::Some(of.arg()),
        None => ComptimeOptionArgs::None,
    }
}
