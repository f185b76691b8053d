//! The order of rows, and how they form requests.
//!
//! Rows of one time are compared with each other, and a sample of requests with all earlier ones:
//! so memory is bounded, and what is sorted needs no more.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher as _};

use hypercast_core::hash::mix64;

use super::CheckedRow;
use super::finding::{Finding, FindingKind, IMPRESSIONS, Severity, Tally};
use crate::dataset::Impression;

/// From how many rows on a request is very large.
const LARGE_REQUEST: u64 = 1000;

/// The most rows of one time that are compared with each other.
const MAX_ROWS_OF_A_TIME: usize = 1 << 16;

/// The most ids of requests that are kept to find those that come again.
const MAX_REQUEST_IDS: usize = 1 << 17;

/// Looks at the order of rows.
#[derive(Default)]
pub(super) struct RequestCheck {
    last_ms: Option<i64>,
    unsorted: Tally,
    /// The request of the row before.
    open: Option<RequestUnderCheck>,
    requests: u64,
    scattered: Tally,
    mixed: Tally,
    repeated_items: Tally,
    repeated_rows: Tally,
    large: Tally,
    largest: u64,
    /// What the rows of `last_ms` say.
    ended: HashSet<u64>,
    shown_items: HashSet<(u64, u64)>,
    said: HashSet<u64>,
    ids: RequestIdSample,
}

/// A request whose rows are being read.
struct RequestUnderCheck {
    request: u64,
    user: u64,
    surface: u16,
    first_row: u64,
    rows: u64,
}

impl RequestCheck {
    pub(super) fn see(&mut self, row: CheckedRow<'_>) {
        let CheckedRow { number, impression, .. } = row;
        let time_ms = impression.time_ms;
        if self.last_ms.is_some_and(|last_ms| time_ms < last_ms) {
            self.unsorted.add(number);
        }
        if self.last_ms != Some(time_ms) {
            self.close();
            self.ended.clear();
            self.shown_items.clear();
            self.said.clear();
            self.last_ms = Some(time_ms);
        }
        if impression.history_only {
            return self.close();
        }
        self.see_request(number, impression);
        self.see_content(number, impression);
    }

    fn see_request(&mut self, number: u64, impression: &Impression) {
        let Impression { request, user, surface, .. } = *impression;
        if let Some(open) = self.open.as_mut().filter(|open| open.request == request) {
            open.rows += 1;
            if (open.user, open.surface) != (user, surface) {
                self.mixed.add(number);
            }
            return;
        }
        self.close();
        if self.ended.contains(&request) {
            self.scattered.add(number);
        } else {
            self.requests += 1;
            self.ids.see(request, number);
        }
        self.open = Some(RequestUnderCheck { request, user, surface, first_row: number, rows: 1 });
    }

    /// Compares a row with those of its time.
    fn see_content(&mut self, number: u64, impression: &Impression) {
        if self.said.len() >= MAX_ROWS_OF_A_TIME {
            return;
        }
        let Impression { request, item, .. } = *impression;
        let is_repeated_item = !self.shown_items.insert((request, item));
        if is_repeated_item {
            self.repeated_items.add(number);
        }
        if !self.said.insert(fingerprint(impression)) && !is_repeated_item {
            self.repeated_rows.add(number);
        }
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if open.rows >= LARGE_REQUEST {
            self.large.add(open.first_row);
            self.largest = self.largest.max(open.rows);
        }
        if self.ended.len() < MAX_ROWS_OF_A_TIME {
            self.ended.insert(open.request);
        }
    }

    /// Whether no row so far is earlier than the one before it.
    pub(super) fn is_sorted(&self) -> bool {
        self.unsorted.count == 0
    }

    /// Adds what was found, and returns the number of requests.
    pub(super) fn finish(mut self, findings: &mut Vec<Finding>) -> u64 {
        use FindingKind as Kind;
        use Severity::{Refused, Warned};

        self.close();
        let found = |rows: Tally, severity, kind, what: String, advice: &str| {
            Finding::new(severity, kind, IMPRESSIONS, what).rows(rows).advice(advice)
        };
        if let Some(rows) = self.unsorted.any() {
            let what = format!(
                "{} rows are earlier than the row before them: a model would learn from the future",
                rows.count
            );
            let advice = "sort the rows by `time_ms`, those of a request together; `hypercast data \
                          import` does it";
            let finding = found(rows, Refused, Kind::Unsorted, what, advice);
            findings.push(finding.column("time_ms"));
            // Whatever else is said of requests follows from it.
            return self.requests;
        }
        if let Some(rows) = self.scattered.any() {
            let what =
                format!("{} times, rows of a request stand between those of another", rows.count);
            let advice = "sort the rows by `time_ms` and `request`";
            let finding = found(rows, Refused, Kind::ScatteredRequest, what, advice);
            let forced = "each part counts as a request of its own";
            findings.push(finding.column("request").forced(forced));
        }
        if let Some(rows) = self.mixed.any() {
            let what =
                format!("{} rows have another user or surface than their request", rows.count);
            let advice = "give every user and surface requests of their own";
            let finding = found(rows, Refused, Kind::MixedRequest, what, advice);
            let forced = "such rows count for the user and surface of the request's first row";
            findings.push(finding.column("request").forced(forced));
        }
        if let Some(rows) = self.ids.again.any() {
            let what = format!(
                "about {} requests have the id of an earlier one at another time, and count as \
                 requests of their own",
                rows.count
            );
            let advice = "if they are one request, give all its rows one `time_ms`";
            findings.push(found(rows, Warned, Kind::RepeatedRequest, what, advice));
        }
        if let Some(rows) = self.repeated_items.any() {
            let what = format!("{} rows show an item that their request shows already", rows.count);
            let advice = "the daemon takes the first as the impression; keep one row of an item";
            findings.push(found(rows, Warned, Kind::RepeatedItem, what, advice));
        }
        if let Some(rows) = self.repeated_rows.any() {
            let what =
                format!("{} rows say the same as another request's at that time", rows.count);
            let advice = "they count twice; do files overlap?";
            findings.push(found(rows, Warned, Kind::RepeatedRow, what, advice));
        }
        if let Some(rows) = self.large.any() {
            let what = format!(
                "{} requests have {LARGE_REQUEST} rows or more, the largest {}; training splits them \
                 into examples of `fm.max_targets` rows and reads the user's history for each",
                rows.count, self.largest
            );
            let advice = "log only what was seen, and see `server.max_candidates` for what the \
                          daemon takes; if they are no requests, set `request_within_s`";
            findings.push(found(rows, Warned, Kind::LargeRequest, what, advice));
        }
        self.requests
    }
}

/// What a row says, but for the id of its request.
fn fingerprint(row: &Impression) -> u64 {
    let mut hasher = DefaultHasher::new();
    (row.user, row.item, row.surface, row.outcome_ms).hash(&mut hasher);
    (row.outcome.actions, row.outcome.known).hash(&mut hasher);
    row.outcome.values.map(f32::to_bits).hash(&mut hasher);
    hasher.finish()
}

/// Finds ids that come again, of a sample of ids that gets thinner as there are more of them.
#[derive(Default)]
struct RequestIdSample {
    /// Ids whose hash begins with that many zeros are in the sample.
    zeros: u32,
    seen: HashSet<u64>,
    /// The number is an estimate if not all were kept.
    again: Tally,
}

impl RequestIdSample {
    fn see(&mut self, request: u64, row: u64) {
        if mix64(request).leading_zeros() < self.zeros {
            return;
        }
        if !self.seen.insert(request) {
            if self.again.count == 0 {
                self.again.first = row;
            }
            self.again.count += 1 << self.zeros;
        }
        while self.seen.len() > MAX_REQUEST_IDS {
            self.zeros += 1;
            self.seen.retain(|&id| mix64(id).leading_zeros() >= self.zeros);
        }
    }
}
