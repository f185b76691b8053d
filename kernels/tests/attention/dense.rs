//! Prepared products against their composition of plain operators.

use burn::tensor::activation::silu;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use hypercast_kernels::attention::{primitive, tensor};
use hypercast_kernels::cpu::CpuPreparedMlp;
use hypercast_kernels::dense::{GateInputs, NormWeights, PreparedLinear};
use hypercast_kernels::layer::Affine;
use hypercast_kernels::mlp::LinearWeights;
use hypercast_kernels::prepared_mlp::{MlpRows, MlpWeights, PlainMlp, PreparedMlp, SharedColumns};
use hypercast_kernels::serving::ServingBackend;

use crate::assert_close;

fn random<const D: usize>(shape: [usize; D]) -> FloatTensor<Flex> {
    let device = Default::default();
    primitive(Tensor::<Flex, D>::random(shape, Distribution::Normal(0.1, 1.0), &device))
}

fn numbers(of: FloatTensor<Flex>) -> Vec<f32> {
    tensor::<Flex, 2>(of).into_data().to_vec().expect("f32")
}

fn norm(width: usize) -> NormWeights<FloatTensor<Flex>> {
    let affine = Affine { scale: random([width]), shift: random([width]) };
    NormWeights { affine, epsilon: 1e-6 }
}

/// A linear layer of plain operators, `[from, to]` and `[to]`.
#[derive(Clone)]
struct PlainLinear {
    weight: FloatTensor<Flex>,
    bias: Option<FloatTensor<Flex>>,
}

impl PlainLinear {
    fn product(&self, x: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
        let product = x.matmul(tensor(self.weight.clone()));
        match &self.bias {
            Some(bias) => product + tensor::<Flex, 1>(bias.clone()).unsqueeze(),
            None => product,
        }
    }

    fn mix(&self, x: FloatTensor<Flex>, norm: &NormWeights<FloatTensor<Flex>>) -> Vec<f64> {
        wide(silu(self.product(normed(x, norm))))
    }

    fn gate(
        &self,
        gated: &GateInputs<FloatTensor<Flex>>,
        norm: &NormWeights<FloatTensor<Flex>>,
    ) -> Vec<f64> {
        let input = normed(gated.attended.clone(), norm) * tensor(gated.u.clone());
        wide(tensor::<Flex, 2>(gated.x.clone()) + self.product(input))
    }
}

fn normed(
    x: FloatTensor<Flex>,
    NormWeights { affine, epsilon }: &NormWeights<FloatTensor<Flex>>,
) -> Tensor<Flex, 2> {
    let Affine { scale, shift } = affine.clone().map(tensor::<Flex, 1>);
    let x = tensor::<Flex, 2>(x);
    let (variance, mean) = x.clone().var_mean_bias(1);
    (x - mean) / (variance + *epsilon).sqrt() * scale.unsqueeze() + shift.unsqueeze()
}

fn wide(of: Tensor<Flex, 2>) -> Vec<f64> {
    numbers(primitive(of)).into_iter().map(f64::from).collect()
}

/// The shapes `[rows, from, to]` of products, and whether they have a bias.
const PRODUCTS: [([usize; 3], bool); 6] = [
    ([0, 4, 8], true),
    ([1, 1, 1], false),
    ([3, 7, 33], true),
    ([64, 24, 96], true),
    ([150, 128, 512], false),
    ([130, 40, 31], true),
];

/// Compares the products of a backend with those of plain operators.
fn assert_products<B: ServingBackend>([rows, from, to]: [usize; 3], has_bias: bool) {
    fn there<B: ServingBackend, const D: usize>(of: &FloatTensor<Flex>) -> FloatTensor<B> {
        let data = tensor::<Flex, D>(of.clone()).into_data();
        primitive(Tensor::<B, D>::from_data(data, &Default::default()))
    }
    let norm_there = |norm: &NormWeights<FloatTensor<Flex>>| NormWeights {
        affine: norm.affine.as_ref().map(there::<B, 1>),
        epsilon: norm.epsilon,
    };
    let read =
        |of: FloatTensor<B>| -> Vec<f32> { tensor::<B, 2>(of).into_data().to_vec().expect("f32") };
    let plain = PlainLinear { weight: random([from, to]), bias: has_bias.then(|| random([to])) };
    let bias = plain.bias.as_ref().map(there::<B, 1>);
    let prepared = B::Prepared::prepare(there::<B, 2>(&plain.weight), bias);
    let (x, norm_in) = (random([rows, from]), norm(from));
    let what = format!("{rows} rows, {from} to {to}");
    let found = read(prepared.mix(there::<B, 2>(&x), norm_there(&norm_in)));
    assert_close(&format!("mix, {what}"), &found, &plain.mix(x, &norm_in), 3e-5);

    // U is a slice of columns of a wider tensor, as a layer has it.
    let wide = random([rows, from + 5]);
    let u = primitive(tensor::<Flex, 2>(wide.clone()).narrow(1, 5, from));
    let gated = GateInputs { x: random([rows, to]), attended: random([rows, from]), u };
    let norm_out = norm(from);
    let expected = plain.gate(&gated, &norm_out);
    let gated = GateInputs {
        x: there::<B, 2>(&gated.x),
        attended: there::<B, 2>(&gated.attended),
        u: primitive(tensor::<B, 2>(there::<B, 2>(&wide)).narrow(1, 5, from)),
    };
    let found = read(prepared.gate(gated, norm_there(&norm_out)));
    assert_close(&format!("gate, {what}"), &found, &expected, 3e-5);
}

#[test]
fn fused_products_equal_composed_ones() {
    for (shape, has_bias) in PRODUCTS {
        assert_products::<Flex>(shape, has_bias);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn gpu_products_equal_composed_ones() {
    if !crate::gpu::adapter() {
        return;
    }
    for (shape, has_bias) in PRODUCTS.into_iter().filter(|(shape, _)| shape[0] > 0) {
        assert_products::<hypercast_kernels::gpu::WgpuBackend>(shape, has_bias);
    }
}

#[test]
fn products_of_shared_columns_are_added_to_those_of_each_row() {
    for (rows, from, shared, direct) in [
        (1, 3, 1..2, true),
        (5, 40, 0..13, false),
        (70, 33, 20..33, true),
        (130, 64, 8..40, true),
        (19, 24, 0..0, true),
        (9, 24, 0..24, true),
        (9, 24, 0..24, false),
    ] {
        let (hidden, to, groups) = (37, 33, 3);
        let linear = |from, to| LinearWeights { weight: random([from, to]), bias: random([to]) };
        let direct = direct.then(|| random([from, to]));
        let weights =
            MlpWeights { hidden: linear(from, hidden), output: linear(hidden, to), direct };
        let prepared = CpuPreparedMlp::prepare(weights.clone(), shared.clone());
        let plain = PlainMlp::<Flex>::prepare(weights, shared.clone());
        let group_of: Vec<u32> = (0..rows as u32).map(|row| row * 7 % groups).collect();
        for added in [None, Some(random([rows, to]))] {
            let values = random([groups as usize, shared.len().max(1)]);
            let (own, group_of) = (random([rows, from - shared.len()]), &group_of[..]);
            let shared = (!shared.is_empty()).then_some(SharedColumns { values, group_of });
            let input = MlpRows { own, shared, added };
            let expected = numbers(plain.forward(input.clone()));
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let found = numbers(prepared.forward(input));
            let what = format!("{rows} rows of {from}");
            assert_close(&what, &found, &expected, 3e-5);
        }
    }
}
