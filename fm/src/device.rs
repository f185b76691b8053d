//! The devices that a model can run on, and the Burn backend of each.
//!
//! Only this module knows which backend a configured device means and whether the build has it.

use hypercast_core::{Error, Result, error::CommonErrors};
use serde::{Deserialize, Serialize};

/// The Burn backend of the CPU.
pub type Cpu = burn_flex::Flex;

/// The Burn backend of CUDA devices.
#[cfg(feature = "cuda")]
pub type Cuda = hypercast_kernels::gpu::CudaBackend;

/// Stands for CUDA's backend in a build without it, so that code for all devices compiles in every
/// build. [`DeviceKind::check`] refuses the device before anything runs on it.
#[cfg(not(feature = "cuda"))]
pub type Cuda = Cpu;

/// The Burn backend of what wgpu finds: on Linux, devices with a Vulkan driver.
#[cfg(feature = "wgpu")]
pub type Wgpu = hypercast_kernels::gpu::WgpuBackend;

/// Stands for wgpu's backend in a build without it, as [`Cuda`] does for CUDA's.
#[cfg(not(feature = "wgpu"))]
pub type Wgpu = Cpu;

/// The device that a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// All cores of the CPU.
    #[default]
    Cpu,
    /// The first CUDA device.
    Cuda,
    /// The best device that wgpu finds. A Vulkan driver in software is one, too slow for use but
    /// enough for tests.
    Wgpu,
}

impl DeviceKind {
    /// Whether this build can run models on the device, if there is one.
    pub fn is_in_build(self) -> bool {
        match self {
            DeviceKind::Cpu => true,
            DeviceKind::Cuda => cfg!(feature = "cuda"),
            DeviceKind::Wgpu => cfg!(feature = "wgpu"),
        }
    }

    /// Checks that this build has the device, and that wgpu finds one.
    ///
    /// # Errors
    /// The build lacks the device, or wgpu finds none; the message says what to do.
    pub fn check(self) -> Result<()> {
        if !self.is_in_build() {
            let name = if self == DeviceKind::Cuda { "cuda" } else { "wgpu" };
            return Err(Error::invalid(format!(
                "device \"{name}\" is not in this build: build it with `cargo build -p hypercast \
                 --features {name}`, or set device = \"cpu\""
            )));
        }
        #[cfg(feature = "wgpu")]
        if self == DeviceKind::Wgpu && !hypercast_kernels::gpu::wgpu_finds_a_device() {
            return Err(Error::invalid(
                "device \"wgpu\": no GPU with a driver that wgpu can use: install one (on Linux a \
                 Vulkan driver; mesa-vulkan-drivers has one in software), or set device = \"cpu\"",
            ));
        }
        Ok(())
    }
}
