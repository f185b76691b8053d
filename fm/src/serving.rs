//! The model as a server runs it: weights prepared once, history tokens that
//! join a kept history, targets that attend to it.
//!
//! It computes what [`FmModel`] computes, up to rounding, and has no gradients
//! and no dropout. The order of tokens is the batch's; which are new is decided above.

use std::sync::Arc;

use burn::{
    module::Param,
    nn::LayerNorm,
    tensor::{Tensor, TensorPrimitive, ops::FloatTensor},
};
use hypercast_kernels::{
    attention::{HstuAttention, HstuInputs},
    dense::{DenseBackend, Gated, Norm},
    history::{self, HistoryBackend, KeptHistory},
};

use crate::{
    batch::Batch,
    history::Encoded,
    hstu::{EPSILON, HstuLayer},
    model::{Attention, Embedded, FmModel, Forward},
};

/// A backend that a server can run on.
pub trait ServingBackend: HistoryBackend + DenseBackend {}

impl<B: HistoryBackend + DenseBackend> ServingBackend for B {}

/// The model in two passes: histories once, then targets over what is kept of them (M-FALCON, arXiv 2402.17152,
/// section 3.4). Together they give what [`FmModel::forward`] gives, up to rounding.
#[derive(Debug)]
pub struct ServingModel<B: ServingBackend> {
    /// What needs no preparation: tokens, the TAE, the heads.
    pub(crate) model: FmModel<B>,
    layers: Vec<ServingLayer<B>>,
}

impl<B: ServingBackend> ServingModel<B> {
    /// From trained weights.
    pub fn new(model: FmModel<B>) -> Self {
        let layers = model.layers.iter().map(ServingLayer::new).collect();
        Self { model, layers }
    }

    /// Encodes the batch's history tokens, which follow what is already encoded of each request. The batch has no
    /// target.
    pub fn encode(
        &self,
        embedded: Embedded<B>,
        batch: &Batch,
        attention: &Attention,
        histories: &mut [&mut Encoded<B>],
    ) {
        assert_eq!((batch.targets(), histories.len()), (0, attention.whole.requests()));
        let new = batch.history_tokens();
        let mut x = self.model.tokens(embedded, batch, new, new);
        for (b, history) in histories.iter_mut().enumerate() {
            let rows = attention.whole.request(b).history;
            history.times_s.extend_from_slice(&batch.times_s[rows]);
            history.layers.resize_with(self.layers.len(), Default::default);
        }
        for (at, layer) in self.layers.iter().enumerate() {
            let mut kept: Vec<Keeping<'_, B>> = histories
                .iter_mut()
                .map(|history| Keeping {
                    layer: &mut history.layers[at],
                    times_s: if attention.timed() { &history.times_s } else { &[] },
                })
                .collect();
            if at + 1 == self.layers.len() {
                layer.extend_last(x.clone(), &mut kept, &attention.whole);
            } else {
                x = layer.extend(x, &mut kept, &attention.whole);
            }
        }
    }

    /// What the batch's targets are over encoded histories. The batch has no history.
    pub fn score(
        &self,
        embedded: Embedded<B>,
        batch: &Batch,
        attention: &Attention,
        histories: &[&Encoded<B>],
    ) -> Forward<B> {
        assert_eq!((batch.history_tokens(), histories.len()), (0, attention.whole.requests()));
        let mut x = self.model.tokens(embedded, batch, 0, batch.targets());
        let none = B::Kept::default();
        for (at, layer) in self.layers.iter().enumerate() {
            let kept: Vec<KeptHistory<'_, B::Kept>> = histories
                .iter()
                .map(|history| KeptHistory {
                    layer: history.layers.get(at).unwrap_or(&none),
                    times_s: if attention.timed() { &history.times_s } else { &[] },
                })
                .collect();
            x = layer.score(x, &kept, &attention.whole);
        }
        self.model.said(x)
    }
}

/// A layer's weights, prepared.
#[derive(Debug)]
pub struct ServingLayer<B: ServingBackend> {
    norm_in: Norm<FloatTensor<B>>,
    /// To U, Q, V and K.
    uvqk: B::Prepared,
    /// To V and K alone, for history tokens of a last layer.
    seen: B::Prepared,
    position: Option<FloatTensor<B>>,
    time: Option<FloatTensor<B>>,
    norm_out: Norm<FloatTensor<B>>,
    output: B::Prepared,
    qk_width: usize,
    v_width: usize,
}

/// A request's history at one layer, while it grows.
pub struct Keeping<'a, B: ServingBackend> {
    /// Its keys and values.
    pub layer: &'a mut B::Kept,
    /// `[n]`, of the new tokens too; empty without a time bias.
    pub times_s: &'a [i64],
}

impl<B: ServingBackend> ServingLayer<B> {
    /// From trained weights.
    pub fn new(layer: &HstuLayer<B>) -> Self {
        let (weight, bias) = (layer.uvqk.weight.val(), layer.uvqk.bias.as_ref().map(Param::val));
        let (qk_width, v_width) = (layer.qk_width, layer.v_width);
        let (from, width) = (v_width + qk_width, v_width + qk_width);
        let of_seen = bias.clone().map(|bias| bias.narrow(0, from, width));
        Self {
            norm_in: norm(&layer.norm_in),
            seen: B::prepare(
                primitive(weight.clone().narrow(1, from, width)),
                of_seen.map(primitive),
            ),
            uvqk: B::prepare(primitive(weight), bias.map(primitive)),
            position: layer.position.as_ref().map(|table| primitive(table.val())),
            time: layer.time.as_ref().map(|table| primitive(table.val())),
            norm_out: norm(&layer.norm_out),
            output: B::prepare(primitive(layer.output.weight.val()), None),
            qk_width,
            v_width,
        }
    }

    /// New history tokens `[H, dim]` to the same shape; what later tokens see of them is appended to `kept`, a
    /// request each. `attention` has histories alone.
    pub fn extend(
        &self,
        x: Tensor<B, 2>,
        kept: &mut [Keeping<'_, B>],
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let [u, q, v, k] = self.mixed(&x);
        keep(&k, &v, kept, attention);
        let kept: Vec<_> = kept
            .iter()
            .map(|kept| KeptHistory { layer: &*kept.layer, times_s: kept.times_s })
            .collect();
        self.attend(x, [u, q, v, k], &kept, attention)
    }

    /// As [`ServingLayer::extend`] for a last layer, whose history outputs nobody reads.
    pub fn extend_last(
        &self,
        x: Tensor<B, 2>,
        kept: &mut [Keeping<'_, B>],
        attention: &Arc<HstuAttention>,
    ) {
        let past = tensor::<B>(B::mix(primitive(x), self.norm_in.clone(), &self.seen));
        let k = past.clone().narrow(1, self.v_width, self.qk_width);
        keep(&k, &past.narrow(1, 0, self.v_width), kept, attention);
    }

    /// Targets `[R, dim]` over kept histories to the same shape. `attention` has targets alone.
    pub fn score(
        &self,
        x: Tensor<B, 2>,
        kept: &[KeptHistory<'_, B::Kept>],
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let mixed = self.mixed(&x);
        self.attend(x, mixed, kept, attention)
    }

    /// U, Q, V and K.
    fn mixed(&self, x: &Tensor<B, 2>) -> [Tensor<B, 2>; 4] {
        let mixed = B::mix(primitive(x.clone()), self.norm_in.clone(), &self.uvqk);
        let mixed = tensor::<B>(mixed);
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
        let attended = B::attend(inputs, kept, attention);
        let gated = Gated { x: primitive(x), attended, u: primitive(u) };
        tensor::<B>(B::gate(gated, self.norm_out.clone(), &self.output))
    }
}

fn keep<B: ServingBackend>(
    k: &Tensor<B, 2>,
    v: &Tensor<B, 2>,
    kept: &mut [Keeping<'_, B>],
    attention: &HstuAttention,
) {
    let mut layers: Vec<_> = kept.iter_mut().map(|kept| &mut *kept.layer).collect();
    history::keep(k.clone(), v.clone(), attention, &mut layers);
}

fn norm<B: ServingBackend>(norm: &LayerNorm<B>) -> Norm<FloatTensor<B>> {
    let scale = norm.gamma.val();
    let shift = norm.beta.as_ref().map_or_else(|| scale.zeros_like(), Param::val);
    Norm { scale: primitive(scale), shift: primitive(shift), epsilon: EPSILON as f32 }
}

fn primitive<B: ServingBackend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn tensor<B: ServingBackend>(tensor: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}
