//! One HSTU layer over jagged tokens (section 3.1.2):
//!
//! `U, V, Q, K = split(SiLU(LN(X) W_uvqk + b))`,
//! `A = SiLU(α Q Kᵀ + rab) / N_max ⊙ mask`,
//! `Y = X + dropout(LN(A V) ⊙ U) W_o`.
//!
//! The attention itself, with its mask and bias, is the kernels crate's.

use std::sync::Arc;

use burn::{
    module::{Initializer, Module, Param},
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Tensor, TensorData, activation::silu, backend::Backend},
};
use hypercast_kernels::attention::{HstuAttention, HstuBackend, HstuInputs, hstu_attention};
use rand::{RngCore, SeedableRng, rngs::SmallRng};

use crate::spec::FmConfig;

/// The weights of one layer. The columns of `uvqk` are U, Q, V, K, so that what
/// a history token needs to be seen, V and K, are one range.
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
    /// Fresh weights.
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

/// Attention over a short history is small before it is normalised; a larger epsilon would hide it.
pub(crate) const EPSILON: f64 = 1e-6;

impl<B: HstuBackend> HstuLayer<B> {
    /// `[H + R, dim]` → the same shape; `attention` carries the offsets of the batch, and `noise`
    /// is the seed of the dropout where gradients are tracked.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        attention: &Arc<HstuAttention>,
        noise: u64,
    ) -> Tensor<B, 2> {
        let mixed = silu(self.uvqk.forward(self.norm_in.forward(x.clone())));
        let (v, qk) = (self.v_width, self.qk_width);
        let columns = |from: usize, width: usize| mixed.clone().narrow(1, from, width);
        let attended =
            self.attend(columns(v, qk), columns(v + qk, v), columns(2 * v + qk, qk), attention);
        self.gate(x, attended, self.drop_out(columns(0, v), noise))
    }

    /// As [`HstuLayer::forward`] for a last layer: `[H + R, dim]` → `[R, dim]`, without what only
    /// history outputs would need. `attention` must be of targets only.
    pub fn forward_targets(
        &self,
        x: Tensor<B, 2>,
        attention: &Arc<HstuAttention>,
        noise: u64,
    ) -> Tensor<B, 2> {
        assert!(attention.targets_only, "history outputs are not computed");
        let (v, qk) = (self.v_width, self.qk_width);
        let history = attention.history_rows();
        let targets = x.dims()[0] - history;
        let normed = self.norm_in.forward(x.clone());
        let own = silu(self.uvqk.forward(normed.clone().narrow(0, history, targets)));
        let columns = |from: usize, width: usize| own.clone().narrow(1, from, width);
        let (mut queries, mut values, mut keys) =
            (columns(v, qk), columns(v + qk, v), columns(2 * v + qk, qk));
        if history > 0 {
            let past = silu(self.seen(normed.narrow(0, 0, history)));
            let joint = |past, own| Tensor::cat(vec![past, own], 0);
            queries = joint(Tensor::zeros([history, qk], &x.device()), queries);
            values = joint(past.clone().narrow(1, 0, v), values);
            keys = joint(past.narrow(1, v, qk), keys);
        }
        let attended = self.attend(queries, values, keys, attention).narrow(0, history, targets);
        let gate = self.drop_out(columns(0, v), noise);
        self.gate(x.narrow(0, history, targets), attended, gate)
    }

    /// V and K before the activation: the last columns of `uvqk`.
    fn seen(&self, normed: Tensor<B, 2>) -> Tensor<B, 2> {
        let (from, width) = (self.v_width + self.qk_width, self.v_width + self.qk_width);
        let projected = normed.matmul(self.uvqk.weight.val().narrow(1, from, width));
        match &self.uvqk.bias {
            Some(bias) => projected + bias.val().narrow(0, from, width).unsqueeze(),
            None => projected,
        }
    }

    fn attend(
        &self,
        q: Tensor<B, 2>,
        v: Tensor<B, 2>,
        k: Tensor<B, 2>,
        attention: &Arc<HstuAttention>,
    ) -> Tensor<B, 2> {
        let position = self.position.as_ref().map(Param::val);
        let time = self.time.as_ref().map(Param::val);
        hstu_attention(HstuInputs { q, k, v, position, time }, attention)
    }

    /// Zeroes a share of the values and scales up the rest where gradients are tracked. The mask is
    /// made here and not by the backend, whose one generator all threads would share: equal seeds
    /// must give equal masks.
    fn drop_out(&self, x: Tensor<B, 2>, noise: u64) -> Tensor<B, 2> {
        if self.dropout == 0.0 || !B::ad_enabled(&x.device()) {
            return x;
        }
        let [rows, columns] = x.dims();
        let (dropped, scale) =
            ((self.dropout * 2f64.powi(32)) as u32, (1.0 / (1.0 - self.dropout)) as f32);
        let mut random = SmallRng::seed_from_u64(noise);
        let mask = (0..rows * columns)
            .map(|_| if random.next_u32() < dropped { 0.0 } else { scale })
            .collect::<Vec<f32>>();
        let mask = Tensor::from_data(TensorData::new(mask, [rows, columns]), &x.device());
        x * mask
    }

    /// `X + (LN(A V) ⊙ U) W_o`; dropping out U drops out the product.
    fn gate(&self, x: Tensor<B, 2>, attended: Tensor<B, 2>, gate: Tensor<B, 2>) -> Tensor<B, 2> {
        let gated = self.norm_out.forward(attended) * gate;
        x + self.output.forward(gated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, TensorData};
    use burn_flex::Flex;
    use hypercast_kernels::attention::oracle;

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
    fn a_layer_agrees_with_plain_f64() {
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
        let targets = numbers(layer.forward_targets(x.clone(), &last, 0).into_data());
        for (at, (value, whole)) in targets.iter().zip(&result[8 * 12..]).enumerate() {
            assert!((value - whole).abs() < 1e-5, "the last layer's way, {at}: {value} {whole}");
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
    fn dropout_is_a_function_of_its_seed_and_keeps_the_mean() {
        type A = burn::backend::Autodiff<Flex>;
        let device = Default::default();
        let config = FmConfig { dropout: 0.25, ..FmConfig::default() };
        let layer = HstuLayer::<A>::new(&config, &device);
        let ones = Tensor::<A, 2>::ones([200, 64], &device);
        let drop = |noise| numbers(layer.drop_out(ones.clone(), noise).into_data());
        let first = drop(5);
        assert_eq!(first, drop(5));
        assert_ne!(first, drop(6));
        let zeros = first.iter().filter(|&&v| v == 0.0).count() as f64 / 12_800.0;
        assert!((zeros - 0.25).abs() < 0.02, "{zeros}");
        let mean = first.iter().sum::<f64>() / 12_800.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        let serving = HstuLayer::<Flex>::new(&config, &device);
        let whole = serving.drop_out(Tensor::ones([3, 64], &device), 5);
        assert!(numbers(whole.into_data()).iter().all(|&v| v == 1.0), "serving drops nothing");
    }
}
