//! Vectors of f32, over which the fused kernels are generic.
//!
//! Every method is `inline(always)`, so that a body instantiated inside a
//! function with the right target features becomes that instruction set's
//! code. The x86 types must only be used inside such a function, which `cpu::isa`
//! ensures.

/// A vector of `N` f32, and nothing else in memory.
pub(super) trait Lanes: Copy {
    /// The number of f32 in a vector.
    const N: usize;
    /// `x` in every lane.
    fn splat(x: f32) -> Self;
    /// The `N` values from `p` on, at any alignment.
    ///
    /// # Safety
    /// `p` must be valid for reading `N` f32.
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller guarantees N readable f32, which is what a vector is.
        unsafe { Unaligned::read(p) }
    }
    /// Writes the `N` values from `p` on, at any alignment.
    ///
    /// # Safety
    /// `p` must be valid for writing `N` f32.
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller guarantees N writable f32.
        unsafe { Unaligned::write(self, p) }
    }
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`, with one rounding where the hardware has it.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Clamps to `[-bound, bound]`; a NaN becomes either bound.
    fn clamp_abs(self, bound: f32) -> Self;
    /// `1 / self` to about one unit in the last place, for self in `[1, 1e38]`.
    fn recip(self) -> Self;
    /// `self * 2^k` for an integer k that is given as `k + MAGIC`; self and the result must be
    /// normal.
    fn scale_by_power(self, k_plus_magic: Self) -> Self;
}

/// The length of the longest vector.
pub(super) const MAX_LANES: usize = 16;

/// 1.5 * 2^23: adding it to a small f32 rounds that to an integer, which is then in the lowest bits
/// of the sum.
pub(super) const MAGIC: f32 = 12_582_912.0;

/// A value at any alignment, read and written through a packed struct. With debug assertions, which
/// the project's build profile has on, `read_unaligned` and the load intrinsics check their
/// pointers in a way that sends every vector through memory and halves the speed of the innermost
/// loops.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T: Copy>(T);

impl<T: Copy> Unaligned<T> {
    /// # Safety
    /// `p` must be valid for reading a `T`, at any alignment.
    #[inline(always)]
    unsafe fn read(p: *const f32) -> T {
        // SAFETY: the caller guarantees a readable value; a packed struct has no alignment.
        unsafe { (*p.cast::<Self>()).0 }
    }

    /// # Safety
    /// `p` must be valid for writing a `T`, at any alignment.
    #[inline(always)]
    unsafe fn write(value: T, p: *mut f32) {
        // SAFETY: the caller guarantees a writable place; a packed struct has no alignment.
        unsafe { (*p.cast::<Self>()).0 = value }
    }
}

/// The f32 at `p`, read as vectors are.
///
/// # Safety
/// `p` must be valid for reading an f32.
#[inline(always)]
pub(super) unsafe fn value_at(p: *const f32) -> f32 {
    // SAFETY: the caller guarantees a readable f32.
    unsafe { Unaligned::<f32>::read(p) }
}

/// For any CPU: arrays that the compiler vectorises with what the target has.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

impl Lanes for Portable {
    const N: usize = 8;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not f32::mul_add: without hardware for it, that is a slow library call.
        self.mul(factor).add(addend)
    }
    #[inline(always)]
    fn clamp_abs(self, bound: f32) -> Self {
        self.zip(Self::splat(bound), |a, b| a.max(-b).min(b))
    }
    #[inline(always)]
    fn recip(self) -> Self {
        Self::splat(1.0).zip(self, |a, b| a / b)
    }
    #[inline(always)]
    fn scale_by_power(self, k_plus_magic: Self) -> Self {
        self.zip(k_plus_magic, |a, k| f32::from_bits(a.to_bits().wrapping_add(k.to_bits() << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{F32x8, F32x16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    /// Eight f32 of AVX2 with FMA.
    #[derive(Clone, Copy)]
    #[repr(transparent)]
    pub(in crate::cpu) struct F32x8(__m256);

    /// AVX-512: 16 lanes of f32.
    #[derive(Clone, Copy)]
    #[repr(transparent)]
    pub(in crate::cpu) struct F32x16(__m512);

    impl Lanes for F32x8 {
        const N: usize = 8;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: this type is only used where AVX2 and FMA were detected.
            F32x8(unsafe { _mm256_set1_ps(x) })
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }
        #[inline(always)]
        fn clamp_abs(self, bound: f32) -> Self {
            let (low, high) = (Self::splat(-bound), Self::splat(bound));
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_min_ps(_mm256_max_ps(self.0, low.0), high.0) })
        }
        #[inline(always)]
        fn recip(self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe { _mm256_div_ps(_mm256_set1_ps(1.0), self.0) })
        }
        #[inline(always)]
        fn scale_by_power(self, k_plus_magic: Self) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(k_plus_magic.0));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), exponent))
            })
        }
    }

    impl Lanes for F32x16 {
        const N: usize = 16;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: this type is only used where AVX-512F was detected.
            F32x16(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
        }
        #[inline(always)]
        fn clamp_abs(self, bound: f32) -> Self {
            let (low, high) = (Self::splat(-bound), Self::splat(bound));
            // SAFETY: as in splat.
            F32x16(unsafe { _mm512_min_ps(_mm512_max_ps(self.0, low.0), high.0) })
        }
        #[inline(always)]
        fn recip(self) -> Self {
            // A 14-bit estimate and one Newton step cost a third of a division.
            // SAFETY: as in splat.
            let estimate = F32x16(unsafe { _mm512_rcp14_ps(self.0) });
            // SAFETY: as in splat.
            let error = unsafe { _mm512_fnmadd_ps(self.0, estimate.0, _mm512_set1_ps(1.0)) };
            estimate.mul_add(F32x16(error), estimate)
        }
        #[inline(always)]
        fn scale_by_power(self, k_plus_magic: Self) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe {
                let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(k_plus_magic.0));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), exponent))
            })
        }
    }
}
