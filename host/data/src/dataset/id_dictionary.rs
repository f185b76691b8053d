//! The ids that are texts, as a daemon comes to know them: whose key a key is, and that no key has
//! two texts.
//!
//! The file `texts` only grows: a record has a text with its key and a checksum. The index is in
//! memory, a key with the record's place and further bits of the text's hash, so that a known text
//! is recognised without reading the file; records are read for messages and reports alone. A
//! record that a crash left half written is dropped when the file is opened, and one that was
//! damaged since is stepped over: its text is stored again when it is seen again.
//!
//! One process writes, any number read what is there when they open it. Keys are the same in every
//! process, so processes without the file lose nothing but names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use hypercast_core::atomic_file;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::disk::{self, File, OpenMode};
use hypercast_core::hash::IdHashKey;

use super::entity_id::{MAX_ID_BYTES, TextId};
use super::ids::IdKey;
use crate::error::{CommonErrors as _, Error, Result};

/// The file in the dictionary's folder.
const FILE: &str = "texts";

/// The file's first bytes, with the version of its layout.
const MAGIC: [u8; 8] = *b"hcids\0\0\x01";

/// Bytes before a record's text: checksum and length (4 each), key and check (8 each).
const HEADER: usize = 24;

/// Records begin at multiples of this, so that a place has 32 bits in files of up to 32 GiB.
const ALIGNMENT: usize = 8;

/// The index is in this many parts, so that one that grows holds up few readers for a short time.
const SHARDS: usize = 64;

/// Bytes that are read at a time where the file is read from end to end.
const READ_BYTES: usize = 1 << 20;

/// The texts of ids by their keys. See the module.
///
/// An id takes 24 bytes and its text in the file, rounded up to eight, and 20 to 39 bytes in
/// memory.
#[derive(Debug)]
pub struct IdDictionary {
    path: PathBuf,
    file: File,
    shards: Vec<RwLock<IndexShard>>,
    /// Where the next record begins.
    end: Mutex<u64>,
    /// Up to here it survives a loss of power.
    synced: AtomicU64,
    len: AtomicU64,
    max_ids: u64,
    /// Held by the process that writes.
    _lock: Option<DirLock>,
}

/// A part of the index.
type IndexShard = HashMap<u64, IndexEntry, IdHashKey>;

#[derive(Debug, Clone, Copy)]
struct IndexEntry {
    /// The record's place, in units of [`ALIGNMENT`].
    place: u32,
    check: u32,
}

/// What became of ids that were to be stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InsertedIds {
    /// Those that this call stored.
    pub new: usize,
    /// Neither known nor stored, because the dictionary is full.
    pub left_out: usize,
}

/// Whether a key is known.
enum Found {
    No,
    Known,
    /// It is the key of another text, whose record is at this place.
    Taken(u32),
}

impl IdDictionary {
    /// Opens the dictionary in `dir` to write, and makes it if there is none. It takes no further
    /// ids once it has `max_ids`.
    ///
    /// # Errors
    /// Another process writes it, it is of another version, or the file system fails.
    pub fn open(dir: &Path, max_ids: u64) -> Result<IdDictionary> {
        let lock = DirLock::acquire(dir)?;
        let path = dir.join(FILE);
        if !disk::exists(&path) {
            atomic_file::write(&path, &MAGIC).map_err(Error::io(&path))?;
        }
        let file = File::open_as(&path, OpenMode::Keep).map_err(Error::io(&path))?;
        let dictionary = IdDictionary::indexed(path, file, max_ids, Some(lock))?;
        let (path, end) = (&dictionary.path, *dictionary.end());
        let length = dictionary.file.length().map_err(Error::io(path))?;
        if length > end {
            let cut = length - end;
            tracing::warn!("{}: dropped {cut} bytes that a crash left at its end", path.display());
            dictionary.file.set_len(end).map_err(Error::io(path))?;
        }
        Ok(dictionary)
    }

    /// Opens the dictionary in `dir` to read what it has now, while another process may write;
    /// `None` if there is none.
    ///
    /// # Errors
    /// It is of another version, or the file system fails.
    pub fn read(dir: &Path) -> Result<Option<IdDictionary>> {
        let path = dir.join(FILE);
        let Some(file) = Error::found(&path, File::open(&path))? else { return Ok(None) };
        IdDictionary::indexed(path, file, 0, None).map(Some)
    }

    /// How many ids it has, of users and items together.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there is no id.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores those of the ids that are not known yet: all, or none if it fails. What is stored
    /// survives a crash of the process; see [`IdDictionary::sync`].
    ///
    /// # Errors
    /// An id's key is that of another text, which is then named ([`Error::IdCollision`]), or the
    /// file system fails.
    pub fn insert<'a>(&self, ids: impl Iterator<Item = &'a TextId> + Clone) -> Result<InsertedIds> {
        let known = |id: &TextId| matches!(self.find(id.key()), Found::Known);
        if ids.clone().all(known) {
            return Ok(InsertedIds::default());
        }
        let mut end = self.end();
        let (mut records, mut new) = (Vec::new(), HashMap::<u64, (&TextId, u32)>::new());
        let mut inserted = InsertedIds::default();
        for id in ids {
            match self.find(id.key()) {
                Found::Known => continue,
                Found::Taken(place) => return Err(collision(self.text_at(place)?, id)),
                Found::No => {}
            }
            let place = (*end as usize + records.len()) / ALIGNMENT;
            match (new.get(&id.key().key), u32::try_from(place)) {
                (Some((other, _)), _) if *other != id => {
                    return Err(collision(other.text().to_owned(), id));
                }
                (Some(_), _) => {}
                (None, Ok(place)) if self.len() + (new.len() as u64) < self.max_ids => {
                    encode(id, &mut records);
                    new.insert(id.key().key, (id, place));
                }
                (None, _) => inserted.left_out += 1,
            }
        }
        self.file.write_all_at(&records, *end).map_err(Error::io(&self.path))?;
        *end += records.len() as u64;
        inserted.new = new.len();
        for (id, place) in new.into_values() {
            self.index(id.key(), place);
        }
        Ok(inserted)
    }

    /// Makes what is stored survive a loss of power.
    ///
    /// # Errors
    /// The file system fails.
    pub fn sync(&self) -> Result<()> {
        let end = *self.end();
        if self.synced.load(Ordering::Acquire) < end {
            self.file.sync_data().map_err(Error::io(&self.path))?;
            self.synced.fetch_max(end, Ordering::Release);
        }
        Ok(())
    }

    /// Calls `take` with each id, in the order in which they came.
    ///
    /// # Errors
    /// The file system fails, or `take` does.
    pub fn for_each(&self, mut take: impl FnMut(TextId) -> Result<()>) -> Result<()> {
        let end = *self.end();
        let each = |record: StoredId<'_>| take(TextId::stored(record.key, record.text));
        scan(&self.file, &self.path, end, each).map(|_| ())
    }

    fn indexed(
        path: PathBuf,
        file: File,
        max_ids: u64,
        lock: Option<DirLock>,
    ) -> Result<IdDictionary> {
        let mut magic = [0; MAGIC.len()];
        let read = read_full(&file, &mut magic, 0).map_err(Error::io(&path))?;
        if read < MAGIC.len() || magic != MAGIC {
            let reason = "it is no dictionary of ids, or one of a later version; a daemon makes it \
                          anew where it is missing, of the texts that it then sees";
            return Err(Error::data(path, reason));
        }
        let length = file.length().map_err(Error::io(&path))?;
        let shards = (0..SHARDS).map(|_| RwLock::default()).collect();
        let dictionary = IdDictionary {
            path,
            file,
            shards,
            end: Mutex::new(0),
            synced: AtomicU64::new(0),
            len: AtomicU64::new(0),
            max_ids,
            _lock: lock,
        };
        let scanned = scan(&dictionary.file, &dictionary.path, length, |record| {
            dictionary.index(record.key, record.place);
            Ok(())
        })?;
        let path = dictionary.path.display();
        if scanned.damaged > 0 {
            tracing::warn!("{path}: stepped over {} damaged bytes", scanned.damaged);
        }
        *dictionary.end() = scanned.end;
        Ok(dictionary)
    }

    fn find(&self, key: IdKey) -> Found {
        match self.shard(key.key).get(&key.key) {
            None => Found::No,
            Some(entry) if entry.check == key.check as u32 => Found::Known,
            Some(entry) => Found::Taken(entry.place),
        }
    }

    fn index(&self, key: IdKey, place: u32) {
        let entry = IndexEntry { place, check: key.check as u32 };
        let shard = &self.shards[shard_of(key.key)];
        let before = shard.write().unwrap_or_else(PoisonError::into_inner).insert(key.key, entry);
        self.len.fetch_add(u64::from(before.is_none()), Ordering::Relaxed);
    }

    fn text_at(&self, place: u32) -> Result<String> {
        let mut bytes = vec![0; HEADER + MAX_ID_BYTES];
        let at = u64::from(place) * ALIGNMENT as u64;
        let read = read_full(&self.file, &mut bytes, at).map_err(Error::io(&self.path))?;
        decode(&bytes[..read], place)
            .map(|record| record.text.to_owned())
            .ok_or_else(|| Error::data(&self.path, format!("the record at byte {at} is damaged")))
    }

    fn shard(&self, key: u64) -> RwLockReadGuard<'_, IndexShard> {
        self.shards[shard_of(key)].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) -> MutexGuard<'_, u64> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keys are hashes, so any of their bits will do.
fn shard_of(key: u64) -> usize {
    (key >> 32) as usize % SHARDS
}

fn collision(taken: String, given: &TextId) -> Error {
    Error::IdCollision { key: given.key().key, taken, given: given.text().to_owned() }
}

/// A record of the file.
struct StoredId<'a> {
    place: u32,
    key: IdKey,
    text: &'a str,
}

fn encode(id: &TextId, records: &mut Vec<u8>) {
    let IdKey { key, check } = id.key();
    let start = records.len();
    records.extend([0; 4]);
    records.extend((id.text().len() as u32).to_le_bytes());
    records.extend(key.to_le_bytes());
    records.extend(check.to_le_bytes());
    records.extend(id.text().as_bytes());
    let checksum = crc32fast::hash(&records[start + 4..]);
    records[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
    records.resize(records.len().next_multiple_of(ALIGNMENT), 0);
}

/// The record that `bytes` begin with, if it is whole.
fn decode(bytes: &[u8], place: u32) -> Option<StoredId<'_>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let (checksum, length) = (number(0) as u32, (number(0) >> 32) as usize);
    let text = rest.get(..length).filter(|_| length <= MAX_ID_BYTES)?;
    if crc32fast::hash(&bytes[4..HEADER + length]) != checksum {
        return None;
    }
    let key = IdKey { key: number(8), check: number(16) };
    Some(StoredId { place, key, text: std::str::from_utf8(text).ok()? })
}

/// What a file holds.
struct ScannedFile {
    /// Where its last whole record ends.
    end: u64,
    /// Bytes before that which are of no record.
    damaged: u64,
}

/// Calls `take` with each whole record before `length`.
fn scan(
    file: &File,
    path: &Path,
    length: u64,
    mut take: impl FnMut(StoredId<'_>) -> Result<()>,
) -> Result<ScannedFile> {
    let first = MAGIC.len() as u64;
    let mut scanned = ScannedFile { end: first, damaged: 0 };
    // `buffer[used..]` is the file from `at` on.
    let (mut buffer, mut used, mut at) = (Vec::new(), 0, first);
    loop {
        let ahead = (buffer.len() - used) as u64;
        if ahead < (HEADER + MAX_ID_BYTES + ALIGNMENT) as u64 && at + ahead < length {
            buffer.drain(..used);
            used = 0;
            let more = (length - at - ahead).min(READ_BYTES as u64) as usize;
            let filled = buffer.len();
            buffer.resize(filled + more, 0);
            let read = read_full(file, &mut buffer[filled..], at + ahead);
            buffer.truncate(filled + read.map_err(Error::io(path))?);
        }
        let Ok(place) = u32::try_from(at / ALIGNMENT as u64) else { return Ok(scanned) };
        let step = match decode(&buffer[used..], place) {
            Some(record) => {
                let step = (HEADER + record.text.len()).next_multiple_of(ALIGNMENT);
                scanned.damaged += at - scanned.end;
                scanned.end = at + step as u64;
                take(record)?;
                step
            }
            None => ALIGNMENT,
        };
        if buffer.len() - used <= step {
            return Ok(scanned);
        }
        (used, at) = (used + step, at + step as u64);
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> TextId {
        TextId::new(text).unwrap()
    }

    fn insert(dictionary: &IdDictionary, texts: &[&str]) -> Result<InsertedIds> {
        let ids: Vec<TextId> = texts.iter().map(|text| id(text)).collect();
        dictionary.insert(ids.iter())
    }

    fn texts(dictionary: &IdDictionary) -> Vec<String> {
        let mut all = Vec::new();
        let take = |id: TextId| {
            all.push(id.text().to_owned());
            Ok(())
        };
        dictionary.for_each(take).unwrap();
        all
    }

    #[test]
    fn ids_are_stored_once_and_found_again_by_other_processes() {
        let dir = tempfile::tempdir().unwrap();
        assert!(IdDictionary::read(dir.path()).unwrap().is_none());
        let dictionary = IdDictionary::open(dir.path(), 100).unwrap();
        let new = |new| InsertedIds { new, left_out: 0 };
        assert_eq!(insert(&dictionary, &["a", "b", "a"]).unwrap(), new(2));
        assert_eq!(insert(&dictionary, &["b", "a"]).unwrap(), new(0));
        let reader = IdDictionary::read(dir.path()).unwrap().unwrap();
        assert_eq!(insert(&dictionary, &["\u{fc}ber 7", "b"]).unwrap(), new(1));
        assert_eq!(texts(&reader), ["a", "b"], "what was there when it was opened");
        let why = IdDictionary::open(dir.path(), 100).unwrap_err().to_string();
        assert!(why.contains("works here"), "{why}");
        drop(dictionary);
        let dictionary = IdDictionary::open(dir.path(), 100).unwrap();
        assert_eq!((dictionary.len(), texts(&dictionary).len()), (3, 3));
    }

    #[test]
    fn a_key_with_another_text_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let dictionary = IdDictionary::open(dir.path(), 100).unwrap();
        let collides = |text: &str, check| TextId::stored(IdKey { key: 5, check }, text);
        let (first, other) = (collides("sku-1", 1), collides("sku-2", 2));
        let refused = |ids: &[&TextId]| {
            let why = dictionary.insert(ids.iter().copied()).unwrap_err().to_string();
            assert!(why.contains("\"sku-1\"") && why.contains("\"sku-2\""), "{why}");
        };
        refused(&[&id("fresh"), &first, &other]);
        assert!(dictionary.is_empty(), "not of two that came together");
        dictionary.insert([&first].into_iter()).unwrap();
        refused(&[&id("fresh"), &other]);
        drop(dictionary);
        let dictionary = IdDictionary::open(dir.path(), 100).unwrap();
        assert_eq!(texts(&dictionary), ["sku-1"]);
        dictionary.insert([&other].into_iter()).unwrap_err();
        dictionary.insert([&first].into_iter()).unwrap();
    }

    #[test]
    fn a_full_dictionary_takes_no_more_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let dictionary = IdDictionary::open(dir.path(), 2).unwrap();
        let inserted = insert(&dictionary, &["a", "b", "c", "a"]).unwrap();
        assert_eq!(inserted, InsertedIds { new: 2, left_out: 1 });
        assert_eq!(insert(&dictionary, &["c"]).unwrap(), InsertedIds { new: 0, left_out: 1 });
        assert_eq!(texts(&dictionary), ["a", "b"]);
    }

    #[test]
    fn a_damaged_record_costs_its_own_text_alone_and_is_stored_again() {
        let dir = tempfile::tempdir().unwrap();
        let many: Vec<String> = (0..5000).map(|at| format!("user-{at}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        insert(&IdDictionary::open(dir.path(), 10_000).unwrap(), &many).unwrap();
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        let text = b"user-2500";
        let middle = whole.windows(text.len()).position(|part| part == text).unwrap();
        damaged[middle] ^= 1;
        // The last record is cut, too, within its text.
        std::fs::write(&path, &damaged[..whole.len() - 9]).unwrap();
        let dictionary = IdDictionary::open(dir.path(), 10_000).unwrap();
        assert_eq!(texts(&dictionary).len(), 4998);
        assert_eq!(insert(&dictionary, &many).unwrap().new, 2);
        drop(dictionary);
        assert_eq!(IdDictionary::open(dir.path(), 10_000).unwrap().len(), 5000);
        std::fs::write(&path, b"hcids\0\0\x02").unwrap();
        let why = IdDictionary::open(dir.path(), 1).unwrap_err().to_string();
        assert!(why.contains("later version"), "{why}");
    }
}
