//! The joiner as a state machine: it takes one event and writes examples and outcomes.
//!
//! It reads no clock and does no input or output. Its time is the newest timestamp among the events
//! so far; one that is after its event's arrival counts as the arrival. So a window closes early
//! only if every clock that the event passed is ahead: the caller's, the ingest host's, and that of
//! the stream's server if it has one. Its output depends only on the events and their order, so two
//! joiners that begin with the same state, or with the first event, write the same records.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use hypercast_core::hash::IdHashKey;
use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_data::features::{FeatureState, replay};
use hypercast_fm::example::{Example, Outcome};

use super::{
    JoinSink, JoinedExample, JoinedRecord, JoinerCounts, JoinerOptions, OutcomeRecord, StateUpdate,
    content::{ContentLimits, PlacedVectors},
    delays::{ActionDelay, OutcomeDelays, WindowBounds},
    pending::{
        ImpressionSlot, PendingImpression, PendingRequest, awaited_actions, core_actions,
        difference, impression_key, merged, without_reversals,
    },
    rankings::ServedRankings,
    waiting::{AwaitedActions, OpenWindows, OrphanAction, OrphanActions, SeenImpressions},
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::events::{ActionEvent, EventKind, EventRecord, ImpressionEvent};

/// The state machine.
///
/// A request is pending from its first impression until its example can no longer be corrected. It
/// is open while it waits for outcomes, and joined once its example was written.
pub struct Joiner {
    pub(super) options: JoinerOptions,
    pub(super) state: FeatureState,
    pub(super) delays: OutcomeDelays,
    /// By sequence number.
    pub(super) pending: BTreeMap<u64, PendingRequest>,
    pub(super) next_sequence: u64,
    pub(super) clock_ms: i64,
    pub(super) swept_ms: i64,
    pub(super) orphans: OrphanActions,
    pub(super) seen: SeenImpressions,
    pub(super) rankings: ServedRankings,
    pub(super) contents: PlacedVectors,
    pub(super) content_limits: ContentLimits,
    /// Since the first event.
    pub(super) counts: JoinerCounts,
    /// Whether no event moves time beyond its arrival, and no correction takes back what happened.
    /// Releases before had no such bounds, and what they wrote is repeated without them.
    pub(super) bounded_by_arrival: bool,
    /// Whether its streams have what it makes by its rules: not if it was told to count records of
    /// other settings as its own, nor surely if its state is of a release that does not say so.
    pub(super) knows_outputs: bool,
    bounds: WindowBounds,
    /// For each surface, the actions (one bit each) that its impressions wait for.
    awaited: Vec<u64>,
    /// The actions (one bit each) that belong to no surface.
    core_actions: u64,
    /// The newest pending part of each request.
    pub(super) requests: HashMap<u64, u64, IdHashKey>,
    pub(super) slots: HashMap<u64, ImpressionSlot, IdHashKey>,
    windows: OpenWindows,
    open: BTreeSet<u64>,
    /// The joined requests in the order in which they were joined.
    pub(super) joined: VecDeque<u64>,
    impressions: usize,
}

/// The rows of a request are numbered with 16 bits.
fn bounded(options: JoinerOptions) -> JoinerOptions {
    let max_targets = options.max_targets.clamp(1, usize::from(u16::MAX));
    JoinerOptions { max_targets, ..options }
}

/// How often windows are closed, by the joiner's own clock.
const SWEEP_MS: i64 = 100;

impl Joiner {
    /// A joiner over the feature state as of the first event. Items have no content vectors
    /// ([`Joiner::bare`]), and events with one are refused ([`Joiner::with_content`]).
    pub fn new(state: FeatureState, options: JoinerOptions) -> Joiner {
        let options = bounded(options);
        let schema = state.schema().clone();
        let bounds = WindowBounds::of(&options.settings);
        let content_limits = ContentLimits { width: 0, max_mib: state.config().max_content_mib };
        Joiner {
            delays: OutcomeDelays::new(schema.surfaces.len(), schema.actions.len(), &bounds),
            awaited: awaited_actions(&schema),
            core_actions: core_actions(&schema),
            state,
            options,
            bounds,
            pending: BTreeMap::new(),
            next_sequence: 0,
            clock_ms: i64::MIN,
            swept_ms: i64::MIN,
            orphans: OrphanActions::default(),
            seen: SeenImpressions::default(),
            rankings: ServedRankings::default(),
            contents: PlacedVectors::default(),
            content_limits,
            counts: JoinerCounts::default(),
            bounded_by_arrival: true,
            knows_outputs: true,
            requests: HashMap::default(),
            slots: HashMap::default(),
            windows: OpenWindows::default(),
            open: BTreeSet::new(),
            joined: VecDeque::new(),
            impressions: 0,
        }
    }

    /// Changes the options, and the rules to those of this release, from the next event on.
    pub fn set_options(&mut self, options: JoinerOptions) {
        self.bounded_by_arrival = true;
        self.bounds = WindowBounds::of(&options.settings);
        self.delays.update_windows(&self.bounds);
        self.options = bounded(options);
    }

    /// Whether times after an event's arrival are not believed.
    pub(super) fn doubts_times(&self) -> bool {
        self.bounded_by_arrival && self.options.settings.max_future_s > 0
    }

    /// The number of impressions that wait or can be corrected, and of actions that wait for their
    /// impression.
    pub fn held(&self) -> (usize, usize) {
        (self.impressions, self.orphans.len)
    }

    /// What it did since the first event.
    pub fn counts(&self) -> JoinerCounts {
        JoinerCounts { unplaced: self.rankings.dropped(), ..self.counts }
    }

    /// Processes the next event and writes the resulting records to `output`.
    pub fn take(&mut self, mut event: EventRecord, output: &mut dyn JoinSink) {
        let time_ms = if self.doubts_times() { event.reached_ms() } else { event.time_ms() };
        let ingested_ms = event.ingested_ms;
        if let Err(error) = self.check(&mut event.kind) {
            return self.refuse(&error);
        }
        match event.kind {
            // An action counts for its impression even if its own time ends the window.
            EventKind::Action(action) => {
                self.on_action(action, ingested_ms, output);
                self.advance(time_ms, false, output);
            }
            EventKind::Impression(impression) => {
                self.advance(time_ms, false, output);
                self.on_impression(impression, ingested_ms, output);
            }
            EventKind::CompleteRequest(rows) => {
                self.advance(time_ms, false, output);
                self.on_complete_request(rows, ingested_ms, output);
            }
            EventKind::Tick { .. } => self.advance(time_ms, true, output),
            EventKind::Ranking(ranking) => self.on_ranking(ranking, ingested_ms),
            EventKind::Item(item) => match self.upsert_item(item.clone(), ingested_ms, output) {
                Ok(()) => self.emit_update(StateUpdate::Item(item), ingested_ms, output),
                Err(error) => self.refuse(&error),
            },
            EventKind::User(user) => match self.state.upsert_user(user.clone()) {
                Ok(()) => self.emit_update(StateUpdate::User(user), ingested_ms, output),
                Err(error) => self.refuse(&error.into()),
            },
        }
    }

    /// Checks an event against the schema. The host checked it when it received it, but the schema
    /// may have changed since; a context that no longer fits is left out.
    pub(super) fn check(&self, kind: &mut EventKind) -> Result<()> {
        kind.check_times()?;
        let check_row = |surface: u16, context: &mut ContextFeatures| {
            if usize::from(surface) >= self.awaited.len() {
                return Err(Error::invalid(format!("the schema has no surface {surface}")));
            }
            if self.state.empty_foreign_context(context) {
                tracing::warn!("left out the context of an event, which is of another schema");
            }
            Ok(())
        };
        match kind {
            EventKind::Impression(row) => check_row(row.surface, &mut row.context),
            EventKind::CompleteRequest(rows) => rows.iter_mut().try_for_each(|row| {
                check_row(row.surface, &mut row.context)?;
                self.check_outcome(&row.outcome)
            }),
            EventKind::Action(action) => self.check_outcome(&action.outcome),
            EventKind::Item(item) => {
                self.state.upgrade().item(item);
                self.state.check_item(item)?;
                self.contents.check(item, self.content_limits)
            }
            EventKind::User(user) => {
                self.state.upgrade().user(user);
                Ok(self.state.check_user(user)?)
            }
            EventKind::Tick { .. } | EventKind::Ranking(_) => Ok(()),
        }
    }

    fn check_outcome(&self, outcome: &Outcome) -> Result<()> {
        let actions = self.state.schema().actions.len() as u32;
        let highest = u64::BITS - (outcome.actions | outcome.known).leading_zeros();
        if highest > actions {
            return Err(Error::invalid(format!(
                "an outcome has action {highest}, but the schema has {actions} actions"
            )));
        }
        Ok(())
    }

    fn refuse(&mut self, error: &Error) {
        self.counts.refused += 1;
        tracing::warn!(%error, "skipped an event that does not fit the schema");
    }

    fn emit_update(&mut self, update: StateUpdate, ingested_ms: i64, output: &mut dyn JoinSink) {
        self.counts.outcomes += 1;
        output.outcome(OutcomeRecord { update, ingested_ms, ranked: None });
    }

    /// Advances the clock, joins the requests whose windows are over, and forgets what is too old.
    /// Does so at once if `now`, else at most every [`SWEEP_MS`].
    fn advance(&mut self, time_ms: Option<i64>, now: bool, output: &mut dyn JoinSink) {
        self.clock_ms = self.clock_ms.max(time_ms.unwrap_or(i64::MIN));
        if !now && self.clock_ms < self.swept_ms.saturating_add(SWEEP_MS) {
            return;
        }
        self.swept_ms = self.clock_ms;
        let mut complete = BTreeSet::new();
        for (_, slot) in self.windows.close_due(self.clock_ms, &self.delays) {
            let request = self.pending.get_mut(&slot.request).expect("windows are of requests");
            request.rows[usize::from(slot.row)].done = true;
            if request.is_complete() {
                complete.insert((request.example.time_ms, slot.request));
            }
        }
        complete.into_iter().for_each(|(_, sequence)| self.join(sequence, output));
        let seconds = self.correction_s();
        let before_ms = self.clock_ms.saturating_sub(seconds.saturating_mul(1000));
        while let Some(&sequence) = self.joined.front() {
            if self.pending[&sequence].joined_ms.is_some_and(|joined_ms| joined_ms >= before_ms) {
                break;
            }
            self.joined.pop_front();
            self.forget(sequence);
        }
        let capacity = self.options.settings.max_impressions;
        self.counts.orphaned += self.orphans.forget(before_ms, capacity);
        self.rankings.forget(before_ms);
    }

    fn correction_s(&self) -> i64 {
        i64::try_from(self.options.settings.correction_s).unwrap_or(i64::MAX)
    }

    /// Remembers an impression; false, and counted, if it came before.
    fn is_new(&mut self, key: u64) -> bool {
        let new = !self.slots.contains_key(&key) && !self.seen.contains(key);
        if new {
            self.seen.insert(key, self.options.settings.max_impressions);
        } else {
            self.counts.repeated += 1;
        }
        new
    }

    fn on_impression(
        &mut self,
        impression: ImpressionEvent,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) {
        let key = impression_key(impression.request, impression.item);
        if !self.is_new(key) {
            return;
        }
        let surface = impression.surface;
        let awaited = AwaitedActions { surface, actions: self.awaited[usize::from(surface)] };
        let time_ms = impression.time_ms;
        let slot = self.add_impression(impression, ingested_ms, output);
        let pending = self.pending.get_mut(&slot.request).expect("added above");
        pending.rows[usize::from(slot.row)].done = awaited.actions == 0;
        self.windows.insert(awaited, time_ms, slot);
        self.slots.insert(key, slot);
        for orphan in self.orphans.take(key) {
            self.on_action(orphan.action, orphan.ingested_ms, output);
        }
        self.join_if_complete(slot.request, output);
        self.make_room(output);
    }

    /// Adds an impression to its pending request, or to a new one, with its features as of now.
    fn add_impression(
        &mut self,
        impression: ImpressionEvent,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) -> ImpressionSlot {
        let newest = self.requests.get(&impression.request);
        let extended = newest.copied().filter(|newest| {
            let PendingRequest { example, joined_ms, .. } = &self.pending[newest];
            joined_ms.is_none()
                && (example.user.id, example.surface) == (impression.user, impression.surface)
                && example.targets.len() < self.options.max_targets
        });
        let ImpressionEvent { request, user, item, surface, time_ms, context } = impression;
        let row = Impression {
            request,
            time_ms: extended.map_or(time_ms, |at| self.pending[&at].example.time_ms),
            outcome_ms: time_ms,
            user,
            item,
            surface,
            outcome: Outcome::UNKNOWN,
            context: context.clone(),
            truth: Vec::new(),
            history_only: false,
        };
        let history = if extended.is_some() { 0 } else { self.options.history_len };
        let fetched = self.fetch(&replay::request_input(&[row]), history, ingested_ms, output);
        let ranked = self.rankings.place(request, item);
        let row = PendingImpression { time_ms, context, done: false, ranked };
        let Some(sequence) = extended else {
            let request = self.add_request(fetched, vec![row], ingested_ms);
            return ImpressionSlot { request, row: 0 };
        };
        self.impressions += 1;
        let pending = self.pending.get_mut(&sequence).expect("found above");
        pending.example.targets.extend(fetched.targets);
        pending.rows.push(row);
        pending.ingested_ms = pending.ingested_ms.max(ingested_ms);
        ImpressionSlot { request: sequence, row: (pending.rows.len() - 1) as u16 }
    }

    /// Adds a request, or the next part of one.
    fn add_request(
        &mut self,
        example: Example,
        rows: Vec<PendingImpression>,
        ingested_ms: i64,
    ) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let newest = self.requests.insert(example.request, sequence);
        let part = newest.map_or(0, |newest| self.pending[&newest].part + 1);
        self.impressions += rows.len();
        self.pending.insert(sequence, PendingRequest::new(part, example, rows, ingested_ms));
        self.open.insert(sequence);
        sequence
    }

    fn on_action(&mut self, action: ActionEvent, ingested_ms: i64, output: &mut dyn JoinSink) {
        let key = impression_key(action.request, action.item);
        let latest_ms = if self.doubts_times() { ingested_ms } else { i64::MAX };
        let now_ms = self.clock_ms.max(action.time_ms.min(latest_ms));
        let Some(&slot) = self.slots.get(&key) else {
            if self.seen.contains(key) {
                self.counts.late += 1;
            } else {
                let orphan = OrphanAction { action, ingested_ms, came_ms: now_ms };
                self.orphans.insert(key, orphan);
            }
            return;
        };
        let correction_s = self.correction_s();
        let request = self.pending.get_mut(&slot.request).expect("slots are of pending requests");
        let (row, surface) = (usize::from(slot.row), request.example.surface);
        let awaited = self.awaited[usize::from(surface)];
        let before = request.example.targets[row].outcome;
        let mut after = merged(before, &action, awaited);
        if self.bounded_by_arrival && request.joined_ms.is_some() {
            after = without_reversals(before, after);
        }
        let changed = difference(before, after);
        if changed.known == 0 && changed.values.iter().all(|value| value.is_nan()) {
            self.counts.unchanged += 1;
            return;
        }
        let shown_ms = request.rows[row].time_ms;
        for bit in (0..64).filter(|bit| changed.actions >> bit & 1 == 1) {
            let delay_ms = action.time_ms.saturating_sub(shown_ms);
            let is_core = self.core_actions >> bit & 1 == 1;
            let delay = ActionDelay { action: bit, is_core, delay_ms };
            self.delays.observe(surface, delay, &self.bounds);
        }
        request.ingested_ms = request.ingested_ms.max(ingested_ms);
        if let Some(joined_ms) = request.joined_ms {
            if now_ms.saturating_sub(joined_ms) / 1000 > correction_s {
                self.counts.late += 1;
            } else {
                request.example.targets[row].outcome = after;
                self.correct(slot, changed, ingested_ms, output);
            }
            return;
        }
        request.example.targets[row].outcome = after;
        if !request.rows[row].done {
            let lacks = |known: u64| AwaitedActions { surface, actions: awaited & !known };
            request.rows[row].done = lacks(after.known).actions == 0;
            self.windows.remove(lacks(before.known), shown_ms, slot);
            self.windows.insert(lacks(after.known), shown_ms, slot);
            self.join_if_complete(slot.request, output);
        }
    }

    /// Joins impressions that came with their outcomes. History events after the request are left
    /// out, because the request was made without them.
    fn on_complete_request(
        &mut self,
        mut rows: Vec<Impression>,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) {
        rows.retain(|row| self.is_new(impression_key(row.request, row.item)));
        for rows in rows.chunks(self.options.max_targets.max(1)) {
            let time_ms = rows[0].time_ms;
            let input = replay::request_input(rows);
            let history_len = self.options.history_len;
            let mut example = self.fetch(&input, history_len, ingested_ms, output);
            example.history.retain(|event| event.time_ms < time_ms);
            let done = |row: &Impression| PendingImpression {
                time_ms: row.time_ms,
                context: row.context.clone(),
                done: true,
                ranked: self.rankings.place(row.request, row.item),
            };
            let done = rows.iter().map(done).collect();
            let sequence = self.add_request(example, done, ingested_ms);
            for (at, row) in rows.iter().enumerate() {
                let slot = ImpressionSlot { request: sequence, row: at as u16 };
                self.slots.insert(impression_key(row.request, row.item), slot);
            }
            let outcome_ms = rows.iter().map(|row| row.outcome_ms).collect();
            self.emit_example(sequence, outcome_ms, output);
            for row in rows {
                for orphan in self.orphans.take(impression_key(row.request, row.item)) {
                    self.on_action(orphan.action, orphan.ingested_ms, output);
                }
            }
        }
        self.make_room(output);
    }

    fn join_if_complete(&mut self, sequence: u64, output: &mut dyn JoinSink) {
        let joinable =
            |request: &PendingRequest| request.joined_ms.is_none() && request.is_complete();
        if self.pending.get(&sequence).is_some_and(joinable) {
            self.join(sequence, output);
        }
    }

    /// Joins a request: awaited actions that are still unknown did not happen.
    fn join(&mut self, sequence: u64, output: &mut dyn JoinSink) {
        let now_ms = self.clock_ms;
        let request = self.pending.get_mut(&sequence).expect("joined once");
        let awaited = self.awaited[usize::from(request.example.surface)];
        for target in &mut request.example.targets {
            target.outcome.known |= awaited;
        }
        let outcome_ms = vec![now_ms; request.rows.len()];
        self.emit_example(sequence, outcome_ms, output);
    }

    /// Writes a request's example and the outcomes of its rows, each with the time from which on it
    /// was known.
    fn emit_example(&mut self, sequence: u64, outcome_ms: Vec<i64>, output: &mut dyn JoinSink) {
        let request = self.pending.get_mut(&sequence).expect("joined once");
        request.joined_ms = Some(self.clock_ms);
        let ingested_ms = request.ingested_ms;
        let ranked = request.rows.iter().map(|row| row.ranked.clone());
        let ranked = if request.is_ranked() { ranked.collect() } else { Vec::new() };
        let example = JoinedExample { example: request.example.clone(), ingested_ms, ranked };
        output.joined(JoinedRecord::Example(example));
        self.counts.joined += 1;
        self.open.remove(&sequence);
        self.joined.push_back(sequence);
        for (row, outcome_ms) in outcome_ms.into_iter().enumerate() {
            let request = &self.pending[&sequence];
            let ranked = request.rows[row].ranked.clone();
            let impression = request.impression(row, outcome_ms);
            self.state.apply(&impression);
            let update = StateUpdate::Outcome(impression);
            self.counts.outcomes += 1;
            output.outcome(OutcomeRecord { update, ingested_ms, ranked });
        }
    }

    /// Writes a changed outcome of a joined request.
    fn correct(
        &mut self,
        slot: ImpressionSlot,
        changed: Outcome,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) {
        let (request, row) = (&self.pending[&slot.request], usize::from(slot.row));
        let mut target = request.example.targets[row].clone();
        target.outcome = changed;
        let example = Example { targets: vec![target], ..request.example.clone() };
        let impression = request.impression(row, self.clock_ms);
        let ranked = request.rows[row].ranked.iter().cloned().map(Some).collect();
        output.joined(JoinedRecord::Correction(JoinedExample { example, ingested_ms, ranked }));
        self.counts.joined += 1;
        self.state.correct(&impression);
        self.emit_update(StateUpdate::Corrected(impression), ingested_ms, output);
    }

    /// Keeps within `max_impressions`: forgets joined requests first, then joins the oldest open
    /// ones early.
    fn make_room(&mut self, output: &mut dyn JoinSink) {
        while self.impressions > self.options.settings.max_impressions {
            if let Some(sequence) = self.joined.pop_front() {
                self.forget(sequence);
                continue;
            }
            let Some(&sequence) = self.open.first() else { return };
            self.counts.early += 1;
            for (awaited, time_ms, slot) in self.open_windows(sequence) {
                self.windows.remove(awaited, time_ms, slot);
            }
            let request = self.pending.get_mut(&sequence).expect("open requests are pending");
            request.rows.iter_mut().for_each(|row| row.done = true);
            self.join(sequence, output);
        }
    }

    /// The windows of a pending request's impressions that are not done.
    fn open_windows(&self, sequence: u64) -> Vec<(AwaitedActions, i64, ImpressionSlot)> {
        let request = &self.pending[&sequence];
        let surface = request.example.surface;
        let awaited = self.awaited[usize::from(surface)];
        let rows = request.rows.iter().zip(&request.example.targets).enumerate();
        rows.filter(|(_, (row, _))| !row.done)
            .map(|(at, (row, target))| {
                let actions = awaited & !target.outcome.known;
                let slot = ImpressionSlot { request: sequence, row: at as u16 };
                (AwaitedActions { surface, actions }, row.time_ms, slot)
            })
            .collect()
    }

    /// Removes a joined request: it can no longer be corrected.
    fn forget(&mut self, sequence: u64) {
        let Some(request) = self.pending.remove(&sequence) else { return };
        self.impressions -= request.rows.len();
        for target in &request.example.targets {
            self.slots.remove(&impression_key(request.request, target.item.id));
        }
        if self.requests.get(&request.request) == Some(&sequence) {
            self.requests.remove(&request.request);
        }
    }

    /// Rebuilds the indexes of the pending requests after they were restored. `joined` are the
    /// joined ones in order.
    pub(super) fn index(&mut self, joined: VecDeque<u64>) {
        self.joined = joined;
        for (&sequence, request) in &self.pending {
            self.impressions += request.rows.len();
            if request.joined_ms.is_none() {
                self.open.insert(sequence);
            }
            for (row, target) in request.example.targets.iter().enumerate() {
                let slot = ImpressionSlot { request: sequence, row: row as u16 };
                self.slots.insert(impression_key(request.request, target.item.id), slot);
            }
            for (awaited, time_ms, slot) in self.open_windows(sequence) {
                self.windows.insert(awaited, time_ms, slot);
            }
        }
    }
}
