//! From examples to an expert's inputs: one batch builder for training and
//! serving, so that the two cannot differ.
//!
//! Columns are resolved by name once, when an expert is loaded. A batch is
//! host memory that can be filled again: numeric features as one block of rows,
//! which is how examples have them, and the other columns one by one.

use std::borrow::{Borrow, Cow};
use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Target};

use super::Error;
use super::normalise::Normaliser;
use super::wasm::contract::{self, Column, Data, Description, NamedColumn};
use hypercast_data::schema::Schema;

/// One column's values, row-major where it has several a row.
#[derive(Debug, Clone, PartialEq)]
pub enum ColumnData {
    /// f32.
    Numbers(Vec<f32>),
    /// f32: the column at this place of [`ExpertBatch::features`].
    Feature(usize),
    /// Raw ids.
    Ids(Vec<u64>),
}

/// The inputs of a network for a batch of whole requests.
#[derive(Debug, Clone, Default)]
pub struct ExpertBatch {
    /// Rows (candidates) of all requests.
    pub rows: usize,
    /// `[B + 1]`, from 0: the short-history events of each request.
    pub history_offsets: Arc<[u32]>,
    /// `[B + 1]`, from 0: the rows of each request.
    pub target_offsets: Arc<[u32]>,
    /// One for each column of the description. History columns of a batch
    /// without any event hold one event of zeros, which belongs to no request.
    pub columns: Vec<ColumnData>,
    /// `[rows, feature columns]`, row-major: the numeric features that the network reads, standardised, in the order of
    /// their columns.
    pub features: Vec<f32>,
}

impl ExpertBatch {
    /// The values of a numeric column.
    ///
    /// # Panics
    /// Where the column holds ids.
    pub fn numbers(&self, column: usize) -> Cow<'_, [f32]> {
        match &self.columns[column] {
            ColumnData::Numbers(values) => values.into(),
            ColumnData::Feature(place) => {
                let width = self.features.len() / self.rows.max(1);
                self.features.iter().skip(*place).step_by(width.max(1)).copied().collect()
            }
            ColumnData::Ids(_) => panic!("column {column} holds ids"),
        }
    }

    /// Short-history events of all requests.
    pub fn history_events(&self) -> usize {
        self.history_offsets.last().map_or(0, |events| *events as usize)
    }

    /// Requests.
    pub fn requests(&self) -> usize {
        self.target_offsets.len() - 1
    }
}

/// The target-aware embeddings of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tae<'a> {
    /// `[rows, tae_dim]`, row-major, in the order of the examples' targets.
    Rows(&'a [f32]),
    /// Zeros: the ablation "expert without TAE", or no foundation model.
    Without,
}

/// Where a column's values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Tae,
    Feature(usize),
    Id(usize),
    HistoryItem,
    HistorySurface,
    HistoryItemFeature(usize),
    HistoryActions,
    HistoryAge,
}

/// An expert's columns, resolved against a schema.
#[derive(Debug, Clone)]
pub struct Columns {
    sources: Vec<Source>,
    /// Which numeric columns of the schema the network reads, in the order of its columns.
    features: Vec<usize>,
    rank: Vec<(Column, Source)>,
    feature_names: Vec<String>,
    history_len: usize,
    actions: usize,
    tae_dim: usize,
}

impl Columns {
    /// Resolves the columns of `description`, or says which name the schema lacks.
    pub fn new(
        description: &Description,
        schema: &Schema,
        tae_dim: usize,
    ) -> Result<Columns, Error> {
        let resolver = Resolver {
            features: schema.feature_columns(),
            ids: schema.id_columns(),
            history_ids: contract::history_id_columns(schema),
        };
        let resolve = |column: &Column| {
            resolver.resolve(column).map_err(|why| Error::refused(&description.name, why))
        };
        let sources = description.columns.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let feature = |source: &Source| match source {
            Source::Feature(index) => Some(*index),
            _ => None,
        };
        let rank =
            description.rank_columns.iter().map(|column| Ok((column.clone(), resolve(column)?)));
        Ok(Columns {
            features: sources.iter().filter_map(feature).collect(),
            sources,
            rank: rank.collect::<Result<_, Error>>()?,
            feature_names: resolver.features,
            history_len: description.history_len as usize,
            actions: schema.actions.len(),
            tae_dim,
        })
    }

    /// The width of the TAE.
    pub fn tae_dim(&self) -> usize {
        self.tae_dim
    }

    /// Every numeric column of the schema, in the order of `Target::features`.
    pub fn feature_names(&self) -> &[String] {
        &self.feature_names
    }

    /// Whether the network reads the TAE.
    pub fn reads_tae(&self) -> bool {
        self.sources.contains(&Source::Tae)
    }

    /// The inputs of the network for `examples`.
    ///
    /// # Panics
    /// Where `tae` does not hold `tae_dim` values a target.
    pub fn batch<E: Borrow<Example>>(
        &self,
        examples: &[E],
        tae: Tae,
        normaliser: &Normaliser,
    ) -> ExpertBatch {
        let mut batch = ExpertBatch::default();
        self.fill(&mut batch, examples, tae, normaliser);
        batch
    }

    /// The same, into a batch of these columns that was used before, or an empty one.
    ///
    /// # Panics
    /// As [`Columns::batch`].
    pub fn fill<E: Borrow<Example>>(
        &self,
        batch: &mut ExpertBatch,
        examples: &[E],
        tae: Tae,
        normaliser: &Normaliser,
    ) {
        let histories: Vec<Vec<&Event>> =
            examples.iter().map(|example| self.history(example.borrow())).collect();
        batch.target_offsets =
            offsets(examples.iter().map(|example| example.borrow().targets.len()));
        batch.history_offsets = offsets(histories.iter().map(Vec::len));
        let rows = batch.target_offsets.last().map_or(0, |rows| *rows as usize);
        batch.rows = rows;
        if let Tae::Rows(values) = tae {
            assert_eq!(values.len(), rows * self.tae_dim, "the TAE has tae_dim values a target");
        }
        let builder =
            Builder { columns: self, examples, histories: &histories, tae, normaliser, rows };
        batch.columns.resize(self.sources.len(), ColumnData::Feature(0));
        let mut places = 0..;
        for (source, column) in self.sources.iter().zip(&mut batch.columns) {
            match source {
                Source::Feature(_) => {
                    *column = ColumnData::Feature(places.next().expect("no end of places"));
                }
                source => builder.fill(*source, column),
            }
        }
        builder.features(&mut batch.features);
    }

    /// What `rank` reads of a request besides the predictions: raw values, not normalised.
    pub fn rank_columns(&self, example: &Example, tae: Tae) -> Vec<NamedColumn> {
        let rows = example.targets.len();
        let raw = |source: Source| match source {
            Source::Tae => match tae {
                Tae::Rows(values) => Data::Numbers(values.to_vec()),
                Tae::Without => Data::Numbers(vec![0.0; rows * self.tae_dim]),
            },
            Source::Feature(index) => {
                Data::Numbers(example.targets.iter().map(|t| t.features[index]).collect())
            }
            Source::Id(index) => Data::Ids(example.targets.iter().map(|t| t.ids[index]).collect()),
            _ => unreachable!("a description's rank-columns hold no history column"),
        };
        self.rank
            .iter()
            .map(|(column, source)| NamedColumn { column: column.clone(), data: raw(*source) })
            .collect()
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

struct Resolver {
    features: Vec<String>,
    ids: Vec<String>,
    history_ids: Vec<String>,
}

impl Resolver {
    fn resolve(&self, column: &Column) -> Result<Source, String> {
        let find = |names: &[String], name: &str| {
            names.iter().position(|known| known == name).ok_or_else(|| {
                format!(
                    "it reads {}, which the schema lacks (it has `{}`)",
                    column.label(),
                    names.join("`, `")
                )
            })
        };
        Ok(match column {
            Column::Tae => Source::Tae,
            Column::Feature(name) => Source::Feature(find(&self.features, name)?),
            Column::Id(name) => Source::Id(find(&self.ids, name)?),
            Column::HistoryId(name) => match find(&self.history_ids, name)? {
                0 => Source::HistoryItem,
                1 => Source::HistorySurface,
                index => Source::HistoryItemFeature(index - 2),
            },
            Column::HistoryActions => Source::HistoryActions,
            Column::HistoryAge => Source::HistoryAge,
        })
    }
}

struct Builder<'a, E> {
    columns: &'a Columns,
    examples: &'a [E],
    histories: &'a [Vec<&'a Event>],
    tae: Tae<'a>,
    normaliser: &'a Normaliser,
    rows: usize,
}

impl<E: Borrow<Example>> Builder<'_, E> {
    fn targets(&self) -> impl Iterator<Item = &Target> {
        self.examples.iter().flat_map(|example| &example.borrow().targets)
    }

    /// Every numeric feature that the network reads, row by row.
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
        let scale: Vec<_> = features.iter().map(|&index| self.normaliser.scale(index)).collect();
        for row in block.chunks_exact_mut(features.len()) {
            row.iter_mut().zip(&scale).for_each(|(value, scale)| *value = scale.apply(*value));
        }
    }

    fn fill(&self, source: Source, column: &mut ColumnData) {
        match source {
            Source::Tae => {
                let values = numbers(column);
                match self.tae {
                    Tae::Rows(tae) => values.extend_from_slice(tae),
                    Tae::Without => values.resize(self.rows * self.columns.tae_dim, 0.0),
                }
            }
            Source::Feature(_) => unreachable!("numeric features are one block"),
            Source::Id(index) => {
                ids(column).extend(self.targets().map(|target| target.ids[index]));
            }
            Source::HistoryItem => self.history_ids(column, |event| event.item.id),
            Source::HistorySurface => self.history_ids(column, |event| u64::from(event.surface)),
            Source::HistoryItemFeature(index) => {
                self.history_ids(column, |event| event.item.ids[index]);
            }
            Source::HistoryActions => self.history_actions(numbers(column)),
            Source::HistoryAge => self.history_age(numbers(column)),
        }
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
            let happened = event.outcome.actions;
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

/// A column as one of numbers, empty; it keeps its memory where it was one before.
fn numbers(column: &mut ColumnData) -> &mut Vec<f32> {
    if !matches!(column, ColumnData::Numbers(_)) {
        *column = ColumnData::Numbers(Vec::new());
    }
    let ColumnData::Numbers(values) = column else { unreachable!("it was made one above") };
    values.clear();
    values
}

/// The same for ids.
fn ids(column: &mut ColumnData) -> &mut Vec<u64> {
    if !matches!(column, ColumnData::Ids(_)) {
        *column = ColumnData::Ids(Vec::new());
    }
    let ColumnData::Ids(ids) = column else { unreachable!("it was made one above") };
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
