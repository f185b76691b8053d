//! Running counters over past outcomes: for each key, how often an action
//! followed an impression. Keys are 64-bit hashes of id columns.
//!
//! Counters of one key share a row, so that a candidate costs one look-up a
//! key; it also holds their effects ([`super::effects`]). An impression whose action is not
//! known counts for nothing.

use hypercast_core::hash::mix64;
use hypercast_fm::example::{Outcome, Target};
use serde::{Deserialize, Serialize};

use super::FeatureConfig;
use super::effects::{Belief, Effect};
use super::recent::Recent;
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// Above it an f32 would soon no longer count by one.
const TALLY_LIMIT: f32 = 8_388_608.0;

/// All counters of a schema.
pub(super) struct Counters {
    tables: Vec<Table>,
    /// Of each counter over all keys, with the time of the last change.
    totals: Vec<(i64, Tally)>,
    /// Where each counter's columns begin, and after the last those of the actions' beliefs.
    places: Vec<usize>,
    /// The actions that have effects.
    believed: Vec<usize>,
    /// Each action's effect of each surface, and last of the surfaces of mere history, which are not known.
    surfaces: Vec<Vec<Effect>>,
    half_lives_ms: Vec<f32>,
    prior_strength: f64,
}

/// The counters that share a key.
struct Table {
    /// Indices into the id columns.
    key: Vec<usize>,
    /// Whether the key names the surface, the hour or the context, which an event of the mere history lacks.
    needs_place: bool,
    /// Whether the key names something of a candidate: its item or its context.
    by_candidate: bool,
    members: Vec<Member>,
    rows: Recent<Vec<Cell>>,
}

struct Member {
    counter: usize,
    action: usize,
    /// Whether it never forgets, and so has an effect.
    lasting: bool,
}

/// What is known of a counter's key.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Cell {
    tally: Tally,
    effect: Effect,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Tally {
    impressions: f32,
    positives: f32,
}

/// The global rates at a request's time.
struct Priors {
    now_ms: i64,
    /// Rate and its logit, one pair a counter.
    rates: Vec<(f64, f64)>,
}

/// What all candidates of a request have in common, worked out once.
pub(super) struct Common {
    priors: Priors,
    /// The columns, those of keys that name nothing of a candidate filled in.
    pub(super) columns: Vec<f32>,
    /// What the surface and those keys say of every action.
    beliefs: Vec<Belief>,
}

/// An outcome to count.
pub(super) struct Observation<'a> {
    /// The impression's id columns.
    pub(super) ids: &'a [u64],
    /// What was counted of it so far: `Outcome::UNKNOWN` the first time.
    pub(super) before: Outcome,
    /// What came of it.
    pub(super) outcome: Outcome,
    /// When that became known.
    pub(super) now_ms: i64,
    /// Whether surface, hour and context are known.
    pub(super) place_known: bool,
}

/// What an observation says of an action that was not known before.
#[derive(Debug, Clone, Copy)]
struct News {
    positive: bool,
    /// Whether the opposite was counted before.
    moved: bool,
}

impl Observation<'_> {
    fn news(&self, action: usize) -> Option<News> {
        let bit = |bits: u32| bits >> action & 1 == 1;
        let positive = bit(self.outcome.actions);
        let moved = bit(self.before.known) && positive != bit(self.before.actions);
        let new = bit(self.outcome.known) && (moved || !bit(self.before.known));
        new.then_some(News { positive, moved })
    }
}

impl Counters {
    pub(super) fn new(schema: &Schema, config: &FeatureConfig) -> Counters {
        let columns = schema.id_columns();
        let mut tables: Vec<Table> = Vec::new();
        for (counter, description) in schema.counters.iter().enumerate() {
            let index = |name: &String| {
                columns.iter().position(|column| column == name).expect("validated")
            };
            let key: Vec<usize> = description.key.iter().map(index).collect();
            let action = schema.action(&description.action).expect("validated");
            let member = Member { counter, action, lasting: description.is_lasting() };
            match tables.iter_mut().find(|table| table.key == key) {
                Some(table) => table.members.push(member),
                None => tables.push(Table {
                    needs_place: description.key.iter().any(|name| of_the_place(schema, name)),
                    by_candidate: description.key.iter().any(|name| of_a_candidate(schema, name)),
                    key,
                    members: vec![member],
                    rows: Recent::new(config.max_counter_keys),
                }),
            }
        }
        Counters {
            tables,
            totals: vec![(0, Tally::default()); schema.counters.len()],
            places: places(schema),
            believed: schema.believed_actions().collect(),
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

    /// How many feature columns the counters fill.
    pub(super) fn columns(&self) -> usize {
        self.places[self.totals.len()] + 2 * self.believed.len()
    }

    /// What a request's candidates have in common. Of `ids`, what is of a candidate is not read.
    pub(super) fn common(&self, ids: &[u64], now_ms: i64) -> Common {
        let priors = self.priors(now_ms);
        let mut columns = vec![0.0; self.columns()];
        let mut beliefs = self.of_surface(self.surface(ids, true));
        for table in self.tables.iter().filter(|table| !table.by_candidate) {
            self.add(table, table.find(ids), &priors, &mut beliefs, &mut columns);
        }
        Common { priors, columns, beliefs }
    }

    fn priors(&self, now_ms: i64) -> Priors {
        let rate = |(&(last_ms, total), &half_life_ms): (&(i64, Tally), &f32)| {
            let total = total.faded(now_ms - last_ms, half_life_ms);
            let rate = (f64::from(total.positives) + 0.5) / (f64::from(total.impressions) + 1.0);
            (rate, logit(rate))
        };
        Priors { now_ms, rates: self.totals.iter().zip(&self.half_lives_ms).map(rate).collect() }
    }

    /// Fills in `NAME_rate`, `NAME_count` and, if it lasts, `NAME_effect` of each counter, then `ACTION_log_odds` and
    /// `ACTION_doubt` of each action that has effects. Each target's columns begin at `at` of its features and hold
    /// [`Common::columns`] before.
    pub(super) fn fill(&self, targets: &mut [Target], common: &Common, at: usize) {
        let mut beliefs = common.beliefs.repeat(targets.len());
        let mut found = Vec::with_capacity(targets.len());
        let actions = common.beliefs.len().max(1);
        for table in self.tables.iter().filter(|table| table.by_candidate) {
            // Nothing but look-ups in this loop, so that the cache misses of several overlap.
            found.clear();
            found.extend(targets.iter().map(|target| table.find(&target.ids)));
            let beliefs = beliefs.chunks_exact_mut(actions);
            for ((target, beliefs), found) in targets.iter_mut().zip(beliefs).zip(&found) {
                self.add(table, *found, &common.priors, beliefs, &mut target.features[at..]);
            }
        }
        let effects = at + self.places[self.totals.len()];
        for (target, beliefs) in targets.iter_mut().zip(beliefs.chunks_exact(actions)) {
            let columns = target.features[effects..].chunks_exact_mut(2);
            for (&action, columns) in self.believed.iter().zip(columns) {
                columns[0] = beliefs[action].mean as f32;
                columns[1] = beliefs[action].variance.sqrt() as f32;
            }
        }
    }

    /// What a table knows of a key: into the columns of its counters, and to the beliefs.
    fn add(
        &self,
        table: &Table,
        found: Option<(i64, &Vec<Cell>)>,
        priors: &Priors,
        beliefs: &mut [Belief],
        columns: &mut [f32],
    ) {
        table.add_effects(found.map(|(_, row)| row), beliefs);
        let Some((last_ms, row)) = found else { return };
        for (member, cell) in table.members.iter().zip(row) {
            let tally =
                cell.tally.faded(priors.now_ms - last_ms, self.half_lives_ms[member.counter]);
            let (prior, prior_logit) = priors.rates[member.counter];
            let (n, k) = (f64::from(tally.impressions), self.prior_strength);
            let rate = (f64::from(tally.positives) + k * prior) / (n + k);
            let at = self.places[member.counter];
            columns[at] = (logit(rate) - prior_logit) as f32;
            columns[at + 1] = tally.impressions.ln_1p();
            if member.lasting {
                columns[at + 2] = cell.effect.mean;
            }
        }
    }

    /// Counts what is known now and was not before; where an action was counted as the other thing, it moves. Effects
    /// learn what changed as an outcome of its own: what they took from the earlier one cannot be told apart any more.
    pub(super) fn apply(&mut self, seen: &Observation<'_>) {
        let beliefs = self.beliefs(seen.ids, seen.place_known);
        let surface = self.surface(seen.ids, seen.place_known);
        for (action, effect) in self.surfaces[surface].iter_mut().enumerate() {
            if let Some(news) = seen.news(action) {
                effect.learn(beliefs[action].lesson(news.positive));
            }
        }
        for table in self.tables.iter_mut().filter(|table| seen.place_known || !table.needs_place) {
            let hash = table.hash(seen.ids);
            let (last_ms, row) = table.rows.touch(hash, seen.now_ms);
            row.resize(table.members.len(), Cell::default());
            for (member, cell) in table.members.iter().zip(row) {
                let half_life_ms = self.half_lives_ms[member.counter];
                cell.tally = cell.tally.faded(seen.now_ms - last_ms, half_life_ms);
                if let Some(news) = seen.news(member.action) {
                    cell.tally.take(news);
                    if member.lasting {
                        cell.effect.learn(beliefs[member.action].lesson(news.positive));
                    }
                    let (total_ms, total) = &mut self.totals[member.counter];
                    *total = total.faded(seen.now_ms - *total_ms, half_life_ms);
                    *total_ms = seen.now_ms.max(*total_ms);
                    total.take(news);
                }
            }
        }
    }

    /// The log odds of every action for an impression, as its effects have it.
    fn beliefs(&self, ids: &[u64], place_known: bool) -> Vec<Belief> {
        let mut beliefs = self.of_surface(self.surface(ids, place_known));
        for table in self.tables.iter().filter(|table| place_known || !table.needs_place) {
            table.add_effects(table.rows.get(table.hash(ids)), &mut beliefs);
        }
        beliefs
    }

    /// The log odds of every action on a surface of which nothing else is known.
    fn of_surface(&self, surface: usize) -> Vec<Belief> {
        let belief = |&effect: &Effect| {
            let mut belief = Belief::default();
            belief.add(effect);
            belief
        };
        self.surfaces[surface].iter().map(belief).collect()
    }

    fn surface(&self, ids: &[u64], place_known: bool) -> usize {
        let unknown = self.surfaces.len() - 1;
        if place_known { (ids[SURFACE_COLUMN] as usize).min(unknown) } else { unknown }
    }
}

/// All that counters hold, table by table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedCounters {
    /// Key, last touch, and a cell a member.
    tables: Vec<Vec<(u64, i64, Vec<Cell>)>>,
    totals: Vec<(i64, Tally)>,
    surfaces: Vec<Vec<Effect>>,
}

impl Counters {
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
        let shape = (saved.tables.len(), saved.totals.len(), saved.surfaces.len());
        if shape != (self.tables.len(), self.totals.len(), self.surfaces.len()) {
            return Err(Error::invalid("a saved state has counters of another schema"));
        }
        for (table, rows) in self.tables.iter_mut().zip(saved.tables) {
            rows.into_iter().for_each(|(key, last_ms, row)| table.rows.put(key, last_ms, row));
        }
        (self.totals, self.surfaces) = (saved.totals, saved.surfaces);
        Ok(())
    }
}

/// Where the surface stands among the id columns (`schema::BUILT_IN_IDS`).
const SURFACE_COLUMN: usize = 2;

/// Where each counter's columns begin, and where the last one's end.
fn places(schema: &Schema) -> Vec<usize> {
    let mut next = 0;
    let mut places = vec![next];
    places.extend(schema.counters.iter().map(|counter| {
        next += counter.columns().len();
        next
    }));
    places
}

impl Table {
    /// Adds the effects of a key, or those of one that is not known.
    fn add_effects(&self, row: Option<&Vec<Cell>>, beliefs: &mut [Belief]) {
        for (at, member) in self.members.iter().enumerate().filter(|(_, member)| member.lasting) {
            let effect = row.map_or_else(Effect::default, |row| row[at].effect);
            beliefs[member.action].add(effect);
        }
    }

    /// What is known of a key, and when it was last touched.
    fn find(&self, ids: &[u64]) -> Option<(i64, &Vec<Cell>)> {
        self.rows.get_with_time(self.hash(ids))
    }

    fn hash(&self, ids: &[u64]) -> u64 {
        self.key
            .iter()
            .fold(0x9e37_79b9_7f4a_7c15, |hash, &column| mix64(hash ^ mix64(ids[column])))
    }
}

impl Tally {
    fn faded(self, age_ms: i64, half_life_ms: f32) -> Tally {
        if half_life_ms == 0.0 || age_ms <= 0 {
            return self;
        }
        let keep = (-(age_ms as f32) / half_life_ms).exp2();
        Tally { impressions: self.impressions * keep, positives: self.positives * keep }
    }

    fn take(&mut self, news: News) {
        if news.moved {
            let by = if news.positive { 1.0 } else { -1.0 };
            self.positives = (self.positives + by).clamp(0.0, self.impressions);
        } else {
            self.add(news.positive);
        }
    }

    fn add(&mut self, positive: bool) {
        if self.impressions >= TALLY_LIMIT {
            self.impressions *= 0.5;
            self.positives *= 0.5;
        }
        self.impressions += 1.0;
        self.positives += f32::from(u8::from(positive));
    }
}

fn of_the_place(schema: &Schema, column: &str) -> bool {
    column == "surface"
        || column == "hour"
        || schema.context_features.iter().any(|feature| feature.name == column)
}

fn of_a_candidate(schema: &Schema, column: &str) -> bool {
    let mut features = schema.item_features.iter().chain(&schema.context_features);
    column == "item_id" || features.any(|feature| feature.name == column)
}

fn logit(rate: f64) -> f64 {
    (rate / (1.0 - rate)).ln()
}
