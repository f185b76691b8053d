//! The joiner as a state machine: one event in, examples and outcomes out.
//!
//! It reads no clock and does no input or output. Its time is the newest that an
//! event speaks of; what it makes depends on the events in their order and on
//! nothing else, so whoever has its state, or the first event, makes the same.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use hypercast_fm::example::{Example, Outcome};

use super::{
    Joined, JoinedExample, Known,
    delays::{Bounds, Delays},
    made::{Counts, Options, Sink},
    memory::{Orphans, Seen},
    unit::{Place, Row, Unit, awaited, difference, key, with},
    waiting::Waiting,
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::ingest::{Fact, Reaction, Shown, What};
use hypercast_data::dataset::{Context, Impression};
use hypercast_data::features::{FeatureState, replay};

/// The state machine.
pub struct Joiner {
    pub(super) options: Options,
    pub(super) state: FeatureState,
    pub(super) delays: Delays,
    pub(super) units: BTreeMap<u64, Unit>,
    pub(super) next: u64,
    pub(super) clock_ms: i64,
    pub(super) swept_ms: i64,
    pub(super) orphans: Orphans,
    pub(super) seen: Seen,
    pub(super) counts: Counts,
    bounds: Bounds,
    /// By surface, the actions that an impression there waits for, a bit each.
    awaited: Vec<u32>,
    /// The newest unit of each request.
    pub(super) requests: HashMap<u64, u64>,
    places: HashMap<u64, Place>,
    waiting: Waiting,
    open: BTreeSet<u64>,
    /// Those that left, in that order: they can be corrected.
    kept: VecDeque<u64>,
    impressions: usize,
}

/// How often windows are looked at, by the joiner's own clock.
const SWEEP_MS: i64 = 100;

impl Joiner {
    /// A joiner that has seen nothing, over features as of where the events begin. Items have no content vectors.
    pub fn new(state: FeatureState, options: Options) -> Joiner {
        let options = options.bounded();
        let schema = state.schema().clone();
        let bounds = Bounds::of(&options.settings);
        Joiner {
            delays: Delays::new(schema.surfaces.len(), schema.actions.len(), &bounds),
            awaited: awaited(&schema),
            state,
            options,
            bounds,
            units: BTreeMap::new(),
            next: 0,
            clock_ms: i64::MIN,
            swept_ms: i64::MIN,
            orphans: Orphans::default(),
            seen: Seen::default(),
            counts: Counts::default(),
            requests: HashMap::new(),
            places: HashMap::new(),
            waiting: Waiting::default(),
            open: BTreeSet::new(),
            kept: VecDeque::new(),
            impressions: 0,
        }
    }

    /// Goes by other options from here on.
    pub fn set_options(&mut self, options: Options) {
        self.bounds = Bounds::of(&options.settings);
        self.delays.renew(&self.bounds);
        self.options = options.bounded();
    }

    /// What it goes by.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What it did.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Impressions that wait or can be corrected, and actions that wait for their impression.
    pub fn held(&self) -> (usize, usize) {
        (self.impressions, self.orphans.len())
    }

    /// Takes the next event. What it makes goes to `made`.
    pub fn take(&mut self, fact: Fact, made: &mut dyn Sink) {
        let time_ms = fact.time_ms();
        let ingested_ms = fact.ingested_ms;
        if let Err(error) = self.check(&fact.what) {
            return self.refuse(&error);
        }
        match fact.what {
            // An outcome belongs to its impression although its own time is what ends the window.
            What::Action(reaction) => {
                self.reacted(reaction, ingested_ms, made);
                self.advance(time_ms, false, made);
            }
            What::Impression(shown) => {
                self.advance(time_ms, false, made);
                self.shown(shown, ingested_ms, made);
            }
            What::Whole(rows) => {
                self.advance(time_ms, false, made);
                self.whole(rows, ingested_ms, made);
            }
            What::Tick { .. } => self.advance(time_ms, true, made),
            What::Item(item) => match self.state.upsert_item(item.clone()) {
                Ok(()) => self.tell(Known::Item(item), ingested_ms, made),
                Err(error) => self.refuse(&error.into()),
            },
            What::User(user) => match self.state.upsert_user(user.clone()) {
                Ok(()) => self.tell(Known::User(user), ingested_ms, made),
                Err(error) => self.refuse(&error.into()),
            },
        }
    }

    /// What comes in was checked by who took it in; by another schema, if that was changed since.
    fn check(&self, what: &What) -> Result<()> {
        what.check_times()?;
        let fits = |surface: u16, context: &Context| match self.awaited.get(usize::from(surface)) {
            Some(_) => Ok(self.state.check_context(context)?),
            None => Err(Error::invalid(format!("the schema has no surface {surface}"))),
        };
        let happened = |outcome: &Outcome| self.check_outcome(outcome);
        match what {
            What::Impression(shown) => fits(shown.surface, &shown.context),
            What::Whole(rows) => rows.iter().try_for_each(|row| {
                fits(row.surface, &row.context)?;
                happened(&row.outcome)
            }),
            What::Action(reaction) => happened(&reaction.outcome),
            What::Item(_) | What::User(_) | What::Tick { .. } => Ok(()),
        }
    }

    fn check_outcome(&self, outcome: &Outcome) -> Result<()> {
        let actions = self.state.schema().actions.len() as u32;
        let said = u32::BITS - (outcome.actions | outcome.known).leading_zeros();
        match said > actions {
            true => Err(Error::invalid(format!(
                "an outcome speaks of action {said}, and the schema has {actions}"
            ))),
            false => Ok(()),
        }
    }

    fn refuse(&mut self, error: &Error) {
        self.counts.refused += 1;
        tracing::warn!(%error, "an event is passed over");
    }

    fn tell(&mut self, known: Known, ingested_ms: i64, made: &mut dyn Sink) {
        self.counts.outcomes += 1;
        made.outcome(super::Outcome { known, ingested_ms });
    }

    /// Moves the clock, closes windows that are over and forgets what is too old.
    fn advance(&mut self, time_ms: Option<i64>, now: bool, made: &mut dyn Sink) {
        self.clock_ms = self.clock_ms.max(time_ms.unwrap_or(i64::MIN));
        if !now && self.clock_ms < self.swept_ms.saturating_add(SWEEP_MS) {
            return;
        }
        self.swept_ms = self.clock_ms;
        let mut leaving = BTreeSet::new();
        for (_, (unit, row)) in self.waiting.due(self.clock_ms, &self.delays) {
            let of = self.units.get_mut(&unit).expect("what waits is there");
            of.rows[usize::from(row)].done = true;
            if of.rows.iter().all(|row| row.done) {
                leaving.insert((of.example.time_ms, unit));
            }
        }
        leaving.into_iter().for_each(|(_, unit)| self.release(unit, made));
        let seconds = i64::try_from(self.options.settings.correction_s).unwrap_or(i64::MAX);
        let before_ms = self.clock_ms.saturating_sub(seconds.saturating_mul(1000));
        while let Some(&unit) = self.kept.front() {
            if self.units[&unit].left_ms.is_some_and(|left_ms| left_ms >= before_ms) {
                break;
            }
            self.kept.pop_front();
            self.forget(unit);
        }
        let most = self.options.settings.max_impressions;
        self.counts.orphaned += self.orphans.forget(before_ms, most);
    }

    fn shown(&mut self, shown: Shown, ingested_ms: i64, made: &mut dyn Sink) {
        let key = key(shown.request, shown.item);
        if self.places.contains_key(&key) || self.seen.contains(key) {
            self.counts.repeated += 1;
            return;
        }
        let lack = (shown.surface, self.awaited[usize::from(shown.surface)]);
        let (request, time_ms) = (shown.request, shown.time_ms);
        let place = self.place(shown, ingested_ms);
        let unit = self.units.get_mut(&place.0).expect("just placed");
        unit.rows[usize::from(place.1)].done = lack.1 == 0;
        self.waiting_if(lack, time_ms, place);
        self.seen.insert(key, self.options.settings.max_impressions);
        self.places.insert(key, place);
        self.requests.insert(request, place.0);
        for orphan in self.orphans.take(key) {
            self.reacted(orphan.reaction, orphan.ingested_ms, made);
        }
        self.release_if_done(place.0, made);
        self.make_room(made);
    }

    fn waiting_if(&mut self, lack: (u16, u32), time_ms: i64, place: Place) {
        if lack.1 != 0 {
            self.waiting.insert(lack, time_ms, place);
        }
    }

    /// Puts an impression into its request's unit, or into a new one, with its features as of now.
    fn place(&mut self, shown: Shown, ingested_ms: i64) -> Place {
        let newest = self.requests.get(&shown.request).copied();
        let unit = newest.filter(|newest| {
            let Unit { example, left_ms, .. } = &self.units[newest];
            left_ms.is_none()
                && (example.user.id, example.surface) == (shown.user, shown.surface)
                && example.targets.len() < self.options.max_targets
        });
        let Shown { request, user, item, surface, time_ms, context } = shown;
        let row = Impression {
            request,
            time_ms: unit.map_or(time_ms, |unit| self.units[&unit].example.time_ms),
            outcome_ms: time_ms,
            user,
            item,
            surface,
            outcome: Outcome::UNKNOWN,
            context: context.clone(),
            truth: Vec::new(),
            history_only: false,
        };
        let history = if unit.is_some() { 0 } else { self.options.history_len };
        let fetched = self.state.fetch(&replay::request_input(&[row]), history);
        let row = Row { time_ms, context, done: false };
        self.impressions += 1;
        match unit {
            Some(at) => {
                let unit = self.units.get_mut(&at).expect("found above");
                unit.example.targets.extend(fetched.targets);
                unit.rows.push(row);
                unit.ingested_ms = unit.ingested_ms.max(ingested_ms);
                (at, (unit.rows.len() - 1) as u16)
            }
            None => {
                let part = newest.map_or(0, |newest| self.units[&newest].part + 1);
                (self.begin(Unit::new(part, fetched, vec![row], ingested_ms)), 0)
            }
        }
    }

    fn begin(&mut self, unit: Unit) -> u64 {
        let at = self.next;
        self.next += 1;
        self.units.insert(at, unit);
        self.open.insert(at);
        at
    }

    fn reacted(&mut self, reaction: Reaction, ingested_ms: i64, made: &mut dyn Sink) {
        let key = key(reaction.request, reaction.item);
        let Some(&place) = self.places.get(&key) else {
            match self.seen.contains(key) {
                true => self.counts.late += 1,
                false => {
                    let now_ms = self.clock_ms.max(reaction.time_ms);
                    self.orphans.insert(key, reaction, (ingested_ms, now_ms));
                }
            }
            return;
        };
        let unit = self.units.get_mut(&place.0).expect("places point at units");
        let (row, surface) = (usize::from(place.1), unit.example.surface);
        let awaited = self.awaited[usize::from(surface)];
        let before = unit.example.targets[row].outcome;
        let after = with(before, &reaction, awaited);
        let changed = difference(before, after);
        if changed.known == 0 && changed.values.iter().all(|value| value.is_nan()) {
            self.counts.unchanged += 1;
            return;
        }
        let shown_ms = unit.rows[row].time_ms;
        for action in (0..32).filter(|action| changed.actions >> action & 1 == 1) {
            let delay_ms = reaction.time_ms.saturating_sub(shown_ms);
            self.delays.observe((surface, action), delay_ms, &self.bounds);
        }
        unit.example.targets[row].outcome = after;
        unit.ingested_ms = unit.ingested_ms.max(ingested_ms);
        if let Some(left_ms) = unit.left_ms {
            let past_ms = self.clock_ms.max(reaction.time_ms).saturating_sub(left_ms) / 1000;
            if past_ms > i64::try_from(self.options.settings.correction_s).unwrap_or(i64::MAX) {
                unit.example.targets[row].outcome = before;
                self.counts.late += 1;
            } else {
                self.correct(place, changed, ingested_ms, made);
            }
            return;
        }
        if !unit.rows[row].done {
            self.waiting.remove((surface, awaited & !before.known), shown_ms, place);
            let lack = awaited & !after.known;
            unit.rows[row].done = lack == 0;
            self.waiting_if((surface, lack), shown_ms, place);
            self.release_if_done(place.0, made);
        }
    }

    /// Joins impressions whose outcomes came with them. History that is younger than the request did not lead to it.
    fn whole(&mut self, rows: Vec<Impression>, ingested_ms: i64, made: &mut dyn Sink) {
        let mut fresh = Vec::with_capacity(rows.len());
        for row in rows {
            let key = key(row.request, row.item);
            if self.places.contains_key(&key) || self.seen.contains(key) {
                self.counts.repeated += 1;
                continue;
            }
            self.seen.insert(key, self.options.settings.max_impressions);
            fresh.push(row);
        }
        for rows in fresh.chunks(self.options.max_targets.max(1)) {
            let first = &rows[0];
            let input = replay::request_input(rows);
            let mut example = self.state.fetch(&input, self.options.history_len);
            example.history.retain(|event| event.time_ms < first.time_ms);
            let newest = self.requests.get(&first.request);
            let part = newest.map_or(0, |newest| self.units[newest].part + 1);
            let of = |row: &Impression| Row {
                time_ms: row.time_ms,
                context: row.context.clone(),
                done: true,
            };
            let (request, of) = (first.request, rows.iter().map(of).collect());
            let unit = self.begin(Unit::new(part, example, of, ingested_ms));
            self.impressions += rows.len();
            self.requests.insert(request, unit);
            for (at, row) in rows.iter().enumerate() {
                self.places.insert(key(row.request, row.item), (unit, at as u16));
            }
            let known = rows.iter().map(|row| row.outcome_ms).collect();
            self.leave(unit, known, made);
            for row in rows {
                for orphan in self.orphans.take(key(row.request, row.item)) {
                    self.reacted(orphan.reaction, orphan.ingested_ms, made);
                }
            }
        }
        self.make_room(made);
    }

    fn release_if_done(&mut self, at: u64, made: &mut dyn Sink) {
        let waits = |unit: &Unit| unit.left_ms.is_none() && unit.rows.iter().all(|row| row.done);
        if self.units.get(&at).is_some_and(waits) {
            self.release(at, made);
        }
    }

    /// Lets a unit go: what is not known of an impression that waited for it did not happen.
    fn release(&mut self, at: u64, made: &mut dyn Sink) {
        let now_ms = self.clock_ms;
        let unit = self.units.get_mut(&at).expect("released once");
        let awaited = self.awaited[usize::from(unit.example.surface)];
        for target in &mut unit.example.targets {
            target.outcome.known |= awaited;
        }
        let known = vec![now_ms; unit.rows.len()];
        self.leave(at, known, made);
    }

    /// Tells a unit's example and the outcomes of its rows, each known since a time.
    fn leave(&mut self, at: u64, known_ms: Vec<i64>, made: &mut dyn Sink) {
        let unit = self.units.get_mut(&at).expect("released once");
        unit.left_ms = Some(self.clock_ms);
        let ingested_ms = unit.ingested_ms;
        let example = JoinedExample { example: unit.example.clone(), ingested_ms };
        made.joined(Joined::Example(example));
        self.counts.joined += 1;
        self.open.remove(&at);
        self.kept.push_back(at);
        for (row, outcome_ms) in known_ms.into_iter().enumerate() {
            let impression = self.units[&at].impression(row, outcome_ms);
            self.state.apply(&impression);
            self.tell(Known::Outcome(impression), ingested_ms, made);
        }
    }

    /// Tells that an outcome is another one than was said.
    fn correct(
        &mut self,
        (at, row): Place,
        changed: Outcome,
        ingested_ms: i64,
        made: &mut dyn Sink,
    ) {
        let unit = &self.units[&at];
        let mut target = unit.example.targets[usize::from(row)].clone();
        target.outcome = changed;
        let example = Example { targets: vec![target], ..unit.example.clone() };
        let impression = unit.impression(usize::from(row), self.clock_ms);
        made.joined(Joined::Correction(JoinedExample { example, ingested_ms }));
        self.counts.joined += 1;
        self.state.correct(&impression);
        self.tell(Known::Corrected(impression), ingested_ms, made);
    }

    /// Keeps to the bound: what left is forgotten first, then the oldest requests leave early.
    fn make_room(&mut self, made: &mut dyn Sink) {
        while self.impressions > self.options.settings.max_impressions {
            if let Some(unit) = self.kept.pop_front() {
                self.forget(unit);
                continue;
            }
            let Some(&unit) = self.open.first() else { return };
            self.counts.early += 1;
            let of = self.units.get_mut(&unit).expect("open units are there");
            let awaited = self.awaited[usize::from(of.example.surface)];
            for (at, (row, target)) in of.rows.iter_mut().zip(&of.example.targets).enumerate() {
                if !std::mem::replace(&mut row.done, true) {
                    let lack = (of.example.surface, awaited & !target.outcome.known);
                    self.waiting.remove(lack, row.time_ms, (unit, at as u16));
                }
            }
            self.release(unit, made);
        }
    }

    /// Lets go of a unit that left.
    fn forget(&mut self, at: u64) {
        let Some(unit) = self.units.remove(&at) else { return };
        self.impressions -= unit.rows.len();
        for target in &unit.example.targets {
            self.places.remove(&key(unit.request, target.item.id));
        }
        if self.requests.get(&unit.request) == Some(&at) {
            self.requests.remove(&unit.request);
        }
    }

    /// Finds again what follows from the units, after they were put back. Those that left are in that order.
    pub(super) fn index(&mut self, kept: VecDeque<u64>) {
        self.kept = kept;
        for (&at, unit) in &self.units {
            self.impressions += unit.rows.len();
            if unit.left_ms.is_none() {
                self.open.insert(at);
            }
            let surface = unit.example.surface;
            for (row, (of, target)) in unit.rows.iter().zip(&unit.example.targets).enumerate() {
                let place = (at, row as u16);
                self.places.insert(key(unit.request, target.item.id), place);
                if !of.done {
                    let lack = self.awaited[usize::from(surface)] & !target.outcome.known;
                    self.waiting.insert((surface, lack), of.time_ms, place);
                }
            }
        }
    }

    /// Those that left, in that order.
    pub(super) fn kept(&self) -> &VecDeque<u64> {
        &self.kept
    }
}
