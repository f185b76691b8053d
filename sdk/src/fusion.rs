//! The expert's two modules around the FM's embedding (paper section 3.2).
//!
//! `FmEmbedding` prepares the embedding, `FmFusion` joins its long-term interests
//! with the short-term ones of `Hstu`. What follows, the Expert Fusion Module, is
//! the plugin's own: an `Mlp`, or anything else.

use crate::graph::Tensor;
use crate::layers::{Dropout, LayerNorm, Linear, Mlp};

/// The FM Embedding Module: normalises the target-aware embedding and denoises it.
///
/// Noise is fought twice. Whole rows are dropped in training, so that the expert
/// stays useful when the FM drifts or its embedding is missing; and a bottleneck
/// keeps the few directions that serve this expert's tasks.
pub struct FmEmbedding<'g> {
    name: String,
    norm: LayerNorm<'g>,
    row_dropout: Dropout,
    dropout: Dropout,
    bottleneck: Linear<'g>,
}

impl<'g> FmEmbedding<'g> {
    /// A module with a bottleneck of `width`.
    pub fn new(name: &str, width: u32) -> Self {
        Self {
            name: name.into(),
            norm: LayerNorm::new("norm"),
            row_dropout: Dropout::new(0.05).rows(),
            dropout: Dropout::new(0.05),
            bottleneck: Linear::new("bottleneck", width),
        }
    }

    /// The rates at which whole rows and single values are dropped; 0.05 each unless set.
    pub fn dropout(self, rows: Dropout, values: Dropout) -> Self {
        Self { row_dropout: rows, dropout: values, ..self }
    }

    /// The embedding `[rows, tae_dim]` to `[rows, width]`.
    pub fn apply(&self, tae: Tensor<'g>) -> Tensor<'g> {
        tae.graph().scope(&self.name, || {
            let clean = self.row_dropout.apply(self.norm.apply(tae));
            self.bottleneck.apply(self.dropout.apply(clean))
        })
    }
}

/// The FM Fusion Module: an `Mlp` over the prepared embedding and the short-term interests,
/// with a gate that can pass the embedding by.
pub struct FmFusion<'g> {
    name: String,
    short_norm: LayerNorm<'g>,
    mlp: Mlp<'g>,
    gate: Linear<'g>,
    skip: Linear<'g>,
}

impl<'g> FmFusion<'g> {
    /// A module that yields `[rows, width]`.
    pub fn new(name: &str, width: u32) -> Self {
        Self {
            name: name.into(),
            short_norm: LayerNorm::new("short_norm"),
            mlp: Mlp::new("mlp", [width]),
            gate: Linear::new("gate", width),
            skip: Linear::new("skip", width),
        }
    }

    /// `fm` (from `FmEmbedding`) and `short` (from `Hstu`, if the expert has one), `[rows, d]` each, to `[rows, width]`.
    pub fn apply(&self, fm: Tensor<'g>, short: Option<Tensor<'g>>) -> Tensor<'g> {
        let g = fm.graph();
        g.scope(&self.name, || {
            let joined = match short {
                Some(short) => g.concat(&[fm, self.short_norm.apply(short)]),
                None => fm,
            };
            let gate = self.gate.apply(joined).sigmoid();
            self.mlp.apply(joined) + gate * self.skip.apply(fm)
        })
    }
}
