//! What a check finds, and the words for it.

use std::fmt;
use std::path::PathBuf;

use hypercast_core::{clock::format_time, text_table::TextTable};
use serde::{Deserialize, Serialize};

/// The files that findings point to.
pub(super) const IMPRESSIONS: &str = "impressions.parquet";
pub(super) const ITEMS: &str = "items.parquet";
pub(super) const USERS: &str = "users.parquet";
pub(super) const SCHEMA: &str = "schema.toml";

/// How bad a finding is. The worst come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// What is trained on it would be wrong, so nothing is trained.
    Refused,
    /// It is probably not as meant, and costs quality.
    Warned,
    /// Worth knowing.
    Noted,
}

/// The faults that a check tells apart; in JSON, their names with hyphens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// There is no impression.
    Empty,
    /// Rows are earlier than those before them.
    Unsorted,
    /// The rows of a request are apart.
    ScatteredRequest,
    /// The rows of a request have different users or surfaces.
    MixedRequest,
    /// The id of a request is that of an earlier one, at another time.
    RepeatedRequest,
    /// A request has a thousand rows or more.
    LargeRequest,
    /// A request shows an item twice.
    RepeatedItem,
    /// Rows say the same as others.
    RepeatedRow,
    /// Times are in another unit than milliseconds.
    TimeUnit,
    /// Times are in no year of such a log.
    TimeRange,
    /// Times are later than now.
    FutureTime,
    /// An outcome is known before its impression.
    EarlyOutcome,
    /// Every outcome is known as soon as the impression.
    InstantOutcome,
    /// An id has several rows of features.
    RepeatedId,
    /// Impressions are of ids without features.
    UnknownId,
    /// Ids with features are in no impression.
    UnusedId,
    /// A number is infinite.
    NotFinite,
    /// A surface appears, vanishes, or has another share than before.
    MovedSurface,
    /// A task has no label.
    NoLabels,
    /// All labels of a task are alike.
    OneClass,
    /// Values are far beyond all others.
    HugeValue,
    /// Labels are not as frequent as before.
    LabelDrift,
    /// A feature is missing, and models do not learn from that.
    MissingFeature,
    /// A feature of requests is a position in the answer to them.
    SentPosition,
    /// A feature is not as it was before.
    FeatureDrift,
    /// A feature gives a label away.
    Leak,
}

/// One thing that is wrong with a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub kind: FindingKind,
    /// The file, in the data set's directory.
    pub file: String,
    /// The first row at fault, counted from 1; none if the fault is not that of a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row: Option<u64>,
    /// The column at fault, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// The number of rows, ids or requests at fault.
    pub count: u64,
    /// What is wrong, in words.
    pub what: String,
    /// What to do about it.
    pub advice: String,
    /// What `--force` makes of it; none if nothing goes on all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<String>,
}

impl Finding {
    /// A finding without a row and a column, which counts one.
    pub(super) fn new(severity: Severity, kind: FindingKind, file: &str, what: String) -> Finding {
        Finding {
            severity,
            kind,
            file: file.to_owned(),
            row: None,
            column: None,
            count: 1,
            what,
            advice: String::new(),
            forced: None,
        }
    }

    pub(super) fn rows(self, rows: Tally) -> Finding {
        Finding { row: Some(rows.first), count: rows.count, ..self }
    }

    pub(super) fn column(self, name: impl Into<String>) -> Finding {
        Finding { column: Some(name.into()), ..self }
    }

    pub(super) fn advice(self, advice: impl Into<String>) -> Finding {
        Finding { advice: advice.into(), ..self }
    }

    pub(super) fn forced(self, forced: impl Into<String>) -> Finding {
        Finding { forced: Some(forced.into()), ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { file, row, column, what, advice, .. } = self;
        write!(f, "{file}")?;
        if let Some(row) = row {
            write!(f, ", row {row}")?;
        }
        if let Some(column) = column {
            write!(f, ", column `{column}`")?;
        }
        write!(f, ": {what}")?;
        if advice.is_empty() { Ok(()) } else { write!(f, "; {advice}") }
    }
}

/// Rows that have something in common: how many, and the first.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) count: u64,
    /// Counted from 1.
    pub(super) first: u64,
}

impl Tally {
    pub(super) fn add(&mut self, row: u64) {
        if self.count == 0 {
            self.first = row;
        }
        self.count += 1;
    }

    pub(super) fn any(self) -> Option<Tally> {
        (self.count > 0).then_some(self)
    }
}

/// The labels of a task on a surface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelCount {
    /// The surface.
    pub surface: String,
    /// The task.
    pub task: String,
    /// Rows that are not mere history.
    pub rows: u64,
    /// Those with a label.
    pub labels: u64,
    /// Labels that are yes; none of a regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positives: Option<u64>,
    /// The mean label, which is the rate of a binary task; none without labels.
    pub mean: Option<f64>,
    /// The mean label of the first half of the rows, and of the second.
    pub halves: [Option<f64>; 2],
}

/// What a check found: the content of `hypercast data check --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The data set's directory.
    pub dir: PathBuf,
    /// Impressions, mere history included.
    pub rows: u64,
    /// Impressions that are mere history.
    pub history_only: u64,
    /// Requests.
    pub requests: u64,
    /// The time of the first request, milliseconds since 1970.
    pub first_ms: Option<i64>,
    /// The time of the last request.
    pub last_ms: Option<i64>,
    /// Items with features.
    pub items: u64,
    /// Users with features.
    pub users: u64,
    /// The labels of every task on every surface where it is valid.
    pub labels: Vec<LabelCount>,
    /// What is wrong, the worst first.
    pub findings: Vec<Finding>,
    /// The duration of the check.
    pub seconds: f64,
}

impl CheckReport {
    /// The findings of one severity.
    pub fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.severity == severity)
    }

    /// Whether nothing should be trained on the data set.
    pub fn is_refused(&self) -> bool {
        self.of(Severity::Refused).next().is_some()
    }

    fn write_labels(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |mean: Option<f64>| mean.map_or("-".into(), |mean| format!("{mean:.4}"));
        let head =
            ["surface", "task", "rows", "labels", "positives", "mean", "1st half", "2nd half"];
        let mut table = TextTable::new(2, head);
        let mut last = None;
        for count in &self.labels {
            let is_new = last.replace(&count.surface) != Some(&count.surface);
            let surface = if is_new { count.surface.as_str() } else { "" };
            let positives = count.positives.map_or("-".into(), |positives| positives.to_string());
            let [mean, first, second] = [count.mean, count.halves[0], count.halves[1]].map(number);
            let [rows, labels] = [count.rows, count.labels].map(|count| count.to_string());
            let task = count.task.clone();
            table.line([surface.into(), task, rows, labels, positives, mean, first, second]);
        }
        write!(f, "{table}")
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CheckReport { rows, history_only, requests, items, users, .. } = self;
        writeln!(
            f,
            "{}: {rows} impressions ({history_only} of them history only) in {requests} requests, \
             {items} items, {users} users",
            self.dir.display()
        )?;
        if let (Some(first), Some(last)) = (self.first_ms, self.last_ms) {
            let days = (last - first) as f64 / 8.64e7;
            let [first, last] = [first, last].map(|ms| format_time(ms, 0));
            writeln!(f, "requests from {first} to {last} (UTC), {days:.1} days")?;
        }
        self.write_labels(f)?;
        self.write_findings(f)
    }
}

impl CheckReport {
    /// Writes what was found, without the overview.
    pub fn write_findings(&self, f: &mut impl fmt::Write) -> fmt::Result {
        let mut last = None;
        for finding in &self.findings {
            if last.replace(finding.severity) != Some(finding.severity) {
                writeln!(f, "{}:", name(finding.severity))?;
            }
            writeln!(f, "  {finding}")?;
        }
        let [refused, warned, noted] = [Severity::Refused, Severity::Warned, Severity::Noted]
            .map(|severity| self.of(severity).count());
        let verdict = if self.is_refused() { "; training refuses this data set" } else { "" };
        writeln!(
            f,
            "checked in {:.1} s: {refused} refused, {warned} warned, {noted} noted{verdict}",
            self.seconds
        )
    }
}

fn name(severity: Severity) -> &'static str {
    match severity {
        Severity::Refused => "refused",
        Severity::Warned => "warned",
        Severity::Noted => "noted",
    }
}
