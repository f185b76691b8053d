//! The index: a memory-mapped hash table from exact 64-bit id to row number. It is
//! derived from the rows' ids and can be rebuilt from them. It does not delete.
//!
//! Open addressing with linear probing; a 16-byte entry is id, row number and a
//! checksum of both that is never 0, so an entry of zeros is empty and every id,
//! 0 too, can be held. Entries never move within a table, so a
//! half-finished run of insertions disturbs no older entry.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};

use crate::Error;
use crate::error::{REBUILD, Result, io};
use crate::header::{self, Header, create_zeroed, mix, u32_at, u64_at};

const MAGIC: [u8; 8] = *b"HCINDEX\0";
const ENTRY: usize = 16;

/// The table, mapped for reading.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    map: Mmap,
    mask: usize,
}

/// The table, mapped for insertion.
#[derive(Debug)]
pub(crate) struct IndexWriter {
    path: PathBuf,
    map: MmapMut,
    mask: usize,
}

impl Index {
    /// Whether `dir` has an index.
    pub fn exists(dir: &Path) -> bool {
        path(dir).exists()
    }

    /// Maps `dir`'s index and checks its size and header.
    pub fn open(dir: &Path) -> Result<Index> {
        let path = path(dir);
        let file = File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let what = "it is missing".to_owned();
                Error::Corrupt { path: path.clone(), what, remedy: REBUILD }
            }
            _ => io("open", &path)(error),
        })?;
        // SAFETY: like a slab, the table changes only in a checkpoint, while no
        // reader has it mapped and the writer's own view is borrowed mutably.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", &path))?;
        let mask = check_header(&map, &path)?;
        Ok(Index { path, map, mask })
    }

    /// The row number of `id`.
    #[inline]
    pub fn find(&self, id: u64) -> Option<u32> {
        match probe(&self.map[header::SIZE..], self.mask, id) {
            Probe::Found(row) => Some(row),
            Probe::Empty(_) => None,
        }
    }

    /// How many rows fit before the table must grow.
    pub fn room(&self) -> usize {
        room(self.mask + 1)
    }

    /// Checks every entry: rows `[0, base_rows)` are all there, and none is past `rows`.
    pub fn verify(&self, extent: Extent) -> Result<()> {
        let Extent { base_rows, rows } = extent;
        let damaged =
            |what: String| Err(Error::Corrupt { path: self.path.clone(), what, remedy: REBUILD });
        let mut seen = vec![0u64; base_rows.div_ceil(64)];
        let mut distinct = 0;
        let mut empty = 0;
        for (at, entry) in self.map[header::SIZE..].as_chunks::<ENTRY>().0.iter().enumerate() {
            if *entry == [0; ENTRY] {
                empty += 1;
                continue;
            }
            let (id, row) = (u64_at(entry, 0), u32_at(entry, 8));
            if u32_at(entry, 12) != checksum(id, row) || row as usize >= rows {
                return damaged(format!("the checksum of its entry {at} does not match"));
            }
            if let Some(word) = seen.get_mut(row as usize / 64)
                && (row as usize) < base_rows
            {
                distinct += usize::from(*word >> (row % 64) & 1 == 0);
                *word |= 1 << (row % 64);
            }
        }
        if distinct != base_rows || empty == 0 {
            return damaged(format!("it has {distinct} of {base_rows} ids, {empty} entries free"));
        }
        Ok(())
    }
}

/// How much of a store the index must cover, and may cover.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Rows in the slabs.
    pub base_rows: usize,
    /// Committed rows, those only in the journal included.
    pub rows: usize,
}

impl IndexWriter {
    /// Maps `dir`'s index for insertion.
    pub fn open(dir: &Path) -> Result<IndexWriter> {
        let path = path(dir);
        let file =
            OpenOptions::new().read(true).write(true).open(&path).map_err(io("open", &path))?;
        Self::map(path, &file)
    }

    /// Makes a table of the ids of rows 0, 1, ..., `rows` in number, and the directory's index of it.
    pub fn build(dir: &Path, rows: usize, ids: impl Iterator<Item = u64>) -> Result<()> {
        let mut index = Self::create(dir, rows)?;
        for (row, id) in ids.enumerate() {
            index.insert(id, row as u32);
        }
        index.finish(dir)
    }

    /// Begins an empty table that holds `rows` rows and twice that before it must
    /// grow. It takes the old one's place in [`IndexWriter::finish`].
    fn create(dir: &Path, rows: usize) -> Result<IndexWriter> {
        let mut capacity = 1024;
        while room(capacity) < rows * 2 {
            capacity *= 2;
        }
        let path = dir.join("index.table.partial");
        let fields = [capacity as u64, 0, 0, 0, 0, 0];
        let len = (header::SIZE + capacity * ENTRY) as u64;
        let file = create_zeroed(&path, &Header { magic: MAGIC, fields }, len)?;
        Self::map(path, &file)
    }

    /// Adds `id`; an id that is there stays as it is.
    pub fn insert(&mut self, id: u64, row: u32) {
        let entries = &mut self.map[header::SIZE..];
        if let Probe::Empty(at) = probe(entries, self.mask, id) {
            let entry = &mut entries[at * ENTRY..(at + 1) * ENTRY];
            entry[..8].copy_from_slice(&id.to_le_bytes());
            entry[8..12].copy_from_slice(&row.to_le_bytes());
            entry[12..].copy_from_slice(&checksum(id, row).to_le_bytes());
        }
    }

    /// Makes all insertions durable, and the table the directory's index.
    pub fn finish(self, dir: &Path) -> Result<()> {
        self.map.flush().map_err(io("sync", &self.path))?;
        let path = path(dir);
        if self.path != path {
            fs::rename(&self.path, &path).map_err(io("rename to", &path))?;
        }
        Ok(())
    }

    fn map(path: PathBuf, file: &File) -> Result<IndexWriter> {
        // SAFETY: the caller holds the writer lock and the exclusive readers
        // lock, or made the file just now; no slice of another mapping lives.
        let map = unsafe { MmapMut::map_mut(file) }.map_err(io("map", &path))?;
        let mask = check_header(&map, &path)?;
        Ok(IndexWriter { path, map, mask })
    }
}

enum Probe {
    Found(u32),
    Empty(usize),
}

/// Walks from `id`'s place to the id itself or to the first empty entry. There
/// is one: insertions stop at `room`, and `verify` sees that it is so.
#[inline]
fn probe(entries: &[u8], mask: usize, id: u64) -> Probe {
    let entries = entries.as_chunks::<ENTRY>().0;
    let mut at = mix(id) as usize & mask;
    loop {
        let entry = &entries[at];
        if u32_at(entry, 12) == 0 {
            return Probe::Empty(at);
        }
        if u64_at(entry, 0) == id {
            return Probe::Found(u32_at(entry, 8));
        }
        at = (at + 1) & mask;
    }
}

fn checksum(id: u64, row: u32) -> u32 {
    let row = u64::from(row).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mix(id ^ row) >> 32) as u32 | 1
}

fn room(capacity: usize) -> usize {
    capacity / 8 * 5
}

fn path(dir: &Path) -> PathBuf {
    dir.join("index.table")
}

fn check_header(bytes: &[u8], path: &Path) -> Result<usize> {
    let damaged = |what: String| Error::Corrupt { path: path.to_owned(), what, remedy: REBUILD };
    let header = Header::decode(bytes, MAGIC, path).map_err(|error| match error {
        Error::Corrupt { what, .. } => damaged(what),
        other => other,
    })?;
    let capacity = header.fields[0] as usize;
    if !capacity.is_power_of_two()
        || capacity.checked_mul(ENTRY).and_then(|n| n.checked_add(header::SIZE))
            != Some(bytes.len())
    {
        return Err(damaged(format!("{} bytes do not hold {capacity} entries", bytes.len())));
    }
    Ok(capacity - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_found_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let ids = [0, 1, u64::MAX, 1 << 63, 42, 42 + (1 << 32)];
        let mut writer = IndexWriter::create(dir.path(), ids.len()).unwrap();
        for (row, &id) in ids.iter().enumerate() {
            writer.insert(id, row as u32);
            writer.insert(id, 999);
        }
        writer.finish(dir.path()).unwrap();
        let index = Index::open(dir.path()).unwrap();
        for (row, &id) in ids.iter().enumerate() {
            assert_eq!(index.find(id), Some(row as u32));
        }
        for id in 2..42 {
            assert_eq!(index.find(id), None);
        }
        let extent = Extent { base_rows: ids.len(), rows: ids.len() };
        index.verify(extent).unwrap();
        index.verify(Extent { base_rows: 7, rows: 7 }).unwrap_err();
        index.verify(Extent { base_rows: 5, rows: 5 }).unwrap_err();
    }

    #[test]
    fn a_full_table_still_tells_ids_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = IndexWriter::create(dir.path(), 0).unwrap();
        let rows = room(1024);
        for row in 0..rows {
            writer.insert(row as u64 * 7, row as u32);
        }
        writer.finish(dir.path()).unwrap();
        let index = Index::open(dir.path()).unwrap();
        assert_eq!(index.room(), rows);
        for id in 0..rows as u64 * 7 {
            assert_eq!(index.find(id), (id % 7 == 0).then_some((id / 7) as u32));
        }
    }
}
