//! A world with a scaling law: the more a model can hold, read and has seen, the more it knows,
//! with ever smaller gains.
//!
//! Everything that decides a click can be seen: the item's codes, the user's cohort and the user's
//! earlier impressions. So the entropy of the true probabilities is the NE that a model of any size
//! approaches. What small models miss has power-law tails:
//!
//! - an item's vector has a spectrum of dimensions, and a narrow model holds the first of them.
//!   What cohorts want of it takes no history, so models of every size begin to learn it early;
//! - it is a sum over a few topics, more styles, many creators and the items themselves, which are
//!   shown by a Zipf law, so that the rare take data;
//! - a user's interests return after Pareto lags, so that a short history misses some;
//! - after a click, interest moves to the complement of its item while the session lasts;
//! - an interest that followed a topic before follows it again, which takes two hops: from the last
//!   click to the earlier one of its topic, and on to the click after that.

mod latent;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::BinaryHeap};

use hypercast_core::hash::mix_parts;
use hypercast_fm::example::{Item, Outcome, User};
use rand::{Rng, SeedableRng, rngs::StdRng};

use self::latent::{
    Coordinates, ParetoMemory, VectorOf, complement, coordinates, lag_norm, spectrum, weighted_sum,
};
use super::{SimulateOptions, SimulateReport, surface_name, vectors::sigmoid, write_world};
use crate::{
    dataset::{ContextFeatures, Entities, Impression},
    error::Result,
    schema::{Feature, FeatureKind, Schema, Task, TaskKind, TaskRole},
};

const TOPICS: u64 = 16;
const STYLES: u64 = 32;
/// Items of a creator, on average.
const ITEMS_PER_CREATOR: u64 = 100;
const COHORTS: u64 = 32;
/// Shares of the variance of an item's vector: topic, style, creator, and its own. Codes that are
/// seen often have most of it: what is learned from few impressions is learned late.
const CODE_SHARES: [f32; 4] = [0.7, 0.23, 0.05, 0.02];
/// Items shown in a request.
const SLATE: usize = 12;
/// Items are shown by their rank with a probability of 1 / (rank + this).
const ZIPF_SHIFT: f64 = 20.0;
/// 1 January 2024, midnight UTC.
const START_MS: i64 = 1_704_067_200_000;
const DAY_MS: i64 = 86_400_000;
/// After this time the outcome of an impression is known.
const OUTCOME_MS: i64 = 60_000;
/// The shortest time between two requests of a user: the first's outcomes are known by then.
const GAP_MS: f64 = 90_000.0;
/// The Pareto index of the time between two requests of a user.
const GAP_INDEX: f64 = 0.6;
const LONGEST_GAP_MS: f64 = 14.0 * DAY_MS as f64;
/// A session ends with a longer gap.
const SESSION_MS: i64 = 30 * 60_000;
/// A click pulls a user's interests towards the item, and no click pushes them away by this share,
/// so that what is popular does not become everybody's interest.
const AWAY: f32 = 0.35;

/// The standard deviations of what is added to a click's logit. What needs no history has most of
/// it: models find out how an item and a history match only once they know items.
const OF_ALL: f32 = 0.5;
const OF_COHORT: f32 = 1.2;
const RETURNING: f32 = 0.7;
const IN_SESSION: f32 = 0.2;
const TWO_HOPS: f32 = 0.15;

/// Simulates a data set with a scaling law and writes it with its report. Memory is 3 KB a user and
/// what an [`Item`] takes, however many requests there are.
///
/// # Errors
/// An option is outside its range, or the file system fails.
pub fn simulate_power_law(options: &SimulateOptions) -> Result<SimulateReport> {
    options.check()?;
    let schema = schema(options.surfaces);
    let mut world = PowerLawWorld::new(options);
    let entities =
        Entities { schema: &schema, items: &world.items(), item_names: &[], users: &world.users() };
    write_world(options, &entities, |request| world.request(request))
}

/// The schema of a data set with a scaling law. It has no counters: what a model knows of a user is
/// what it reads of the history.
pub fn schema(surfaces: usize) -> Schema {
    let task = |name: &str| Task::of_label(name, TaskRole::Main, TaskKind::Binary);
    Schema {
        surfaces: (0..surfaces).map(surface_name).collect(),
        actions: ["click", "like"].map(String::from).to_vec(),
        values: Vec::new(),
        tasks: ["click", "like"].map(task).to_vec(),
        item_features: Feature::list(&["topic", "style", "creator"], FeatureKind::Categorical),
        user_features: Feature::list(&["cohort"], FeatureKind::Categorical),
        context_features: Vec::new(),
        counters: Vec::new(),
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: Vec::new(),
    }
}

struct PowerLawWorld {
    rng: StdRng,
    seed: u64,
    items: u64,
    surfaces: usize,
    spectrum: Coordinates,
    lag_norm: f32,
    users: Vec<UserMemory>,
    /// The time of each user's next request.
    next: BinaryHeap<Reverse<(i64, usize)>>,
}

/// What decides a user's clicks.
struct UserMemory {
    interests: ParetoMemory,
    last_request_ms: i64,
    /// The item that was clicked last.
    last_click: Option<ShownItem>,
    /// By topic: the item that was clicked after the last click on the topic.
    followed: [Option<u64>; TOPICS as usize],
}

#[derive(Debug, Clone, Copy)]
struct ShownItem {
    item: u64,
    topic: usize,
}

/// The codes of an item, which models see.
#[derive(Debug, Clone, Copy)]
struct ItemCodes {
    topic: u64,
    style: u64,
    creator: u64,
}

impl PowerLawWorld {
    fn new(options: &SimulateOptions) -> Self {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let start = |user| Reverse((START_MS + rng.random_range(0..DAY_MS), user));
        Self {
            next: (0..options.users).map(start).collect(),
            rng,
            seed: options.seed,
            items: options.items as u64,
            surfaces: options.surfaces,
            spectrum: spectrum(),
            lag_norm: lag_norm(),
            users: (0..options.users).map(|_| UserMemory::new()).collect(),
        }
    }

    fn codes(&self, item: u64) -> ItemCodes {
        let code = |of: VectorOf, codes: u64| mix_parts(&[self.seed, !(of as u64), item]) % codes;
        ItemCodes {
            topic: code(VectorOf::Topic, TOPICS),
            style: code(VectorOf::Style, STYLES),
            creator: code(VectorOf::Creator, self.items.div_ceil(ITEMS_PER_CREATOR)),
        }
    }

    fn item_vector(&self, item: u64) -> Coordinates {
        let ItemCodes { topic, style, creator } = self.codes(item);
        let [of_topic, of_style, of_creator, own] = CODE_SHARES.map(f32::sqrt);
        let vector = |of, code| coordinates(self.seed, of, code);
        weighted_sum(&[
            (of_topic, vector(VectorOf::Topic, topic)),
            (of_style, vector(VectorOf::Style, style)),
            (of_creator, vector(VectorOf::Creator, creator)),
            (own, vector(VectorOf::Item, item)),
        ])
    }

    fn cohort(&self, user: usize) -> u64 {
        mix_parts(&[self.seed, !(VectorOf::Cohort as u64), user as u64]) % COHORTS
    }

    /// What the user looks for now.
    fn interest(&self, user: usize, now_ms: i64) -> Coordinates {
        let memory = &self.users[user];
        let mut parts = vec![
            (OF_ALL, coordinates(self.seed, VectorOf::Everybody, 0)),
            (OF_COHORT, coordinates(self.seed, VectorOf::Cohort, self.cohort(user))),
            (RETURNING, memory.interests.sum(self.lag_norm)),
        ];
        let in_session = now_ms - memory.last_request_ms < SESSION_MS;
        if let Some(last) = memory.last_click.filter(|_| in_session) {
            parts.push((IN_SESSION, complement(&self.item_vector(last.item))));
        }
        if let Some(next) = memory.last_click.and_then(|last| memory.followed[last.topic]) {
            parts.push((TWO_HOPS, self.item_vector(next)));
        }
        let sum = weighted_sum(&parts);
        std::array::from_fn(|at| self.spectrum[at] * sum[at])
    }

    /// Different items, popular ones more often.
    fn slate(&mut self) -> Vec<u64> {
        let mut slate = Vec::with_capacity(SLATE);
        while slate.len() < SLATE {
            let item = zipf(self.items, self.rng.random());
            if !slate.contains(&item) {
                slate.push(item);
            }
        }
        slate
    }

    fn items(&self) -> Vec<Item> {
        let item = |item| {
            let ItemCodes { topic, style, creator } = self.codes(item);
            Item { id: item + 1, ids: vec![topic + 1, style + 1, creator + 1], ..Item::default() }
        };
        (0..self.items).map(item).collect()
    }

    fn users(&self) -> Vec<User> {
        let user = |user| User {
            id: user as u64 + 1,
            ids: vec![self.cohort(user) + 1],
            dense: Vec::new(),
        };
        (0..self.users.len()).map(user).collect()
    }

    fn request(&mut self, request: u64) -> Vec<Impression> {
        let Some(Reverse((now_ms, user))) = self.next.pop() else { return Vec::new() };
        self.next.push(Reverse((now_ms + gap_ms(self.rng.random()), user)));
        let surface = self.rng.random_range(0..self.surfaces);
        let interest = self.interest(user, now_ms);
        let mut rows = Vec::with_capacity(SLATE);
        for item in self.slate() {
            let vector = self.item_vector(item);
            let affinity: f32 = vector.iter().zip(&interest).map(|(x, wanted)| x * wanted).sum();
            let click = sigmoid(affinity - 1.1 - 0.2 * (surface % 3) as f32);
            let like = click * sigmoid(0.7 * affinity - 0.5);
            let chance = self.rng.random::<f32>();
            let (clicked, liked) = (chance < click, chance < like);
            let topic = self.codes(item).topic as usize;
            self.users[user].saw(ShownItem { item, topic }, &vector, clicked);
            rows.push(Impression {
                request,
                time_ms: now_ms,
                outcome_ms: now_ms + OUTCOME_MS,
                user: user as u64 + 1,
                item: item + 1,
                surface: surface as u16,
                outcome: Outcome {
                    actions: u64::from(clicked) | u64::from(liked) << 1,
                    known: 0b11,
                    ..Outcome::UNKNOWN
                },
                context: ContextFeatures::default(),
                truth: vec![click, like],
                history_only: false,
            });
        }
        self.users[user].last_request_ms = now_ms;
        rows
    }
}

impl UserMemory {
    fn new() -> Self {
        Self {
            interests: ParetoMemory::new(),
            last_request_ms: START_MS,
            last_click: None,
            followed: [None; TOPICS as usize],
        }
    }

    /// Takes in an impression of an item.
    fn saw(&mut self, shown: ShownItem, vector: &Coordinates, clicked: bool) {
        self.interests.push(if clicked { 1.0 } else { -AWAY }, vector);
        if !clicked {
            return;
        }
        if let Some(before) = self.last_click.replace(shown) {
            self.followed[before.topic] = Some(shown.item);
        }
    }
}

/// The item, from 0 on, at a place between 0 and 1 of all that is shown.
fn zipf(items: u64, place: f64) -> u64 {
    let rank = ZIPF_SHIFT * ((items as f64 + ZIPF_SHIFT) / ZIPF_SHIFT).powf(place) - ZIPF_SHIFT;
    (rank as u64).min(items - 1)
}

/// The time to a user's next request, at a place between 0 and 1 of all gaps.
fn gap_ms(place: f64) -> i64 {
    (GAP_MS * (1.0 - place).powf(-1.0 / GAP_INDEX)).min(LONGEST_GAP_MS) as i64
}
