//! The columns of the feature logs, and how a logged request lies in them.

use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};

use super::{LogVersion, Logged};
use crate::dataset::table::{Column, Field, Kind, Values};
use crate::schema::{BUILT_IN_IDS, FeatureKind, Schema, TaskKind, names};

/// Columns of the requests before the history's item features.
const REQUEST_FIELDS: [(&str, Kind, bool); 12] = [
    ("request", Kind::U64, false),
    ("user", Kind::U64, false),
    ("surface", Kind::U32, false),
    ("time_ms", Kind::I64, false),
    ("correction", Kind::Bool, false),
    ("targets", Kind::U32, false),
    ("history_item", Kind::U64, true),
    ("history_surface", Kind::U32, true),
    ("history_actions", Kind::U32, true),
    ("history_known", Kind::U32, true),
    ("history_time_ms", Kind::I64, true),
    ("ingested_ms", Kind::I64, false),
];

/// A request that waits to be written.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) example: Example,
    /// For each version `[targets, tae_dim]`.
    pub(super) taes: Vec<Vec<f32>>,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
}

/// What a task's label and sample space are made of.
#[derive(Debug, Clone)]
struct TaskColumns {
    name: String,
    source: LabelSource,
    surfaces: Vec<bool>,
}

#[derive(Debug, Clone, Copy)]
enum LabelSource {
    Action(usize),
    Value(usize),
}

/// What is where in the two tables.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    item_features: Vec<String>,
    ids: Vec<String>,
    features: Vec<String>,
    values: Vec<String>,
    item_dense: usize,
    user_ids: usize,
    user_dense: usize,
    surfaces: usize,
    tasks: Vec<TaskColumns>,
}

/// One row group of both tables.
pub(super) struct Group {
    pub(super) requests: Vec<Column>,
    pub(super) examples: Vec<Column>,
}

impl Layout {
    pub(super) fn new(schema: &Schema) -> Layout {
        let count = |features, kind| names(features, kind).len();
        let item_features = names(&schema.item_features, FeatureKind::Categorical);
        Layout {
            item_features: item_features.into_iter().map(String::from).collect(),
            ids: schema.id_columns(),
            features: schema.feature_columns(),
            values: schema.values.clone(),
            item_dense: count(&schema.item_features, FeatureKind::Dense),
            user_ids: count(&schema.user_features, FeatureKind::Categorical),
            user_dense: count(&schema.user_features, FeatureKind::Dense),
            surfaces: schema.surfaces.len(),
            tasks: (0..schema.tasks.len()).map(|task| TaskColumns::new(schema, task)).collect(),
        }
    }

    /// Whether the schema has a surface of that index.
    pub(super) fn has_surface(&self, surface: u16) -> bool {
        usize::from(surface) < self.surfaces
    }

    pub(super) fn request_fields(&self) -> Vec<Field> {
        let fixed = REQUEST_FIELDS.iter().map(|&(name, kind, list)| Field {
            name: name.into(),
            kind,
            list,
        });
        let items =
            self.item_features.iter().map(|name| Field::list(format!("history_{name}"), Kind::U64));
        fixed.chain(items).collect()
    }

    pub(super) fn example_fields(&self) -> Vec<Field> {
        let mut fields = vec![Field::new("request", Kind::U64)];
        fields.extend(self.ids.iter().map(|name| Field::new(name, Kind::U64)));
        fields.extend(self.features.iter().map(|name| Field::new(name, Kind::F32)));
        fields.extend([Field::new("actions", Kind::U32), Field::new("known", Kind::U32)]);
        fields
            .extend(self.values.iter().map(|name| Field::new(format!("value_{name}"), Kind::F32)));
        fields.push(Field::list("truth", Kind::F32));
        fields
    }

    /// Label and mask of each task, which any data tool can train on; they follow from outcome and surface, so
    /// that they are never read here.
    pub(super) fn task_fields(&self) -> Vec<Field> {
        let fields = |task: &TaskColumns| {
            [
                Field::new(format!("label:{}", task.name), Kind::F32),
                Field::new(format!("mask:{}", task.name), Kind::Bool),
            ]
        };
        self.tasks.iter().flat_map(fields).collect()
    }

    /// The embeddings of an FM version.
    pub(super) fn tae_field(version: &str) -> Field {
        Field::list(format!("tae:{version}"), Kind::F32)
    }

    /// Lays requests out in columns: those of `example_fields`, of `task_fields`, and one of embeddings a version.
    pub(super) fn columns(&self, rows: &[Row], versions: &[LogVersion]) -> Group {
        let mut examples = self.example_columns(rows);
        examples.extend(self.tasks.iter().flat_map(|task| task.columns(rows)));
        let targets = || rows.iter().flat_map(|row| &row.example.targets);
        for (at, version) in versions.iter().enumerate() {
            examples.push(Column::lists(
                Values::F32(rows.iter().flat_map(|row| row.taes[at].iter().copied()).collect()),
                offsets(targets().map(|_| version.tae_dim)),
            ));
        }
        Group { requests: self.request_columns(rows), examples }
    }

    fn request_columns(&self, rows: &[Row]) -> Vec<Column> {
        let examples = || rows.iter().map(|row| &row.example);
        let events = || examples().flat_map(|example| &example.history);
        let offsets = offsets(examples().map(|example| example.history.len()));
        let list = |values| Column::lists(values, offsets.clone());
        let mut columns = vec![
            Column::scalars(Values::U64(examples().map(|example| example.request).collect())),
            Column::scalars(Values::U64(examples().map(|example| example.user.id).collect())),
            Column::scalars(Values::U32(
                examples().map(|example| u32::from(example.surface)).collect(),
            )),
            Column::scalars(Values::I64(examples().map(|example| example.time_ms).collect())),
            Column::scalars(Values::Bool(rows.iter().map(|row| row.correction).collect())),
            Column::scalars(Values::U32(
                examples().map(|example| example.targets.len() as u32).collect(),
            )),
            list(Values::U64(events().map(|event| event.item.id).collect())),
            list(Values::U32(events().map(|event| u32::from(event.surface)).collect())),
            list(Values::U32(events().map(|event| event.outcome.actions).collect())),
            list(Values::U32(events().map(|event| event.outcome.known).collect())),
            list(Values::I64(events().map(|event| event.time_ms).collect())),
            Column::scalars(Values::I64(rows.iter().map(|row| row.ingested_ms).collect())),
        ];
        let items = 0..self.item_features.len();
        columns.extend(
            items.map(|i| list(Values::U64(events().map(|event| event.item.ids[i]).collect()))),
        );
        columns
    }

    fn example_columns(&self, rows: &[Row]) -> Vec<Column> {
        let targets = || rows.iter().flat_map(|row| &row.example.targets);
        let f32s = |get: &dyn Fn(&Target) -> f32| {
            Column::scalars(Values::F32(targets().map(get).collect()))
        };
        let u32s = |get: &dyn Fn(&Target) -> u32| {
            Column::scalars(Values::U32(targets().map(get).collect()))
        };
        let requests =
            rows.iter().flat_map(|row| row.example.targets.iter().map(|_| row.example.request));
        let mut columns = vec![Column::scalars(Values::U64(requests.collect()))];
        let ids = 0..self.ids.len();
        columns.extend(ids.map(|i| {
            Column::scalars(Values::U64(targets().map(|target| target.ids[i]).collect()))
        }));
        columns.extend((0..self.features.len()).map(|i| f32s(&|target| target.features[i])));
        columns
            .extend([u32s(&|target| target.outcome.actions), u32s(&|target| target.outcome.known)]);
        columns.extend((0..self.values.len()).map(|i| f32s(&|target| target.outcome.values[i])));
        columns.push(Column::lists(
            Values::F32(targets().flat_map(|target| target.truth.iter().copied()).collect()),
            offsets(targets().map(|target| target.truth.len())),
        ));
        columns
    }

    /// Puts logged requests together again from the columns of `example_fields` and one of embeddings; `None` where the
    /// two tables do not fit each other.
    pub(super) fn rows(&self, group: &Group) -> Option<Vec<Logged>> {
        let requests = &group.requests;
        let examples = group.examples[0].u64s();
        let mut rows = Vec::with_capacity(requests[0].u64s().len());
        let mut start = 0;
        for (row, &request) in requests[0].u64s().iter().enumerate() {
            let end = start + requests[5].u32s()[row] as usize;
            if examples.get(start..end)?.iter().any(|&of| of != request) {
                return None;
            }
            rows.push(self.row(group, row, start..end));
            start = end;
        }
        (start == examples.len()).then_some(rows)
    }

    fn row(&self, group: &Group, row: usize, targets: std::ops::Range<usize>) -> Logged {
        let requests = &group.requests;
        let tae = &group.examples[group.examples.len() - 1];
        let embeddings = match targets.is_empty() {
            true => &[],
            false => &tae.f32s()[tae.range(targets.start).start..tae.range(targets.end - 1).end],
        };
        let targets: Vec<Target> = targets.map(|at| self.target(&group.examples, at)).collect();
        let user_id = requests[1].u64s()[row];
        let user = match targets.first() {
            Some(target) => self.user(user_id, target),
            None => User { id: user_id, ..User::default() },
        };
        let example = Example {
            request: requests[0].u64s()[row],
            user: Arc::new(user),
            surface: requests[2].u32s()[row] as u16,
            time_ms: requests[3].i64s()[row],
            history: requests[6].range(row).map(|at| event(requests, at)).collect(),
            targets,
        };
        Logged {
            example,
            tae: embeddings.to_vec(),
            correction: requests[4].bools()[row],
            ingested_ms: requests[11].i64s()[row],
        }
    }

    fn target(&self, columns: &[Column], at: usize) -> Target {
        let (id_columns, rest) = columns[1..].split_at(self.ids.len());
        let (feature_columns, rest) = rest.split_at(self.features.len());
        let ids: Vec<u64> = id_columns.iter().map(|column| column.u64s()[at]).collect();
        let features: Vec<f32> = feature_columns.iter().map(|column| column.f32s()[at]).collect();
        let mut values = [f32::NAN; MAX_VALUES];
        for (value, column) in values.iter_mut().zip(&rest[2..2 + self.values.len()]) {
            *value = column.f32s()[at];
        }
        let truth = &rest[2 + self.values.len()];
        let item_ids = BUILT_IN_IDS.len()..BUILT_IN_IDS.len() + self.item_features.len();
        let item = Item {
            id: ids[1],
            ids: ids[item_ids].to_vec(),
            dense: features[..self.item_dense].to_vec(),
            ..Item::default()
        };
        Target {
            item: Arc::new(item),
            outcome: Outcome { actions: rest[0].u32s()[at], known: rest[1].u32s()[at], values },
            truth: truth.f32s()[truth.range(at)].to_vec(),
            ids,
            features,
        }
    }

    /// A user's features are the same in every target of a request.
    fn user(&self, id: u64, target: &Target) -> User {
        let ids = BUILT_IN_IDS.len() + self.item_features.len();
        User {
            id,
            ids: target.ids[ids..ids + self.user_ids].to_vec(),
            dense: target.features[self.item_dense..self.item_dense + self.user_dense].to_vec(),
        }
    }
}

impl TaskColumns {
    fn new(schema: &Schema, index: usize) -> TaskColumns {
        let task = &schema.tasks[index];
        let source = match task.kind {
            TaskKind::Binary => schema.action(&task.label).map(LabelSource::Action),
            TaskKind::Regression => schema.value(&task.label).map(LabelSource::Value),
        };
        TaskColumns {
            name: task.name.clone(),
            source: source.expect("a schema's tasks have labels"),
            surfaces: (0..schema.surfaces.len())
                .map(|surface| schema.task_valid(index, surface as u16))
                .collect(),
        }
    }

    /// Labels, 0 outside the sample space, and whether each target is in it.
    fn columns(&self, rows: &[Row]) -> [Column; 2] {
        let label = |example: &Example, target: &Target| {
            let outcome = &target.outcome;
            let label = match self.source {
                LabelSource::Action(bit) => (outcome.known >> bit & 1 == 1)
                    .then_some(f32::from(u8::from(outcome.actions >> bit & 1 == 1))),
                LabelSource::Value(at) => Some(outcome.values[at]).filter(|value| !value.is_nan()),
            };
            label.filter(|_| self.surfaces[usize::from(example.surface)])
        };
        let labels: Vec<Option<f32>> = rows
            .iter()
            .flat_map(|row| row.example.targets.iter().map(|target| label(&row.example, target)))
            .collect();
        [
            Column::scalars(Values::F32(labels.iter().map(|label| label.unwrap_or(0.0)).collect())),
            Column::scalars(Values::Bool(labels.iter().map(Option::is_some).collect())),
        ]
    }
}

fn event(requests: &[Column], at: usize) -> Event {
    let ids = requests[REQUEST_FIELDS.len()..].iter().map(|column| column.u64s()[at]).collect();
    Event {
        item: Arc::new(Item { id: requests[6].u64s()[at], ids, ..Item::default() }),
        surface: requests[7].u32s()[at] as u16,
        time_ms: requests[10].i64s()[at],
        outcome: Outcome {
            actions: requests[8].u32s()[at],
            known: requests[9].u32s()[at],
            ..Outcome::UNKNOWN
        },
    }
}

/// Where each list starts, and at the end the number of all elements.
fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let ends = lengths.scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}
