//! What an FM is made from: its size and training settings ([`FmConfig`], the operator's choice)
//! and the shape of its data ([`FmSpec`], derived from the schema). Checkpoints store both.

use std::{borrow::Cow, collections::BTreeMap, fmt::Display};

use hypercast_store::RowFormat;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    alignment_spec::AlignmentSpec,
    example::{Item, MAX_ACTIONS, MAX_VALUES},
    label_scale::LabelTransform,
    sampling::HistoryWindow,
    training_only::TrainingOnlyColumns,
};

/// The FM's size and training settings: the `[fm]` table of `hypercast.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FmConfig {
    /// Model width d.
    pub dim: usize,
    /// HSTU layers.
    pub layers: usize,
    /// Attention heads per layer.
    pub heads: usize,
    /// Width of Q and K per head.
    pub qk_dim: usize,
    /// Width of V and U per head.
    pub v_dim: usize,
    /// Width of one sparse embedding row.
    pub embedding_dim: usize,
    /// Width of the TAE; 0 takes `dim` without a projection.
    pub tae_dim: usize,
    /// The longest history that is read, in events; also the constant N_max that normalises
    /// attention.
    pub max_history: usize,
    /// The number of oldest events among which a longer history may begin. The beginning stays the
    /// same for several new events, so that a cached history can be extended; 0 begins at the
    /// oldest event that fits. `None` is an eighth of `max_history` in a new model, and what a
    /// resumed training began with. See [`HistoryWindow`].
    pub history_anchors: Option<usize>,
    /// The most targets in one training request; larger requests are split.
    pub max_targets: usize,
    /// Scale of the attention scores.
    pub alpha: Alpha,
    /// Buckets of the relative position bias; 0 for none.
    pub position_buckets: usize,
    /// Buckets of the time bias; 0 for none.
    pub time_buckets: usize,
    /// Recent events that each token sees; 0 for all.
    pub window: usize,
    /// Oldest events that each token sees besides the window.
    pub global: usize,
    /// Dropout before the output projection of a layer.
    pub dropout: f64,
    /// Requests per training batch.
    pub batch_requests: usize,
    /// Learning rate of the dense weights (AdamW).
    pub learning_rate: f64,
    /// Learning rate of the sparse embeddings (row-wise Adagrad).
    pub sparse_learning_rate: f32,
    /// Uniform range of a new embedding row.
    pub sparse_init: f32,
    /// A sparse row is created when its key was seen this often in training; 1 is at once. Until
    /// then it reads as zeros.
    pub admit_after: u8,
    /// A sparse row that was not trained for this many steps is removed; 0 keeps all.
    pub expire_after_steps: u32,
    /// The number format of sparse rows in checkpoints.
    pub serving_rows: RowFormat,
    /// AdamW's weight decay.
    pub weight_decay: f32,
    /// Steps of linear learning-rate warm-up.
    pub warmup_steps: u64,
    /// Gradient-norm limit of each dense tensor; 0 for none.
    pub clip_norm: f32,
    /// Whether a target's token also carries its numeric columns and the user's categories.
    pub candidate_columns: bool,
    /// Seed of every random choice.
    pub seed: u64,
    /// Stochastic length: in training, histories above N^(α/2) are thinned to it; 2 is off.
    pub stochastic_length_alpha: f64,
    /// By surface: the share of candidates without a positive action that training keeps.
    pub sample_negatives: BTreeMap<String, f32>,
    /// Requests between two saves of a training run; 0 for none.
    pub save_every_requests: u64,
    /// Decay of the moving average of the dense weights, which makes predictions and checkpoints; 0
    /// uses the weights themselves.
    pub average_decay: f64,
    /// Passes over the events with unknown times, before the stream.
    pub pretraining_passes: usize,
}

impl Default for FmConfig {
    fn default() -> Self {
        Self {
            dim: 64,
            layers: 2,
            heads: 2,
            qk_dim: 32,
            v_dim: 32,
            embedding_dim: 24,
            tae_dim: 0,
            max_history: 64,
            history_anchors: None,
            max_targets: 32,
            alpha: Alpha::InverseSqrt,
            position_buckets: 64,
            time_buckets: 24,
            window: 0,
            global: 0,
            dropout: 0.0,
            batch_requests: 64,
            learning_rate: 1e-3,
            sparse_learning_rate: 0.03,
            sparse_init: 0.03,
            admit_after: 1,
            expire_after_steps: 0,
            serving_rows: RowFormat::F32,
            weight_decay: 1e-4,
            warmup_steps: 50,
            clip_norm: 1.0,
            candidate_columns: true,
            seed: 7,
            stochastic_length_alpha: 2.0,
            sample_negatives: BTreeMap::new(),
            save_every_requests: 0,
            average_decay: 0.995,
            pretraining_passes: 1,
        }
    }
}

/// The scale α of attention scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alpha {
    /// α = 1 / √qk_dim.
    InverseSqrt,
    /// α = 1.
    One,
}

impl FmConfig {
    /// Width of the TAE, `dim` where `tae_dim` is 0.
    pub fn tae_width(&self) -> usize {
        if self.tae_dim == 0 { self.dim } else { self.tae_dim }
    }

    /// The part of a history that the model reads.
    pub fn history_window(&self) -> HistoryWindow {
        let anchors = self.history_anchors.unwrap_or(self.max_history / 8);
        HistoryWindow { max_events: self.max_history, anchors }
    }

    /// The configuration of a new model, with nothing left to defaults that may change: what is
    /// stored with a model keeps its meaning.
    pub fn of_new_model(&self) -> Self {
        Self { history_anchors: Some(self.history_window().anchors), ..self.clone() }
    }

    /// Width of a user embedding: the state of a history token before the first layer and after
    /// each.
    pub fn user_state_width(&self) -> usize {
        (self.layers + 1) * self.dim
    }

    /// Whether predicting needs a pass of its own, because the training pass has dropout or uses
    /// weights other than the average.
    pub(crate) fn needs_prediction_pass(&self) -> bool {
        self.dropout > 0.0 || self.average_decay > 0.0
    }

    /// The value of α.
    pub fn alpha_value(&self) -> f32 {
        match self.alpha {
            Alpha::InverseSqrt => 1.0 / (self.qk_dim as f32).sqrt(),
            Alpha::One => 1.0,
        }
    }

    /// Approximate memory of a token in a training pass: the activations that the backward pass
    /// needs, and their gradients.
    pub(crate) fn bytes_per_token(&self) -> usize {
        let mixed = 2 * self.heads * (self.qk_dim + self.v_dim);
        let layer = 4 * mixed + 6 * self.dim;
        4 * (self.layers * layer + 8 * self.dim + 16 * self.embedding_dim)
    }

    /// Checks that every value is in its range.
    ///
    /// # Errors
    /// Names the first key that is out of range, with its value and the range.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("dim", self.dim),
            ("layers", self.layers),
            ("heads", self.heads),
            ("qk_dim", self.qk_dim),
            ("v_dim", self.v_dim),
            ("embedding_dim", self.embedding_dim),
            ("max_history", self.max_history),
            ("max_targets", self.max_targets),
            ("batch_requests", self.batch_requests),
        ];
        let fault = |key: &str, value: &dyn Display, range: &str| {
            Err(Error::Config(format!("fm.{key} is {value}; it must be {range}")))
        };
        for (key, value) in positive {
            if value == 0 || value > 1 << 16 {
                return fault(key, &value, "between 1 and 65536");
            }
        }
        if self.admit_after == 0 {
            return fault("admit_after", &0, "between 1 (at once) and 255");
        }
        let anchors = self.history_window().anchors;
        if anchors > self.max_history {
            let range = format!("at most fm.max_history, {}", self.max_history);
            return fault("history_anchors", &anchors, &range);
        }
        for (key, value) in [("average_decay", self.average_decay), ("dropout", self.dropout)] {
            if !(0.0..1.0).contains(&value) {
                return fault(key, &value, "at least 0 and below 1");
            }
        }
        if self.learning_rate <= 0.0 || self.sparse_learning_rate <= 0.0 {
            return Err(Error::Config(
                "fm.learning_rate and fm.sparse_learning_rate must be above 0".into(),
            ));
        }
        let alpha = self.stochastic_length_alpha;
        if !(alpha > 0.0 && alpha <= 2.0) {
            let range = "above 0 and at most 2, which is off";
            return fault("stochastic_length_alpha", &alpha, range);
        }
        match self.sample_negatives.iter().find(|&(_, &keep)| !(keep > 0.0 && keep <= 1.0)) {
            Some((surface, keep)) => {
                let key = format!("sample_negatives.{surface}");
                fault(&key, keep, "above 0 and at most 1")
            }
            None => Ok(()),
        }
    }

    /// Checks that every surface in `sample_negatives` exists.
    ///
    /// # Errors
    /// Names the unknown surface and lists the existing ones.
    pub fn validate_for(&self, spec: &FmSpec) -> Result<()> {
        match self.sample_negatives.keys().find(|name| !spec.surfaces.contains(name)) {
            Some(name) => Err(Error::Config(format!(
                "fm.sample_negatives: there is no surface {name:?}; the surfaces are: {}",
                spec.surfaces.join(", ")
            ))),
            None => Ok(()),
        }
    }
}

/// The last fields of a token, which say where and when: surface, hour of the day, and gap to the
/// previous event.
pub(crate) const EVENT_FIELDS: usize = 3;

/// The shape of the data that an FM is made for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmSpec {
    /// The surfaces' names, in the schema's order.
    pub surfaces: Vec<String>,
    /// The number of actions in an outcome.
    pub actions: usize,
    /// The number of real values in an outcome.
    pub values: usize,
    /// The number of categorical columns of an item.
    pub item_ids: usize,
    /// The number of dense features of an item.
    pub item_dense: usize,
    /// Those of them, by index, that are optional: a token says besides whether they are missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub item_optional: Vec<usize>,
    /// The number of the model's numeric columns of a target: features of the usual alignment
    /// modules, and of targets' tokens if the configuration has `candidate_columns`. They stand
    /// first in `Target::features`; a trainer's target may end with others
    /// ([`crate::alignment_spec`]).
    pub features: usize,
    /// Indices into `Target::ids` of the columns that describe the user or the request, not the
    /// item. A trainer's target may end with others, as with numeric ones.
    pub profile_ids: Vec<usize>,
    /// Which of these columns are of one feature.
    #[serde(default, skip_serializing_if = "IdWidths::are_ones")]
    pub id_widths: IdWidths,
    /// The predicted tasks, main tasks first.
    pub tasks: Vec<TaskSpec>,
    /// Width of an item's content vector; 0 for none.
    #[serde(default)]
    pub content: usize,
    /// The columns of a target that serving does not know.
    #[serde(default, skip_serializing_if = "TrainingOnlyColumns::is_empty")]
    pub training_only: TrainingOnlyColumns,
    /// By surface: the alignment modules that surfaces' teams declared. Other surfaces have the
    /// usual one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alignments: BTreeMap<String, AlignmentSpec>,
}

/// The numbers of columns of categorical features, in their order: above 1 of those that can have
/// several values. An empty list means 1 of each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdWidths {
    /// Of an item's.
    pub item: Vec<usize>,
    /// Of the user's and the request's.
    pub profile: Vec<usize>,
}

impl IdWidths {
    fn are_ones(&self) -> bool {
        self.item.is_empty() && self.profile.is_empty()
    }

    /// Those of `columns` columns.
    fn of(widths: &[usize], columns: usize) -> Vec<usize> {
        if widths.is_empty() { vec![1; columns] } else { widths.to_vec() }
    }

    fn fit(widths: &[usize], columns: usize) -> bool {
        let sum = widths.iter().try_fold(0usize, |sum, &width| sum.checked_add(width));
        widths.is_empty() || (sum == Some(columns) && !widths.contains(&0))
    }
}

/// One task of the MTML objective (eq. 3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// The task's name in the schema.
    pub name: String,
    /// Whether the task is predicted by the multi-task module, which all surfaces share; otherwise
    /// by the alignment modules.
    pub main: bool,
    /// Where the label comes from, which also decides between classification and regression.
    pub label: TaskLabel,
    /// What a regression learns of its label.
    #[serde(default, skip_serializing_if = "LabelTransform::is_identity")]
    pub transform: LabelTransform,
    /// `[surfaces]`: whether the task is valid on each surface.
    pub surfaces: Vec<bool>,
    /// The task's weight ω in the loss.
    pub weight: f32,
}

/// Where a task's label comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskLabel {
    /// A binary task: whether the action with this index happened.
    Action(usize),
    /// A regression on the real value with this index.
    Value(usize),
}

impl FmSpec {
    /// What a model of this specification reads and data of another one does not have, if there is
    /// anything: then no example of that data fits.
    pub fn misfit(&self, data: &FmSpec) -> Option<String> {
        let profile = |spec: &FmSpec| spec.profile_ids.len();
        let all = [
            ("categorical columns of an item", self.item_ids, data.item_ids),
            ("dense features of an item", self.item_dense, data.item_dense),
            ("optional ones of them", self.item_optional.len(), data.item_optional.len()),
            ("numeric columns", self.features, data.features),
            ("categorical columns of users and requests", profile(self), profile(data)),
        ];
        let differs = all.into_iter().find(|(_, own, of_data)| own != of_data);
        let differs =
            differs.map(|(what, own, of_data)| format!("{own} {what} instead of {of_data}"));
        let groups = || "other categorical features of several values".to_owned();
        let differs = differs.or_else(|| (self.id_widths != data.id_widths).then(groups));
        let hidden = || "other columns for training only".to_owned();
        let differs = differs.or_else(|| (self.training_only != data.training_only).then(hidden));
        let surfaces = (self.surfaces.len(), data.surfaces.len());
        let few = || format!("{} surfaces instead of {}", surfaces.0, surfaces.1);
        differs.or_else(|| (surfaces.0 < surfaces.1).then(few))
    }

    /// The main tasks, which come first in `tasks`.
    pub fn main_tasks(&self) -> &[TaskSpec] {
        &self.tasks[..self.tasks.iter().take_while(|task| task.main).count()]
    }

    /// The auxiliary tasks, which come last in `tasks`.
    pub fn auxiliary_tasks(&self) -> &[TaskSpec] {
        &self.tasks[self.main_tasks().len()..]
    }

    /// The width of what is known of a candidate besides its item, the input of the model's
    /// candidate encoder; 0 without `candidate_columns`.
    pub(crate) fn candidate_width(&self, config: &FmConfig) -> usize {
        let width = self.profile_fields() * config.embedding_dim + self.features;
        if config.candidate_columns { width } else { 0 }
    }

    /// Categorical fields of a token: item id, the item's features, surface, hour of the day and
    /// gap to the previous event.
    pub fn token_fields(&self) -> usize {
        1 + IdWidths::of(&self.id_widths.item, self.item_ids).len() + EVENT_FIELDS
    }

    /// The number of categorical features of users and requests.
    pub fn profile_fields(&self) -> usize {
        self.profile_widths().len()
    }

    /// The columns of those features.
    pub(crate) fn profile_widths(&self) -> Vec<usize> {
        IdWidths::of(&self.id_widths.profile, self.profile_ids.len())
    }

    /// The columns of the fields of a token.
    pub(crate) fn token_widths(&self) -> Vec<usize> {
        let item = IdWidths::of(&self.id_widths.item, self.item_ids);
        std::iter::once(1).chain(item).chain([1; EVENT_FIELDS]).collect()
    }

    /// The numbers that describe the item of a token: its dense features, and for each optional one
    /// whether it is missing.
    pub fn item_numbers(&self) -> usize {
        self.item_dense + self.item_optional.len()
    }

    /// Those numbers of an item, not standardised. One that is missing and not optional is 0.
    pub(crate) fn numbers_of<'a>(&self, item: &'a Item) -> Cow<'a, [f32]> {
        let is_known = |number: &f32| number.is_finite();
        if self.item_optional.is_empty() && item.dense.iter().all(is_known) {
            return Cow::Borrowed(&item.dense);
        }
        let is_missing = |&at: &usize| f32::from(u8::from(!item.dense[at].is_finite()));
        let number = |(at, &number): (usize, &f32)| {
            if is_known(&number) || self.item_optional.contains(&at) { number } else { 0.0 }
        };
        let numbers = item.dense.iter().enumerate().map(number);
        numbers.chain(self.item_optional.iter().map(is_missing)).collect()
    }

    /// Appends an item's content vector; zeros for an item without one.
    pub(crate) fn append_content(&self, item: &Item, out: &mut Vec<f32>) {
        let end = out.len() + self.content;
        if self.content > 0 {
            out.extend_from_slice(&item.content);
        }
        out.resize(end, 0.0);
    }

    /// The number of numbers that describe an outcome: two per action (yes, no) and two per value
    /// (number, known).
    pub fn outcome_width(&self) -> usize {
        2 * self.actions + 2 * self.values
    }

    /// Checks the order of the tasks and the numbers of actions and values.
    ///
    /// # Errors
    /// The rule that is violated.
    pub fn validate(&self) -> Result<()> {
        if self.main_tasks().is_empty() {
            return Err(Error::Config(
                "the schema has no main task; the FM needs at least one".into(),
            ));
        }
        if self.auxiliary_tasks().iter().any(|task| task.main) {
            return Err(Error::Config("main tasks must come before auxiliary ones".into()));
        }
        if self.item_optional.iter().any(|&at| at >= self.item_dense) {
            return Err(Error::Config("an item has fewer dense features than are optional".into()));
        }
        let fits = IdWidths::fit(&self.id_widths.item, self.item_ids)
            && IdWidths::fit(&self.id_widths.profile, self.profile_ids.len());
        if !fits {
            let reason = "the widths of categorical features are not those of their columns";
            return Err(Error::Config(reason.into()));
        }
        let TrainingOnlyColumns { ids, numbers, missing } = &self.training_only;
        let is_known = ids.iter().all(|column| self.profile_ids.contains(column))
            && numbers.iter().chain(missing).all(|&column| column < self.features);
        if !is_known {
            let why = "a column for training only is none of a user or a request";
            return Err(Error::Config(why.into()));
        }
        if self.actions > MAX_ACTIONS || self.values > MAX_VALUES {
            return Err(Error::Config(format!(
                "{} actions and {} values; at most {MAX_ACTIONS} and {MAX_VALUES} fit",
                self.actions, self.values
            )));
        }
        self.validate_alignments()
    }
}
