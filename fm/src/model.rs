//! The model proper: token embedding (eq. 1, 2) → HSTU layers → TAE → the
//! multi-task module of the main tasks.
//!
//! This is all that a server needs; the alignment modules, which only training
//! needs, are in [`crate::alignment`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use hypercast_kernels::{
    attention::{HstuAttention, HstuBackend, Window},
    mlp::{MlpInputs, Weights, mlp},
};

use crate::{
    Error, Result,
    batch::Batch,
    chance::mix,
    hstu::HstuLayer,
    spec::{FmConfig, FmSpec},
};

/// The FM without its alignment modules.
#[derive(Module, Debug)]
pub struct FmModel<B: Backend> {
    token_hidden: Linear<B>,
    token_output: Linear<B>,
    outcome: Option<Linear<B>>,
    candidate: Option<Candidate<B>>,
    pub(crate) layers: Vec<HstuLayer<B>>,
    tae: Option<Linear<B>>,
    head: MultiTask<B>,
}

/// What is known of a candidate besides its item: the request's numeric columns (counters, durations) and the user's
/// categories. It is added to a target's token; histories have none, so cached history states stay valid.
#[derive(Module, Debug)]
pub struct Candidate<B: Backend> {
    hidden: Linear<B>,
    output: Linear<B>,
    /// What a linear model would make of the columns reaches the token as it is: counters say most of it.
    direct: Linear<B>,
}

/// The sparse rows of a batch, gathered.
#[derive(Debug, Clone)]
pub struct Embedded<B: Backend> {
    /// `[H + R, fields * embedding_dim]`.
    pub tokens: Tensor<B, 2>,
    /// `[R, profile_ids * embedding_dim]`, where the model reads candidates' columns and the schema has profiles.
    pub profiles: Option<Tensor<B, 2>>,
}

/// The "simple multi-task module" on the TAE.
#[derive(Module, Debug)]
pub struct MultiTask<B: Backend> {
    norm: LayerNorm<B>,
    hidden: Linear<B>,
    output: Linear<B>,
    /// So that most of what the TAE knows of a task can be read off it by a linear layer, an expert's too.
    direct: Linear<B>,
}

/// What the model gives for the R targets of a batch.
#[derive(Debug)]
pub struct Forward<B: Backend> {
    /// `[R, tae]`.
    pub tae: Tensor<B, 2>,
    /// `[R, main tasks]`: logits, or values of regressions.
    pub main: Tensor<B, 2>,
}

/// Held while weights are drawn: a backend has one generator for all threads, and a seed means the same weights only
/// while nobody else draws.
pub(crate) fn drawing() -> MutexGuard<'static, ()> {
    static DRAWING: Mutex<()> = Mutex::new(());
    DRAWING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> FmModel<B> {
    /// Fresh weights, from the backend's seed.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let (dim, tae) = (config.dim, config.tae_width());
        let token = spec.token_fields() * config.embedding_dim + spec.item_dense + spec.content;
        let candidate = match config.candidate_columns {
            true => spec.profile_ids.len() * config.embedding_dim + spec.features,
            false => 0,
        };
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        Self {
            token_hidden: linear(token, dim),
            token_output: linear(dim, dim),
            outcome: (spec.outcome_width() > 0).then(|| {
                LinearConfig::new(spec.outcome_width(), dim).with_bias(false).init(device)
            }),
            candidate: (candidate > 0).then(|| Candidate {
                hidden: linear(candidate, 2 * dim),
                output: linear(2 * dim, dim),
                direct: LinearConfig::new(candidate, dim).with_bias(false).init(device),
            }),
            layers: (0..config.layers).map(|_| HstuLayer::new(config, device)).collect(),
            tae: (config.tae_dim != 0).then(|| linear(dim, tae)),
            head: MultiTask {
                norm: LayerNormConfig::new(tae).init(device),
                hidden: linear(tae, dim),
                output: linear(dim, spec.main_tasks().len()),
                direct: LinearConfig::new(tae, spec.main_tasks().len())
                    .with_bias(false)
                    .init(device),
            },
        }
    }
}

impl<B: HstuBackend> FmModel<B> {
    /// `embedded` are the gathered sparse rows of the batch's keys.
    pub fn forward(
        &self,
        embedded: Embedded<B>,
        batch: &Batch,
        attention: &Attention,
    ) -> Forward<B> {
        let (history, targets) = (batch.history_tokens(), batch.targets());
        let mut x = self.tokens(embedded, batch, history, history + targets);
        let (last, others) = self.layers.split_last().expect("a model has a layer");
        let noise = |layer: usize| mix(&[batch.noise, layer as u64]);
        for (at, layer) in others.iter().enumerate() {
            x = layer.forward(x, &attention.whole, noise(at));
        }
        let output = last.forward(x, &attention.targets, noise(others.len()));
        self.said(output)
    }

    /// TAEs and main tasks from the last layer's output.
    pub(crate) fn said(&self, output: Tensor<B, 2>) -> Forward<B> {
        let tae = match &self.tae {
            Some(projection) => projection.forward(output),
            None => output,
        };
        let main = self.head.forward(tae.clone());
        Forward { tae, main }
    }

    /// The states of every request's last history token, of the token itself and after each layer:
    /// `[requests with a history, (layers + 1) * dim]`. The batch must have a history and no target.
    pub fn user_states(
        &self,
        embedded: Embedded<B>,
        batch: &Batch,
        attention: &Attention,
    ) -> Tensor<B, 2> {
        let (history, targets) = (batch.history_tokens(), batch.targets());
        assert!(history > 0 && targets == 0, "user states are those of histories");
        let last: Vec<i64> = batch
            .history_offsets
            .windows(2)
            .filter(|ends| ends[1] > ends[0])
            .map(|ends| i64::from(ends[1]) - 1)
            .collect();
        let count = last.len();
        let device = embedded.tokens.device();
        let last = Tensor::<B, 1, Int>::from_data(TensorData::new(last, [count]), &device);
        let mut x = self.tokens(embedded, batch, history, history);
        let mut states = vec![x.clone().select(0, last.clone())];
        for layer in &self.layers {
            x = layer.forward(x, &attention.whole, batch.noise);
            states.push(x.clone().select(0, last.clone()));
        }
        Tensor::cat(states, 1)
    }

    /// Eq. 1 for histories and eq. 2 for targets.
    pub(crate) fn tokens(
        &self,
        embedded: Embedded<B>,
        batch: &Batch,
        history: usize,
        total: usize,
    ) -> Tensor<B, 2> {
        let Embedded { tokens: embeddings, profiles } = embedded;
        let device = embeddings.device();
        let dense = batch.dense.len() / total;
        let input = if dense > 0 {
            let data = TensorData::new(batch.dense.clone(), [total, dense]);
            Tensor::cat(vec![embeddings, Tensor::from_data(data, &device)], 1)
        } else {
            embeddings
        };
        let content = through(input, [&self.token_hidden, &self.token_output]);
        if self.outcome.is_none() && self.candidate.is_none() {
            return content;
        }
        let nothing = |rows: usize| Tensor::zeros([rows, content.dims()[1]], &device);
        let past = (history > 0).then(|| {
            let Some(outcome) = &self.outcome else { return nothing(history) };
            let shape = [history, batch.outcomes.len() / history];
            outcome
                .forward(Tensor::from_data(TensorData::new(batch.outcomes.clone(), shape), &device))
        });
        let targets = (total > history).then(|| match &self.candidate {
            Some(candidate) => candidate.forward(profiles, batch, &device),
            None => nothing(total - history),
        });
        let known = Tensor::cat(past.into_iter().chain(targets).collect(), 0);
        content + known
    }
}

/// Two linear layers with an activation between them.
pub(crate) fn through<B: HstuBackend>(
    x: Tensor<B, 2>,
    [hidden, output]: [&Linear<B>; 2],
) -> Tensor<B, 2> {
    let weights = |linear: &Linear<B>| Weights {
        weight: linear.weight.val(),
        bias: linear.bias.as_ref().expect("made with a bias").val(),
    };
    mlp(MlpInputs { x, hidden: weights(hidden), output: weights(output) })
}

impl<B: HstuBackend> Candidate<B> {
    fn forward(
        &self,
        profiles: Option<Tensor<B, 2>>,
        batch: &Batch,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let shape = [batch.targets(), batch.features.len() / batch.targets()];
        let columns = || TensorData::new(batch.features.clone(), shape);
        let features = (shape[1] > 0).then(|| Tensor::from_data(columns(), device));
        let input = Tensor::cat(features.into_iter().chain(profiles).collect(), 1);
        through(input.clone(), [&self.hidden, &self.output]) + self.direct.forward(input)
    }
}

impl<B: HstuBackend> MultiTask<B> {
    fn forward(&self, tae: Tensor<B, 2>) -> Tensor<B, 2> {
        let tae = self.norm.forward(tae);
        through(tae.clone(), [&self.hidden, &self.output]) + self.direct.forward(tae)
    }
}

/// The attention of a batch: of its inner layers, and of the last.
#[derive(Debug, Clone)]
pub struct Attention {
    pub(crate) whole: Arc<HstuAttention>,
    targets: Arc<HstuAttention>,
}

impl Attention {
    /// Whether there is a time bias.
    pub(crate) fn timed(&self) -> bool {
        self.whole.times_s.is_some()
    }
}

/// The attention of a batch under a configuration.
///
/// # Errors
/// Offsets that do not fit each other.
pub fn attention(config: &FmConfig, batch: &Batch) -> Result<Attention> {
    let whole = HstuAttention {
        history_offsets: batch.history_offsets.clone(),
        target_offsets: batch.target_offsets.clone(),
        heads: config.heads,
        alpha: config.alpha_value(),
        norm: config.max_history as f32,
        window: (config.window > 0)
            .then_some(Window { recent: config.window, global: config.global }),
        targets_only: false,
        times_s: (config.time_buckets > 0).then(|| batch.times_s.clone()),
    };
    let targets = HstuAttention { targets_only: true, ..whole.clone() };
    let checked = |attention: HstuAttention| {
        attention.checked().map_err(|error| Error::Config(error.to_string()))
    };
    Ok(Attention { whole: checked(whole)?, targets: checked(targets)? })
}
