//! The fused network of two linear layers against its composition.

use burn::backend::Autodiff;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Distribution, Tensor, TensorPrimitive};
use burn_flex::Flex;
use hypercast_kernels::cpu::{CpuMlp, Isa, StridedRows, mlp_backward, mlp_forward};
use hypercast_kernels::mlp::{LinearWeights, MlpInputs, MlpWidths, composed, mlp};

use crate::assert_close;

type MlpAutodiff = Autodiff<Flex>;
type MlpTensors<A> = MlpInputs<Tensor<A, 2>, Tensor<A, 1>>;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<MlpAutodiff, D> {
    let device = Default::default();
    Tensor::random(shape, Distribution::Normal(0.1, 0.5), &device).require_grad()
}

fn numbers<A: AutodiffBackend, const D: usize>(tensor: &Tensor<A, D>) -> Vec<f32> {
    tensor.to_data().to_vec().expect("f32")
}

fn inputs([rows, from, hidden, to]: [usize; 4]) -> MlpTensors<MlpAutodiff> {
    MlpInputs {
        x: random([rows, from]),
        hidden: LinearWeights { weight: random([from, hidden]), bias: random([hidden]) },
        output: LinearWeights { weight: random([hidden, to]), bias: random([to]) },
    }
}

fn of_operators(inputs: &MlpTensors<MlpAutodiff>) -> Tensor<MlpAutodiff, 2> {
    let weights =
        |of: &LinearWeights<Tensor<MlpAutodiff, 2>, Tensor<MlpAutodiff, 1>>| LinearWeights {
            weight: of.weight.clone().into_primitive().tensor(),
            bias: of.bias.clone().into_primitive().tensor(),
        };
    let inputs = MlpInputs {
        x: inputs.x.clone().into_primitive().tensor(),
        hidden: weights(&inputs.hidden),
        output: weights(&inputs.output),
    };
    Tensor::from_primitive(TensorPrimitive::Float(composed::<MlpAutodiff>(inputs)))
}

/// The gradients of x, W, b, W', b'.
fn gradients<A: AutodiffBackend>(
    inputs: &MlpTensors<A>,
    out: Tensor<A, 2>,
    grad: &Tensor<A, 2>,
) -> [Vec<f32>; 5] {
    let grads = (out * grad.clone().detach()).sum().backward();
    let of = |tensor: &Tensor<A, 2>| -> Vec<f32> {
        tensor.grad(&grads).expect("tracked").into_data().to_vec().expect("f32")
    };
    let of_bias = |tensor: &Tensor<A, 1>| -> Vec<f32> {
        tensor.grad(&grads).expect("tracked").into_data().to_vec().expect("f32")
    };
    let MlpInputs { x, hidden, output } = inputs;
    let (hidden, output) =
        ((of(&hidden.weight), of_bias(&hidden.bias)), (of(&output.weight), of_bias(&output.bias)));
    [of(x), hidden.0, hidden.1, output.0, output.1]
}

/// Within a share of the largest value: sums of thousands of terms cancel.
fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(1.0f32, |largest, x| largest.max(x.abs()));
    let found: Vec<f32> = found.iter().map(|x| x / largest).collect();
    let expected: Vec<f64> = expected.iter().map(|x| f64::from(x / largest)).collect();
    assert_close(what, &found, &expected, 2e-5);
}

#[test]
fn a_fused_network_equals_the_composed_one_with_all_gradients() {
    for shape in [[1, 1, 1, 1], [7, 5, 33, 3], [130, 144, 64, 64], [2500, 24, 40, 7]] {
        let [rows, from, hidden, to] = shape;
        let (leaves, grad) = (inputs(shape), random([rows, to]));
        let out = of_operators(&leaves);
        let expected = numbers(&out);
        let wanted = gradients(&leaves, out, &grad);
        let node = mlp(leaves.clone());
        assert_near(&format!("{shape:?}"), &numbers(&node), &expected);
        let found = gradients(&leaves, node, &grad);
        for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert_near(&format!("{shape:?}, gradient {at}"), found, wanted);
        }
        let MlpInputs { x, hidden: first, output } = &leaves;
        let widths = MlpWidths { rows, from, hidden, to };
        let [x, w, b, w2, b2, grad] = [
            numbers(x),
            numbers(&first.weight),
            numbers(&first.bias),
            numbers(&output.weight),
            numbers(&output.bias),
            numbers(&grad),
        ];
        let matrix = |data, stride| StridedRows { data, stride };
        let cpu: CpuMlp<'_> = MlpInputs {
            x: matrix(&x, from),
            hidden: LinearWeights { weight: matrix(&w, hidden), bias: &b },
            output: LinearWeights { weight: matrix(&w2, to), bias: &b2 },
        };
        for isa in Isa::available() {
            assert_near(&format!("{isa:?}, {shape:?}"), &mlp_forward(&cpu, widths, isa), &expected);
            let grads = mlp_backward(&cpu, widths, matrix(&grad, to), true, isa);
            let found = [
                grads.x.expect("asked for"),
                grads.hidden.weight,
                grads.hidden.bias,
                grads.output.weight,
                grads.output.bias,
            ];
            for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                assert_near(&format!("{isa:?}, {shape:?}, gradient {at}"), found, wanted);
            }
            let less = mlp_backward(&cpu, widths, matrix(&grad, to), false, isa);
            assert!(less.x.is_none() && less.output.weight == found[3], "{isa:?}, {shape:?}");
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn gpu_networks_equal_those_of_the_cpu_with_all_gradients() {
    type OnGpu = Autodiff<hypercast_kernels::gpu::WgpuBackend>;
    fn there<const D: usize>(tensor: &Tensor<MlpAutodiff, D>) -> Tensor<OnGpu, D> {
        Tensor::from_data(tensor.to_data(), &Default::default()).require_grad()
    }
    if !crate::gpu::adapter() {
        return;
    }
    for shape in [[7, 5, 33, 3], [700, 24, 40, 7]] {
        let [rows, _, _, to] = shape;
        let (leaves, grad) = (inputs(shape), random([rows, to]));
        let out = mlp(leaves.clone());
        let expected = numbers(&out);
        let wanted = gradients(&leaves, out, &grad);
        let weights = |of: &LinearWeights<_, _>| LinearWeights {
            weight: there(&of.weight),
            bias: there(&of.bias),
        };
        let (hidden, output) = (weights(&leaves.hidden), weights(&leaves.output));
        let on_gpu = MlpInputs { x: there(&leaves.x), hidden, output };
        let out = mlp(on_gpu.clone());
        assert_near(&format!("{shape:?}"), &numbers(&out), &expected);
        let found = gradients(&on_gpu, out, &there(&grad));
        for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert_near(&format!("{shape:?}, gradient {at}"), found, wanted);
        }
    }
}

#[test]
fn no_rows_give_no_rows() {
    let leaves = inputs([1, 6, 5, 4]);
    let none = Tensor::zeros([0, 6], &Default::default());
    let empty = MlpInputs { x: none, ..leaves };
    assert_eq!(mlp(empty).dims(), [0, 4]);
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let (leaves, grad) = (inputs([3000, 9, 20, 5]), random([3000, 5]));
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| gradients(&leaves, mlp(leaves.clone()), &grad))
    };
    assert_eq!(on(1), on(3));
}
