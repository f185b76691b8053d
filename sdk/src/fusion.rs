//! The two modules of an expert that process the FM's embedding (paper section 3.2).
//!
//! `FmEmbedding` prepares the embedding. `FmFusion` combines the long-term interests in it with the
//! short-term ones from `Hstu`. The Expert Fusion Module (`expert_fusion`) and `TaskHeads` follow.

use std::cell::OnceCell;

use crate::graph::{Graph, Tensor};
use crate::layers::{Dropout, LayerNorm, Linear, Mlp, RmsNorm};
use crate::raw::types::Initialiser;

/// The FM Embedding Module (section 3.2): normalises and denoises the target-aware embedding, and
/// prepares the expert for requests without one.
///
/// - Normalisation: `LayerNorm`, or `RmsNorm` with `rms`. The expert then does not depend on the
///   scale of the embedding, which changes with a new FM and as an FM keeps learning.
/// - Denoising: a bottleneck keeps the few directions that help this expert's tasks, with an
///   optional gate (`gated`). In training, values are dropped (rate 0.05) and `noise` may be added.
/// - Missing embeddings: training drops the whole embedding of a row at a rate of 0.05. Such a row
///   gets a trained vector instead, and `FmEmbedded::present` is 0. The same happens in serving
///   when an embedding is all zeros, because the FM is down or the expert runs without it. So
///   training and serving treat a missing embedding alike.
pub struct FmEmbedding<'g> {
    name: String,
    width: u32,
    norm: LayerNorm<'g>,
    /// Takes the place of `norm`.
    rms: Option<RmsNorm<'g>>,
    row_dropout: Dropout,
    value_dropout: Dropout,
    noise: f32,
    bottleneck: Linear<'g>,
    gate: Option<Linear<'g>>,
    missing: OnceCell<Tensor<'g>>,
}

/// The output of `FmEmbedding`.
#[derive(Clone, Copy)]
pub struct FmEmbedded<'g> {
    /// `[rows, width]`: the denoised embedding, or the trained vector if it is missing.
    pub values: Tensor<'g>,
    /// `[rows, tae_dim]`: the normalised embedding, for a direct path to the logits; zeros if it is
    /// missing.
    pub normalised: Tensor<'g>,
    /// `[rows, 1]`: 1 if there is an embedding, 0 if it is missing or training dropped it.
    pub present: Tensor<'g>,
}

impl<'g> FmEmbedding<'g> {
    /// A module with a bottleneck of `width`.
    pub fn new(name: &str, width: u32) -> Self {
        Self {
            name: name.into(),
            width,
            norm: LayerNorm::new("norm"),
            rms: None,
            row_dropout: Dropout::new(0.05),
            value_dropout: Dropout::new(0.05),
            noise: 0.0,
            bottleneck: Linear::new("bottleneck", width),
            gate: None,
            missing: OnceCell::new(),
        }
    }

    /// Normalises by the root mean square only, which keeps the mean.
    pub fn rms(self) -> Self {
        Self { rms: Some(RmsNorm::new("norm")), ..self }
    }

    /// Multiplies the bottleneck by a sigmoid gate of the embedding, which can shut out noise.
    pub fn gated(self) -> Self {
        Self { gate: Some(Linear::new("gate", self.width)), ..self }
    }

    /// Sets the rate, in [0, 1), at which training drops a row's whole embedding; 0.05 by default.
    pub fn row_dropout(self, rate: f32) -> Self {
        Self { row_dropout: Dropout::new(rate), ..self }
    }

    /// Sets the rate, in [0, 1), at which training drops single values; 0.05 by default.
    pub fn value_dropout(self, rate: f32) -> Self {
        Self { value_dropout: Dropout::new(rate), ..self }
    }

    /// Sets the standard deviation of the noise that training adds to normalised values; 0 by
    /// default.
    pub fn noise(self, deviation: f32) -> Self {
        Self { noise: deviation, ..self }
    }

    /// Maps the embedding, `[rows, tae_dim]`, to `[rows, width]`, and marks missing ones.
    pub fn apply(&self, tae: Tensor<'g>) -> FmEmbedded<'g> {
        let g = tae.graph();
        g.scope(&self.name, || {
            let present = self.present(g, tae);
            let normed = match &self.rms {
                Some(norm) => norm.apply(tae),
                None => self.norm.apply(tae),
            };
            let clean = self.value_dropout.apply(self.noisy(normed));
            let narrow = self.bottleneck.apply(clean);
            let gated = |gate: &Linear<'g>| narrow * gate.apply(clean).sigmoid();
            let narrow = self.gate.as_ref().map_or(narrow, gated);
            let missing = *self
                .missing
                .get_or_init(|| g.parameter("missing", &[self.width], Initialiser::Zeros));
            let values = narrow * present + (1.0 - present) * missing;
            FmEmbedded { values, normalised: clean * present, present }
        })
    }

    // Dropout scales up the values it keeps. The comparison after it turns them into 0 or 1.
    fn present(&self, g: &'g Graph, tae: Tensor<'g>) -> Tensor<'g> {
        let zero = g.constant(0.0);
        let there = tae.abs().sum().greater(zero);
        self.row_dropout.apply(there).greater(zero)
    }

    // Graphs have no random op. But dropout of ones at rate 0.5 gives 0 or 2 in training and 1 in
    // serving; minus 1, that is a random sign in training and exactly 0 in serving.
    fn noisy(&self, x: Tensor<'g>) -> Tensor<'g> {
        if self.noise == 0.0 {
            return x;
        }
        let ones = x.equal(x);
        x + (ones.dropout(0.5) - 1.0) * self.noise
    }
}

/// The FM Fusion Module (section 3.2): a gated sum of long-term interests (from `FmEmbedding`) and
/// short-term ones (from `Hstu`), plus an interaction layer over both and their element-wise
/// product.
///
/// The gate is a sigmoid for each of `width` values, and its input includes
/// `FmEmbedded::present`. The short-term weights start small, so the embedding dominates until the
/// expert's own sequence model has learnt something.
pub struct FmFusion<'g> {
    name: String,
    long: Linear<'g>,
    short_norm: LayerNorm<'g>,
    recent: Linear<'g>,
    gate: Linear<'g>,
    interaction: Mlp<'g>,
}

impl<'g> FmFusion<'g> {
    /// A module whose output is `[rows, width]`.
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

    /// Combines `fm` with `short`, `[rows, e]`, into `[rows, width]`. `short` is `None` for an
    /// expert without a sequence model.
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
