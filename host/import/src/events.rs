//! Bodies of `POST /v1/events`, one a line: what a daemon was sent, or would have been.
//!
//! They are joined as a daemon joins them, by the same state machine, so that history and live
//! traffic come to the same: an impression waits for its outcomes as long as `[join]` says, and an
//! outcome that comes later corrects it. Events may stand in any order.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hypercast_config::JoinerOptions;
use hypercast_core::atomic_dir;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::entity_id::TextId;
use hypercast_data::dataset::ids::{ITEM_IDS, USER_IDS};
use hypercast_data::dataset::{Dataset, Impression};
use hypercast_data::features::{FeatureConfig, FeatureState};
use hypercast_data::schema::Schema;
use hypercast_fm::example::{Item, User};
use hypercast_stream::events::{EventKind, EventRecord};
use hypercast_stream::join::{JoinSink, JoinedRecord, Joiner, OutcomeRecord, StateUpdate};

use crate::error::{Error, Result};
use crate::id_collector::IdCollector;
use crate::input::{FileFormat, InputFile, InputOptions, Reading};
use crate::ranges::RangeInference;
use crate::report::{ImportReport, RowError, RowFailure};
use crate::requests::{RequestFormer, RequestRules};
use crate::sort::{ExternalSort, SortedRecords, time_of, time_part};
use crate::sorted_dataset::SortedDataset;

/// What a line of a file says.
#[derive(Debug, Default)]
pub struct ConvertedLine {
    /// Its events.
    pub events: Vec<EventKind>,
    /// The ids of its users, where the schema says that these are texts.
    pub users: Vec<Arc<TextId>>,
    /// The same of its items.
    pub items: Vec<Arc<TextId>>,
}

/// Converts a line of a file into its events, or says why it has none.
pub type ConvertLine<'a> = dyn Fn(&[u8]) -> std::result::Result<ConvertedLine, String> + 'a;

/// An import of events.
pub struct EventImport<'a> {
    /// Names of files, with `*` for any part of a name and `**` for folders.
    pub files: &'a [String],
    /// The schema that the bodies are of.
    pub schema: Arc<Schema>,
    /// How events are joined.
    pub join: JoinerOptions,
    /// Reads the lines of the files.
    pub convert: &'a ConvertLine<'a>,
}

/// What the lines of all files say.
struct LoggedEvents {
    items: BTreeMap<u64, Item>,
    users: BTreeMap<u64, User>,
    /// By their time; an action of the same millisecond comes after its impression.
    events: SortedRecords<2>,
}

impl EventImport<'_> {
    /// Imports the events into the data set `into`. Items and users have the features that came
    /// last, and items the content vectors.
    ///
    /// # Errors
    /// A file cannot be read, no line of one can be used, two ids have one key, or the file system
    /// fails.
    pub fn run(&self, into: &Path) -> Result<ImportReport> {
        let start = Instant::now();
        atomic_dir::create(into)?;
        let mut report = ImportReport::default();
        let LoggedEvents { mut items, users, mut events } = self.read(into, &mut report)?;
        let mut join = self.joiner(into)?;
        let mut last_ms = 0;
        while let Some(record) = events.next()? {
            last_ms = time_of(record.key[0]);
            join.take(last_ms, record.decode())?;
        }
        let rows = join.finish(last_ms, &mut report)?;
        let mut ranges = RangeInference::new(&self.schema);
        let requests = rows.finish(into, |row| {
            ranges.see(row);
            items.entry(row.item).or_insert_with(|| self.schema.blank_item(row.item));
        })?;
        SortedDataset {
            schema: &self.schema,
            items: items.into_values().collect(),
            item_names: Vec::new(),
            users: users.into_values().collect(),
            content: None,
            requests,
            ranges,
        }
        .write(into, report, start)
    }

    fn read(&self, into: &Path, report: &mut ImportReport) -> Result<LoggedEvents> {
        let options = InputOptions { format: Some(FileFormat::Jsonl), ..InputOptions::default() };
        let files = InputFile::find(self.files, Path::new(""), &options)?;
        let bytes = files.iter().map(InputFile::size).sum::<Result<u64>>()?;
        let mut progress = Progress::start("read bytes", bytes);
        let (mut items, mut users) = (BTreeMap::new(), BTreeMap::new());
        let ids = self.schema.ids;
        let mut user_ids = IdCollector::new(ids.users, into);
        let mut item_ids = IdCollector::new(ids.items, into);
        let mut events = ExternalSort::new(into);
        let mut content_width = None;
        for file in &files {
            let mut reading = Reading::new(&[], report, &mut progress);
            file.read_lines(&mut reading, |line| {
                let line = (self.convert)(line).map_err(RowError::of_line)?;
                for (ids, texts) in [(&mut user_ids, line.users), (&mut item_ids, line.items)] {
                    for id in texts {
                        ids.add(id.text())?;
                    }
                }
                for kind in line.events {
                    let key = |time_ms, is_action: bool| [time_part(time_ms), is_action.into()];
                    let key = match &kind {
                        EventKind::Item(item) => {
                            put_item(&mut items, &mut content_width, item.clone())?;
                            continue;
                        }
                        EventKind::User(user) => {
                            users.insert(user.id, user.clone());
                            continue;
                        }
                        // Times close windows here, not when the files say so.
                        EventKind::Tick { .. } | EventKind::Ranking(_) => continue,
                        EventKind::Impression(shown) => key(shown.time_ms, false),
                        EventKind::CompleteRequest(rows) => {
                            let Some(first) = rows.first() else { continue };
                            key(first.time_ms, false)
                        }
                        EventKind::Action(action) => key(action.time_ms, true),
                    };
                    events.push(key, &kind)?;
                }
                Ok::<(), RowFailure>(())
            })?;
        }
        progress.finish(&format!("{} files", files.len()));
        user_ids.finish(into, USER_IDS)?;
        item_ids.finish(into, ITEM_IDS)?;
        Ok(LoggedEvents { items, users, events: events.finish()? })
    }

    fn joiner(&self, into: &Path) -> Result<EventJoin> {
        let mut options = self.join.clone();
        // The past's times are believed, since it arrives at once.
        options.settings.max_future_s = 0;
        let nothing = Dataset {
            dir: into.to_path_buf(),
            schema: self.schema.clone(),
            items: Default::default(),
            item_names: Default::default(),
            users: Default::default(),
            rows: 0,
            content: 0,
        };
        let end_s = options.settings.max_window_s.saturating_add(options.settings.correction_s);
        let end_ms = i64::try_from(end_s.saturating_mul(1000)).unwrap_or(i64::MAX);
        let state = FeatureState::new(&nothing, FeatureConfig::default());
        let rules = RequestRules { one_row_an_item: true, ..RequestRules::default() };
        Ok(EventJoin {
            joiner: Joiner::new(state, options),
            sink: JoinedRows { rows: RequestFormer::new(into, &self.schema, rules), failure: None },
            end_ms,
        })
    }
}

/// Puts an item's newest features; its vector stays if `item` has none. All vectors have the width
/// of the first.
fn put_item(
    items: &mut BTreeMap<u64, Item>,
    width: &mut Option<usize>,
    mut item: Item,
) -> std::result::Result<(), RowError> {
    if item.content.is_empty() {
        item.content = items.get(&item.id).map(|known| known.content.clone()).unwrap_or_default();
    } else {
        let (found, width) = (item.content.len(), *width.get_or_insert(item.content.len()));
        if found != width {
            let id = item.id;
            return Err(RowError::of_line(format!(
                "item {id} has a content vector of {found} numbers; the first one has {width}"
            )));
        }
    }
    items.insert(item.id, item);
    Ok(())
}

/// Joins events, and collects the impressions with their outcomes.
struct EventJoin {
    joiner: Joiner,
    sink: JoinedRows,
    /// The time after the last event when no outcome can come any more.
    end_ms: i64,
}

impl EventJoin {
    fn take(&mut self, time_ms: i64, kind: EventKind) -> Result<()> {
        self.joiner.take(EventRecord { ingested_ms: time_ms, kind }, &mut self.sink);
        self.sink.failure.take().map_or(Ok(()), Err)
    }

    /// Closes all windows, and reports what led to nothing.
    fn finish(mut self, last_ms: i64, report: &mut ImportReport) -> Result<RequestFormer> {
        let time_ms = last_ms.saturating_add(self.end_ms);
        self.take(time_ms, EventKind::Tick { time_ms })?;
        let counts = self.joiner.counts();
        let unused = [
            ("actions without an impression", counts.orphaned),
            ("actions after the window and its time for corrections", counts.late),
            ("actions that changed nothing", counts.unchanged),
            ("impressions that came before", counts.repeated),
            ("they do not fit the schema", counts.refused),
        ];
        let unused = unused.into_iter().filter(|&(_, count)| count > 0);
        report.unused_events = unused.map(|(why, count)| (why.to_owned(), count)).collect();
        Ok(self.sink.rows)
    }
}

/// Keeps impressions as their outcomes become known.
struct JoinedRows {
    rows: RequestFormer,
    failure: Option<Error>,
}

impl JoinSink for JoinedRows {
    fn joined(&mut self, _: JoinedRecord) {}

    fn outcome(&mut self, outcome: OutcomeRecord) {
        let row: Impression = match outcome.update {
            StateUpdate::Outcome(row) | StateUpdate::Corrected(row) => row,
            StateUpdate::Item(_) | StateUpdate::User(_) => return,
        };
        if let Err(error) = self.rows.push(&row) {
            self.failure.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests;
