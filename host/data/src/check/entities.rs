//! Which ids of impressions have features, and which features have an id that is shown.

use std::collections::HashSet;

use super::CheckedRow;
use super::finding::{Finding, FindingKind, IMPRESSIONS, ITEMS, Severity, Tally, USERS};
use crate::dataset::Dataset;
use crate::dataset::table::{CellType, Field, TableReader};
use crate::error::Result;
use crate::schema::{Feature, FeatureKind, columns_of};

/// The most ids without features that are told apart.
const MAX_UNKNOWN_IDS: usize = 1 << 20;

/// The share of rows of unknown ids from which the file of features is that of something else.
const WRONG_FILE: f64 = 0.9;

/// The share of rows of unknown ids that is warned of.
const MANY_UNKNOWN: f64 = 0.01;

/// Compares the ids of impressions with those that have features.
pub(super) struct EntityCheck<'a> {
    dataset: &'a Dataset,
    rows: u64,
    items: ShownIds<'a>,
    users: ShownIds<'a>,
}

impl<'a> EntityCheck<'a> {
    pub(super) fn new(dataset: &'a Dataset) -> Self {
        let schema = &dataset.schema;
        let items = ShownIds::new("item", ITEMS, &schema.item_features);
        let users = ShownIds::new("user", USERS, &schema.user_features);
        Self { dataset, rows: 0, items, users }
    }

    pub(super) fn see(&mut self, row: CheckedRow<'_>) {
        self.rows += 1;
        let (item, user) = (row.impression.item, row.impression.user);
        self.items.see(item, self.dataset.items.contains_key(&item), row.number);
        self.users.see(user, self.dataset.users.contains_key(&user), row.number);
    }

    /// Adds what was found.
    ///
    /// # Errors
    /// A file of features cannot be read once more.
    pub(super) fn finish(self, findings: &mut Vec<Finding>) -> Result<()> {
        let Self { dataset, rows, items, users } = self;
        items.add_unknown(rows, findings);
        users.add_unknown(rows, findings);
        items.add_unused(dataset.items.len(), findings);
        users.add_unused(dataset.users.len(), findings);
        let dense = dataset.items.values().map(|item| (item.id, item.dense.as_slice()));
        items.add_infinite(dense, findings);
        let dense = dataset.users.values().map(|user| (user.id, user.dense.as_slice()));
        users.add_infinite(dense, findings);
        items.add_repeated(dataset, dataset.items.len(), findings)?;
        users.add_repeated(dataset, dataset.users.len(), findings)
    }
}

/// The ids of items or users that impressions name.
struct ShownIds<'a> {
    /// `item` or `user`, as the column is called.
    name: &'static str,
    /// The file of their features.
    file: &'static str,
    features: &'a [Feature],
    known: HashSet<u64>,
    unknown: HashSet<u64>,
    /// Rows with an id that has no features.
    unknown_rows: Tally,
}

impl<'a> ShownIds<'a> {
    fn new(name: &'static str, file: &'static str, features: &'a [Feature]) -> Self {
        let (known, unknown) = (HashSet::new(), HashSet::new());
        Self { name, file, features, known, unknown, unknown_rows: Tally::default() }
    }

    fn see(&mut self, id: u64, is_known: bool, row: u64) {
        if is_known {
            self.known.insert(id);
            return;
        }
        self.unknown_rows.add(row);
        if self.unknown.len() < MAX_UNKNOWN_IDS {
            self.unknown.insert(id);
        }
    }

    fn add_unknown(&self, all_rows: u64, findings: &mut Vec<Finding>) {
        let Self { name, file, .. } = *self;
        let Some(rows) = self.unknown_rows.any().filter(|_| !self.features.is_empty()) else {
            return;
        };
        let share = rows.count as f64 / all_rows as f64;
        let severity = match share {
            WRONG_FILE.. => Severity::Refused,
            MANY_UNKNOWN.. => Severity::Warned,
            _ => Severity::Noted,
        };
        let what = format!(
            "{} rows ({:.1} %) are of {} {name}s that {file} does not have; their features count as \
             missing",
            rows.count,
            100.0 * share,
            self.unknown.len()
        );
        let finding = Finding::new(severity, FindingKind::UnknownId, IMPRESSIONS, what);
        let advice = format!("are the ids of {file} those of the log?");
        let mut finding = finding.rows(rows).column(name).advice(advice);
        if severity == Severity::Refused {
            finding = finding.forced("the models learn from ids and outcomes alone");
        }
        findings.push(finding);
    }

    fn add_unused(&self, entities: usize, findings: &mut Vec<Finding>) {
        let unused = entities - self.known.len();
        if unused == 0 {
            return;
        }
        let Self { name, file, .. } = *self;
        let what = format!("{unused} of {entities} {name}s are in no impression");
        let finding = Finding::new(Severity::Noted, FindingKind::UnusedId, file, what);
        findings.push(Finding { count: unused as u64, ..finding.column("id") });
    }

    /// Looks for numbers that are infinite in the dense features of entities.
    fn add_infinite<'b>(
        &self,
        entities: impl Iterator<Item = (u64, &'b [f32])>,
        findings: &mut Vec<Finding>,
    ) {
        let columns = columns_of(self.features, FeatureKind::Dense);
        let mut infinite = vec![(0, u64::MAX); columns.len()];
        for (id, dense) in entities {
            for ((count, least), value) in infinite.iter_mut().zip(dense) {
                if value.is_infinite() {
                    *count += 1;
                    *least = id.min(*least);
                }
            }
        }
        for (column, (count, id)) in columns.into_iter().zip(infinite) {
            if count == 0 {
                continue;
            }
            let what = format!("{count} {}s have an infinite number, such as {id}", self.name);
            let finding = Finding::new(Severity::Refused, FindingKind::NotFinite, self.file, what);
            let finding =
                finding.column(&column).advice("write a number, or NaN or null if it is missing");
            findings.push(Finding { count, ..finding.forced("the models take it as missing") });
        }
    }

    /// Looks for ids that have several rows of features, of which the last counts.
    fn add_repeated(
        &self,
        dataset: &Dataset,
        entities: usize,
        findings: &mut Vec<Finding>,
    ) -> Result<()> {
        let reader = TableReader::open(&dataset.dir.join(self.file))?;
        if reader.rows() == entities {
            return Ok(());
        }
        let (mut seen, mut rows, mut number) = (HashSet::new(), Tally::default(), 0);
        for group in 0..reader.groups() {
            for &id in reader.read(group, &[Field::new("id", CellType::U64)])?[0].u64s() {
                number += 1;
                if !seen.insert(id) {
                    rows.add(number);
                }
            }
        }
        let what =
            format!("{} rows have the id of an earlier one, and the last counts", rows.count);
        let finding = Finding::new(Severity::Warned, FindingKind::RepeatedId, self.file, what);
        let advice = format!("keep one row of each {}", self.name);
        findings.push(finding.rows(rows).column("id").advice(advice));
        Ok(())
    }
}
