//! Which instruction set the fused path runs on, and how a kernel gets to it.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::lanes::{F32x8, F32x16};
use super::lanes::{Lanes, Portable};

/// An instruction set that the fused path is compiled for; a machine that has one has those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the target guarantees.
    Portable,
    /// x86-64 with AVX2, FMA and LZCNT.
    Avx2,
    /// The above with AVX-512 F and CD.
    Avx512,
}

impl Isa {
    /// Those that this machine has, the best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        let all = [Isa::Portable, Isa::Avx2, Isa::Avx512];
        all.into_iter().filter(|isa| *isa <= Isa::best())
    }

    /// The best that this machine has: found once.
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

    /// An instruction set that kernels may run on.
    ///
    /// # Panics
    /// If the machine lacks it.
    pub(super) fn checked(self) -> Checked {
        assert!(self <= Isa::best(), "this machine lacks {self:?}");
        Checked(self)
    }
}

/// An instruction set that the machine was seen to have.
#[derive(Clone, Copy)]
pub(super) struct Checked(Isa);

/// Something that is compiled for every instruction set. `run` must be `inline(always)`: only so
/// does it become the code of the function that it is called from.
pub(super) trait Kernel {
    type Output;
    /// With vectors `V` and tiles of `R` rows.
    fn run<V: Lanes, const R: usize>(self) -> Self::Output;
}

impl Checked {
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Isa::Portable => kernel.run::<Portable, 2>(),
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
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<F32x8, 4>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt,avx512f,avx512cd")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<F32x16, 8>()
}
