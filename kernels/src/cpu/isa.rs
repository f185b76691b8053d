//! Selects the instruction set at run time and compiles kernels for each.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::lanes::{F32x8, F32x16};
use super::lanes::{Lanes, Portable};

/// An instruction set that kernels are compiled for. A machine that has one also has all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// The baseline of the compilation target; on aarch64 it has NEON.
    Portable,
    /// x86-64 with AVX2, FMA and LZCNT.
    Avx2,
    /// The above with AVX-512 F and CD.
    Avx512,
}

impl Isa {
    /// The instruction sets of this machine, the best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        let all = [Isa::Portable, Isa::Avx2, Isa::Avx512];
        all.into_iter().filter(|isa| *isa <= Isa::best())
    }

    /// The best instruction set of this machine; detected once.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(Isa::detect)
    }

    fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("lzcnt")
        {
            let wider = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512cd");
            return if wider { Isa::Avx512 } else { Isa::Avx2 };
        }
        Isa::Portable
    }

    /// Returns the token with which kernels can run on this instruction set.
    ///
    /// # Panics
    /// If the machine lacks it.
    pub(super) fn checked(self) -> DetectedIsa {
        assert!(self <= Isa::best(), "this machine lacks {self:?}");
        DetectedIsa(self)
    }
}

/// An instruction set that this machine was detected to have.
#[derive(Clone, Copy)]
pub(super) struct DetectedIsa(Isa);

/// The height of portable tiles. NEON, which every aarch64 has, has twice the registers.
const PORTABLE_ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

/// A computation that is compiled for every instruction set. `run` must be `inline(always)`, so
/// that it is compiled with the target features of its caller.
pub(super) trait IsaKernel {
    type Output;
    /// Runs with vectors `V` and tiles of `R` rows.
    fn run<V: Lanes, const R: usize>(self) -> Self::Output;
}

impl DetectedIsa {
    #[inline]
    pub(super) fn run<K: IsaKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Isa::Portable => kernel.run::<Portable, PORTABLE_ROWS>(),
            // SAFETY: `Isa::checked` found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: `Isa::checked` found the features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            isa => unreachable!("{isa:?} is not available here"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn avx2<K: IsaKernel>(kernel: K) -> K::Output {
    kernel.run::<F32x8, 4>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt,avx512f,avx512cd")]
fn avx512<K: IsaKernel>(kernel: K) -> K::Output {
    kernel.run::<F32x16, 8>()
}
