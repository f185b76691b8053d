//! A world in which what was ranked decides what is seen and done, for an A/B of rankers.
//!
//! - Users come in sessions of some pages. A page that was worth it makes another one likely.
//! - A page's candidates are retrieved: popular items, items like those that the user clicked,
//!   fresh ones, and a few by chance. None was shown before in the session.
//! - The best of the ranking are shown, the last place now and then by chance. Users examine a
//!   place the less the lower it is, and act only on what they examine.
//! - Examined topics satiate, within the session and over days.
//! - Items arrive all the time. They are worth most when they are new, and nobody knows them.
//! - A session has a mood, a topic that counts beside the lasting taste.
//!
//! Chance depends on the seed and the request alone, so that two rankers that rank alike see alike.
//! Only the first surface is ranked by whoever is tested; the second one has a ranker of its own
//! ([`ClosedLoopWorld::rank_by_popularity`]), and shows a model what a user likes elsewhere.

mod entities;
mod retrieval;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::BinaryHeap};

use hypercast_core::hash::{mix_parts, splitmix64};
use hypercast_data::{
    dataset::{ContextFeatures, Impression},
    schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole, ValueRange},
    simulate::vectors::{LatentVector, dot, exponential_ms, sigmoid},
};
use hypercast_fm::example::{Item, Outcome, User};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use self::{
    entities::{LoopItem, LoopUser, TOPICS},
    retrieval::{POPULAR_EVERY_MS, RetrievalIndex},
};
use crate::error::{CommonErrors as _, Error, Result};

/// 1 January 2024, midnight UTC: the first session.
pub const START_MS: i64 = 1_704_067_200_000;
/// Milliseconds of a day.
pub const DAY_MS: i64 = 86_400_000;
/// Items shown on a page.
pub const PAGE_ITEMS: usize = 6;
/// An item is fresh for this long after its release.
pub const FRESH_MS: i64 = 2 * DAY_MS;
/// The surface that is tested.
pub const FIRST_SURFACE: &str = "feed";
/// What users do with what they examine, the click first.
pub const ACTIONS: [&str; 3] = ["click", "like", "finish"];
/// What each action is worth: the weights by which rankers order, too.
pub const ACTION_VALUES: [f64; 3] = [1.0, 2.0, 2.0];

/// The share of sessions on the first surface.
const FIRST_SURFACE_SHARE: f32 = 0.4;
/// The probability that a user examines a place, over that of the place above.
const EXAMINED_NEXT: f32 = 0.8;
/// The probability that the last place goes to a candidate by chance.
const EXPLORED: f32 = 0.1;
/// What each examined impression of a topic takes from the logit of the next, for each memory.
const SATIATION: [f32; 2] = [0.5, 0.15];
/// After this time half of a memory's satiation is gone: a session's, and that of days.
const SATIATION_HALF_LIFE_MS: [f32; 2] = [20.0 * 60_000.0, DAY_MS as f32];
/// The increase of a click's logit for a perfect match of tastes.
const TASTE: f32 = 2.5;
/// What a new item has above an old one, and the time after which it has a third of that.
const NOVELTY: f32 = 0.8;
const NOVELTY_MS: f32 = 1.5 * DAY_MS as f32;
/// The probability of another page after one without and after one with a click.
const ANOTHER_PAGE: [f32; 2] = [0.45, 0.75];
const MOST_PAGES: usize = 8;
/// The shortest time between two pages of a user: the first's outcomes are known by then.
const PAGE_GAP_MS: i64 = 90_000;
const MEAN_READING_MS: f32 = 60_000.0;
/// The time after which an impression counts as not clicked.
const CLICK_WINDOW_MS: i64 = 60_000;
const DEVICES: usize = 3;

/// The size and the seed of the world.
#[derive(Debug, Clone)]
pub struct ClosedLoopOptions {
    /// The number of users.
    pub users: usize,
    /// Items on the first day.
    pub items: usize,
    /// Items that arrive each day, evenly.
    pub items_per_day: usize,
    /// The same seed, and the same rankings, give the same world.
    pub seed: u64,
}

/// A page that a user asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct PageRequest {
    /// The number of the request, from 1.
    pub request: u64,
    /// Milliseconds since the epoch at which the user asks for it.
    pub time_ms: i64,
    /// The id of the user, from 1.
    pub user: u64,
    /// Index of the surface.
    pub surface: u16,
    /// Ids of the items to rank.
    pub candidates: Vec<u64>,
    /// What the request says of itself: the device.
    pub context: ContextFeatures,
}

/// The true probabilities of what a user does with an item, once it is examined.
#[derive(Debug, Clone, Copy)]
struct TrueActions {
    click: f32,
    /// Each given a click.
    like: f32,
    finish: f32,
}

impl TrueActions {
    /// What an examined impression is worth on average.
    fn value(self) -> f64 {
        let [click, like, finish] = ACTION_VALUES;
        let of_click = click + like * f64::from(self.like) + finish * f64::from(self.finish);
        f64::from(self.click) * of_click
    }
}

/// A page that is due, the earliest first.
type DuePage = Reverse<(i64, usize)>;

/// The users, the items, and what happened so far.
pub struct ClosedLoopWorld {
    options: ClosedLoopOptions,
    topics: Vec<LatentVector>,
    /// By id, from 1, in the order of their release.
    items: Vec<LoopItem>,
    users: Vec<LoopUser>,
    due: BinaryHeap<DuePage>,
    index: RetrievalIndex,
    requests: u64,
}

impl ClosedLoopWorld {
    /// The world before its first session.
    ///
    /// # Errors
    /// Fewer users or items than make sense.
    pub fn new(options: ClosedLoopOptions) -> Result<Self> {
        if options.users == 0 || options.items < 100 {
            return Err(Error::invalid(format!(
                "a closed loop of {} users and {} items: there must be a user and 100 items",
                options.users, options.items
            )));
        }
        let mut rng = rng_of(&[options.seed, 0]);
        let topics = entities::topics(&mut rng);
        let mut items = Vec::with_capacity(options.items);
        for _ in 0..options.items {
            // What is there on the first day was released over the two weeks before.
            let release_ms = START_MS - rng.random_range(0..14 * DAY_MS);
            items.push(LoopItem::new(&topics, release_ms, &mut rng));
        }
        items.sort_by_key(|item| item.release_ms);
        let users: Vec<LoopUser> =
            (0..options.users).map(|_| LoopUser::new(&topics, &mut rng)).collect();
        let first = |user: usize| {
            let gap_ms = users[user].gap_ms as f32;
            Reverse((
                START_MS + exponential_ms(gap_ms, &mut rng_of(&[options.seed, 1, user as u64])),
                user,
            ))
        };
        let due = (0..options.users).map(first).collect();
        let mut index = RetrievalIndex::default();
        (0..items.len()).for_each(|item| index.release(item, items[item].codes));
        Ok(Self { topics, items, users, due, index, requests: 0, options })
    }

    /// All users, whose ids are 1, 2, and so on.
    pub fn users(&self) -> Vec<User> {
        let user = |(index, user): (usize, &LoopUser)| User {
            id: index as u64 + 1,
            ids: vec![user.age_group],
            dense: Vec::new(),
        };
        self.users.iter().enumerate().map(user).collect()
    }

    /// The items that were released so far, but for the first `from`.
    pub fn items(&self, from: usize) -> Vec<Item> {
        let item = |(index, item): (usize, &LoopItem)| Item {
            id: (from + index) as u64 + 1,
            ids: vec![item.codes.shown_topic, item.codes.creator],
            dense: vec![item.length],
            ..Item::default()
        };
        self.items[from..].iter().enumerate().map(item).collect()
    }

    /// Whether an item was fresh at a time.
    pub fn is_fresh(&self, item: u64, time_ms: i64) -> bool {
        time_ms - self.items[item as usize - 1].release_ms < FRESH_MS
    }

    /// The pages that are due next, before `until_ms`, `most` of them at most. They are of
    /// different users, and none comes after the next page of another's user could. So they can be
    /// ranked together; all must be shown before the next are asked for.
    pub fn next_pages(&mut self, until_ms: i64, most: usize) -> Vec<PageRequest> {
        let mut pages: Vec<PageRequest> = Vec::new();
        while let Some(&Reverse((time_ms, user))) = self.due.peek() {
            let first_ms = pages.first().map_or(time_ms, |page| page.time_ms);
            // What is popular is counted when all before was shown.
            let counted_ms = (first_ms / POPULAR_EVERY_MS + 1) * POPULAR_EVERY_MS;
            let until_ms = until_ms.min(first_ms + PAGE_GAP_MS).min(counted_ms);
            if time_ms >= until_ms || pages.len() == most {
                break;
            }
            self.due.pop();
            pages.push(self.page(time_ms, user));
        }
        pages
    }

    fn page(&mut self, time_ms: i64, user: usize) -> PageRequest {
        self.requests += 1;
        self.release_until(time_ms);
        self.index.count(time_ms);
        let mut rng = self.rng(self.requests, 0);
        let of = &mut self.users[user];
        if of.pages == 0 {
            of.begin_session(time_ms, rng.random::<f32>() >= FIRST_SURFACE_SHARE, &mut rng);
            of.device = rng.random_range(0..DEVICES);
        }
        let candidates = self.index.candidates(of, &self.items, time_ms, &mut rng);
        PageRequest {
            request: self.requests,
            time_ms,
            user: user as u64 + 1,
            surface: self.users[user].surface,
            candidates: candidates.into_iter().map(|item| item as u64 + 1).collect(),
            context: ContextFeatures {
                ids: vec![self.users[user].device as u64 + 1],
                dense: Vec::new(),
            },
        }
    }

    /// Releases the items that are due.
    fn release_until(&mut self, time_ms: i64) {
        let every_ms = DAY_MS / self.options.items_per_day.max(1) as i64;
        while self.options.items_per_day > 0 {
            let released = self.items.len() - self.options.items;
            let release_ms = START_MS + every_ms * (released as i64 + 1);
            if release_ms > time_ms {
                return;
            }
            let mut rng = rng_of(&[self.options.seed, 2, released as u64]);
            let item = LoopItem::new(&self.topics, release_ms, &mut rng);
            self.index.release(self.items.len(), item.codes);
            self.items.push(item);
        }
    }

    /// Shows the best of a ranking of a page's candidates: what the user does with each item. The
    /// page's user goes on, or leaves until the next session.
    ///
    /// # Errors
    /// The ranking holds what is no candidate, or one twice.
    pub fn show(&mut self, page: &PageRequest, ranking: &[u64]) -> Result<Vec<Impression>> {
        let mut rng = self.rng(page.request, 1);
        let slate = slate(page, ranking, &mut rng)?;
        let user = page.user as usize - 1;
        self.users[user].fade(page.time_ms);
        let mut rows = Vec::with_capacity(slate.len());
        for (position, &item) in slate.iter().enumerate() {
            let examined = EXAMINED_NEXT.powi(position as i32);
            let truth = self.truth(page, item);
            let is_examined = rng.random::<f32>() < examined;
            let (outcome, delay_ms) = draw_outcome(truth, is_examined, &mut rng);
            let (at, clicked) = (item as usize - 1, outcome.actions & 1 == 1);
            let of = &mut self.users[user];
            of.saw(at, &self.items[at], is_examined);
            if clicked {
                of.clicked(at);
                self.index.clicked(at, page.time_ms);
            }
            rows.push(Impression {
                request: page.request,
                time_ms: page.time_ms,
                outcome_ms: page.time_ms + delay_ms,
                user: page.user,
                item,
                surface: page.surface,
                outcome,
                context: page.context.clone(),
                truth: [truth.click, truth.click * truth.like, truth.click * truth.finish]
                    .map(|chance| chance * examined)
                    .to_vec(),
                history_only: false,
            });
        }
        self.schedule(page, rows.iter().any(|row| row.outcome.actions & 1 == 1));
        Ok(rows)
    }

    /// When the user of a page comes again.
    fn schedule(&mut self, page: &PageRequest, has_clicked: bool) {
        let mut rng = self.rng(page.request, 2);
        let user = &mut self.users[page.user as usize - 1];
        user.pages += 1;
        let goes_on =
            user.pages < MOST_PAGES && rng.random::<f32>() < ANOTHER_PAGE[usize::from(has_clicked)];
        let next_ms = if goes_on {
            exponential_ms(MEAN_READING_MS, &mut rng)
        } else {
            user.pages = 0;
            exponential_ms(user.gap_ms as f32, &mut rng)
        };
        self.due.push(Reverse((page.time_ms + PAGE_GAP_MS + next_ms, page.user as usize - 1)));
    }

    /// The candidates by what they are worth in truth, best first: no ranker can do better on this
    /// page.
    pub fn rank_by_truth(&mut self, page: &PageRequest) -> Vec<u64> {
        self.users[page.user as usize - 1].fade(page.time_ms);
        sorted(page, |item| self.truth(page, item).value())
    }

    /// The candidates by their clicks of late, with enough chance that everything is shown now and
    /// then: the ranker of the past, and of the second surface.
    pub fn rank_by_popularity(&self, page: &PageRequest) -> Vec<u64> {
        let mut rng = self.rng(page.request, 3);
        sorted(page, |item| {
            // Scores with Gumbel noise draw items in proportion to their clicks.
            let wait = -f64::from(1.0 - rng.random::<f32>()).ln();
            let clicks = f64::from(self.index.counted(item as usize - 1));
            (1.0 + clicks).ln() - wait.max(1e-9).ln()
        })
    }

    /// Shows a page as the past's ranker orders it.
    ///
    /// # Errors
    /// Those of [`ClosedLoopWorld::show`], which the world's own rankings never cause.
    pub fn show_by_popularity(&mut self, page: &PageRequest) -> Result<Vec<Impression>> {
        let ranking = self.rank_by_popularity(page);
        self.show(page, &ranking)
    }

    /// The impressions of some days under that ranker, from the first on.
    ///
    /// # Errors
    /// Those of [`ClosedLoopWorld::show`], which the world's own rankings never cause.
    pub fn past(&mut self, days: i64) -> Result<Vec<Impression>> {
        let mut rows = Vec::new();
        while let [page] = &self.next_pages(START_MS + days * DAY_MS, 1)[..] {
            rows.extend(self.show_by_popularity(page)?);
        }
        Ok(rows)
    }

    /// What a user who examines an item of a page does with it.
    fn truth(&self, page: &PageRequest, item: u64) -> TrueActions {
        let (user, item) = (&self.users[page.user as usize - 1], &self.items[item as usize - 1]);
        let affinity = dot(&user.wish, &item.vector);
        let age_ms = (page.time_ms - item.release_ms) as f32;
        let satiated: f32 =
            SATIATION.iter().zip(&user.satiation).map(|(each, of)| each * of[item.topic]).sum();
        let device = 0.3 * (user.device as f32 - 1.0);
        let [click, like, finish] =
            if page.surface == 0 { [-1.0, -1.0, 0.0] } else { [-0.6, -1.4, -0.4] };
        let novelty = NOVELTY * (-age_ms / NOVELTY_MS).exp();
        let more = TASTE * affinity + item.quality + user.bias + device + novelty;
        TrueActions {
            click: sigmoid(click + more - satiated),
            like: sigmoid(like + 1.5 * affinity + item.quality),
            finish: sigmoid(finish + 1.2 * affinity + user.patience - item.length),
        }
    }

    /// The chance of one purpose of a request.
    fn rng(&self, request: u64, purpose: u64) -> SmallRng {
        rng_of(&[self.options.seed, 3, request, purpose])
    }
}

/// The schema of the world: every action is a main task, so that a model's own heads order by all
/// that counts.
pub fn schema() -> Schema {
    let keys: [&[&str]; 6] = [
        &["user_id"],
        &["item_id"],
        &["creator"],
        &["user_id", "topic"],
        &["user_id", "creator"],
        &["item_id", "surface"],
    ];
    Schema {
        surfaces: [FIRST_SURFACE, "search"].map(String::from).to_vec(),
        actions: ACTIONS.map(String::from).to_vec(),
        values: Vec::new(),
        tasks: ACTIONS.map(|name| Task::of_label(name, TaskRole::Main, TaskKind::Binary)).to_vec(),
        item_features: Feature::mixed(&["topic", "creator"], &["length"]),
        user_features: Feature::list(&["age_group"], FeatureKind::Categorical),
        context_features: Feature::list(&["device"], FeatureKind::Categorical),
        counters: Counter::lasting(&keys, &ACTIONS[..2]),
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: vec![ValueRange::new("length", -6.0, 6.0)],
    }
}

/// What is shown: the first of the ranking, and now and then another candidate last.
fn slate(page: &PageRequest, ranking: &[u64], rng: &mut SmallRng) -> Result<Vec<u64>> {
    let mut slate: Vec<u64> = ranking.iter().copied().take(PAGE_ITEMS).collect();
    let is_wrong =
        |(at, item): (usize, &u64)| !page.candidates.contains(item) || slate[..at].contains(item);
    if slate.is_empty() || slate.iter().enumerate().any(is_wrong) {
        return Err(Error::invalid(format!(
            "request {}: {slate:?} is no ranking of its candidates",
            page.request
        )));
    }
    let (explores, draw) = (rng.random::<f32>() < EXPLORED, rng.random::<f32>());
    let others: Vec<u64> =
        page.candidates.iter().copied().filter(|item| !slate.contains(item)).collect();
    if explores && !others.is_empty() {
        *slate.last_mut().expect("not empty") = others[(draw * others.len() as f32) as usize];
    }
    Ok(slate)
}

/// What is done, and the delay after which all of it is known.
fn draw_outcome(truth: TrueActions, is_examined: bool, rng: &mut SmallRng) -> (Outcome, i64) {
    // As many draws whatever happens, so that one place does not change the next.
    let mut happens = |chance: f32| rng.random::<f32>() < chance;
    let [clicks, likes, finishes] = [truth.click, truth.like, truth.finish].map(&mut happens);
    let clicked = is_examined && clicks;
    let bits = [clicked, clicked && likes, clicked && finishes];
    let actions = (0..3).map(|bit| u64::from(bits[bit]) << bit).sum();
    let delay_ms = 2_000 + exponential_ms(15_000.0, rng).min(CLICK_WINDOW_MS - 10_000);
    let delay_ms = if clicked { delay_ms } else { CLICK_WINDOW_MS };
    (Outcome { actions, known: 0b111, ..Outcome::UNKNOWN }, delay_ms)
}

/// The candidates of a page, the highest score first.
fn sorted(page: &PageRequest, mut score: impl FnMut(u64) -> f64) -> Vec<u64> {
    let mut scored: Vec<(f64, u64)> =
        page.candidates.iter().map(|item| (score(*item), *item)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().map(|(_, item)| item).collect()
}

/// Levels of satiation by topic, for each memory.
type Satiation = [[f32; TOPICS]; SATIATION.len()];

/// A generator that depends on `parts` alone.
fn rng_of(parts: &[u64]) -> SmallRng {
    SmallRng::seed_from_u64(splitmix64(mix_parts(parts)))
}
