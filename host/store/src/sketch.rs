//! The admission sketch: counts how often ids without a row were seen, in bounded memory. A row is
//! given to an id that was seen often enough, so that a long tail of ids seen once costs no rows.
//! It deliberately keeps no ids: two may share counters, so an id may be admitted early, but never
//! late.
//!
//! A count-min sketch of two counters an id, saturating bytes, with conservative updates. Once the
//! sightings fill it, all counters are halved, so that it forgets. It is a function of the
//! sightings alone: commits save the counters that changed, and a store that is opened again goes
//! on exactly where it was.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
use hypercast_core::hash::{IdHashKey, mix64};

use crate::error::{Result, corrupt, io};
use crate::header::{self, FileHeader};

const MAGIC: [u8; 8] = *b"HCSKETCH";
/// Counters in each half; an id has one in either.
const WIDTH: usize = 1 << 20;
/// Sightings after which all counters are halved.
const HALVE_AFTER: u64 = 4 * WIDTH as u64;

/// Counters of ids that have no row yet.
#[derive(Debug, Clone)]
pub(crate) struct Sketch {
    /// One byte a counter, in the order of the hash.
    pub cells: Vec<u8>,
    /// All sightings so far.
    pub sightings: u64,
    committed: u64,
    /// Counters that differ from the last commit; `None` for all of them.
    pub changed: Option<HashSet<u32, IdHashKey>>,
}

impl Sketch {
    /// How many counters there are, a byte each.
    pub const SIZE: usize = 2 * WIDTH;
    /// More changed counters than this are saved as a whole.
    const MANY: usize = Self::SIZE / 8;

    /// One that has seen nothing.
    pub fn new() -> Sketch {
        Sketch {
            cells: vec![0; Self::SIZE],
            sightings: 0,
            committed: 0,
            changed: Some(HashSet::default()),
        }
    }

    /// Reads what a checkpoint wrote into `dir`, if any did.
    pub fn read(dir: &Path) -> Result<Option<Sketch>> {
        let path = path(dir);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("read", &path)(e)),
        };
        let [size, sightings, crc, ..] = FileHeader::decode(&bytes, MAGIC, &path)?.fields;
        let cells = &bytes[header::SIZE..];
        if size != Self::SIZE as u64 || cells.len() != Self::SIZE {
            return Err(corrupt(&path, format!("{} bytes are not its length", bytes.len())));
        }
        if u64::from(crc32fast::hash(cells)) != crc {
            return Err(corrupt(&path, "the checksum of its counters does not match"));
        }
        let cells = cells.to_vec();
        Ok(Some(Sketch { cells, sightings, committed: sightings, ..Self::new() }))
    }

    /// Writes it into `dir`, whole or not at all.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let crc = u64::from(crc32fast::hash(&self.cells));
        let fields = [Self::SIZE as u64, self.sightings, crc, 0, 0, 0];
        let header = FileHeader { magic: MAGIC, fields }.encode();
        let path = path(dir);
        atomic_file::write(&path, &[&header, &self.cells[..]].concat()).map_err(io("write", &path))
    }

    /// Counts a sighting of `id`; gives how often it was seen, this time included.
    pub fn see(&mut self, id: u64) -> u8 {
        self.sightings += 1;
        if self.sightings.is_multiple_of(HALVE_AFTER) {
            self.cells.iter_mut().for_each(|cell| *cell /= 2);
            self.changed = None;
        }
        let hash = mix64(id ^ 0x5bd1_e995_9d1b_54a5);
        let places = [hash as usize % WIDTH, WIDTH + (hash >> 32) as usize % WIDTH];
        let count = places.map(|at| self.cells[at]).into_iter().min().unwrap_or(0);
        let count = count.saturating_add(1);
        for at in places {
            if self.cells[at] < count {
                self.cells[at] = count;
                self.note(at);
            }
        }
        count
    }

    fn note(&mut self, at: usize) {
        let Some(changed) = &mut self.changed else { return };
        changed.insert(at as u32);
        if changed.len() > Self::MANY {
            self.changed = None;
        }
    }

    /// Whether nothing was seen since the last commit.
    pub fn is_clean(&self) -> bool {
        self.sightings == self.committed
    }

    /// Notes that all is committed.
    pub fn mark_clean(&mut self) {
        self.committed = self.sightings;
        self.changed.get_or_insert_default().clear();
    }

    /// Takes over what a journal's record says: all counters, or pairs of place and value. Places
    /// that are out of range are left to the record's checksum to report.
    pub fn restore(&mut self, bytes: &[u8], all: bool, sightings: u64) {
        self.sightings = sightings;
        self.committed = sightings;
        if all {
            self.cells.copy_from_slice(bytes);
            return;
        }
        for pair in bytes.as_chunks::<8>().0 {
            let at = header::u32_at(pair, 0) as usize;
            if let Some(cell) = self.cells.get_mut(at) {
                *cell = pair[4];
            }
        }
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join("admission.sketch")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_counted_saved_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut sketch = Sketch::new();
        for round in 1..=3 {
            for id in 0..1000 {
                assert_eq!(
                    sketch.see(id),
                    round,
                    "a thousand ids do not meet among a million counters"
                );
            }
        }
        let changed = sketch.changed.clone().unwrap();
        assert!((1900..=2000).contains(&changed.len()), "{}", changed.len());
        let pairs: Vec<u8> = changed
            .iter()
            .flat_map(|&at| [at, u32::from(sketch.cells[at as usize])])
            .flat_map(u32::to_le_bytes)
            .collect();
        let mut restored = Sketch::new();
        restored.restore(&pairs, false, sketch.sightings);
        assert_eq!(restored.cells, sketch.cells);
        sketch.mark_clean();
        assert_eq!(sketch.changed, Some(HashSet::default()));
        sketch.write(dir.path()).unwrap();
        let mut read = Sketch::read(dir.path()).unwrap().unwrap();
        assert_eq!(read.see(5), 4);
        assert_eq!(read.sightings, 3001);
    }

    #[test]
    fn it_forgets_by_halves() {
        let mut sketch = Sketch::new();
        for _ in 0..9 {
            sketch.see(1);
        }
        for _ in sketch.sightings + 1..HALVE_AFTER {
            sketch.see(2);
        }
        assert_eq!(sketch.see(1), 5, "9 became 4, and one more");
        assert_eq!(sketch.changed, None, "all counters changed");
    }
}
