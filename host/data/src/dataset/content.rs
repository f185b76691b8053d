//! `content.parquet`: a dense vector an item, made outside of HyperCast from what
//! the item is: its text, its images, its sound.
//!
//! The columns are `item` (int64) and `vector` (a list of f32, as long in every
//! row). Vectors are scaled to unit norm when they are read, which is all the
//! standardisation they get. An item without one has zeros.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use hypercast_fm::example::Item;

use super::table::{Column, Field, Kind, TableReader, TableWriter, Values};
use crate::error::{CommonErrors as _, Error, Result};

/// The widest vector that is taken.
const MAX_WIDTH: usize = 4096;

const ROWS_A_GROUP: usize = 1 << 14;

/// Vectors by item.
#[derive(Debug, Clone, PartialEq)]
pub struct Content {
    /// Numbers a vector.
    pub width: usize,
    /// Item ids, each once.
    pub items: Vec<u64>,
    /// `[items * width]`, each of unit norm or all zeros.
    pub vectors: Vec<f32>,
}

impl Content {
    /// Reads a file of vectors.
    ///
    /// # Errors
    /// A file that is missing or has other columns; a row of another width, a number that is not
    /// finite, an item that comes twice: with the row.
    pub fn read(path: &Path) -> Result<Content> {
        let reader = TableReader::open(path)?;
        let fields = [Field::new("item", Kind::U64), Field::list("vector", Kind::F32)];
        let mut content = Content { width: 0, items: Vec::new(), vectors: Vec::new() };
        let mut seen = HashSet::new();
        for group in 0..reader.groups() {
            let columns = reader.read(group, &fields).map_err(|error| match error {
                Error::Parquet { source, .. } => {
                    Error::data(path, format!("{source}; write it with zstd or no compression"))
                }
                other => other,
            })?;
            for (at, &item) in columns[0].u64s().iter().enumerate() {
                let row = content.items.len() + 1;
                let fail =
                    |reason| Err(Error::data(path, format!("row {row}, item {item}: {reason}")));
                let vector = &columns[1].f32s()[columns[1].range(at)];
                if content.items.is_empty() {
                    content.width = vector.len();
                }
                if vector.len() != content.width || vector.is_empty() {
                    let (width, first) = (vector.len(), content.width);
                    return fail(format!(
                        "its vector has {width} numbers, the first row's {first}; all must be as long, and not empty"
                    ));
                }
                if vector.len() > MAX_WIDTH {
                    let width = vector.len();
                    return fail(format!(
                        "its vector has {width} numbers, at most {MAX_WIDTH} are possible"
                    ));
                }
                if let Some(number) = vector.iter().find(|number| !number.is_finite()) {
                    return fail(format!("its vector holds {number}; leave such an item out"));
                }
                if !seen.insert(item) {
                    return fail("the item has a row already; each may have one".into());
                }
                content.items.push(item);
                content.vectors.extend(unit(vector));
            }
        }
        match content.items.is_empty() {
            true => Err(Error::data(path, "it has no row")),
            false => Ok(content),
        }
    }

    /// Writes them into a data set's directory.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let fields = vec![Field::new("item", Kind::I64), Field::list("vector", Kind::F32)];
        let mut writer = TableWriter::create(&dir.join(FILE), fields)?;
        let rows = self.items.chunks(ROWS_A_GROUP);
        for (items, vectors) in rows.zip(self.vectors.chunks(ROWS_A_GROUP * self.width)) {
            let ends = (0..=items.len()).map(|row| row * self.width).collect();
            writer.write(&[
                Column::scalars(Values::I64(items.iter().map(|&id| id as i64).collect())),
                Column::lists(Values::F32(vectors.to_vec()), ends),
            ])?;
        }
        writer.finish()
    }
}

/// The file in a data set's directory.
const FILE: &str = "content.parquet";

/// Puts the vectors of `from` into the data set in `dir`, or takes those away that an earlier import
/// left there. Returns how many items have one, and how many there are.
///
/// # Errors
/// What [`Content::read`] refuses; an item that the data set does not have.
pub fn import(from: Option<&Path>, dir: &Path, items: &[Item]) -> Result<Option<Coverage>> {
    let Some(from) = from else {
        let path = dir.join(FILE);
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(&path)(error))
            }
            _ => Ok(None),
        };
    };
    let content = Content::read(from)?;
    let known: HashSet<u64> = items.iter().map(|item| item.id).collect();
    if let Some(at) = content.items.iter().position(|item| !known.contains(item)) {
        let (row, item) = (at + 1, content.items[at]);
        let reason = format!(
            "row {row}: the data set has no item {item}; the ids are those of its items.parquet"
        );
        return Err(Error::data(from, reason));
    }
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    content.write(dir)?;
    Ok(Some(Coverage { width: content.width, with: content.items.len(), items: items.len() }))
}

/// How many items have a content vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Numbers a vector.
    pub width: usize,
    /// Items with one.
    pub with: usize,
    /// All items.
    pub items: usize,
}

/// Gives the items of the data set in `dir` their vectors; returns the width, 0 without a file.
pub(super) fn attach(dir: &Path, items: &mut HashMap<u64, Arc<Item>>) -> Result<usize> {
    let path = dir.join(FILE);
    if !path.is_file() {
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

/// A vector of zeros stays one.
fn unit(vector: &[f32]) -> impl Iterator<Item = f32> {
    let norm = vector.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
    vector.iter().map(move |&v| (f64::from(v) * scale) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, items: &[i64], lists: &[&[f32]]) {
        let fields = vec![Field::new("item", Kind::I64), Field::list("vector", Kind::F32)];
        let mut writer = TableWriter::create(path, fields).unwrap();
        let mut offsets = vec![0];
        lists.iter().for_each(|list| offsets.push(offsets.last().unwrap() + list.len()));
        writer
            .write(&[
                Column::scalars(Values::I64(items.to_vec())),
                Column::lists(Values::F32(lists.concat()), offsets),
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
        let coverage = import(Some(&from), dir.path(), &items).unwrap();
        assert_eq!(coverage, Some(Coverage { width: 2, with: 2, items: 3 }));
        let mut known: HashMap<u64, Arc<Item>> =
            items.iter().map(|item| (item.id, Arc::new(item.clone()))).collect();
        assert_eq!(attach(dir.path(), &mut known).unwrap(), 2);
        assert_eq!(&*known[&7].content, &[0.6, 0.8]);
        assert_eq!(&*known[&2].content, &[0.0, 0.0]);
        assert!(known[&9].content.is_empty());
        assert_eq!(import(None, dir.path(), &items).unwrap(), None);
        assert_eq!(attach(dir.path(), &mut known).unwrap(), 0, "the stale file is gone");
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
