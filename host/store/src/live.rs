//! What readers beside the writer look at: the slabs and index of a checkpoint, and above them the
//! committed rows since then, as immutable versions. One writer publishes, any number of threads
//! read, and no reader ever waits: it finds a row's version, or that it has none, by atomic loads
//! alone. When the writer publishes and what it does with old versions is the business of `handle`.
//!
//! Why immutable versions and not a version word in the row: a reader of a row that is overwritten
//! in place must copy it word by word and try again when it was torn, and under a fast writer it
//! may try often. A version that never changes is copied at full speed, once. Its price is a copy
//! of each committed row, and memory for versions that a reader may still be copying; epochs tell
//! when it can be used again.

use std::collections::VecDeque;
use std::hash::BuildHasher as _;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64};

use hypercast_core::hash::IdHashKey;

use crate::epoch::Epochs;
use crate::gather::{RowSource, ValueLocation, prefetch};
use crate::index::NONE;
use crate::slab::ROWS_PER_SLAB;
use crate::view::Base;

/// Slabs that row numbers of 32 bits can name.
const MOST_SLABS: usize = 1 << 16;

/// A checkpoint's rows, and those committed since.
#[derive(Debug)]
pub(crate) struct LiveRows {
    base: Base,
    /// By slab: its rows' versions, once it has any.
    chunks: Box<[AtomicPtr<VersionChunk>]>,
    young: AtomicPtr<IdTable>,
    /// The writer's; readers never lock it.
    writer: Mutex<VersionWriter>,
}

/// The versions of 65536 rows.
#[derive(Debug)]
struct VersionChunk {
    /// A bit a row: whether it has a version. Few enough bytes to stay in the cache, so a row
    /// without costs no miss.
    bits: [AtomicU64; ROWS_PER_SLAB / 64],
    versions: [AtomicPtr<f32>; ROWS_PER_SLAB],
}

/// In the place of a version: the row belongs to no id any more.
static REMOVED: f32 = 0.0;

fn removed() -> *mut f32 {
    (&raw const REMOVED).cast_mut()
}

#[derive(Debug)]
struct VersionWriter {
    arena: Arena,
    /// Versions that were replaced, by the epoch in which they were.
    replaced: VecDeque<(u64, RowVersion)>,
    tables: VecDeque<(u64, Box<IdTable>)>,
}

/// Points to the values of one version of a row.
#[derive(Debug, Clone, Copy)]
struct RowVersion(*mut f32);

// SAFETY: it points into the arena that lies beside it under the same lock.
unsafe impl Send for RowVersion {}

impl LiveRows {
    /// A view of a checkpoint whose rows have no versions yet.
    pub fn new(base: Base) -> LiveRows {
        let chunks = (0..MOST_SLABS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        let writer = VersionWriter {
            arena: Arena::new(base.shape.dim),
            replaced: VecDeque::new(),
            tables: VecDeque::new(),
        };
        let young = AtomicPtr::new(Box::into_raw(Box::new(IdTable::new(1024))));
        LiveRows { base, chunks, young, writer: Mutex::new(writer) }
    }

    /// Lets readers see a row's new values, `None` for a row that was removed. The writer's alone.
    pub fn publish(&self, row: u32, values: Option<&[f32]>, epochs: &Epochs) {
        let mut writer = self.writer.lock().expect("a publication does not panic");
        let version = match values {
            Some(values) => writer.arena.add(values),
            None => removed(),
        };
        let chunk = self.chunk(row);
        let at = row as usize % ROWS_PER_SLAB;
        let old = chunk.versions[at].swap(version, Release);
        chunk.bits[at / 64].fetch_or(1 << (at % 64), Release);
        if !old.is_null() && old != removed() {
            writer.replaced.push_back((epochs.current(), RowVersion(old)));
        }
    }

    /// Lets readers find an id's row, which was published before. The writer's alone.
    pub fn publish_id(&self, id: u64, row: u32, epochs: &Epochs) {
        let mut writer = self.writer.lock().expect("a publication does not panic");
        let table = self.table();
        if table.has_room() {
            table.set(id, row);
            return;
        }
        let larger = IdTable::new(table.slots.len() * 2);
        for slot in &table.slots {
            let row = slot.row.load(Relaxed);
            if row != NONE {
                larger.set(slot.id.load(Relaxed), row);
            }
        }
        larger.set(id, row);
        let old = self.young.swap(Box::into_raw(Box::new(larger)), Release);
        // SAFETY: it came from a box, and nobody finds it here any more; readers who have it are
        // waited for.
        let old = unsafe { Box::from_raw(old) };
        writer.tables.push_back((epochs.current(), old));
    }

    /// Takes back the memory of what no reader sees any more. The writer's alone.
    pub fn collect(&self, epochs: &Epochs) {
        let mut writer = self.writer.lock().expect("a publication does not panic");
        let VersionWriter { arena, replaced, tables } = &mut *writer;
        while let Some((_, version)) = replaced.pop_front_if(|(epoch, _)| epochs.is_past(*epoch)) {
            arena.free.push(version);
        }
        while tables.pop_front_if(|(epoch, _)| epochs.is_past(*epoch)).is_some() {}
    }

    fn chunk(&self, row: u32) -> &VersionChunk {
        let slot = &self.chunks[row as usize / ROWS_PER_SLAB];
        let mut chunk = slot.load(Acquire);
        if chunk.is_null() {
            chunk = VersionChunk::new();
            slot.store(chunk, Release);
        }
        // SAFETY: a chunk that was put there lives as long as this `Live`.
        unsafe { &*chunk }
    }

    #[inline(always)]
    fn chunk_if_any(&self, row: u32) -> Option<&VersionChunk> {
        let chunk = self.chunks[row as usize / ROWS_PER_SLAB].load(Acquire);
        // SAFETY: it is null or a chunk, which lives as long as this `Live`.
        unsafe { chunk.as_ref() }
    }

    #[inline]
    fn table(&self) -> &IdTable {
        // SAFETY: a table lives until it is replaced and every reader from before has left its
        // epoch; callers are such readers, or the writer.
        unsafe { &*self.young.load(Acquire) }
    }
}

impl Drop for LiveRows {
    fn drop(&mut self) {
        for chunk in &mut self.chunks {
            let chunk = *chunk.get_mut();
            if !chunk.is_null() {
                // SAFETY: it came from a box in `Chunk::new`, and this is the only owner.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
        // SAFETY: likewise.
        drop(unsafe { Box::from_raw(*self.young.get_mut()) });
    }
}

// The caller is within an epoch. The slabs' rows that a checkpoint changes all have versions here
// by then, and it waits for readers who came before that; versions are used again only once their
// readers have gone. SAFETY: so what `place` points at stays.
unsafe impl RowSource for LiveRows {
    #[inline]
    fn base(&self) -> &Base {
        &self.base
    }

    #[inline]
    fn prefetch_young(&self, id: u64) {
        let table = self.table();
        prefetch((&raw const table.slots[table.home(id)]).cast());
    }

    #[inline]
    fn find_young(&self, id: u64) -> u32 {
        self.table().probe(id).1
    }

    #[inline]
    fn prefetch_place(&self, row: u32) {
        let at = row as usize % ROWS_PER_SLAB;
        if let Some(chunk) = self.chunk_if_any(row)
            && chunk.bits[at / 64].load(Relaxed) >> (at % 64) & 1 == 1
        {
            prefetch(chunk.versions[at].as_ptr().cast::<u8>());
        }
    }

    #[inline(always)]
    fn place(&self, row: u32) -> ValueLocation {
        let at = row as usize % ROWS_PER_SLAB;
        let Some(chunk) = self.chunk_if_any(row) else { return self.base.place(row) };
        if chunk.bits[at / 64].load(Acquire) >> (at % 64) & 1 == 0 {
            return self.base.place(row);
        }
        let version = chunk.versions[at].load(Acquire).cast_const();
        if ptr::eq(version, &raw const REMOVED) {
            ValueLocation::Missing
        } else {
            ValueLocation::Above(version)
        }
    }
}

impl VersionChunk {
    fn new() -> *mut VersionChunk {
        let layout = std::alloc::Layout::new::<VersionChunk>();
        // Half a mebibyte, made where it stays and not on the stack.
        // SAFETY: the layout is not empty; zeros are valid atomics, and null pointers, throughout.
        let chunk = unsafe { std::alloc::alloc_zeroed(layout) };
        if chunk.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        chunk.cast()
    }
}

/// A hash table from id to row number that only grows.
#[derive(Debug)]
struct IdTable {
    slots: Box<[Slot]>,
    len: AtomicU64,
    key: IdHashKey,
}

#[derive(Debug)]
struct Slot {
    id: AtomicU64,
    /// `NONE` where the slot is empty; set last.
    row: AtomicU32,
}

impl IdTable {
    fn new(slots: usize) -> IdTable {
        let empty = || Slot { id: AtomicU64::new(0), row: AtomicU32::new(NONE) };
        IdTable {
            slots: (0..slots).map(|_| empty()).collect(),
            len: AtomicU64::new(0),
            key: IdHashKey::default(),
        }
    }

    fn has_room(&self) -> bool {
        (self.len.load(Relaxed) as usize + 1) * 2 <= self.slots.len()
    }

    fn set(&self, id: u64, row: u32) {
        let (slot, found) = self.probe(id);
        if found == NONE {
            slot.id.store(id, Relaxed);
            self.len.store(self.len.load(Relaxed) + 1, Relaxed);
        }
        slot.row.store(row, Release);
    }

    /// Where the search for `id` begins.
    #[inline]
    fn home(&self, id: u64) -> usize {
        self.key.hash_one(id) as usize & (self.slots.len() - 1)
    }

    /// The slot of `id`, or the empty one where it would be (half of them are), and its row.
    #[inline]
    fn probe(&self, id: u64) -> (&Slot, u32) {
        let mask = self.slots.len() - 1;
        let mut at = self.home(id);
        loop {
            let slot = &self.slots[at];
            // Once: a slot that was empty may be another id's by the next look at it.
            let row = slot.row.load(Acquire);
            if row == NONE || slot.id.load(Relaxed) == id {
                return (slot, row);
            }
            at = (at + 1) & mask;
        }
    }
}

/// Sixteen values on a cache line of their own.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct CacheLine {
    _values: [f32; 16],
}

/// Memory for versions, in blocks that do not move.
#[derive(Debug)]
struct Arena {
    dim: usize,
    /// From boxes, and kept as pointers since versions are pointers into them.
    blocks: Vec<*mut [CacheLine]>,
    free: Vec<RowVersion>,
}

// SAFETY: the blocks are its own.
unsafe impl Send for Arena {}

impl Arena {
    /// Bytes of a block, about.
    const BLOCK: usize = 1 << 20;

    fn new(dim: usize) -> Arena {
        Arena { dim, blocks: Vec::new(), free: Vec::new() }
    }

    fn add(&mut self, values: &[f32]) -> *mut f32 {
        assert_eq!(values.len(), self.dim);
        if self.free.is_empty() {
            self.grow();
        }
        let RowVersion(version) = self.free.pop().expect("a block has versions");
        // SAFETY: it has room for `dim` values, and no reader has it: it is new, or its readers
        // have gone.
        unsafe { ptr::copy_nonoverlapping(values.as_ptr(), version, self.dim) };
        version
    }

    fn grow(&mut self) {
        let lines = self.dim.div_ceil(16);
        let versions = (Self::BLOCK / (lines * 64)).max(1);
        let block = vec![CacheLine { _values: [0.0; 16] }; versions * lines].into_boxed_slice();
        let block = Box::into_raw(block);
        let start = block.cast::<CacheLine>();
        self.free.extend(
            (0..versions).rev().map(|at| RowVersion(start.wrapping_add(at * lines).cast())),
        );
        self.blocks.push(block);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for &block in &self.blocks {
            // SAFETY: it came from a box, and nobody reads versions any more where their `Live` is
            // dropped.
            drop(unsafe { Box::from_raw(block) });
        }
    }
}

#[cfg(test)]
mod tests {
    use hypercast_core::hash::mix64;

    use super::*;

    #[test]
    fn ids_that_are_chosen_to_fall_together_are_found_at_once() {
        let table = IdTable::new(4096);
        // Their hashes without a key have the same last ten bits.
        let ids = (0_u64..).filter(|id| mix64(*id) & 1023 == 7).take(1000);
        let ids: Vec<u64> = ids.collect();
        ids.iter().zip(0..).for_each(|(&id, row)| table.set(id, row));
        let mask = table.slots.len() - 1;
        let steps = |id: u64| {
            let at = table.slots.iter().position(|slot| slot.id.load(Relaxed) == id).unwrap();
            at.wrapping_sub(table.home(id)) & mask
        };
        let most = ids.iter().map(|&id| steps(id)).max().unwrap();
        assert!(most < 64, "{most} steps");
        assert!(ids.iter().zip(0..).all(|(&id, row)| table.probe(id).1 == row));
    }
}
