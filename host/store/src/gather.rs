//! The batched read that all views of a store share. It goes through a batch in stages, so that the
//! cache misses of many rows overlap: index buckets, then where each row lies, then the rows
//! themselves, each stage prefetched some ids ahead. Where the store is larger than memory, the
//! disk is asked before for all pages of the batch. It knows nothing of who may change what
//! meanwhile; a [`RowSource`] promises that what it points at stays.

use crate::error::Result;
use crate::fault_guard;
use crate::index::{IndexBucket, NONE, find_after, home};
use crate::memory::Residency;
use crate::read_ahead::{self, PageList};
use crate::slab::RowShape;
use crate::view::Base;

/// Ids of a block: enough for stages to run at length, few enough for the second cache.
const BLOCK: usize = 256;
/// How far ahead index buckets are asked for. Speed is the same from here on to twice as far.
const BUCKETS_AHEAD: usize = 32;
/// How far ahead rows are, each of several cache lines; the same holds.
const ROWS_AHEAD: usize = 16;
/// No more lines of a row are asked for by hand; the hardware sees a longer run by itself.
const MOST_LINES: usize = 8;
/// Ids whose pages are asked for at once: enough for any disk, few enough that none of them leaves
/// memory again before it is read: 16 MiB where a page has 4 KiB and a row lies on one, and as many
/// times more as pages are larger or a row lies on several.
const PART: usize = 4096;
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
            || gather_part(source, &ids[..half], low),
            || gather_part(source, &ids[half..], high),
        );
        return a + b;
    }
    gather_part(source, ids, out)
}

fn gather_part(source: &impl RowSource, ids: &[u64], out: &mut [f32]) -> usize {
    let Some(read_ahead) = &source.base().read_ahead else {
        return gather_blocks(source, ids, out);
    };
    let parts = ids.chunks(PART).zip(out.chunks_mut(PART * source.base().shape.dim));
    parts
        .map(|(ids, out)| {
            let request = || request_pages(source, ids);
            let read = || gather_blocks(source, ids, out);
            read_ahead.around(ids.len(), read_ahead::faults, request, read)
        })
        .sum()
}

/// Asks the disk for the pages that a batch lies on: of the index first, since it says which pages
/// of the slabs.
fn request_pages(source: &impl RowSource, ids: &[u64]) {
    let Base { index, shape, .. } = source.base();
    let mut pages = PageList::default();
    if index.residency == Residency::Partial {
        let table = index.table();
        for &id in ids {
            let bucket = &raw const table[home(id, table.len())];
            pages.add(bucket.cast(), size_of::<IndexBucket>());
        }
        pages.request();
    }
    for ids in ids.chunks(BLOCK) {
        let mut places = [ValueLocation::Missing; BLOCK];
        find_places(source, ids, &mut places);
        for place in places {
            if let ValueLocation::Slab(start) = place {
                pages.add(start, shape.stride());
            }
        }
    }
    pages.request();
}

fn gather_blocks(source: &impl RowSource, ids: &[u64], out: &mut [f32]) -> usize {
    let shape = source.base().shape;
    let mut misses = 0;
    for (ids, out) in ids.chunks(BLOCK).zip(out.chunks_mut(BLOCK * shape.dim)) {
        let mut places = [ValueLocation::Missing; BLOCK];
        misses += find_places(source, ids, &mut places);
        copy_rows(shape, &places[..ids.len()], out);
    }
    misses
}

/// Finds where the rows of a block are; gives the number of ids that have none.
#[inline]
fn find_places(source: &impl RowSource, ids: &[u64], places: &mut [ValueLocation; BLOCK]) -> usize {
    let mut rows = [NONE; BLOCK];
    find_rows(source, ids, &mut rows);
    let mut without = BlockPositions::new();
    for (at, ((place, &row), &id)) in places.iter_mut().zip(&rows).zip(ids).enumerate() {
        *place = source.place(row);
        let is_missing = matches!(place, ValueLocation::Missing);
        if is_missing {
            source.prefetch_young(id);
        }
        without.push_if(is_missing, at);
    }
    find_young_places(source, ids, &without, places)
}

/// Row numbers by the index. Few ids lie beyond their home bucket, and no branch can foresee which:
/// they are noted, and looked for once all others are found.
#[inline]
fn find_rows(source: &impl RowSource, ids: &[u64], rows: &mut [u32; BLOCK]) {
    let table = source.base().index.table();
    let mut homes = [0; BLOCK];
    let mut elsewhere = BlockPositions::new();
    let (homes, rows) = (&mut homes[..ids.len()], &mut rows[..ids.len()]);
    let mut asked = 0;
    for at in 0..ids.len() {
        while asked < (at + BUCKETS_AHEAD).min(ids.len()) {
            homes[asked] = home(ids[asked], table.len());
            prefetch((&raw const table[homes[asked]]).cast());
            asked += 1;
        }
        let bucket = &table[homes[at]];
        rows[at] = bucket.find(ids[at]);
        elsewhere.push_if((rows[at] == NONE) & bucket.is_overflown(), at);
        source.prefetch_place(rows[at]);
    }
    for at in elsewhere.iter() {
        prefetch(table.as_ptr().wrapping_add(homes[at] + 1).cast());
    }
    for at in elsewhere.iter() {
        rows[at] = find_after(table, homes[at], ids[at]);
        source.prefetch_place(rows[at]);
    }
}

/// Finds where the rows of ids are that the index does not know; gives the number without a row.
fn find_young_places(
    source: &impl RowSource,
    ids: &[u64],
    without: &BlockPositions,
    places: &mut [ValueLocation; BLOCK],
) -> usize {
    let mut rows = [NONE; BLOCK];
    for at in without.iter() {
        rows[at] = source.find_young(ids[at]);
        source.prefetch_place(rows[at]);
    }
    let mut misses = 0;
    for at in without.iter() {
        places[at] = source.place(rows[at]);
        misses += usize::from(matches!(places[at], ValueLocation::Missing));
    }
    misses
}

/// Some positions within a block, noted without a branch that the processor would have to foresee.
struct BlockPositions {
    at: [u16; BLOCK],
    len: usize,
}

impl BlockPositions {
    fn new() -> BlockPositions {
        BlockPositions { at: [0; BLOCK], len: 0 }
    }

    /// Adds a position if `condition` holds.
    #[inline(always)]
    fn push_if(&mut self, condition: bool, at: usize) {
        self.at[self.len] = at as u16;
        self.len += usize::from(condition);
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        self.at[..self.len].iter().map(|&at| usize::from(at))
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
                // SAFETY: `RowSource` promises that a row lies there and stays as it is.
                let bytes = unsafe { std::slice::from_raw_parts(start, stride) };
                format.decode(bytes, out);
            }
            ValueLocation::Above(start) => {
                // SAFETY: likewise; bytes of an f32 are little-endian here as in a slab.
                let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), dim * 4) };
                copy_floats(bytes, out);
            }
        }
    }
}

/// Copies the bytes of f32. By `memcpy`, which has the machine's widest registers: with registers
/// of 16 bytes a row needs so many stores that they, and not the memory, set the pace.
#[inline(always)]
pub(crate) fn copy_floats(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: it is the same memory, any bytes make an f32, and the store is little-endian.
    let out =
        unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), size_of_val(out)) };
    out.copy_from_slice(bytes);
}

#[inline]
fn prefetch_row(place: ValueLocation, stride: usize) {
    let start = match place {
        ValueLocation::Missing => return,
        ValueLocation::Slab(start) => start,
        ValueLocation::Above(start) => start.cast(),
    };
    let lines = stride.div_ceil(64);
    // Unrolled, since it is of known length: one instruction that asks for line after line looks to
    // the processor like the start of a stream, and it fetches more lines that nobody wants.
    for line in 0..MOST_LINES {
        if line < lines {
            prefetch(start.wrapping_add(line * 64));
        }
    }
}

/// Asks for the cache line of an address, which need not be good. Into the second cache: a core has
/// far fewer lines in flight to the first one, and rows would wait for each other.
#[inline]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch never faults, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
