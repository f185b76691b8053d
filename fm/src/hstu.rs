//! One HSTU layer over jagged tokens (section 3.1.2):
//!
//! `U, V, Q, K = split(SiLU(LN(X) W_uvqk + b))`,
//! `A = SiLU(α Q Kᵀ + rab) / N_max ⊙ mask`,
//! `Y = X + dropout(LN(A V) ⊙ U) W_o`.
//!
//! This module holds the weights; the kernels crate computes the layer.

use std::sync::Arc;

use burn::{
    module::{Initializer, Module, Param},
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};
use hypercast_kernels::{
    attention::{HstuAttention, HstuBackend},
    layer::{Affine, LayerInputs, LayerOptions, SeededDropout, hstu_layer},
};

use crate::spec::FmConfig;

/// The weights of one layer. The columns of `uvqk` are in the order U, Q, V, K, so that V and K,
/// which later tokens need of a history token, are one range.
#[derive(Module, Debug)]
pub struct HstuLayer<B: Backend> {
    pub(crate) norm_in: LayerNorm<B>,
    pub(crate) uvqk: Linear<B>,
    pub(crate) position: Option<Param<Tensor<B, 1>>>,
    pub(crate) time: Option<Param<Tensor<B, 1>>>,
    pub(crate) norm_out: LayerNorm<B>,
    pub(crate) output: Linear<B>,
    dropout: f64,
    pub(crate) qk_width: usize,
    pub(crate) v_width: usize,
}

impl<B: Backend> HstuLayer<B> {
    /// A layer with newly drawn weights.
    pub fn new(config: &FmConfig, device: &B::Device) -> Self {
        let qk_width = config.heads * config.qk_dim;
        let v_width = config.heads * config.v_dim;
        let table = |buckets: usize| {
            (buckets > 0)
                .then(|| Initializer::Normal { mean: 0.0, std: 0.02 }.init([buckets], device))
        };
        Self {
            norm_in: LayerNormConfig::new(config.dim).with_epsilon(EPSILON).init(device),
            uvqk: LinearConfig::new(config.dim, 2 * v_width + 2 * qk_width)
                .with_initializer(Initializer::XavierUniform { gain: 1.0 })
                .init(device),
            position: table(config.position_buckets),
            time: table(config.time_buckets),
            norm_out: LayerNormConfig::new(v_width).with_epsilon(EPSILON).init(device),
            output: LinearConfig::new(v_width, config.dim)
                .with_bias(false)
                .with_initializer(Initializer::XavierUniform { gain: 1.0 })
                .init(device),
            dropout: config.dropout,
            qk_width,
            v_width,
        }
    }
}

/// Epsilon of the layer norms. The output of attention over a short history is small before it is
/// normalised, and a larger epsilon would suppress it.
pub(crate) const EPSILON: f64 = 1e-6;

impl<B: HstuBackend> HstuLayer<B> {
    /// Maps `[H + R, dim]` to the same shape, or to `[R, dim]` where `attention`, which carries the
    /// offsets of the batch, is of targets only. `dropout_seed` is the seed of the dropout where
    /// gradients are tracked.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        attention: &Arc<HstuAttention>,
        dropout_seed: u64,
    ) -> Tensor<B, 2> {
        let learns = B::ad_enabled(&x.device());
        let options = LayerOptions {
            attention: attention.clone(),
            epsilon: EPSILON as f32,
            dropout: learns.then(|| SeededDropout::new(self.dropout, dropout_seed)).flatten(),
        };
        let inputs = LayerInputs {
            x,
            norm_in: affine(&self.norm_in),
            uvqk: self.uvqk.weight.val(),
            bias: self.uvqk.bias.as_ref().expect("created with a bias").val(),
            position: self.position.as_ref().map(Param::val),
            time: self.time.as_ref().map(Param::val),
            norm_out: affine(&self.norm_out),
            output: self.output.weight.val(),
        };
        hstu_layer(inputs, &options)
    }
}

pub(crate) fn affine<B: Backend>(norm: &LayerNorm<B>) -> Affine<Tensor<B, 1>> {
    let shift = norm.beta.as_ref().expect("created with a shift");
    Affine { scale: norm.gamma.val(), shift: shift.val() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::AutodiffModule;
    use burn::tensor::{Distribution, TensorData};
    use burn_flex::Flex;
    use hypercast_kernels::attention::{HstuInputs, oracle};

    /// Row-wise `x W + b` in f64.
    fn linear(x: &[f64], width: usize, layer: &Linear<Flex>) -> Vec<f64> {
        let weight = numbers(layer.weight.val().into_data());
        let out = weight.len() / width;
        let bias =
            layer.bias.as_ref().map_or(vec![0.0; out], |bias| numbers(bias.val().into_data()));
        let row = |row: &[f64]| -> Vec<f64> {
            (0..out)
                .map(|o| bias[o] + (0..width).map(|i| row[i] * weight[i * out + o]).sum::<f64>())
                .collect()
        };
        x.chunks_exact(width).flat_map(row).collect()
    }

    /// Layer norm with unit scale and no shift, as a fresh layer has it.
    fn norm(x: &[f64], width: usize) -> Vec<f64> {
        let row = |row: &[f64]| -> Vec<f64> {
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
            row.iter().map(|v| (v - mean) / (variance + EPSILON).sqrt()).collect()
        };
        x.chunks_exact(width).flat_map(row).collect()
    }

    fn numbers(data: TensorData) -> Vec<f64> {
        data.convert::<f64>().into_vec().unwrap()
    }

    #[test]
    fn a_layer_agrees_with_a_reference_in_f64() {
        let device = Default::default();
        Flex::seed(&device, 3);
        let config = FmConfig {
            dim: 12,
            heads: 2,
            qk_dim: 5,
            v_dim: 4,
            max_history: 8,
            ..FmConfig::default()
        };
        let layer = HstuLayer::<Flex>::new(&config, &device);
        let attention = HstuAttention {
            history_offsets: [0, 5, 5, 8].into(),
            target_offsets: [0, 2, 3, 4].into(),
            heads: 2,
            alpha: config.alpha_value(),
            norm: 8.0,
            window: None,
            targets_only: false,
            times_s: Some((0..12).map(|i| i * i * 40).collect()),
        }
        .checked()
        .unwrap();
        let x = Tensor::<Flex, 2>::random([12, 12], Distribution::Normal(0.0, 1.0), &device);
        let result = numbers(layer.forward(x.clone(), &attention, 0).into_data());
        let last = HstuAttention { targets_only: true, ..(*attention).clone() }.checked().unwrap();
        let targets = numbers(layer.forward(x.clone(), &last, 0).into_data());
        for (at, (value, whole)) in targets.iter().zip(&result[8 * 12..]).enumerate() {
            assert!((value - whole).abs() < 1e-5, "targets only, {at}: {value} {whole}");
        }

        let x = numbers(x.into_data());
        let mixed: Vec<f64> = linear(&norm(&x, 12), 12, &layer.uvqk)
            .into_iter()
            .map(|v| v / (1.0 + (-v).exp()))
            .collect();
        let columns = |from: usize, width: usize| -> Vec<f64> {
            mixed.chunks_exact(36).flat_map(|row| row[from..from + width].to_vec()).collect()
        };
        let (u, q, v, k) = (columns(0, 8), columns(8, 10), columns(18, 8), columns(26, 10));
        let table =
            |p: &Option<Param<Tensor<Flex, 1>>>| p.as_ref().map(|p| numbers(p.val().into_data()));
        let (position, time) = (table(&layer.position), table(&layer.time));
        let inputs = HstuInputs {
            q: &q[..],
            k: &k[..],
            v: &v[..],
            position: position.as_deref(),
            time: time.as_deref(),
        };
        let attended = oracle::forward(&attention, &inputs);
        let gated: Vec<f64> = norm(&attended, 8).iter().zip(&u).map(|(a, u)| a * u).collect();
        let output = linear(&gated, 8, &layer.output);
        for (at, (value, (x, o))) in result.iter().zip(x.iter().zip(&output)).enumerate() {
            assert!((value - (x + o)).abs() < 1e-5, "{at}: {value} {}", x + o);
        }
    }

    #[test]
    fn dropout_depends_on_its_seed_and_happens_only_in_training() {
        type A = burn::backend::Autodiff<Flex>;
        let device = Default::default();
        let config = FmConfig { dropout: 0.25, ..FmConfig::default() };
        let attention = HstuAttention {
            history_offsets: [0, 20].into(),
            target_offsets: [0, 4].into(),
            heads: config.heads,
            alpha: config.alpha_value(),
            norm: 8.0,
            window: None,
            targets_only: false,
            times_s: Some([0; 24].into()),
        };
        let attention = attention.checked().unwrap();
        let distribution = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<Flex, 2>::random([24, config.dim], distribution, &device);
        let layer = HstuLayer::<A>::new(&config, &device);
        let learn = |dropout_seed| {
            let x = Tensor::<A, 2>::from_inner(x.clone());
            numbers(layer.forward(x, &attention, dropout_seed).into_data())
        };
        assert_eq!(learn(5), learn(5));
        assert_ne!(learn(5), learn(6));
        let serving = layer.valid();
        let serve = |dropout_seed| {
            numbers(serving.forward(x.clone(), &attention, dropout_seed).into_data())
        };
        assert_eq!(serve(5), serve(6), "serving drops nothing");
        assert_ne!(serve(5), learn(5));
    }
}
