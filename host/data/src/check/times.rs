//! The unit and the years of times, and how outcomes stand to their impressions.

use std::collections::BTreeMap;

use hypercast_core::clock::{format_time, likely_unit, now_ms};

use super::CheckedRow;
use super::finding::{Finding, FindingKind, IMPRESSIONS, Severity, Tally};

/// 1990 and 2100: the log of a recommender is from some time between.
const PLAUSIBLE_MS: std::ops::Range<i64> = 631_152_000_000..4_102_444_800_000;

/// Clocks and zones differ by less.
const DAY_MS: i64 = 86_400_000;

/// Looks at the times of rows and their outcomes.
pub(super) struct TimeCheck {
    now_ms: i64,
    /// The earliest time of a request.
    pub(super) first: Option<i64>,
    /// The latest.
    pub(super) last: Option<i64>,
    rows: u64,
    /// Rows whose time looks like another unit, by its name, and one of these times.
    units: BTreeMap<&'static str, (Tally, i64)>,
    /// Rows whose time is implausible in any unit.
    odd: Tally,
    odd_ms: i64,
    early: Tally,
    /// Rows that are later than now.
    future: Tally,
    instant: u64,
}

impl TimeCheck {
    pub(super) fn new() -> Self {
        TimeCheck {
            now_ms: now_ms(),
            first: None,
            last: None,
            rows: 0,
            units: BTreeMap::new(),
            odd: Tally::default(),
            odd_ms: 0,
            early: Tally::default(),
            future: Tally::default(),
            instant: 0,
        }
    }

    pub(super) fn see(&mut self, row: CheckedRow<'_>) {
        let (time_ms, outcome_ms) = (row.impression.time_ms, row.impression.outcome_ms);
        if outcome_ms < time_ms {
            self.early.add(row.number);
        }
        if row.impression.history_only {
            return;
        }
        self.rows += 1;
        self.instant += u64::from(outcome_ms == time_ms);
        self.first = Some(self.first.map_or(time_ms, |first| first.min(time_ms)));
        self.last = Some(self.last.map_or(time_ms, |last| last.max(time_ms)));
        if PLAUSIBLE_MS.contains(&time_ms) {
            if time_ms > self.now_ms + DAY_MS {
                self.future.add(row.number);
            }
            return;
        }
        if let Some(unit) = likely_unit(time_ms).filter(|unit| *unit != "milliseconds") {
            let (rows, example) = self.units.entry(unit).or_insert((Tally::default(), time_ms));
            rows.add(row.number);
            *example = time_ms;
        } else {
            self.odd.add(row.number);
            self.odd_ms = time_ms;
        }
    }

    pub(super) fn finish(self, findings: &mut Vec<Finding>) {
        use FindingKind as Kind;
        use Severity::{Noted, Refused, Warned};

        for (unit, (rows, example)) in self.units {
            let what = format!(
                "{} of {} rows have times that look like {unit} ({example}); milliseconds since \
                 1970 are meant, so gaps, hours and half-lives are all wrong",
                rows.count, self.rows
            );
            let finding = Finding::new(Refused, Kind::TimeUnit, IMPRESSIONS, what).rows(rows);
            findings.push(
                finding
                    .column("time_ms")
                    .advice("set `time_unit` in the mapping, or convert the column")
                    .forced(format!("{example} counts as {}", format_time(example, 0))),
            );
        }
        if let Some(rows) = self.odd.any() {
            let all = rows.count == self.rows;
            let year = format_time(self.odd_ms, 0);
            let what = format!(
                "{} of {} rows are of a time like {} ms, which is {year}",
                rows.count, self.rows, self.odd_ms
            );
            // A log may have a clock of its own, but not two.
            let severity = if all { Warned } else { Refused };
            let finding = Finding::new(severity, Kind::TimeRange, IMPRESSIONS, what).rows(rows);
            let advice = if all {
                "if that is no clock of its own, convert `time_ms` to milliseconds since 1970"
            } else {
                "leave out rows without a time; the mapping's `time_unit` says how it is written"
            };
            let forced = (!all).then(|| "they count at the time that stands there".to_owned());
            findings.push(Finding { forced, ..finding.column("time_ms").advice(advice) });
        }
        if let Some(rows) = self.future.any() {
            let latest = format_time(self.last.unwrap_or_default(), 0);
            let what = format!(
                "{} of {} rows are of a time that is still to come, up to {latest}",
                rows.count, self.rows
            );
            let finding = Finding::new(Warned, Kind::FutureTime, IMPRESSIONS, what).rows(rows);
            let advice = "was a clock wrong, or day and month swapped? they count as the newest";
            findings.push(finding.column("time_ms").advice(advice));
        }
        if let Some(rows) = self.early.any() {
            let what = format!("{} rows have an outcome before their impression", rows.count);
            let finding = Finding::new(Refused, Kind::EarlyOutcome, IMPRESSIONS, what).rows(rows);
            findings.push(
                finding
                    .column("outcome_ms")
                    .advice("are the two columns of times in one unit and zone?")
                    .forced("such an outcome is known right after its impression"),
            );
        }
        if self.instant == self.rows && self.rows > 0 {
            let what = "every outcome is known at the time of its impression: the next request \
                        already sees it, as it will not when it serves"
                .to_owned();
            let finding = Finding::new(Noted, Kind::InstantOutcome, IMPRESSIONS, what);
            findings.push(
                Finding { count: self.rows, ..finding.column("outcome_ms") }
                    .advice("set `outcome_time` or `outcome_delay_s` in the mapping"),
            );
        }
    }
}
