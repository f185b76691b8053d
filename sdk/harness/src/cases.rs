//! Requests for a test: made up whole, and changed where the test needs it.

use std::sync::Arc;

use hypercast_data::synthetic::{Sample, Size, Synthetic};
use hypercast_expert::Tae;
use hypercast_fm::example::{Event, Example, Outcome};

/// A request with its embeddings, as an expert gets them. Its parts are a test's to change.
#[derive(Debug, Clone)]
pub struct Case {
    /// The request: user, history, candidates with columns, outcomes.
    pub example: Example,
    /// `[candidates, tae_dim]`, row-major.
    pub tae: Vec<f32>,
}

impl Case {
    pub(crate) fn new(sample: Sample) -> Case {
        Case { example: sample.example, tae: sample.tae }
    }

    /// How many candidates it has.
    pub fn candidates(&self) -> usize {
        self.example.targets.len()
    }

    pub(crate) fn tae(&self) -> Tae<'_> {
        Tae::Rows(&self.tae)
    }
}

/// A request under construction.
pub struct Request {
    world: Synthetic,
    number: u64,
    size: Size,
    user: Option<u64>,
    items: Option<Vec<u64>>,
    features: Vec<(String, f32)>,
    outcome: Option<Outcome>,
    events: Option<Vec<Event>>,
}

impl Request {
    pub(crate) fn new(world: Synthetic, number: u64) -> Request {
        Request {
            world,
            number,
            size: Size { surface: 0, candidates: 20, history: 30 },
            user: None,
            items: None,
            features: Vec::new(),
            outcome: None,
            events: None,
        }
    }

    /// On this surface.
    ///
    /// # Panics
    /// If the schema has no such surface.
    pub fn surface(mut self, name: &str) -> Request {
        let schema = self.world.schema();
        self.size.surface = schema.surface(name).unwrap_or_else(|| {
            panic!("the schema has no surface `{name}`; it has: {}", schema.surfaces.join(", "))
        });
        self
    }

    /// With so many candidates.
    pub fn candidates(mut self, candidates: usize) -> Request {
        self.size.candidates = candidates;
        self
    }

    /// With these items as candidates, in this order; an id decides an item's features.
    pub fn items(mut self, ids: impl IntoIterator<Item = u64>) -> Request {
        let ids: Vec<u64> = ids.into_iter().collect();
        self.size.candidates = ids.len();
        self.items = Some(ids);
        self
    }

    /// From this user; an id decides a user's features.
    pub fn user(self, id: u64) -> Request {
        Request { user: Some(id), ..self }
    }

    /// With so many events of history, over all surfaces.
    pub fn history(mut self, events: usize) -> Request {
        self.size.history = events;
        self
    }

    /// With this history, oldest first.
    pub fn events(self, events: Vec<Event>) -> Request {
        Request { events: Some(events), ..self }
    }

    /// With a numeric column at this value in every candidate.
    pub fn feature(mut self, name: &str, value: f32) -> Request {
        self.features.push((name.into(), value));
        self
    }

    /// With this outcome of every candidate.
    pub fn outcome(self, outcome: Outcome) -> Request {
        Request { outcome: Some(outcome), ..self }
    }

    /// With nothing known of what came of it, as while serving.
    pub fn serving(self) -> Request {
        self.outcome(Outcome::UNKNOWN)
    }

    /// The request.
    ///
    /// # Panics
    /// If a feature is not one of the schema's numeric columns.
    pub fn build(self) -> Case {
        let mut case = Case::new(self.world.request(self.number, self.size));
        let example = &mut case.example;
        let schema = self.world.schema();
        if let Some(id) = self.user {
            example.user = Arc::new(self.world.user(id));
        }
        if let Some(items) = &self.items {
            for (target, id) in example.targets.iter_mut().zip(items) {
                target.item = self.world.item(*id);
            }
        }
        for target in &mut example.targets {
            // The columns repeat what user and item say.
            let (item, user) = (&target.item, &example.user);
            let own = [user.id, item.id, target.ids[2], target.ids[3]];
            let ids = own.iter().chain(&item.ids).chain(&user.ids);
            target.ids.iter_mut().zip(ids).for_each(|(column, id)| *column = *id);
            let dense = item.dense.iter().chain(&user.dense);
            target.features.iter_mut().zip(dense).for_each(|(column, value)| *column = *value);
        }
        let columns = schema.feature_columns();
        for (name, value) in &self.features {
            let at = columns.iter().position(|column| column == name).unwrap_or_else(|| {
                panic!("the schema has no feature `{name}`; it has: {}", columns.join(", "))
            });
            example.targets.iter_mut().for_each(|target| target.features[at] = *value);
        }
        if let Some(outcome) = self.outcome {
            example.targets.iter_mut().for_each(|target| target.outcome = outcome);
        }
        if let Some(events) = self.events {
            example.history = events;
        }
        case
    }
}
