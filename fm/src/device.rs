//! The devices that a model can run on, and the Burn backend of each.
//!
//! Only this module knows which backend a configured device means and whether the build has it.

use hypercast_core::{Error, Result, error::CommonErrors};
use serde::{Deserialize, Serialize};

/// The Burn backend of the CPU.
pub type Cpu = burn_flex::Flex;

/// The Burn backend of CUDA devices.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cuda::Cuda<f32, i32>;

/// Stands for CUDA's backend in a build without it, so that code for both devices compiles in every
/// build. [`DeviceKind::check`] refuses the device before anything runs on it.
#[cfg(not(feature = "cuda"))]
pub type Cuda = Cpu;

/// The device that a model runs on.
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
    /// The device is not in this build; the message says how to build it.
    pub fn check(self) -> Result<()> {
        if self == DeviceKind::Cuda && cfg!(not(feature = "cuda")) {
            return Err(Error::invalid(
                "device \"cuda\" is not in this build: build it with \
                 `cargo build -p hypercast --features cuda`, or set device = \"cpu\"",
            ));
        }
        Ok(())
    }
}
