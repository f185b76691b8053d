//! Slabs: fixed-size files that hold 65536 rows' values, or their optimizer
//! state, each item with its checksum. A slab knows nothing of generations:
//! whether an item counts is for the journal to say.
//!
//! A rows slab is a 64-byte header, `[65536, dim]` f32 values, 65536 u64 ids, and
//! 65536 u32 checksums (CRC-32 of row number, id and values). A state slab is a
//! header and 65536 pairs of f32 accumulator and u32 checksum.

use std::fs::{File, OpenOptions};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};

use crate::error::{Result, corrupt, io};
use crate::header::{self, Header, create_zeroed, u32_at, u64_at};

/// Rows a slab.
pub(crate) const ROWS_PER_SLAB: usize = 1 << 16;

/// How many slabs hold `rows` rows.
pub(crate) fn slabs_for(rows: usize) -> usize {
    rows.div_ceil(ROWS_PER_SLAB)
}

/// Which slab it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlabId {
    pub number: usize,
    pub dim: usize,
}

/// Values, ids and checksums of 65536 rows.
#[derive(Debug)]
pub(crate) struct RowSlab<M> {
    id: SlabId,
    path: PathBuf,
    map: M,
}

/// Adagrad accumulators of 65536 rows.
#[derive(Debug)]
pub(crate) struct StateSlab<M> {
    id: SlabId,
    path: PathBuf,
    map: M,
}

impl RowSlab<Mmap> {
    /// Maps a slab that must exist.
    pub fn open(dir: &Path, id: SlabId) -> Result<Self> {
        let path = dir.join(format!("rows-{:05}.slab", id.number));
        Ok(RowSlab { id, map: map(&path, &Self::header(id), Self::file_len(id))?, path })
    }
}

impl RowSlab<MmapMut> {
    /// Maps a slab for writing; a `fresh` one is made anew, whatever was there.
    pub fn open_mut(dir: &Path, id: SlabId, fresh: bool) -> Result<Self> {
        let path = dir.join(format!("rows-{:05}.slab", id.number));
        let map = map_mut(&path, &Self::header(id), Self::file_len(id), fresh)?;
        Ok(RowSlab { id, map, path })
    }

    /// Sets one row; `at` counts within the slab.
    pub fn set(&mut self, at: usize, id: u64, values: &[f32]) {
        assert_eq!(values.len(), self.id.dim);
        let start = header::SIZE + at * self.id.dim * 4;
        let bytes = &mut self.map[start..start + self.id.dim * 4];
        for (slot, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *slot = value.to_le_bytes();
        }
        let start = self.ids_at() + at * 8;
        self.map[start..start + 8].copy_from_slice(&id.to_le_bytes());
        let check = self.checksum(at);
        let start = self.checks_at() + at * 4;
        self.map[start..start + 4].copy_from_slice(&check.to_le_bytes());
    }

    /// Makes all changes durable.
    pub fn sync(self) -> Result<()> {
        self.map.flush().map_err(io("sync", &self.path))
    }
}

impl<M: Deref<Target = [u8]>> RowSlab<M> {
    fn header(id: SlabId) -> Header {
        let fields = [id.number as u64, id.dim as u64, ROWS_PER_SLAB as u64, 0, 0, 0];
        Header { magic: *b"HCROWS\0\0", fields }
    }

    fn file_len(id: SlabId) -> u64 {
        (header::SIZE + ROWS_PER_SLAB * (id.dim * 4 + 8 + 4)) as u64
    }

    fn ids_at(&self) -> usize {
        header::SIZE + ROWS_PER_SLAB * self.id.dim * 4
    }

    fn checks_at(&self) -> usize {
        self.ids_at() + ROWS_PER_SLAB * 8
    }

    /// A row's values, little-endian.
    #[inline]
    pub fn values(&self, at: usize) -> &[[u8; 4]] {
        let start = header::SIZE + at * self.id.dim * 4;
        self.map[start..start + self.id.dim * 4].as_chunks().0
    }

    /// A row's id.
    pub fn id(&self, at: usize) -> u64 {
        u64_at(&self.map, self.ids_at() + at * 8)
    }

    /// Fails if the row is not what was written.
    pub fn verify(&self, at: usize) -> Result<()> {
        if u32_at(&self.map, self.checks_at() + at * 4) == self.checksum(at) {
            return Ok(());
        }
        Err(corrupt(&self.path, format!("the checksum of its row {at} does not match")))
    }

    fn checksum(&self, at: usize) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&row_number(self.id, at).to_le_bytes());
        crc.update(&self.id(at).to_le_bytes());
        crc.update(self.values(at).as_flattened());
        crc.finalize()
    }
}

impl StateSlab<Mmap> {
    /// Maps a slab that must exist.
    pub fn open(dir: &Path, id: SlabId) -> Result<Self> {
        let path = dir.join(format!("state-{:05}.slab", id.number));
        Ok(StateSlab { id, map: map(&path, &Self::header(id), Self::FILE_LEN)?, path })
    }
}

impl StateSlab<MmapMut> {
    /// Maps a slab for writing; a `fresh` one is made anew, whatever was there.
    pub fn open_mut(dir: &Path, id: SlabId, fresh: bool) -> Result<Self> {
        let path = dir.join(format!("state-{:05}.slab", id.number));
        let map = map_mut(&path, &Self::header(id), Self::FILE_LEN, fresh)?;
        Ok(StateSlab { id, map, path })
    }

    /// Sets one row's accumulator; `at` counts within the slab.
    pub fn set(&mut self, at: usize, state: f32) {
        let check = self.checksum(at, state);
        let start = header::SIZE + at * 8;
        self.map[start..start + 4].copy_from_slice(&state.to_le_bytes());
        self.map[start + 4..start + 8].copy_from_slice(&check.to_le_bytes());
    }

    /// Makes all changes durable.
    pub fn sync(self) -> Result<()> {
        self.map.flush().map_err(io("sync", &self.path))
    }
}

impl<M: Deref<Target = [u8]>> StateSlab<M> {
    const FILE_LEN: u64 = (header::SIZE + ROWS_PER_SLAB * 8) as u64;

    fn header(id: SlabId) -> Header {
        let fields = [id.number as u64, id.dim as u64, ROWS_PER_SLAB as u64, 0, 0, 0];
        Header { magic: *b"HCSTATE\0", fields }
    }

    /// A row's accumulator.
    pub fn state(&self, at: usize) -> f32 {
        f32::from_bits(u32_at(&self.map, header::SIZE + at * 8))
    }

    /// Fails if the accumulator is not what was written.
    pub fn verify(&self, at: usize) -> Result<()> {
        if u32_at(&self.map, header::SIZE + at * 8 + 4) == self.checksum(at, self.state(at)) {
            return Ok(());
        }
        Err(corrupt(&self.path, format!("the checksum of its state {at} does not match")))
    }

    fn checksum(&self, at: usize, state: f32) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&row_number(self.id, at).to_le_bytes());
        crc.update(&state.to_le_bytes());
        crc.finalize()
    }
}

fn row_number(id: SlabId, at: usize) -> u64 {
    (id.number * ROWS_PER_SLAB + at) as u64
}

fn map(path: &Path, header: &Header, len: u64) -> Result<Mmap> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => corrupt(path, "it is missing"),
        _ => io("open", path)(error),
    })?;
    // A slab is changed by its writer's checkpoint alone, while no reader has it mapped (`ReadersLock`).
    // SAFETY: so nothing changes under the map, and files of a store are never shortened.
    let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
    check_file(&map, header, len, path)?;
    Ok(map)
}

fn map_mut(path: &Path, header: &Header, len: u64, fresh: bool) -> Result<MmapMut> {
    let file = if fresh {
        create_zeroed(path, header, len)?
    } else {
        OpenOptions::new().read(true).write(true).open(path).map_err(io("open", path))?
    };
    // The caller holds the writer's and the exclusive readers' lock, or made the file where nobody looks.
    // SAFETY: so no slice of another mapping of this file is alive meanwhile.
    let map = unsafe { MmapMut::map_mut(&file) }.map_err(io("map", path))?;
    check_file(&map, header, len, path)?;
    Ok(map)
}

fn check_file(bytes: &[u8], header: &Header, len: u64, path: &Path) -> Result<()> {
    if bytes.len() as u64 != len {
        return Err(corrupt(path, format!("it has {} bytes instead of {len}", bytes.len())));
    }
    if Header::decode(bytes, header.magic, path)? != *header {
        return Err(corrupt(path, "its header is that of another slab"));
    }
    Ok(())
}
