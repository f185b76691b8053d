//! Batches for serving: new history events to encode, or candidates to score, laid out so that what
//! tokens have in common stands once.
//!
//! The candidates of a request share its surface and its time, and most often the categories of
//! user and context. [`crate::batch`] has the same numbers for training, a token after the other.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData, ops::FloatTensor};
use hypercast_kernels::{
    attention::{primitive, tensor},
    prepared_mlp::{MlpRows, SharedColumns},
    serving::ServingBackend,
};

use crate::{
    batch::{BatchBuilder, ColumnStatistics, KeyIndex, append_outcome, event_values},
    example::{Event, Item, Target},
    fields::FieldWidths,
    sampling::ExampleSelection,
    spec::{EVENT_FIELDS, FmConfig, FmSpec},
    standardise::FrozenStandardiser,
};

/// History tokens, then targets, of some requests.
#[derive(Debug, Default)]
pub(crate) struct ServingBatch {
    /// `[requests + 1]`: as in [`crate::batch::FmBatch`].
    pub(crate) history_offsets: Vec<u32>,
    /// `[requests + 1]`: as in [`crate::batch::FmBatch`].
    pub(crate) target_offsets: Vec<u32>,
    /// `[tokens]`, seconds since the epoch.
    pub(crate) times_s: Vec<i64>,
    /// The distinct store keys of the batch.
    pub(crate) keys: Vec<u64>,
    /// `[tokens, columns]`: the fields of items, as indices into `keys`.
    items: Vec<u32>,
    /// The fields of events: a group for each history token and for the targets of a request.
    events: FieldGroups,
    /// The fields of users and contexts, for targets.
    profiles: FieldGroups,
    /// `[tokens * (item_numbers + content)]`, as in [`crate::batch::FmBatch`].
    dense: Vec<f32>,
    /// `[history tokens * outcome_width]`.
    outcomes: Vec<f32>,
    /// `[targets * features]`, standardised.
    features: Vec<f32>,
}

/// Fields that groups of tokens have in common, as indices into a batch's keys.
#[derive(Debug, Default)]
struct FieldGroups {
    /// `[groups, columns]`.
    index: Vec<u32>,
    /// `[tokens]`.
    group_of: Vec<u32>,
    groups: u32,
}

impl FieldGroups {
    /// Puts the next token into the latest group.
    fn join(&mut self) {
        self.group_of.push(self.groups - 1);
    }

    fn embedded<B: ServingBackend>(
        &self,
        fields: &FieldWidths,
        rows: &ServedRows<'_, B>,
    ) -> SharedColumns<'_, FloatTensor<B>> {
        let values = rows.lay_out(fields, &self.index, self.groups as usize, &[]);
        SharedColumns { values, group_of: &self.group_of }
    }
}

/// The rows of a batch's keys, `[keys, dim]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EmbeddedRows<'a> {
    pub(crate) rows: &'a [f32],
    pub(crate) dim: usize,
}

/// The same where a pass reads them.
enum ServedRows<'a, B: ServingBackend> {
    /// Laying them out on the host spares a pass over what they become.
    Host(EmbeddedRows<'a>),
    /// Each row crosses to the device once, however many tokens have it.
    Device(Tensor<B, 2>),
}

impl<'a, B: ServingBackend> ServedRows<'a, B> {
    fn new(embedded: EmbeddedRows<'a>, keys: usize) -> Self {
        match B::IS_HOST {
            true => Self::Host(embedded),
            false => Self::Device(tensor(matrix::<B>(embedded.rows.to_vec(), keys))),
        }
    }

    /// The embeddings of the columns `[places, columns]`, with the numbers of each place,
    /// `[places, any]`, behind them.
    fn lay_out(
        &self,
        fields: &FieldWidths,
        index: &[u32],
        places: usize,
        numbers: &[f32],
    ) -> FloatTensor<B> {
        match self {
            Self::Host(EmbeddedRows { rows, dim }) => {
                matrix::<B>(fields.gather(index, rows, *dim, numbers), places)
            }
            Self::Device(table) => {
                let embedded = fields.embedded(index, table);
                let beside = || tensor(matrix::<B>(numbers.to_vec(), places));
                primitive(match numbers.is_empty() {
                    true => embedded,
                    false => Tensor::cat(vec![embedded, beside()], 1),
                })
            }
        }
    }
}

/// What the model reads of a batch.
pub(crate) struct ServingInputs<'a, B: ServingBackend> {
    pub(crate) tokens: MlpRows<'a, FloatTensor<B>>,
    /// `[history tokens, outcome_width]`.
    pub(crate) outcomes: Option<FloatTensor<B>>,
    /// What the candidate module reads of targets.
    pub(crate) candidates: Option<MlpRows<'a, FloatTensor<B>>>,
}

/// The columns of a model's inputs that groups of tokens share.
#[derive(Debug, Clone)]
pub(crate) struct SharedRanges {
    /// Of what a token's embedding is made from: the fields of events.
    pub(crate) event: Range<usize>,
    /// Of what the candidate encoder reads: the fields of users and contexts.
    pub(crate) profile: Range<usize>,
}

impl SharedRanges {
    pub(crate) fn new(config: &FmConfig, spec: &FmSpec) -> Self {
        let (dim, fields) = (config.embedding_dim, spec.token_fields());
        let event = (fields - EVENT_FIELDS) * dim..fields * dim;
        Self { event, profile: spec.features..spec.features + spec.profile_fields() * dim }
    }
}

impl ServingBatch {
    /// The number of history tokens.
    pub(crate) fn history_tokens(&self) -> usize {
        self.history_offsets.last().map_or(0, |&end| end as usize)
    }

    /// The number of targets.
    pub(crate) fn targets(&self) -> usize {
        self.target_offsets.last().map_or(0, |&end| end as usize)
    }

    /// The inputs of the model that `builder` is for.
    pub(crate) fn inputs<B: ServingBackend>(
        &self,
        builder: &BatchBuilder,
        embedded: EmbeddedRows<'_>,
    ) -> ServingInputs<'_, B> {
        let rows = ServedRows::<B>::new(embedded, self.keys.len());
        let places = self.times_s.len();
        let own = rows.lay_out(&builder.item_fields, &self.items, places, &self.dense);
        let events = self.events.embedded(&builder.event_fields, &rows);
        let has_profiles = self.profiles.groups > 0 && !self.profiles.index.is_empty();
        let profiles = || self.profiles.embedded(&builder.profile_fields, &rows);
        // A device need not have matrices without values.
        let outcomes = || matrix::<B>(self.outcomes.clone(), self.history_tokens());
        let candidates = || MlpRows {
            own: matrix::<B>(self.features.clone(), self.targets()),
            shared: has_profiles.then(profiles),
            added: None,
        };
        ServingInputs {
            tokens: MlpRows { own, shared: Some(events), added: None },
            outcomes: (!self.outcomes.is_empty()).then(outcomes),
            candidates: (self.targets() > 0).then(candidates),
        }
    }
}

/// A matrix of so many rows.
fn matrix<B: ServingBackend>(values: Vec<f32>, rows: usize) -> FloatTensor<B> {
    let shape = [rows, values.len() / rows.max(1)];
    primitive(Tensor::<B, 2>::from_data(TensorData::new(values, shape), &B::Device::default()))
}

impl BatchBuilder {
    /// Builds a batch for serving, of parts of examples that [`BatchBuilder::check`] accepted.
    pub(crate) fn serving_batch(
        &self,
        examples: &[ExampleSelection<'_>],
        statistics: &ColumnStatistics,
    ) -> ServingBatch {
        let mut writer = ServingBatchWriter {
            batch_builder: self,
            item_dense: statistics.item_dense.frozen(),
            features: statistics.features.frozen(),
            keys: KeyIndex::default(),
            profile: Vec::new(),
            batch: ServingBatch {
                history_offsets: vec![0],
                target_offsets: vec![0],
                ..ServingBatch::default()
            },
        };
        for selected in examples {
            writer.history(&selected.example.history, &selected.events);
        }
        for selected in examples {
            writer.targets(selected);
        }
        ServingBatch { keys: writer.keys.keys, ..writer.batch }
    }
}

struct ServingBatchWriter<'a> {
    batch_builder: &'a BatchBuilder,
    item_dense: FrozenStandardiser,
    features: FrozenStandardiser,
    keys: KeyIndex,
    /// The values of the latest group of `batch.profiles`.
    profile: Vec<u64>,
    batch: ServingBatch,
}

impl ServingBatchWriter<'_> {
    fn history(&mut self, events: &[Event], chosen: &[usize]) {
        let oldest = self.batch_builder.window.first_index(events);
        for &at in chosen {
            let event = &events[at];
            let before_ms = (at > oldest).then(|| events[at - 1].time_ms);
            self.event(event_values(event.surface, event.time_ms, before_ms));
            self.token(&event.item, event.time_ms);
            let spec = &self.batch_builder.spec;
            append_outcome(&event.outcome, spec, &mut self.batch.outcomes);
        }
        self.batch.history_offsets.push(self.batch.times_s.len() as u32);
    }

    fn targets(&mut self, selected: &ExampleSelection<'_>) {
        let (builder, example) = (self.batch_builder, selected.example);
        let before_ms = example.history.last().map(|event| event.time_ms);
        self.event(event_values(example.surface, example.time_ms, before_ms));
        for of in &selected.targets {
            let target = &example.targets[of.index];
            let target = builder.spec.training_only.target(target, selected.reader);
            self.token(&target.item, example.time_ms);
            if builder.include_profiles {
                self.profile(&target);
                let features = &target.features[..builder.spec.features];
                self.features.append(features, &mut self.batch.features);
            }
        }
        let history = self.batch.history_tokens();
        self.batch.target_offsets.push((self.batch.times_s.len() - history) as u32);
    }

    /// Begins a group of tokens of an event or request.
    fn event(&mut self, values: [u64; EVENT_FIELDS]) {
        let columns = &self.batch_builder.token_columns;
        let columns = &columns[columns.len() - EVENT_FIELDS..];
        for (&column, value) in columns.iter().zip(values) {
            let index = self.keys.value(self.batch_builder.column_key(column, 0, value));
            self.batch.events.index.push(index);
        }
        self.batch.events.groups += 1;
    }

    /// Appends a token of the latest event or request.
    fn token(&mut self, item: &Item, time_ms: i64) {
        let builder = self.batch_builder;
        self.batch.events.join();
        let values = [item.id].into_iter().chain(item.ids.iter().copied());
        for (&column, value) in builder.token_columns.iter().zip(values) {
            let index = self.keys.value(builder.column_key(column, 0, value));
            self.batch.items.push(index);
        }
        self.item_dense.append(&builder.spec.numbers_of(item), &mut self.batch.dense);
        builder.spec.append_content(item, &mut self.batch.dense);
        self.batch.times_s.push(time_ms.div_euclid(1000));
    }

    /// Puts a target into the latest group of categories, or into a new one if it has others.
    fn profile(&mut self, target: &Target) {
        let builder = self.batch_builder;
        let values = builder.spec.profile_ids.iter().map(|&at| target.ids[at]);
        if self.batch.profiles.groups == 0 || !values.clone().eq(self.profile.iter().copied()) {
            self.profile.clear();
            self.profile.extend(values);
            let first = builder.spec.token_fields();
            for (&column, &value) in builder.profile_columns.iter().zip(&self.profile) {
                let index = self.keys.value(builder.column_key(column, first, value));
                self.batch.profiles.index.push(index);
            }
            self.batch.profiles.groups += 1;
        }
        self.batch.profiles.join();
    }
}
