//! From rows in any order to the data set's order: first the rows of a request come together, then
//! the requests are sorted by time.

use std::path::Path;

use hypercast_core::progress::Progress;
use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_data::schema::Schema;
use hypercast_fm::example::Outcome;

use crate::error::Result;
use crate::packed_row::{RowLayout, item_bytes};
use crate::sort::{ExternalSort, SortKey, SortedRecords, time_of, time_part};

/// The most rows of a request, which are in memory together; more are another request.
const MAX_REQUEST_ROWS: usize = 10_000;

/// Rows between two looks at the clock.
pub(crate) const PROGRESS_ROWS: u64 = 4096;

/// What the rows of a request share, and then their time: the user, the key of the request's id,
/// the surface, the time.
type PlaceKey = SortKey<4>;

/// Collects rows, and forms requests of them.
pub(crate) struct RequestFormer {
    rows: ExternalSort<4>,
    layout: RowLayout,
    rules: RequestRules,
    /// The number of rows so far.
    count: u64,
    /// The row that was packed last.
    packed: Vec<u8>,
}

/// Which rows of one user, surface and request's id are a request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RequestRules {
    /// Rows further than this after the first are of another request.
    pub(crate) within_ms: Option<i64>,
    /// Rows behind so many are of another request.
    pub(crate) max_rows: Option<usize>,
    /// Whether an item has one row in a request, the one that came last. Else each row counts.
    pub(crate) one_row_an_item: bool,
}

/// Impressions in the order of a data set.
pub(crate) struct Requests {
    /// By time; requests of one time have an order that depends on their content alone.
    rows: SortedRecords<2>,
    layout: RowLayout,
    /// The number of rows that were collected.
    pub(crate) count: u64,
    last: Option<u64>,
    row: Impression,
    /// The number of requests so far, and of these and history-only rows.
    pub(crate) requests: u64,
    number: u64,
    /// How many rows say the same as an earlier one.
    pub(crate) repeated: u64,
}

impl RequestFormer {
    /// A former of a schema's impressions that sorts in `dir`.
    pub(crate) fn new(dir: &Path, schema: &Schema, rules: RequestRules) -> RequestFormer {
        RequestFormer {
            rows: ExternalSort::new(dir),
            layout: RowLayout::new(schema),
            rules,
            count: 0,
            packed: Vec::new(),
        }
    }

    /// Adds a row, whose `request` is the key of its id or 0.
    ///
    /// # Errors
    /// The sort's files cannot be written.
    pub(crate) fn push(&mut self, row: &Impression) -> Result<()> {
        self.count += 1;
        self.layout.pack(row, &mut self.packed);
        // History-only rows have no surface, and come behind a request of the same time.
        let surface = u64::from(row.surface) | u64::from(row.history_only) << u16::BITS;
        let key = [row.user, row.request, surface, time_part(row.time_ms)];
        self.rows.push_bytes(key, &self.packed)
    }

    /// Forms the requests. `each` is told of the rows in the order of their users.
    ///
    /// # Errors
    /// The sort's files cannot be written or read.
    pub(crate) fn finish(self, dir: &Path, mut each: impl FnMut(&Impression)) -> Result<Requests> {
        let RequestFormer { rows, layout, rules, count, .. } = self;
        let mut rows = rows.finish()?;
        let mut sorted = RequestSorter {
            by_time: ExternalSort::new(dir),
            row_bytes: layout.bytes(),
            open: Vec::new(),
            requests: 0,
            repeated: 0,
        };
        let mut row = no_row();
        let mut first: Option<PlaceKey> = None;
        let mut progress = Progress::start("form requests", count);
        let mut told = 0;
        let max_rows = rules.max_rows.map_or(MAX_REQUEST_ROWS, |most| most.min(MAX_REQUEST_ROWS));
        while let Some(record) = rows.next()? {
            told += 1;
            if told == PROGRESS_ROWS {
                progress.advance(std::mem::take(&mut told), String::new);
            }
            layout.unpack(record.bytes, &mut row);
            each(&row);
            let [.., time] = record.key;
            let is_joined = |first: &PlaceKey| {
                let apart_ms = time_of(time).saturating_sub(time_of(first[3]));
                first[..3] == record.key[..3]
                    && rules.within_ms.is_none_or(|within_ms| apart_ms <= within_ms)
                    && sorted.open.len() < max_rows * sorted.row_bytes
                    && !row.history_only
            };
            if !first.as_ref().is_some_and(is_joined) {
                sorted.close(first)?;
                first = Some(record.key);
            }
            sorted.add(record.bytes, rules.one_row_an_item);
        }
        sorted.close(first)?;
        progress.finish(&format!("{} requests", sorted.requests));
        let (rows, repeated) = (sorted.by_time.finish()?, sorted.repeated);
        let (last, row) = (None, no_row());
        Ok(Requests { rows, layout, count, last, row, requests: 0, number: 0, repeated })
    }
}

/// An impression to be filled in.
pub(crate) fn no_row() -> Impression {
    Impression {
        request: 0,
        time_ms: 0,
        outcome_ms: 0,
        user: 0,
        item: 0,
        surface: 0,
        outcome: Outcome::UNKNOWN,
        context: ContextFeatures::default(),
        truth: Vec::new(),
        history_only: false,
    }
}

/// Collects the rows of the current request, and sorts requests by time.
struct RequestSorter {
    by_time: ExternalSort<2>,
    row_bytes: usize,
    /// The packed rows of the current request.
    open: Vec<u8>,
    /// The number of requests before it.
    requests: u64,
    repeated: u64,
}

impl RequestSorter {
    fn add(&mut self, row: &[u8], one_row_an_item: bool) {
        let mut rows = self.open.chunks_exact_mut(self.row_bytes);
        let is_same = |other: &&mut [u8]| item_bytes(other) == item_bytes(row);
        let before = if one_row_an_item { rows.find(is_same) } else { None };
        match before {
            Some(before) => before.copy_from_slice(row),
            None => self.open.extend_from_slice(row),
        }
    }

    /// Hands on the rows of the current request, which has the time of its first one, and counts
    /// those that say the same as an earlier one.
    fn close(&mut self, first: Option<PlaceKey>) -> Result<()> {
        let Some([.., time]) = first else { return Ok(()) };
        let mut rows: Vec<&[u8]> = self.open.chunks_exact(self.row_bytes).collect();
        for row in &rows {
            self.by_time.push_bytes([time, self.requests], row)?;
        }
        rows.sort_unstable();
        self.repeated += rows.windows(2).filter(|pair| pair[0] == pair[1]).count() as u64;
        self.requests += 1;
        self.open.clear();
        Ok(())
    }
}

impl Requests {
    /// The next impression, with the number of its request; none at the end.
    ///
    /// # Errors
    /// The sort's files cannot be read.
    pub(crate) fn next(&mut self) -> Result<Option<&Impression>> {
        let Some(record) = self.rows.next()? else { return Ok(None) };
        let [time, request] = record.key;
        self.layout.unpack(record.bytes, &mut self.row);
        if self.last.replace(request) != Some(request) {
            self.number += 1;
            self.requests += u64::from(!self.row.history_only);
        }
        (self.row.request, self.row.time_ms) = (self.number, time_of(time));
        Ok(Some(&self.row))
    }
}
