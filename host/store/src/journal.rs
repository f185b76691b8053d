//! The redo journal: the rows of each commit since the last checkpoint, behind one
//! head that says which bytes count. It does not decide when to checkpoint.
//!
//! The head is 64 bytes at offset 0. Records begin at 4096; one is a magic word, the number of
//! rows, the generation, the numbers of removed rows and of counters, the sightings counted so far,
//! then the rows (id, row number, accumulator, clock, values), the removed rows' ids and numbers,
//! the changed counters of the admission sketch, and a CRC-32 of all that. Bytes past the head's
//! `end` mean nothing.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::RowFormat;
use crate::error::{Result, corrupt, io};
use crate::header::{self, FileHeader, create_zeroed, u32_at, u64_at};
use crate::overlay::{Entry, Overlay, RowState};
use crate::sketch::Sketch;

const MAGIC: [u8; 8] = *b"HCJRNL\0\0";
const RECORD_MAGIC: u32 = 0x4443_4552;
/// Where records begin: past the head's sector and page.
const START: u64 = 4096;
const RECORD_HEAD: u64 = 32;
const ENTRY_HEAD: usize = 20;
const REMOVED: u64 = 12;
const CELL: u64 = 8;
/// In the place of a number of counters: all of them follow, a byte each.
const ALL_CELLS: u32 = u32::MAX;
const CRC: u64 = 4;

/// The state of a store that is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalHead {
    /// The last committed generation; 0 is the empty store.
    pub generation: u64,
    /// Rows at that generation.
    pub rows: usize,
    /// The generation that the slabs hold.
    pub base_generation: u64,
    /// Rows that the slabs hold.
    pub base_rows: usize,
    /// Where the records end.
    end: u64,
}

impl JournalHead {
    /// The head of a store whose slabs hold everything.
    pub fn folded(generation: u64, rows: usize) -> JournalHead {
        JournalHead { generation, rows, base_generation: generation, base_rows: rows, end: START }
    }

    /// Whether the slabs hold everything.
    pub fn is_folded(&self) -> bool {
        self.generation == self.base_generation
    }
}

/// The journal of an open store, whose writer lock is held.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    dim: usize,
    /// The head of the last commit.
    pub head: JournalHead,
}

impl Journal {
    /// Where `dir`'s journal is.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("journal")
    }

    /// Makes an empty journal.
    pub fn create(dir: &Path, dim: usize, head: JournalHead) -> Result<Journal> {
        let path = Self::path(dir);
        let file = create_zeroed(&path, &encode(dim, head), START)?;
        Ok(Journal { file, path, dim, head })
    }

    /// Opens `dir`'s journal for its writer.
    pub fn open(dir: &Path, dim: usize) -> Result<Journal> {
        let path = Self::path(dir);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        Self::with_file(file.map_err(io("open", &path))?, path, dim)
    }

    /// Opens `dir`'s journal for a reader, which must hold the readers lock.
    pub fn open_for_reading(dir: &Path, dim: usize) -> Result<Journal> {
        const TRIES: usize = 20;
        let path = Self::path(dir);
        let mut tries = 0;
        loop {
            let file = File::open(&path).map_err(io("open", &path))?;
            match Self::with_file(file, path.clone(), dim) {
                // A live writer may be overwriting the head at this instant.
                Err(crate::Error::Corrupt(_)) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }

    fn with_file(mut file: File, path: PathBuf, dim: usize) -> Result<Journal> {
        let mut bytes = [0; header::SIZE];
        let len = file.metadata().map_err(io("read", &path))?.len();
        if len < START {
            return Err(corrupt(&path, format!("it is cut off at {len} bytes")));
        }
        file.read_exact(&mut bytes).map_err(io("read", &path))?;
        let [of_dim, generation, rows, base_generation, base_rows, end] =
            FileHeader::decode(&bytes, MAGIC, &path)?.fields;
        if of_dim != dim as u64 {
            return Err(corrupt(&path, format!("it is of dim {of_dim} and the store of {dim}")));
        }
        if len < end {
            return Err(corrupt(&path, format!("it is cut off at {len} of {end} bytes")));
        }
        let (rows, base_rows) = (rows as usize, base_rows as usize);
        let head = JournalHead { generation, rows, base_generation, base_rows, end };
        Ok(Journal { file, path, dim, head })
    }

    /// Bytes from the start of the file to the end of the last commit.
    pub fn bytes(&self) -> u64 {
        self.head.end
    }

    /// Appends the dirty rows of `overlay` and commits them; gives the new generation.
    /// `rows` are the row numbers in use, free ones included; `sketch` counts ids that have no row
    /// yet.
    pub fn commit(
        &mut self,
        overlay: &Overlay,
        rows: usize,
        sketch: Option<&Sketch>,
    ) -> Result<u64> {
        let generation = self.head.generation + 1;
        let end = self.append(overlay, sketch, generation).map_err(io("append to", &self.path))?;
        self.set_head(JournalHead { generation, rows, end, ..self.head })?;
        Ok(generation)
    }

    /// Notes that the slabs hold everything, which empties the journal.
    pub fn reset(&mut self) -> Result<()> {
        self.set_head(JournalHead::folded(self.head.generation, self.head.rows))?;
        self.file.set_len(START).map_err(io("truncate", &self.path))
    }

    fn append(
        &mut self,
        overlay: &Overlay,
        sketch: Option<&Sketch>,
        generation: u64,
    ) -> std::io::Result<u64> {
        self.file.seek(SeekFrom::Start(self.head.end))?;
        let mut out = ChecksummingReader {
            crc: crc32fast::Hasher::new(),
            bytes: 0,
            inner: BufWriter::with_capacity(1 << 20, &self.file),
        };
        let (removed, set): (Vec<usize>, Vec<usize>) =
            overlay.dirty().partition(|&at| overlay.is_removed(at));
        let cells = |s: &Sketch| s.changed.as_ref().map_or(ALL_CELLS, |c| c.len() as u32);
        out.write_all(&RECORD_MAGIC.to_le_bytes())?;
        out.write_all(&(set.len() as u32).to_le_bytes())?;
        out.write_all(&generation.to_le_bytes())?;
        out.write_all(&(removed.len() as u32).to_le_bytes())?;
        out.write_all(&sketch.map_or(0, cells).to_le_bytes())?;
        out.write_all(&sketch.map_or(0, |sketch| sketch.sightings).to_le_bytes())?;
        let mut bytes = vec![0; ENTRY_HEAD + self.dim * 4];
        for at in set {
            encode_entry(&overlay.entry(at), &mut bytes);
            out.write_all(&bytes)?;
        }
        for at in removed {
            let Entry { id, row, .. } = overlay.entry(at);
            out.write_all(&id.to_le_bytes())?;
            out.write_all(&row.to_le_bytes())?;
        }
        if let Some(sketch) = sketch {
            match &sketch.changed {
                None => out.write_all(&sketch.cells)?,
                Some(changed) => {
                    for &cell in changed {
                        out.write_all(&cell.to_le_bytes())?;
                        out.write_all(&u32::from(sketch.cells[cell as usize]).to_le_bytes())?;
                    }
                }
            }
        }
        let crc = out.crc.finalize();
        out.inner.write_all(&crc.to_le_bytes())?;
        out.inner.into_inner().map_err(|e| e.into_error())?.sync_data()?;
        Ok(self.head.end + out.bytes + CRC)
    }

    fn set_head(&mut self, head: JournalHead) -> Result<()> {
        let bytes = encode(self.dim, head).encode();
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&bytes))
            .and_then(|()| self.file.sync_data())
            .map_err(io("write the head of", &self.path))?;
        self.head = head;
        Ok(())
    }

    /// Reads every committed record into an overlay. The sketch, which is that of the last
    /// checkpoint, is brought up to date; readers do without.
    pub fn replay(&mut self, mut sketch: Option<&mut Sketch>) -> Result<Overlay> {
        let mut overlay = Overlay::new(self.dim);
        let JournalHead { generation, rows, base_generation, base_rows, end } = self.head;
        self.file.seek(SeekFrom::Start(START)).map_err(io("read", &self.path))?;
        let inner = BufReader::with_capacity(1 << 20, &self.file);
        let mut input = ChecksummingReader { crc: crc32fast::Hasher::new(), bytes: 0, inner };
        let mut left = end.checked_sub(START).ok_or_else(|| self.damaged("its end"))?;
        for generation in base_generation + 1..=generation {
            left -= self.replay_record(&mut input, &mut overlay, &mut sketch, generation, left)?;
        }
        let new = (base_rows..rows).filter(|&row| overlay.position(row as u32).is_some()).count();
        if left != 0 || rows < base_rows || new != rows - base_rows {
            return Err(self.damaged("the extent of its records"));
        }
        Ok(overlay)
    }

    /// Reads the record of `generation`, of which at most `left` bytes are committed; gives its
    /// length.
    fn replay_record(
        &self,
        input: &mut ChecksummingReader<BufReader<&File>>,
        overlay: &mut Overlay,
        sketch: &mut Option<&mut Sketch>,
        generation: u64,
        left: u64,
    ) -> Result<u64> {
        let at = format!("the record of generation {generation}");
        let failed = |error| io("read", &self.path)(error);
        input.crc = crc32fast::Hasher::new();
        let mut head = [0; RECORD_HEAD as usize];
        input.read_exact(&mut head).map_err(failed)?;
        let mut bytes = vec![0; ENTRY_HEAD + self.dim * 4];
        let (rows, removed, cells) = (u32_at(&head, 4), u32_at(&head, 16), u32_at(&head, 20));
        let sketch_bytes = match cells {
            ALL_CELLS => Sketch::SIZE as u64,
            cells => u64::from(cells) * CELL,
        };
        let entries = u64::from(rows) * bytes.len() as u64 + u64::from(removed) * REMOVED;
        let len = RECORD_HEAD + entries + sketch_bytes + CRC;
        if u32_at(&head, 0) != RECORD_MAGIC || u64_at(&head, 8) != generation || len > left {
            return Err(self.damaged(&at));
        }
        let mut values = vec![0.0; self.dim];
        for _ in 0..rows {
            input.read_exact(&mut bytes).map_err(failed)?;
            let mut entry = decode_entry(&bytes, &mut values);
            entry.state.generation = generation as u32;
            // Checked before the checksum is known, since the overlay grows with it.
            if entry.row as usize >= self.head.rows {
                return Err(self.damaged(&at));
            }
            overlay.put(entry);
        }
        for _ in 0..removed {
            let mut bytes = [0; REMOVED as usize];
            input.read_exact(&mut bytes).map_err(failed)?;
            let (id, row) = (u64_at(&bytes, 0), u32_at(&bytes, 8));
            if row as usize >= self.head.rows {
                return Err(self.damaged(&at));
            }
            overlay.remove(row, id);
        }
        let mut bytes = vec![0; sketch_bytes as usize];
        input.read_exact(&mut bytes).map_err(failed)?;
        let sightings = u64_at(&head, 24);
        if let Some(sketch) = sketch
            && sightings > 0
        {
            sketch.restore(&bytes, cells == ALL_CELLS, sightings);
        }
        let mut crc = [0; CRC as usize];
        let expected = input.crc.clone().finalize();
        input.inner.read_exact(&mut crc).map_err(failed)?;
        if u32::from_le_bytes(crc) != expected {
            return Err(self.damaged(&at));
        }
        Ok(len)
    }

    fn damaged(&self, what: &str) -> crate::Error {
        corrupt(&self.path, format!("the checksum or shape of {what} does not match"))
    }
}

/// Passes bytes through and checksums them.
struct ChecksummingReader<T> {
    crc: crc32fast::Hasher,
    bytes: u64,
    inner: T,
}

impl<W: Write> ChecksummingReader<W> {
    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.crc.update(bytes);
        self.bytes += bytes.len() as u64;
        self.inner.write_all(bytes)
    }
}

impl<R: Read> ChecksummingReader<R> {
    fn read_exact(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_exact(bytes)?;
        self.crc.update(bytes);
        Ok(())
    }
}

fn encode(dim: usize, head: JournalHead) -> FileHeader {
    let JournalHead { generation, rows, base_generation, base_rows, end } = head;
    let fields = [dim as u64, generation, rows as u64, base_generation, base_rows as u64, end];
    FileHeader { magic: MAGIC, fields }
}

fn encode_entry(entry: &Entry<'_>, bytes: &mut [u8]) {
    bytes[..8].copy_from_slice(&entry.id.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.row.to_le_bytes());
    bytes[12..16].copy_from_slice(&entry.state.accumulator.to_le_bytes());
    bytes[16..20].copy_from_slice(&entry.state.clock.to_le_bytes());
    RowFormat::F32.encode(entry.values, &mut bytes[ENTRY_HEAD..]);
}

fn decode_entry<'a>(bytes: &[u8], values: &'a mut [f32]) -> Entry<'a> {
    RowFormat::F32.decode(&bytes[ENTRY_HEAD..], values);
    let accumulator = f32::from_bits(u32_at(bytes, 12));
    let state = RowState { accumulator, generation: 0, clock: u32_at(bytes, 16) };
    Entry { id: u64_at(bytes, 0), row: u32_at(bytes, 8), state, values }
}
