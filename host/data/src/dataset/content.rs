//! `content.parquet`: a dense vector for each item, computed outside of HyperCast from the item's
//! text, images or sound.
//!
//! The columns are `item` (int64) and `vector` (a list of f32, of the same length in every row).
//! Reading scales vectors to unit norm; they are not standardised otherwise. An item without a
//! vector has zeros. An event can tell an item's vector, too, which then replaces that of the file.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use hypercast_core::{atomic_dir, disk as fs};
use hypercast_fm::example::Item;

use super::table::{CellType, Column, Field, TableReader, TableWriter};
use crate::error::{CommonErrors as _, Error, Result};

/// The largest width of a vector.
pub const MAX_WIDTH: usize = 4096;

const ROWS_PER_GROUP: usize = 1 << 14;

/// The file in a data set's directory.
const FILE: &str = "content.parquet";

/// What is wrong with a file whose width nobody knows.
const NO_ROW: &str = "it has no row";

/// Content vectors in the order of their file.
#[derive(Debug, Clone, PartialEq)]
pub struct Content {
    /// The length of each vector.
    pub width: usize,
    /// The items' ids, each once.
    pub items: Vec<u64>,
    /// `[items * width]`, each of unit norm or all zeros.
    pub vectors: Vec<f32>,
}

impl Content {
    /// Reads a file of vectors.
    ///
    /// # Errors
    /// The file is missing or has other columns; or a row, which the error names, has a vector of
    /// another width, a number that is not finite, or an item that an earlier row has.
    pub fn read(path: &Path) -> Result<Content> {
        let reader = TableReader::open(path)?;
        let mut content = Content { width: 0, items: Vec::new(), vectors: Vec::new() };
        let mut seen = HashSet::new();
        for group in 0..reader.groups() {
            let columns =
                reader.read(group, &fields(CellType::U64)).map_err(|error| match error {
                    Error::Parquet { source, .. } => {
                        Error::data(path, format!("{source}; write it with zstd or no compression"))
                    }
                    other => other,
                })?;
            for (at, &item) in columns[0].u64s().iter().enumerate() {
                let row = content.items.len() + 1;
                let vector = &columns[1].f32s()[columns[1].range(at)];
                content.add(item, vector, &mut seen).map_err(|reason| {
                    Error::data(path, format!("row {row}, item {item}: {reason}"))
                })?;
            }
        }
        if content.items.is_empty() {
            return Err(Error::data(path, NO_ROW));
        }
        Ok(content)
    }

    /// Adds a row, or reports what is wrong with it.
    fn add(
        &mut self,
        item: u64,
        vector: &[f32],
        seen: &mut HashSet<u64>,
    ) -> std::result::Result<(), String> {
        let width = vector.len();
        if self.items.is_empty() {
            self.width = width;
        }
        if width != self.width || width == 0 {
            return Err(format!(
                "its vector has {width} numbers and the first row's {}; all vectors must have the \
                 same length, at least 1",
                self.width
            ));
        }
        let vector = unit_vector(vector)
            .map_err(|why| format!("its vector {why}; correct it, or leave this item out"))?;
        if !seen.insert(item) {
            return Err("an earlier row already has this item; each item may have one row".into());
        }
        self.items.push(item);
        self.vectors.extend_from_slice(&vector);
        Ok(())
    }

    /// The vectors of those items that have one, which are all of one width; none without any.
    fn of_items(items: &[Item]) -> Option<Content> {
        let with = || items.iter().filter(|item| !item.content.is_empty());
        let width = with().next()?.content.len();
        let mut content = Content { width, items: Vec::new(), vectors: Vec::new() };
        for item in with() {
            content.items.push(item.id);
            content.vectors.extend_from_slice(&item.content);
        }
        Some(content)
    }

    /// Writes `content.parquet` into a data set's directory.
    ///
    /// # Errors
    /// The file system fails.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut writer = TableWriter::create(&dir.join(FILE), fields(CellType::I64).to_vec())?;
        let rows = self.items.chunks(ROWS_PER_GROUP);
        for (items, vectors) in rows.zip(self.vectors.chunks(ROWS_PER_GROUP * self.width)) {
            writer.write(&[
                Column::scalars(items.iter().map(|&id| id as i64)),
                Column::lists(vectors.iter().copied(), items.iter().map(|_| self.width)),
            ])?;
        }
        writer.finish()
    }
}

/// The two columns. Ids are written as signed integers, which more tools can read.
fn fields(id: CellType) -> [Field; 2] {
    [Field::new("item", id), Field::list("vector", CellType::F32)]
}

/// Copies the vectors of `from` into the data set in `dir`; without `from`, writes those that the
/// items have, and if there are none removes the file that an earlier import left there. Returns
/// the vectors.
///
/// # Errors
/// [`Content::read`] refuses the file, or it names an item that the data set does not have.
pub fn import(from: Option<&Path>, dir: &Path, items: &[Item]) -> Result<Option<Content>> {
    let Some(from) = from else {
        if let Some(content) = Content::of_items(items) {
            content.write(dir)?;
            return Ok(Some(content));
        }
        let path = dir.join(FILE);
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(&path)(error)),
            _ => Ok(None),
        };
    };
    let content = Content::read(from)?;
    let known: HashSet<u64> = items.iter().map(|item| item.id).collect();
    if let Some(at) = content.items.iter().position(|item| !known.contains(item)) {
        let (row, item) = (at + 1, content.items[at]);
        let reason =
            format!("row {row}: the data set has no item {item}; use the ids of its items.parquet");
        return Err(Error::data(from, reason));
    }
    atomic_dir::create(dir)?;
    content.write(dir)?;
    Ok(Some(content))
}

/// Adds their vectors to the items of the data set in `dir`; returns the width, 0 without a file.
pub(super) fn attach(dir: &Path, items: &mut HashMap<u64, Arc<Item>>) -> Result<usize> {
    let path = dir.join(FILE);
    if !fs::is_file(&path) {
        return Ok(0);
    }
    let content = Content::read(&path)?;
    for (id, vector) in content.items.iter().zip(content.vectors.chunks_exact(content.width)) {
        if let Some(item) = items.get_mut(id) {
            Arc::make_mut(item).content = vector.into();
        }
    }
    Ok(content.width)
}

/// The width of the vectors in the data set's directory, 0 without a file. It reads the first row
/// alone. Where the data set is open, [`Dataset::content`](super::Dataset::content) is the width
/// that goes with the vectors in memory, whatever the file has become since.
///
/// # Errors
/// The file cannot be read, or has no row.
pub fn width_in(dir: &Path) -> Result<usize> {
    let path = dir.join(FILE);
    if !fs::is_file(&path) {
        return Ok(0);
    }
    let [_, vector] = fields(CellType::U64);
    match TableReader::open(&path)?.read_first(&vector)? {
        Some(first) => Ok(first.range(0).len()),
        None => Err(Error::data(&path, NO_ROW)),
    }
}

/// The vector scaled to norm 1; a vector of zeros stays as it is.
///
/// # Errors
/// Says what is wrong with it: it has no number or too many, or one that is not finite.
pub fn unit_vector(vector: &[f32]) -> std::result::Result<Arc<[f32]>, String> {
    let width = vector.len();
    if !(1..=MAX_WIDTH).contains(&width) {
        return Err(format!("has {width} numbers, of 1 to {MAX_WIDTH}"));
    }
    if let Some(number) = vector.iter().find(|number| !number.is_finite()) {
        return Err(format!("contains {number}"));
    }
    let norm = vector.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
    Ok(vector.iter().map(|&v| (f64::from(v) * scale) as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, items: &[i64], lists: &[&[f32]]) {
        let mut writer = TableWriter::create(path, fields(CellType::I64).to_vec()).unwrap();
        writer
            .write(&[
                Column::scalars(items.iter().copied()),
                Column::lists(lists.concat(), lists.iter().map(|list| list.len())),
            ])
            .unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn vectors_come_back_with_unit_norm_on_their_items() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("vectors.parquet");
        write(&from, &[7, 2], &[&[3.0, 4.0], &[0.0, 0.0]]);
        let items: Vec<Item> =
            [2, 7, 9].map(|id| Item { id, ..Item::default() }).into_iter().collect();
        let content = import(Some(&from), dir.path(), &items).unwrap().unwrap();
        assert_eq!((content.width, content.items), (2, vec![7, 2]));
        let mut known: HashMap<u64, Arc<Item>> =
            items.iter().map(|item| (item.id, Arc::new(item.clone()))).collect();
        assert_eq!(attach(dir.path(), &mut known).unwrap(), 2);
        assert_eq!(width_in(dir.path()).unwrap(), 2);
        assert_eq!(&*known[&7].content, &[0.6, 0.8]);
        assert_eq!(&*known[&2].content, &[0.0, 0.0]);
        assert!(known[&9].content.is_empty());
        assert_eq!(import(None, dir.path(), &items).unwrap(), None);
        assert_eq!(attach(dir.path(), &mut known).unwrap(), 0, "the stale file is gone");
        assert_eq!(width_in(dir.path()).unwrap(), 0);
        write(&dir.path().join(FILE), &[], &[]);
        let error = width_in(dir.path()).unwrap_err().to_string();
        assert!(error.contains("no row"), "{error}");
    }

    #[test]
    fn bad_vectors_are_refused_with_row_and_item() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("vectors.parquet");
        let items = [Item { id: 1, ..Item::default() }, Item { id: 2, ..Item::default() }];
        let refused = |ids: &[i64], lists: &[&[f32]]| {
            write(&from, ids, lists);
            import(Some(&from), dir.path(), &items).unwrap_err().to_string()
        };
        let error = refused(&[1, 2], &[&[1.0, 2.0], &[1.0]]);
        assert!(error.contains("row 2, item 2") && error.contains("has 1 numbers"), "{error}");
        let error = refused(&[1, 1], &[&[1.0], &[1.0]]);
        assert!(error.contains("row 2, item 1") && error.contains("already"), "{error}");
        let error = refused(&[1, 5], &[&[1.0], &[1.0]]);
        assert!(error.contains("row 2: the data set has no item 5"), "{error}");
        let error = refused(&[1], &[&[f32::NAN]]);
        assert!(error.contains("row 1, item 1") && error.contains("NaN"), "{error}");
        let error = refused(&[], &[]);
        assert!(error.contains("no row"), "{error}");
        assert!(!dir.path().join(FILE).exists(), "nothing was written");
    }
}
