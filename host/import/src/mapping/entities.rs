//! Items and users with their features.

use std::collections::BTreeMap;

use hypercast_data::dataset::ContextFeatures;
use hypercast_fm::example::{Item, User};

use super::derived::{ColumnPlaces, DerivedColumn};
use super::source::{ColumnList, FeatureSources};
use super::{EntityMapping, Mapping};
use crate::error::Result;
use crate::id_collector::IdCollector;
use crate::input::{InputFile, Reading};
use crate::report::RowFailure;

/// An item or a user.
#[derive(Debug, Clone)]
pub(super) struct EntityRecord {
    features: ContextFeatures,
    name: String,
}

impl EntityRecord {
    /// Whether both say the same; a number that is missing is like any other that is.
    fn is_same(&self, other: &EntityRecord) -> bool {
        let (own, of_other) = (&self.features.dense, &other.features.dense);
        let is_same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
        let same_numbers = own.len() == of_other.len() && own.iter().zip(of_other).all(is_same);
        same_numbers && self.features.ids == other.features.ids && self.name == other.name
    }
}

/// All of one kind by id, or by the key of their id.
pub(super) type EntityRecords = BTreeMap<u64, EntityRecord>;

impl EntityMapping {
    pub(crate) fn find_files(&self, mapping: &Mapping) -> Result<Vec<InputFile>> {
        InputFile::find(&self.files, &mapping.folder, &self.options)
    }

    /// Reads the files. Of two rows of one id the last one counts; if they differ, the report says
    /// so.
    ///
    /// # Errors
    /// A file cannot be read, or no row of it can be used.
    pub(super) fn read(
        &self,
        files: &[InputFile],
        reading: &mut Reading<'_>,
        derived: &[DerivedColumn<'_>],
        ids: &mut IdCollector,
    ) -> Result<EntityRecords> {
        let mut columns = ColumnList::default();
        let id = columns.source(&self.id);
        let name = self.name.as_ref().map(|name| columns.source(name));
        let features = FeatureSources::new(&self.features, &mut columns);
        let mut records = EntityRecords::new();
        let places = ColumnPlaces::new(&columns, derived);
        for file in files {
            places.read_file(file, reading, |row| {
                let key = id.id(row, ids)?;
                let text = match &name {
                    None => String::new(),
                    Some(name) => {
                        name.checked(name.cell(row).text())?.unwrap_or_default().into_owned()
                    }
                };
                let mut record = EntityRecord { features: ContextFeatures::default(), name: text };
                features.read(row, &mut record.features)?;
                let is_other = records.get(&key).is_some_and(|before| !before.is_same(&record));
                records.insert(key, record);
                if is_other {
                    let cell = id.cell(row);
                    let shown = id.required(cell.text())?;
                    let reason = format!("`{shown}` has another row that differs; the last counts");
                    return Err(RowFailure::from(id.bad(reason)));
                }
                Ok(())
            })?;
        }
        features.report_cut(reading.report);
        Ok(records)
    }
}

/// Items in the order of their ids, and their names.
pub(super) fn items(records: &EntityRecords) -> (Vec<Item>, Vec<String>) {
    let item = |(&id, record): (&u64, &EntityRecord)| {
        let ContextFeatures { ids, dense } = record.features.clone();
        Item { id, ids, dense, ..Item::default() }
    };
    let is_named = records.values().any(|record| !record.name.is_empty());
    let names = records.values().filter(|_| is_named).map(|record| record.name.clone());
    (records.iter().map(item).collect(), names.collect())
}

/// Users in the order of their ids.
pub(super) fn users(records: &EntityRecords) -> Vec<User> {
    let user = |(&id, record): (&u64, &EntityRecord)| {
        let ContextFeatures { ids, dense } = record.features.clone();
        User { id, ids, dense }
    };
    records.iter().map(user).collect()
}

/// An item that no file describes.
pub(super) fn nameless() -> EntityRecord {
    EntityRecord { features: ContextFeatures::default(), name: String::new() }
}
