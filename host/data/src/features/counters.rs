//! Running counters over past outcomes: for each key, how often an action followed an impression.
//! Keys are 64-bit hashes of id columns.
//!
//! Counters with the same key share a row, so a candidate costs one look-up per key. The row also
//! contains their effects ([`super::effects`]). An impression whose action is not known is not
//! counted.

use hypercast_core::hash::mix64;
use hypercast_fm::example::{Outcome, Target};
use serde::{Deserialize, Serialize};

use super::FeatureConfig;
use super::effects::{Effect, Posterior};
use super::id_maps::RecencyMap;
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::growth::EntryKind;
use crate::schema::{Counter, Schema};

/// A count above this is halved: f32 counts in steps of one up to twice this number.
const TALLY_LIMIT: f32 = 8_388_608.0;

/// The index of the surface among the id columns (`schema::BUILT_IN_IDS`).
const SURFACE_COLUMN: usize = 2;

/// All counters of a schema.
pub(super) struct FeatureCounters {
    tables: Vec<Table>,
    /// Each counter's tally over all keys, with the time of its last change.
    totals: Vec<(i64, CounterTally)>,
    /// The first column of each counter, then the first of the actions' effects.
    columns_start: Vec<usize>,
    /// The actions that have effects.
    effect_actions: Vec<usize>,
    /// The effects of each surface, one per action. The last surface stands for history-only
    /// events, whose surface is not known.
    surfaces: Vec<Vec<Effect>>,
    half_lives_ms: Vec<f32>,
    prior_strength: f64,
}

/// The counters that share a key.
struct Table {
    /// Indices into the id columns.
    key: Vec<usize>,
    /// Whether the key contains the surface, the hour or the context, which history-only events
    /// lack.
    needs_place: bool,
    /// The surface whose feature the key contains: on others it is not known.
    only_on: Option<u64>,
    /// Whether the key contains the candidate's item or context.
    by_candidate: bool,
    members: Vec<Member>,
    rows: RecencyMap<Vec<CounterCell>>,
}

/// One counter of a table.
struct Member {
    counter: usize,
    action: usize,
    /// Whether it has an effect.
    lasting: bool,
}

/// The state of one counter for one key.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct CounterCell {
    tally: CounterTally,
    effect: Effect,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct CounterTally {
    impressions: f32,
    positives: f32,
}

/// The global rates at a request's time.
struct Priors {
    now_ms: i64,
    /// Each counter's rate and its logit.
    rates: Vec<(f64, f64)>,
}

/// The counters' part that all candidates of a request have in common.
pub(super) struct RequestCounters {
    priors: Priors,
    /// The columns, with those of keys that do not depend on the candidate filled in.
    pub(super) columns: Vec<f32>,
    /// The posterior of every action from the surface and those keys.
    posteriors: Vec<Posterior>,
}

/// An outcome to count.
pub(super) struct Observation<'a> {
    /// The impression's id columns.
    pub(super) ids: &'a [u64],
    /// The outcome that was counted before: `Outcome::UNKNOWN` the first time.
    pub(super) before: Outcome,
    /// The outcome now.
    pub(super) outcome: Outcome,
    /// The time when it became known.
    pub(super) now_ms: i64,
    /// Whether surface, hour and context are known.
    pub(super) place_known: bool,
}

/// A label that an observation adds or changes.
#[derive(Debug, Clone, Copy)]
struct NewLabel {
    positive: bool,
    /// Whether the opposite was counted before.
    changed: bool,
}

impl Observation<'_> {
    fn new_label(&self, action: usize) -> Option<NewLabel> {
        let bit = |bits: u64| bits >> action & 1 == 1;
        let positive = bit(self.outcome.actions);
        let changed = bit(self.before.known) && positive != bit(self.before.actions);
        let new = bit(self.outcome.known) && (changed || !bit(self.before.known));
        new.then_some(NewLabel { positive, changed })
    }
}

impl FeatureCounters {
    pub(super) fn new(schema: &Schema, config: &FeatureConfig) -> FeatureCounters {
        let columns = schema.id_columns();
        let mut tables: Vec<Table> = Vec::new();
        for (counter, description) in schema.counters.iter().enumerate() {
            let index = |name: &String| {
                columns.iter().position(|column| column == name).expect("validated")
            };
            let key: Vec<usize> = description.key.iter().map(index).collect();
            let action = schema.action(&description.action).expect("validated");
            let member = Member { counter, action, lasting: schema.has_effect(description) };
            match tables.iter_mut().find(|table| table.key == key) {
                Some(table) => table.members.push(member),
                None => tables.push(Table {
                    needs_place: description.key.iter().any(|name| is_of_place(schema, name)),
                    only_on: description.key.iter().find_map(|name| only_on(schema, name)),
                    by_candidate: description.key.iter().any(|name| is_of_candidate(schema, name)),
                    key,
                    members: vec![member],
                    rows: RecencyMap::new(config.max_counter_keys),
                }),
            }
        }
        FeatureCounters {
            tables,
            totals: vec![(0, CounterTally::default()); schema.counters.len()],
            columns_start: columns_start(schema),
            effect_actions: schema.effect_actions().collect(),
            surfaces: vec![
                vec![Effect::of_surface(); schema.actions.len()];
                schema.surfaces.len() + 1
            ],
            half_lives_ms: schema
                .counters
                .iter()
                .map(|counter| counter.half_life_days * 86_400_000.0)
                .collect(),
            prior_strength: f64::from(config.prior_strength),
        }
    }

    /// The number of feature columns of the counters.
    pub(super) fn columns(&self) -> usize {
        self.columns_start[self.totals.len()] + 2 * self.effect_actions.len()
    }

    /// The part that a request's candidates have in common. Ids of candidates are not read.
    pub(super) fn common(&self, ids: &[u64], now_ms: i64) -> RequestCounters {
        let priors = self.priors(now_ms);
        let mut columns = vec![0.0; self.columns()];
        let mut posteriors = self.of_surface(self.surface(ids, true));
        for table in self.tables.iter().filter(|table| !table.by_candidate) {
            self.add(table, table.find(ids), &priors, &mut posteriors, &mut columns);
        }
        RequestCounters { priors, columns, posteriors }
    }

    fn priors(&self, now_ms: i64) -> Priors {
        let rate = |(&(last_ms, total), &half_life_ms): (&(i64, CounterTally), &f32)| {
            let total = total.faded(now_ms - last_ms, half_life_ms);
            let rate = (f64::from(total.positives) + 0.5) / (f64::from(total.impressions) + 1.0);
            (rate, logit(rate))
        };
        Priors { now_ms, rates: self.totals.iter().zip(&self.half_lives_ms).map(rate).collect() }
    }

    /// Fills in the columns of each counter (`NAME_rate`, `NAME_count` and, if it never forgets,
    /// `NAME_effect`), then `ACTION_log_odds` and `ACTION_doubt` of each action with effects. They
    /// start at index `at` of a target's features, which contain [`RequestCounters::columns`]
    /// there.
    pub(super) fn fill(&self, targets: &mut [Target], common: &RequestCounters, at: usize) {
        let mut posteriors = common.posteriors.repeat(targets.len());
        let mut found = Vec::with_capacity(targets.len());
        let actions = common.posteriors.len().max(1);
        for table in self.tables.iter().filter(|table| table.by_candidate) {
            // This loop only looks up, so that several cache misses overlap.
            found.clear();
            found.extend(targets.iter().map(|target| table.find(&target.ids)));
            let posteriors = posteriors.chunks_exact_mut(actions);
            for ((target, posteriors), found) in targets.iter_mut().zip(posteriors).zip(&found) {
                self.add(table, *found, &common.priors, posteriors, &mut target.features[at..]);
            }
        }
        let effects = at + self.columns_start[self.totals.len()];
        for (target, posteriors) in targets.iter_mut().zip(posteriors.chunks_exact(actions)) {
            let columns = target.features[effects..].chunks_exact_mut(2);
            for (&action, columns) in self.effect_actions.iter().zip(columns) {
                columns[0] = posteriors[action].mean as f32;
                columns[1] = posteriors[action].variance.sqrt() as f32;
            }
        }
    }

    /// Adds a table's state of a key to the columns of its counters and to the posteriors.
    fn add(
        &self,
        table: &Table,
        found: Option<(i64, &Vec<CounterCell>)>,
        priors: &Priors,
        posteriors: &mut [Posterior],
        columns: &mut [f32],
    ) {
        table.add_effects(found.map(|(_, row)| row), posteriors);
        let Some((last_ms, row)) = found else { return };
        for (member, cell) in table.members.iter().zip(row) {
            let tally =
                cell.tally.faded(priors.now_ms - last_ms, self.half_lives_ms[member.counter]);
            let (prior, prior_logit) = priors.rates[member.counter];
            let (n, k) = (f64::from(tally.impressions), self.prior_strength);
            let rate = (f64::from(tally.positives) + k * prior) / (n + k);
            let at = self.columns_start[member.counter];
            columns[at] = (logit(rate) - prior_logit) as f32;
            columns[at + 1] = tally.impressions.ln_1p();
            if member.lasting {
                columns[at + 2] = cell.effect.mean;
            }
        }
    }

    /// Counts labels that are new, and moves the count of labels that changed. Effects treat a
    /// changed label as one more outcome, because the earlier update cannot be undone.
    pub(super) fn apply(&mut self, seen: &Observation<'_>) {
        let posteriors = self.posteriors(seen.ids, seen.place_known);
        let surface = self.surface(seen.ids, seen.place_known);
        for (action, effect) in self.surfaces[surface].iter_mut().enumerate() {
            if let Some(new_label) = seen.new_label(action) {
                effect.apply(posteriors[action].update(new_label.positive));
            }
        }
        for table in
            self.tables.iter_mut().filter(|table| table.is_known(seen.ids, seen.place_known))
        {
            let hash = table.hash(seen.ids);
            let (last_ms, row) = table.rows.touch(hash, seen.now_ms);
            row.resize(table.members.len(), CounterCell::default());
            for (member, cell) in table.members.iter().zip(row) {
                let half_life_ms = self.half_lives_ms[member.counter];
                cell.tally = cell.tally.faded(seen.now_ms - last_ms, half_life_ms);
                if let Some(new_label) = seen.new_label(member.action) {
                    cell.tally.count(new_label);
                    if member.lasting {
                        cell.effect.apply(posteriors[member.action].update(new_label.positive));
                    }
                    let (total_ms, total) = &mut self.totals[member.counter];
                    *total = total.faded(seen.now_ms - *total_ms, half_life_ms);
                    *total_ms = seen.now_ms.max(*total_ms);
                    total.count(new_label);
                }
            }
        }
    }

    /// The log odds of every action for an impression: the sum of its effects.
    fn posteriors(&self, ids: &[u64], place_known: bool) -> Vec<Posterior> {
        let mut posteriors = self.of_surface(self.surface(ids, place_known));
        for table in self.tables.iter().filter(|table| table.is_known(ids, place_known)) {
            table.add_effects(table.rows.get(table.hash(ids)), &mut posteriors);
        }
        posteriors
    }

    /// The log odds of every action on a surface, without other effects.
    fn of_surface(&self, surface: usize) -> Vec<Posterior> {
        let posterior = |&effect: &Effect| {
            let mut posterior = Posterior::default();
            posterior.add(effect);
            posterior
        };
        self.surfaces[surface].iter().map(posterior).collect()
    }

    /// The index into `surfaces`.
    fn surface(&self, ids: &[u64], place_known: bool) -> usize {
        let unknown = self.surfaces.len() - 1;
        if place_known { (ids[SURFACE_COLUMN] as usize).min(unknown) } else { unknown }
    }
}

/// The counters' state in a form that can be serialised.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedCounters {
    /// The rows of each table: key, time of the last touch, and a cell for each member.
    tables: Vec<Vec<(u64, i64, Vec<CounterCell>)>>,
    totals: Vec<(i64, CounterTally)>,
    surfaces: Vec<Vec<Effect>>,
}

impl FeatureCounters {
    pub(super) fn saved(&self) -> SavedCounters {
        let rows = |table: &Table| {
            table.rows.iter().map(|(key, last_ms, row)| (key, last_ms, row.clone())).collect()
        };
        SavedCounters {
            tables: self.tables.iter().map(rows).collect(),
            totals: self.totals.clone(),
            surfaces: self.surfaces.clone(),
        }
    }

    pub(super) fn restore(&mut self, saved: SavedCounters) -> Result<()> {
        let SavedCounters { tables, totals, mut surfaces } = saved;
        let actions = self.surfaces[0].len();
        let fits = tables.len() <= self.tables.len()
            && totals.len() <= self.totals.len()
            && (1..=self.surfaces.len()).contains(&surfaces.len())
            && surfaces.iter().all(|effects| effects.len() <= actions);
        if !fits {
            return Err(Error::invalid(
                "the saved state has counters of another schema; remove it to build a new one",
            ));
        }
        // A schema that has grown since has more of each at the end, which begin anew.
        for (table, rows) in self.tables.iter_mut().zip(tables) {
            let members = table.members.len();
            for (key, last_ms, mut row) in rows {
                row.resize(members, CounterCell::default());
                table.rows.put(key, last_ms, row);
            }
        }
        self.totals[..totals.len()].copy_from_slice(&totals);
        // The last surface is the one that is not known.
        let unknown = surfaces.pop().expect("it has one");
        let effects = surfaces.into_iter().zip(&mut self.surfaces);
        effects.for_each(|(saved, effects)| effects[..saved.len()].copy_from_slice(&saved));
        let last = self.surfaces.last_mut().expect("there is one");
        last[..unknown.len()].copy_from_slice(&unknown);
        Ok(())
    }
}

/// The first column of each counter, and the end of the last one's columns.
fn columns_start(schema: &Schema) -> Vec<usize> {
    let width = |counter: &Counter| schema.counter_columns(counter).len();
    let widths = |counters: &[Counter]| counters.iter().map(width).sum();
    (0..=schema.counters.len()).map(|end| widths(&schema.counters[..end])).collect()
}

impl Table {
    /// Whether the whole key of an impression is known.
    fn is_known(&self, ids: &[u64], place_known: bool) -> bool {
        let is_on = |surface: u64| ids[SURFACE_COLUMN] == surface;
        (place_known || !self.needs_place) && self.only_on.is_none_or(is_on)
    }

    /// Adds the effects of a row, or the prior effects if the key has no row.
    fn add_effects(&self, row: Option<&Vec<CounterCell>>, posteriors: &mut [Posterior]) {
        for (at, member) in self.members.iter().enumerate().filter(|(_, member)| member.lasting) {
            let effect = row.map_or_else(Effect::default, |row| row[at].effect);
            posteriors[member.action].add(effect);
        }
    }

    /// The row of a key and the time of its last touch.
    fn find(&self, ids: &[u64]) -> Option<(i64, &Vec<CounterCell>)> {
        self.rows.get_with_time(self.hash(ids))
    }

    fn hash(&self, ids: &[u64]) -> u64 {
        self.key
            .iter()
            .fold(0x9e37_79b9_7f4a_7c15, |hash, &column| mix64(hash ^ mix64(ids[column])))
    }
}

impl CounterTally {
    /// The tally after `age_ms` of forgetting.
    fn faded(self, age_ms: i64, half_life_ms: f32) -> CounterTally {
        if half_life_ms == 0.0 || age_ms <= 0 {
            return self;
        }
        let keep = (-(age_ms as f32) / half_life_ms).exp2();
        CounterTally { impressions: self.impressions * keep, positives: self.positives * keep }
    }

    fn count(&mut self, label: NewLabel) {
        if label.changed {
            let by = if label.positive { 1.0 } else { -1.0 };
            self.positives = (self.positives + by).clamp(0.0, self.impressions);
            return;
        }
        if self.impressions >= TALLY_LIMIT {
            self.impressions *= 0.5;
            self.positives *= 0.5;
        }
        self.impressions += 1.0;
        self.positives += f32::from(u8::from(label.positive));
    }
}

/// Whether a column is not known for history-only events.
fn is_of_place(schema: &Schema, column: &str) -> bool {
    column == "surface"
        || column == "hour"
        || schema.context_features.iter().any(|feature| feature.name == column)
}

/// The surface that a column belongs to.
fn only_on(schema: &Schema, column: &str) -> Option<u64> {
    let owner = schema.owner(EntryKind::ContextFeature, column)?;
    schema.surface(owner).map(u64::from)
}

/// Whether a column differs between the candidates of a request.
fn is_of_candidate(schema: &Schema, column: &str) -> bool {
    let mut features = schema.item_features.iter().chain(&schema.context_features);
    column == "item_id" || features.any(|feature| feature.name == column)
}

fn logit(rate: f64) -> f64 {
    (rate / (1.0 - rate)).ln()
}
