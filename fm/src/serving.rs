//! The model in the form that serving runs: weights are prepared once, new history tokens extend an
//! encoded history, and targets attend to it.
//!
//! The results equal those of [`FmModel`] up to rounding. There are no gradients and no dropout.
//! The caller decides which history tokens are new.

use std::sync::Arc;

use burn::{
    module::Param,
    nn::LayerNorm,
    tensor::{Tensor, ops::FloatTensor},
};
pub use hypercast_kernels::serving::ServingBackend;
use hypercast_kernels::{
    attention::{HstuAttention, HstuInputs, primitive, tensor},
    dense::{GateInputs, NormWeights, PreparedLinear},
    history::{KeptHistory, KeptLayer},
};

use crate::{
    batch::FmBatch,
    history::EncodedHistory,
    hstu::{EPSILON, HstuLayer, affine},
    model::{BatchAttention, EmbeddedBatch, FmModel, ModelOutput},
};

/// The model in two passes: encode histories once, then score targets against them (M-FALCON, arXiv
/// 2402.17152, section 3.4). Together they equal [`FmModel::forward`] up to rounding.
#[derive(Debug)]
pub struct ServingModel<B: ServingBackend> {
    /// The unprepared model, for tokens, the TAE and the heads.
    pub(crate) model: FmModel<B>,
    layers: Vec<ServingLayer<B>>,
}

impl<B: ServingBackend> ServingModel<B> {
    /// Prepares the weights of a trained model.
    pub fn new(model: FmModel<B>) -> Self {
        let layers = model.layers.iter().map(ServingLayer::new).collect();
        Self { model, layers }
    }

    /// Encodes the batch's history tokens and appends them to the encoded history of each request.
    ///
    /// # Panics
    /// If the batch has a target, or another number of requests than `histories`.
    pub fn encode(
        &self,
        embedded: EmbeddedBatch<B>,
        batch: &FmBatch,
        attention: &BatchAttention,
        histories: &mut [&mut EncodedHistory<B>],
    ) {
        assert_eq!((batch.targets(), histories.len()), (0, attention.inner_layers.requests()));
        let new = batch.history_tokens();
        let mut x = self.model.tokens(embedded, batch, new, new);
        for (b, history) in histories.iter_mut().enumerate() {
            let rows = attention.inner_layers.request(b).history;
            history.times_s.extend_from_slice(&batch.times_s[rows]);
            history.layers.resize_with(self.layers.len(), Default::default);
        }
        for (at, layer) in self.layers.iter().enumerate() {
            let mut kept: Vec<GrowingHistory<'_, B>> = histories
                .iter_mut()
                .map(|history| GrowingHistory {
                    layer: &mut history.layers[at],
                    times_s: if attention.has_time_bias() { &history.times_s } else { &[] },
                })
                .collect();
            if at + 1 == self.layers.len() {
                layer.extend_last(x.clone(), &mut kept, &attention.inner_layers);
            } else {
                x = layer.extend(x, &mut kept, &attention.inner_layers);
            }
        }
    }

    /// The outputs for the batch's targets over encoded histories.
    ///
    /// # Panics
    /// If the batch has a history token, or another number of requests than `histories`.
    pub fn score(
        &self,
        embedded: EmbeddedBatch<B>,
        batch: &FmBatch,
        attention: &BatchAttention,
        histories: &[&EncodedHistory<B>],
    ) -> ModelOutput<B> {
        assert_eq!(
            (batch.history_tokens(), histories.len()),
            (0, attention.inner_layers.requests())
        );
        let mut x = self.model.tokens(embedded, batch, 0, batch.targets());
        let none = B::Kept::default();
        for (at, layer) in self.layers.iter().enumerate() {
            let kept: Vec<KeptHistory<'_, B::Kept>> = histories
                .iter()
                .map(|history| KeptHistory {
                    layer: history.layers.get(at).unwrap_or(&none),
                    times_s: if attention.has_time_bias() { &history.times_s } else { &[] },
                })
                .collect();
            x = layer.score(x, &kept, &attention.inner_layers);
        }
        self.model.outputs(x)
    }
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

/// A request's encoded history at one layer, to which tokens are appended.
pub struct GrowingHistory<'a, B: ServingBackend> {
    /// The keys and values.
    pub layer: &'a mut B::Kept,
    /// `[n]`: the times of all tokens, including the new ones; empty without a time bias.
    pub times_s: &'a [i64],
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

    /// Maps new history tokens `[H, dim]` to the same shape and appends their keys and values to
    /// `kept`, one entry per request. `attention` must have no targets.
    pub fn extend(
        &self,
        x: Tensor<B, 2>,
        kept: &mut [GrowingHistory<'_, B>],
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let [u, q, v, k] = self.project(&x);
        append_history(&k, &v, kept, attention);
        let kept: Vec<_> = kept
            .iter()
            .map(|kept| KeptHistory { layer: &*kept.layer, times_s: kept.times_s })
            .collect();
        self.attend(x, [u, q, v, k], &kept, attention)
    }

    /// As [`ServingLayer::extend`] for the last layer, where the outputs of history tokens are
    /// unused.
    pub fn extend_last(
        &self,
        x: Tensor<B, 2>,
        kept: &mut [GrowingHistory<'_, B>],
        attention: &Arc<HstuAttention>,
    ) {
        let past = tensor::<B, 2>(self.vk.mix(primitive(x), self.norm_in.clone()));
        let k = past.clone().narrow(1, self.v_width, self.qk_width);
        append_history(&k, &past.narrow(1, 0, self.v_width), kept, attention);
    }

    /// Maps targets `[R, dim]` to the same shape, over encoded histories. `attention` must have no
    /// history tokens.
    pub fn score(
        &self,
        x: Tensor<B, 2>,
        kept: &[KeptHistory<'_, B::Kept>],
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let mixed = self.project(&x);
        self.attend(x, mixed, kept, attention)
    }

    /// The tokens' U, Q, V and K.
    fn project(&self, x: &Tensor<B, 2>) -> [Tensor<B, 2>; 4] {
        let mixed = tensor::<B, 2>(self.uvqk.mix(primitive(x.clone()), self.norm_in.clone()));
        let (v, qk) = (self.v_width, self.qk_width);
        [(0, v), (v, qk), (v + qk, v), (2 * v + qk, qk)]
            .map(|(from, width)| mixed.clone().narrow(1, from, width))
    }

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

/// Appends the new tokens' keys and values to the histories.
fn append_history<B: ServingBackend>(
    k: &Tensor<B, 2>,
    v: &Tensor<B, 2>,
    kept: &mut [GrowingHistory<'_, B>],
    attention: &HstuAttention,
) {
    let mut layers: Vec<_> = kept.iter_mut().map(|kept| &mut *kept.layer).collect();
    B::Kept::keep(primitive(k.clone()), primitive(v.clone()), attention, &mut layers);
}

fn norm<B: ServingBackend>(norm: &LayerNorm<B>) -> NormWeights<FloatTensor<B>> {
    NormWeights { affine: affine(norm).map(primitive), epsilon: EPSILON as f32 }
}
