//! Every path of the op against the f64 oracle, over random jagged batches.

mod case;
mod dense;
#[cfg(feature = "wgpu")]
mod gpu;
#[cfg(feature = "wgpu")]
mod gpu_bags;
#[cfg(feature = "cuda")]
mod gpu_emulated;
#[cfg(feature = "wgpu")]
mod gpu_fragments;
mod kept;
mod layer;
mod mlp;

use burn::backend::Autodiff;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_flex::Flex;
use hypercast_kernels::attention::{
    AttentionWindow, HstuAttention, HstuBackend, HstuInputs, hstu_attention, oracle, time_bucket,
};
use hypercast_kernels::cpu::{self, Isa};
use hypercast_kernels::plain;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use case::{
    AttentionCase, CaseLimits, CaseOptions, CaseRecipe, CaseValues, RECIPES, cases, random_cases,
    small_cases,
};

const LIMITS: CaseLimits = CaseLimits { dim: 80, buckets: 70 };

/// Skips a test of what this machine lacks.
///
/// # Panics
/// Where `CI` is `true`, so that no check is lost unnoticed.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn skip(test: &str, reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test}: {reason}");
    eprintln!("SKIPPED {test}: {reason}");
}

fn wide(values: &CaseValues) -> HstuInputs<Vec<f64>> {
    values.as_ref().map(|x| x.iter().map(|x| f64::from(*x)).collect())
}

fn forward_f64(shape: &HstuAttention, values: &HstuInputs<Vec<f64>>) -> Vec<f64> {
    oracle::forward(shape, &values.as_ref().map(|x| &x[..]))
}

fn named(values: CaseValues) -> Vec<(&'static str, Vec<f32>)> {
    let mut all = vec![("q", values.q), ("k", values.k), ("v", values.v)];
    all.extend(values.position.map(|table| ("position", table)));
    all.extend(values.time.map(|table| ("time", table)));
    all
}

fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let allowed = tolerance * (1.0 + expected.abs());
        let apart = (f64::from(*found) - expected).abs();
        assert!(apart <= allowed, "{what}: at {at}, {found} should be {expected}");
    }
}

fn assert_same_grads(
    case: &AttentionCase,
    path: &str,
    found: CaseValues,
    expected: &CaseValues,
    tolerance: f64,
) {
    let (found, expected) = (named(found), named(expected.clone()));
    assert_eq!(found.len(), expected.len(), "{path}: {}", case.name);
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
        assert_close(&format!("{path}, d{name}: {}", case.name), found, &expected, tolerance);
    }
}

fn values<B: Backend, const D: usize>(tensor: FloatTensor<B>) -> Vec<f32> {
    let tensor = Tensor::<B, D>::from_primitive(TensorPrimitive::Float(tensor));
    tensor.into_data().convert::<f32>().to_vec().expect("f32")
}

/// The gradients that autodiff gives every input.
fn autodiff_grads<A: HstuBackend + AutodiffBackend>(case: &AttentionCase) -> CaseValues {
    let inputs = case.tensors::<A>();
    let inputs = HstuInputs {
        q: inputs.q.require_grad(),
        k: inputs.k.require_grad(),
        v: inputs.v.require_grad(),
        position: inputs.position.map(Tensor::require_grad),
        time: inputs.time.map(Tensor::require_grad),
    };
    let out = hstu_attention(inputs.clone(), &case.shape);
    let grads = (out * case.grad_tensor()).sum().backward();
    let values = |data: TensorData| -> Vec<f32> { data.to_vec().expect("f32") };
    let table = |table: &Tensor<A, 1>| values(table.grad(&grads).expect("tracked").into_data());
    HstuInputs {
        q: values(inputs.q.grad(&grads).expect("tracked").into_data()),
        k: values(inputs.k.grad(&grads).expect("tracked").into_data()),
        v: values(inputs.v.grad(&grads).expect("tracked").into_data()),
        position: inputs.position.as_ref().map(table),
        time: inputs.time.as_ref().map(table),
    }
}

/// The op of q, k and v that are columns of one wider tensor; the case has no tables and one width.
fn forward_of_columns<B: HstuBackend>(case: &AttentionCase) -> Vec<f32> {
    let inputs = case.tensors::<B>();
    let width = case.shape.heads * case.v;
    let all = Tensor::cat(vec![inputs.q, inputs.k, inputs.v], 1);
    let [q, k, v] = [0, 1, 2].map(|at| all.clone().narrow(1, at * width, width));
    let inputs = HstuInputs { q, k, v, position: None, time: None };
    hstu_attention(inputs, &case.shape).into_data().to_vec().expect("f32")
}

#[test]
fn forward_equals_the_oracle_on_every_instruction_set() {
    for case in cases().into_iter().chain(random_cases(15, 60, LIMITS)) {
        let expected = case.oracle();
        assert!(expected.iter().any(|x| x.abs() > 0.01), "{} tests nothing", case.name);
        for isa in Isa::available() {
            let found = cpu::forward(&case.shape, case.dims(), &case.borrow(), isa);
            assert_close(&format!("{isa:?}: {}", case.name), &found, &expected, 1e-5);
        }
    }
}

#[test]
fn gradients_equal_differences_of_the_oracle() {
    const STEP: f64 = 1e-5;
    for case in small_cases() {
        let values = wide(&case.inputs);
        let loss = |values: &HstuInputs<Vec<f64>>| -> f64 {
            let out = forward_f64(&case.shape, values);
            out.iter().zip(case.grad()).map(|(out, grad)| out * f64::from(grad)).sum()
        };
        let slope = |pick: fn(&mut HstuInputs<Vec<f64>>) -> &mut Vec<f64>| -> Vec<f64> {
            let len = pick(&mut values.clone()).len();
            let at = |at: usize, step: f64| {
                let mut values = values.clone();
                pick(&mut values)[at] += step;
                loss(&values)
            };
            (0..len).map(|i| (at(i, STEP) - at(i, -STEP)) / (2.0 * STEP)).collect()
        };
        let mut expected = vec![slope(|x| &mut x.q), slope(|x| &mut x.k), slope(|x| &mut x.v)];
        if values.position.is_some() {
            expected.push(slope(|x| x.position.as_mut().expect("present")));
        }
        if values.time.is_some() {
            expected.push(slope(|x| x.time.as_mut().expect("present")));
        }
        for isa in Isa::available() {
            let found = named(case.raw_backward(isa));
            assert_eq!(found.len(), expected.len(), "{}", case.name);
            for ((name, found), expected) in found.iter().zip(&expected) {
                let what = format!("{isa:?}, d{name}: {}", case.name);
                assert_close(&what, found, expected, 1e-5);
            }
        }
    }
}

#[test]
fn backward_and_forward_of_primitive_ops_equal_the_fused_ones() {
    for case in cases().into_iter().chain(random_cases(16, 40, LIMITS)) {
        let inputs = case.tensors::<Flex>().into_primitives();
        let grad = case.grad_tensor::<Flex>().into_primitive().tensor();
        // One group for all, one for each request, and something between.
        for group_scores in [plain::GROUP_SCORES, 1, 2000] {
            let out = plain::forward::<Flex>(inputs.clone(), &case.shape, group_scores);
            assert_close(
                &format!("plain: {}", case.name),
                &values::<Flex, 2>(out),
                &case.oracle(),
                1e-5,
            );
            let (inputs, grad) = (inputs.clone(), grad.clone());
            let found = plain::backward::<Flex>(inputs, grad, &case.shape, group_scores);
            let found = found.map(|tensor| tensor.into_data().to_vec().expect("f32"));
            for isa in Isa::available() {
                // Sums over thousands of pairs (the tables' gradients) round apart a little.
                let path = format!("{isa:?} against plain");
                assert_same_grads(&case, &path, case.raw_backward(isa), &found, 5e-5);
            }
        }
    }
}

#[test]
fn autodiff_gives_the_raw_gradients() {
    for case in cases().iter().step_by(3) {
        let found = autodiff_grads::<Autodiff<Flex>>(case);
        assert_same_grads(case, "autodiff", found, &case.raw_backward(Isa::best()), 0.0);
    }
}

#[test]
fn only_tracked_inputs_get_gradients() {
    type A = Autodiff<Flex>;
    let mut rng = SmallRng::seed_from_u64(9);
    let both = CaseOptions { position: 6, time: 6, ..CaseOptions::default() };
    let case = AttentionCase::new(&mut rng, &RECIPES[0], both);
    let expected = case.raw_backward(Isa::best());
    let backward = |inputs: HstuInputs<Tensor<A, 2>, Tensor<A, 1>>| {
        (hstu_attention(inputs, &case.shape) * case.grad_tensor()).sum().backward()
    };

    let mut inputs = case.tensors::<A>();
    inputs.k = inputs.k.require_grad();
    let grads = backward(inputs.clone());
    assert!(inputs.q.grad(&grads).is_none() && inputs.v.grad(&grads).is_none());
    let k: Vec<f32> = inputs.k.grad(&grads).expect("tracked").into_data().to_vec().expect("f32");
    assert_eq!(k, expected.k);

    let mut inputs = case.tensors::<A>();
    inputs.time = inputs.time.map(Tensor::require_grad);
    let grads = backward(inputs.clone());
    let time = inputs.time.expect("given").grad(&grads).expect("tracked");
    assert_eq!(Some(time.into_data().to_vec::<f32>().expect("f32")), expected.time);

    let inputs = case.tensors::<A>();
    assert!(!hstu_attention(inputs, &case.shape).is_require_grad(), "nothing is tracked");
}

#[test]
fn columns_sliced_from_a_wider_tensor_need_no_copy_to_be_right() {
    let mut rng = SmallRng::seed_from_u64(10);
    let case = AttentionCase::new(&mut rng, &RECIPES[3], CaseOptions::default());
    assert_close("sliced", &forward_of_columns::<Flex>(&case), &case.oracle(), 1e-5);
}

#[test]
fn a_target_changes_no_other_row() {
    let mut rng = SmallRng::seed_from_u64(11);
    let options = CaseOptions { position: 9, time: 9, ..CaseOptions::default() };
    let mut case = AttentionCase::new(&mut rng, &RECIPES[3], options);
    let changed = case.shape.request(1).targets.start + 5;
    let (qk, v) = (case.shape.heads * case.qk, case.shape.heads * case.v);
    for isa in Isa::available() {
        let before = cpu::forward(&case.shape, case.dims(), &case.borrow(), isa);
        case.inputs.q[changed * qk..(changed + 1) * qk].fill(3.0);
        case.inputs.k[changed * qk..(changed + 1) * qk].fill(0.2);
        case.inputs.v[changed * v..(changed + 1) * v].fill(isa as u8 as f32 + 5.0);
        let after = cpu::forward(&case.shape, case.dims(), &case.borrow(), isa);
        for (row, (before, after)) in before.chunks(v).zip(after.chunks(v)).enumerate() {
            assert_eq!(before == after, row != changed, "{isa:?}: row {row}");
        }
    }
}

#[test]
fn a_target_alone_equals_the_target_among_others() {
    let mut rng = SmallRng::seed_from_u64(12);
    let recipe = CaseRecipe { requests: &[(100, 19)], heads: 2, qk: 32, v: 32 };
    let case = AttentionCase::new(
        &mut rng,
        &recipe,
        CaseOptions { position: 50, ..CaseOptions::default() },
    );
    let width = case.shape.heads * case.v;
    let all = cpu::forward(&case.shape, case.dims(), &case.borrow(), Isa::best());
    for target in 100..119 {
        let mut alone = (*case.shape).clone();
        alone.target_offsets = [0, 1].into();
        let part =
            |x: &[f32]| [&x[..100 * width], &x[target * width..(target + 1) * width]].concat();
        let one = AttentionCase {
            name: String::new(),
            shape: alone.checked().expect("valid"),
            inputs: HstuInputs {
                q: part(&case.inputs.q),
                k: part(&case.inputs.k),
                v: part(&case.inputs.v),
                ..case.inputs.clone()
            },
            ..case
        };
        let found = cpu::forward(&one.shape, one.dims(), &one.borrow(), Isa::best());
        assert_eq!(found[100 * width..], all[target * width..(target + 1) * width]);
    }
}

#[test]
fn an_empty_batch_has_an_empty_result() {
    let mut rng = SmallRng::seed_from_u64(13);
    for requests in [&[][..], &[(0, 0), (0, 0)]] {
        let recipe = CaseRecipe { requests, heads: 2, qk: 4, v: 6 };
        let case = AttentionCase::new(&mut rng, &recipe, CaseOptions::default());
        assert_eq!(hstu_attention(case.tensors::<Flex>(), &case.shape).dims(), [0, 12]);
        assert!(case.oracle().is_empty());
    }
}

#[test]
fn extreme_scores_stay_finite_and_right() {
    let mut rng = SmallRng::seed_from_u64(14);
    let recipe = CaseRecipe { requests: &[(40, 3)], heads: 1, qk: 4, v: 4 };
    let mut case = AttentionCase::new(&mut rng, &recipe, CaseOptions::default());
    case.inputs.q.iter_mut().for_each(|q| *q *= 100.0);
    let expected = case.oracle();
    for isa in Isa::available() {
        let found = cpu::forward(&case.shape, case.dims(), &case.borrow(), isa);
        assert_close(&format!("{isa:?}"), &found, &expected, 2e-5);
    }
}

#[test]
fn buckets_grow_by_powers_of_two_up_to_the_last() {
    let found = [0, 1, 2, 3, 4, 7, 8, 1 << 40, u64::MAX].map(|s| time_bucket(s, 20));
    assert_eq!(found, [0, 0, 1, 1, 2, 2, 3, 19, 19]);
}

#[test]
fn each_distance_in_time_has_its_own_bucket() {
    let mut rng = SmallRng::seed_from_u64(17);
    // Distances at both sides of each power of two. With the longest ones, buckets are found in 32
    // bits, and just no longer.
    let powers = (0..31).flat_map(|power| [-1, 0, 1].map(|apart| (1i64 << power) + apart));
    for longest in [i64::from(i32::MAX), i64::from(i32::MAX) + 1] {
        let mut times: Vec<i64> = powers.clone().chain([longest, 0]).map(|s| 5 - s).collect();
        times.sort_unstable();
        times.push(5);
        let recipe = CaseRecipe { requests: &[(times.len() - 1, 1)], heads: 1, qk: 4, v: 4 };
        let options = CaseOptions { time: 40, ..CaseOptions::default() };
        let mut case = AttentionCase::new(&mut rng, &recipe, options);
        let shape = HstuAttention { times_s: Some(times.into()), ..(*case.shape).clone() };
        case.shape = shape.checked().expect("a valid layout");
        let inputs = case.tensors::<Flex>().into_primitives();
        let grad = case.grad_tensor::<Flex>().into_primitive().tensor();
        let grads = plain::backward::<Flex>(inputs, grad, &case.shape, plain::GROUP_SCORES);
        let grads = grads.map(|tensor| tensor.into_data().to_vec().expect("f32"));
        for isa in Isa::available() {
            let found = cpu::forward(&case.shape, case.dims(), &case.borrow(), isa);
            assert_close(&format!("{isa:?}: {longest}"), &found, &case.oracle(), 1e-5);
            let path = format!("{isa:?}: {longest}");
            assert_same_grads(&case, &path, case.raw_backward(isa), &grads, 5e-5);
        }
    }
}

#[test]
fn contradictions_are_named() {
    let good = HstuAttention {
        history_offsets: [0, 2].into(),
        target_offsets: [0, 1].into(),
        heads: 2,
        alpha: 1.0,
        norm: 1.0,
        window: None,
        targets_only: false,
        times_s: None,
    };
    assert!(good.validate().is_ok());
    let bad = [
        HstuAttention { history_offsets: [1, 2].into(), ..good.clone() },
        HstuAttention { history_offsets: [0, 3, 2].into(), ..good.clone() },
        HstuAttention { target_offsets: [0].into(), ..good.clone() },
        HstuAttention { heads: 0, ..good.clone() },
        HstuAttention { alpha: f32::NAN, ..good.clone() },
        HstuAttention { norm: 0.0, ..good.clone() },
        HstuAttention { window: Some(AttentionWindow { recent: 0, global: 1 }), ..good.clone() },
        HstuAttention { times_s: Some([1, 2].into()), ..good.clone() },
    ];
    let fields = bad.map(|shape| shape.validate().expect_err("a contradiction").field);
    let history = "history_offsets";
    let expected =
        [history, history, "target_offsets", "heads", "alpha", "norm", "window", "times_s"];
    assert_eq!(fields, expected);

    let fits = HstuInputs { q: &[3, 8][..], k: &[3, 8], v: &[3, 6], position: None, time: None };
    let dims = good.check(&fits).expect("fitting tensors");
    assert_eq!((dims.rows, dims.qk, dims.v), (3, 4, 3));
    let bad = [
        HstuInputs { q: &[4, 8][..], ..fits.clone() },
        HstuInputs { k: &[3, 6], ..fits.clone() },
        HstuInputs { v: &[3, 7], ..fits.clone() },
        HstuInputs { position: Some(&[0]), ..fits.clone() },
        HstuInputs { time: Some(&[4]), ..fits },
    ];
    let fields = bad.map(|inputs| good.check(&inputs).expect_err("a contradiction").field);
    assert_eq!(fields, ["q", "k", "v", "position", "times_s"]);
}
