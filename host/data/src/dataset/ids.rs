//! Ids that are texts: each has a key of 64 bits, which everything else works with, and a
//! dictionary in the data set says whose key it is.
//!
//! A key is the first eight bytes, big-endian, of the text's SHA-256, and 1 instead of 0. Any
//! language computes it, and nobody can choose an id that has the key of a given other one. Two ids
//! with one key are possible all the same: of a thousand million ids, with a chance of 3 %. An
//! import that meets two refuses them by name.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use hypercast_core::disk;
use ring::digest::{SHA256, digest};

use super::Dataset;
use super::entity_id::{EntityId, TextId};
use super::table::{CellType, Column, Field, TableReader, TableWriter};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{EntityIds, IdKind};

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
        let writer = TableWriter::create(&dir.join(file), fields().to_vec())?;
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

/// The texts of a data set's ids in memory, for who sends its users and items to a daemon.
#[derive(Debug, Clone, Default)]
pub struct IdTexts {
    /// None where ids are integers.
    users: Option<TextsByKey>,
    items: Option<TextsByKey>,
}

type TextsByKey = HashMap<u64, EntityId>;

impl IdTexts {
    /// Reads the dictionaries that the schema asks for.
    ///
    /// # Errors
    /// One is missing or damaged.
    pub fn load(dataset: &Dataset) -> Result<IdTexts> {
        let EntityIds { users, items } = dataset.schema.ids;
        let load = |kind: IdKind, file: &str| -> Result<Option<TextsByKey>> {
            if kind == IdKind::Integer {
                return Ok(None);
            }
            let mut texts = HashMap::new();
            for_each_id(&dataset.dir, file, |id| {
                texts.insert(id.key().key, EntityId::Text(Arc::new(id)));
                Ok(())
            })?;
            Ok(Some(texts))
        };
        Ok(IdTexts { users: load(users, USER_IDS)?, items: load(items, ITEM_IDS)? })
    }

    /// The id of a user as its caller has it; the key where no text is known.
    pub fn user(&self, key: u64) -> EntityId {
        of(&self.users, key)
    }

    /// The id of an item as its caller has it; the key where no text is known.
    pub fn item(&self, key: u64) -> EntityId {
        of(&self.items, key)
    }
}

fn of(texts: &Option<TextsByKey>, key: u64) -> EntityId {
    let text = texts.as_ref().and_then(|texts| texts.get(&key));
    text.cloned().unwrap_or(EntityId::Integer(key))
}

/// Calls `take` with each id of the dictionary `file` in a data set's folder.
///
/// # Errors
/// It is missing or damaged, a key is not its id's, or `take` fails.
pub fn for_each_id(
    dir: &Path,
    file: &str,
    mut take: impl FnMut(TextId) -> Result<()>,
) -> Result<()> {
    let path = dir.join(file);
    if !disk::is_file(&path) {
        let reason = "it is missing, and the schema says that such ids are strings; import the \
                      data again";
        return Err(Error::data(path, reason));
    }
    let table = TableReader::open(&path)?;
    for group in 0..table.groups() {
        let columns = table.read(group, &fields())?;
        for (&key, text) in columns[0].u64s().iter().zip(columns[1].texts()) {
            let id = TextId::new(text).map_err(|reason| Error::data(&path, reason))?;
            if id.key().key != key {
                return Err(Error::data(&path, format!("{key} is not the key of {text:?}")));
            }
            take(id)?;
        }
    }
    Ok(())
}

fn fields() -> [Field; 2] {
    [Field::new("key", CellType::U64), Field::new("id", CellType::Text)]
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
