//! The simulated users and items: latent tastes, true probabilities and outcomes.

use hypercast_fm::example::{Item, MAX_VALUES, Outcome, User};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::SimulateOptions;
use super::vectors::{LatentVector, blend, dot, exponential_ms, noise, normal, sigmoid, unit};
use crate::dataset::{ContextFeatures, Impression};

const TOPICS: usize = 12;
const LIKED_TOPICS: usize = 3;
/// Items shown in a request.
const SLATE: usize = 6;
const DEVICES: usize = 3;
/// 1 January 2024, midnight UTC.
const START_MS: i64 = 1_704_067_200_000;
/// Mean time between requests of the same user.
const USER_GAP_MS: f32 = 4.0 * 3.6e6;
/// The standard deviation of a taste's drift over one day, per dimension before scaling to norm 1.
const DRIFT: f32 = 0.03;
/// The increase of a click's logit for a perfect match of tastes.
const TASTE: f32 = 3.0;
/// The time after which an impression counts as not clicked.
const CLICK_WINDOW_MS: i64 = 60_000;

struct LatentItem {
    vector: LatentVector,
    quality: f32,
    length: f32,
    shown_topic: u64,
    creator: u64,
}

struct LatentUser {
    taste: LatentVector,
    bias: f32,
    age_group: u64,
    last_ms: i64,
}

/// The biases of the logits on one surface.
struct SurfaceBias {
    click: f32,
    like: f32,
    finish: f32,
}

/// The true probabilities of an impression's actions, and the expected share that is watched.
struct TrueOutcome {
    click: f32,
    like: f32,
    finish: f32,
    watch: f32,
}

pub(super) struct SimulatedWorld {
    rng: StdRng,
    items: Vec<LatentItem>,
    users: Vec<LatentUser>,
    surfaces: Vec<SurfaceBias>,
    /// Running sums of the items' weights, from which shown items are drawn.
    popularity: Vec<f32>,
    /// Running sums of the users' weights.
    activity: Vec<f32>,
    gap_ms: f32,
    now_ms: i64,
}

impl SimulatedWorld {
    pub(super) fn new(options: &SimulateOptions) -> SimulatedWorld {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let topics: Vec<LatentVector> = (0..TOPICS).map(|_| unit(noise(&mut rng))).collect();
        let items =
            (0..options.items).map(|_| LatentItem::new(&topics, options.items, &mut rng)).collect();
        let users = (0..options.users).map(|_| LatentUser::new(&topics, &mut rng)).collect();
        let surfaces = (0..options.surfaces).map(|_| SurfaceBias::new(&mut rng)).collect();
        let popularity = (0..options.items).map(|rank| 1.0 / (rank as f32 + 20.0));
        let popularity = running_sum(popularity);
        let activity = running_sum((0..options.users).map(|_| (0.5 * normal(&mut rng)).exp()));
        let gap_ms = USER_GAP_MS / options.users as f32;
        SimulatedWorld {
            rng,
            items,
            users,
            surfaces,
            popularity,
            activity,
            gap_ms,
            now_ms: START_MS,
        }
    }

    pub(super) fn items(&self) -> Vec<Item> {
        let item = |(index, item): (usize, &LatentItem)| Item {
            id: index as u64 + 1,
            ids: vec![item.shown_topic, item.creator],
            dense: vec![item.length],
            ..Item::default()
        };
        self.items.iter().enumerate().map(item).collect()
    }

    pub(super) fn users(&self) -> Vec<User> {
        let user = |(index, user): (usize, &LatentUser)| User {
            id: index as u64 + 1,
            ids: vec![user.age_group],
            dense: Vec::new(),
        };
        self.users.iter().enumerate().map(user).collect()
    }

    /// The impressions of the next request, with their outcomes.
    pub(super) fn request(&mut self, request: u64) -> Vec<Impression> {
        let wait = -self.gap_ms * (1.0 - self.rng.random::<f32>()).ln();
        self.now_ms += (wait as i64).max(1);
        let user = draw(&self.activity, &mut self.rng);
        let surface = self.rng.random_range(0..self.surfaces.len());
        let device = self.rng.random_range(0..DEVICES);
        let battery: f32 = self.rng.random();
        self.users[user].drift(self.now_ms, &mut self.rng);
        let mut slate: Vec<usize> = Vec::with_capacity(SLATE);
        while slate.len() < SLATE {
            let item = draw(&self.popularity, &mut self.rng);
            if !slate.contains(&item) {
                slate.push(item);
            }
        }
        let mut rows = Vec::with_capacity(SLATE);
        for item in slate {
            let truth = self.truth(user, item, surface, device);
            let (outcome, delay_ms) = truth.draw(surface == 0, &mut self.rng);
            rows.push(Impression {
                request,
                time_ms: self.now_ms,
                outcome_ms: self.now_ms + delay_ms,
                user: user as u64 + 1,
                item: item as u64 + 1,
                surface: surface as u16,
                outcome,
                context: ContextFeatures { ids: vec![device as u64 + 1], dense: vec![battery] },
                truth: vec![truth.click, truth.like, truth.finish, truth.watch],
                history_only: false,
            });
        }
        rows
    }

    fn truth(&self, user: usize, item: usize, surface: usize, device: usize) -> TrueOutcome {
        let (user, item, surface) = (&self.users[user], &self.items[item], &self.surfaces[surface]);
        let affinity = dot(&user.taste, &item.vector);
        let device = 0.3 * (device as f32 - 1.0);
        let click = sigmoid(surface.click + TASTE * affinity + item.quality + user.bias + device);
        TrueOutcome {
            click,
            like: click * sigmoid(surface.like + 1.5 * affinity + item.quality),
            finish: click * sigmoid(surface.finish + 1.5 * affinity - 1.0 * item.length),
            watch: sigmoid(2.0 * affinity + item.quality),
        }
    }
}

impl LatentItem {
    fn new(topics: &[LatentVector], items: usize, rng: &mut StdRng) -> LatentItem {
        let topic = rng.random_range(0..topics.len());
        let shown =
            if rng.random::<f32>() < 0.85 { topic } else { rng.random_range(0..topics.len()) };
        // A creator has about five items, all of one topic.
        let creators = items.div_ceil(5 * topics.len()).max(1);
        let creator = topic + topics.len() * rng.random_range(0..creators);
        LatentItem {
            vector: unit(blend(&[(1.0, topics[topic]), (0.2, noise(rng))])),
            quality: 0.4 * normal(rng),
            length: normal(rng),
            shown_topic: shown as u64 + 1,
            creator: creator as u64 + 1,
        }
    }
}

impl LatentUser {
    fn new(topics: &[LatentVector], rng: &mut StdRng) -> LatentUser {
        let liked: Vec<usize> =
            (0..LIKED_TOPICS).map(|_| rng.random_range(0..topics.len())).collect();
        let parts: Vec<(f32, LatentVector)> =
            liked.iter().map(|&topic| (1.0, topics[topic])).collect();
        let age_group =
            if rng.random::<f32>() < 0.6 { liked[0] % 5 } else { rng.random_range(0..5) };
        LatentUser {
            taste: unit(blend(&parts)),
            bias: 0.4 * normal(rng),
            age_group: age_group as u64 + 1,
            last_ms: START_MS,
        }
    }

    fn drift(&mut self, now_ms: i64, rng: &mut StdRng) {
        let days = (now_ms - self.last_ms) as f32 / 8.64e7;
        self.last_ms = now_ms;
        self.taste = unit(blend(&[(1.0, self.taste), (DRIFT * days.sqrt(), noise(rng))]));
    }
}

impl SurfaceBias {
    fn new(rng: &mut StdRng) -> SurfaceBias {
        SurfaceBias {
            click: -1.1 + 0.5 * normal(rng),
            like: -0.8 + 0.4 * normal(rng),
            finish: 0.3 * normal(rng),
        }
    }
}

impl TrueOutcome {
    /// Draws an outcome and the delay in milliseconds after which all of it is known. Likes and
    /// finishes follow a click; whether one finishes is known on the first surface only.
    fn draw(&self, finish_known: bool, rng: &mut StdRng) -> (Outcome, i64) {
        let mut chance = |p: f32| rng.random::<f32>() < p;
        let clicked = chance(self.click);
        let liked = clicked && chance(self.like / self.click);
        let finished = clicked && finish_known && chance(self.finish / self.click);
        let known = if finish_known { 0b111 } else { 0b011 };
        let actions = u64::from(clicked) | u64::from(liked) << 1 | u64::from(finished) << 2;
        let mut values = [f32::NAN; MAX_VALUES];
        let mut delay_ms = CLICK_WINDOW_MS;
        if clicked {
            values[0] = (self.watch + 0.1 * normal(rng)).clamp(0.0, 1.0);
            let mut wait = |mean_ms: f32| exponential_ms(mean_ms, rng);
            delay_ms = 2_000 + wait(10_000.0);
            delay_ms += if liked { wait(600_000.0) } else { 0 };
            delay_ms += if finished { wait(120_000.0) } else { 0 };
        }
        (Outcome { actions, known, values }, delay_ms)
    }
}

/// The sums of the first 1, 2, … weights.
fn running_sum(weights: impl Iterator<Item = f32>) -> Vec<f32> {
    let sum = |total: &mut f32, weight: f32| {
        *total += weight;
        Some(*total)
    };
    weights.scan(0.0, sum).collect()
}

/// Draws an index with a probability proportional to its weight.
fn draw(running: &[f32], rng: &mut StdRng) -> usize {
    let total = running.last().expect("not empty");
    let at = rng.random::<f32>() * total;
    running.partition_point(|&sum| sum <= at).min(running.len() - 1)
}
