//! Layers: parameters and the arithmetic that uses them.
//!
//! A layer creates its parameters the first time it is applied, under the layer path at that point.
//! Later applications share them.

use std::cell::OnceCell;

use crate::graph::{Graph, Tensor};
use crate::raw::types::Initialiser;

/// The linear layer `x W + b`.
pub struct Linear<'g> {
    name: String,
    width: u32,
    bias: bool,
    init: Initialiser,
    parameters: OnceCell<(Tensor<'g>, Option<Tensor<'g>>)>,
}

impl<'g> Linear<'g> {
    /// A layer with `width` outputs.
    pub fn new(name: &str, width: u32) -> Self {
        let init = Initialiser::XavierUniform;
        Self { name: name.into(), width, bias: true, init, parameters: OnceCell::new() }
    }

    /// Sets the initial distribution of `W`; Xavier uniform by default. `b` starts at zero.
    pub fn init(self, init: Initialiser) -> Self {
        Self { init, ..self }
    }

    /// Removes the bias `b`.
    pub fn no_bias(self) -> Self {
        Self { bias: false, ..self }
    }

    /// Maps `[.., k]` to `[.., width]`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        let g = x.graph();
        g.scope(&self.name, || {
            let (weight, bias) = *self.parameters.get_or_init(|| {
                let inputs = x.shape().width().unwrap_or(1);
                let weight = g.parameter("weight", &[inputs, self.width], self.init);
                let bias = || g.parameter("bias", &[self.width], Initialiser::Zeros);
                (weight, self.bias.then(bias))
            });
            let product = x.matmul(weight);
            bias.map_or(product, |bias| product + bias)
        })
    }
}

/// A trained scale and bias of the last dimension, initially 1 and 0.
#[derive(Default)]
struct ScaleAndBias<'g>(OnceCell<(Tensor<'g>, Tensor<'g>)>);

impl<'g> ScaleAndBias<'g> {
    fn of(&self, x: Tensor<'g>) -> (Tensor<'g>, Tensor<'g>) {
        *self.0.get_or_init(|| {
            let (g, width) = (x.graph(), [x.shape().width().unwrap_or(1)]);
            let scale = g.parameter("scale", &width, Initialiser::Ones);
            (scale, g.parameter("bias", &width, Initialiser::Zeros))
        })
    }
}

/// Normalises the last dimension, with a trained scale and bias.
pub struct LayerNorm<'g> {
    name: String,
    parameters: ScaleAndBias<'g>,
}

impl<'g> LayerNorm<'g> {
    /// A layer whose width is that of its input.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), parameters: ScaleAndBias::default() }
    }

    /// Maps `[.., d]` to `[.., d]`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        x.graph().scope(&self.name, || {
            let (scale, bias) = self.parameters.of(x);
            x.layer_normalization(scale, bias)
        })
    }
}

/// Divides by the root mean square of the last dimension, then scales by a trained vector.
pub struct RmsNorm<'g> {
    name: String,
    scale: OnceCell<Tensor<'g>>,
}

impl<'g> RmsNorm<'g> {
    /// A layer whose width is that of its input.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), scale: OnceCell::new() }
    }

    /// Maps `[.., d]` to `[.., d]`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        let g = x.graph();
        g.scope(&self.name, || {
            let scale = *self.scale.get_or_init(|| {
                g.parameter("scale", &[x.shape().width().unwrap_or(1)], Initialiser::Ones)
            });
            x / ((x * x).mean() + 1e-6).sqrt() * scale
        })
    }
}

/// Drops values, or whole rows, in training. In serving it is the identity.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    rate: f32,
    rows: bool,
}

impl Dropout {
    /// Drops values at `rate`, in [0, 1).
    pub fn new(rate: f32) -> Self {
        Self { rate, rows: false }
    }

    /// Drops whole rows instead of single values.
    pub fn rows(self) -> Self {
        Self { rows: true, ..self }
    }

    /// Applies dropout to `x`, of any shape.
    pub fn apply<'g>(&self, x: Tensor<'g>) -> Tensor<'g> {
        if self.rate <= 0.0 {
            x
        } else if self.rows {
            x.dropout_rows(self.rate)
        } else {
            x.dropout(self.rate)
        }
    }
}

/// Linear layers, each followed by SiLU. A `LayerNorm` follows the first, so inputs may have any
/// scale.
pub struct Mlp<'g> {
    name: String,
    layers: Vec<Linear<'g>>,
    norm: LayerNorm<'g>,
    dropout: Dropout,
}

impl<'g> Mlp<'g> {
    /// An MLP with layers of the given widths.
    pub fn new(name: &str, widths: impl IntoIterator<Item = u32>) -> Self {
        let layer = |(i, width)| Linear::new(&format!("linear_{}", i + 1), width);
        Self {
            name: name.into(),
            layers: widths.into_iter().enumerate().map(layer).collect(),
            norm: LayerNorm::new("norm"),
            dropout: Dropout::new(0.0),
        }
    }

    /// Sets the dropout rate after each layer; 0 by default.
    pub fn dropout(self, rate: f32) -> Self {
        Self { dropout: Dropout::new(rate), ..self }
    }

    /// Maps `[.., k]` to `[.., last width]`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        x.graph().scope(&self.name, || {
            self.layers.iter().enumerate().fold(x, |x, (i, layer)| {
                let y = layer.apply(x);
                let y = if i == 0 { self.norm.apply(y) } else { y };
                self.dropout.apply(y.silu())
            })
        })
    }
}

/// A hashed embedding table.
pub struct Embedding<'g> {
    name: String,
    rows: u32,
    width: u32,
    table: OnceCell<Tensor<'g>>,
}

impl<'g> Embedding<'g> {
    /// A table of `rows` vectors of `width` values. Ids whose hashes collide share a vector.
    pub fn new(name: &str, rows: u32, width: u32) -> Self {
        Self { name: name.into(), rows, width, table: OnceCell::new() }
    }

    /// Maps ids, `[rows or history, k]`, to `[rows or history, width]`: the mean over k. Of a
    /// feature of several values, it is over those that there are.
    pub fn apply(&self, ids: Tensor<'g>) -> Tensor<'g> {
        let g: &'g Graph = ids.graph();
        g.scope(&self.name, || {
            let table = *self.table.get_or_init(|| {
                g.parameter("table", &[self.rows, self.width], Initialiser::Normal(0.05))
            });
            table.embedding_bag(ids)
        })
    }
}

/// Compresses numbers of unknown scale: `sign(x) log(1 + |x|)`, then a trained scale and bias for
/// each column.
pub struct Squash<'g> {
    name: String,
    parameters: ScaleAndBias<'g>,
}

impl<'g> Squash<'g> {
    /// A layer whose width is that of its input.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), parameters: ScaleAndBias::default() }
    }

    /// Maps `[.., d]` to `[.., d]`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        x.graph().scope(&self.name, || {
            let (scale, bias) = self.parameters.of(x);
            let positive = (x.relu() + 1.0).log();
            let negative = ((-x).relu() + 1.0).log();
            (positive - negative) * scale + bias
        })
    }
}
