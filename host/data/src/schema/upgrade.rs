//! Brings what was stored under an earlier layout of a schema to the present one. Its widths say
//! which layout that was: lists only get longer, so no two layouts that differ have the same ones.
//! Columns that it lacks are "missing". What fits no layout stays as it is, for its reader to
//! refuse.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use hypercast_fm::example::{Example, Item, Target, User};

use super::{Feature, FeatureCounts, FeatureKind, FeatureWidths, MISSING, MissingColumns, Schema};
use crate::dataset::ContextFeatures;

/// The layouts that records of a schema can have, and the way to the present one.
#[derive(Debug, Clone)]
pub struct ColumnUpgrade {
    now: FeatureWidths,
    ids: usize,
    features: usize,
    missing: MissingColumns,
    earlier: Vec<EarlierColumns>,
}

/// The columns of an earlier layout.
#[derive(Debug, Clone)]
struct EarlierColumns {
    widths: FeatureWidths,
    /// The present places of `Target::ids`.
    ids: Vec<usize>,
    /// The present places of `Target::features`.
    features: Vec<usize>,
}

impl ColumnUpgrade {
    /// From all earlier layouts of a schema.
    pub fn new(schema: &Schema) -> ColumnUpgrade {
        let (ids, features) = (schema.id_columns(), schema.feature_columns());
        let earlier = schema.layouts().skip(1).map(|layout| EarlierColumns {
            widths: FeatureWidths::new(&layout),
            ids: places(&layout.id_columns(), &ids),
            features: places(&layout.feature_columns(), &features),
        });
        let earlier = earlier.collect();
        let now = FeatureWidths::new(schema);
        let missing = MissingColumns::new(schema);
        ColumnUpgrade { now, ids: ids.len(), features: features.len(), missing, earlier }
    }

    /// Whether the schema has had one layout alone, so that nothing is to be brought to another.
    fn is_trivial(&self) -> bool {
        self.earlier.is_empty()
    }

    /// Brings an example to the present layout.
    pub fn example(&self, example: &mut Example) {
        if self.is_trivial() {
            return;
        }
        self.shared_user(&mut example.user);
        example.history.iter_mut().for_each(|event| self.shared_item(&mut event.item));
        example.targets.iter_mut().for_each(|target| self.target(target));
    }

    /// Brings a target and its item to the present layout.
    pub fn target(&self, target: &mut Target) {
        self.shared_item(&mut target.item);
        if (target.ids.len(), target.features.len()) == (self.ids, self.features) {
            return;
        }
        let of = |earlier: &&EarlierColumns| {
            (earlier.ids.len(), earlier.features.len()) == (target.ids.len(), target.features.len())
        };
        if let Some(earlier) = self.earlier.iter().find(of) {
            target.ids = spread(&target.ids, &earlier.ids, self.ids, 0);
            target.features = spread(&target.features, &earlier.features, self.features, MISSING);
            self.missing.fill(&mut target.features);
        }
    }

    /// Brings an item that others share to the present layout.
    pub fn shared_item(&self, item: &mut Arc<Item>) {
        if self.grows(&item.ids, &item.dense, |widths| widths.item) {
            self.item(Arc::make_mut(item));
        }
    }

    /// Brings an item to the present layout.
    pub fn item(&self, item: &mut Item) {
        if self.grows(&item.ids, &item.dense, |widths| widths.item) {
            extend(&mut item.ids, &mut item.dense, self.now.item);
        }
    }

    /// Brings a user to the present layout.
    pub fn user(&self, user: &mut User) {
        if self.grows(&user.ids, &user.dense, |widths| widths.user) {
            extend(&mut user.ids, &mut user.dense, self.now.user);
        }
    }

    /// Brings a context to the present layout. Either of its lists may be empty: all of them are
    /// missing.
    pub fn context(&self, context: &mut ContextFeatures) {
        let ContextFeatures { ids, dense } = context;
        let fits = |given: usize, of: usize| given == 0 || given == of;
        let of =
            |counts: FeatureCounts| fits(ids.len(), counts.ids) && fits(dense.len(), counts.dense);
        if of(self.now.context) || !self.earlier.iter().any(|was| of(was.widths.context)) {
            return;
        }
        let FeatureCounts { ids: id_count, dense: dense_count } = self.now.context;
        if !ids.is_empty() {
            ids.resize(id_count, 0);
        }
        if !dense.is_empty() {
            dense.resize(dense_count, MISSING);
        }
    }

    fn shared_user(&self, user: &mut Arc<User>) {
        if self.grows(&user.ids, &user.dense, |widths| widths.user) {
            self.user(Arc::make_mut(user));
        }
    }

    /// Whether features are of an earlier layout, and have fewer columns than now.
    fn grows(
        &self,
        ids: &[u64],
        dense: &[f32],
        of: impl Fn(&FeatureWidths) -> FeatureCounts,
    ) -> bool {
        let own = FeatureCounts { ids: ids.len(), dense: dense.len() };
        own != of(&self.now) && self.earlier.iter().any(|was| of(&was.widths) == own)
    }
}

/// Which columns a table of the schema may lack, because it was written before they were added or
/// after they were retired, and what then stands in each row.
#[derive(Debug, Clone, Default)]
pub(crate) struct ColumnDefaults {
    /// By name; ids are 0 whatever it says.
    may_lack: HashMap<String, f32>,
    retired: HashSet<String>,
}

impl ColumnDefaults {
    pub(crate) fn new(schema: &Schema) -> ColumnDefaults {
        let is_retired = |feature: &&Feature| schema.is_retired(&feature.name);
        let mut retired: HashSet<String> =
            schema.features().filter(is_retired).flat_map(Feature::columns).collect();
        let mut may_lack: HashMap<String, f32> = HashMap::new();
        let oldest = schema.layouts().last().expect("the present layout is one");
        let added = |now: Vec<String>, then: Vec<String>| -> Vec<String> {
            now.into_iter().filter(|name| !then.contains(name)).collect()
        };
        let features = added(schema.id_columns(), oldest.id_columns())
            .into_iter()
            .chain(added(schema.feature_columns(), oldest.feature_columns()));
        for name in features.chain(retired.iter().cloned()) {
            let feature = schema.features().find(|feature| feature.name == name);
            let missing = feature.map_or(MISSING, Feature::missing_number);
            may_lack.insert(format!("history_{name}"), missing);
            may_lack.insert(name, missing);
        }
        // Where an optional feature is made up, so is the column that says it is missing.
        let is_dense = |feature: &&Feature| feature.kind == FeatureKind::Dense;
        for feature in schema.features().filter(|feature| feature.is_optional()).filter(is_dense) {
            let column = format!("{}_missing", feature.name);
            if retired.contains(&feature.name) {
                retired.insert(column.clone());
            }
            if may_lack.contains_key(&feature.name) {
                may_lack.insert(column, 1.0);
            }
        }
        let of_history = retired.iter().map(|name| format!("history_{name}")).collect::<Vec<_>>();
        retired.extend(of_history);
        let unknown = |name: String| (name, MISSING);
        let values = added(schema.values.clone(), oldest.values.clone());
        may_lack.extend(values.into_iter().map(|name| unknown(format!("value_{name}"))));
        let tasks = schema.tasks.iter().skip(oldest.tasks.len());
        may_lack.extend(tasks.map(|task| unknown(format!("truth_{}", task.name))));
        ColumnDefaults { may_lack, retired }
    }

    /// The same, and columns of lists or numbers, or of cells that may be null, that a table may
    /// lack.
    pub(crate) fn and(mut self, columns: &[&str]) -> ColumnDefaults {
        self.may_lack.extend(columns.iter().map(|&column| (column.to_owned(), MISSING)));
        self
    }

    /// What stands in a column that a table lacks; none if it must have it.
    pub(crate) fn of(&self, column: &str) -> Option<f32> {
        self.may_lack.get(column).copied()
    }

    /// Whether nothing that a table has of a column counts.
    pub(crate) fn is_retired(&self, column: &str) -> bool {
        self.retired.contains(column)
    }
}

/// Where each of `columns` is among `now`.
pub(super) fn places(columns: &[String], now: &[String]) -> Vec<usize> {
    let place = |name: &String| now.iter().position(|other| other == name);
    columns.iter().map(|name| place(name).expect("a layout only grows")).collect()
}

/// A row of `width` columns with each cell at its place, and `missing` elsewhere.
fn spread<T: Copy>(row: &[T], places: &[usize], width: usize, missing: T) -> Vec<T> {
    let mut wide = vec![missing; width];
    for (&cell, &place) in row.iter().zip(places) {
        wide[place] = cell;
    }
    wide
}

fn extend(ids: &mut Vec<u64>, dense: &mut Vec<f32>, counts: FeatureCounts) {
    ids.resize(counts.ids, 0);
    dense.resize(counts.dense, MISSING);
}
