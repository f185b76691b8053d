//! What belongs to one surface: features, counters, actions, values and tasks that its team adds to
//! the schema for its own experts. All other entries are the *core*.
//!
//! An entry that belongs to a surface stands in its list like any other, and is stored and brought
//! to later layouts like it; `owned` says beside the lists whose it is. The foundation model is
//! made for the core and shown nothing else ([`CoreColumns`]), so that a team can add to its own
//! part while the FM and the experts of other surfaces stay what they are, to the bit. What the
//! FM's trainer is shown besides, a team says itself ([`super::alignment`]).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Outcome, Target};
use serde::{Deserialize, Serialize};

use super::alignment::AlignedColumns;
use super::growth::{EntryKind, SchemaSize};
use super::upgrade::places;
use super::{Counter, Schema, Task, TaskKind, TaskRole};
use crate::error::{Error, Result};

/// The entries that belong to a surface, by the names that they have in their lists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OwnedEntries {
    /// Of `actions`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub actions: BTreeSet<String>,
    /// Of `values`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub values: BTreeSet<String>,
    /// Of `tasks`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub tasks: BTreeSet<String>,
    /// Of `context_features`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub context_features: BTreeSet<String>,
    /// Of `counters`.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub counters: BTreeSet<String>,
}

/// The kinds of entries that can belong to a surface. Features of items and users cannot: every
/// history holds them.
const KINDS: [EntryKind; 5] = [
    EntryKind::Action,
    EntryKind::Value,
    EntryKind::Task,
    EntryKind::ContextFeature,
    EntryKind::Counter,
];

impl OwnedEntries {
    fn names(&self, kind: EntryKind) -> Option<&BTreeSet<String>> {
        match kind {
            EntryKind::Action => Some(&self.actions),
            EntryKind::Value => Some(&self.values),
            EntryKind::Task => Some(&self.tasks),
            EntryKind::ContextFeature => Some(&self.context_features),
            EntryKind::Counter => Some(&self.counters),
            EntryKind::Surface | EntryKind::ItemFeature | EntryKind::UserFeature => None,
        }
    }

    /// Without the names that a schema's lists lack.
    fn retain(&mut self, schema: &Schema) {
        let OwnedEntries { actions, values, tasks, context_features, counters } = self;
        let kinds = KINDS.into_iter();
        for (kind, names) in kinds.zip([actions, values, tasks, context_features, counters]) {
            names.retain(|name| schema.names_of(kind).any(|known| known == name));
        }
    }

    fn is_empty(&self) -> bool {
        *self == OwnedEntries::default()
    }
}

impl Schema {
    /// The surface that an entry belongs to; none of the core.
    pub fn owner(&self, kind: EntryKind, name: &str) -> Option<&str> {
        let has = |owned: &OwnedEntries| owned.names(kind).is_some_and(|all| all.contains(name));
        self.owned.iter().find(|(_, owned)| has(owned)).map(|(surface, _)| surface.as_str())
    }

    /// Whether an entry is of the core, or of `surface`.
    pub fn is_seen_on(&self, surface: Option<&str>, kind: EntryKind, name: &str) -> bool {
        let owner = self.owner(kind, name);
        owner.is_none() || owner == surface
    }

    /// The part that is seen on a surface: the core, and what belongs to the surface. Actions and
    /// values keep their places, so those up to the last one that is seen are all there.
    pub fn seen_on(&self, surface: Option<&str>) -> Schema {
        let mut seen = self.clone();
        // What the FM learns from it, nobody else is told.
        seen.alignment.clear();
        if self.owned.is_empty() {
            return seen;
        }
        let is_seen = |kind, name: &str| self.is_seen_on(surface, kind, name);
        seen.actions.truncate(self.end_of_seen(surface, EntryKind::Action, self.actions.len()));
        seen.values.truncate(self.end_of_seen(surface, EntryKind::Value, self.values.len()));
        seen.tasks.retain(|task| is_seen(EntryKind::Task, &task.name));
        let features = &mut seen.context_features;
        features.retain(|feature| is_seen(EntryKind::ContextFeature, &feature.name));
        seen.counters.retain(|counter| is_seen(EntryKind::Counter, &counter.name));
        seen.owned.retain(|owner, _| Some(owner.as_str()) == surface);
        let names: Vec<String> =
            seen.features().map(|own| own.name.clone()).chain(seen.values.clone()).collect();
        seen.retired.retain(|name| names.contains(name));
        seen.ranges.retain(|range| names.contains(&range.name));
        seen.earlier = self.earlier.iter().map(|&size| self.size_seen(surface, size)).collect();
        seen
    }

    /// The core alone, which the foundation model is made for.
    pub fn core(&self) -> Schema {
        self.seen_on(None)
    }

    /// How long the lists of what is seen were when the schema's were so long.
    fn size_seen(&self, surface: Option<&str>, size: SchemaSize) -> SchemaSize {
        let count = |kind, end: usize| {
            let names = self.names_of(kind).take(end);
            names.filter(|name| self.is_seen_on(surface, kind, name)).count()
        };
        SchemaSize {
            actions: self.end_of_seen(surface, EntryKind::Action, size.actions),
            values: self.end_of_seen(surface, EntryKind::Value, size.values),
            tasks: count(EntryKind::Task, size.tasks),
            context_features: count(EntryKind::ContextFeature, size.context_features),
            counters: count(EntryKind::Counter, size.counters),
            ..size
        }
    }

    /// The end of the last of a list's first `end` entries that is seen.
    fn end_of_seen(&self, surface: Option<&str>, kind: EntryKind, end: usize) -> usize {
        let names = self.names_of(kind).take(end).enumerate();
        let seen = names.filter(|(_, name)| self.is_seen_on(surface, kind, name));
        seen.last().map_or(0, |(at, _)| at + 1)
    }

    /// Drops what `owned` says of entries that the lists lack.
    pub(super) fn retain_owned(&mut self) {
        let mut owned = std::mem::take(&mut self.owned);
        owned.values_mut().for_each(|entries| entries.retain(self));
        owned.retain(|_, entries| !entries.is_empty());
        self.owned = owned;
    }

    /// The names of a list.
    pub(super) fn names_of(&self, kind: EntryKind) -> Box<dyn Iterator<Item = &String> + '_> {
        match kind {
            EntryKind::Surface => Box::new(self.surfaces.iter()),
            EntryKind::Action => Box::new(self.actions.iter()),
            EntryKind::Value => Box::new(self.values.iter()),
            EntryKind::Task => Box::new(self.tasks.iter().map(|own| &own.name)),
            EntryKind::ItemFeature => Box::new(self.item_features.iter().map(|own| &own.name)),
            EntryKind::UserFeature => Box::new(self.user_features.iter().map(|own| &own.name)),
            EntryKind::ContextFeature => {
                Box::new(self.context_features.iter().map(|own| &own.name))
            }
            EntryKind::Counter => Box::new(self.counters.iter().map(|own| &own.name)),
        }
    }

    /// Checks that nothing depends on what belongs to another surface.
    pub(super) fn validate_owned(&self) -> Result<()> {
        for (surface, entries) in &self.owned {
            let fail = |why: String| Err(Error::Schema(format!("owned.{surface}: {why}")));
            if !self.surfaces.contains(surface) {
                let known = self.surfaces.join(", ");
                return fail(format!("no surface has this name; there are: {known}"));
            }
            for kind in KINDS {
                for name in entries.names(kind).into_iter().flatten() {
                    let whose = self.owner(kind, name).filter(|owner| owner != surface);
                    if let Some(other) = whose {
                        return fail(format!("{kind} `{name}` belongs to `{other}`, too"));
                    }
                    if !self.names_of(kind).any(|known| known == name) {
                        return fail(format!(
                            "no {kind} is called `{name}`; append it to its list, too"
                        ));
                    }
                }
            }
        }
        self.tasks.iter().try_for_each(|task| self.validate_owned_task(task))?;
        self.counters.iter().try_for_each(|counter| self.validate_owned_counter(counter))
    }

    fn validate_owned_task(&self, task: &Task) -> Result<()> {
        let owner = self.owner(EntryKind::Task, &task.name);
        let whose = format!("task `{}`", task.name);
        for kind in [EntryKind::Action, EntryKind::Value] {
            // A name may be that of an action and of a value; the task's type says which.
            if self.is_label(task, kind) {
                self.check_seen(&whose, owner, kind, &task.label)?;
            }
        }
        let Some(owner) = owner else { return Ok(()) };
        if task.role != TaskRole::Auxiliary || task.surfaces != [owner] {
            return Err(Error::Schema(format!(
                "{whose} belongs to surface `{owner}`: give it `role = \"auxiliary\"` and \
                 `surfaces = [\"{owner}\"]`"
            )));
        }
        Ok(())
    }

    fn validate_owned_counter(&self, counter: &Counter) -> Result<()> {
        let owner = self.owner(EntryKind::Counter, &counter.name);
        let whose = format!("counter `{}`", counter.name);
        self.check_seen(&whose, owner, EntryKind::Action, &counter.action)?;
        let mut key = counter.key.iter();
        key.try_for_each(|name| self.check_seen(&whose, owner, EntryKind::ContextFeature, name))
    }

    pub(super) fn is_label(&self, task: &Task, kind: EntryKind) -> bool {
        match task.kind {
            TaskKind::Binary => kind == EntryKind::Action,
            TaskKind::Regression => kind == EntryKind::Value,
        }
    }

    /// Checks that an entry of a surface, or of the core, may read another entry.
    fn check_seen(
        &self,
        whose: &str,
        owner: Option<&str>,
        kind: EntryKind,
        name: &str,
    ) -> Result<()> {
        if self.is_seen_on(owner, kind, name) {
            return Ok(());
        }
        let of = self.owner(kind, name).unwrap_or_default();
        Err(Error::Schema(format!(
            "{whose} reads {kind} `{name}`, which belongs to surface `{of}`: name it under \
             `[owned.{of}]`, too, or let it read another one"
        )))
    }
}

/// Where the part of examples is that the foundation model is shown: the core's, and behind it,
/// for a trainer, what the alignment modules of surfaces read.
#[derive(Debug, Clone)]
pub struct CoreColumns {
    /// Nothing belongs to a surface: what is shown of an example is all of it, and nothing more
    /// but what `aligned` has.
    is_all: bool,
    /// The numbers of `Target::ids` and `Target::features`.
    widths: [usize; 2],
    /// The places in `Target::ids`.
    ids: Vec<usize>,
    /// The places in `Target::features`.
    features: Vec<usize>,
    /// Bit i: action i is of the core.
    actions: u64,
    /// The values that belong to surfaces.
    other_values: Vec<usize>,
    /// By surface: what its alignment module reads and learns; empty where nobody is shown it.
    aligned: Vec<AlignedPart>,
}

/// What of its targets a surface's alignment module is shown besides the core's part.
#[derive(Debug, Clone)]
struct AlignedPart {
    columns: AlignedColumns,
    /// Bit i: action i is a label.
    actions: u64,
    /// The values that are labels.
    values: Vec<usize>,
}

impl AlignedPart {
    fn of(schema: &Schema, surface: &str) -> AlignedPart {
        let actions = schema.aligned_labels(surface, EntryKind::Action);
        AlignedPart {
            columns: AlignedColumns::of(schema, surface),
            actions: actions.into_iter().fold(0, |bits, action| bits | 1 << action),
            values: schema.aligned_labels(surface, EntryKind::Value),
        }
    }
}

impl CoreColumns {
    /// What a model of a schema is shown that serves. A trainer is made for more where surfaces
    /// have alignment modules, and refuses targets without it: see [`CoreColumns::for_trainer`].
    pub fn new(schema: &Schema) -> CoreColumns {
        let core = schema.core();
        let is_core = |kind, name: &String| schema.owner(kind, name).is_none();
        let of_surfaces = |kind| {
            let names = schema.names_of(kind).enumerate();
            names.filter(move |(_, name)| !is_core(kind, name)).map(|(at, _)| at)
        };
        let (ids, features) = (schema.id_columns(), schema.feature_columns());
        CoreColumns {
            is_all: schema.owned.is_empty(),
            widths: [ids.len(), features.len()],
            ids: places(&core.id_columns(), &ids),
            features: places(&core.feature_columns(), &features),
            actions: of_surfaces(EntryKind::Action).fold(!0, |bits, action| bits & !(1 << action)),
            other_values: of_surfaces(EntryKind::Value).collect(),
            aligned: Vec::new(),
        }
    }

    /// What a trainer is shown ([`super::trainer_spec`]): targets of a surface with an alignment
    /// module of its own have the columns that this reads, behind all others, and the labels that
    /// it learns. Histories are as those that serving knows.
    pub fn for_trainer(schema: &Schema) -> CoreColumns {
        let core = CoreColumns::new(schema);
        if schema.alignment.is_empty() {
            return core;
        }
        let aligned = schema.surfaces.iter().map(|name| AlignedPart::of(schema, name)).collect();
        CoreColumns { aligned, ..core }
    }

    /// An example as the foundation model is shown it: the core's columns, in the order of
    /// [`Schema::core`], and of outcomes the core's actions and values. Columns that are not those
    /// of the schema stay as they are, for the model to refuse.
    pub fn example<'a>(&self, example: &'a Example) -> Cow<'a, Example> {
        if self.is_same(example) {
            return Cow::Borrowed(example);
        }
        Cow::Owned(Example {
            user: example.user.clone(),
            history: self.history(example.history.clone()),
            targets: self.targets(example),
            ..*example
        })
    }

    /// The same of several.
    pub fn examples<'a>(
        &self,
        examples: impl IntoIterator<Item = &'a Example>,
    ) -> Vec<Cow<'a, Example>> {
        examples.into_iter().map(|example| self.example(example)).collect()
    }

    /// The same of examples that others share.
    pub fn shared(&self, examples: &Arc<[Example]>) -> Arc<[Example]> {
        if examples.iter().all(|example| self.is_same(example)) {
            return examples.clone();
        }
        examples.iter().map(|example| self.example(example).into_owned()).collect()
    }

    /// The same of an example that nobody else needs.
    pub fn into_core(&self, example: Example) -> Example {
        if self.is_same(&example) {
            return example;
        }
        let targets = self.targets(&example);
        Example { history: self.history(example.history), targets, ..example }
    }

    /// Whether an example is shown as it is.
    fn is_same(&self, example: &Example) -> bool {
        let aligned = self.aligned.get(usize::from(example.surface));
        self.is_all && aligned.is_none_or(|own| own.columns.is_empty())
    }

    fn history(&self, mut history: Vec<Event>) -> Vec<Event> {
        if !self.is_all {
            history.iter_mut().for_each(|event| event.outcome = self.outcome(&event.outcome));
        }
        history
    }

    fn targets(&self, example: &Example) -> Vec<Target> {
        example.targets.iter().map(|own| self.target(own, example.surface)).collect()
    }

    fn target(&self, target: &Target, surface: u16) -> Target {
        let Target { item, ids, features, outcome, truth } = target;
        let aligned = self.aligned.get(usize::from(surface));
        let is_own = [ids.len(), features.len()] == self.widths;
        let shown = || {
            let more = aligned.map(|own| &own.columns);
            let id_places = self.ids.iter().chain(more.into_iter().flat_map(|own| &own.ids));
            let places = self.features.iter().chain(more.into_iter().flat_map(|own| &own.features));
            let ids = id_places.map(|&place| ids[place]).collect();
            (ids, places.map(|&place| features[place]).collect())
        };
        let (ids, features) = if is_own { shown() } else { (ids.clone(), features.clone()) };
        let mut seen = self.outcome(outcome);
        if let Some(AlignedPart { actions, values, .. }) = aligned {
            seen.actions |= outcome.actions & actions;
            seen.known |= outcome.known & actions;
            values.iter().for_each(|&value| seen.values[value] = outcome.values[value]);
        }
        Target { item: item.clone(), ids, features, outcome: seen, truth: truth.clone() }
    }

    fn outcome(&self, outcome: &Outcome) -> Outcome {
        let mut values = outcome.values;
        self.other_values.iter().for_each(|&value| values[value] = f32::NAN);
        let Outcome { actions, known, .. } = *outcome;
        Outcome { actions: actions & self.actions, known: known & self.actions, values }
    }
}

/// The columns of a schema that a surface sees beside the core's, by name: of `Target::features`
/// and of the id fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnColumns {
    /// The numeric columns.
    pub features: Vec<String>,
    /// The categorical features.
    pub ids: Vec<String>,
}

impl OwnColumns {
    /// Those of a surface; none without one.
    pub fn of(schema: &Schema, surface: Option<&str>) -> OwnColumns {
        let (core, seen) = (schema.core(), schema.seen_on(surface));
        let beside = |all: Vec<String>, core: Vec<String>| -> Vec<String> {
            all.into_iter().filter(|name| !core.contains(name)).collect()
        };
        let ids = |of: &Schema| -> Vec<String> {
            of.id_fields().into_iter().map(|field| field.name).collect()
        };
        OwnColumns {
            features: beside(seen.feature_columns(), core.feature_columns()),
            ids: beside(ids(&seen), ids(&core)),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
