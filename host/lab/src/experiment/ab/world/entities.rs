//! Users and items of the closed loop.

use hypercast_data::simulate::vectors::{LatentVector, blend, noise, normal, unit};
use rand::Rng;

use super::{DAY_MS, SATIATION_HALF_LIFE_MS, START_MS, Satiation};

pub(super) const TOPICS: usize = 16;
const LIKED_TOPICS: usize = 3;
/// Creators of a topic.
const CREATORS: usize = 8;
/// The standard deviation of a taste's drift over one day, per dimension before scaling to norm 1.
const DRIFT: f32 = 0.05;
/// What a session's mood counts beside the taste.
const MOOD: f32 = 0.6;
/// Mean time between sessions of the most usual user.
const SESSION_GAP_MS: f64 = 0.8 * DAY_MS as f64;
/// Clicks that retrieval remembers of a user.
const REMEMBERED_CLICKS: usize = 8;

/// The codes of an item that models and retrieval see.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoopCodes {
    /// The topic that it says it has, from 1.
    pub(super) shown_topic: u64,
    pub(super) creator: u64,
}

pub(super) struct LoopItem {
    pub(super) vector: LatentVector,
    /// The true topic, whose impressions satiate; the shown one may differ.
    pub(super) topic: usize,
    pub(super) codes: LoopCodes,
    pub(super) quality: f32,
    pub(super) length: f32,
    pub(super) release_ms: i64,
}

pub(super) struct LoopUser {
    taste: LatentVector,
    /// The topics' vectors that a mood comes from.
    liked: [LatentVector; LIKED_TOPICS],
    /// Taste and mood of the session.
    pub(super) wish: LatentVector,
    pub(super) bias: f32,
    pub(super) patience: f32,
    pub(super) age_group: u64,
    /// Mean time between sessions.
    pub(super) gap_ms: f64,
    pub(super) surface: u16,
    pub(super) device: usize,
    /// Pages of the session so far.
    pub(super) pages: usize,
    /// Items that were shown in the session.
    pub(super) seen: Vec<usize>,
    /// Items that were clicked last, the newest first.
    pub(super) clicks: Vec<usize>,
    pub(super) satiation: Satiation,
    /// When tastes drifted, and when satiation faded, last.
    drifted_ms: i64,
    faded_ms: i64,
}

pub(super) fn topics(rng: &mut impl Rng) -> Vec<LatentVector> {
    (0..TOPICS).map(|_| unit(noise(rng))).collect()
}

impl LoopItem {
    pub(super) fn new(topics: &[LatentVector], release_ms: i64, rng: &mut impl Rng) -> LoopItem {
        let topic = rng.random_range(0..TOPICS);
        let shown = if rng.random::<f32>() < 0.85 { topic } else { rng.random_range(0..TOPICS) };
        let creator = topic * CREATORS + rng.random_range(0..CREATORS);
        LoopItem {
            vector: unit(blend(&[(1.0, topics[topic]), (0.25, noise(rng))])),
            topic,
            codes: LoopCodes { shown_topic: shown as u64 + 1, creator: creator as u64 + 1 },
            quality: 0.5 * normal(rng),
            length: normal(rng),
            release_ms,
        }
    }
}

impl LoopUser {
    pub(super) fn new(topics: &[LatentVector], rng: &mut impl Rng) -> LoopUser {
        let places: [usize; LIKED_TOPICS] = std::array::from_fn(|_| rng.random_range(0..TOPICS));
        let liked = places.map(|topic| topics[topic]);
        let taste = unit(blend(&liked.map(|vector| (1.0, vector))));
        let age_group =
            if rng.random::<f32>() < 0.6 { places[0] % 5 } else { rng.random_range(0..5) };
        LoopUser {
            taste,
            liked,
            wish: taste,
            bias: 0.4 * normal(rng),
            patience: 0.5 * normal(rng),
            age_group: age_group as u64 + 1,
            gap_ms: SESSION_GAP_MS * f64::from((0.4 * normal(rng)).exp()),
            surface: 0,
            device: 0,
            pages: 0,
            seen: Vec::new(),
            clicks: Vec::new(),
            satiation: Satiation::default(),
            drifted_ms: START_MS,
            faded_ms: START_MS,
        }
    }

    /// A session on a surface, with a mood.
    pub(super) fn begin_session(&mut self, time_ms: i64, is_second: bool, rng: &mut impl Rng) {
        let days = (time_ms - self.drifted_ms) as f32 / DAY_MS as f32;
        self.drifted_ms = time_ms;
        self.taste = unit(blend(&[(1.0, self.taste), (DRIFT * days.sqrt(), noise(rng))]));
        let mood = self.liked[rng.random_range(0..LIKED_TOPICS)];
        self.wish = unit(blend(&[(1.0, self.taste), (MOOD, mood)]));
        self.surface = u16::from(is_second);
        self.seen.clear();
    }

    /// Satiation fades until a time.
    pub(super) fn fade(&mut self, time_ms: i64) {
        let passed = (time_ms - self.faded_ms) as f32;
        self.faded_ms = time_ms;
        for (levels, half_life) in self.satiation.iter_mut().zip(SATIATION_HALF_LIFE_MS) {
            let kept = (-passed / half_life).exp2();
            levels.iter_mut().for_each(|level| *level *= kept);
        }
    }

    /// An item was shown; one that is examined satiates.
    pub(super) fn saw(&mut self, at: usize, item: &LoopItem, is_examined: bool) {
        self.seen.push(at);
        if is_examined {
            self.satiation.iter_mut().for_each(|levels| levels[item.topic] += 1.0);
        }
    }

    pub(super) fn clicked(&mut self, at: usize) {
        self.clicks.insert(0, at);
        self.clicks.truncate(REMEMBERED_CLICKS);
    }
}
