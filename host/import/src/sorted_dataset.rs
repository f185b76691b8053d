//! Writes a data set whose impressions were sorted on disk.

use std::path::Path;
use std::time::Instant;

use hypercast_core::progress::Progress;
use hypercast_data::dataset::{Entities, ImpressionWriter, content, write_entities};
use hypercast_data::error::write_json;
use hypercast_data::schema::Schema;
use hypercast_fm::example::{Item, User};

use crate::error::Result;
use crate::ranges::RangeInference;
use crate::report::ImportReport;
use crate::requests::{PROGRESS_ROWS, Requests};

/// What an import read, but for dictionaries of ids.
pub(crate) struct SortedDataset<'a> {
    pub(crate) schema: &'a Schema,
    pub(crate) items: Vec<Item>,
    /// The items' names, in the same order; empty if there are none.
    pub(crate) item_names: Vec<String>,
    pub(crate) users: Vec<User>,
    /// A file of the items' content vectors; without it they are those that the items have.
    pub(crate) content: Option<&'a Path>,
    pub(crate) requests: Requests,
    /// Has seen all impressions.
    pub(crate) ranges: RangeInference<'a>,
}

impl SortedDataset<'_> {
    /// Writes all files of the data set, with ranges where the schema has none, and the report of
    /// an import that began at `start`.
    ///
    /// # Errors
    /// The content vectors cannot be read, or the file system fails.
    pub(crate) fn write(
        mut self,
        into: &Path,
        mut report: ImportReport,
        start: Instant,
    ) -> Result<ImportReport> {
        report.ranges = self.ranges.inferred(&self.items, &self.users);
        let mut schema = self.schema.clone();
        schema.ranges.extend(report.ranges.iter().map(|inferred| inferred.range.clone()));
        let entities = Entities {
            schema: &schema,
            items: &self.items,
            item_names: &self.item_names,
            users: &self.users,
        };
        write_entities(into, &entities)?;
        // Without any, those that an earlier import left here go.
        if let Some(content) = content::import(self.content, into, &self.items)? {
            report.items_with_content = content.items.len() as u64;
            report.content_width = content.width as u64;
        }
        let mut writer = ImpressionWriter::create(into, &schema);
        let mut progress = Progress::start("write impressions", self.requests.count);
        while let Some(row) = self.requests.next()? {
            writer.write(row)?;
            report.impressions += 1;
            report.history_only += u64::from(row.history_only);
            if report.impressions.is_multiple_of(PROGRESS_ROWS) {
                progress.advance(PROGRESS_ROWS, String::new);
            }
        }
        writer.finish()?;
        progress.finish(&format!("{} rows", report.impressions));
        (report.requests, report.repeated) = (self.requests.requests, self.requests.repeated);
        (report.items, report.users) = (self.items.len() as u64, self.users.len() as u64);
        report.seconds = start.elapsed().as_secs_f64();
        write_json(&into.join("import-report.json"), &report)?;
        Ok(report)
    }
}
