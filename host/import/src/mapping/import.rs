//! The import by a mapping: read, sort twice on disk, write.

use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use hypercast_core::atomic_dir;
use hypercast_core::hash::IdHashKey;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::Impression;
use hypercast_data::dataset::ids::{ITEM_IDS, USER_IDS};
use hypercast_data::schema::Schema;

use super::derived::{ColumnPlaces, DerivedColumn};
use super::entities::{EntityRecords, items, nameless, users};
use super::impressions::{IdCollectors, ImpressionSources, to_ms};
use super::{EntityMapping, Mapping};
use crate::error::Result;
use crate::id_collector::IdCollector;
use crate::input::{InputFile, Reading};
use crate::ranges::RangeInference;
use crate::report::{ImportReport, RowError, RowFailure};
use crate::requests::{RequestFormer, RequestRules, no_row};
use crate::sorted_dataset::SortedDataset;

/// Imports the files that a mapping names into the data set `into`. `content` is a file of content
/// vectors of the items (see `dataset::content`).
///
/// Memory does not grow with the impressions: they are sorted on disk, in `into`, in runs of 128
/// MiB. Items and users with their features are in memory, as in everything that reads the data
/// set.
///
/// # Errors
/// A file is missing or cannot be read, no row of one can be used, two ids that are texts have the
/// same key, or the file system fails.
pub fn import(mapping: &Mapping, content: Option<&Path>, into: &Path) -> Result<ImportReport> {
    PresetImport { mapping, derived: &[], more_impressions: &|_| Ok(()), content }.run(into)
}

/// An import by a mapping, with what it cannot say.
pub(crate) struct PresetImport<'a> {
    pub(crate) mapping: &'a Mapping,
    /// Columns that the mapping names and no file has.
    pub(crate) derived: &'a [DerivedColumn<'a>],
    /// Adds impressions of files that are not rows of impressions.
    pub(crate) more_impressions: &'a dyn Fn(&mut ImpressionSink<'_>) -> Result<()>,
    /// A file of content vectors.
    pub(crate) content: Option<&'a Path>,
}

impl PresetImport<'_> {
    /// Imports into the data set `into`.
    ///
    /// # Errors
    /// As those of [`import`].
    pub(crate) fn run(&self, into: &Path) -> Result<ImportReport> {
        let start = Instant::now();
        let schema = self.mapping.schema()?;
        atomic_dir::create(into)?;
        let mut import = MappedImport::new(self, &schema, into)?;
        let (item_records, user_records) = import.read_entities()?;
        let (former, seen_items) = import.read_impressions(&item_records, &user_records)?;
        let MappedImport { ids, report, progress, .. } = import;
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
        let content = self.content;
        SortedDataset { schema: &schema, items, item_names, users, content, requests, ranges }
            .write(into, report, start)
    }
}

/// An import while it reads.
struct MappedImport<'a> {
    of: &'a PresetImport<'a>,
    schema: &'a Schema,
    into: &'a Path,
    impression_files: Vec<InputFile>,
    item_files: Vec<InputFile>,
    user_files: Vec<InputFile>,
    ids: IdCollectors,
    report: ImportReport,
    progress: Progress,
}

impl<'a> MappedImport<'a> {
    fn new(of: &'a PresetImport<'a>, schema: &'a Schema, into: &'a Path) -> Result<Self> {
        let mapping = of.mapping;
        let impression_files = mapping.impressions.find_files(mapping)?;
        let of_entity = |entity: &Option<EntityMapping>| {
            entity.as_ref().map_or(Ok(Vec::new()), |entity| entity.find_files(mapping))
        };
        let (item_files, user_files) = (of_entity(&mapping.items)?, of_entity(&mapping.users)?);
        let files = impression_files.iter().chain(&item_files).chain(&user_files);
        let bytes = files.map(InputFile::size).sum::<Result<u64>>()?;
        Ok(MappedImport {
            of,
            schema,
            into,
            impression_files,
            item_files,
            user_files,
            ids: IdCollectors {
                users: IdCollector::new(schema.ids.users, into),
                items: IdCollector::new(schema.ids.items, into),
            },
            report: ImportReport::default(),
            progress: Progress::start("read bytes", bytes),
        })
    }

    /// Items and users, if the mapping has files of them.
    fn read_entities(&mut self) -> Result<(Option<EntityRecords>, Option<EntityRecords>)> {
        let PresetImport { mapping, derived, .. } = *self.of;
        let mut reading = Reading::new(&[], &mut self.report, &mut self.progress);
        let items = mapping
            .items
            .as_ref()
            .map(|items| items.read(&self.item_files, &mut reading, derived, &mut self.ids.items));
        let users = mapping
            .users
            .as_ref()
            .map(|users| users.read(&self.user_files, &mut reading, derived, &mut self.ids.users));
        Ok((items.transpose()?, users.transpose()?))
    }

    /// The impressions, and their items if no file has these.
    fn read_impressions(
        &mut self,
        items: &Option<EntityRecords>,
        users: &Option<EntityRecords>,
    ) -> Result<(RequestFormer, HashSet<u64, IdHashKey>)> {
        let PresetImport { mapping, derived, more_impressions, .. } = *self.of;
        let sources = ImpressionSources::new(mapping, self.schema);
        let places = ColumnPlaces::new(&sources.columns, derived);
        let within_ms = mapping.impressions.request_within_s.map(to_ms);
        let max_rows = mapping.impressions.request_rows;
        let rules = RequestRules { within_ms, max_rows, one_row_an_item: false };
        let mut sink = ImpressionSink {
            former: RequestFormer::new(self.into, self.schema, rules),
            items: KnownIds::new("items", &mapping.impressions.item, &mapping.items, items),
            users: KnownIds::new("users", &mapping.impressions.user, &mapping.users, users),
            report: &mut self.report,
        };
        let mut row = no_row();
        for file in &self.impression_files {
            let mut reading = Reading::new(&[], sink.report, &mut self.progress);
            let (former, items, users) = (&mut sink.former, &mut sink.items, &mut sink.users);
            places.read_file(file, &mut reading, |cells| {
                sources.read(cells, &mut self.ids, &mut row)?;
                users.see(row.user)?;
                items.see(row.item)?;
                Ok(former.push(&row)?)
            })?;
        }
        more_impressions(&mut sink)?;
        sources.context.report_cut(sink.report);
        sink.report.times_without_zone = sources.times_without_zone();
        sink.report.of_unknown_items = sink.items.unknown;
        sink.report.of_unknown_users = sink.users.unknown;
        Ok((sink.former, sink.items.seen))
    }
}

/// Takes impressions into the sort, if their items and users may have some.
pub(crate) struct ImpressionSink<'a> {
    former: RequestFormer,
    items: KnownIds<'a>,
    users: KnownIds<'a>,
    pub(crate) report: &'a mut ImportReport,
}

impl ImpressionSink<'_> {
    /// Adds an impression that stands in a line of the file that was opened last, or counts one
    /// that cannot be used.
    ///
    /// # Errors
    /// The sort's files cannot be written.
    pub(crate) fn add(
        &mut self,
        line: u64,
        row: std::result::Result<Impression, RowError>,
    ) -> Result<()> {
        let push = || {
            let row = row?;
            self.users.see(row.user)?;
            self.items.see(row.item)?;
            Ok::<(), RowFailure>(self.former.push(&row)?)
        };
        let outcome = push();
        self.report.row(line, outcome)
    }
}

/// The ids of items or users that files have.
struct KnownIds<'a> {
    what: &'static str,
    /// The column of impressions that names them.
    column: &'a str,
    /// The ids of the files, or if there are none, of impressions.
    seen: HashSet<u64, IdHashKey>,
    has_files: bool,
    required: bool,
    /// How many impressions were of others.
    unknown: u64,
}

impl<'a> KnownIds<'a> {
    fn new(
        what: &'static str,
        column: &'a str,
        mapping: &Option<EntityMapping>,
        records: &Option<EntityRecords>,
    ) -> KnownIds<'a> {
        let seen = records.iter().flat_map(|records| records.keys().copied()).collect();
        let required = mapping.as_ref().is_some_and(|mapping| mapping.required);
        KnownIds { what, column, seen, has_files: records.is_some(), required, unknown: 0 }
    }

    /// Takes the id of an impression into account, or says why it cannot be.
    fn see(&mut self, id: u64) -> std::result::Result<(), RowError> {
        if self.seen.contains(&id) {
            return Ok(());
        }
        if !self.has_files {
            self.seen.insert(id);
        } else if self.required {
            let reason = format!("the files of {} have no row of it", self.what);
            return Err(RowError { column: self.column.to_owned(), reason });
        } else {
            self.unknown += 1;
        }
        Ok(())
    }
}
