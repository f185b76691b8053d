//! Ids of one entity as they come from files, and the dictionary of those that are texts.

use std::collections::HashSet;
use std::path::Path;

use hypercast_core::hash::IdHashKey;
use hypercast_data::dataset::ids::{IdDictionaryWriter, IdKey, id_key};
use hypercast_data::schema::IdKind;

use crate::error::{CommonErrors as _, Error, Result};
use crate::sort::ExternalSort;

/// The memory of ids that wait to be sorted.
const SORT_BYTES: usize = 32 << 20;

/// The keys that are remembered, so that an id is sorted seldom more than once.
const RECENT_KEYS: usize = 1 << 20;

/// Collects ids that are texts.
pub(crate) struct IdCollector {
    kind: IdKind,
    /// The texts by their keys.
    texts: ExternalSort<1>,
    recent: HashSet<IdKey, IdHashKey>,
}

impl IdCollector {
    /// A collector whose files, if it needs any, are in `dir`.
    pub(crate) fn new(kind: IdKind, dir: &Path) -> IdCollector {
        let texts = ExternalSort::with_run_bytes(dir, SORT_BYTES);
        IdCollector { kind, texts, recent: HashSet::default() }
    }

    /// Whether ids are texts.
    pub(crate) fn takes_texts(&self) -> bool {
        self.kind == IdKind::String
    }

    /// Takes an id that is a text, and gives its key.
    ///
    /// # Errors
    /// The file system fails.
    pub(crate) fn add(&mut self, text: &str) -> Result<u64> {
        let key = id_key(text);
        if self.recent.insert(key) {
            self.texts.push_bytes([key.key], text.as_bytes())?;
            if self.recent.len() >= RECENT_KEYS {
                self.recent.clear();
            }
        }
        Ok(key.key)
    }

    /// Writes the dictionary `file` into `dir`, or removes one that an earlier import left there.
    ///
    /// # Errors
    /// Two ids have the same key, or the file system fails.
    pub(crate) fn finish(self, dir: &Path, file: &str) -> Result<()> {
        if self.kind == IdKind::Integer {
            let path = dir.join(file);
            return Error::found(&path, std::fs::remove_file(&path)).map(|_| ());
        }
        let mut texts = self.texts.finish()?;
        let mut writer = IdDictionaryWriter::create(dir, file)?;
        let mut last: Option<(u64, String)> = None;
        while let Some(record) = texts.next()? {
            let ([this], text) = (record.key, String::from_utf8_lossy(record.bytes));
            match last.take() {
                Some((key, other)) if key == this && other != text => {
                    let reason = format!(
                        "the ids `{other}` and `{text}` have the same key {key}; give one of them \
                         another name in all files"
                    );
                    return Err(Error::data(dir.join(file), reason));
                }
                Some((key, _)) if key == this => {}
                Some((key, other)) => writer.write(key, other)?,
                None => {}
            }
            last = Some((this, text.into_owned()));
        }
        if let Some((key, text)) = last {
            writer.write(key, text)?;
        }
        Ok(writer.finish()?)
    }
}

#[cfg(test)]
mod tests {
    use hypercast_data::dataset::table::{CellType, Field, TableReader};

    use super::*;

    #[test]
    fn a_dictionary_has_each_id_once_and_refuses_two_of_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = IdCollector::new(IdKind::String, dir.path());
        for (key, text) in [(7, "b"), (3, "a"), (7, "b")] {
            ids.texts.push_bytes([key], text.as_bytes()).unwrap();
        }
        ids.finish(dir.path(), "ids.parquet").unwrap();
        let fields = [Field::new("key", CellType::U64), Field::new("id", CellType::Text)];
        let table = TableReader::open(&dir.path().join("ids.parquet")).unwrap();
        let columns = table.read(0, &fields).unwrap();
        assert_eq!((columns[0].u64s(), columns[1].texts()[1].as_str()), (&[3, 7][..], "b"));
        let mut ids = IdCollector::new(IdKind::String, dir.path());
        for (key, text) in [(7, "b"), (7, "c")] {
            ids.texts.push_bytes([key], text.as_bytes()).unwrap();
        }
        let error = ids.finish(dir.path(), "ids.parquet").unwrap_err().to_string();
        assert!(error.contains("the ids `b` and `c` have the same key 7"), "{error}");
        let integers = IdCollector::new(IdKind::Integer, dir.path());
        integers.finish(dir.path(), "ids.parquet").unwrap();
        assert!(!dir.path().join("ids.parquet").exists(), "the stale dictionary is gone");
    }
}
