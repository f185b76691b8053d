//! The model proper: token embedding (eq. 1, 2) → HSTU layers → TAE → the
//! multi-task module of the main tasks.
//!
//! This is all that a server needs; the alignment modules, which only training
//! needs, are in [`crate::alignment`].

use std::sync::Arc;

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, TensorData, activation::silu, backend::Backend},
};
use hypercast_kernels::attention::{HstuAttention, HstuBackend, Window};

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
    layers: Vec<HstuLayer<B>>,
    tae: Option<Linear<B>>,
    head: MultiTask<B>,
}

/// The "simple multi-task module" on the TAE.
#[derive(Module, Debug)]
pub struct MultiTask<B: Backend> {
    norm: LayerNorm<B>,
    hidden: Linear<B>,
    output: Linear<B>,
}

/// What the model gives for the R targets of a batch.
#[derive(Debug)]
pub struct Forward<B: Backend> {
    /// `[R, tae]`.
    pub tae: Tensor<B, 2>,
    /// `[R, main tasks]`: logits, or values of regressions.
    pub main: Tensor<B, 2>,
}

impl<B: Backend> FmModel<B> {
    /// Fresh weights, from the backend's seed.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let (dim, tae) = (config.dim, config.tae_width());
        let token = spec.token_fields() * config.embedding_dim + spec.item_dense + spec.content;
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        Self {
            token_hidden: linear(token, dim),
            token_output: linear(dim, dim),
            outcome: (spec.outcome_width() > 0).then(|| {
                LinearConfig::new(spec.outcome_width(), dim).with_bias(false).init(device)
            }),
            layers: (0..config.layers).map(|_| HstuLayer::new(config, device)).collect(),
            tae: (config.tae_dim != 0).then(|| linear(dim, tae)),
            head: MultiTask {
                norm: LayerNormConfig::new(tae).init(device),
                hidden: linear(tae, dim),
                output: linear(dim, spec.main_tasks().len()),
            },
        }
    }
}

impl<B: HstuBackend> FmModel<B> {
    /// `embeddings` `[H + R, fields * embedding_dim]` are the gathered sparse rows of the batch's keys.
    pub fn forward(
        &self,
        embeddings: Tensor<B, 2>,
        batch: &Batch,
        attention: &Attention,
    ) -> Forward<B> {
        let (history, targets) = (batch.history_tokens(), batch.targets());
        let mut x = self.tokens(embeddings, batch, history, history + targets);
        let (last, others) = self.layers.split_last().expect("a model has a layer");
        let noise = |layer: usize| mix(&[batch.noise, layer as u64]);
        for (at, layer) in others.iter().enumerate() {
            x = layer.forward(x, &attention.whole, noise(at));
        }
        let output = last.forward_targets(x, &attention.targets, noise(others.len()));
        let tae = match &self.tae {
            Some(projection) => projection.forward(output),
            None => output,
        };
        let main = self.head.forward(tae.clone());
        Forward { tae, main }
    }

    /// Eq. 1 for histories and eq. 2 for targets.
    fn tokens(
        &self,
        embeddings: Tensor<B, 2>,
        batch: &Batch,
        history: usize,
        total: usize,
    ) -> Tensor<B, 2> {
        let device = embeddings.device();
        let dense = batch.dense.len() / total;
        let input = if dense > 0 {
            let data = TensorData::new(batch.dense.clone(), [total, dense]);
            Tensor::cat(vec![embeddings, Tensor::from_data(data, &device)], 1)
        } else {
            embeddings
        };
        let content = self.token_output.forward(silu(self.token_hidden.forward(input)));
        let Some(outcome) = self.outcome.as_ref().filter(|_| history > 0) else { return content };
        let width = batch.outcomes.len() / history;
        let outcomes =
            Tensor::from_data(TensorData::new(batch.outcomes.clone(), [history, width]), &device);
        let past = content.clone().narrow(0, 0, history) + outcome.forward(outcomes);
        if history == total {
            return past;
        }
        Tensor::cat(vec![past, content.narrow(0, history, total - history)], 0)
    }
}

impl<B: Backend> MultiTask<B> {
    fn forward(&self, tae: Tensor<B, 2>) -> Tensor<B, 2> {
        self.output.forward(silu(self.hidden.forward(self.norm.forward(tae))))
    }
}

/// The attention of a batch: of its inner layers, and of the last.
#[derive(Debug, Clone)]
pub struct Attention {
    whole: Arc<HstuAttention>,
    targets: Arc<HstuAttention>,
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
