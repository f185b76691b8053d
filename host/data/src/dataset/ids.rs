//! Ids that are texts: each has a key of 64 bits, which everything else works with, and a
//! dictionary in the data set says whose key it is.
//!
//! A key is the first eight bytes, big-endian, of the text's SHA-256, and 1 instead of 0. Any
//! language computes it, and nobody can choose an id that has the key of a given other one. Two ids
//! with one key are possible all the same: of a thousand million ids, with a chance of 3 %. An
//! import that meets two refuses them by name.

use std::path::Path;

use ring::digest::{SHA256, digest};

use super::table::{CellType, Column, Field, TableWriter};
use crate::error::Result;

/// The file with the ids of items, in a data set's folder.
pub const ITEM_IDS: &str = "item-ids.parquet";

/// The file with the ids of users, in a data set's folder.
pub const USER_IDS: &str = "user-ids.parquet";

const ROWS_PER_GROUP: usize = 1 << 16;

/// The key of an id that is a text, with 64 further bits that tell apart ids of one key.
pub fn id_key(id: &str) -> IdKey {
    let hash = digest(&SHA256, id.as_bytes());
    let (key, rest) = hash.as_ref().split_at(8);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
    IdKey { key: number(key).max(1), check: number(&rest[..8]) }
}

/// See [`id_key`]: the key of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdKey {
    /// What stands for the id in the data set, the models and the streams.
    pub key: u64,
    /// Equal for equal ids, and with overwhelming probability for no others of the same key.
    pub check: u64,
}

/// Writes a dictionary: a Parquet file with the columns `key` and `id`, sorted by `key`.
pub struct IdDictionaryWriter {
    writer: TableWriter,
    keys: Vec<u64>,
    ids: Vec<String>,
}

impl IdDictionaryWriter {
    /// Starts the file [`ITEM_IDS`] or [`USER_IDS`] in a data set's folder. It gets its name when
    /// it is finished.
    ///
    /// # Errors
    /// The file system fails.
    pub fn create(dir: &Path, file: &str) -> Result<IdDictionaryWriter> {
        let fields = vec![Field::new("key", CellType::U64), Field::new("id", CellType::Text)];
        let writer = TableWriter::create(&dir.join(file), fields)?;
        Ok(IdDictionaryWriter { writer, keys: Vec::new(), ids: Vec::new() })
    }

    /// Adds an id with its key.
    ///
    /// # Errors
    /// The file system fails.
    ///
    /// # Panics
    /// The key is not above the one before it.
    pub fn write(&mut self, key: u64, id: String) -> Result<()> {
        assert!(self.keys.last().is_none_or(|&last| last < key), "sorted by key, each once");
        self.keys.push(key);
        self.ids.push(id);
        if self.keys.len() == ROWS_PER_GROUP { self.flush() } else { Ok(()) }
    }

    /// Writes the rest and gives the file its name.
    ///
    /// # Errors
    /// The file system fails.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.writer.finish()
    }

    fn flush(&mut self) -> Result<()> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let columns = [Column::scalars(self.keys.drain(..)), Column::scalars(self.ids.drain(..))];
        self.writer.write(&columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_any_sha_256() {
        // printf abc | sha256sum
        assert_eq!(
            id_key("abc"),
            IdKey { key: 0xba78_16bf_8f01_cfea, check: 0x4141_40de_5dae_2223 }
        );
        assert_ne!(id_key("").key, 0);
    }
}
