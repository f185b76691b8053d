//! Prepared products against their composition of plain operators.

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Distribution, Tensor, TensorPrimitive};
use burn_flex::Flex;
use hypercast_kernels::cpu::{CpuPreparedMlp, Prepared};
use hypercast_kernels::dense::{GateInputs, NormWeights, PlainDense, PreparedLinear};
use hypercast_kernels::layer::Affine;
use hypercast_kernels::mlp::LinearWeights;
use hypercast_kernels::prepared_mlp::{MlpRows, MlpWeights, PlainMlp, PreparedMlp, SharedColumns};

use crate::assert_close;

fn random<const D: usize>(shape: [usize; D]) -> FloatTensor<Flex> {
    let device = Default::default();
    Tensor::<Flex, D>::random(shape, Distribution::Normal(0.1, 1.0), &device)
        .into_primitive()
        .tensor()
}

fn numbers(tensor: FloatTensor<Flex>) -> Vec<f32> {
    let tensor = Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(tensor));
    tensor.into_data().to_vec().expect("f32")
}

fn norm(width: usize) -> NormWeights<FloatTensor<Flex>> {
    let affine = Affine { scale: random([width]), shift: random([width]) };
    NormWeights { affine, epsilon: 1e-6 }
}

#[test]
fn fused_products_equal_composed_ones() {
    for (rows, from, to, bias) in [
        (0, 4, 8, true),
        (1, 1, 1, false),
        (3, 7, 33, true),
        (64, 24, 96, true),
        (150, 128, 512, false),
        (130, 40, 31, true),
    ] {
        let weight = random([from, to]);
        let bias = bias.then(|| random([to]));
        let fused = Prepared::prepare(weight.clone(), bias.clone());
        let plain = PlainDense::<Flex>::prepare(weight, bias);
        let (x, norm_in) = (random([rows, from]), norm(from));
        let expected = numbers(plain.mix(x.clone(), norm_in.clone()));
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let what = format!("{rows} rows, {from} to {to}");
        let found = numbers(fused.mix(x, norm_in));
        assert_close(&format!("mix, {what}"), &found, &expected, 3e-5);

        // U is a slice of columns of a wider tensor, as a layer has it.
        let wide =
            Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(random([rows, from + 5])));
        let u = wide.narrow(1, 5, from).into_primitive().tensor();
        let gated = GateInputs { x: random([rows, to]), attended: random([rows, from]), u };
        let norm_out = norm(from);
        let expected = numbers(plain.gate(gated.clone(), norm_out.clone()));
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let found = numbers(fused.gate(gated, norm_out));
        assert_close(&format!("gate, {what}"), &found, &expected, 3e-5);
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
