//! What the FM is told: its size ([`FmConfig`], an operator's choice) and its
//! data ([`FmSpec`], derived from the schema). Both are stored in checkpoints.
//!
//! Nothing here reads files or tensors.

use std::collections::BTreeMap;

use hypercast_store::RowFormat;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, example::MAX_VALUES, sampling::HistoryWindow};

/// The FM's size and training settings: the `[fm]` table of `hypercast.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FmConfig {
    /// Model width d.
    pub dim: usize,
    /// HSTU layers.
    pub layers: usize,
    /// Attention heads a layer.
    pub heads: usize,
    /// Width of Q and K a head.
    pub qk_dim: usize,
    /// Width of V and U a head.
    pub v_dim: usize,
    /// Width of one sparse embedding row.
    pub embedding_dim: usize,
    /// Width of the TAE; 0 takes `dim` without a projection.
    pub tae_dim: usize,
    /// The longest history that is read, in events; also the constant N_max that normalises attention.
    pub max_history: usize,
    /// Of how many of its oldest events a history of that length begins at one which stays its beginning while new
    /// events come, so that a kept history can be extended; 0 begins at the oldest.
    pub history_anchors: usize,
    /// The most targets in one training request; longer ones are cut into several.
    pub max_targets: usize,
    /// Scale of the scores.
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
    /// Requests a training batch.
    pub batch_requests: usize,
    /// Learning rate of the dense weights (AdamW).
    pub learning_rate: f64,
    /// Learning rate of the sparse embeddings (row-wise Adagrad).
    pub sparse_learning_rate: f32,
    /// Uniform range of a new embedding row.
    pub sparse_init: f32,
    /// A sparse row begins when its key is seen this often in training; 1 is at once. Until then it is zeros.
    pub admit_after: u8,
    /// A sparse row that did not learn for so many steps is removed; 0 is never.
    pub expire_after_steps: u32,
    /// How a checkpoint keeps sparse rows.
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
    /// Share of the old in each step of the running average of the dense weights, which predicts in
    /// their place; 0 for none.
    pub average_decay: f64,
    /// Passes over the events whose times are not known, before the stream.
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
            history_anchors: 0,
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
    /// 1 / √qk_dim.
    InverseSqrt,
    /// 1.
    One,
}

impl FmConfig {
    /// Width of the TAE.
    pub fn tae_width(&self) -> usize {
        if self.tae_dim == 0 { self.dim } else { self.tae_dim }
    }

    /// What is read of a history.
    pub fn history_window(&self) -> HistoryWindow {
        HistoryWindow { longest: self.max_history, anchors: self.history_anchors }
    }

    /// Width of a user embedding: the state of a history token before the first layer and after each.
    pub fn user_state_width(&self) -> usize {
        (self.layers + 1) * self.dim
    }

    /// Whether the pass that learns is not the one that predicts.
    pub(crate) fn predicts_apart(&self) -> bool {
        self.dropout > 0.0 || self.average_decay > 0.0
    }

    /// α of the layers.
    pub fn alpha_value(&self) -> f32 {
        match self.alpha {
            Alpha::InverseSqrt => 1.0 / (self.qk_dim as f32).sqrt(),
            Alpha::One => 1.0,
        }
    }

    /// What a token takes in memory in a pass that learns, about: the activations that its backward
    /// needs, and their gradients.
    pub(crate) fn bytes_a_token(&self) -> usize {
        let mixed = 2 * self.heads * (self.qk_dim + self.v_dim);
        let layer = 4 * mixed + 6 * self.dim;
        4 * (self.layers * layer + 8 * self.dim + 16 * self.embedding_dim)
    }

    /// Checks that the numbers can make a model.
    ///
    /// # Errors
    /// Names the first key that cannot work and the range that can.
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
        for (key, value) in positive {
            if value == 0 || value > 1 << 16 {
                return Err(Error::Config(format!(
                    "fm.{key} is {value}; it must be between 1 and 65536"
                )));
            }
        }
        if self.admit_after == 0 {
            return Err(Error::Config(
                "fm.admit_after is 0; it must be between 1 (at once) and 255".into(),
            ));
        }
        if self.history_anchors > self.max_history {
            return Err(Error::Config(format!(
                "fm.history_anchors is {}; it must be at most fm.max_history, {}",
                self.history_anchors, self.max_history
            )));
        }
        if !(0.0..1.0).contains(&self.average_decay) {
            return Err(Error::Config(format!(
                "fm.average_decay is {}; it must be at least 0 and below 1",
                self.average_decay
            )));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::Config(format!(
                "fm.dropout is {}; it must be at least 0 and below 1",
                self.dropout
            )));
        }
        if self.learning_rate <= 0.0 || self.sparse_learning_rate <= 0.0 {
            return Err(Error::Config(
                "fm.learning_rate and fm.sparse_learning_rate must be above 0".into(),
            ));
        }
        if !(self.stochastic_length_alpha > 0.0 && self.stochastic_length_alpha <= 2.0) {
            return Err(Error::Config(format!(
                "fm.stochastic_length_alpha is {}; it must be above 0 and at most 2, which is off",
                self.stochastic_length_alpha
            )));
        }
        if let Some((surface, keep)) =
            self.sample_negatives.iter().find(|&(_, &keep)| !(keep > 0.0 && keep <= 1.0))
        {
            return Err(Error::Config(format!(
                "fm.sample_negatives.{surface} is {keep}; it must be above 0 and at most 1"
            )));
        }
        Ok(())
    }

    /// Checks that every surface that is named is one of the data's.
    ///
    /// # Errors
    /// Names the unknown surface and those there are.
    pub fn validate_for(&self, spec: &FmSpec) -> Result<()> {
        match self.sample_negatives.keys().find(|name| !spec.surfaces.contains(name)) {
            Some(name) => Err(Error::Config(format!(
                "fm.sample_negatives: no surface is called {name:?}; there are: {}",
                spec.surfaces.join(", ")
            ))),
            None => Ok(()),
        }
    }
}

/// The data that an FM is made for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmSpec {
    /// Surfaces by name.
    pub surfaces: Vec<String>,
    /// How many actions an outcome has.
    pub actions: usize,
    /// How many real-valued outcomes.
    pub values: usize,
    /// Categorical features of an item.
    pub item_ids: usize,
    /// Dense features of an item.
    pub item_dense: usize,
    /// Numeric columns of a target (`Target::features`): the auxiliary features of the alignment modules, and of
    /// targets' tokens where the configuration has `candidate_columns`.
    pub features: usize,
    /// Which of `Target::ids` describe the user and the request, and not the item: indices.
    pub profile_ids: Vec<usize>,
    /// What is predicted; main tasks first.
    pub tasks: Vec<TaskSpec>,
    /// Width of an item's content vector; 0 for none.
    #[serde(default)]
    pub content: usize,
}

/// One task of the MTML objective (eq. 3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Its name.
    pub name: String,
    /// Shared by all surfaces, through the multi-task module; else through alignment modules.
    pub main: bool,
    /// Where its label comes from, which also says binary or regression.
    pub label: Label,
    /// For each surface, whether the task is valid there.
    pub surfaces: Vec<bool>,
    /// ω of the task.
    pub weight: f32,
}

/// Where a task's label comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// A binary task: whether this action happened.
    Action(usize),
    /// A regression: this real-valued outcome.
    Value(usize),
}

impl FmSpec {
    /// The main tasks, which come first.
    pub fn main_tasks(&self) -> &[TaskSpec] {
        &self.tasks[..self.tasks.iter().take_while(|task| task.main).count()]
    }

    /// The auxiliary tasks.
    pub fn auxiliary_tasks(&self) -> &[TaskSpec] {
        &self.tasks[self.main_tasks().len()..]
    }

    /// Categorical fields of a token: item id, its features, surface, hour of the day, gap to the event before.
    pub fn token_fields(&self) -> usize {
        1 + self.item_ids + 3
    }

    /// Numbers that describe an outcome: two an action (yes, no), two a value (number, known).
    pub fn outcome_width(&self) -> usize {
        2 * self.actions + 2 * self.values
    }

    /// Checks the order and the limits.
    ///
    /// # Errors
    /// Names what is out of order.
    pub fn validate(&self) -> Result<()> {
        if self.main_tasks().is_empty() {
            return Err(Error::Config(
                "the schema has no main task; the FM needs at least one".into(),
            ));
        }
        if self.auxiliary_tasks().iter().any(|task| task.main) {
            return Err(Error::Config("main tasks must come before auxiliary ones".into()));
        }
        if self.actions > 32 || self.values > MAX_VALUES {
            return Err(Error::Config(format!(
                "{} actions and {} values; at most 32 and {MAX_VALUES} fit",
                self.actions, self.values
            )));
        }
        Ok(())
    }
}
