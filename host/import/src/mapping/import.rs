//! The import by a mapping: read, sort twice on disk, write.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use hypercast_core::atomic_dir;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::ids::{ITEM_IDS, USER_IDS};
use hypercast_data::schema::Schema;

use super::Mapping;
use super::entities::{EntityRecords, items, nameless, users};
use super::impressions::{IdCollectors, ImpressionSources, to_ms};
use crate::error::Result;
use crate::id_collector::IdCollector;
use crate::input::{InputFile, Reading};
use crate::ranges::RangeInference;
use crate::report::ImportReport;
use crate::requests::{RequestFormer, RequestRules};
use crate::sorted_dataset::SortedDataset;

/// Imports the files that a mapping names into the data set `into`.
///
/// Memory does not grow with the impressions: they are sorted on disk, in `into`, in runs of 256
/// MiB. Items and users with their features are in memory, as in everything that reads the data
/// set.
///
/// # Errors
/// A file is missing or cannot be read, no row of one can be used, two ids that are texts have the
/// same key, or the file system fails.
pub fn import(mapping: &Mapping, into: &Path) -> Result<ImportReport> {
    let start = Instant::now();
    let schema = mapping.schema()?;
    atomic_dir::create(into)?;
    let mut import = MappedImport::new(mapping, &schema, into)?;
    let (item_records, user_records) = import.read_entities()?;
    let former = import.read_impressions(&item_records, &user_records)?;
    let MappedImport { ids, report, seen_items, progress, .. } = import;
    progress.finish(&format!("{} files", report.files.len()));
    let mut ranges = RangeInference::new(&schema);
    let requests = former.finish(into, |row| ranges.see(row))?;
    ids.users.finish(into, USER_IDS)?;
    ids.items.finish(into, ITEM_IDS)?;
    let item_records = item_records.unwrap_or_else(|| {
        seen_items.into_iter().map(|item| (item, nameless())).collect::<EntityRecords>()
    });
    let (items, item_names) = items(&item_records);
    let users = user_records.as_ref().map(users).unwrap_or_default();
    SortedDataset { schema: &schema, items, item_names, users, requests, ranges }
        .write(into, report, start)
}

/// An import while it reads.
struct MappedImport<'a> {
    mapping: &'a Mapping,
    schema: &'a Schema,
    into: &'a Path,
    impression_files: Vec<InputFile>,
    item_files: Vec<InputFile>,
    user_files: Vec<InputFile>,
    ids: IdCollectors,
    /// The items of the impressions, if no file has them.
    seen_items: BTreeSet<u64>,
    report: ImportReport,
    progress: Progress,
}

impl<'a> MappedImport<'a> {
    fn new(mapping: &'a Mapping, schema: &'a Schema, into: &'a Path) -> Result<Self> {
        let impressions = &mapping.impressions;
        let impression_files =
            InputFile::find(&impressions.files, &mapping.folder, &impressions.options)?;
        let of_entity = |entity: &Option<super::EntityMapping>| {
            entity.as_ref().map_or(Ok(Vec::new()), |entity| entity.find_files(mapping))
        };
        let (item_files, user_files) = (of_entity(&mapping.items)?, of_entity(&mapping.users)?);
        let files = impression_files.iter().chain(&item_files).chain(&user_files);
        let bytes = files.map(InputFile::size).sum::<Result<u64>>()?;
        Ok(MappedImport {
            mapping,
            schema,
            into,
            impression_files,
            item_files,
            user_files,
            ids: IdCollectors {
                users: IdCollector::new(schema.ids.users, into),
                items: IdCollector::new(schema.ids.items, into),
            },
            seen_items: BTreeSet::new(),
            report: ImportReport::default(),
            progress: Progress::start("read bytes", bytes),
        })
    }

    /// Items and users, if the mapping has files of them.
    fn read_entities(&mut self) -> Result<(Option<EntityRecords>, Option<EntityRecords>)> {
        let mut reading = Reading::new(&[], &mut self.report, &mut self.progress);
        let items = self.mapping.items.as_ref();
        let items =
            items.map(|items| items.read(&self.item_files, &mut reading, &mut self.ids.items));
        let users = self.mapping.users.as_ref();
        let users =
            users.map(|users| users.read(&self.user_files, &mut reading, &mut self.ids.users));
        Ok((items.transpose()?, users.transpose()?))
    }

    fn read_impressions(
        &mut self,
        items: &Option<EntityRecords>,
        users: &Option<EntityRecords>,
    ) -> Result<RequestFormer> {
        let sources = ImpressionSources::new(self.mapping, self.schema);
        let within_ms = self.mapping.impressions.request_within_s.map(to_ms);
        let rules = RequestRules { within_ms, one_row_an_item: false };
        let mut former = RequestFormer::new(self.into, rules);
        let (mut unknown_items, mut unknown_users) = (0, 0);
        for file in &self.impression_files {
            let columns = &sources.columns.names;
            let mut reading = Reading::new(columns, &mut self.report, &mut self.progress);
            file.read(&mut reading, |row| {
                let row = sources.read(row, &mut self.ids)?;
                match items {
                    Some(items) => unknown_items += u64::from(!items.contains_key(&row.item)),
                    None => {
                        self.seen_items.insert(row.item);
                    }
                }
                let is_known = users.as_ref().is_none_or(|users| users.contains_key(&row.user));
                unknown_users += u64::from(!is_known);
                Ok(former.push(&row)?)
            })?;
        }
        self.report.of_unknown_items = unknown_items;
        self.report.of_unknown_users = unknown_users;
        Ok(former)
    }
}
