//! Which device a model runs on, and the backends that stand for it.
//!
//! A device is a configuration key; this file alone knows which Burn backend
//! it means and whether the build has it.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The CPU backend.
pub type Cpu = burn_flex::Flex;

/// The CUDA backend.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cuda::Cuda<f32, i32>;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// All cores of the CPU.
    #[default]
    Cpu,
    /// The first CUDA device.
    Cuda,
}

impl DeviceKind {
    /// Checks that this build can use the device.
    ///
    /// # Errors
    /// Says how to build with it.
    pub fn check(self) -> Result<()> {
        if self == DeviceKind::Cuda && cfg!(not(feature = "cuda")) {
            return Err(Error::Device(
                "device \"cuda\" needs a build with it: cargo build -p hypercast --features cuda; or set device = \"cpu\"".into(),
            ));
        }
        Ok(())
    }
}
