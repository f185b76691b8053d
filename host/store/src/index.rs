//! The index: a memory-mapped hash table from exact 64-bit id to row number. A table never changes:
//! a checkpoint that needs another one builds it beside the old and renames it into place. It is
//! derived from the rows and can be rebuilt from them. Ids younger than the table are not here but
//! in the view.
//!
//! A bucket is one cache line: five ids, their five row numbers, how many there are and a checksum.
//! An id lies in its home bucket or, where that was full, in one of the next, so a lookup costs one
//! cache miss, compares five ids without a branch, and an id is found only if all its 64 bits
//! match. After the buckets come the numbers of the rows that belonged to no id when the table was
//! built.

use std::path::{Path, PathBuf};

use hypercast_core::{atomic_file, hash::mix64};
use memmap2::MmapMut;

use crate::Error;
use crate::error::{Damage, REBUILD, Result, io};
use crate::fault_guard::{self, FaultGuard, MappingAccess};
use crate::header::{self, FileHeader, create_zeroed};
use crate::mapped_file::MappedFile;
use crate::memory::Residency;

const MAGIC: [u8; 8] = *b"HCINDEX\0";
const SLOTS: usize = 5;
/// Ids that a bucket holds on average in a fresh table.
const LOAD: usize = 3;
/// The length of a bucket that was full when one more id came.
const OVERFLOWN: u32 = SLOTS as u32 + 1;
/// Marks a cell without a row.
pub(crate) const NONE: u32 = u32::MAX;

/// One cache line of the table.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct IndexBucket {
    ids: [u64; SLOTS],
    rows: [u32; SLOTS],
    /// The length in the upper 8 bits, the lower 24 of a CRC-32 in the others.
    seal: u32,
}

const _: () = assert!(size_of::<IndexBucket>() == 64 && header::SIZE == 64);

impl IndexBucket {
    #[inline]
    fn len(&self) -> u32 {
        self.seal >> 24
    }

    /// Whether an id whose home it is may lie in one of the next.
    #[inline(always)]
    pub fn is_overflown(&self) -> bool {
        self.len() == OVERFLOWN
    }

    /// The row number of `id`, or `NONE`.
    #[inline(always)]
    pub fn find(&self, id: u64) -> u32 {
        let mut matches = 0u32;
        for (at, &other) in self.ids.iter().enumerate() {
            matches |= u32::from(other == id) << at;
        }
        matches &= (1 << self.len().min(SLOTS as u32)) - 1;
        if matches == 0 { NONE } else { self.rows[matches.trailing_zeros() as usize] }
    }

    fn checksum(&self) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        for (id, row) in self.ids.iter().zip(&self.rows) {
            crc.update(&id.to_le_bytes());
            crc.update(&row.to_le_bytes());
        }
        crc.update(&self.len().to_le_bytes());
        crc.finalize() & 0x00ff_ffff
    }
}

/// The table, mapped for reading.
#[derive(Debug)]
pub(crate) struct Index {
    pub file: MappedFile,
    header: FileHeader,
    buckets: usize,
    /// Row numbers below this are in the table, or in its list of free rows.
    pub rows: usize,
    /// Ids in the table.
    pub ids: usize,
    /// Rows that belonged to no id when it was built.
    pub free: Vec<u32>,
    pub residency: Residency,
}

impl Index {
    /// Whether `dir` has an index.
    pub fn exists(dir: &Path) -> bool {
        path(dir).exists()
    }

    /// Maps `dir`'s index and checks its header, its size and its list of free rows.
    pub fn open(dir: &Path) -> Result<Index> {
        // SAFETY: a table is never changed once it has its name.
        let file = unsafe { MappedFile::open(path(dir), |path| damaged(path, "it is missing")) }?;
        let residency = Residency::of(file.len() as u64);
        file.advise(residency);
        let header = header_of(&file)?;
        let [buckets, rows, ids, free, free_crc, _] = header.fields;
        let wanted = (header::SIZE as u64)
            .checked_add(buckets.saturating_mul(64))
            .and_then(|len| len.checked_add(free.saturating_mul(4)));
        if wanted != Some(file.len() as u64) || buckets == 0 || ids.checked_add(free) != Some(rows)
        {
            return Err(damaged(file.path(), format!("{} bytes are not its length", file.len())));
        }
        let tail = &file[file.len() - free as usize * 4..];
        if u64::from(crc32fast::hash(tail)) != free_crc {
            return Err(damaged(file.path(), "the checksum of its free rows does not match"));
        }
        let free = tail.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let (buckets, rows, ids) = (buckets as usize, rows as usize, ids as usize);
        Ok(Index { file, header, buckets, rows, ids, free, residency })
    }

    /// The table, for many lookups: [`home`], then the bucket's own `find`, then [`find_after`].
    #[inline]
    pub fn table(&self) -> &[IndexBucket] {
        table(&self.file, self.buckets)
    }

    /// The row number of `id`, or `NONE`.
    #[inline]
    pub fn find(&self, id: u64) -> u32 {
        let table = self.table();
        let home = home(id, table.len());
        let row = table[home].find(id);
        if row != NONE || !table[home].is_overflown() { row } else { find_after(table, home, id) }
    }

    /// Fails at the first damage, and where the file is another index by now.
    pub fn verify(&self) -> Result<()> {
        if header_of(&self.file)? != self.header {
            return Err(damaged(self.file.path(), "its header is that of another index"));
        }
        let mut first = None;
        self.damages(&mut |damage| {
            first.get_or_insert(damage);
        });
        first.map_or(Ok(()), |damage| Err(damage.into()))
    }

    /// Reports every bucket that is not as written, and ids that are too few or too many.
    pub fn damages(&self, report: &mut dyn FnMut(Damage)) {
        let damage = |what: String| Damage::of_file(self.file.path(), what, REBUILD);
        let mut seen = vec![0u64; self.rows.div_ceil(64)];
        let mut distinct = 0;
        for (at, bucket) in self.table().iter().enumerate() {
            let (expected, found) = (bucket.seal & 0x00ff_ffff, bucket.checksum());
            let len = bucket.len().min(SLOTS as u32) as usize;
            if expected != found {
                let what = format!("the checksum of its bucket {at} does not match");
                let checksums = Some((expected, found));
                report(Damage { id: Some(bucket.ids[0]), checksums, ..damage(what) });
                continue;
            }
            for (&row, &id) in bucket.rows[..len].iter().zip(&bucket.ids) {
                match seen.get_mut(row as usize / 64) {
                    Some(word) if (row as usize) < self.rows => {
                        distinct += usize::from(*word >> (row % 64) & 1 == 0);
                        *word |= 1 << (row % 64);
                    }
                    _ => {
                        let what = format!("its bucket {at} names a row that is not there");
                        report(Damage { row: Some(row.into()), id: Some(id), ..damage(what) });
                    }
                }
            }
        }
        if distinct != self.ids {
            report(damage(format!("it has {distinct} of {} ids", self.ids)));
        }
    }
}

/// Builds a table and makes it `dir`'s index. `ids` are the ids with their row numbers, and `free`
/// are the rows without an id in rising order; together they cover `rows`. `check` fails if
/// what they are read from was cut, whose ids would be zeros; the old index then stays.
pub(crate) fn build(
    dir: &Path,
    rows: usize,
    ids: impl Iterator<Item = (u64, u32)>,
    free: &[u32],
    check: impl Fn() -> Result<()>,
) -> Result<()> {
    let count = rows - free.len();
    let buckets = (count / LOAD + 1).max(64);
    let tail: Vec<u8> = free.iter().flat_map(|row| row.to_le_bytes()).collect();
    let free_crc = u64::from(crc32fast::hash(&tail));
    let fields = [buckets as u64, rows as u64, count as u64, free.len() as u64, free_crc, 0];
    let partial = dir.join("index.table.partial");
    let len = header::SIZE + buckets * 64 + tail.len();
    let file = create_zeroed(&partial, &FileHeader { magic: MAGIC, fields }, len as u64)?;
    // SAFETY: the file was made just now under a name that nobody else opens.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(io("map", &partial))?;
    // SAFETY: the mapping was made just now, and the guard, which comes later, is dropped earlier.
    let guard = unsafe { FaultGuard::over(map.as_ptr(), map.len(), MappingAccess::ReadWrite) };
    let guard = guard.map_err(io("guard the mapping of", &partial))?;
    let at = map.len() - tail.len();
    map[at..].copy_from_slice(&tail);
    let table = table_mut(&mut map, buckets);
    let (mut inserted, mut losses) = (0, fault_guard::losses());
    for (id, row) in ids {
        // At once: many equal ids would take ever longer.
        if fault_guard::losses() != losses {
            check()?;
            losses = fault_guard::losses();
        }
        insert(table, id, row);
        inserted += 1;
    }
    check()?;
    assert_eq!(inserted, count, "an id for each row that is not free");
    for bucket in table {
        bucket.seal |= bucket.checksum();
    }
    map.flush().map_err(io("sync", &partial))?;
    if guard.losses() > 0 {
        let what = "it was cut off, or the disk became full, while it was written".into();
        return Err(Error::FileLost { path: partial, what });
    }
    let path = path(dir);
    atomic_file::rename(&partial, &path).map_err(io("rename to", &path))
}

fn insert(table: &mut [IndexBucket], id: u64, row: u32) {
    let mut at = home(id, table.len());
    loop {
        let bucket = &mut table[at];
        let len = bucket.len() as usize;
        if len < SLOTS {
            bucket.ids[len] = id;
            bucket.rows[len] = row;
            bucket.seal += 1 << 24;
            return;
        }
        bucket.seal = OVERFLOWN << 24;
        at = (at + 1) % table.len();
    }
}

/// Where in a table of so many buckets an id's search begins.
#[inline(always)]
pub(crate) fn home(id: u64, buckets: usize) -> usize {
    ((u128::from(mix64(id)) * buckets as u128) >> 64) as usize
}

/// The row number of `id`, which is not in its home bucket although that is overflown, or `NONE`.
#[cold]
#[inline(never)]
pub(crate) fn find_after(table: &[IndexBucket], home: usize, id: u64) -> u32 {
    let (before, from) = table.split_at(home);
    for bucket in from[1..].iter().chain(before) {
        let row = bucket.find(id);
        if row != NONE || !bucket.is_overflown() {
            return row;
        }
    }
    NONE
}

#[inline]
fn table(bytes: &[u8], buckets: usize) -> &[IndexBucket] {
    let bytes = &bytes[header::SIZE..header::SIZE + buckets * size_of::<IndexBucket>()];
    // SAFETY: a mapping begins at a page, so the buckets behind the 64-byte header are aligned; any
    // bytes make a bucket, and the length was just taken from the slice.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), buckets) }
}

fn table_mut(bytes: &mut [u8], buckets: usize) -> &mut [IndexBucket] {
    let bytes = &mut bytes[header::SIZE..header::SIZE + buckets * size_of::<IndexBucket>()];
    // SAFETY: as in `table`; and the slice is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), buckets) }
}

fn header_of(file: &MappedFile) -> Result<FileHeader> {
    FileHeader::decode(file, MAGIC, file.path()).map_err(|error| match error {
        Error::Corrupt(damage) => Damage { remedy: REBUILD, ..*damage }.into(),
        other => other,
    })
}

fn damaged(path: &Path, what: impl Into<String>) -> Error {
    Damage::of_file(path, what, REBUILD).into()
}

fn path(dir: &Path) -> PathBuf {
    dir.join("index.table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_found_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let ids = [0, 1, u64::MAX, 1 << 63, 42, 42 + (1 << 32)];
        let with_rows = ids.iter().copied().zip([7, 1, 2, 3, 4, 6]);
        build(dir.path(), 8, with_rows.clone(), &[0, 5], || Ok(())).unwrap();
        let index = Index::open(dir.path()).unwrap();
        for (id, row) in with_rows {
            assert_eq!(index.find(id), row);
        }
        for id in 2..42 {
            assert_eq!(index.find(id), NONE);
        }
        assert_eq!((&index.free[..], index.rows, index.ids), (&[0, 5][..], 8, 6));
        index.verify().unwrap();
    }

    #[test]
    fn overfull_buckets_still_tell_ids_apart() {
        let dir = tempfile::tempdir().unwrap();
        let rows = 50_000;
        let ids = (0..rows as u64).map(|row| (row * 7, row as u32));
        build(dir.path(), rows, ids, &[], || Ok(())).unwrap();
        let index = Index::open(dir.path()).unwrap();
        index.verify().unwrap();
        assert!(index.table().iter().any(|bucket| bucket.len() == OVERFLOWN));
        for id in 0..rows as u64 * 7 {
            let row = if id % 7 == 0 { (id / 7) as u32 } else { NONE };
            assert_eq!(index.find(id), row);
        }
    }
}
