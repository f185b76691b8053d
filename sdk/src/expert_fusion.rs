//! The Expert Fusion Module (paper section 3.2), which models interactions between all inputs of an
//! expert.
//!
//! The paper leaves its architecture open, "from a simple MLP to more advanced structures". This
//! module offers an MLP, and an MLP in parallel with a cross network (DCN-v2, arXiv 2008.13535).
//! The result is the shared bottom of `TaskHeads`.

use std::cell::OnceCell;

use crate::graph::Tensor;
use crate::layers::{LayerNorm, Linear, Mlp};
use crate::raw::types::Initialiser;

/// A cross network: `x_{l+1} = x_0 * (W_l x_l + b_l) + x_l` (DCN-v2, equation 1). Layer l models
/// products of up to l + 1 inputs exactly.
///
/// With `rank`, `W = U V` has that rank (equation 2). The network starts close to the identity.
pub struct Cross<'g> {
    name: String,
    layers: u32,
    rank: Option<u32>,
    weights: OnceCell<Vec<CrossLayer<'g>>>,
}

struct CrossLayer<'g> {
    /// V, if W is factored.
    down: Option<Linear<'g>>,
    /// U or W, with b.
    up: Linear<'g>,
}

impl<'g> Cross<'g> {
    /// A network of `layers` layers (at least one) with full matrices.
    pub fn new(name: &str, layers: u32) -> Self {
        Self { name: name.into(), layers, rank: None, weights: OnceCell::new() }
    }

    /// Factors each matrix at this rank: `4 k rank` FLOPs per layer instead of `2 k k`.
    pub fn rank(self, rank: u32) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// Maps `[.., k]` to `[.., k]`. All inputs should have a similar scale.
    pub fn apply(&self, x0: Tensor<'g>) -> Tensor<'g> {
        let g = x0.graph();
        g.scope(&self.name, || {
            let width = x0.shape().width().unwrap_or(1);
            let layers = self.weights.get_or_init(|| self.layers_of(width));
            layers.iter().enumerate().fold(x0, |x, (index, layer)| {
                g.scope(&format!("layer_{}", index + 1), || {
                    let narrow = layer.down.as_ref().map_or(x, |down| down.apply(x));
                    x0 * layer.up.apply(narrow) + x
                })
            })
        })
    }

    fn layers_of(&self, width: u32) -> Vec<CrossLayer<'g>> {
        let layer = |_| CrossLayer {
            down: self.rank.map(|rank| Linear::new("down", rank).no_bias()),
            up: Linear::new("up", width).init(Initialiser::Normal(0.02)),
        };
        (0..self.layers.max(1)).map(layer).collect()
    }
}

/// The Expert Fusion Module: an MLP, or an MLP in parallel with a cross network.
pub struct ExpertFusion<'g> {
    name: String,
    deep: Mlp<'g>,
    cross: Option<CrossBranch<'g>>,
}

/// The cross network in parallel with the MLP.
struct CrossBranch<'g> {
    norm: LayerNorm<'g>,
    network: Cross<'g>,
    out: Linear<'g>,
}

impl<'g> ExpertFusion<'g> {
    /// An `Mlp` of the given widths. It maps `[rows, k]` to `[rows, last width]`.
    pub fn mlp(name: &str, widths: impl IntoIterator<Item = u32>) -> Self {
        Self { name: name.into(), deep: Mlp::new("deep", widths), cross: None }
    }

    /// The same `Mlp` in parallel with `network`, which reads the normalised input and whose result
    /// is projected to the last width. Together they map `[rows, k]` to `[rows, 2 * last width]`.
    pub fn cross(name: &str, widths: impl IntoIterator<Item = u32>, network: Cross<'g>) -> Self {
        let widths: Vec<u32> = widths.into_iter().collect();
        let out = Linear::new("out", widths.last().copied().unwrap_or(1));
        let cross = Some(CrossBranch { norm: LayerNorm::new("norm"), network, out });
        Self { cross, ..Self::mlp(name, widths) }
    }

    /// Sets the dropout rate after each layer of the `Mlp`; 0 by default.
    pub fn dropout(self, rate: f32) -> Self {
        Self { deep: self.deep.dropout(rate), ..self }
    }

    /// Applies the module to `x`, `[rows, k]`: the concatenated embeddings, numeric features and
    /// output of `FmFusion`.
    pub fn apply(&self, x: Tensor<'g>) -> Tensor<'g> {
        let g = x.graph();
        g.scope(&self.name, || {
            let deep = self.deep.apply(x);
            match &self.cross {
                None => deep,
                Some(cross) => {
                    let crossed = cross.network.apply(cross.norm.apply(x));
                    g.concat(&[deep, cross.out.apply(crossed)])
                }
            }
        })
    }
}
