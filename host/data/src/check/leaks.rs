//! Features that give a label away, on a sample of rows.
//!
//! A feature is judged alone, by how well the labels of one half of the sample, averaged over what
//! is alike in the feature, tell those of the other half. Dense features are put into bins of equal
//! size first, and missing numbers into one of their own. So it does not matter whether a label
//! goes up or down with a feature or follows from its absence, and an id that is seen once tells
//! nothing.

use std::collections::HashMap;

use hypercast_fm::metrics::{ScoredPrediction, auc};

use super::features::{FeatureName, FeatureRow};
use super::finding::{Finding, FindingKind, Severity};
use crate::dataset::Impression;
use crate::schema::{Schema, TaskKind};

/// The most rows of the sample.
const MAX_ROWS: usize = 1 << 16;

/// The most cells of the sample, of 8 bytes at most.
const MAX_CELLS: usize = 1 << 23;

/// Bins of a dense feature.
const BINS: usize = 64;

/// Labels that each half of the sample needs, and positives and negatives of a binary task.
const FEWEST_LABELS: usize = 20;

/// How far the mean of a bin is drawn to that of all, in rows.
const PRIOR_ROWS: f64 = 1.0;

/// An AUC, or a correlation of ranks, from which a feature gives a label away.
const GIVES_AWAY: f64 = 0.99;

/// From which it is told that it nearly does.
const NEARLY: f64 = 0.95;

/// A sample of rows, column by column.
pub(super) struct LeakSample {
    dense: Vec<Vec<f32>>,
    ids: Vec<Vec<u64>>,
    /// By task; NaN where there is none.
    labels: Vec<Vec<f32>>,
    rows: usize,
}

impl LeakSample {
    pub(super) fn new(schema: &Schema, dense: usize, ids: usize) -> Self {
        let tasks = schema.tasks.len();
        let (dense, ids) = (vec![Vec::new(); dense], vec![Vec::new(); ids]);
        Self { dense, ids, labels: vec![Vec::new(); tasks], rows: 0 }
    }

    /// The most rows that it should be given.
    pub(super) fn capacity(&self) -> usize {
        let columns = self.dense.len() + self.ids.len() + self.labels.len();
        (MAX_CELLS / columns.max(1)).clamp(1, MAX_ROWS)
    }

    pub(super) fn push(&mut self, impression: &Impression, row: &FeatureRow, schema: &Schema) {
        self.rows += 1;
        self.dense.iter_mut().zip(&row.dense).for_each(|(column, &value)| column.push(value));
        self.ids.iter_mut().zip(&row.ids).for_each(|(column, &id)| column.push(id));
        for (task, labels) in self.labels.iter_mut().enumerate() {
            let label = schema.label(task, impression.surface, &impression.outcome);
            labels.push(label.filter(|label| label.is_finite()).unwrap_or(f32::NAN));
        }
    }
}

/// Adds a finding for every feature that gives a label away. The names are those of dense features
/// and of categorical ones.
pub(super) fn find(
    sample: &LeakSample,
    schema: &Schema,
    [dense_names, id_names]: [&[FeatureName<'_>]; 2],
    findings: &mut Vec<Finding>,
) {
    let labels: Vec<TaskLabels> = schema
        .tasks
        .iter()
        .zip(&sample.labels)
        .map(|(task, labels)| match task.kind {
            TaskKind::Binary => TaskLabels { values: labels.clone(), is_binary: true },
            TaskKind::Regression => TaskLabels { values: ranks(labels), is_binary: false },
        })
        .collect();
    let dense = sample.dense.iter().map(|column| bins_of_numbers(column));
    let ids = sample.ids.iter().map(|column| bins_of_ids(column));
    for (name, bins) in dense_names.iter().chain(id_names).zip(dense.chain(ids)) {
        for (task, labels) in schema.tasks.iter().zip(&labels) {
            let Some(strength) = labels.told_by(&bins) else { continue };
            let severity = match strength {
                GIVES_AWAY.. => Severity::Refused,
                NEARLY.. => Severity::Warned,
                _ => continue,
            };
            let measure = if labels.is_binary { "an AUC" } else { "a correlation of ranks" };
            let what = format!(
                "alone it tells the label of task {} with {measure} of {strength:.4} on a sample \
                 of {} rows; is it known only after the outcome?",
                task.name, sample.rows
            );
            let finding = Finding::new(severity, FindingKind::Leak, name.file, what);
            let finding = finding.column(name.name());
            let advice =
                "take it out of the schema, or log it as it was at the time of the request";
            let mut finding = finding.advice(advice);
            if severity == Severity::Refused {
                finding = finding.forced(
                    "the models rely on it, and metrics are true only if it is known as well when \
                     it serves",
                );
            }
            findings.push(finding);
        }
    }
}

/// The labels of a task, or their ranks; NaN where there is none.
struct TaskLabels {
    values: Vec<f32>,
    is_binary: bool,
}

impl TaskLabels {
    /// How well labels are told by the bins that rows are in, learned from every other row and
    /// measured on the rest: as AUC, or as correlation. None if there are too few of them.
    fn told_by(&self, bins: &[u32]) -> Option<f64> {
        let width = bins.iter().max().map_or(0, |&bin| bin as usize + 1);
        let mut sums = vec![(0.0f64, 0.0f64); width];
        let (mut sum, mut count) = (0.0, 0.0);
        let known = || {
            let rows = self.values.iter().zip(bins).enumerate();
            rows.filter(|(_, (label, _))| !label.is_nan())
        };
        for (_, (&label, &bin)) in known().filter(|(row, _)| row.is_multiple_of(2)) {
            let of = &mut sums[bin as usize];
            (of.0, of.1) = (of.0 + f64::from(label), of.1 + 1.0);
            (sum, count) = (sum + f64::from(label), count + 1.0);
        }
        if count < FEWEST_LABELS as f64 {
            return None;
        }
        let mean = sum / count;
        let told = known().filter(|(row, _)| !row.is_multiple_of(2)).map(|(_, (&label, &bin))| {
            let (sum, count) = sums[bin as usize];
            ((sum + PRIOR_ROWS * mean) / (count + PRIOR_ROWS), label)
        });
        let told: Vec<(f64, f32)> = told.collect();
        if self.is_binary { area(&told) } else { correlation(&told) }
    }
}

fn area(told: &[(f64, f32)]) -> Option<f64> {
    let positives = told.iter().filter(|(_, label)| *label > 0.5).count();
    if positives.min(told.len() - positives) < FEWEST_LABELS {
        return None;
    }
    let row = |&(told, label): &(f64, f32)| ScoredPrediction {
        user: 0,
        probability: told as f32,
        label: label > 0.5,
    };
    auc(&mut told.iter().map(row).collect::<Vec<ScoredPrediction>>())
}

fn correlation(told: &[(f64, f32)]) -> Option<f64> {
    if told.len() < FEWEST_LABELS {
        return None;
    }
    let n = told.len() as f64;
    let mean_told = told.iter().map(|(told, _)| told).sum::<f64>() / n;
    let mean_label = told.iter().map(|(_, label)| f64::from(*label)).sum::<f64>() / n;
    let (mut both, mut own, mut other) = (0.0, 0.0, 0.0);
    for &(told, label) in told {
        let (told, label) = (told - mean_told, f64::from(label) - mean_label);
        both += told * label;
        own += told * told;
        other += label * label;
    }
    Some(both / (own * other).sqrt()).filter(|correlation| correlation.is_finite())
}

/// The order of the numbers of a column, those that are NaN last.
fn ascending(column: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..column.len()).collect();
    order.sort_unstable_by(|&a, &b| column[a].total_cmp(&column[b]));
    order
}

/// The ranks of numbers, the mean rank for equal ones; NaN stays.
fn ranks(column: &[f32]) -> Vec<f32> {
    let mut ranks = vec![f32::NAN; column.len()];
    let order = ascending(column);
    let mut start = 0;
    for equal in order.chunk_by(|&a, &b| column[a] == column[b]) {
        let rank = start as f32 + (equal.len() - 1) as f32 / 2.0;
        start += equal.len();
        for &row in equal.iter().filter(|&&row| !column[row].is_nan()) {
            ranks[row] = rank;
        }
    }
    ranks
}

/// The bin of each number: as many rows in each, equal numbers in one, and those that are missing
/// in bin 0.
fn bins_of_numbers(column: &[f32]) -> Vec<u32> {
    let mut bins = vec![0; column.len()];
    let order = ascending(column);
    let mut start = 0;
    for equal in order.chunk_by(|&a, &b| column[a] == column[b]) {
        let bin = 1 + start * BINS / column.len();
        start += equal.len();
        let value = column[equal[0]];
        if value.is_finite() {
            equal.iter().for_each(|&row| bins[row] = bin as u32);
        }
    }
    bins
}

/// Ids numbered from 0 on, in the order in which they come.
fn bins_of_ids(column: &[u64]) -> Vec<u32> {
    let mut numbers: HashMap<u64, u32> = HashMap::new();
    let number = |&id: &u64| {
        let next = numbers.len() as u32;
        *numbers.entry(id).or_insert(next)
    };
    column.iter().map(number).collect()
}
