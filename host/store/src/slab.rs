//! Slabs: fixed-size files that hold 65536 rows' values, or their optimizer state, each item with
//! its checksum. A slab knows nothing of generations: whether an item counts is for the journal to
//! say. Here they are mapped and read; `slab_writer` writes them.
//!
//! A rows slab is a 64-byte header, 65536 rows of values, 65536 u64 ids, and 65536 u32 checksums
//! (CRC-32 of row number, id and values, inverted where the row is free). A state slab is a header
//! and 65536 items of f32 accumulator, u32 generation of the last change, u32 clock of the last
//! touch, u32 checksum.

use std::path::{Path, PathBuf};

use crate::RowFormat;
use crate::error::{Damage, RESTORE, Result, corrupt};
use crate::header::{self, FileHeader, u32_at, u64_at};
use crate::mapped_file::MappedFile;
use crate::overlay::RowState;

/// The number of rows in one slab.
pub(crate) const ROWS_PER_SLAB: usize = 1 << 16;
/// Bytes of a row's state.
pub(crate) const STATE: usize = 16;

/// How many slabs hold `rows` rows.
pub(crate) fn slabs_for(rows: usize) -> usize {
    rows.div_ceil(ROWS_PER_SLAB)
}

/// What the rows of a store are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowShape {
    pub dim: usize,
    pub format: RowFormat,
}

impl RowShape {
    /// Bytes from one row's values to the next's.
    #[inline]
    pub fn stride(self) -> usize {
        self.format.row_bytes(self.dim)
    }
}

/// Which slab it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlabId {
    pub number: usize,
    pub shape: RowShape,
}

/// Where the parts of a rows slab begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlabOffsets {
    pub values: usize,
    pub ids: usize,
    pub checks: usize,
}

impl SlabOffsets {
    /// Those of a slab.
    pub fn of(id: SlabId) -> SlabOffsets {
        let ids = header::SIZE + ROWS_PER_SLAB * id.shape.stride();
        SlabOffsets { values: header::SIZE, ids, checks: ids + ROWS_PER_SLAB * 8 }
    }
}

/// Values, ids and checksums of 65536 rows.
#[derive(Debug)]
pub(crate) struct RowSlab {
    id: SlabId,
    pub file: MappedFile,
}

/// Adagrad accumulators of 65536 rows, and when they were changed and touched.
#[derive(Debug)]
pub(crate) struct StateSlab {
    id: SlabId,
    pub file: MappedFile,
}

impl RowSlab {
    /// Maps a slab that must exist.
    pub fn open(dir: &Path, id: SlabId) -> Result<Self> {
        let file = map(Self::path(dir, id), Self::file_len(id))?;
        check_header(&file, &Self::header(id))?;
        Ok(RowSlab { id, file })
    }

    /// Fails if the header, or one of the rows for which `counts` says that they are read here, is
    /// not as it was written. It is told row numbers of the store.
    pub fn verify(&self, rows: usize, counts: &dyn Fn(u32) -> bool) -> Result<()> {
        check_header(&self.file, &Self::header(self.id))?;
        let first = self.id.number * ROWS_PER_SLAB;
        for row in (first..rows.min(first + ROWS_PER_SLAB)).filter(|&row| counts(row as u32)) {
            self.is_free(row - first)?;
        }
        Ok(())
    }

    /// Where the values of row 0 begin; row `n` follows `n` strides later.
    pub fn start(&self) -> *const u8 {
        self.file.as_ptr().wrapping_add(header::SIZE)
    }

    pub fn path(dir: &Path, id: SlabId) -> PathBuf {
        dir.join(format!("rows-{:05}.slab", id.number))
    }

    pub fn header(id: SlabId) -> FileHeader {
        let RowShape { dim, format } = id.shape;
        let fields = [id.number as u64, dim as u64, ROWS_PER_SLAB as u64, format as u64, 0, 0];
        FileHeader { magic: *b"HCROWS\0\0", fields }
    }

    /// Bytes of a slab's file.
    pub fn file_len(id: SlabId) -> u64 {
        (header::SIZE + ROWS_PER_SLAB * (id.shape.stride() + 8 + 4)) as u64
    }

    /// A row's values as they are kept.
    fn bytes(&self, at: usize) -> &[u8] {
        let stride = self.id.shape.stride();
        &self.file[SlabOffsets::of(self.id).values + at * stride..][..stride]
    }

    /// Widens a row's values into `out`.
    pub fn read(&self, at: usize, out: &mut [f32]) {
        self.id.shape.format.decode(self.bytes(at), out);
    }

    /// The id in row `row` of this slab.
    pub fn id(&self, at: usize) -> u64 {
        u64_at(&self.file, SlabOffsets::of(self.id).ids + at * 8)
    }

    /// Whether a row belongs to no id. Fails if it is not what was written.
    pub fn is_free(&self, at: usize) -> std::result::Result<bool, Damage> {
        let (row, id) = (row_number(self.id, at), self.id(at));
        let expected = u32_at(&self.file, SlabOffsets::of(self.id).checks + at * 4);
        let found = row_checksum(row, id, self.bytes(at));
        match expected ^ found {
            0 => Ok(false),
            u32::MAX => Ok(true),
            _ => {
                let what = "the checksum of a row does not match";
                let damage = Damage::of_file(self.file.path(), what, RESTORE);
                let checksums = Some((expected, found));
                Err(Damage { row: Some(row), id: Some(id), checksums, ..damage })
            }
        }
    }
}

impl StateSlab {
    pub const FILE_LEN: u64 = (header::SIZE + ROWS_PER_SLAB * STATE) as u64;

    /// Maps a slab that must exist.
    pub fn open(dir: &Path, id: SlabId) -> Result<Self> {
        let file = map(Self::path(dir, id), Self::FILE_LEN)?;
        check_header(&file, &Self::header(id))?;
        Ok(StateSlab { id, file })
    }

    pub fn path(dir: &Path, id: SlabId) -> PathBuf {
        dir.join(format!("state-{:05}.slab", id.number))
    }

    pub fn header(id: SlabId) -> FileHeader {
        let fields = [id.number as u64, id.shape.dim as u64, ROWS_PER_SLAB as u64, 0, 0, 0];
        FileHeader { magic: *b"HCSTATE\0", fields }
    }

    /// The optimizer state of row `row` of this slab.
    pub fn state(&self, at: usize) -> RowState {
        let start = header::SIZE + at * STATE;
        RowState {
            accumulator: f32::from_bits(u32_at(&self.file, start)),
            generation: u32_at(&self.file, start + 4),
            clock: u32_at(&self.file, start + 8),
        }
    }

    /// Fails if a row's state is not what was written.
    pub fn verify(&self, at: usize) -> std::result::Result<(), Damage> {
        let (row, start) = (row_number(self.id, at), header::SIZE + at * STATE);
        let expected = u32_at(&self.file, start + STATE - 4);
        let found = state_checksum(row, &self.file[start..start + STATE - 4]);
        if expected == found {
            return Ok(());
        }
        let what = "the checksum of a row's optimizer state does not match";
        let damage = Damage::of_file(self.file.path(), what, RESTORE);
        Err(Damage { row: Some(row), checksums: Some((expected, found)), ..damage })
    }
}

pub(crate) fn row_checksum(row: u64, id: u64, bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&row.to_le_bytes());
    crc.update(&id.to_le_bytes());
    crc.update(bytes);
    crc.finalize()
}

pub(crate) fn state_checksum(row: u64, bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&row.to_le_bytes());
    crc.update(bytes);
    crc.finalize()
}

pub(crate) fn row_number(id: SlabId, at: usize) -> u64 {
    (id.number * ROWS_PER_SLAB + at) as u64
}

fn map(path: PathBuf, len: u64) -> Result<MappedFile> {
    // A checkpoint changes rows of it while it is mapped, but never one that is read here
    // meanwhile: other processes' readers have left (`ReadersLock`), and those of this one have
    // these rows above the slab (`live`). SAFETY: so no byte that a slice covers changes.
    let file = unsafe { MappedFile::open(path, |path| corrupt(path, "it is missing")) }?;
    if file.len() as u64 != len {
        return Err(corrupt(file.path(), format!("it has {} bytes instead of {len}", file.len())));
    }
    Ok(file)
}

fn check_header(file: &MappedFile, header: &FileHeader) -> Result<()> {
    match FileHeader::decode(file, header.magic, file.path())? == *header {
        true => Ok(()),
        false => Err(corrupt(file.path(), "its header is that of another slab")),
    }
}
