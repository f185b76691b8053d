//! Writes slabs, for checkpoints and snapshots. It decides nothing: its caller holds the locks and
//! says which rows. Readers have these files mapped; which of their rows they look at meanwhile is
//! the caller's to know.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Result, corrupt, io};
use crate::header::{self, FileHeader};
use crate::overlay::RowState;
use crate::slab::{
    ROWS_PER_SLAB, RowSlab, STATE, SlabId, SlabOffsets, StateSlab, row_checksum, row_number,
    state_checksum,
};

/// A rows slab that a checkpoint writes.
#[derive(Debug)]
pub(crate) struct RowSlabWriter {
    id: SlabId,
    bytes: Vec<u8>,
    pub target: SlabFile,
}

/// A state slab that a checkpoint writes.
#[derive(Debug)]
pub(crate) struct StateSlabWriter {
    id: SlabId,
    pub target: SlabFile,
}

/// How a slab is to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Writing {
    /// Made anew, whatever was there.
    pub fresh: bool,
    /// How many of its rows will be set, about.
    pub rows: usize,
}

impl RowSlabWriter {
    /// Opens or makes a slab for writing.
    pub fn open(dir: &Path, id: SlabId, writing: Writing) -> Result<Self> {
        let (path, header) = (RowSlab::path(dir, id), RowSlab::header(id));
        let target = SlabFile::open(path, &header, RowSlab::file_len(id), writing)?;
        Ok(RowSlabWriter { id, bytes: vec![0; id.shape.stride()], target })
    }

    /// Sets one row; `at` counts within the slab.
    pub fn set(&mut self, at: usize, id: u64, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.id.shape.dim);
        self.id.shape.format.encode(values, &mut self.bytes);
        self.put(at, id, 0)
    }

    /// Marks a row as one that belongs to no id.
    pub fn set_free(&mut self, at: usize) -> Result<()> {
        self.bytes.fill(0);
        self.put(at, 0, u32::MAX)
    }

    fn put(&mut self, at: usize, id: u64, invert: u32) -> Result<()> {
        let SlabOffsets { values, ids, checks } = SlabOffsets::of(self.id);
        let check = row_checksum(row_number(self.id, at), id, &self.bytes) ^ invert;
        self.target.put(values + at * self.bytes.len(), &self.bytes)?;
        self.target.put(ids + at * 8, &id.to_le_bytes())?;
        self.target.put(checks + at * 4, &check.to_le_bytes())
    }
}

impl StateSlabWriter {
    /// Opens or makes a slab for writing.
    pub fn open(dir: &Path, id: SlabId, writing: Writing) -> Result<Self> {
        let (path, header) = (StateSlab::path(dir, id), StateSlab::header(id));
        Ok(StateSlabWriter {
            id,
            target: SlabFile::open(path, &header, StateSlab::FILE_LEN, writing)?,
        })
    }

    /// Sets one row's state; `at` counts within the slab.
    pub fn set(&mut self, at: usize, state: RowState) -> Result<()> {
        let mut item = [0; STATE];
        item[..4].copy_from_slice(&state.accumulator.to_le_bytes());
        item[4..8].copy_from_slice(&state.generation.to_le_bytes());
        item[8..12].copy_from_slice(&state.clock.to_le_bytes());
        let check = state_checksum(row_number(self.id, at), &item[..12]);
        item[12..].copy_from_slice(&check.to_le_bytes());
        self.target.put(header::SIZE + at * STATE, &item)
    }
}

/// A file that is written here and there, or as a whole where much of it changes. It is written and
/// not mapped: a mapping would dirty a page of the cache, which may be a large one, for each row.
#[derive(Debug)]
pub(crate) struct SlabFile {
    path: PathBuf,
    file: File,
    /// All of it.
    whole: Option<Vec<u8>>,
}

impl SlabFile {
    /// Slabs of which at least this part changes are written as a whole.
    const PART: usize = 16;

    fn open(path: PathBuf, header: &FileHeader, len: u64, writing: Writing) -> Result<SlabFile> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if writing.fresh {
            options.create(true).truncate(true);
        }
        let file = options.open(&path).map_err(io("open", &path))?;
        let found = file.metadata().map_err(io("read", &path))?.len();
        if !writing.fresh && found != len {
            return Err(corrupt(&path, format!("it has {found} bytes instead of {len}")));
        }
        let is_whole = writing.fresh || writing.rows >= ROWS_PER_SLAB / Self::PART;
        let mut whole = is_whole.then(|| vec![0; len as usize]);
        match &mut whole {
            Some(whole) if writing.fresh => {
                whole[..header::SIZE].copy_from_slice(&header.encode());
            }
            Some(whole) => file.read_exact_at(whole, 0).map_err(io("read", &path))?,
            None => {}
        }
        Ok(SlabFile { path, file, whole })
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        match &mut self.whole {
            Some(whole) => whole[at..at + bytes.len()].copy_from_slice(bytes),
            None => self.file.write_all_at(bytes, at as u64).map_err(io("write", &self.path))?,
        }
        Ok(())
    }

    /// Makes all changes durable.
    pub fn sync(self) -> Result<()> {
        if let Some(whole) = &self.whole {
            // Rows that are not set are written as they are, so that a reader of them sees no
            // change.
            self.file.write_all_at(whole, 0).map_err(io("write", &self.path))?;
        }
        self.file.sync_all().map_err(io("sync", &self.path))
    }
}
