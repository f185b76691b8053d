//! The model in the form that serving runs: weights are prepared once, new history tokens extend an
//! encoded history, and targets attend to it.
//!
//! The results equal those of [`FmModel`] up to rounding. There are no gradients and no dropout.
//! The caller decides which history tokens are new.

use std::{ops::Range, sync::Arc};

use burn::{
    module::Param,
    nn::{LayerNorm, Linear},
    tensor::{Tensor, ops::FloatTensor},
};
pub use hypercast_kernels::serving::ServingBackend;
use hypercast_kernels::{
    attention::{HstuAttention, HstuInputs, primitive, tensor},
    dense::{GateInputs, NormWeights, PreparedLinear},
    history::{KeptHistory, KeptLayer},
    mlp::LinearWeights,
    prepared_mlp::{MlpRows, MlpWeights, PreparedMlp},
};

use crate::{
    history::EncodedHistory,
    hstu::{EPSILON, HstuLayer, affine},
    model::{FmModel, ModelOutput, weights_of},
    serving_batch::{ServingBatch, ServingInputs, SharedRanges},
};

/// The model in two passes: encode histories once, then score targets against them (M-FALCON, arXiv
/// 2402.17152, section 3.4). Together they equal [`FmModel::forward`] up to rounding.
#[derive(Debug)]
pub struct ServingModel<B: ServingBackend> {
    /// As it was trained: for updates, for joint passes, and for what needs no preparation.
    pub(crate) model: FmModel<B>,
    tokens: B::Mlp,
    candidate: Option<B::Mlp>,
    layers: Vec<ServingLayer<B>>,
    head: B::Mlp,
    pub(crate) shared: SharedRanges,
}

impl<B: ServingBackend> ServingModel<B> {
    /// Prepares the weights of a trained model.
    pub(crate) fn new(model: FmModel<B>, shared: SharedRanges) -> Self {
        let candidate = model
            .candidate
            .as_ref()
            .map(|own| mlp([&own.hidden, &own.output], Some(&own.direct), shared.profile.clone()));
        let head = &model.head;
        Self {
            tokens: mlp([&model.token_hidden, &model.token_output], None, shared.event.clone()),
            candidate,
            layers: model.layers.iter().map(ServingLayer::new).collect(),
            head: mlp([&head.hidden, &head.output], Some(&head.direct), 0..0),
            model,
            shared,
        }
    }

    /// Encodes the batch's history tokens and appends them to the encoded history of each request.
    ///
    /// # Panics
    /// If the batch has a target, or another number of requests than `histories`.
    pub(crate) fn encode(
        &self,
        inputs: ServingInputs<'_, B>,
        batch: &ServingBatch,
        attention: &Arc<HstuAttention>,
        histories: &mut [&mut EncodedHistory<B>],
    ) {
        assert_eq!((batch.targets(), histories.len()), (0, attention.requests()));
        let outcome = self.model.outcome.as_ref().zip(inputs.outcomes);
        let added = outcome.map(|(outcome, of)| primitive(outcome.forward(tensor::<B, 2>(of))));
        let tokens = MlpRows { added, ..inputs.tokens };
        let mut x = tensor::<B, 2>(self.tokens.forward(tokens));
        for (b, history) in histories.iter_mut().enumerate() {
            let rows = attention.request(b).history;
            history.times_s.extend_from_slice(&batch.times_s[rows]);
            history.layers.resize_with(self.layers.len(), Default::default);
        }
        for (at, layer) in self.layers.iter().enumerate() {
            // The outputs of the last layer's history tokens are unused.
            let mixed = (at + 1 < self.layers.len()).then(|| layer.project(&x));
            let [k, v] = match &mixed {
                Some([_, _, v, k]) => [k.clone(), v.clone()],
                None => layer.project_past(x.clone()),
            };
            let mut layers: Vec<_> =
                histories.iter_mut().map(|history| &mut history.layers[at]).collect();
            B::Kept::keep(primitive(k), primitive(v), attention, &mut layers);
            if let Some(mixed) = mixed {
                let kept: Vec<_> = histories
                    .iter()
                    .map(|history| KeptHistory {
                        layer: &history.layers[at],
                        times_s: &history.times_s,
                    })
                    .collect();
                x = layer.attend(x, mixed, &kept, attention);
            }
        }
    }

    /// The outputs for the batch's targets over encoded histories.
    ///
    /// # Panics
    /// If the batch has a history token, or another number of requests than `histories`.
    pub(crate) fn score(
        &self,
        inputs: ServingInputs<'_, B>,
        batch: &ServingBatch,
        attention: &Arc<HstuAttention>,
        histories: &[&EncodedHistory<B>],
    ) -> ModelOutput<B> {
        assert_eq!((batch.history_tokens(), histories.len()), (0, attention.requests()));
        let tokens = self.tokens.forward(inputs.tokens);
        let mut x = tensor::<B, 2>(match self.candidate.as_ref().zip(inputs.candidates) {
            Some((candidate, rows)) => candidate.forward(MlpRows { added: Some(tokens), ..rows }),
            None => tokens,
        });
        let none = B::Kept::default();
        for (at, layer) in self.layers.iter().enumerate() {
            let kept: Vec<_> = histories
                .iter()
                .map(|history| KeptHistory {
                    layer: history.layers.get(at).unwrap_or(&none),
                    times_s: &history.times_s,
                })
                .collect();
            let mixed = layer.project(&x);
            x = layer.attend(x, mixed, &kept, attention);
        }
        let tae = match &self.model.tae {
            Some(projection) => projection.forward(x),
            None => x,
        };
        let own = primitive(self.model.head.norm.forward(tae.clone()));
        let main = tensor(self.head.forward(MlpRows { own, shared: None, added: None }));
        ModelOutput { tae, main }
    }
}

/// Prepares two layers, and the linear path beside them.
fn mlp<B: ServingBackend>(
    [hidden, output]: [&Linear<B>; 2],
    direct: Option<&Linear<B>>,
    shared: Range<usize>,
) -> B::Mlp {
    let primitives = |linear: &Linear<B>| {
        let LinearWeights { weight, bias } = weights_of(linear);
        LinearWeights { weight: primitive(weight), bias: primitive(bias) }
    };
    let direct = direct.map(|direct| primitive(direct.weight.val()));
    let (hidden, output) = (primitives(hidden), primitives(output));
    B::Mlp::prepare(MlpWeights { hidden, output, direct }, shared)
}

/// A layer's prepared weights.
#[derive(Debug)]
pub struct ServingLayer<B: ServingBackend> {
    norm_in: NormWeights<FloatTensor<B>>,
    /// The projection to U, Q, V and K.
    uvqk: B::Prepared,
    /// The projection to V and K only, for the history tokens of the last layer.
    vk: B::Prepared,
    position: Option<FloatTensor<B>>,
    time: Option<FloatTensor<B>>,
    norm_out: NormWeights<FloatTensor<B>>,
    output: B::Prepared,
    qk_width: usize,
    v_width: usize,
}

impl<B: ServingBackend> ServingLayer<B> {
    /// Prepares the weights of a trained layer.
    pub fn new(layer: &HstuLayer<B>) -> Self {
        let (weight, bias) = (layer.uvqk.weight.val(), layer.uvqk.bias.as_ref().map(Param::val));
        let (qk_width, v_width) = (layer.qk_width, layer.v_width);
        let (from, width) = (v_width + qk_width, v_width + qk_width);
        let vk_bias = bias.clone().map(|bias| bias.narrow(0, from, width));
        Self {
            norm_in: norm(&layer.norm_in),
            vk: B::Prepared::prepare(
                primitive(weight.clone().narrow(1, from, width)),
                vk_bias.map(primitive),
            ),
            uvqk: B::Prepared::prepare(primitive(weight), bias.map(primitive)),
            position: layer.position.as_ref().map(|table| primitive(table.val())),
            time: layer.time.as_ref().map(|table| primitive(table.val())),
            norm_out: norm(&layer.norm_out),
            output: B::Prepared::prepare(primitive(layer.output.weight.val()), None),
            qk_width,
            v_width,
        }
    }

    /// The tokens' U, Q, V and K.
    fn project(&self, x: &Tensor<B, 2>) -> [Tensor<B, 2>; 4] {
        let mixed = tensor::<B, 2>(self.uvqk.mix(primitive(x.clone()), self.norm_in.clone()));
        let (v, qk) = (self.v_width, self.qk_width);
        [(0, v), (v, qk), (v + qk, v), (2 * v + qk, qk)]
            .map(|(from, width)| mixed.clone().narrow(1, from, width))
    }

    /// K and V alone.
    fn project_past(&self, x: Tensor<B, 2>) -> [Tensor<B, 2>; 2] {
        let past = tensor::<B, 2>(self.vk.mix(primitive(x), self.norm_in.clone()));
        [past.clone().narrow(1, self.v_width, self.qk_width), past.narrow(1, 0, self.v_width)]
    }

    /// The layer's output for tokens over encoded histories, which have the tokens of the batch.
    fn attend(
        &self,
        x: Tensor<B, 2>,
        [u, q, v, k]: [Tensor<B, 2>; 4],
        kept: &[KeptHistory<'_, B::Kept>],
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let inputs = HstuInputs {
            q: primitive(q),
            k: primitive(k),
            v: primitive(v),
            position: self.position.clone(),
            time: self.time.clone(),
        };
        let attended = B::Kept::attend(inputs, kept, attention);
        let gated = GateInputs { x: primitive(x), attended, u: primitive(u) };
        tensor(self.output.gate(gated, self.norm_out.clone()))
    }
}

fn norm<B: ServingBackend>(norm: &LayerNorm<B>) -> NormWeights<FloatTensor<B>> {
    NormWeights { affine: affine(norm).map(primitive), epsilon: EPSILON as f32 }
}
