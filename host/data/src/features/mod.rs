//! Features: what is known about a request when it is made.
//!
//! `FeatureState` is the one code path for training and serving: `fetch` turns
//! a request into an `Example`, `apply` takes in an outcome once it is known.
//! It follows the order in which it is called and has no clock; who decides what
//! was known when is `dataset::timeline` or the joiner (`hypercast_stream::join`). It can be
//! rebuilt from the data set and the `outcomes` stream; `saved` makes that short.

mod counters;
mod effects;
mod ids;
mod recent;
pub mod replay;
pub mod saved;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Item, Outcome, Target, User};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::counters::{Common, Counters, Observation};
use self::ids::IdMap;
use self::recent::Recent;
use crate::dataset::timeline::{Span, Step, Timeline};
use crate::dataset::{Context, Dataset, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{BUILT_IN_FEATURES, BUILT_IN_IDS, FeatureKind, Schema, names};

/// Bounds of the state's memory, and how much a counter trusts few impressions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FeatureConfig {
    /// Events kept a user.
    pub history_events: usize,
    /// Users whose history is kept; beyond it the least recently active are forgotten.
    pub max_users: usize,
    /// Items that can be known at a time.
    pub max_items: usize,
    /// Keys kept for each counter key; beyond it the least recently seen are forgotten.
    pub max_counter_keys: usize,
    /// How many impressions at the global rate a counter starts with.
    pub prior_strength: f32,
}

impl Default for FeatureConfig {
    fn default() -> FeatureConfig {
        FeatureConfig {
            history_events: 256,
            max_users: 1_000_000,
            max_items: 10_000_000,
            max_counter_keys: 4_000_000,
            prior_strength: 20.0,
        }
    }
}

/// Candidates from which they are looked up on more than one thread.
const PARALLEL_FROM: usize = 512;

/// A request as it comes in.
#[derive(Debug, Clone)]
pub struct RequestInput {
    /// Its id.
    pub request: u64,
    /// Who asks.
    pub user: u64,
    /// The user's features where the caller sent them; else those of the data set, else zeros.
    pub user_features: Option<Arc<User>>,
    /// Where: an index into `schema.surfaces`.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What is to be ranked.
    pub candidates: Vec<CandidateInput>,
}

/// A candidate as it comes in.
#[derive(Debug, Clone)]
pub struct CandidateInput {
    /// The item's raw id.
    pub item: u64,
    /// The item's features where the caller sent them; else those of the data set, else zeros.
    pub features: Option<Arc<Item>>,
    /// The context features, which candidates of a request may share.
    pub context: Arc<Context>,
    /// What came of it; `Outcome::UNKNOWN` while serving.
    pub outcome: Outcome,
    /// The true probabilities in a simulated world, else empty.
    pub truth: Vec<f32>,
}

/// Everything that `fetch` draws on.
pub struct FeatureState {
    schema: Arc<Schema>,
    config: FeatureConfig,
    widths: Widths,
    items: IdMap<Arc<Item>>,
    users: IdMap<Arc<User>>,
    histories: Recent<History>,
    first_shown: Recent<Option<i64>>,
    counters: Counters,
    /// Items and users whose features are not those of the data set.
    changed: Changed,
}

/// Ids of what was told after the data set was read.
#[derive(Debug, Clone, Default)]
struct Changed {
    items: HashSet<u64>,
    users: HashSet<u64>,
}

/// A user's past.
#[derive(Default)]
struct History {
    events: VecDeque<Event>,
    /// All events ever, those that were forgotten included.
    count: u64,
    last_ms: i64,
}

/// How many features of each kind the schema has.
#[derive(Debug, Clone, Copy)]
struct Widths {
    item_ids: usize,
    item_dense: usize,
    user_ids: usize,
    user_dense: usize,
    context_ids: usize,
    context_dense: usize,
}

/// A request on the way to its candidates: what they have in common.
struct Asked<'a> {
    request: &'a RequestInput,
    user: &'a User,
    counters: Common,
    /// The built-in columns that the user's past decides.
    past: [f32; 2],
}

/// What a candidate or an impression is, for its id columns.
struct Subject<'a> {
    user: &'a User,
    item: &'a Item,
    surface: u16,
    time_ms: i64,
    context: &'a Context,
}

impl FeatureState {
    /// A state that knows the data set's items and users and nothing of what happened.
    pub fn new(dataset: &Dataset, config: FeatureConfig) -> FeatureState {
        let schema = dataset.schema.clone();
        FeatureState {
            widths: Widths::new(&schema),
            items: dataset.items.iter().map(|(&id, item)| (id, item.clone())).collect(),
            users: dataset.users.iter().map(|(&id, user)| (id, user.clone())).collect(),
            histories: Recent::new(config.max_users),
            first_shown: Recent::new(config.max_items),
            counters: Counters::new(&schema, &config),
            changed: Changed::default(),
            schema,
            config,
        }
    }

    /// A state that knows the same items and users, and nothing of what happened.
    fn forgetful(&self) -> FeatureState {
        FeatureState {
            schema: self.schema.clone(),
            config: self.config,
            widths: self.widths,
            items: self.items.clone(),
            users: self.users.clone(),
            histories: Recent::new(self.config.max_users),
            first_shown: Recent::new(self.config.max_items),
            counters: Counters::new(&self.schema, &self.config),
            changed: self.changed.clone(),
        }
    }

    /// The state as of `until_ms` (`None`: the end): every outcome known before it is applied.
    pub fn rebuild(
        dataset: &Dataset,
        config: FeatureConfig,
        until_ms: Option<i64>,
    ) -> Result<FeatureState> {
        let mut state = FeatureState::new(dataset, config);
        for step in Timeline::new(dataset, Span { from_ms: None, until_ms })? {
            if let Step::Outcome(impression) = step? {
                state.apply(&impression);
            }
        }
        Ok(state)
    }

    /// The schema.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// An item that is known.
    pub fn item(&self, id: u64) -> Option<&Arc<Item>> {
        self.items.get(&id)
    }

    /// How many items are known.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// How many users have a history.
    pub fn users_with_history(&self) -> usize {
        self.histories.len()
    }

    /// Adds or replaces an item's features; its content vector stays if no other is given.
    pub fn upsert_item(&mut self, mut item: Item) -> Result<()> {
        self.check_item(&item)?;
        if let Some(known) = self.items.get(&item.id).filter(|_| item.content.is_empty()) {
            item.content = known.content.clone();
        }
        if self.items.len() >= self.config.max_items && !self.items.contains_key(&item.id) {
            let most = self.config.max_items;
            return Err(Error::invalid(format!(
                "item {}: {most} items are known already (features.max_items)",
                item.id
            )));
        }
        self.changed.items.insert(item.id);
        self.items.insert(item.id, Arc::new(item));
        Ok(())
    }

    /// Adds or replaces a user's features.
    pub fn upsert_user(&mut self, user: User) -> Result<()> {
        self.check_user(&user)?;
        if self.users.len() >= self.config.max_users && !self.users.contains_key(&user.id) {
            let most = self.config.max_users;
            return Err(Error::invalid(format!(
                "user {}: {most} users are known already (features.max_users)",
                user.id
            )));
        }
        self.changed.users.insert(user.id);
        self.users.insert(user.id, Arc::new(user));
        Ok(())
    }

    /// Refuses a user whose features are not those of the schema.
    pub fn check_user(&self, user: &User) -> Result<()> {
        let wanted = (self.widths.user_ids, self.widths.user_dense);
        check_widths("user", user.id, (user.ids.len(), user.dense.len()), wanted)
    }

    /// Refuses an item whose features are not those of the schema.
    pub fn check_item(&self, item: &Item) -> Result<()> {
        let wanted = (self.widths.item_ids, self.widths.item_dense);
        check_widths("item", item.id, (item.ids.len(), item.dense.len()), wanted)
    }

    /// Refuses a context whose features are not those of the schema; one without any stands for zeros.
    pub fn check_context(&self, context: &Context) -> Result<()> {
        let or = |given, wanted| if given == 0 { wanted } else { given };
        let wanted = (self.widths.context_ids, self.widths.context_dense);
        let given = (or(context.ids.len(), wanted.0), or(context.dense.len(), wanted.1));
        match given == wanted {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "a context has {given:?} categorical and dense features, the schema {wanted:?}"
            ))),
        }
    }

    /// What is known about a request now: its history, at most `history_len` events, and every
    /// column of its candidates. Features of the wrong number are a programmer's error.
    pub fn fetch(&self, request: &RequestInput, history_len: usize) -> Example {
        let user = match &request.user_features {
            Some(user) => user.clone(),
            None => self.user(request.user),
        };
        let history = self.histories.get(request.user);
        let events = history.map_or_else(Vec::new, |history| {
            let skip = history.events.len().saturating_sub(history_len);
            history.events.iter().skip(skip).cloned().collect()
        });
        let asked = self.asked(request, &user, history);
        let candidates = &request.candidates;
        let targets = match candidates.len() {
            0..PARALLEL_FROM => self.targets(&asked, candidates),
            _ => {
                let parts = candidates.par_chunks(PARALLEL_FROM / 2);
                parts.flat_map_iter(|part| self.targets(&asked, part)).collect()
            }
        };
        Example {
            request: request.request,
            surface: request.surface,
            time_ms: request.time_ms,
            history: events,
            targets,
            user,
        }
    }

    /// Takes in that the outcome of an impression which was applied is another one: the whole of what is known of it
    /// now. Counters move by the difference. An impression that is no longer among its user's events is too old to
    /// correct, and the answer is false.
    pub fn correct(&mut self, impression: &Impression) -> bool {
        let same = |event: &&mut Event| {
            (event.time_ms, event.item.id, event.surface)
                == (impression.time_ms, impression.item, impression.surface)
        };
        let history = self.histories.get_mut(impression.user);
        let event = history.and_then(|history| history.events.iter_mut().rev().find(same));
        let Some(event) = event else { return false };
        let before = std::mem::replace(&mut event.outcome, impression.outcome);
        let item = event.item.clone();
        let user = self.user(impression.user);
        let ids = self.ids(&Subject {
            user: &user,
            item: &item,
            surface: impression.surface,
            time_ms: impression.time_ms,
            context: &impression.context,
        });
        self.counters.apply(&Observation {
            ids: &ids,
            before,
            outcome: impression.outcome,
            now_ms: impression.outcome_ms,
            place_known: !impression.history_only,
        });
        true
    }

    /// Takes in an outcome that is known now. Call it in the order of `outcome_ms`.
    pub fn apply(&mut self, impression: &Impression) {
        let user = self.user(impression.user);
        let item = self.item_or_blank(impression.item);
        let ids = self.ids(&Subject {
            user: &user,
            item: &item,
            surface: impression.surface,
            time_ms: impression.time_ms,
            context: &impression.context,
        });
        self.counters.apply(&Observation {
            ids: &ids,
            before: Outcome::UNKNOWN,
            outcome: impression.outcome,
            now_ms: impression.outcome_ms,
            place_known: !impression.history_only,
        });
        self.first_shown
            .touch(impression.item, impression.outcome_ms)
            .1
            .get_or_insert(impression.time_ms);
        let limit = self.config.history_events;
        let (_, history) = self.histories.touch(impression.user, impression.outcome_ms);
        let (surface, time_ms, outcome) =
            (impression.surface, impression.time_ms, impression.outcome);
        history.push(Event { item, surface, time_ms, outcome }, limit);
    }

    fn asked<'a>(
        &self,
        request: &'a RequestInput,
        user: &'a User,
        history: Option<&History>,
    ) -> Asked<'a> {
        let RequestInput { surface, time_ms, .. } = *request;
        let (item, context) = (&Item::default(), &Context::default());
        let ids = self.ids(&Subject { user, item, surface, time_ms, context });
        let since_last = history.map_or(0, |history| time_ms - history.last_ms);
        Asked {
            request,
            user,
            counters: self.counters.common(&ids, time_ms),
            past: [
                (history.map_or(0, |history| history.count) as f32).ln_1p(),
                (since_last.max(0) as f32 / 1e3).ln_1p(),
            ],
        }
    }

    /// Candidates' columns, stage by stage over all of them, so that the cache misses of many look-ups overlap.
    fn targets(&self, asked: &Asked<'_>, candidates: &[CandidateInput]) -> Vec<Target> {
        let item = |candidate: &CandidateInput| match &candidate.features {
            Some(item) => Some(item.clone()),
            None => self.items.get(&candidate.item).cloned(),
        };
        let items: Vec<Option<Arc<Item>>> = candidates.iter().map(item).collect();
        let first_shown: Vec<Option<i64>> = candidates
            .iter()
            .map(|candidate| self.first_shown.get(candidate.item).copied().flatten())
            .collect();
        let mut targets: Vec<Target> = candidates
            .iter()
            .zip(items)
            .zip(first_shown)
            .map(|((candidate, item), first_ms)| self.target(asked, candidate, item, first_ms))
            .collect();
        self.counters.fill(&mut targets, &asked.counters, self.widths.dense());
        targets
    }

    /// A candidate with every column but those of counters that know something of it.
    fn target(
        &self,
        asked: &Asked<'_>,
        candidate: &CandidateInput,
        item: Option<Arc<Item>>,
        first_ms: Option<i64>,
    ) -> Target {
        let Asked { request, user, .. } = *asked;
        let item = item.unwrap_or_else(|| self.blank(candidate.item));
        let context = &*candidate.context;
        let (surface, time_ms) = (request.surface, request.time_ms);
        let ids = self.ids(&Subject { user, item: &item, surface, time_ms, context });
        let mut features = Vec::with_capacity(self.widths.features(&self.counters));
        extend(&mut features, &item.dense, self.widths.item_dense);
        extend(&mut features, &user.dense, self.widths.user_dense);
        extend(&mut features, &context.dense, self.widths.context_dense);
        features.extend_from_slice(&asked.counters.columns);
        let since_first = first_ms.map_or(0, |first_ms| time_ms - first_ms);
        features.extend(asked.past);
        features.push((since_first.max(0) as f32 / 3.6e6).ln_1p());
        Target { item, ids, features, outcome: candidate.outcome, truth: candidate.truth.clone() }
    }

    fn ids(&self, subject: &Subject<'_>) -> Vec<u64> {
        let widths = &self.widths;
        let hour = subject.time_ms.div_euclid(3_600_000).rem_euclid(24) as u64;
        let mut ids = Vec::with_capacity(
            BUILT_IN_IDS.len() + widths.item_ids + widths.user_ids + widths.context_ids,
        );
        ids.extend([subject.user.id, subject.item.id, u64::from(subject.surface), hour]);
        extend(&mut ids, &subject.item.ids, widths.item_ids);
        extend(&mut ids, &subject.user.ids, widths.user_ids);
        extend(&mut ids, &subject.context.ids, widths.context_ids);
        ids
    }

    fn user(&self, id: u64) -> Arc<User> {
        self.users.get(&id).cloned().unwrap_or_else(|| Arc::new(User { id, ..User::default() }))
    }

    fn item_or_blank(&self, id: u64) -> Arc<Item> {
        self.items.get(&id).cloned().unwrap_or_else(|| self.blank(id))
    }

    /// An item of which nothing is known.
    fn blank(&self, id: u64) -> Arc<Item> {
        let (ids, dense) = (vec![0; self.widths.item_ids], vec![0.0; self.widths.item_dense]);
        Arc::new(Item { id, ids, dense, ..Item::default() })
    }
}

impl History {
    /// Keeps events in the order they were shown: an outcome that took long belongs before one that
    /// came at once.
    fn push(&mut self, event: Event, limit: usize) {
        self.count += 1;
        self.last_ms =
            if self.count == 1 { event.time_ms } else { self.last_ms.max(event.time_ms) };
        let later =
            self.events.iter().rev().take_while(|other| other.time_ms > event.time_ms).count();
        self.events.insert(self.events.len() - later, event);
        if self.events.len() > limit {
            self.events.pop_front();
        }
    }
}

impl Widths {
    fn new(schema: &Schema) -> Widths {
        let count = |features, kind| names(features, kind).len();
        Widths {
            item_ids: count(&schema.item_features, FeatureKind::Categorical),
            item_dense: count(&schema.item_features, FeatureKind::Dense),
            user_ids: count(&schema.user_features, FeatureKind::Categorical),
            user_dense: count(&schema.user_features, FeatureKind::Dense),
            context_ids: count(&schema.context_features, FeatureKind::Categorical),
            context_dense: count(&schema.context_features, FeatureKind::Dense),
        }
    }

    fn features(&self, counters: &Counters) -> usize {
        self.dense() + counters.columns() + BUILT_IN_FEATURES.len()
    }

    /// The features that are no counter's and not built in.
    fn dense(&self) -> usize {
        self.item_dense + self.user_dense + self.context_dense
    }
}

/// Compares the numbers of categorical and dense features.
fn check_widths(what: &str, id: u64, got: (usize, usize), wanted: (usize, usize)) -> Result<()> {
    match got == wanted {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{what} {id} has {} categorical and {} dense features, the schema {} and {}",
            got.0, got.1, wanted.0, wanted.1
        ))),
    }
}

/// Appends the features of one kind; an empty list stands for zeros.
fn extend<T: Copy + Default>(row: &mut Vec<T>, features: &[T], width: usize) {
    if features.is_empty() {
        row.resize(row.len() + width, T::default());
    } else {
        assert_eq!(features.len(), width, "as many features as the schema has");
        row.extend_from_slice(features);
    }
}

#[cfg(test)]
mod tests;
