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
    /// The number of leading zeros, from 1 to 32, of the distance between each of the `N` numbers
    /// from `p` on and `from`, as integers in the lanes. The distances must be below 2^31.
    ///
    /// # Safety
    /// `p` must be valid for reading `N` i32.
    unsafe fn distance_zeros(p: *const i32, from: i32) -> Self;
    /// The table's value at each lane's integer modulo the size of the table.
    fn look_up(self, table: &[f32; SLOTS]) -> Self;
    /// Adds the values in the lanes whose integer in `integers` is `integer`.
    fn add_where(self, values: Self, integers: Self, integer: u32) -> Self;
}

/// The size of a table that a vector looks up.
pub(super) const SLOTS: usize = 32;

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

/// Asks for values to be brought into the cache, if the CPU has an instruction for it.
#[inline(always)]
pub(super) fn prefetch(values: *const f32, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..len).step_by(16) {
        // SAFETY: a prefetch of any address is sound, and SSE is a part of every x86-64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(at).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, len);
}

/// Writes the four values from each of `rows` on as the columns of a 4 x 4 tile, whose rows are
/// `stride` apart in `to`.
///
/// # Safety
/// Each row must be valid for reading 4 f32, and each of the tile's rows for writing 4.
#[inline(always)]
pub(super) unsafe fn transpose_tile(rows: [*const f32; 4], to: *mut f32, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is a part of every x86-64, and the caller guarantees the rows.
    let columns = unsafe {
        use std::arch::x86_64::{__m128, _MM_TRANSPOSE4_PS};
        let [mut a, mut b, mut c, mut d] = rows.map(|row| Unaligned::<__m128>::read(row));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        [a, b, c, d]
    };
    #[cfg(not(target_arch = "x86_64"))]
    let columns = {
        // SAFETY: the caller guarantees the rows.
        let rows = rows.map(|row| unsafe { Unaligned::<[f32; 4]>::read(row) });
        [0, 1, 2, 3].map(|column| rows.map(|row| row[column]))
    };
    for (row, column) in columns.into_iter().enumerate() {
        // SAFETY: the caller guarantees the tile.
        unsafe { Unaligned::write(column, to.wrapping_add(row * stride)) };
    }
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
        // Without hardware for it, f32::mul_add is a slow library call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            let lanes = |lane: usize| self.0[lane].mul_add(factor.0[lane], addend.0[lane]);
            return Portable(std::array::from_fn(lanes));
        }
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
    #[inline(always)]
    unsafe fn distance_zeros(p: *const i32, from: i32) -> Self {
        // SAFETY: the caller guarantees N readable i32.
        let numbers = unsafe { Unaligned::<[i32; 8]>::read(p.cast()) };
        Portable(numbers.map(|number| {
            let distance = number.wrapping_sub(from).unsigned_abs();
            f32::from_bits(distance.leading_zeros())
        }))
    }
    #[inline(always)]
    fn look_up(self, table: &[f32; SLOTS]) -> Self {
        Portable(self.0.map(|slot| table[slot.to_bits() as usize % SLOTS]))
    }
    #[inline(always)]
    fn add_where(self, values: Self, integers: Self, integer: u32) -> Self {
        Portable(std::array::from_fn(|lane| {
            let equal = integers.0[lane].to_bits() == integer;
            self.0[lane] + if equal { values.0[lane] } else { 0.0 }
        }))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{F32x8, F32x16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, SLOTS, Unaligned};
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
        #[inline(always)]
        unsafe fn distance_zeros(p: *const i32, from: i32) -> Self {
            // A float's exponent is the place of the highest bit. A bit below a set one is cleared,
            // so that no conversion rounds up to the next power of two.
            // SAFETY: as in splat, and the caller guarantees N readable i32.
            F32x8(unsafe {
                let numbers = Unaligned::<__m256i>::read(p.cast());
                let distance = _mm256_abs_epi32(_mm256_sub_epi32(numbers, _mm256_set1_epi32(from)));
                let highest = _mm256_andnot_si256(_mm256_srli_epi32::<1>(distance), distance);
                let float = _mm256_castps_si256(_mm256_cvtepi32_ps(highest));
                let zeros =
                    _mm256_sub_epi32(_mm256_set1_epi32(31 + 127), _mm256_srli_epi32::<23>(float));
                _mm256_castsi256_ps(_mm256_min_epi32(zeros, _mm256_set1_epi32(32)))
            })
        }
        #[inline(always)]
        fn look_up(self, table: &[f32; SLOTS]) -> Self {
            // A gather takes twice as long.
            // SAFETY: as in splat; the table has four vectors.
            F32x8(unsafe {
                let slots = _mm256_castps_si256(self.0);
                let [a, b, c, d] = [0, 8, 16, 24].map(|at| {
                    _mm256_permutevar8x32_ps(Self::load(table.as_ptr().add(at)).0, slots)
                });
                // The two bits above those within a vector, each as the sign.
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(slots));
                let high = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(slots));
                let (a, c) = (_mm256_blendv_ps(a, b, low), _mm256_blendv_ps(c, d, low));
                _mm256_blendv_ps(a, c, high)
            })
        }
        #[inline(always)]
        fn add_where(self, values: Self, integers: Self, integer: u32) -> Self {
            // SAFETY: as in splat.
            F32x8(unsafe {
                let integers = _mm256_castps_si256(integers.0);
                let equal = _mm256_cmpeq_epi32(integers, _mm256_set1_epi32(integer as i32));
                _mm256_add_ps(self.0, _mm256_and_ps(values.0, _mm256_castsi256_ps(equal)))
            })
        }
    }

    impl Lanes for F32x16 {
        const N: usize = 16;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: this type is only used where AVX-512 F and CD were detected.
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
        #[inline(always)]
        unsafe fn distance_zeros(p: *const i32, from: i32) -> Self {
            // SAFETY: as in splat, and the caller guarantees N readable i32.
            F32x16(unsafe {
                let numbers = Unaligned::<__m512i>::read(p.cast());
                let distance = _mm512_abs_epi32(_mm512_sub_epi32(numbers, _mm512_set1_epi32(from)));
                _mm512_castsi512_ps(_mm512_lzcnt_epi32(distance))
            })
        }
        #[inline(always)]
        fn look_up(self, table: &[f32; SLOTS]) -> Self {
            // SAFETY: as in splat; the table has two vectors, and the instruction takes an index
            // modulo their length.
            F32x16(unsafe {
                let [low, high] = [0, 16].map(|at| Self::load(table.as_ptr().add(at)).0);
                _mm512_permutex2var_ps(low, _mm512_castps_si512(self.0), high)
            })
        }
        #[inline(always)]
        fn add_where(self, values: Self, integers: Self, integer: u32) -> Self {
            // SAFETY: as in splat.
            F32x16(unsafe {
                let integers = _mm512_castps_si512(integers.0);
                let integer = _mm512_set1_epi32(integer as i32);
                let equal = _mm512_cmpeq_epi32_mask(integers, integer);
                _mm512_mask_add_ps(self.0, equal, self.0, values.0)
            })
        }
    }
}
