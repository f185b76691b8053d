//! How a schema may change while data, models and logs of it exist: it grows. Surfaces, actions,
//! values, tasks, features and counters are appended to their lists, so that a number once given is
//! never given to anything else; a feature that is no longer used is retired, and keeps its place.
//!
//! A schema remembers how long its lists were before each growth ([`SchemaSize`]). Because lists
//! only get longer, that is enough to know every earlier layout, and the hashes of it. This module
//! judges changes; [`super::upgrade`] and [`super::fm_spec`] bring what was stored to the present
//! layout.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::alignment::changed_alignments;
use super::{Counter, Feature, Schema, Task};
use crate::error::{CommonErrors as _, Error, Result};

/// The lengths of a schema's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchemaSize {
    /// The number of surfaces.
    pub surfaces: usize,
    /// The number of actions.
    pub actions: usize,
    /// The number of values.
    pub values: usize,
    /// The number of tasks.
    pub tasks: usize,
    /// The number of features of items.
    pub item_features: usize,
    /// The number of features of users.
    pub user_features: usize,
    /// The number of features of contexts.
    pub context_features: usize,
    /// The number of counters.
    pub counters: usize,
}

impl SchemaSize {
    /// The lengths in the order of the fields.
    fn lengths(self) -> [usize; 8] {
        let SchemaSize { surfaces, actions, values, tasks, .. } = self;
        let SchemaSize { item_features, user_features, context_features, counters, .. } = self;
        let features = [item_features, user_features, context_features];
        let [item, user, context] = features;
        [surfaces, actions, values, tasks, item, user, context, counters]
    }

    /// Whether no list is longer than in `other`.
    fn is_within(self, other: SchemaSize) -> bool {
        self.lengths().iter().zip(other.lengths()).all(|(own, other)| *own <= other)
    }
}

impl Schema {
    /// The lengths of its lists.
    pub fn size(&self) -> SchemaSize {
        SchemaSize {
            surfaces: self.surfaces.len(),
            actions: self.actions.len(),
            values: self.values.len(),
            tasks: self.tasks.len(),
            item_features: self.item_features.len(),
            user_features: self.user_features.len(),
            context_features: self.context_features.len(),
            counters: self.counters.len(),
        }
    }

    /// The layouts that this schema has had: the present one, then the earlier ones, newest first.
    pub fn layouts(&self) -> impl Iterator<Item = Schema> + '_ {
        let earlier = self.earlier.iter().rev().map(|&size| self.layout_at(size));
        std::iter::once(self.layout()).chain(earlier)
    }

    /// The layout when the lists had these lengths.
    fn layout_at(&self, size: SchemaSize) -> Schema {
        let mut layout = self.layout();
        layout.surfaces.truncate(size.surfaces);
        layout.actions.truncate(size.actions);
        layout.values.truncate(size.values);
        layout.tasks.truncate(size.tasks);
        layout.item_features.truncate(size.item_features);
        layout.user_features.truncate(size.user_features);
        layout.context_features.truncate(size.context_features);
        layout.counters.truncate(size.counters);
        for task in &mut layout.tasks {
            task.surfaces.retain(|name| layout.surfaces.contains(name));
        }
        layout.retain_owned();
        layout
    }

    /// Checks that the earlier sizes are of this schema.
    pub(super) fn validate_earlier(&self) -> Result<()> {
        let next = self.earlier.iter().skip(1).copied().chain([self.size()]);
        for (at, (&size, next)) in self.earlier.iter().zip(next).enumerate() {
            let fail = |why: String| {
                let advice = "restore the file that `hypercast schema apply` wrote";
                Err(Error::Schema(format!("entry {at} of `earlier` {why}; {advice}")))
            };
            if !size.is_within(next) {
                return fail("has a list that is longer than later".into());
            }
            if let Err(error) = self.layout_at(size).validate() {
                return fail(format!("is no schema: {error}"));
            }
        }
        Ok(())
    }
}

/// What a schema has gained over an earlier one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SchemaGrowth {
    /// The new entries, list by list.
    pub appended: Vec<AppendedEntry>,
    /// Features that are retired now.
    pub retired: Vec<String>,
    /// Features that were retired, and are used again.
    pub restored: Vec<String>,
    /// Whether ranges differ.
    pub ranges_changed: bool,
    /// The surfaces whose alignment modules differ.
    pub realigned: Vec<String>,
}

/// A new entry of a schema.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AppendedEntry {
    /// What it is.
    pub kind: EntryKind,
    /// Its name.
    pub name: String,
    /// Its number, which nothing else will ever have: its place in its list, from 0 on.
    pub number: usize,
    /// The surface that it belongs to; none of the core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// What an entry of a schema is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// Of `surfaces`.
    Surface,
    /// Of `actions`.
    Action,
    /// Of `values`.
    Value,
    /// Of `tasks`.
    Task,
    /// Of `item_features`.
    ItemFeature,
    /// Of `user_features`.
    UserFeature,
    /// Of `context_features`.
    ContextFeature,
    /// Of `counters`.
    Counter,
}

impl fmt::Display for EntryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EntryKind::Surface => "surface",
            EntryKind::Action => "action",
            EntryKind::Value => "value",
            EntryKind::Task => "task",
            EntryKind::ItemFeature => "item feature",
            EntryKind::UserFeature => "user feature",
            EntryKind::ContextFeature => "context feature",
            EntryKind::Counter => "counter",
        })
    }
}

/// A change that is no growth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RefusedChange {
    /// The entry that changed.
    pub entry: String,
    /// What is wrong with the change.
    pub reason: String,
    /// What to do instead.
    pub advice: String,
}

impl fmt::Display for RefusedChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.entry, self.reason, self.advice)
    }
}

impl SchemaGrowth {
    /// What `new` has gained over `old`.
    ///
    /// # Errors
    /// All changes that are no growth.
    pub fn between(old: &Schema, new: &Schema) -> std::result::Result<Self, Vec<RefusedChange>> {
        let mut judge = Judge { old, new, appended: Vec::new(), refused: Vec::new() };
        judge.names(EntryKind::Surface, &old.surfaces, &new.surfaces);
        judge.names(EntryKind::Action, &old.actions, &new.actions);
        judge.names(EntryKind::Value, &old.values, &new.values);
        judge.tasks(old, new);
        for (kind, old, new) in [
            (EntryKind::ItemFeature, &old.item_features, &new.item_features),
            (EntryKind::UserFeature, &old.user_features, &new.user_features),
            (EntryKind::ContextFeature, &old.context_features, &new.context_features),
        ] {
            judge.features(kind, old, new);
        }
        judge.counters(&old.counters, &new.counters);
        if old.ids != new.ids {
            let advice = "keep them; other ids are another data set";
            judge.refuse("ids", "have another type", advice);
        }
        if !judge.refused.is_empty() {
            return Err(judge.refused);
        }
        let only_in = |a: &Schema, b: &Schema| {
            a.retired.iter().filter(|name| !b.is_retired(name)).cloned().collect()
        };
        Ok(SchemaGrowth {
            appended: judge.appended,
            retired: only_in(new, old),
            restored: only_in(old, new),
            ranges_changed: old.ranges != new.ranges,
            realigned: changed_alignments(old, new),
        })
    }

    /// Replaces the schema of a data set by `new`, which must have grown from it, and returns what
    /// it gained. The present file is kept beside it as `schema.previous.toml`. A crash leaves the
    /// old or the new schema, and the same call may be made again.
    ///
    /// # Errors
    /// `new` is no growth; the message names all changes that are none. The file system fails.
    pub fn apply(dir: &Path, new: &Schema) -> Result<SchemaGrowth> {
        let path = dir.join("schema.toml");
        let old = Schema::load(&path)?;
        let growth = SchemaGrowth::between(&old, new).map_err(|refused| {
            let lines: Vec<String> = refused.iter().map(RefusedChange::to_string).collect();
            Error::data(&path, lines.join("; "))
        })?;
        if growth.is_empty() {
            return Ok(growth);
        }
        let mut earlier = old.earlier.clone();
        earlier.extend((!growth.is_layout_same()).then(|| old.size()));
        old.save(&dir.join("schema.previous.toml"))?;
        Schema { earlier, ..new.clone() }.save(&path)?;
        Ok(growth)
    }

    /// Whether no list is longer.
    pub fn is_layout_same(&self) -> bool {
        self.appended.is_empty()
    }

    /// Whether the two schemas are the same, their records of growth aside.
    pub fn is_empty(&self) -> bool {
        self.realigned.is_empty() && self.is_for_fm_trainer()
    }

    /// Whether nothing differs but alignment modules, of which the FM's trainer alone is told.
    pub fn is_for_fm_trainer(&self) -> bool {
        let same_features = self.retired.is_empty() && self.restored.is_empty();
        self.is_layout_same() && same_features && !self.ranges_changed
    }
}

/// Collects what is new and what is refused.
struct Judge<'a> {
    old: &'a Schema,
    new: &'a Schema,
    appended: Vec<AppendedEntry>,
    refused: Vec<RefusedChange>,
}

impl Judge<'_> {
    fn refuse(&mut self, entry: impl Into<String>, reason: impl Into<String>, advice: &str) {
        let (entry, reason) = (entry.into(), reason.into());
        self.refused.push(RefusedChange { entry, reason, advice: advice.into() });
    }

    /// Compares the names of a list. Names that are gone are told first; of those that stayed, only
    /// the first that moved, because one that moves displaces others.
    fn names(&mut self, kind: EntryKind, old: &[impl AsRef<str>], new: &[impl AsRef<str>]) {
        let old: Vec<&str> = old.iter().map(AsRef::as_ref).collect();
        let new: Vec<&str> = new.iter().map(AsRef::as_ref).collect();
        let entry = |name: &str| format!("{kind} `{name}`");
        let is_feature = matches!(
            kind,
            EntryKind::ItemFeature | EntryKind::UserFeature | EntryKind::ContextFeature
        );
        for name in old.iter().filter(|name| !new.contains(name)) {
            let advice = if is_feature {
                "put it back where it was, and name it in `retired` if it is no longer used; what \
                 is stored has its column"
            } else {
                "put it back where it was; what is stored has its number"
            };
            self.refuse(entry(name), "is gone, or has another name", advice);
        }
        let kept: Vec<&str> = old.iter().copied().filter(|name| new.contains(name)).collect();
        kept.iter().for_each(|name| self.owner(kind, name));
        let known = new.iter().filter(|name| old.contains(name));
        if let Some((was, is)) = kept.iter().zip(known).find(|(was, is)| was != is) {
            let reason = format!("stands where `{was}` stood");
            self.refuse(entry(is), reason, "keep the order; numbers are places in the list");
            return;
        }
        let last = new.iter().rposition(|name| old.contains(name)).map_or(0, |last| last + 1);
        for (number, name) in new.iter().enumerate().filter(|(_, name)| !old.contains(name)) {
            if number < last {
                let before = format!("is new and stands before `{}`", new[last - 1]);
                self.refuse(entry(name), before, "put it at the end of its list");
            } else {
                let owner = self.new.owner(kind, name).map(str::to_owned);
                self.appended.push(AppendedEntry { kind, name: (*name).into(), number, owner });
            }
        }
    }

    /// An entry of the core has been learned from by all, and one of a surface by its experts.
    fn owner(&mut self, kind: EntryKind, name: &str) {
        let whose = |schema: &Schema| match schema.owner(kind, name) {
            Some(surface) => format!("to surface `{surface}`"),
            None => "to all".to_owned(),
        };
        let (was, is) = (whose(self.old), whose(self.new));
        if was != is {
            let reason = format!("belonged {was}, and now {is}");
            let advice = "leave it whose it was, and append an entry with another name";
            self.refuse(format!("{kind} `{name}`"), reason, advice);
        }
    }

    fn tasks(&mut self, old: &Schema, new: &Schema) {
        let names = |tasks: &[Task]| tasks.iter().map(|task| task.name.clone()).collect::<Vec<_>>();
        self.names(EntryKind::Task, &names(&old.tasks), &names(&new.tasks));
        for (was, is) in pairs(&old.tasks, &new.tasks, |task| &task.name) {
            let known = is.surfaces.iter().filter(|name| old.surfaces.contains(name));
            let known: Vec<String> = known.cloned().collect();
            let is_same = Task { surfaces: was.surfaces.clone(), ..is.clone() } == *was;
            if !is_same || known != was.surfaces || is.surfaces.is_empty() != known.is_empty() {
                self.refuse(
                    format!("task `{}`", was.name),
                    "is another one than before",
                    "keep its role, kind, label, transform and weight, and add only new surfaces at \
                     the end of its own; what else changes is a task with another name",
                );
            }
        }
    }

    fn features(&mut self, kind: EntryKind, old: &[Feature], new: &[Feature]) {
        let names = |all: &[Feature]| all.iter().map(|own| own.name.clone()).collect::<Vec<_>>();
        self.names(kind, &names(old), &names(new));
        for (was, is) in pairs(old, new, |feature| &feature.name) {
            if was != is {
                let what = if was.kind != is.kind {
                    "has another type"
                } else if was.training_only != is.training_only {
                    "differs in `training_only`"
                } else if was.max_values != is.max_values {
                    "differs in `max_values`"
                } else {
                    "differs in `optional`"
                };
                let advice = "keep it, and append a feature with another name";
                self.refuse(format!("{kind} `{}`", was.name), what, advice);
            }
        }
    }

    fn counters(&mut self, old: &[Counter], new: &[Counter]) {
        let names = |all: &[Counter]| all.iter().map(|own| own.name.clone()).collect::<Vec<_>>();
        self.names(EntryKind::Counter, &names(old), &names(new));
        for (was, is) in pairs(old, new, |counter| &counter.name) {
            if was != is {
                let advice = "keep it, and append a counter with another name";
                self.refuse(format!("counter `{}`", was.name), "counts something else", advice);
            }
        }
    }
}

/// The entries of one name in two lists.
fn pairs<'a, T>(
    old: &'a [T],
    new: &'a [T],
    name: impl Fn(&T) -> &String + 'a,
) -> impl Iterator<Item = (&'a T, &'a T)> {
    old.iter().filter_map(move |was| Some((was, new.iter().find(|is| name(is) == name(was))?)))
}

#[cfg(test)]
mod tests;
