//! Features as they are at the time of a request: how they move from the first half of the rows to
//! the second, and a sample of rows for the search of leaks.

use hypercast_core::hash::mix64;

use super::CheckedRow;
use super::finding::{Finding, FindingKind, IMPRESSIONS, ITEMS, Severity, Tally, USERS};
use super::leaks::{self, LeakSample};
use crate::dataset::{Dataset, Impression};
use crate::schema::{Feature, FeatureKind, FeatureWidths, MISSING, is_position_name};

/// A mean that moves by this many standard deviations is warned of.
const LARGE_MOVE: f64 = 1.0;

/// A mean that moves by this many standard deviations is told.
const SMALL_MOVE: f64 = 0.3;

/// A share of missing cells that moves by this much is warned of.
const LARGE_MISSING: f64 = 0.5;

/// A share of missing cells that moves by this much is told.
const SMALL_MISSING: f64 = 0.1;

/// Rows of a half that are needed to speak of its mean.
const FEWEST_ROWS: u64 = 500;

/// Collects statistics of features.
pub(super) struct FeatureCheck<'a> {
    dataset: &'a Dataset,
    widths: FeatureWidths,
    dense: Vec<DenseColumn<'a>>,
    ids: Vec<CategoryColumn<'a>>,
    sample: LeakSample,
    /// One row in so many is sampled.
    sample_every: u64,
    /// The features of one row.
    row: FeatureRow,
}

/// A feature's place in the data set.
#[derive(Clone, Copy)]
pub(super) struct FeatureName<'a> {
    pub(super) file: &'static str,
    pub(super) feature: &'a Feature,
}

impl<'a> FeatureName<'a> {
    pub(super) fn name(self) -> &'a str {
        &self.feature.name
    }
}

/// The features of a row.
#[derive(Default)]
pub(super) struct FeatureRow {
    pub(super) dense: Vec<f32>,
    pub(super) ids: Vec<u64>,
}

/// A dense feature's numbers, by half.
struct DenseColumn<'a> {
    of: FeatureName<'a>,
    halves: [ColumnSums; 2],
    infinite: Tally,
}

/// A categorical feature's missing cells, by half.
struct CategoryColumn<'a> {
    of: FeatureName<'a>,
    halves: [ColumnSums; 2],
}

/// Sums over the cells of a column.
#[derive(Clone, Copy, Default)]
struct ColumnSums {
    rows: u64,
    missing: u64,
    sum: f64,
    squares: f64,
}

impl ColumnSums {
    /// Adds a cell, which is missing if it is not finite.
    fn push(&mut self, value: f64) {
        self.rows += 1;
        if value.is_finite() {
            self.sum += value;
            self.squares += value * value;
        } else {
            self.missing += 1;
        }
    }

    fn missing_share(&self) -> f64 {
        self.missing as f64 / self.rows as f64
    }

    /// Mean and variance of the cells that are not missing.
    fn moments(&self) -> (f64, f64) {
        let count = (self.rows - self.missing) as f64;
        let mean = self.sum / count;
        (mean, (self.squares / count - mean * mean).max(0.0))
    }
}

impl<'a> FeatureCheck<'a> {
    /// `rows` is the number of rows that will be seen.
    pub(super) fn new(dataset: &'a Dataset, rows: u64) -> Self {
        let schema = &dataset.schema;
        let dense = feature_names(dataset, FeatureKind::Dense);
        let ids = feature_names(dataset, FeatureKind::Categorical);
        let sample = LeakSample::new(schema, dense.len(), ids.len());
        let dense = dense.into_iter().map(|of| DenseColumn {
            of,
            halves: Default::default(),
            infinite: Tally::default(),
        });
        let ids = ids.into_iter().map(|of| CategoryColumn { of, halves: Default::default() });
        Self {
            dataset,
            widths: FeatureWidths::new(schema),
            dense: dense.collect(),
            ids: ids.collect(),
            sample_every: rows.div_ceil(sample.capacity() as u64).max(1),
            sample,
            row: FeatureRow::default(),
        }
    }

    /// Sees a row that is not mere history.
    pub(super) fn see(&mut self, row: CheckedRow<'_>) {
        self.row.read(row.impression, self.dataset, &self.widths);
        for (column, &value) in self.dense.iter_mut().zip(&self.row.dense) {
            column.halves[row.half].push(f64::from(value));
            // Those of items and users are looked for in their own files.
            if value.is_infinite() && column.of.file == IMPRESSIONS {
                column.infinite.add(row.number);
            }
        }
        for (column, &id) in self.ids.iter_mut().zip(&self.row.ids) {
            column.halves[row.half].push(if id == 0 { f64::NAN } else { 1.0 });
        }
        if mix64(row.number).is_multiple_of(self.sample_every) {
            self.sample.push(row.impression, &self.row, &self.dataset.schema);
        }
    }

    /// Adds what was found. Rows that are not sorted have no halves.
    pub(super) fn finish(self, is_sorted: bool, findings: &mut Vec<Finding>) {
        for column in &self.dense {
            if let Some(rows) = column.infinite.any() {
                let what = format!("{} rows have an infinite number", rows.count);
                let finding =
                    Finding::new(Severity::Refused, FindingKind::NotFinite, column.of.file, what);
                let finding = finding.rows(rows).column(column.of.name());
                let advice = "write a number, or NaN or null if it is missing";
                findings.push(finding.advice(advice).forced("the models take it as missing"));
            }
        }
        for column in &self.dense {
            findings.extend(missing(column.of, &column.halves));
        }
        // Of a feature of several values, its first column says whether there is any.
        let ids = self.ids.chunk_by(|a, b| a.of.name() == b.of.name()).map(|columns| &columns[0]);
        let ids = ids.map(|column| (column.of, &column.halves));
        let all: Vec<_> =
            self.dense.iter().map(|column| (column.of, &column.halves)).chain(ids).collect();
        findings.extend(all.iter().filter_map(|&(of, _)| position(of)));
        if is_sorted {
            findings.extend(all.iter().filter_map(|&(of, halves)| drift(of, halves)));
        }
        let dense: Vec<FeatureName<'_>> = self.dense.iter().map(|column| column.of).collect();
        let ids: Vec<FeatureName<'_>> = self.ids.iter().map(|column| column.of).collect();
        leaks::find(&self.sample, &self.dataset.schema, [&dense, &ids], findings);
    }
}

impl FeatureRow {
    fn read(&mut self, row: &Impression, dataset: &Dataset, widths: &FeatureWidths) {
        /// Appends `values`, and what is `missing` up to `width`.
        fn append<T: Copy>(to: &mut Vec<T>, values: &[T], width: usize, missing: T) {
            let end = to.len() + width;
            to.extend_from_slice(values);
            to.resize(end, missing);
        }
        self.dense.clear();
        self.ids.clear();
        let (item, user) = (dataset.items.get(&row.item), dataset.users.get(&row.user));
        append(&mut self.dense, item.map_or(&[], |item| &item.dense), widths.item.dense, MISSING);
        append(&mut self.dense, user.map_or(&[], |user| &user.dense), widths.user.dense, MISSING);
        append(&mut self.dense, &row.context.dense, widths.context.dense, MISSING);
        append(&mut self.ids, item.map_or(&[], |item| &item.ids), widths.item.ids, 0);
        append(&mut self.ids, user.map_or(&[], |user| &user.ids), widths.user.ids, 0);
        append(&mut self.ids, &row.context.ids, widths.context.ids, 0);
    }
}

/// The features of one type, in the order of [`FeatureRow`], each once for each of its columns.
fn feature_names<'a>(dataset: &'a Dataset, kind: FeatureKind) -> Vec<FeatureName<'a>> {
    let schema = &dataset.schema;
    let files = [
        (ITEMS, &schema.item_features),
        (USERS, &schema.user_features),
        (IMPRESSIONS, &schema.context_features),
    ];
    let of = |(file, features): (&'static str, &'a Vec<Feature>)| {
        let features = features.iter().filter(move |feature| feature.kind == kind);
        features.flat_map(move |feature| {
            std::iter::repeat_n(FeatureName { file, feature }, feature.width())
        })
    };
    files.into_iter().flat_map(of).collect()
}

/// The share of cells that are missing of a dense feature that is not optional.
fn missing(of: FeatureName<'_>, [first, second]: &[ColumnSums; 2]) -> Option<Finding> {
    let (rows, count) = (first.rows + second.rows, first.missing + second.missing);
    if count == 0 || of.feature.is_optional() {
        return None;
    }
    let share = 100.0 * count as f64 / rows as f64;
    let what = format!("{share:.1} % of its cells are missing, and are read as 0");
    let severity = if count == rows { Severity::Warned } else { Severity::Noted };
    let finding = Finding::new(severity, FindingKind::MissingFeature, of.file, what);
    let advice =
        "with `optional = true` in schema.toml, which makes another schema, models learn from it";
    Some(Finding { count, ..finding.column(of.name()).advice(advice) })
}

/// A feature of requests that none can send, as it follows from their answer.
fn position(of: FeatureName<'_>) -> Option<Finding> {
    let is_sent = of.file == IMPRESSIONS && !of.feature.training_only;
    if !is_sent || !is_position_name(of.name()) {
        return None;
    }
    let what = "it is named as an item's place among those shown with it, which the ranking \
                decides, so a request cannot send it and models rely on it in vain";
    let finding =
        Finding::new(Severity::Warned, FindingKind::SentPosition, of.file, what.to_owned());
    let advice = "with `training_only = true` in schema.toml, which makes another schema, models \
                  learn from it and are asked without it; if callers do know it, all is well";
    Some(finding.column(of.name()).advice(advice))
}

/// How a feature moves from one half of the rows to the other, if it does so by much.
fn drift(of: FeatureName<'_>, halves: &[ColumnSums; 2]) -> Option<Finding> {
    if halves.iter().any(|half| half.rows < FEWEST_ROWS) {
        return None;
    }
    let found = |severity, what: String| {
        let finding = Finding::new(severity, FindingKind::FeatureDrift, of.file, what);
        let advice = "is it computed in the same way all the time, and when it serves?";
        Some(finding.column(of.name()).advice(advice))
    };
    let missing = halves.map(|half| half.missing_share());
    let severity = match (missing[0] - missing[1]).abs() {
        LARGE_MISSING.. => Some(Severity::Warned),
        SMALL_MISSING.. => Some(Severity::Noted),
        _ => None,
    };
    if let Some(severity) = severity {
        let [first, second] = missing.map(|share| 100.0 * share);
        let what = format!(
            "{first:.1} % of its cells are missing in the first half of the rows and {second:.1} % \
             in the second"
        );
        return found(severity, what);
    }
    let [(first, variance), (second, other)] = halves.map(|half| half.moments());
    let deviation = ((variance + other) / 2.0).sqrt();
    let severity = match (first - second).abs() / deviation {
        LARGE_MOVE.. => Severity::Warned,
        SMALL_MOVE.. => Severity::Noted,
        _ => return None,
    };
    let what = format!(
        "its mean is {first:.4} in the first half of the rows and {second:.4} in the second, with a \
         standard deviation of {deviation:.4}"
    );
    found(severity, what)
}
