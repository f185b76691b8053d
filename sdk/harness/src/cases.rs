//! Test requests: generated as a whole, then changed as a test needs.

use std::sync::Arc;

use hypercast_data::ranked_place::RankedPlace;
use hypercast_data::schema::MissingColumns;
use hypercast_data::synthetic::{Synthetic, SyntheticRequest, SyntheticSize};
use hypercast_expert::{FmRows, Tae};
use hypercast_fm::example::{Event, Example, Outcome, Target};

/// A request with its embeddings, as an expert receives them. A test may change any part.
#[derive(Debug, Clone)]
pub struct Case {
    /// The request: the user, the history, and the candidates with their columns and outcomes.
    pub example: Example,
    /// The embeddings, `[candidates, tae_dim]`, row-major.
    pub tae: Vec<f32>,
    /// The FM's own predictions, `[candidates, main tasks]`, row-major, in the schema's order:
    /// probabilities, or values in the unit of the label. Empty without an FM.
    pub predictions: Vec<f32>,
    /// `[candidates]`, where a daemon ranked each before it was shown; empty if none did.
    pub ranked: Vec<Option<RankedPlace>>,
}

impl Case {
    pub(crate) fn new(sample: SyntheticRequest) -> Case {
        let SyntheticRequest { example, tae, predictions } = sample;
        Case { example, tae, predictions, ranked: Vec::new() }
    }

    /// The same after a daemon has ranked the candidates in their order, each place at the same
    /// probability.
    pub(crate) fn ranked_by_chance(self) -> Case {
        let candidates = self.candidates();
        let propensity = Some(1.0 / candidates.max(1) as f32);
        let place = |position: usize| place_of(position as u32, propensity);
        Case { ranked: (0..candidates).map(place).collect(), ..self }
    }

    /// The number of candidates.
    pub fn candidates(&self) -> usize {
        self.example.targets.len()
    }

    pub(crate) fn fm(&self) -> FmRows<'_> {
        FmRows { tae: Tae::Rows(&self.tae), predictions: &self.predictions }
    }
}

/// Builds a [`Case`]. Everything that a test does not set is generated from the world's seed.
pub struct RequestBuilder {
    world: Synthetic,
    number: u64,
    size: SyntheticSize,
    user: Option<u64>,
    items: Option<Vec<u64>>,
    features: Vec<(String, f32)>,
    feature_rows: Vec<(String, Vec<f32>)>,
    id_rows: Vec<(String, Vec<u64>)>,
    outcome: Option<Outcome>,
    events: Option<Vec<Event>>,
    ranked: Vec<Option<RankedPlace>>,
}

impl RequestBuilder {
    pub(crate) fn new(world: Synthetic, number: u64) -> RequestBuilder {
        RequestBuilder {
            world,
            number,
            size: SyntheticSize { surface: 0, candidates: 20, history: 30 },
            user: None,
            items: None,
            features: Vec::new(),
            feature_rows: Vec::new(),
            id_rows: Vec::new(),
            outcome: None,
            events: None,
            ranked: Vec::new(),
        }
    }

    /// Sets the surface; the first one of the schema by default.
    ///
    /// # Panics
    /// The schema has no such surface.
    pub fn surface(mut self, name: &str) -> RequestBuilder {
        let schema = self.world.schema();
        self.size.surface = schema.surface(name).unwrap_or_else(|| {
            panic!("the schema has no surface `{name}`; it has: {}", schema.surfaces.join(", "))
        });
        self
    }

    /// Sets the number of candidates; 20 by default.
    pub fn candidates(mut self, candidates: usize) -> RequestBuilder {
        self.size.candidates = candidates;
        self
    }

    /// Sets the candidates, in this order. An item's features follow from its id.
    pub fn items(mut self, ids: impl IntoIterator<Item = u64>) -> RequestBuilder {
        let ids: Vec<u64> = ids.into_iter().collect();
        self.size.candidates = ids.len();
        self.items = Some(ids);
        self
    }

    /// Sets the user. A user's features follow from the id.
    pub fn user(self, id: u64) -> RequestBuilder {
        RequestBuilder { user: Some(id), ..self }
    }

    /// Sets the number of events in the history, over all surfaces; 30 by default.
    pub fn history(mut self, events: usize) -> RequestBuilder {
        self.size.history = events;
        self
    }

    /// Sets the events of the history, oldest first.
    pub fn events(self, events: Vec<Event>) -> RequestBuilder {
        RequestBuilder { events: Some(events), ..self }
    }

    /// Sets a numeric column to this value for every candidate; with NaN, it is missing.
    pub fn feature(mut self, name: &str, value: f32) -> RequestBuilder {
        self.features.push((name.into(), value));
        self
    }

    /// Sets a numeric column, with a value for each candidate.
    pub fn feature_rows(mut self, name: &str, values: &[f32]) -> RequestBuilder {
        self.feature_rows.push((name.into(), values.to_vec()));
        self
    }

    /// Sets a column of ids, with a value for each candidate; of a feature of several values the
    /// first one.
    pub fn id_rows(mut self, name: &str, values: &[u64]) -> RequestBuilder {
        self.id_rows.push((name.into(), values.to_vec()));
        self
    }

    /// Sets the outcome of every candidate.
    pub fn outcome(self, outcome: Outcome) -> RequestBuilder {
        RequestBuilder { outcome: Some(outcome), ..self }
    }

    /// Sets the position at which a daemon ranked each candidate before it was shown, and the
    /// probability that the rule gave for it, for the training hooks; NaN where either is not
    /// known.
    ///
    /// # Panics
    /// There are not as many positions as propensities.
    pub fn ranked_at(mut self, positions: &[f32], propensities: &[f32]) -> RequestBuilder {
        assert_eq!(positions.len(), propensities.len(), "a propensity for each position");
        let places = positions.iter().zip(propensities).map(|(&position, &propensity)| {
            let propensity = Some(propensity).filter(|known| !known.is_nan());
            (!position.is_nan()).then(|| place_of(position as u32, propensity)).flatten()
        });
        self.ranked = places.collect();
        self
    }

    /// Makes all outcomes unknown, as they are in serving.
    pub fn serving(self) -> RequestBuilder {
        self.outcome(Outcome::UNKNOWN)
    }

    /// Builds the request.
    ///
    /// # Panics
    /// A column is not one of the schema's, or has values for more or fewer candidates, as places
    /// may not.
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
            // Copy the features of user and item to the columns.
            let (item, user) = (&target.item, &example.user);
            let own = [user.id, item.id, target.ids[2], target.ids[3]];
            let ids = own.iter().chain(&item.ids).chain(&user.ids);
            target.ids.iter_mut().zip(ids).for_each(|(column, id)| *column = *id);
            let dense = item.dense.iter().chain(&user.dense);
            target.features.iter_mut().zip(dense).for_each(|(column, value)| *column = *value);
        }
        let columns = schema.feature_columns();
        for (name, value) in &self.features {
            let at = place("feature", name, &columns);
            example.targets.iter_mut().for_each(|target| target.features[at] = *value);
        }
        for (name, values) in &self.feature_rows {
            let at = place("feature", name, &columns);
            set(example, values, |target| &mut target.features[at]);
        }
        let ids: Vec<_> = schema.id_fields();
        let names: Vec<String> = ids.iter().map(|field| field.name.clone()).collect();
        for (name, values) in &self.id_rows {
            let at = ids[place("id", name, &names)].columns.start;
            set(example, values, |target| &mut target.ids[at]);
        }
        let missing = MissingColumns::new(schema);
        example.targets.iter_mut().for_each(|target| missing.fill(&mut target.features));
        if let Some(outcome) = self.outcome {
            example.targets.iter_mut().for_each(|target| target.outcome = outcome);
        }
        if let Some(events) = self.events {
            example.history = events;
        }
        let (places, candidates) = (self.ranked.len(), case.candidates());
        assert!([0, candidates].contains(&places), "{places} places for {candidates} candidates");
        Case { ranked: self.ranked, ..case }
    }
}

/// The place of an item in an answer of this test's version.
fn place_of(position: u32, propensity: Option<f32>) -> Option<RankedPlace> {
    Some(RankedPlace { position, propensity, arm: "test@0.0.0".to_owned() })
}

fn place(kind: &str, name: &str, names: &[String]) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        panic!("the schema has no {kind} `{name}`; it has: {}", names.join(", "))
    })
}

fn set<T: Copy>(example: &mut Example, values: &[T], of: impl Fn(&mut Target) -> &mut T) {
    let (rows, targets) = (values.len(), &mut example.targets);
    assert_eq!(rows, targets.len(), "there are {rows} values for {} candidates", targets.len());
    targets.iter_mut().zip(values).for_each(|(target, value)| *of(target) = *value);
}
