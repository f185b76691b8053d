//! Made-up requests for any schema: users, items, histories, candidates, outcomes and embeddings of
//! realistic sizes, all determined by one seed.
//!
//! Benches and tests of a single expert use these; no served model is trained on them. A
//! candidate's features, embedding and outcomes depend on one hidden affinity, so that there is
//! something to learn. For data whose statistics matter, use `simulate`.

use std::sync::Arc;

use hypercast_core::hash::splitmix64;
use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::dataset::ContextFeatures;
use crate::schema::{
    BUILT_IN_FEATURES, BUILT_IN_IDS, FeatureWidths, MissingColumns, Schema, Task, TaskKind,
};

/// The numbers of users and items.
const USERS: u64 = 500;
const ITEMS: u64 = 2_000;

/// The number of values of a categorical feature.
const CATEGORIES: u64 = 50;

/// The time of the first request: 1 January 2024, midnight UTC.
const START_MS: i64 = 1_704_067_200_000;

/// The time between two requests, and the mean time between two events of a history.
const REQUEST_GAP_MS: i64 = 20_000;
const EVENT_GAP_MS: f32 = 600_000.0;

/// The share of a history's events that are on the request's surface.
const OWN_SURFACE: f32 = 0.6;

/// The size and the surface of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyntheticSize {
    /// An index into the schema's surfaces.
    pub surface: u16,
    /// The number of candidates.
    pub candidates: usize,
    /// The number of events in the history, over all surfaces.
    pub history: usize,
}

/// A request with embeddings: the input of an expert.
#[derive(Debug, Clone)]
pub struct SyntheticRequest {
    /// The request with its outcomes.
    pub example: Example,
    /// `[candidates, tae_dim]`, row-major.
    pub tae: Vec<f32>,
    /// What an FM predicts of the main tasks, `[candidates, main tasks]`: probabilities, or values.
    /// Empty without embeddings.
    pub predictions: Vec<f32>,
}

/// Generates requests for a schema.
#[derive(Debug, Clone)]
pub struct Synthetic {
    schema: Arc<Schema>,
    tae_dim: usize,
    content_dim: usize,
    seed: u64,
    widths: FeatureWidths,
}

impl Synthetic {
    /// A generator of requests with embeddings of `tae_dim` values. The same seed gives the same
    /// requests.
    pub fn new(schema: Arc<Schema>, tae_dim: usize, seed: u64) -> Synthetic {
        Synthetic { widths: FeatureWidths::new(&schema), schema, tae_dim, content_dim: 0, seed }
    }

    /// The same generator, whose items have content vectors of so many values.
    pub fn with_content(self, content_dim: usize) -> Synthetic {
        Synthetic { content_dim, ..self }
    }

    /// The schema that defines the requests' columns.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// The length of an embedding.
    pub fn tae_dim(&self) -> usize {
        self.tae_dim
    }

    /// The length of a content vector; 0 without any.
    pub fn content_dim(&self) -> usize {
        self.content_dim
    }

    /// The request of a number, which depends on the generator, the number and the size alone.
    /// Higher numbers are later in time.
    pub fn request(&self, number: u64, size: SyntheticSize) -> SyntheticRequest {
        let mut random = SmallRng::seed_from_u64(splitmix64(self.seed ^ splitmix64(number)));
        let time_ms = START_MS + number as i64 * REQUEST_GAP_MS;
        let user = self.user(1 + random.random_range(0..USERS));
        let history = self.history(&user, time_ms, size, &mut random);
        let context = ContextFeatures {
            ids: (0..self.widths.context.ids).map(|_| 1 + random.random_range(0..4)).collect(),
            dense: (0..self.widths.context.dense).map(|_| random.random()).collect(),
        };
        let mut example = Example {
            request: number + 1,
            surface: size.surface,
            time_ms,
            history,
            targets: Vec::with_capacity(size.candidates),
            user: Arc::new(user),
        };
        let mut tae = Vec::with_capacity(size.candidates * self.tae_dim);
        for item in distinct(size.candidates, &mut random) {
            let target = self.target(self.item(item), &example, &context, &mut tae, &mut random);
            example.targets.push(target);
        }
        let predictions = self.predictions(&example);
        SyntheticRequest { example, tae, predictions }
    }

    /// The user of an id, who is the same in every request.
    pub fn user(&self, id: u64) -> User {
        let ids = categories(id, 1, self.widths.user.ids);
        User { id, ids, dense: self.numbers(id, 2, self.widths.user.dense) }
    }

    /// The item of an id, which is the same in every request.
    pub fn item(&self, id: u64) -> Arc<Item> {
        let ids = categories(id, 3, self.widths.item.ids);
        let dense = self.numbers(id, 4, self.widths.item.dense);
        let content = self.numbers(id, 5, self.content_dim);
        let norm = content.iter().map(|number| number * number).sum::<f32>().sqrt();
        let content = content.into_iter().map(|number| number / norm).collect();
        Arc::new(Item { id, ids, dense, content })
    }

    fn history(
        &self,
        user: &User,
        time_ms: i64,
        size: SyntheticSize,
        random: &mut SmallRng,
    ) -> Vec<Event> {
        let surfaces = self.schema.surfaces.len().max(1) as u16;
        let mut at_ms = time_ms;
        let mut events: Vec<Event> = (0..size.history)
            .map(|_| {
                at_ms -= 1 + (-EVENT_GAP_MS * (1.0 - random.random::<f32>()).ln()) as i64;
                let item = self.item(1 + random.random_range(0..ITEMS));
                let own = random.random::<f32>() < OWN_SURFACE;
                let surface = if own { size.surface } else { random.random_range(0..surfaces) };
                let outcome = self.outcome(self.affinity(user.id, item.id), random);
                Event { item, surface, time_ms: at_ms, outcome }
            })
            .collect();
        events.reverse();
        events
    }

    fn target(
        &self,
        item: Arc<Item>,
        request: &Example,
        context: &ContextFeatures,
        tae: &mut Vec<f32>,
        random: &mut SmallRng,
    ) -> Target {
        let Example { user, surface, time_ms, history, .. } = request;
        let affinity = self.affinity(user.id, item.id);
        let direction = |at: usize| {
            (splitmix64(self.seed ^ 7 ^ splitmix64(at as u64)) % 2_001) as f32 / 1e3 - 1.0
        };
        tae.extend((0..self.tae_dim).map(|at| direction(at) * affinity + 0.5 * noise(random)));
        let hour = (time_ms / 3_600_000).rem_euclid(24) as u64;
        let built_in = [user.id, item.id, u64::from(*surface), hour];
        const { assert!(BUILT_IN_IDS.len() == 4, "the built-in ids are those above") };
        let ids = built_in.iter().chain(&item.ids).chain(&user.ids).chain(&context.ids);
        let own = item.dense.iter().chain(&user.dense).chain(&context.dense);
        let mut features: Vec<f32> = own.copied().collect();
        let missing = MissingColumns::new(&self.schema);
        let columns = self.schema.feature_columns().len();
        let counted = columns - BUILT_IN_FEATURES.len() - missing.optional().len();
        features.extend((features.len()..counted).map(|_| affinity - 1.0 + noise(random)));
        features.extend([(1.0 + history.len() as f32).ln(), 5.0 + noise(random), 4.0]);
        const { assert!(BUILT_IN_FEATURES.len() == 3, "the built-in features are those above") };
        missing.append(&mut features);
        Target {
            ids: ids.copied().collect(),
            features,
            outcome: self.outcome(affinity, random),
            truth: Vec::new(),
            item,
        }
    }

    /// A user's liking for an item, between about -1.7 and 1.7.
    fn affinity(&self, user: u64, item: u64) -> f32 {
        let hidden = splitmix64(self.seed ^ splitmix64(user).rotate_left(17) ^ splitmix64(item));
        (hidden % 10_000) as f32 / 2_900.0 - 1.724
    }

    /// The outcome of an impression. Each action is rarer than the one before it, one in twenty is
    /// not known, and values are known if the first action happened.
    fn outcome(&self, affinity: f32, random: &mut SmallRng) -> Outcome {
        let (mut actions, mut known) = (0, 0);
        for action in 0..self.schema.actions.len() {
            let logit = 1.5 * affinity - 0.8 - 0.4 * action as f32;
            let happened = random.random::<f32>() < 1.0 / (1.0 + (-logit).exp());
            actions |= u64::from(happened) << action;
            known |= u64::from(random.random::<f32>() < 0.95) << action;
        }
        let mut values = [f32::NAN; MAX_VALUES];
        for value in values.iter_mut().take(self.schema.values.len()) {
            if actions & 1 == 1 {
                *value = (0.5 + 0.25 * affinity + 0.1 * noise(random)).clamp(0.0, 1.0);
            }
        }
        Outcome { actions: actions & known, known, values }
    }

    /// What an FM predicts that knows half of a user's liking.
    fn predictions(&self, example: &Example) -> Vec<f32> {
        let prediction = |target: &Target, task: &Task| {
            let affinity = 0.5 * self.affinity(example.user.id, target.item.id);
            match task.kind {
                TaskKind::Binary => {
                    let action = self.schema.action(&task.label).unwrap_or_default();
                    let logit = 1.5 * affinity - 0.8 - 0.4 * action as f32;
                    1.0 / (1.0 + (-logit).exp())
                }
                TaskKind::Regression => 0.5 + 0.25 * affinity,
            }
        };
        let targets = example.targets.iter().filter(|_| self.tae_dim > 0);
        let of = |target| self.schema.main_tasks().map(move |task| prediction(target, task));
        targets.flat_map(of).collect()
    }

    fn numbers(&self, id: u64, salt: u64, count: usize) -> Vec<f32> {
        let mut random = SmallRng::seed_from_u64(splitmix64(id ^ splitmix64(self.seed ^ salt)));
        (0..count).map(|_| noise(&mut random)).collect()
    }
}

/// Distinct item ids, which exceed the catalogue's if `count` is larger than it.
fn distinct(count: usize, random: &mut SmallRng) -> impl Iterator<Item = u64> + use<> {
    let catalogue = ITEMS.max(count as u64);
    let start = random.random_range(0..catalogue);
    // A step that is coprime to the catalogue's size visits each item once.
    let step = (1..).map(|at| 769 + 2 * at).find(|step| gcd(*step, catalogue) == 1).unwrap_or(1);
    (0..count as u64).map(move |at| 1 + (start + at * step) % catalogue)
}

fn categories(id: u64, salt: u64, count: usize) -> Vec<u64> {
    (0..count as u64)
        .map(|at| 1 + splitmix64(id ^ splitmix64(salt ^ at << 8)) % CATEGORIES)
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A number that is about standard normal: the sum of twelve uniform values (Irwin and Hall), which
/// is the same on every machine.
fn noise(random: &mut SmallRng) -> f32 {
    (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::simulate;

    fn world(seed: u64) -> Synthetic {
        Synthetic::new(Arc::new(simulate::schema(3)), 8, seed)
    }

    const SIZE: SyntheticSize = SyntheticSize { surface: 1, candidates: 40, history: 30 };

    #[test]
    fn a_request_has_the_columns_and_sizes_that_its_schema_says() {
        let world = world(1);
        for (number, size) in
            [(0, SIZE), (1, SyntheticSize { candidates: 5_000, history: 0, ..SIZE })]
        {
            let SyntheticRequest { example, tae, predictions } = world.request(number, size);
            assert_eq!(
                (example.targets.len(), example.history.len()),
                (size.candidates, size.history)
            );
            assert_eq!(tae.len(), size.candidates * 8);
            let mains = world.schema.main_tasks().count();
            assert_eq!(predictions.len(), size.candidates * mains);
            let items: HashSet<u64> = example.targets.iter().map(|t| t.item.id).collect();
            assert_eq!(items.len(), size.candidates, "candidates are distinct");
            for target in &example.targets {
                assert_eq!(target.ids.len(), world.schema.id_columns().len());
                assert_eq!(target.features.len(), world.schema.feature_columns().len());
                assert_eq!(target.ids[1], target.item.id);
                assert_eq!(target.outcome.actions & !target.outcome.known, 0);
            }
            let times = example.history.iter().map(|event| event.time_ms);
            assert!(times.clone().is_sorted() && times.max() < Some(example.time_ms));
        }
    }

    #[test]
    fn the_seed_alone_decides() {
        let text = |world: &Synthetic| format!("{:?}", world.request(5, SIZE));
        assert_eq!(text(&world(1)), text(&world(1)));
        assert_ne!(text(&world(1)), text(&world(2)));
    }

    #[test]
    fn outcomes_follow_what_features_and_embeddings_tell() {
        let world = world(3);
        let (mut liked, mut other) = (Vec::new(), Vec::new());
        for number in 0..50 {
            for target in world.request(number, SIZE).example.targets {
                let rate = target.features[5];
                if target.outcome.actions & 1 == 1 { liked.push(rate) } else { other.push(rate) }
            }
        }
        let mean = |rates: &[f32]| rates.iter().sum::<f32>() / rates.len() as f32;
        assert!(mean(&liked) > mean(&other) + 0.3, "{} {}", mean(&liked), mean(&other));
    }
}
