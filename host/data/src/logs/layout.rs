//! The columns of the feature logs: from logged requests to columns, and back.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};

use super::{LogVersion, LoggedRequest};
use crate::dataset::table::{CellType, Column, Field, NULL_U32};
use crate::ranked_place::RankedPlace;
use crate::schema::{
    BUILT_IN_IDS, ColumnDefaults, ColumnRanges, FeatureKind, FeatureWidths, MISSING, Schema, Task,
    columns_of,
};

/// Columns of the requests before the history's item features: name, type, and whether they contain
/// lists.
const REQUEST_FIELDS: [(&str, CellType, bool); 12] = [
    ("request", CellType::U64, false),
    ("user", CellType::U64, false),
    ("surface", CellType::U32, false),
    ("time_ms", CellType::I64, false),
    ("correction", CellType::Bool, false),
    ("targets", CellType::U32, false),
    ("history_item", CellType::U64, true),
    ("history_surface", CellType::U32, true),
    ("history_actions", CellType::U64, true),
    ("history_known", CellType::U64, true),
    ("history_time_ms", CellType::I64, true),
    ("ingested_ms", CellType::I64, false),
];

/// Those of them that are masks of actions.
const REQUEST_MASKS: Range<usize> = 8..10;
/// The content vectors of the items. No feature has such a name.
const CONTENT_COLUMN: &str = "vector:content";

/// Where each item was ranked before it was shown, null where nobody knows: the index in the
/// answer, the probability of that if there is one, and the version that ranked it.
const RANKED_COLUMNS: [(&str, CellType); 3] = [
    ("ranked:position", CellType::U32),
    ("ranked:propensity", CellType::F32),
    ("ranked:arm", CellType::Text),
];

/// A request that will be written with the next row group.
#[derive(Debug, Clone)]
pub(super) struct BufferedRow {
    pub(super) example: Example,
    /// The embeddings of each version, `[targets, tae_dim]`.
    pub(super) taes: Vec<Vec<f32>>,
    /// Of each target.
    pub(super) ranked: Vec<Option<RankedPlace>>,
    /// The predictions of each version, `[targets, main tasks]`, or empty where there are none.
    pub(super) predictions: Vec<Vec<f32>>,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
}

/// The columns of the two tables.
#[derive(Debug, Clone)]
pub(super) struct LogLayout {
    schema: Schema,
    ids: Vec<String>,
    features: Vec<String>,
    widths: FeatureWidths,
    ranges: ColumnRanges,
    /// The tasks whose predictions are logged.
    main_tasks: Vec<String>,
    pub(super) defaults: ColumnDefaults,
}

/// The columns of examples that a reader uses.
pub(super) struct ReadFields {
    pub(super) fields: Vec<Field>,
    pub(super) defaults: ColumnDefaults,
}

/// One row group of both tables.
pub(super) struct RowGroup {
    pub(super) requests: Vec<Column>,
    pub(super) examples: Vec<Column>,
}

impl LogLayout {
    pub(super) fn new(schema: &Schema) -> LogLayout {
        LogLayout {
            ids: schema.id_columns(),
            features: schema.feature_columns(),
            widths: FeatureWidths::new(schema),
            ranges: ColumnRanges::new(schema),
            main_tasks: schema.main_tasks().map(|task| task.name.clone()).collect(),
            // Files of earlier versions have neither content vectors nor rankings.
            defaults: ColumnDefaults::new(schema)
                .and(&[CONTENT_COLUMN])
                .and(&RANKED_COLUMNS.map(|(name, _)| name)),
            schema: schema.clone(),
        }
    }

    /// The number of tasks whose predictions are logged.
    pub(super) fn main_tasks(&self) -> usize {
        self.main_tasks.len()
    }

    pub(super) fn request_fields(&self) -> Vec<Field> {
        let fixed = REQUEST_FIELDS.iter().enumerate().map(|(at, &(name, kind, list))| {
            let field = if list { Field::list(name, kind) } else { Field::new(name, kind) };
            if REQUEST_MASKS.contains(&at) { self.of_masks(field) } else { field }
        });
        let items = columns_of(&self.schema.item_features, FeatureKind::Categorical).into_iter();
        let items = items.map(|name| Field::list(format!("history_{name}"), CellType::U64));
        fixed.chain(items).collect()
    }

    pub(super) fn example_fields(&self) -> Vec<Field> {
        let mut fields = vec![Field::new("request", CellType::U64)];
        fields.extend(self.ids.iter().map(|name| Field::new(name, CellType::U64)));
        fields.extend(self.features.iter().map(|name| Field::new(name, CellType::F32)));
        let mask = |name| self.of_masks(Field::new(name, CellType::U64));
        fields.extend([mask("actions"), mask("known")]);
        let value = |name: &String| Field::new(format!("value_{name}"), CellType::F32);
        fields.extend(self.schema.values.iter().map(value));
        fields.push(Field::list("truth", CellType::F32));
        fields.push(Field::list(CONTENT_COLUMN, CellType::F32));
        fields.extend(RANKED_COLUMNS.map(|(name, kind)| Field::nullable(name, kind)));
        fields
    }

    fn of_masks(&self, field: Field) -> Field {
        field.of_masks(self.schema.actions.len())
    }

    /// The label and the mask of each task, for training with other tools. They follow from outcome
    /// and surface, so readers here ignore them.
    pub(super) fn task_fields(&self) -> Vec<Field> {
        let fields = |task: &Task| {
            [
                Field::new(format!("label:{}", task.name), CellType::F32),
                Field::new(format!("mask:{}", task.name), CellType::Bool),
            ]
        };
        self.schema.tasks.iter().flat_map(fields).collect()
    }

    /// The column with the embeddings of an FM version.
    pub(super) fn tae_field(version: &str) -> Field {
        Field::list(format!("tae:{version}"), CellType::F32)
    }

    /// The columns with the predictions of an FM version, one a main task.
    pub(super) fn prediction_fields<'a>(
        &'a self,
        version: &'a str,
    ) -> impl Iterator<Item = Field> + 'a {
        let name = move |task: &String| format!("prediction:{version}:{task}");
        self.main_tasks.iter().map(move |task| Field::new(name(task), CellType::F32))
    }

    /// The fields of the examples that readers use, with the embeddings and predictions of a
    /// version if there is one, and what a file may lack of them: one of before has no predictions,
    /// or not those of a task that was added since.
    pub(super) fn read_fields(&self, version: Option<&str>) -> ReadFields {
        let (mut fields, mut defaults) = (self.example_fields(), self.defaults.clone());
        if let Some(version) = version {
            let predictions: Vec<Field> = self.prediction_fields(version).collect();
            let names: Vec<&str> = predictions.iter().map(|field| field.name.as_str()).collect();
            defaults = defaults.and(&names);
            fields.extend(predictions);
            fields.push(Self::tae_field(version));
        }
        ReadFields { fields, defaults }
    }

    /// What stands for the columns of a version where none is read: no predictions are known, and
    /// embeddings are empty.
    pub(super) fn columns_of_no_version(&self, rows: usize) -> Vec<Column> {
        let unknown = || Column::scalars(std::iter::repeat_n(MISSING, rows));
        let none = Column::lists(std::iter::empty::<f32>(), std::iter::repeat_n(0, rows));
        let mut columns: Vec<Column> = self.main_tasks.iter().map(|_| unknown()).collect();
        columns.push(none);
        columns
    }

    /// The columns of some requests. Those of examples are `example_fields`, `task_fields`, and for
    /// each version `prediction_fields` and one column of embeddings.
    pub(super) fn columns(&self, rows: &[BufferedRow], versions: &[LogVersion]) -> RowGroup {
        let mut examples = self.example_columns(rows);
        let tasks = 0..self.schema.tasks.len();
        examples.extend(tasks.flat_map(|task| self.task_columns(task, rows)));
        let targets = || rows.iter().flat_map(|row| &row.example.targets);
        for (at, version) in versions.iter().enumerate() {
            let tasks = 0..self.main_tasks.len();
            examples.extend(tasks.map(|task| self.prediction_column(at, task, rows)));
            examples.push(Column::lists(
                rows.iter().flat_map(|row| row.taes[at].iter().copied()),
                targets().map(|_| version.tae_dim),
            ));
        }
        RowGroup { requests: self.request_columns(rows), examples }
    }

    fn prediction_column(&self, version: usize, task: usize, rows: &[BufferedRow]) -> Column {
        let of_row = |BufferedRow { example, predictions, .. }: &BufferedRow| {
            let own = &predictions[version];
            let of = |target| own.get(target * self.main_tasks.len() + task).copied();
            let targets = 0..example.targets.len();
            targets.map(|target| of(target).unwrap_or(MISSING)).collect::<Vec<f32>>()
        };
        Column::scalars(rows.iter().flat_map(of_row))
    }

    fn request_columns(&self, rows: &[BufferedRow]) -> Vec<Column> {
        let examples = || rows.iter().map(|row| &row.example);
        let events = || examples().flat_map(|example| &example.history);
        let lengths = || examples().map(|example| example.history.len());
        let mut columns = vec![
            Column::scalars(examples().map(|example| example.request)),
            Column::scalars(examples().map(|example| example.user.id)),
            Column::scalars(examples().map(|example| u32::from(example.surface))),
            Column::scalars(examples().map(|example| example.time_ms)),
            Column::scalars(rows.iter().map(|row| row.correction)),
            Column::scalars(examples().map(|example| example.targets.len() as u32)),
            Column::lists(events().map(|event| event.item.id), lengths()),
            Column::lists(events().map(|event| u32::from(event.surface)), lengths()),
            Column::lists(events().map(|event| event.outcome.actions), lengths()),
            Column::lists(events().map(|event| event.outcome.known), lengths()),
            Column::lists(events().map(|event| event.time_ms), lengths()),
            Column::scalars(rows.iter().map(|row| row.ingested_ms)),
        ];
        let items = 0..self.widths.item.ids;
        columns.extend(
            items.map(|i| Column::lists(events().map(|event| event.item.ids[i]), lengths())),
        );
        columns
    }

    fn example_columns(&self, rows: &[BufferedRow]) -> Vec<Column> {
        let targets = || rows.iter().flat_map(|row| &row.example.targets);
        let requests =
            rows.iter().flat_map(|row| row.example.targets.iter().map(|_| row.example.request));
        let mut columns = vec![Column::scalars(requests)];
        let scalars = |get: &dyn Fn(&Target) -> f32| Column::scalars(targets().map(get));
        columns.extend(
            (0..self.ids.len()).map(|i| Column::scalars(targets().map(|target| target.ids[i]))),
        );
        columns.extend((0..self.features.len()).map(|i| scalars(&|target| target.features[i])));
        columns.push(Column::scalars(targets().map(|target| target.outcome.actions)));
        columns.push(Column::scalars(targets().map(|target| target.outcome.known)));
        columns.extend(
            (0..self.schema.values.len()).map(|i| scalars(&|target| target.outcome.values[i])),
        );
        columns.push(Column::lists(
            targets().flat_map(|target| target.truth.iter().copied()),
            targets().map(|target| target.truth.len()),
        ));
        let mut contents = WrittenContents::default();
        let vectors: Vec<Arc<[f32]>> =
            targets().map(|target| contents.cell(&target.item)).collect();
        columns.push(Column::lists(
            vectors.iter().flat_map(|vector| vector.iter().copied()),
            vectors.iter().map(|vector| vector.len()),
        ));
        columns.extend(ranked_columns(rows));
        columns
    }

    /// The labels of targets (0 outside the sample space), and whether each target is inside.
    fn task_columns(&self, task: usize, rows: &[BufferedRow]) -> [Column; 2] {
        let labels = rows.iter().flat_map(|BufferedRow { example, .. }| {
            let targets = example.targets.iter();
            targets.map(|target| self.schema.label(task, example.surface, &target.outcome))
        });
        let labels: Vec<Option<f32>> = labels.collect();
        [
            Column::scalars(labels.iter().map(|label| label.unwrap_or(0.0))),
            Column::scalars(labels.iter().map(Option::is_some)),
        ]
    }

    /// The requests of some columns: `request_fields` and `read_fields`. `None` if the two tables
    /// do not fit each other, or a surface not the schema.
    pub(super) fn rows(&self, group: &RowGroup) -> Option<Vec<LoggedRequest>> {
        let requests = &group.requests;
        let examples = group.examples[0].u64s();
        let mut rows = Vec::with_capacity(requests[0].u64s().len());
        let mut contents = ReadContents::default();
        let mut start = 0;
        for (row, &request) in requests[0].u64s().iter().enumerate() {
            let end = start + requests[5].u32s()[row] as usize;
            let surface = requests[2].u32s()[row] as usize;
            if surface >= self.schema.surfaces.len()
                || examples.get(start..end)?.iter().any(|&of| of != request)
            {
                return None;
            }
            rows.push(self.row(group, row, start..end, &mut contents));
            start = end;
        }
        (start == examples.len()).then_some(rows)
    }

    fn row(
        &self,
        group: &RowGroup,
        row: usize,
        targets: Range<usize>,
        contents: &mut ReadContents,
    ) -> LoggedRequest {
        let requests = &group.requests;
        let (tae, rest) = group.examples.split_last().expect("the embeddings come last");
        let embeddings = &tae.f32s()[tae.range_of(targets.clone())];
        let ranked = targets.clone().map(|at| self.ranked(&group.examples, at)).collect();
        let predictions = &rest[rest.len() - self.main_tasks.len()..];
        let predictions =
            targets.clone().flat_map(|at| predictions.iter().map(move |own| own.f32s()[at]));
        let predictions = predictions.collect();
        let target = |at| self.target(&group.examples, at, contents);
        let targets: Vec<Target> = targets.map(target).collect();
        let user_id = requests[1].u64s()[row];
        let user = match targets.first() {
            Some(target) => self.user(user_id, target),
            None => User { id: user_id, ..User::default() },
        };
        let mut example = Example {
            request: requests[0].u64s()[row],
            user: Arc::new(user),
            surface: requests[2].u32s()[row] as u16,
            time_ms: requests[3].i64s()[row],
            history: requests[6].range(row).map(|at| event(requests, at)).collect(),
            targets,
        };
        self.ranges.clip(&mut example);
        LoggedRequest {
            example,
            tae: embeddings.to_vec(),
            ranked,
            predictions,
            correction: requests[4].bools()[row],
            ingested_ms: requests[11].i64s()[row],
        }
    }

    fn target(&self, columns: &[Column], at: usize, contents: &mut ReadContents) -> Target {
        let (id_columns, rest) = columns[1..].split_at(self.ids.len());
        let (feature_columns, rest) = rest.split_at(self.features.len());
        let ids: Vec<u64> = id_columns.iter().map(|column| column.u64s()[at]).collect();
        let features: Vec<f32> = feature_columns.iter().map(|column| column.f32s()[at]).collect();
        let mut values = [f32::NAN; MAX_VALUES];
        for (value, column) in values.iter_mut().zip(&rest[2..2 + self.schema.values.len()]) {
            *value = column.f32s()[at];
        }
        let [truth, content] = [0, 1].map(|at| &rest[2 + self.schema.values.len() + at]);
        let item_ids = BUILT_IN_IDS.len()..BUILT_IN_IDS.len() + self.widths.item.ids;
        let item = Item {
            id: ids[1],
            ids: ids[item_ids].to_vec(),
            dense: features[..self.widths.item.dense].to_vec(),
            content: contents.of(ids[1], &content.f32s()[content.range(at)]),
        };
        Target {
            item: Arc::new(item),
            outcome: Outcome { actions: rest[0].u64s()[at], known: rest[1].u64s()[at], values },
            truth: truth.f32s()[truth.range(at)].to_vec(),
            ids,
            features,
        }
    }

    /// Where a target was ranked.
    fn ranked(&self, columns: &[Column], at: usize) -> Option<RankedPlace> {
        // Behind the request, ids, features, actions, known actions, values, truth and vectors.
        let first = 1 + self.ids.len() + self.features.len() + 2 + self.schema.values.len() + 2;
        let [position, propensity, arm] = [0, 1, 2].map(|own| &columns[first + own]);
        let (position, propensity) = (position.u32s()[at], propensity.f32s()[at]);
        (position != NULL_U32).then(|| RankedPlace {
            position,
            propensity: (!propensity.is_nan()).then_some(propensity),
            arm: arm.texts()[at].clone(),
        })
    }

    /// The user of a request, whose features are the same in every target.
    fn user(&self, id: u64, target: &Target) -> User {
        let FeatureWidths { item, user, .. } = self.widths;
        let ids = BUILT_IN_IDS.len() + item.ids;
        User {
            id,
            ids: target.ids[ids..ids + user.ids].to_vec(),
            dense: target.features[item.dense..item.dense + user.dense].to_vec(),
        }
    }
}

/// [`RANKED_COLUMNS`] of some requests.
fn ranked_columns(rows: &[BufferedRow]) -> [Column; RANKED_COLUMNS.len()] {
    let places = || rows.iter().flat_map(|row| &row.ranked).map(Option::as_ref);
    let propensity = |place: &RankedPlace| place.propensity;
    [
        Column::scalars(places().map(|place| place.map_or(NULL_U32, |place| place.position))),
        Column::scalars(places().map(|place| place.and_then(propensity).unwrap_or(f32::NAN))),
        Column::scalars(places().map(|place| place.map_or(String::new(), |own| own.arm.clone()))),
    ]
}

/// The content vectors that a row group has so far. It has a vector once, where its item comes
/// first: a vector of 384 numbers would else be most of a log, and popular items have it in every
/// request.
#[derive(Default)]
struct WrittenContents {
    by_item: HashMap<u64, Arc<[f32]>>,
}

impl WrittenContents {
    /// What the row of an item has: its vector where that is another one than before, and nothing
    /// where it is not. An item that has none any more has zeros, which mean the same.
    fn cell(&mut self, item: &Item) -> Arc<[f32]> {
        let nothing = Arc::default();
        let before = self.by_item.get(&item.id).unwrap_or(&nothing);
        let now = match item.content.len() {
            0 => vec![0.0; before.len()].into(),
            _ => item.content.clone(),
        };
        if now == *before {
            return nothing;
        }
        self.by_item.insert(item.id, now.clone());
        now
    }
}

/// The content vectors that were read of a row group so far.
#[derive(Default)]
struct ReadContents {
    by_item: HashMap<u64, Arc<[f32]>>,
}

impl ReadContents {
    /// The vector of an item whose row has `own`.
    fn of(&mut self, item: u64, own: &[f32]) -> Arc<[f32]> {
        if !own.is_empty() {
            self.by_item.insert(item, own.into());
        }
        self.by_item.get(&item).cloned().unwrap_or_default()
    }
}

/// An event of a request's history.
fn event(requests: &[Column], at: usize) -> Event {
    // A log of before an item feature was added has empty lists of it.
    let id = |column: &Column| column.u64s().get(at).copied().unwrap_or_default();
    let ids = requests[REQUEST_FIELDS.len()..].iter().map(id).collect();
    Event {
        item: Arc::new(Item { id: requests[6].u64s()[at], ids, ..Item::default() }),
        surface: requests[7].u32s()[at] as u16,
        time_ms: requests[10].i64s()[at],
        outcome: Outcome {
            actions: requests[8].u64s()[at],
            known: requests[9].u64s()[at],
            ..Outcome::UNKNOWN
        },
    }
}
