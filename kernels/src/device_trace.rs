//! What a program asks of its devices: launches, and what crosses between the host and a device.
//!
//! Devices of a build with `cuda` or `wgpu` note each request while somebody records. Times are not
//! measured.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One request to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceOp {
    /// A kernel with this name in Rust, with its types.
    Launch(&'static str),
    /// So many bytes from the host.
    Upload(usize),
    /// So many bytes to the host.
    Download(usize),
}

/// What devices were asked for, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceTrace {
    /// At most [`DeviceTrace::LONGEST`].
    pub ops: Vec<DeviceOp>,
}

impl DeviceTrace {
    /// Later requests of a trace are not noted.
    pub const LONGEST: usize = 1 << 20;

    /// Runs `run` and notes what this process asks of traced devices meanwhile, on any thread. One
    /// trace is recorded at a time; a second waits.
    pub fn record<T>(run: impl FnOnce() -> T) -> (T, DeviceTrace) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = locked(&ONE);
        locked(&TRACE).ops.clear();
        let recording = Recording::begin();
        let result = run();
        drop(recording);
        (result, std::mem::take(&mut *locked(&TRACE)))
    }

    /// The number of kernels.
    pub fn launches(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op, DeviceOp::Launch(_))).count()
    }

    /// The bytes that went to devices.
    pub fn uploaded_bytes(&self) -> usize {
        let bytes = |op: &DeviceOp| if let DeviceOp::Upload(bytes) = op { *bytes } else { 0 };
        self.ops.iter().map(bytes).sum()
    }

    /// The bytes that came from devices.
    pub fn downloaded_bytes(&self) -> usize {
        let bytes = |op: &DeviceOp| if let DeviceOp::Download(bytes) = op { *bytes } else { 0 };
        self.ops.iter().map(bytes).sum()
    }
}

/// While it lives, requests are noted.
struct Recording;

impl Recording {
    fn begin() -> Self {
        RECORDS.store(true, Ordering::Relaxed);
        Self
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDS.store(false, Ordering::Relaxed);
    }
}

static RECORDS: AtomicBool = AtomicBool::new(false);
static TRACE: Mutex<DeviceTrace> = Mutex::new(DeviceTrace { ops: Vec::new() });

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes a request, if one records.
#[cfg_attr(not(any(feature = "cuda", feature = "wgpu")), expect(dead_code))]
pub(crate) fn note(op: impl FnOnce() -> DeviceOp) {
    if RECORDS.load(Ordering::Relaxed) {
        let mut trace = locked(&TRACE);
        if trace.ops.len() < DeviceTrace::LONGEST {
            trace.ops.push(op());
        }
    }
}
