//! Builds a batch from examples: flat, jagged arrays that the model turns into tensors.
//!
//! Tokens come in two blocks: the histories of all requests, one after another, then the targets of
//! all requests. A history is laid out once for all targets of its request (compute
//! de-duplication, section 3.1.4). This module decides which numbers describe a token.

use std::collections::{BTreeMap, HashMap};

use hypercast_core::hash::IdHashKey;

use crate::{
    Error, Result,
    alignment_spec::{AlignmentInputs, AlignmentRow, AlignmentSpec},
    example::{Event, Example, Item, Outcome, Target},
    fields::{ABSENT, FieldColumn, FieldWidths},
    label_scale::{LabelScale, LabelScales, LearnedRow},
    row_keys::RowKeys,
    sampling::{ExampleSelection, HistoryWindow, WeightedTarget},
    spec::{EVENT_FIELDS, FmConfig, FmSpec, TaskLabel, TaskSpec},
    standardise::{FrozenStandardiser, Standardiser},
    trainer::StepOutput,
    training_only::ReadFor,
};

/// A jagged batch of B requests with H history tokens and R targets.
#[derive(Debug, Clone, Default)]
pub struct FmBatch {
    /// `[B + 1]`: request b's history is tokens `history_offsets[b]..history_offsets[b + 1]`.
    pub history_offsets: Vec<u32>,
    /// `[B + 1]`: request b's targets are rows `target_offsets[b]..target_offsets[b + 1]`.
    pub target_offsets: Vec<u32>,
    /// The distinct store keys of the batch.
    pub keys: Vec<u64>,
    /// `[(H + R) * columns]`: index into `keys`, by the columns of `token_fields`.
    pub key_index: Vec<u32>,
    /// `[R * profile_ids]`: index into `keys`, by the columns of `profile_fields`; empty without
    /// `candidate_columns`.
    pub profile_index: Vec<u32>,
    /// The fields of `key_index`.
    pub token_fields: FieldWidths,
    /// The fields of `profile_index`.
    pub profile_fields: FieldWidths,
    /// `[(H + R) * (item_numbers + content)]`: dense features and which are missing, standardised,
    /// then the content vector.
    pub dense: Vec<f32>,
    /// `[H * outcome_width]`.
    pub outcomes: Vec<f32>,
    /// `[H + R]`, seconds since the epoch.
    pub times_s: Vec<i64>,
    /// `[R]`: the surface of each target's request.
    pub surfaces: Vec<u16>,
    /// `[R * features]`: auxiliary features, standardised.
    pub features: Vec<f32>,
    /// What surfaces' own alignment modules read besides.
    pub alignment: AlignmentInputs,
    /// `[R * tasks]`; 0 where `mask` is 0.
    pub labels: Vec<f32>,
    /// `[R * tasks]`: what is learned of `labels`, those of regressions on their scales.
    pub learned_labels: Vec<f32>,
    /// `[tasks]`: what the outputs of binary tasks are log odds apart from; 0 of regressions.
    pub log_odds: Vec<f32>,
    /// `[R * tasks]`: whether the target is in the task's sample space (δ in eq. 4).
    pub mask: Vec<bool>,
    /// `[R]`: each target's weight in the loss.
    pub weights: Vec<f32>,
    /// Seed of the dropout of a training pass.
    pub dropout_seed: u64,
}

impl FmBatch {
    /// H, the number of history tokens.
    pub fn history_tokens(&self) -> usize {
        self.history_offsets.last().map_or(0, |&end| end as usize)
    }

    /// R, the number of targets.
    pub fn targets(&self) -> usize {
        self.target_offsets.last().map_or(0, |&end| end as usize)
    }
}

/// Running statistics with which a batch's numeric columns are standardised.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ColumnStatistics {
    /// Statistics of the numbers of items (see [`FmSpec::item_numbers`]).
    pub item_dense: Standardiser,
    /// Statistics of the model's numeric columns ([`FmSpec::features`]).
    pub features: Standardiser,
    /// The scales of the tasks' labels; none in a model of before there were scales.
    #[serde(default)]
    pub labels: LabelScales,
    /// By surface: statistics of the numeric columns of its own alignment module, over its own
    /// targets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alignments: BTreeMap<String, Standardiser>,
}

impl ColumnStatistics {
    /// Statistics before the first observation.
    pub fn new(spec: &FmSpec) -> Self {
        let scale = |task: &TaskSpec| {
            let scale = match task.label {
                TaskLabel::Action(_) => LabelScale::of_rate(),
                TaskLabel::Value(_) => LabelScale::of_value(task.transform),
            };
            (task.name.clone(), scale)
        };
        let standardiser = |(surface, own): (&String, &AlignmentSpec)| {
            (surface.clone(), Standardiser::new(own.feature_columns()))
        };
        Self {
            labels: spec.tasks.iter().map(scale).collect(),
            item_dense: Standardiser::new(spec.item_numbers()),
            features: Standardiser::new(spec.features),
            alignments: spec.alignments.iter().map(standardiser).collect(),
        }
    }

    /// Whether all numbers are finite.
    pub fn is_finite(&self) -> bool {
        let labels = self.labels.values().all(LabelScale::is_finite);
        let alignments = self.alignments.values().all(Standardiser::is_finite);
        self.item_dense.is_finite() && self.features.is_finite() && labels && alignments
    }

    /// Updates the statistics with the targets of an example.
    pub fn observe(&mut self, example: &Example, spec: &FmSpec) {
        for target in &example.targets {
            self.item_dense.observe(&spec.numbers_of(&target.item));
            self.features.observe(&target.features[..spec.features]);
        }
        let Some(own) = spec.alignment(example.surface) else { return };
        let surface = &spec.surfaces[usize::from(example.surface)];
        if let Some(statistics) = self.alignments.get_mut(surface) {
            example.targets.iter().for_each(|target| statistics.observe(own.features_of(target)));
        }
    }

    /// Updates the scales with the labels of an example.
    pub fn observe_labels(&mut self, example: &Example, tasks: &[TaskSpec]) {
        for task in tasks {
            let Some(scale) = self.labels.get_mut(&task.name) else { continue };
            let outcomes = example.targets.iter().map(|target| &target.outcome);
            let labels = outcomes.filter_map(|outcome| label(task, example.surface, outcome));
            labels.for_each(|label| scale.observe(label, 1.0));
        }
    }

    /// Corrects the means of predictions, `[rows * tasks]`, that were made before their labels
    /// were learned; `are_new` says whether no earlier pass learned them. Rows outside a task's
    /// `mask` do not count.
    pub fn correct(&mut self, said: &StepOutput, tasks: &[TaskSpec], are_new: bool) {
        for (at, task) in tasks.iter().enumerate() {
            let Some(scale) = self.labels.get_mut(&task.name) else { continue };
            let cells = (at..said.labels.len()).step_by(tasks.len());
            scale.correct(cells.filter(|&cell| said.mask[cell]).map(|cell| LearnedRow {
                prediction: said.predictions[cell],
                label: said.labels[cell],
                weight: 1.0,
                is_new: are_new,
            }));
        }
    }
}

/// Builds batches for one model.
#[derive(Debug, Clone)]
pub struct BatchBuilder {
    /// The data that the model was made for.
    pub spec: FmSpec,
    /// The part of a history that the model reads.
    pub window: HistoryWindow,
    /// Whether batches include the user's and request's categories of each target.
    pub include_profiles: bool,
    /// How the model's store names the rows of a field's values.
    pub row_keys: RowKeys,
    /// The numbers of the fields in those keys; empty if they are the fields' indices.
    pub field_numbers: Vec<u8>,
    /// The fields of a token, and their columns.
    pub(crate) token_fields: FieldWidths,
    pub(crate) token_columns: Vec<FieldColumn>,
    /// The fields of a token's item, and of its event.
    pub(crate) item_fields: FieldWidths,
    pub(crate) event_fields: FieldWidths,
    /// The same of the user's and request's categories.
    pub(crate) profile_fields: FieldWidths,
    pub(crate) profile_columns: Vec<FieldColumn>,
}

impl BatchBuilder {
    /// A builder for models of this specification and configuration, and of a store with these
    /// keys.
    pub fn new(spec: &FmSpec, config: &FmConfig, row_keys: RowKeys) -> Self {
        let widths = spec.token_widths();
        let (item, event) = widths.split_at(widths.len() - EVENT_FIELDS);
        let token_fields = FieldWidths::new(widths.iter().copied());
        let profile_fields = FieldWidths::new(spec.profile_widths());
        Self {
            token_columns: token_fields.columns(),
            token_fields,
            item_fields: FieldWidths::new(item.iter().copied()),
            event_fields: FieldWidths::new(event.iter().copied()),
            profile_columns: profile_fields.columns(),
            profile_fields,
            spec: spec.clone(),
            window: config.history_window(),
            include_profiles: config.candidate_columns,
            row_keys,
            field_numbers: Vec::new(),
        }
    }

    /// The key of a row: of a field by its index, and its value.
    fn key(&self, field: usize, value: u64) -> u64 {
        let number = self.field_numbers.get(field).map_or(field, |&number| usize::from(number));
        self.row_keys.key(number, value)
    }

    /// The key of a column's value, if it has one; `first` is the number of fields before those of
    /// the columns.
    pub(crate) fn column_key(&self, column: FieldColumn, first: usize, value: u64) -> Option<u64> {
        let is_absent = column.is_of_several && value == 0;
        (!is_absent).then(|| self.key(first + column.field, value))
    }

    /// Builds a batch of whole examples: the events in the history window and all targets.
    ///
    /// # Errors
    /// An example whose features do not match the specification; the error names it.
    pub fn build(&self, examples: &[&Example], statistics: &ColumnStatistics) -> Result<FmBatch> {
        examples.iter().try_for_each(|example| self.check(example))?;
        let whole: Vec<_> =
            examples.iter().map(|example| ExampleSelection::whole(example, self.window)).collect();
        Ok(self.lay_out(&whole, statistics))
    }

    /// Builds a batch of parts of examples that [`BatchBuilder::check`] accepted.
    pub(crate) fn lay_out(
        &self,
        examples: &[ExampleSelection<'_>],
        statistics: &ColumnStatistics,
    ) -> FmBatch {
        let (history_offsets, target_offsets) = (vec![0], vec![0]);
        let scale = |task: &TaskSpec| statistics.labels.get(&task.name);
        let log_odds =
            self.spec.tasks.iter().map(|task| scale(task).map_or(0.0, |of| of.log_odds()));
        let log_odds = log_odds.collect();
        let batch = FmBatch {
            history_offsets,
            target_offsets,
            log_odds,
            token_fields: self.token_fields.clone(),
            profile_fields: self.profile_fields.clone(),
            alignment: AlignmentInputs::new(&self.spec),
            ..FmBatch::default()
        };
        let alignments = statistics.alignments.iter();
        let mut writer = BatchWriter {
            batch_builder: self,
            labels: &statistics.labels,
            item_dense: statistics.item_dense.frozen(),
            features: statistics.features.frozen(),
            alignments: alignments.map(|(surface, of)| (surface.as_str(), of.frozen())).collect(),
            keys: KeyIndex::default(),
            batch,
        };
        for selected in examples {
            writer.history(&selected.example.history, &selected.events);
        }
        for selected in examples {
            writer.targets(selected);
        }
        FmBatch { keys: writer.keys.keys, ..writer.batch }
    }

    /// Checks that an example's surface and features match the specification.
    ///
    /// # Errors
    /// The first mismatch, with both numbers.
    pub fn check(&self, example: &Example) -> Result<()> {
        let fail = |found: String, wanted: String| {
            let message = format!("{found}; the model was made for {wanted}");
            Err(Error::Example { request: example.request, message })
        };
        let FmSpec { surfaces, item_ids, item_dense, features, content, .. } = &self.spec;
        if example.surface as usize >= surfaces.len() {
            let found = format!("its surface has index {}", example.surface);
            return fail(found, format!("{} surfaces", surfaces.len()));
        }
        let past = example.history.iter().map(|event| &event.item);
        for item in past.chain(example.targets.iter().map(|target| &target.item)) {
            let (ids, dense, numbers) = (item.ids.len(), item.dense.len(), item.content.len());
            if (ids, dense) != (*item_ids, *item_dense) {
                let found =
                    format!("item {} has {ids} categorical and {dense} dense columns", item.id);
                return fail(found, format!("{item_ids} and {item_dense}"));
            }
            if *content > 0 && ![0, *content].contains(&numbers) {
                let found = format!("item {} has a content vector of {numbers} numbers", item.id);
                return fail(found, content.to_string());
            }
        }
        let own = self.spec.alignment(example.surface);
        let (own_ids, own_features) =
            own.map_or((0, 0), |own| (own.id_columns(), own.feature_columns()));
        let wanted = self.spec.profile_ids.iter().max().map_or(0, |last| last + 1) + own_ids;
        let features = features + own_features;
        for target in &example.targets {
            let (id, ids, numbers) = (target.item.id, target.ids.len(), target.features.len());
            if ids < wanted {
                let found = format!("item {id} has {ids} categorical columns");
                return fail(found, format!("{wanted} or more"));
            }
            if numbers != features {
                let found = format!("item {id} has {numbers} numeric columns");
                return fail(found, features.to_string());
            }
        }
        Ok(())
    }
}

/// The distinct store keys of a batch.
#[derive(Debug, Default)]
pub(crate) struct KeyIndex {
    pub(crate) keys: Vec<u64>,
    /// The index of each key.
    known: HashMap<u64, u32, IdHashKey>,
}

impl KeyIndex {
    /// The index of a column's key, a new one for a key that the batch does not have.
    pub(crate) fn value(&mut self, key: Option<u64>) -> u32 {
        let Some(key) = key else { return ABSENT };
        let next = self.keys.len() as u32;
        let index = *self.known.entry(key).or_insert(next);
        if index == next {
            self.keys.push(key);
        }
        index
    }
}

struct BatchWriter<'a> {
    batch_builder: &'a BatchBuilder,
    labels: &'a LabelScales,
    item_dense: FrozenStandardiser,
    features: FrozenStandardiser,
    /// Of the inputs of each surface's own alignment module.
    alignments: BTreeMap<&'a str, FrozenStandardiser>,
    keys: KeyIndex,
    batch: FmBatch,
}

impl BatchWriter<'_> {
    /// The index of a column's value; `first` is the number of fields before those of the columns.
    fn value_index(&mut self, column: FieldColumn, first: usize, value: u64) -> u32 {
        self.keys.value(self.batch_builder.column_key(column, first, value))
    }

    /// Appends the `chosen` events. The time gap of each is that to its predecessor in the history,
    /// even if sampling left the predecessor out.
    fn history(&mut self, events: &[Event], chosen: &[usize]) {
        let oldest = self.batch_builder.window.first_index(events);
        for &at in chosen {
            let event = &events[at];
            let before_ms = (at > oldest).then(|| events[at - 1].time_ms);
            self.token(&event.item, event.surface, event.time_ms, before_ms);
            append_outcome(&event.outcome, &self.batch_builder.spec, &mut self.batch.outcomes);
        }
        self.batch.history_offsets.push(self.batch.times_s.len() as u32);
    }

    fn targets(&mut self, selected: &ExampleSelection<'_>) {
        let spec = &self.batch_builder.spec;
        let example = selected.example;
        let before_ms = example.history.last().map(|event| event.time_ms);
        for &WeightedTarget { index: at, weight } in &selected.targets {
            let target = &example.targets[at];
            self.alignment(example.surface, target, selected.reader);
            let target = spec.training_only.target(target, selected.reader);
            self.batch.weights.push(weight);
            self.token(&target.item, example.surface, example.time_ms, before_ms);
            self.profile(&target.ids);
            let features = &target.features[..spec.features];
            self.features.append(features, &mut self.batch.features);
            self.batch.surfaces.push(example.surface);
            for task in &spec.tasks {
                let label = label(task, example.surface, &target.outcome);
                let scale = self.labels.get(&task.name);
                let learned = label.map(|label| scale.map_or(label, |own| own.learned(label)));
                self.batch.labels.push(label.unwrap_or(0.0));
                self.batch.learned_labels.push(learned.unwrap_or(0.0));
                self.batch.mask.push(label.is_some());
            }
        }
        self.batch.target_offsets.push(self.batch.weights.len() as u32);
    }

    /// Appends a token of the event or request on a surface at a time.
    fn token(&mut self, item: &Item, surface: u16, time_ms: i64, before_ms: Option<i64>) {
        let event = event_values(surface, time_ms, before_ms);
        let values = [item.id].into_iter().chain(item.ids.iter().copied()).chain(event);
        for (&column, value) in self.batch_builder.token_columns.iter().zip(values) {
            let index = self.value_index(column, 0, value);
            self.batch.key_index.push(index);
        }
        let spec = &self.batch_builder.spec;
        self.item_dense.append(&spec.numbers_of(item), &mut self.batch.dense);
        spec.append_content(item, &mut self.batch.dense);
        self.batch.times_s.push(time_ms.div_euclid(1000));
    }

    /// Appends what the surface's own alignment module reads, if it has one.
    fn alignment(&mut self, surface: u16, target: &Target, reader: ReadFor) {
        let spec = &self.batch_builder.spec;
        let Some(own) = spec.alignment(surface) else { return };
        let AlignmentRow { ids, features } = own.read(target, reader);
        let (surface, inputs) = (usize::from(surface), &mut self.batch.alignment);
        inputs.ids[surface].extend(ids);
        let statistics = &self.alignments[spec.surfaces[surface].as_str()];
        statistics.append(&features, &mut inputs.features[surface]);
    }

    fn profile(&mut self, ids: &[u64]) {
        let spec = &self.batch_builder.spec;
        let first = spec.token_fields();
        if self.batch_builder.include_profiles {
            for (&column, &at) in self.batch_builder.profile_columns.iter().zip(&spec.profile_ids) {
                let index = self.value_index(column, first, ids[at]);
                self.batch.profile_index.push(index);
            }
        }
    }
}

/// The label of a task for an outcome; `None` outside the task's sample space.
pub fn label(task: &TaskSpec, surface: u16, outcome: &Outcome) -> Option<f32> {
    if !task.surfaces[surface as usize] {
        return None;
    }
    match task.label {
        TaskLabel::Action(bit) if outcome.known >> bit & 1 == 1 => {
            Some((outcome.actions >> bit & 1) as f32)
        }
        TaskLabel::Action(_) => None,
        TaskLabel::Value(index) => Some(outcome.values[index]).filter(|value| value.is_finite()),
    }
}

/// The values of the fields that say where and when.
pub(crate) fn event_values(
    surface: u16,
    time_ms: i64,
    before_ms: Option<i64>,
) -> [u64; EVENT_FIELDS] {
    [u64::from(surface), hour_of_day(time_ms), gap_bucket(time_ms, before_ms)]
}

fn hour_of_day(time_ms: i64) -> u64 {
    time_ms.div_euclid(3_600_000).rem_euclid(24) as u64
}

/// floor(log2(1 + seconds since the previous event)); 63 without a previous event.
fn gap_bucket(time_ms: i64, before_ms: Option<i64>) -> u64 {
    let gap = |before: i64| time_ms.saturating_sub(before).max(0) as u64 / 1000;
    before_ms.map_or(63, |before| u64::from((1 + gap(before)).ilog2()))
}

/// Appends an outcome's `FmSpec::outcome_width` numbers.
pub(crate) fn append_outcome(outcome: &Outcome, spec: &FmSpec, out: &mut Vec<f32>) {
    for bit in 0..spec.actions {
        let known = outcome.known >> bit & 1;
        let happened = outcome.actions >> bit & known;
        out.extend([happened as f32, (known - happened) as f32]);
    }
    for &value in &outcome.values[..spec.values] {
        out.extend(if value.is_finite() { [value.clamp(-4.0, 4.0), 1.0] } else { [0.0, 0.0] });
    }
}

#[cfg(test)]
mod tests;
