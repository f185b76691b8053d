//! From rows in any order to the data set's order: first the rows of a request come together, then
//! the requests are sorted by time.

use std::path::Path;

use hypercast_core::progress::Progress;
use hypercast_data::dataset::Impression;
use serde::{Deserialize, Serialize};

use crate::count_repeated;
use crate::error::Result;
use crate::sort::{ExternalSort, SortedRecords};

/// The most rows of a request, which are in memory together; more are another request.
const MAX_REQUEST_ROWS: usize = 10_000;

/// What the rows of a request share, and their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct PlaceKey {
    user: u64,
    surface: u16,
    /// The key of the request's id; 0 without one.
    request: u64,
    time_ms: i64,
}

impl PlaceKey {
    fn is_same_place(&self, other: &PlaceKey) -> bool {
        (self.user, self.surface, self.request) == (other.user, other.surface, other.request)
    }
}

/// The order of a data set. Requests of one time have numbers that depend on their content alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct TimeKey {
    time_ms: i64,
    request: u64,
}

/// Collects rows, and forms requests of them.
pub(crate) struct RequestFormer {
    rows: ExternalSort<PlaceKey>,
    rules: RequestRules,
    /// The number of rows so far.
    count: u64,
}

/// Which rows of one user, surface and request's id are a request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RequestRules {
    /// Rows further than this after the first are of another request.
    pub(crate) within_ms: Option<i64>,
    /// Whether an item has one row in a request, the one that came last. Else each row counts.
    pub(crate) one_row_an_item: bool,
}

/// Impressions in the order of a data set.
pub(crate) struct Requests {
    rows: SortedRecords<TimeKey>,
    /// The number of rows that were collected.
    pub(crate) count: u64,
    last: Option<u64>,
    /// The number of requests so far.
    pub(crate) requests: u64,
    /// How many rows say the same as an earlier one.
    pub(crate) repeated: u64,
}

impl RequestFormer {
    /// A former that sorts in `dir`.
    pub(crate) fn new(dir: &Path, rules: RequestRules) -> RequestFormer {
        RequestFormer { rows: ExternalSort::new(dir), rules, count: 0 }
    }

    /// Adds a row, whose `request` is the key of its id or 0.
    pub(crate) fn push(&mut self, row: &Impression) -> Result<()> {
        let &Impression { user, surface, request, time_ms, .. } = row;
        self.count += 1;
        self.rows.push(PlaceKey { user, surface, request, time_ms }, row)
    }

    /// Forms the requests. `each` is told of the rows in the order of their users.
    pub(crate) fn finish(self, dir: &Path, mut each: impl FnMut(&Impression)) -> Result<Requests> {
        let mut rows = self.rows.finish()?;
        let mut by_time = ExternalSort::new(dir);
        let mut open: Vec<Impression> = Vec::new();
        let mut first: Option<PlaceKey> = None;
        let (mut request, mut repeated) = (0, 0);
        let mut progress = Progress::start("form requests", self.count);
        while let Some(record) = rows.next()? {
            progress.advance(1, String::new);
            let mut row: Impression = record.decode();
            each(&row);
            let joined = first.filter(|first| {
                let apart_ms = record.key.time_ms.saturating_sub(first.time_ms);
                first.is_same_place(&record.key)
                    && self.rules.within_ms.is_none_or(|within_ms| apart_ms <= within_ms)
                    && open.len() < MAX_REQUEST_ROWS
            });
            if joined.is_none() {
                repeated += write_request(&mut by_time, &mut open)?;
                request += 1;
            }
            let key = *first.insert(joined.unwrap_or(record.key));
            (row.request, row.time_ms) = (request, key.time_ms);
            let is_same = |other: &&mut Impression| other.item == row.item;
            match open.iter_mut().find(is_same).filter(|_| self.rules.one_row_an_item) {
                Some(before) => *before = row,
                None => open.push(row),
            }
        }
        repeated += write_request(&mut by_time, &mut open)?;
        progress.finish(&format!("{request} requests"));
        let (rows, count) = (by_time.finish()?, self.count);
        Ok(Requests { rows, count, last: None, requests: 0, repeated })
    }
}

/// Hands on the rows of a request, and counts those that say the same as an earlier one.
fn write_request(by_time: &mut ExternalSort<TimeKey>, open: &mut Vec<Impression>) -> Result<u64> {
    // Most requests of some logs are one row.
    let repeated = if open.len() > 1 { count_repeated(open) } else { 0 };
    for row in open.drain(..) {
        by_time.push(TimeKey { time_ms: row.time_ms, request: row.request }, &row)?;
    }
    Ok(repeated)
}

impl Requests {
    /// The next impression, with the number of its request; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Impression>> {
        let Some(record) = self.rows.next()? else { return Ok(None) };
        let mut row: Impression = record.decode();
        if self.last.replace(record.key.request) != Some(record.key.request) {
            self.requests += 1;
        }
        row.request = self.requests;
        Ok(Some(row))
    }
}
