//! The model proper: token embedding (eq. 1, 2) → HSTU layers → TAE → the multi-task module of the
//! main tasks.
//!
//! This is all that serving needs. The alignment modules, which only training needs, are in
//! [`crate::alignment`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Int, Tensor, TensorData, activation::silu, backend::Backend},
};
use hypercast_kernels::{
    attention::{AttentionWindow, HstuAttention, HstuBackend},
    mlp::{LinearWeights, MlpInputs, mlp},
};

use crate::{
    Error, Result,
    batch::FmBatch,
    hstu::HstuLayer,
    serving_batch::ServingBatch,
    spec::{FmConfig, FmSpec},
};
use hypercast_core::hash::mix_parts;

/// The FM without its alignment modules.
#[derive(Module, Debug)]
pub struct FmModel<B: Backend> {
    pub(crate) token_hidden: Linear<B>,
    pub(crate) token_output: Linear<B>,
    pub(crate) outcome: Option<Linear<B>>,
    pub(crate) candidate: Option<CandidateEncoder<B>>,
    pub(crate) layers: Vec<HstuLayer<B>>,
    pub(crate) tae: Option<Linear<B>>,
    pub(crate) head: MultiTaskHead<B>,
}

/// Encodes what is known of a candidate besides its item: the request's numeric columns (counters,
/// durations) and the user's categories. The result is added to the target's token. History tokens
/// have no such term, so cached histories stay valid.
#[derive(Module, Debug)]
pub struct CandidateEncoder<B: Backend> {
    pub(crate) hidden: Linear<B>,
    pub(crate) output: Linear<B>,
    /// A linear path beside the hidden layer, because most of what counters tell is linear.
    pub(crate) direct: Linear<B>,
}

/// The sparse rows of a batch, gathered by token.
#[derive(Debug, Clone)]
pub struct EmbeddedBatch<B: Backend> {
    /// `[H + R, fields * embedding_dim]`.
    pub tokens: Tensor<B, 2>,
    /// `[R, profile fields * embedding_dim]`, if the model has `candidate_columns` and the data has
    /// profile columns.
    pub profiles: Option<Tensor<B, 2>>,
}

/// The rows of a batch's distinct keys on a device, `[keys, embedding_dim]`.
pub(crate) fn rows_of<B: Backend>(batch: &FmBatch, rows: Vec<f32>) -> Tensor<B, 2> {
    let shape = [batch.keys.len(), rows.len() / batch.keys.len()];
    Tensor::from_data(TensorData::new(rows, shape), &B::Device::default())
}

impl<B: HstuBackend> EmbeddedBatch<B> {
    /// Lays out `rows` `[keys, embedding_dim]`, those of the batch's distinct keys, by token. So
    /// each goes to a device once, and so does its gradient come back.
    pub(crate) fn new(batch: &FmBatch, rows: &Tensor<B, 2>) -> Self {
        let FmBatch { token_fields, profile_fields, key_index, profile_index, .. } = batch;
        Self {
            tokens: token_fields.embedded(key_index, rows),
            profiles: (!profile_index.is_empty())
                .then(|| profile_fields.embedded(profile_index, rows)),
        }
    }
}

/// The "simple multi-task module" on the TAE.
#[derive(Module, Debug)]
pub struct MultiTaskHead<B: Backend> {
    pub(crate) norm: LayerNorm<B>,
    pub(crate) hidden: Linear<B>,
    pub(crate) output: Linear<B>,
    /// A linear path beside the hidden layer. It makes the TAE linearly informative about each
    /// task, which also helps experts.
    pub(crate) direct: Linear<B>,
}

/// The model's outputs for the R targets of a batch.
#[derive(Debug)]
pub struct ModelOutput<B: Backend> {
    /// `[R, tae_width]`.
    pub tae: Tensor<B, 2>,
    /// `[R, main tasks]`: logits, or values of regressions.
    pub main: Tensor<B, 2>,
}

/// Locks the backend's random generator while weights are drawn. All threads share one generator,
/// so a seed gives the same weights only if no other thread draws in between.
pub(crate) fn lock_weight_rng() -> MutexGuard<'static, ()> {
    static DRAWING: Mutex<()> = Mutex::new(());
    DRAWING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> FmModel<B> {
    /// A model with newly drawn weights, from the backend's seed.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let (dim, tae) = (config.dim, config.tae_width());
        let token = spec.token_fields() * config.embedding_dim + spec.item_numbers() + spec.content;
        let (candidate, tasks) = (spec.candidate_width(config), spec.main_tasks().len());
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let unbiased = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        Self {
            token_hidden: linear(token, dim),
            token_output: linear(dim, dim),
            outcome: (spec.outcome_width() > 0).then(|| unbiased(spec.outcome_width(), dim)),
            candidate: (candidate > 0).then(|| CandidateEncoder {
                hidden: linear(candidate, 2 * dim),
                output: linear(2 * dim, dim),
                direct: unbiased(candidate, dim),
            }),
            layers: (0..config.layers).map(|_| HstuLayer::new(config, device)).collect(),
            tae: (config.tae_dim != 0).then(|| linear(dim, tae)),
            head: MultiTaskHead {
                norm: LayerNormConfig::new(tae).init(device),
                hidden: linear(tae, dim),
                output: linear(dim, tasks),
                direct: unbiased(tae, tasks),
            },
        }
    }
}

impl<B: HstuBackend> FmModel<B> {
    /// The outputs for the batch's targets; `embedded` are the sparse rows of the batch's keys.
    pub fn forward(
        &self,
        embedded: EmbeddedBatch<B>,
        batch: &FmBatch,
        attention: &BatchAttention,
    ) -> ModelOutput<B> {
        let (history, targets) = (batch.history_tokens(), batch.targets());
        let mut x = self.tokens(embedded, batch, history, history + targets);
        let (last, others) = self.layers.split_last().expect("a model has at least one layer");
        let dropout_seed = |layer: usize| mix_parts(&[batch.dropout_seed, layer as u64]);
        for (at, layer) in others.iter().enumerate() {
            x = layer.forward(x, &attention.inner_layers, dropout_seed(at));
        }
        let output = last.forward(x, &attention.last_layer, dropout_seed(others.len()));
        self.outputs(output)
    }

    /// TAEs and main tasks from the last layer's output.
    pub(crate) fn outputs(&self, output: Tensor<B, 2>) -> ModelOutput<B> {
        let tae = match &self.tae {
            Some(projection) => projection.forward(output),
            None => output,
        };
        let main = self.head.forward(tae.clone());
        ModelOutput { tae, main }
    }

    /// The states of every request's last history token, before the first layer and after each
    /// layer: `[requests with a history, (layers + 1) * dim]`.
    ///
    /// # Panics
    /// If the batch has a target or no history token.
    pub fn user_states(
        &self,
        embedded: EmbeddedBatch<B>,
        batch: &FmBatch,
        attention: &BatchAttention,
    ) -> Tensor<B, 2> {
        let (history, targets) = (batch.history_tokens(), batch.targets());
        assert!(history > 0 && targets == 0, "user states need history tokens and no target");
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
            x = layer.forward(x, &attention.inner_layers, batch.dropout_seed);
            states.push(x.clone().select(0, last.clone()));
        }
        Tensor::cat(states, 1)
    }

    /// Eq. 1 for histories and eq. 2 for targets.
    pub(crate) fn tokens(
        &self,
        embedded: EmbeddedBatch<B>,
        batch: &FmBatch,
        history: usize,
        total: usize,
    ) -> Tensor<B, 2> {
        let EmbeddedBatch { tokens: embeddings, profiles } = embedded;
        let device = embeddings.device();
        let dense = batch.dense.len() / total;
        let input = if dense > 0 {
            let data = TensorData::new(batch.dense.clone(), [total, dense]);
            Tensor::cat(vec![embeddings, Tensor::from_data(data, &device)], 1)
        } else {
            embeddings
        };
        let content = mlp_forward(input, [&self.token_hidden, &self.token_output]);
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

/// Two linear layers with a SiLU between them.
pub(crate) fn mlp_forward<B: HstuBackend>(
    x: Tensor<B, 2>,
    [hidden, output]: [&Linear<B>; 2],
) -> Tensor<B, 2> {
    mlp(MlpInputs { x, hidden: weights_of(hidden), output: weights_of(output) })
}

/// The weights of a layer that has a bias.
pub(crate) fn weights_of<B: Backend>(
    linear: &Linear<B>,
) -> LinearWeights<Tensor<B, 2>, Tensor<B, 1>> {
    let bias = linear.bias.as_ref().expect("created with a bias").val();
    LinearWeights { weight: linear.weight.val(), bias }
}

impl<B: HstuBackend> CandidateEncoder<B> {
    fn forward(
        &self,
        profiles: Option<Tensor<B, 2>>,
        batch: &FmBatch,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let shape = [batch.targets(), batch.features.len() / batch.targets()];
        let columns = || TensorData::new(batch.features.clone(), shape);
        let features = (shape[1] > 0).then(|| Tensor::from_data(columns(), device));
        let input = Tensor::cat(features.into_iter().chain(profiles).collect(), 1);
        mlp_forward(input.clone(), [&self.hidden, &self.output]) + self.direct.forward(input)
    }
}

impl<B: HstuBackend> FmModel<B> {
    /// The main tasks again, as far as they depend on the head's last layer alone: no gradient
    /// reaches what the tasks share.
    pub(crate) fn main_alone(&self, tae: Tensor<B, 2>) -> Tensor<B, 2> {
        let MultiTaskHead { norm, hidden, output, direct } = &self.head;
        let tae = norm.forward(tae.detach()).detach();
        let hidden = silu(hidden.forward(tae.clone())).detach();
        output.forward(hidden) + direct.forward(tae)
    }
}

impl<B: HstuBackend> MultiTaskHead<B> {
    fn forward(&self, tae: Tensor<B, 2>) -> Tensor<B, 2> {
        let tae = self.norm.forward(tae);
        mlp_forward(tae.clone(), [&self.hidden, &self.output]) + self.direct.forward(tae)
    }
}

/// The attention layouts of a batch: for all layers but the last, and for the last one, which
/// computes only targets.
#[derive(Debug, Clone)]
pub struct BatchAttention {
    pub(crate) inner_layers: Arc<HstuAttention>,
    last_layer: Arc<HstuAttention>,
}

/// The attention layouts of a batch under a configuration.
///
/// # Errors
/// Offsets that contradict each other.
pub fn batch_attention(config: &FmConfig, batch: &FmBatch) -> Result<BatchAttention> {
    let [history_offsets, target_offsets] = [&batch.history_offsets, &batch.target_offsets];
    let inner_layers = layer_attention(config, history_offsets, target_offsets, &batch.times_s);
    let last_layer = HstuAttention { targets_only: true, ..inner_layers.clone() };
    let [inner_layers, last_layer] = [checked(inner_layers)?, checked(last_layer)?];
    Ok(BatchAttention { inner_layers, last_layer })
}

/// The attention layout of a serving batch under a configuration.
///
/// # Errors
/// As [`batch_attention`].
pub(crate) fn serving_attention(
    config: &FmConfig,
    batch: &ServingBatch,
) -> Result<Arc<HstuAttention>> {
    let ServingBatch { history_offsets, target_offsets, times_s, .. } = batch;
    checked(layer_attention(config, history_offsets, target_offsets, times_s))
}

fn checked(attention: HstuAttention) -> Result<Arc<HstuAttention>> {
    attention.checked().map_err(|error| Error::Config(error.to_string()))
}

fn layer_attention(
    config: &FmConfig,
    history_offsets: &[u32],
    target_offsets: &[u32],
    times_s: &[i64],
) -> HstuAttention {
    HstuAttention {
        history_offsets: history_offsets.into(),
        target_offsets: target_offsets.into(),
        heads: config.heads,
        alpha: config.alpha_value(),
        norm: config.max_history as f32,
        window: (config.window > 0)
            .then_some(AttentionWindow { recent: config.window, global: config.global }),
        targets_only: false,
        times_s: (config.time_buckets > 0).then(|| times_s.into()),
    }
}
