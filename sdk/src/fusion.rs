//! The expert's two modules around the FM's embedding (paper section 3.2).
//!
//! `FmEmbedding` prepares the embedding, `FmFusion` joins its long-term interests
//! with the short-term ones of `Hstu`. What follows, the Expert Fusion Module, is
//! in `expert_fusion`; the logits are `TaskHeads`'s.

use std::cell::OnceCell;

use crate::graph::{Graph, Tensor};
use crate::layers::{Dropout, LayerNorm, Linear, Mlp, RmsNorm};
use crate::raw::types::Initialiser;

/// The FM Embedding Module (section 3.2): normalises the target-aware embedding, denoises it, and
/// makes the expert live without it.
///
/// - Normalised: `LayerNorm` unless `rms` is chosen, so that a new FM's or a drifting FM's scale does not matter.
/// - Denoised: a bottleneck keeps the few directions that serve this expert's tasks, optionally `gated`;
///   in training, values are dropped (0.05) and `noise` may be added.
/// - Dispensable: in training a row's whole embedding is taken away at a rate of 0.05. Such a row, and one whose
///   embedding is all zeros (the FM is down, or the expert runs without), gets a trained vector in its place, and
///   `FmEmbedded::present` says so: training and serving see the same thing.
pub struct FmEmbedding<'g> {
    name: String,
    width: u32,
    norm: Norm<'g>,
    row_dropout: Dropout,
    value_dropout: Dropout,
    noise: f32,
    bottleneck: Linear<'g>,
    gate: Option<Linear<'g>>,
    missing: OnceCell<Tensor<'g>>,
}

/// What `FmEmbedding` makes of the embedding.
#[derive(Clone, Copy)]
pub struct FmEmbedded<'g> {
    /// `[rows, width]`.
    pub values: Tensor<'g>,
    /// `[rows, tae_dim]`: normalised alone, for a direct path to the logits; zeros where there is none.
    pub normalised: Tensor<'g>,
    /// `[rows, 1]`: 1 where there is an embedding, 0 where there is none or training took it away.
    pub present: Tensor<'g>,
}

enum Norm<'g> {
    Layer(LayerNorm<'g>),
    Rms(RmsNorm<'g>),
}

impl<'g> FmEmbedding<'g> {
    /// A module with a bottleneck of `width`.
    pub fn new(name: &str, width: u32) -> Self {
        Self {
            name: name.into(),
            width,
            norm: Norm::Layer(LayerNorm::new("norm")),
            row_dropout: Dropout::new(0.05),
            value_dropout: Dropout::new(0.05),
            noise: 0.0,
            bottleneck: Linear::new("bottleneck", width),
            gate: None,
            missing: OnceCell::new(),
        }
    }

    /// Normalises by the root mean square alone, which keeps the mean.
    pub fn rms(self) -> Self {
        Self { norm: Norm::Rms(RmsNorm::new("norm")), ..self }
    }

    /// Multiplies the bottleneck by a sigmoid gate of the embedding: what looks like noise is shut out.
    pub fn gated(self) -> Self {
        Self { gate: Some(Linear::new("gate", self.width)), ..self }
    }

    /// The rate, in [0, 1), at which a row's whole embedding is taken away in training; 0.05 unless set.
    pub fn row_dropout(self, rate: f32) -> Self {
        Self { row_dropout: Dropout::new(rate), ..self }
    }

    /// The rate, in [0, 1), at which single values are dropped in training; 0.05 unless set.
    pub fn value_dropout(self, rate: f32) -> Self {
        Self { value_dropout: Dropout::new(rate), ..self }
    }

    /// The deviation of the noise added to normalised values in training; 0 unless set.
    pub fn noise(self, deviation: f32) -> Self {
        Self { noise: deviation, ..self }
    }

    /// The embedding `[rows, tae_dim]` to `[rows, width]`, and whether it is there.
    pub fn apply(&self, tae: Tensor<'g>) -> FmEmbedded<'g> {
        let g = tae.graph();
        g.scope(&self.name, || {
            let present = self.present(g, tae);
            let normed = match &self.norm {
                Norm::Layer(norm) => norm.apply(tae),
                Norm::Rms(norm) => norm.apply(tae),
            };
            let clean = self.value_dropout.apply(self.noisy(normed));
            let narrow = self.bottleneck.apply(clean);
            let narrow = match &self.gate {
                Some(gate) => narrow * gate.apply(clean).sigmoid(),
                None => narrow,
            };
            let missing = *self
                .missing
                .get_or_init(|| g.parameter("missing", &[self.width], Initialiser::Zeros));
            let values = narrow * present + (1.0 - present) * missing;
            FmEmbedded { values, normalised: clean * present, present }
        })
    }

    // Dropout scales up what it keeps; the comparison after it makes a plain 0 or 1 of that.
    fn present(&self, g: &'g Graph, tae: Tensor<'g>) -> Tensor<'g> {
        let zero = g.constant(0.0);
        let there = tae.abs().sum().greater(zero);
        self.row_dropout.apply(there).greater(zero)
    }

    // A graph has no random op, but dropout of ones at a half yields 0 or 2 in training and 1 in
    // serving: one less is a random sign in training and exactly 0 in serving.
    fn noisy(&self, x: Tensor<'g>) -> Tensor<'g> {
        if self.noise == 0.0 {
            return x;
        }
        let ones = x.equal(x);
        x + (ones.dropout(0.5) - 1.0) * self.noise
    }
}

/// The FM Fusion Module (section 3.2): long-term interests (from `FmEmbedding`) and short-term ones (from `Hstu`)
/// as a gated sum, plus an interaction layer over both and their element-wise product.
///
/// The gate, a sigmoid for each of `width`, knows whether there is an embedding at all. The short-term side
/// starts small: the embedding leads until the expert's own sequence model has learnt something.
pub struct FmFusion<'g> {
    name: String,
    long: Linear<'g>,
    short_norm: LayerNorm<'g>,
    recent: Linear<'g>,
    gate: Linear<'g>,
    interaction: Mlp<'g>,
}

impl<'g> FmFusion<'g> {
    /// A module that yields `[rows, width]`.
    pub fn new(name: &str, width: u32) -> Self {
        Self {
            name: name.into(),
            long: Linear::new("long", width),
            short_norm: LayerNorm::new("short_norm"),
            recent: Linear::new("recent", width).init(Initialiser::Normal(0.02)),
            gate: Linear::new("gate", width),
            interaction: Mlp::new("interaction", [width]),
        }
    }

    /// `fm` `[rows, d]` and `short` `[rows, e]`, if the expert has one, to `[rows, width]`.
    pub fn apply(&self, fm: FmEmbedded<'g>, short: Option<Tensor<'g>>) -> Tensor<'g> {
        let g = fm.values.graph();
        g.scope(&self.name, || {
            let long = self.long.apply(fm.values);
            let Some(short) = short else {
                let gate = self.gate.apply(g.concat(&[long, fm.present])).sigmoid();
                return gate * long + self.interaction.apply(long);
            };
            let recent = self.recent.apply(self.short_norm.apply(short));
            let gate = self.gate.apply(g.concat(&[long, recent, fm.present])).sigmoid();
            let both = gate * long + (1.0 - gate) * recent;
            both + self.interaction.apply(g.concat(&[long, recent, long * recent]))
        })
    }
}
