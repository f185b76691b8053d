//! Features: everything that is known about a request when it is made.
//!
//! [`FeatureState`] is the one code path for training and serving: [`FeatureState::fetch`] turns a
//! request into an example, and [`FeatureState::apply`] adds an outcome once it is known. The state
//! has no clock: it follows the order of the calls, which `dataset::timeline` or the joiner of
//! `hypercast-stream` determines. It can be rebuilt from the data set and the outcomes of the
//! stream; [`saved`] makes that unnecessary in most cases.

mod content;
mod counters;
mod effects;
mod history;
mod id_maps;
pub mod replay;
pub mod saved;

use std::collections::HashSet;
use std::sync::Arc;

use hypercast_core::hash::IdHashKey;
use hypercast_fm::example::{Event, Example, Item, Outcome, Target, User};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::content::ContentOverrides;
pub use self::content::{check_content_room, check_content_width, content_bytes};
use self::counters::{FeatureCounters, Observation, RequestCounters};
use self::history::{EventKey, History, HistorySize};
use self::id_maps::{IdMap, RecencyMap};
use crate::dataset::timeline::{Span, Timeline, TimelineStep};
use crate::dataset::{ContextFeatures, Dataset, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{
    BUILT_IN_FEATURES, BUILT_IN_IDS, ColumnRanges, ColumnUpgrade, FeatureCounts, FeatureWidths,
    MISSING, MissingColumns, Schema,
};

/// Bounds of the state's memory, and the prior of counters: `[features]` in `hypercast.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FeatureConfig {
    /// Events kept for each user. The FM reads the last `fm.max_history` of them.
    pub history_events: usize,
    /// Users that are kept. The histories of the least recently active are dropped first; features
    /// of further new users are refused.
    pub max_users: usize,
    /// Items that are kept. Further new items are refused; the age of the items shown longest ago
    /// is dropped first.
    pub max_items: usize,
    /// Keys that each counter keeps. The least recently used are dropped first.
    pub max_counter_keys: usize,
    /// Impressions at the global rate that each counter starts with.
    pub prior_strength: f32,
    /// Memory of content vectors that came by events, in MiB: four bytes a number and 100 a
    /// vector. Further items' vectors are refused.
    pub max_content_mib: usize,
}

impl Default for FeatureConfig {
    fn default() -> FeatureConfig {
        FeatureConfig {
            history_events: 256,
            max_users: 1_000_000,
            max_items: 10_000_000,
            max_counter_keys: 4_000_000,
            prior_strength: 20.0,
            max_content_mib: 1024,
        }
    }
}

/// The number of candidates from which several threads look them up.
const PARALLEL_FROM: usize = 512;

/// A request before its features are looked up.
#[derive(Debug, Clone)]
pub struct RequestInput {
    /// The request's id.
    pub request: u64,
    /// The user's raw id.
    pub user: u64,
    /// The user's features if the caller sent them; otherwise the state's are used, if it has any.
    pub user_features: Option<Arc<User>>,
    /// An index into `schema.surfaces`.
    pub surface: u16,
    /// Milliseconds since the epoch.
    pub time_ms: i64,
    /// The items to rank.
    pub candidates: Vec<CandidateInput>,
}

/// A candidate before its features are looked up.
#[derive(Debug, Clone)]
pub struct CandidateInput {
    /// The item's raw id.
    pub item: u64,
    /// The item's features if the caller sent them; otherwise the state's are used, if it has any.
    pub features: Option<Arc<Item>>,
    /// Features of the item in this request; candidates may share them.
    pub context: Arc<ContextFeatures>,
    /// The outcome for training; `Outcome::UNKNOWN` while serving.
    pub outcome: Outcome,
    /// The true probability of each task in a simulated world, else empty.
    pub truth: Vec<f32>,
}

/// Users, items, histories and counters: everything that examples are made from.
pub struct FeatureState {
    schema: Arc<Schema>,
    config: FeatureConfig,
    widths: FeatureWidths,
    ranges: ColumnRanges,
    upgrade: ColumnUpgrade,
    items: IdMap<Arc<Item>>,
    content: ContentOverrides,
    users: IdMap<Arc<User>>,
    histories: RecencyMap<History>,
    first_shown: RecencyMap<Option<i64>>,
    counters: FeatureCounters,
    missing: MissingColumns,
    /// Items and users whose features differ from the data set's.
    changed: ChangedIds,
}

/// Ids that were added or changed after the data set was read.
#[derive(Debug, Clone, Default)]
struct ChangedIds {
    items: HashSet<u64, IdHashKey>,
    users: HashSet<u64, IdHashKey>,
}

/// What the candidates of a request have in common.
struct RequestContext<'a> {
    request: &'a RequestInput,
    user: &'a User,
    counters: RequestCounters,
    /// The built-in columns that depend on the user's history.
    past: [f32; 2],
}

impl FeatureState {
    /// A state with the data set's items and users, and no events.
    pub fn new(dataset: &Dataset, config: FeatureConfig) -> FeatureState {
        FeatureState {
            widths: FeatureWidths::new(&dataset.schema),
            ranges: ColumnRanges::new(&dataset.schema),
            upgrade: ColumnUpgrade::new(&dataset.schema),
            items: dataset.items.iter().map(|(&id, item)| (id, item.clone())).collect(),
            content: ContentOverrides::new(dataset.content, &config),
            users: dataset.users.iter().map(|(&id, user)| (id, user.clone())).collect(),
            histories: RecencyMap::new(config.max_users),
            first_shown: RecencyMap::new(config.max_items),
            counters: FeatureCounters::new(&dataset.schema, &config),
            changed: ChangedIds::default(),
            missing: MissingColumns::new(&dataset.schema),
            schema: dataset.schema.clone(),
            config,
        }
    }

    /// Forgets all events, and keeps items and users.
    fn forget_events(&mut self) {
        self.histories = RecencyMap::new(self.config.max_users);
        self.first_shown = RecencyMap::new(self.config.max_items);
        self.counters = FeatureCounters::new(&self.schema, &self.config);
    }

    /// The state with every outcome that was known before `until_ms`; `None` takes the whole data
    /// set.
    pub fn rebuild(
        dataset: &Dataset,
        config: FeatureConfig,
        until_ms: Option<i64>,
    ) -> Result<FeatureState> {
        let mut state = FeatureState::new(dataset, config);
        for step in Timeline::new(dataset, Span { from_ms: None, until_ms })? {
            if let TimelineStep::Outcome(impression) = step? {
                state.apply(&impression);
            }
        }
        Ok(state)
    }

    /// The schema that defines the columns of its examples.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// The bounds of its memory.
    pub fn config(&self) -> &FeatureConfig {
        &self.config
    }

    /// The way from earlier layouts of the schema to the present one.
    pub fn upgrade(&self) -> &ColumnUpgrade {
        &self.upgrade
    }

    /// An item by its raw id.
    pub fn item(&self, id: u64) -> Option<&Arc<Item>> {
        self.items.get(&id)
    }

    /// The number of known items.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// Adds or replaces an item's features. Its content vector stays if `item` has none; else it is
    /// that of the item everywhere from now on, also in histories.
    ///
    /// # Errors
    /// The features do not match the schema, or the vector the data set's; or the state has
    /// `features.max_items` or `features.max_content_mib` already.
    pub fn upsert_item(&mut self, mut item: Item) -> Result<()> {
        self.upgrade.item(&mut item);
        self.check_item(&item)?;
        check_room(&self.items, item.id, self.config.max_items, "item")?;
        let has_content = !item.content.is_empty();
        if has_content {
            self.content.check(&item)?;
        } else if let Some(known) = self.items.get(&item.id) {
            item.content = known.content.clone();
        }
        self.put_changed(Arc::new(item), has_content);
        Ok(())
    }

    /// Replaces the content vector of an item that it knows.
    pub fn set_content(&mut self, id: u64, content: Arc<[f32]>) {
        if let Some(known) = self.items.get(&id) {
            let item = Item { content, ..(**known).clone() };
            self.put_changed(Arc::new(item), true);
        }
    }

    /// Puts an item that differs from the data set's. `has_content` says that its vector does, too.
    fn put_changed(&mut self, item: Arc<Item>, has_content: bool) {
        if has_content || self.content.has(item.id) {
            self.content.put(&item);
        }
        self.changed.items.insert(item.id);
        self.items.insert(item.id, item);
    }

    /// Adds or replaces a user's features.
    ///
    /// # Errors
    /// The features do not match the schema, or the state has `features.max_users` already.
    pub fn upsert_user(&mut self, mut user: User) -> Result<()> {
        self.upgrade.user(&mut user);
        self.check_user(&user)?;
        check_room(&self.users, user.id, self.config.max_users, "user")?;
        self.changed.users.insert(user.id);
        self.users.insert(user.id, Arc::new(user));
        Ok(())
    }

    /// Checks the number of a user's features.
    ///
    /// # Errors
    /// It differs from the schema's.
    pub fn check_user(&self, user: &User) -> Result<()> {
        self.widths.user.check(&format!("user {}", user.id), user.ids.len(), user.dense.len())
    }

    /// Checks the number of an item's features.
    ///
    /// # Errors
    /// It differs from the schema's.
    pub fn check_item(&self, item: &Item) -> Result<()> {
        self.widths.item.check(&format!("item {}", item.id), item.ids.len(), item.dense.len())
    }

    /// Brings the context of an impression to the present layout. One that was recorded with
    /// another schema it empties, so that its features count as missing; returns whether it did.
    pub fn empty_foreign_context(&self, context: &mut ContextFeatures) -> bool {
        self.upgrade.context(context);
        let FeatureCounts { ids, dense } = self.widths.context;
        let fits = |given: usize, wanted: usize| given == 0 || given == wanted;
        let foreign = !fits(context.ids.len(), ids) || !fits(context.dense.len(), dense);
        if foreign {
            *context = ContextFeatures::default();
        }
        foreign
    }

    /// The example for a request as of now: at most `history_len` events of history, and every
    /// column of its candidates. Numbers beyond the ranges of the schema are clipped.
    ///
    /// # Panics
    /// Features in the request have the wrong number (see [`Self::check_user`] and the like).
    pub fn fetch(&self, request: &RequestInput, history_len: usize) -> Example {
        let user = request.user_features.clone().unwrap_or_else(|| self.user(request.user));
        let history = self.histories.get(request.user);
        let events = history.map_or_else(Vec::new, |history| {
            let events = history.newest(history_len);
            events.map(|event| self.content.attached(event, &self.items)).collect()
        });
        let context = self.request_context(request, &user, history);
        let candidates = &request.candidates;
        let targets = if candidates.len() < PARALLEL_FROM {
            self.targets(&context, candidates)
        } else {
            let parts = candidates.par_chunks(PARALLEL_FROM / 2);
            parts.flat_map_iter(|part| self.targets(&context, part)).collect()
        };
        let mut example = Example {
            request: request.request,
            surface: request.surface,
            time_ms: request.time_ms,
            history: events,
            targets,
            user,
        };
        self.ranges.clip(&mut example);
        example
    }

    /// Replaces the outcome of an impression that was applied by `impression.outcome`, which is
    /// everything that is known of it now. Counters change by the difference. Returns false if the
    /// impression is no longer among its user's events, and so too old to correct.
    pub fn correct(&mut self, impression: &Impression) -> bool {
        let &Impression { time_ms, item, surface, outcome, .. } = impression;
        let history = self.histories.get_mut(impression.user);
        let key = EventKey { time_ms, item, surface };
        let found = history.and_then(|history| history.correct(key, outcome));
        let Some((item, before)) = found else { return false };
        self.count(impression, &item, before);
        true
    }

    /// Adds an outcome that is known now. Call it in the order of `outcome_ms`.
    pub fn apply(&mut self, impression: &Impression) {
        let item = self.content.without(self.item_or_blank(impression.item));
        self.count(impression, &item, Outcome::UNKNOWN);
        let &Impression { surface, time_ms, outcome_ms, outcome, .. } = impression;
        self.first_shown.touch(impression.item, outcome_ms).1.get_or_insert(time_ms);
        let size = self.history_size();
        let (_, history) = self.histories.touch(impression.user, outcome_ms);
        history.push(Event { item, surface, time_ms, outcome }, size);
    }

    fn history_size(&self) -> HistorySize {
        HistorySize { events: self.config.history_events, values: self.schema.values.len() }
    }

    /// Updates the counters with an outcome, of which `before` was counted already.
    fn count(&mut self, impression: &Impression, item: &Item, before: Outcome) {
        let &Impression { surface, time_ms, ref context, .. } = impression;
        let ids = self.ids(&self.user(impression.user), item, surface, time_ms, context);
        self.counters.apply(&Observation {
            ids: &ids,
            before,
            outcome: impression.outcome,
            now_ms: impression.outcome_ms,
            place_known: !impression.history_only,
        });
    }

    fn request_context<'a>(
        &self,
        request: &'a RequestInput,
        user: &'a User,
        history: Option<&History>,
    ) -> RequestContext<'a> {
        let RequestInput { surface, time_ms, .. } = *request;
        let (item, context) = (&Item::default(), &ContextFeatures::default());
        let ids = self.ids(user, item, surface, time_ms, context);
        let since_last = history.map_or(0, |history| time_ms - history.last_ms);
        RequestContext {
            request,
            user,
            counters: self.counters.common(&ids, time_ms),
            past: [
                (history.map_or(0, |history| history.count) as f32).ln_1p(),
                (since_last.max(0) as f32 / 1e3).ln_1p(),
            ],
        }
    }

    /// The columns of candidates. Each stage runs over all of them, so that the cache misses of
    /// many look-ups overlap.
    fn targets(&self, shared: &RequestContext<'_>, candidates: &[CandidateInput]) -> Vec<Target> {
        let item = |candidate: &CandidateInput| {
            candidate.features.clone().unwrap_or_else(|| self.item_or_blank(candidate.item))
        };
        let items: Vec<Arc<Item>> = candidates.iter().map(item).collect();
        let first_shown: Vec<Option<i64>> = candidates
            .iter()
            .map(|candidate| self.first_shown.get(candidate.item).copied().flatten())
            .collect();
        let mut targets: Vec<Target> = candidates
            .iter()
            .zip(items)
            .zip(first_shown)
            .map(|((candidate, item), first_ms)| self.target(shared, candidate, item, first_ms))
            .collect();
        self.counters.fill(&mut targets, &shared.counters, self.widths.dense());
        targets
    }

    /// A candidate with every column except those of counters whose keys depend on the candidate.
    fn target(
        &self,
        shared: &RequestContext<'_>,
        candidate: &CandidateInput,
        item: Arc<Item>,
        first_ms: Option<i64>,
    ) -> Target {
        let RequestContext { request, user, .. } = *shared;
        let context = &*candidate.context;
        let (surface, time_ms) = (request.surface, request.time_ms);
        let ids = self.ids(user, &item, surface, time_ms, context);
        let mut features = Vec::with_capacity(
            self.widths.dense()
                + self.counters.columns()
                + BUILT_IN_FEATURES.len()
                + self.missing.optional().len(),
        );
        extend(&mut features, &item.dense, self.widths.item.dense, MISSING);
        extend(&mut features, &user.dense, self.widths.user.dense, MISSING);
        extend(&mut features, &context.dense, self.widths.context.dense, MISSING);
        features.extend_from_slice(&shared.counters.columns);
        let since_first = first_ms.map_or(0, |first_ms| time_ms - first_ms);
        features.extend(shared.past);
        features.push((since_first.max(0) as f32 / 3.6e6).ln_1p());
        self.missing.append(&mut features);
        Target { item, ids, features, outcome: candidate.outcome, truth: candidate.truth.clone() }
    }

    /// The id columns of a candidate or an impression.
    fn ids(
        &self,
        user: &User,
        item: &Item,
        surface: u16,
        time_ms: i64,
        context: &ContextFeatures,
    ) -> Vec<u64> {
        let widths = &self.widths;
        let hour = time_ms.div_euclid(3_600_000).rem_euclid(24) as u64;
        let own = widths.item.ids + widths.user.ids + widths.context.ids;
        let mut ids = Vec::with_capacity(BUILT_IN_IDS.len() + own);
        ids.extend([user.id, item.id, u64::from(surface), hour]);
        extend(&mut ids, &item.ids, widths.item.ids, 0);
        extend(&mut ids, &user.ids, widths.user.ids, 0);
        extend(&mut ids, &context.ids, widths.context.ids, 0);
        ids
    }

    fn user(&self, id: u64) -> Arc<User> {
        self.users.get(&id).cloned().unwrap_or_else(|| Arc::new(User { id, ..User::default() }))
    }

    /// An item, or one whose features are missing.
    fn item_or_blank(&self, id: u64) -> Arc<Item> {
        self.items.get(&id).cloned().unwrap_or_else(|| Arc::new(self.schema.blank_item(id)))
    }
}

impl FeatureCounts {
    fn check(self, subject: &str, ids: usize, dense: usize) -> Result<()> {
        if (self.ids, self.dense) == (ids, dense) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{subject} has {ids} categorical and {dense} dense features; the schema has {} and {}",
            self.ids, self.dense
        )))
    }
}

/// Refuses an id that a full map does not have yet.
fn check_room<V>(map: &IdMap<V>, id: u64, most: usize, what: &str) -> Result<()> {
    if map.len() < most || map.contains_key(&id) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{what} {id} cannot be added to {most} {what}s; raise features.max_{what}s"
    )))
}

/// Appends features of one kind; in an empty list all are `missing`.
fn extend<T: Copy>(row: &mut Vec<T>, features: &[T], width: usize, missing: T) {
    if features.is_empty() {
        row.resize(row.len() + width, missing);
    } else {
        assert_eq!(features.len(), width, "as many features as the schema has");
        row.extend_from_slice(features);
    }
}

#[cfg(test)]
mod tests;
