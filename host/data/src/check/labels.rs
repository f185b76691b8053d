//! Labels by task and surface, and how they and the surfaces' shares move from the first half of
//! the rows to the second.

use std::collections::BTreeMap;

use super::CheckedRow;
use super::finding::{Finding, FindingKind, IMPRESSIONS, LabelCount, SCHEMA, Severity, Tally};
use crate::dataset::Dataset;
use crate::schema::{Schema, TaskKind};

/// Differences below this many standard errors are taken for chance. Rows of one user or item are
/// alike, so that the usual two or three would be too few.
const CHANCE: f64 = 6.0;

/// Rates and shares that differ by this factor are warned of.
const LARGE_FACTOR: f64 = 2.0;

/// Rates that differ by this factor are told.
const SMALL_FACTOR: f64 = 1.25;

/// Rows that a surface must be expected to have had before it appeared or after it vanished.
const EXPECTED_ROWS: f64 = 50.0;

/// A value is far beyond others if it is that many times the mean distance from 0.
const FAR_BEYOND: f64 = 1000.0;

/// Counts labels and surfaces.
pub(super) struct LabelCheck<'a> {
    schema: &'a Schema,
    rows: u64,
    surfaces: Vec<SurfaceRows>,
    /// `[task][surface]`.
    labels: Vec<Vec<LabelSums>>,
    /// By value: rows with a label that is infinite.
    infinite: Vec<Tally>,
}

/// The rows of a surface that are not mere history.
#[derive(Clone, Copy, Default)]
struct SurfaceRows {
    halves: [u64; 2],
    /// Numbers among the rows that are not mere history, from 0 on.
    first: u64,
    last: u64,
}

/// The labels of a task on a surface.
#[derive(Clone, Copy, Default)]
struct LabelSums {
    /// By half.
    counts: [u64; 2],
    sums: [f64; 2],
    /// Of the distance from 0.
    distances: f64,
    greatest: f32,
    greatest_row: u64,
}

impl LabelSums {
    fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn mean(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.sums.iter().sum::<f64>() / self.count() as f64)
    }

    fn half_mean(&self, half: usize) -> Option<f64> {
        (self.counts[half] > 0).then(|| self.sums[half] / self.counts[half] as f64)
    }

    fn merge(&mut self, other: &LabelSums) {
        for half in 0..2 {
            self.counts[half] += other.counts[half];
            self.sums[half] += other.sums[half];
        }
        self.distances += other.distances;
        if other.greatest.abs() > self.greatest.abs() {
            (self.greatest, self.greatest_row) = (other.greatest, other.greatest_row);
        }
    }
}

impl<'a> LabelCheck<'a> {
    pub(super) fn new(dataset: &'a Dataset) -> Self {
        let schema = dataset.schema.as_ref();
        let surfaces = schema.surfaces.len();
        Self {
            schema,
            rows: 0,
            surfaces: vec![SurfaceRows::default(); surfaces],
            labels: vec![vec![LabelSums::default(); surfaces]; schema.tasks.len()],
            infinite: vec![Tally::default(); schema.values.len()],
        }
    }

    /// Sees a row that is not mere history.
    pub(super) fn see(&mut self, row: CheckedRow<'_>) {
        let CheckedRow { number, half, impression } = row;
        let surface = usize::from(impression.surface);
        let own = &mut self.surfaces[surface];
        if own.halves == [0, 0] {
            own.first = self.rows;
        }
        own.last = self.rows;
        own.halves[half] += 1;
        self.rows += 1;
        for (rows, value) in self.infinite.iter_mut().zip(&impression.outcome.values) {
            if value.is_infinite() {
                rows.add(number);
            }
        }
        for (task, sums) in self.labels.iter_mut().enumerate() {
            let label = self.schema.label(task, impression.surface, &impression.outcome);
            let Some(label) = label.filter(|label| label.is_finite()) else { continue };
            let sums = &mut sums[surface];
            sums.counts[half] += 1;
            sums.sums[half] += f64::from(label);
            sums.distances += f64::from(label.abs());
            if label.abs() > sums.greatest.abs() {
                (sums.greatest, sums.greatest_row) = (label, number);
            }
        }
    }

    /// Adds what was found, and returns the labels. Rows that are not sorted have no halves.
    pub(super) fn finish(self, is_sorted: bool, findings: &mut Vec<Finding>) -> Vec<LabelCount> {
        self.add_infinite(findings);
        if is_sorted {
            self.add_moved(findings);
        }
        for task in 0..self.schema.tasks.len() {
            let mut all = LabelSums::default();
            self.labels[task].iter().for_each(|sums| all.merge(sums));
            self.add_missing(task, &all, findings);
            self.add_far_beyond(task, &all, findings);
            if is_sorted {
                self.add_drift(task, &all, findings);
            }
        }
        self.counts()
    }

    fn counts(&self) -> Vec<LabelCount> {
        let mut counts = Vec::new();
        for (surface, (name, rows)) in self.schema.surfaces.iter().zip(&self.surfaces).enumerate() {
            for (task, of) in self.schema.tasks.iter().enumerate() {
                if !self.schema.task_valid(task, surface as u16) {
                    continue;
                }
                let sums = &self.labels[task][surface];
                let is_binary = of.kind == TaskKind::Binary;
                counts.push(LabelCount {
                    surface: name.clone(),
                    task: of.name.clone(),
                    rows: rows.halves.iter().sum(),
                    labels: sums.count(),
                    positives: is_binary.then(|| sums.sums.iter().sum::<f64>() as u64),
                    mean: sums.mean(),
                    halves: [0, 1].map(|half| sums.half_mean(half)),
                });
            }
        }
        counts
    }

    fn add_infinite(&self, findings: &mut Vec<Finding>) {
        for (name, rows) in self.schema.values.iter().zip(&self.infinite) {
            let Some(rows) = rows.any() else { continue };
            let what = format!("{} rows have an infinite value", rows.count);
            let finding =
                Finding::new(Severity::Refused, FindingKind::NotFinite, IMPRESSIONS, what);
            let finding = finding.rows(rows).column(format!("value_{name}"));
            let advice = "write a number, or NaN if it is not known";
            findings.push(finding.advice(advice).forced("such a value counts as unknown"));
        }
    }

    fn add_moved(&self, findings: &mut Vec<Finding>) {
        let rows = self.rows as f64;
        for (name, own) in self.schema.surfaces.iter().zip(&self.surfaces) {
            let count: u64 = own.halves.iter().sum();
            let advice = "leave it out of the test, or train on the time in which it is as it will \
                          be";
            let mut add = |severity, what: String, count: u64| {
                let finding = Finding::new(severity, FindingKind::MovedSurface, IMPRESSIONS, what);
                let finding = finding.column("surface").advice(advice);
                findings.push(Finding { count, ..finding });
            };
            if count == 0 {
                let what = format!("surface {name} has no impression");
                let finding =
                    Finding::new(Severity::Noted, FindingKind::MovedSurface, SCHEMA, what);
                findings.push(finding.column("surfaces"));
                continue;
            }
            let span = (own.last - own.first + 1) as f64;
            let (before, after) = (own.first as f64, (self.rows - 1 - own.last) as f64);
            let percent = |rows: f64, all: f64| 100.0 * rows / all;
            // The rows that it would have had, were it as frequent then as in its own time.
            if before * count as f64 / span >= EXPECTED_ROWS {
                let share = percent(before, rows);
                let what = format!("surface {name} appears only after {share:.0} % of the rows");
                add(Severity::Warned, what, count);
            } else if after * count as f64 / span >= EXPECTED_ROWS {
                let share = percent(own.last as f64, rows);
                let what = format!("surface {name} vanishes after {share:.0} % of the rows");
                add(Severity::Warned, what, count);
            } else {
                // As `check` divides the rows; a single row is the second half.
                let halves =
                    [self.rows / 2, self.rows - self.rows / 2].map(|rows| rows.max(1) as f64);
                let shares = [0, 1].map(|half| own.halves[half] as f64 / halves[half]);
                if factor(shares) >= LARGE_FACTOR && standard_errors(shares, halves) > CHANCE {
                    let [first, second] = shares.map(|share| 100.0 * share);
                    let what = format!(
                        "surface {name} has {first:.1} % of the first half of the rows and \
                         {second:.1} % of the second"
                    );
                    add(Severity::Warned, what, count);
                }
            }
        }
    }

    /// Tasks, or their parts on a surface, whose labels are missing or all alike.
    fn add_missing(&self, task: usize, all: &LabelSums, findings: &mut Vec<Finding>) {
        let of = &self.schema.tasks[task];
        let alike = |sums: &LabelSums| match sums.mean() {
            None => Some((FindingKind::NoLabels, "no label".to_owned())),
            Some(mean) if of.kind == TaskKind::Binary && (mean == 0.0 || mean == 1.0) => {
                let which = if mean == 0.0 { "no positive" } else { "no negative" };
                Some((FindingKind::OneClass, format!("{which} among {} labels", sums.count())))
            }
            Some(_) => None,
        };
        let mut add = |severity, kind, what: String, advice: &str| {
            let finding = Finding::new(severity, kind, IMPRESSIONS, what).advice(advice);
            findings.push(finding.column(column_of(self.schema, task)));
        };
        if let Some((kind, what)) = alike(all) {
            let what = format!("task {} has {what}; nothing can be learned of it", of.name);
            let advice = "take the task out of the schema until it has some, or look at its label's \
                          column";
            return add(Severity::Warned, kind, what, advice);
        }
        // A finding for all surfaces on which it is the same.
        let mut surfaces: BTreeMap<FindingKind, Vec<&str>> = BTreeMap::new();
        for (surface, sums) in self.labels[task].iter().enumerate() {
            let rows: u64 = self.surfaces[surface].halves.iter().sum();
            if rows > 0
                && self.schema.task_valid(task, surface as u16)
                && let Some((kind, _)) = alike(sums)
            {
                surfaces.entry(kind).or_default().push(&self.schema.surfaces[surface]);
            }
        }
        for (kind, surfaces) in surfaces {
            let which = match kind {
                FindingKind::NoLabels => "no label",
                _ => "labels of one class alone",
            };
            let what = format!("task {} has {which} on {}", of.name, surfaces.join(", "));
            let advice = "if that is so by its nature, name the others as the task's `surfaces`";
            add(Severity::Noted, kind, what, advice);
        }
    }

    fn add_far_beyond(&self, task: usize, all: &LabelSums, findings: &mut Vec<Finding>) {
        let of = &self.schema.tasks[task];
        let mean = all.distances / all.count().max(1) as f64;
        let greatest = f64::from(all.greatest.abs());
        if of.kind == TaskKind::Binary || greatest < FAR_BEYOND * mean || all.count() == 0 {
            return;
        }
        let what = format!(
            "task {} has a label of {}, {:.0} times the mean; the loss is that of a few rows",
            of.name,
            all.greatest,
            greatest / mean
        );
        let finding = Finding::new(Severity::Warned, FindingKind::HugeValue, IMPRESSIONS, what);
        let rows = Tally { count: 1, first: all.greatest_row };
        let advice = "set `clip` in the mapping, or a range in the schema";
        findings.push(finding.rows(rows).column(column_of(self.schema, task)).advice(advice));
    }

    fn add_drift(&self, task: usize, all: &LabelSums, findings: &mut Vec<Finding>) {
        let of = &self.schema.tasks[task];
        if of.kind != TaskKind::Binary {
            return;
        }
        let own = self.schema.surfaces.iter().zip(&self.labels[task]);
        let own = own.map(|(surface, sums)| (format!(" on surface {surface}"), sums));
        for (place, sums) in [(String::new(), all)].into_iter().chain(own) {
            let (Some(first), Some(second)) = (sums.half_mean(0), sums.half_mean(1)) else {
                continue;
            };
            let rates = [first, second];
            if standard_errors(rates, sums.counts.map(|count| count as f64)) <= CHANCE {
                continue;
            }
            let severity = match factor(rates) {
                LARGE_FACTOR.. => Severity::Warned,
                SMALL_FACTOR.. => Severity::Noted,
                _ => continue,
            };
            let what = format!(
                "the rate of task {}{place} is {first:.4} in the first half of the rows and \
                 {second:.4} in the second",
                of.name
            );
            let finding = Finding::new(severity, FindingKind::LabelDrift, IMPRESSIONS, what);
            let finding = finding.column(column_of(self.schema, task));
            let advice =
                "are labels of the newest rows still to come, or did their meaning change?";
            findings.push(Finding { count: sums.count(), ..finding.advice(advice) });
        }
    }
}

/// The column of a task's labels.
fn column_of(schema: &Schema, task: usize) -> String {
    let task = &schema.tasks[task];
    match task.kind {
        TaskKind::Binary => format!("actions: {}", task.label),
        TaskKind::Regression => format!("value_{}", task.label),
    }
}

/// The larger of two numbers over the smaller.
fn factor([a, b]: [f64; 2]) -> f64 {
    a.max(b) / a.min(b)
}

/// How many standard errors two shares of some counts are apart.
fn standard_errors([a, b]: [f64; 2], counts: [f64; 2]) -> f64 {
    let pooled = (a * counts[0] + b * counts[1]) / (counts[0] + counts[1]);
    let variance = pooled * (1.0 - pooled) * (1.0 / counts[0] + 1.0 / counts[1]);
    (a - b).abs() / variance.sqrt()
}
