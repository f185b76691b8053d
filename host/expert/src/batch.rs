//! Builds an expert's inputs from examples: one batch builder for training and serving, so that the
//! two cannot differ.
//!
//! Columns are resolved by name once, when an expert is loaded. A batch can be filled again and
//! keeps its memory. Numeric features are one block of rows, as examples have them; every other
//! column is a vector of its own.

use std::borrow::{Borrow, Cow};
use std::sync::Arc;

use hypercast_data::schema::Schema;
use hypercast_fm::example::{Event, Example, Item, Target};
use hypercast_fm::training_only::{ReadFor, TrainingOnlyColumns};

use super::Error;
use super::fm_rows::{FmRows, FmTask, InputScales, Tae};
use super::graph::OutcomePart;
pub use super::guest_columns::GuestRequest;
use super::guest_columns::{GuestColumns, GuestRows};
use super::train::TaskTargets;
use super::wasm::contract::{
    ActionBatch, Column, Description, HostInfo, HostSchema, IdColumns, KnownOutcomes, NamedColumn,
    VectorWidths, action_batch,
};

/// Stands in a column of ids for a value that a feature of several values does not have. A mean of
/// table rows leaves it out.
pub(crate) const ABSENT: u64 = u64::MAX;

/// An id as operators see it that do not know of absent ones: 0, as a missing category is.
pub(crate) fn or_zero(id: u64) -> u64 {
    if id == ABSENT { 0 } else { id }
}

/// One column's values, row-major if it has several a row.
#[derive(Debug, Clone, PartialEq)]
pub enum ColumnData {
    /// The values of an f32 input, as the network reads them.
    Numbers(Vec<f32>),
    /// Numbers in this column of [`ExpertBatch::features`].
    Feature(usize),
    /// Ids, not hashed. Those of a feature of several values end with [`ABSENT`].
    Ids(Vec<u64>),
}

/// The inputs of a network for a batch of whole requests.
#[derive(Debug, Clone, Default)]
pub struct ExpertBatch {
    /// The number of rows (candidates) of all requests.
    pub rows: usize,
    /// `[requests + 1]`, from 0: where each request's short-history events begin.
    pub history_offsets: Arc<[u32]>,
    /// `[requests + 1]`, from 0: where each request's rows begin.
    pub target_offsets: Arc<[u32]>,
    /// One for each column of the description. In a batch without events a history column has one
    /// event of zeros, which belongs to no request.
    pub columns: Vec<ColumnData>,
    /// `[rows, feature columns]`, row-major: the numeric features that the network reads,
    /// standardised, in the order of their columns.
    pub features: Vec<f32>,
    /// What only training knows of the rows, for each task in the description's order; empty where
    /// the network predicts.
    pub outcomes: Vec<TaskOutcomes>,
}

/// A task's outcomes in a batch, on the scale on which the network predicts it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TaskOutcomes {
    /// Labels, sample space and weights.
    pub targets: TaskTargets,
    /// What the host adds to an output before it is the logit of a binary task.
    pub base_logit: f32,
}

impl ExpertBatch {
    /// A part of a task's outcomes, a value a row. Rows outside the sample space have 0, whatever
    /// stands there.
    ///
    /// # Panics
    /// If the batch is to predict: no prediction depends on an outcome.
    pub(crate) fn outcome(&self, part: OutcomePart, task: usize) -> Vec<f32> {
        let TaskOutcomes { targets, base_logit } = &self.outcomes[task];
        let TaskTargets { labels, mask, weights } = targets;
        let valid = |values: &[f32]| -> Vec<f32> {
            let values = values.iter().zip(mask);
            values.map(|(value, valid)| if *valid { *value } else { 0.0 }).collect()
        };
        match part {
            OutcomePart::Label => valid(labels),
            OutcomePart::Mask => mask.iter().map(|valid| f32::from(u8::from(*valid))).collect(),
            OutcomePart::Weight => valid(weights),
            OutcomePart::BaseLogit => vec![*base_logit; self.rows],
        }
    }

    /// The values of a numeric column.
    ///
    /// # Panics
    /// If it is a column of ids.
    pub fn numbers(&self, column: usize) -> Cow<'_, [f32]> {
        match &self.columns[column] {
            ColumnData::Numbers(values) => values.into(),
            ColumnData::Feature(place) => {
                let width = self.features.len() / self.rows.max(1);
                self.features.iter().skip(*place).step_by(width.max(1)).copied().collect()
            }
            ColumnData::Ids(_) => panic!("column {column} is a column of ids"),
        }
    }

    /// The number of short-history events of all requests.
    pub fn history_events(&self) -> usize {
        self.history_offsets.last().map_or(0, |events| *events as usize)
    }
}

/// Where a column's values come from in an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ColumnSource {
    Tae,
    Feature(usize),
    RawFeature(usize),
    Id(IdColumns),
    /// The item's content vector, of so many values.
    Vector(usize),
    /// The FM's prediction of this main task of the schema.
    FmLogit(usize),
    Time,
    Request,
    RankedPosition,
    RankedPropensity,
    HistoryItem,
    HistorySurface,
    HistoryItemFeature(IdColumns),
    HistoryActions,
    HistoryAge,
}

/// An expert's columns, resolved against a schema.
#[derive(Debug, Clone)]
pub struct ExpertColumns {
    sources: Vec<ColumnSource>,
    /// The schema's numeric columns that the network reads, in the order of its columns.
    features: Vec<usize>,
    /// The columns that `rank` reads, in the order of the description.
    rank: GuestColumns,
    /// The columns that the training hooks read, in the order of the description.
    training: GuestColumns,
    feature_names: Vec<String>,
    outcomes: KnownOutcomes,
    history_len: usize,
    actions: usize,
    vectors: VectorWidths,
    /// The tasks that the FM predicts.
    fm_tasks: Arc<[FmTask]>,
    training_only: TrainingOnlyColumns,
}

impl ExpertColumns {
    /// Resolves the columns of `description`.
    ///
    /// # Errors
    /// The schema lacks a column; the error names it.
    pub fn new(
        description: &Description,
        schema: &Schema,
        vectors: VectorWidths,
    ) -> Result<ExpertColumns, Error> {
        let HostInfo { actions, .. } =
            HostSchema::on(description.only_surface(), schema, vectors).info;
        ExpertColumns::as_of(description, actions.len(), schema, vectors)
    }

    /// The same of a description that was told the first `actions` of the actions that are its now.
    pub(crate) fn as_of(
        description: &Description,
        actions: usize,
        schema: &Schema,
        vectors: VectorWidths,
    ) -> Result<ExpertColumns, Error> {
        let host = HostSchema::on(description.only_surface(), schema, vectors);
        let resolve = |column: &Column| {
            source(column, &host).map_err(|why| Error::refused(&description.name, why))
        };
        let sources = description.columns.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let feature = |source: &ColumnSource| match source {
            ColumnSource::Feature(index) => Some(*index),
            _ => None,
        };
        let fm_tasks = FmTask::all(schema);
        let of_guest = |columns: &[Column]| {
            let sources = columns.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
            Ok::<_, Error>(GuestColumns::new(columns.iter().zip(sources), vectors.tae, &fm_tasks))
        };
        Ok(ExpertColumns {
            features: sources.iter().filter_map(feature).collect(),
            sources,
            rank: of_guest(&description.rank_columns)?,
            training: of_guest(&description.training_columns)?,
            fm_tasks,
            feature_names: schema.feature_columns(),
            outcomes: host.outcomes().clone(),
            history_len: description.history_len as usize,
            actions,
            vectors,
            training_only: schema.training_only_columns(),
        })
    }

    /// The TAE's number of values a target.
    pub fn tae_dim(&self) -> usize {
        self.vectors.tae
    }

    /// The bytes of a column's values of a row, or of an event of the history, as the network reads
    /// them: all of a feature that has several values. `index` is that of the description's column.
    pub fn network_value_bytes(&self, index: usize, column: &Column) -> usize {
        let values = match self.sources[index] {
            ColumnSource::Id(ids) | ColumnSource::HistoryItemFeature(ids) => ids.width,
            _ => 1,
        };
        values * self.value_bytes(column)
    }

    /// The same as guests read them: the first of a feature that has several values.
    pub fn value_bytes(&self, column: &Column) -> usize {
        let numbers = match column {
            Column::Tae => self.vectors.tae,
            Column::Vector(_) => self.vectors.content,
            Column::HistoryActions => self.actions,
            Column::Feature(_)
            | Column::RawFeature(_)
            | Column::FmLogit(_)
            | Column::RankedPosition
            | Column::RankedPropensity
            | Column::HistoryAge => 1,
            Column::Id(_) | Column::HistoryId(_) | Column::Time | Column::Request => {
                return size_of::<u64>();
            }
        };
        numbers * size_of::<f32>()
    }

    /// The names of the schema's numeric columns, in the order of `Target::features`.
    pub fn feature_names(&self) -> &[String] {
        &self.feature_names
    }

    /// Whether the network or the training hooks read the TAE.
    pub fn reads_tae(&self) -> bool {
        self.sources.contains(&ColumnSource::Tae) || self.training.has(ColumnSource::Tae)
    }

    /// Whether the network or the training hooks read predictions of the FM.
    pub fn reads_fm_logits(&self) -> bool {
        let mut all = self.sources.iter().chain(self.training.sources());
        all.any(|source| matches!(source, ColumnSource::FmLogit(_)))
    }

    /// The number of main tasks, which an FM predicts.
    pub fn fm_tasks(&self) -> usize {
        self.fm_tasks.len()
    }

    /// The inputs of the network for `examples`, as serving sees them.
    ///
    /// # Panics
    /// If `fm` has embeddings, and not `tae_dim` values a target.
    pub fn batch<'f, 's, E: Borrow<Example>>(
        &self,
        examples: &[E],
        fm: impl Into<FmRows<'f>>,
        scales: impl Into<InputScales<'s>>,
    ) -> ExpertBatch {
        let mut batch = ExpertBatch::default();
        self.fill(&mut batch, examples, fm, scales);
        batch
    }

    /// The inputs of the network to learn from `examples`: with what only training knows.
    ///
    /// # Panics
    /// As [`ExpertColumns::batch`].
    pub fn training_batch<'f, 's, E: Borrow<Example>>(
        &self,
        examples: &[E],
        fm: impl Into<FmRows<'f>>,
        scales: impl Into<InputScales<'s>>,
    ) -> ExpertBatch {
        let mut batch = ExpertBatch::default();
        self.lay_out(&mut batch, examples, ReadFor::Learning, fm.into(), scales.into());
        batch
    }

    /// Replaces the content of `batch`, which is empty or was filled by these columns, by the
    /// inputs for `examples`, as serving sees them.
    ///
    /// # Panics
    /// As [`ExpertColumns::batch`].
    pub fn fill<'f, 's, E: Borrow<Example>>(
        &self,
        batch: &mut ExpertBatch,
        examples: &[E],
        fm: impl Into<FmRows<'f>>,
        scales: impl Into<InputScales<'s>>,
    ) {
        self.lay_out(batch, examples, ReadFor::Prediction, fm.into(), scales.into());
    }

    /// Replaces the content of `batch` by the inputs for `examples` as their reader sees them.
    fn lay_out<E: Borrow<Example>>(
        &self,
        batch: &mut ExpertBatch,
        examples: &[E],
        reader: ReadFor,
        fm: FmRows,
        scales: InputScales,
    ) {
        let targets: Vec<Cow<'_, [Target]>> = examples
            .iter()
            .map(|example| self.training_only.targets(example.borrow(), reader))
            .collect();
        let histories: Vec<Vec<&Event>> =
            examples.iter().map(|example| self.history(example.borrow())).collect();
        batch.target_offsets =
            offsets(examples.iter().map(|example| example.borrow().targets.len()));
        batch.history_offsets = offsets(histories.iter().map(Vec::len));
        let rows = batch.target_offsets.last().map_or(0, |rows| *rows as usize);
        batch.rows = rows;
        batch.outcomes.clear();
        if let Tae::Rows(values) = fm.tae {
            assert_eq!(values.len(), rows * self.tae_dim(), "the TAE has tae_dim values a target");
        }
        let builder = Builder {
            columns: self,
            examples,
            targets: &targets,
            histories: &histories,
            fm,
            scales,
            rows,
        };
        batch.columns.resize(self.sources.len(), ColumnData::Feature(0));
        let mut features = 0;
        for (source, column) in self.sources.iter().zip(&mut batch.columns) {
            if let ColumnSource::Feature(_) = source {
                *column = ColumnData::Feature(features);
                features += 1;
            } else {
                builder.fill(*source, column);
            }
        }
        builder.features(&mut batch.features);
    }

    /// What `rank` reads of a request besides the predictions, as serving sees it.
    pub fn rank_columns<'a>(
        &self,
        example: &Example,
        fm: impl Into<FmRows<'a>>,
    ) -> Vec<NamedColumn> {
        let targets = &self.training_only.targets(example, ReadFor::Rule);
        let (time_ms, fm) = (example.time_ms, fm.into());
        self.rank.values(&[GuestRows { targets, time_ms, fm, ranked: &[] }])
    }

    /// What the training hooks receive for all rows of some requests, with what only training
    /// knows.
    pub fn hook_batch(&self, requests: &[GuestRequest], info: &HostInfo) -> ActionBatch {
        let examples = requests.iter().map(|request| request.example);
        let rows: Vec<GuestRows> = requests.iter().map(GuestRequest::rows).collect();
        let columns = self.training.values(&rows);
        ActionBatch { columns, ..action_batch(examples, info, &self.outcomes) }
    }

    /// The bytes that the training hooks read of a row besides the outcomes.
    pub(crate) fn hook_row_bytes(&self) -> usize {
        self.training.row_bytes()
    }

    /// The last events on the request's surface, oldest first.
    fn history<'e>(&self, example: &'e Example) -> Vec<&'e Event> {
        let on_surface =
            example.history.iter().rev().filter(|event| event.surface == example.surface);
        let mut events: Vec<&Event> = on_surface.take(self.history_len).collect();
        events.reverse();
        events
    }
}

/// Where the values of a column are, by the schema's names.
fn source(column: &Column, host: &HostSchema) -> Result<ColumnSource, String> {
    let index = column.index_in(&host.info)?;
    Ok(match (column, index) {
        (Column::Tae, _) => ColumnSource::Tae,
        (Column::Feature(_), index) => ColumnSource::Feature(host.feature(index)),
        (Column::RawFeature(_), index) => ColumnSource::RawFeature(host.feature(index)),
        (Column::Id(_), index) => ColumnSource::Id(host.id_columns(index)),
        (Column::Vector(_), index) => ColumnSource::Vector(host.vector_width(index)),
        (Column::FmLogit(_), index) => ColumnSource::FmLogit(index),
        (Column::Time, _) => ColumnSource::Time,
        (Column::Request, _) => ColumnSource::Request,
        (Column::RankedPosition, _) => ColumnSource::RankedPosition,
        (Column::RankedPropensity, _) => ColumnSource::RankedPropensity,
        (Column::HistoryId(_), index) => match host.item_columns(index) {
            Some(columns) => ColumnSource::HistoryItemFeature(columns),
            None if index == 0 => ColumnSource::HistoryItem,
            None => ColumnSource::HistorySurface,
        },
        (Column::HistoryActions, _) => ColumnSource::HistoryActions,
        (Column::HistoryAge, _) => ColumnSource::HistoryAge,
    })
}

impl IdColumns {
    /// Appends the values of a row. Of several, those that it lacks are [`ABSENT`].
    fn append(self, row: &[u64], to: &mut Vec<u64>) {
        let values = &row[self.first..self.first + self.width];
        match values {
            [one] => to.push(*one),
            _ => to.extend(values.iter().map(|&id| if id == 0 { ABSENT } else { id })),
        }
    }
}

/// A number as rules and networks that standardise for themselves read it: 0 where it is missing.
pub(crate) fn known(number: f32) -> f32 {
    if number.is_finite() { number } else { 0.0 }
}

/// Appends an item's content vector; zeros if it has none, or one of another width, as logs of
/// before can have.
pub(crate) fn vector_of(item: &Item, width: usize, to: &mut Vec<f32>) {
    if item.content.len() == width {
        to.extend_from_slice(&item.content);
    } else {
        to.resize(to.len() + width, 0.0);
    }
}

struct Builder<'a, E> {
    columns: &'a ExpertColumns,
    examples: &'a [E],
    targets: &'a [Cow<'a, [Target]>],
    histories: &'a [Vec<&'a Event>],
    fm: FmRows<'a>,
    scales: InputScales<'a>,
    rows: usize,
}

impl<E: Borrow<Example>> Builder<'_, E> {
    fn targets(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter().flat_map(|targets| targets.iter())
    }

    /// All numeric features that the network reads, row by row.
    fn features(&self, block: &mut Vec<f32>) {
        let features = &self.columns.features;
        block.clear();
        block.reserve(self.rows * features.len());
        for target in self.targets() {
            block.extend(features.iter().map(|&index| target.features[index]));
        }
        if features.is_empty() {
            return;
        }
        let scale: Vec<_> =
            features.iter().map(|&index| self.scales.normaliser.scale(index)).collect();
        for row in block.chunks_exact_mut(features.len()) {
            row.iter_mut().zip(&scale).for_each(|(value, scale)| *value = scale.apply(*value));
        }
    }

    fn fill(&self, source: ColumnSource, column: &mut ColumnData) {
        match source {
            ColumnSource::Tae => {
                let values = numbers(column);
                match self.fm.tae {
                    Tae::Rows(tae) => values.extend_from_slice(tae),
                    Tae::Without => values.resize(self.rows * self.columns.tae_dim(), 0.0),
                }
            }
            ColumnSource::Feature(_) => unreachable!("numeric features are one block"),
            ColumnSource::RawFeature(index) => {
                let values = numbers(column);
                values.extend(self.targets().map(|target| known(target.features[index])));
            }
            ColumnSource::Id(columns) => {
                let ids = ids(column);
                self.targets().for_each(|target| columns.append(&target.ids, ids));
            }
            ColumnSource::Vector(width) => {
                let vectors = numbers(column);
                self.targets().for_each(|target| vector_of(&target.item, width, vectors));
            }
            ColumnSource::FmLogit(task) => self.fm_logits(task, numbers(column)),
            ColumnSource::Time
            | ColumnSource::Request
            | ColumnSource::RankedPosition
            | ColumnSource::RankedPropensity => {
                unreachable!("no network reads them: see `Column::check_reader`")
            }
            ColumnSource::HistoryItem => self.history_ids(column, |event| event.item.id),
            ColumnSource::HistorySurface => {
                self.history_ids(column, |event| u64::from(event.surface))
            }
            ColumnSource::HistoryItemFeature(columns) => {
                let ids = ids(column);
                let events = self.histories.iter().flatten();
                events.for_each(|event| columns.append(&event.item.ids, ids));
                if ids.is_empty() {
                    columns.append(&vec![0; columns.first + columns.width], ids);
                }
            }
            ColumnSource::HistoryActions => self.history_actions(numbers(column)),
            ColumnSource::HistoryAge => self.history_age(numbers(column)),
        }
    }

    /// The FM's prediction of a main task, for each row.
    fn fm_logits(&self, task: usize, values: &mut Vec<f32>) {
        let of = &self.columns.fm_tasks[task];
        let scale = self.scales.labels.get(&of.name);
        let predictions = self.fm.predictions_of(task, self.rows, self.columns.fm_tasks());
        values.extend(predictions.map(|prediction| of.for_network(scale, prediction)));
        values.resize(self.rows, 0.0);
    }

    fn history_ids(&self, column: &mut ColumnData, id: impl Fn(&Event) -> u64) {
        let ids = ids(column);
        ids.extend(self.histories.iter().flatten().map(|event| id(event)));
        if ids.is_empty() {
            ids.push(0);
        }
    }

    fn history_actions(&self, values: &mut Vec<f32>) {
        let actions = self.columns.actions;
        let events = self.histories.iter().flatten();
        let bits = |event: &&Event| {
            let happened = self.columns.outcomes.bits(event.outcome.actions);
            (0..actions).map(move |action| ((happened >> action) & 1) as f32)
        };
        values.extend(events.flat_map(bits));
        if values.is_empty() {
            values.resize(actions, 0.0);
        }
    }

    fn history_age(&self, values: &mut Vec<f32>) {
        let requests = self.examples.iter().zip(self.histories);
        values.extend(requests.flat_map(|(example, events)| {
            let now = example.borrow().time_ms;
            events.iter().map(move |event| {
                let seconds = now.saturating_sub(event.time_ms).max(0) as f64 / 1000.0;
                (1.0 + seconds).log2() as f32
            })
        }));
        if values.is_empty() {
            values.push(0.0);
        }
    }
}

/// Makes a column an empty one of numbers. It keeps its memory if it had numbers before.
fn numbers(column: &mut ColumnData) -> &mut Vec<f32> {
    if !matches!(column, ColumnData::Numbers(_)) {
        *column = ColumnData::Numbers(Vec::new());
    }
    let ColumnData::Numbers(values) = column else { unreachable!("set above") };
    values.clear();
    values
}

/// Makes a column an empty one of ids. It keeps its memory if it had ids before.
fn ids(column: &mut ColumnData) -> &mut Vec<u64> {
    if !matches!(column, ColumnData::Ids(_)) {
        *column = ColumnData::Ids(Vec::new());
    }
    let ColumnData::Ids(ids) = column else { unreachable!("set above") };
    ids.clear();
    ids
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Arc<[u32]> {
    let ends = lengths.scan(0u32, |end, length| {
        *end += length as u32;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}
