//! The batched read that all views of a store share. It goes through a batch in stages, so that the
//! cache misses of many rows overlap: index buckets, then where each row lies, then the rows
//! themselves, each stage prefetched some ids ahead. It knows nothing of who may change what
//! meanwhile; a [`RowSource`] promises that what it points at stays.

use crate::error::Result;
use crate::fault_guard;
use crate::index::{NONE, find_from, home};
use crate::slab::RowShape;
use crate::view::Base;

/// Ids of a block: enough for stages to run at length, few enough for the first cache.
const BLOCK: usize = 256;
/// How far ahead index buckets are asked for: as many misses as a core has in flight.
const BUCKETS_AHEAD: usize = 16;
/// How far ahead rows are, each of several cache lines.
const ROWS_AHEAD: usize = 8;
/// No more lines of a row are asked for by hand; the hardware sees a longer run by itself.
const MOST_LINES: usize = 8;
/// Batches from this size on are worth two threads.
const PARALLEL: usize = 8192;

/// Where a row's values are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ValueLocation {
    /// Nowhere: the id has no row.
    Missing,
    /// In a slab, in the store's format.
    Slab(*const u8),
    /// Above the slabs, as f32.
    Above(*const f32),
}

/// What a batch is read from.
///
/// # Safety
/// The pointers that `place` gives must be good for [`RowShape::stride`] bytes, or `dim` f32
/// values, which nobody changes while the source is borrowed.
pub(crate) unsafe trait RowSource: Sync {
    /// The slabs, and the index that is looked into first.
    fn base(&self) -> &Base;
    /// Asks for what `find_young` will read.
    fn prefetch_young(&self, id: u64);
    /// The row number of an id that the index does not have, or that it has with a row that is
    /// gone; or `NONE`.
    fn find_young(&self, id: u64) -> u32;
    /// Asks for what `place` will read, if that is not in the cache anyway.
    fn prefetch_place(&self, row: u32);
    /// Where a row is. Any number may be asked for.
    fn place(&self, row: u32) -> ValueLocation;
}

/// Copies the rows of `ids` to `out`, `[ids.len(), dim]`, zeros for missing ones; gives the number
/// of those. What was read while a file was lost is read again, or is an error.
pub(crate) fn gather(source: &impl RowSource, ids: &[u64], out: &mut [f32]) -> Result<usize> {
    let dim = source.base().shape.dim;
    assert_eq!(out.len(), ids.len() * dim, "out must be [ids.len(), dim]");
    loop {
        let losses = fault_guard::losses();
        if losses > 0 {
            restore(source)?;
        }
        let misses = gather_parts(source, ids, out);
        if fault_guard::losses() == losses {
            return Ok(misses);
        }
    }
}

/// Fails if a file of the source was cut, and names it. A file that is whole again is in use again.
pub(crate) fn check_files(source: &impl RowSource) -> Result<()> {
    source.base().look_at_lengths();
    restore(source)
}

fn restore(source: &impl RowSource) -> Result<()> {
    if source.base().check_files().is_ok() {
        return Ok(());
    }
    source.base().restore(&|row| matches!(source.place(row), ValueLocation::Slab(_)))
}

fn gather_parts(source: &impl RowSource, ids: &[u64], out: &mut [f32]) -> usize {
    let dim = source.base().shape.dim;
    if ids.len() >= PARALLEL {
        let half = ids.len() / 2;
        let (low, high) = out.split_at_mut(half * dim);
        let (a, b) = rayon::join(
            || gather_blocks(source, &ids[..half], low),
            || gather_blocks(source, &ids[half..], high),
        );
        return a + b;
    }
    gather_blocks(source, ids, out)
}

fn gather_blocks(source: &impl RowSource, ids: &[u64], out: &mut [f32]) -> usize {
    let dim = source.base().shape.dim;
    let mut misses = 0;
    for (ids, out) in ids.chunks(BLOCK).zip(out.chunks_mut(BLOCK * dim)) {
        let mut rows = [NONE; BLOCK];
        let mut places = [ValueLocation::Missing; BLOCK];
        find_rows(source, ids, &mut rows);
        let without = find_places(source, ids, &rows, &mut places);
        if without > 0 {
            misses += find_young_places(source, ids, &mut places);
        }
        copy_rows(source.base().shape, &places[..ids.len()], out);
    }
    misses
}

/// Where the rows that the index knows are; gives the number of ids without one.
#[inline]
fn find_places(
    source: &impl RowSource,
    ids: &[u64],
    rows: &[u32; BLOCK],
    places: &mut [ValueLocation; BLOCK],
) -> usize {
    let mut without = 0;
    for ((place, &row), &id) in places.iter_mut().zip(rows).zip(ids) {
        *place = source.place(row);
        if matches!(place, ValueLocation::Missing) {
            source.prefetch_young(id);
            without += 1;
        }
    }
    without
}

/// The same for ids that the index does not know; gives the number that have no row at all.
fn find_young_places(
    source: &impl RowSource,
    ids: &[u64],
    places: &mut [ValueLocation; BLOCK],
) -> usize {
    let mut misses = 0;
    let mut rows = [NONE; BLOCK];
    let is_missing = |place: &ValueLocation| matches!(place, ValueLocation::Missing);
    for ((row, place), &id) in rows.iter_mut().zip(&*places).zip(ids) {
        if is_missing(place) {
            *row = source.find_young(id);
            source.prefetch_place(*row);
        }
    }
    for ((row, place), _) in rows.iter().zip(places).zip(ids) {
        if is_missing(place) {
            *place = source.place(*row);
            misses += usize::from(is_missing(place));
        }
    }
    misses
}

#[inline]
fn find_rows(source: &impl RowSource, ids: &[u64], rows: &mut [u32; BLOCK]) {
    let table = source.base().index.table();
    let mut homes = [0; BLOCK];
    let (homes, rows) = (&mut homes[..ids.len()], &mut rows[..ids.len()]);
    let mut asked = 0;
    for at in 0..ids.len() {
        while asked < (at + BUCKETS_AHEAD).min(ids.len()) {
            homes[asked] = home(ids[asked], table.len());
            prefetch((&raw const table[homes[asked]]).cast());
            asked += 1;
        }
        rows[at] = find_from(table, homes[at], ids[at]);
        source.prefetch_place(rows[at]);
    }
}

#[inline]
fn copy_rows(shape: RowShape, places: &[ValueLocation], out: &mut [f32]) {
    let RowShape { dim, format } = shape;
    let stride = shape.stride();
    for &place in &places[..places.len().min(ROWS_AHEAD)] {
        prefetch_row(place, stride);
    }
    for (at, (&place, out)) in places.iter().zip(out.chunks_exact_mut(dim)).enumerate() {
        if let Some(&place) = places.get(at + ROWS_AHEAD) {
            prefetch_row(place, stride);
        }
        match place {
            ValueLocation::Missing => out.fill(0.0),
            ValueLocation::Slab(start) => {
                // SAFETY: `Source` promises that a row lies there and stays as it is.
                let bytes = unsafe { std::slice::from_raw_parts(start, stride) };
                format.decode(bytes, out);
            }
            ValueLocation::Above(start) => {
                // SAFETY: likewise; bytes of an f32 are little-endian here as in a slab.
                let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), dim * 4) };
                copy_floats(bytes.as_chunks().0, out);
            }
        }
    }
}

/// A copy by whole cache lines in place of a call that first finds out how long a row is.
#[inline(always)]
pub(crate) fn copy_floats(bytes: &[[u8; 4]], out: &mut [f32]) {
    let (lines, rest) = bytes.as_chunks::<16>();
    let (out_lines, out_rest) = out.as_chunks_mut::<16>();
    for (line, out) in lines.iter().zip(out_lines) {
        *out = line.map(f32::from_le_bytes);
    }
    for (bytes, out) in rest.iter().zip(out_rest) {
        *out = f32::from_le_bytes(*bytes);
    }
}

#[inline]
fn prefetch_row(place: ValueLocation, stride: usize) {
    let start = match place {
        ValueLocation::Missing => return,
        ValueLocation::Slab(start) => start,
        ValueLocation::Above(start) => start.cast(),
    };
    for line in 0..stride.div_ceil(64).min(MOST_LINES) {
        prefetch(start.wrapping_add(line * 64));
    }
}

/// Asks for the cache line of an address, which need not be good.
#[inline]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
