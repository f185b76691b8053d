//! The CubeCL kernels, through wgpu, against the f64 oracle and the CPU's gradients.
//!
//! A software Vulkan adapter suffices. Without one the tests are skipped; in CI they fail.

use burn::backend::Autodiff;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, f16};
use burn_cubecl::CubeBackend;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use cubecl::Runtime;
use hypercast_kernels::attention::{AttentionWindow, HstuBackend, HstuInputs};
use hypercast_kernels::cpu::Isa;
use hypercast_kernels::gpu::{self, Family};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::case::{
    AttentionCase, CaseLimits, CaseOptions, CaseRecipe, CaseValues, RECIPES, cases, random_cases,
};
use crate::{assert_close, assert_same_grads, autodiff_grads, forward_of_columns, skip, values};

type HalfGpu = CubeBackend<WgpuRuntime, f16, i32, u32>;

/// Whether the tests can run.
///
/// # Panics
/// If they cannot, in CI.
pub fn adapter() -> bool {
    let found = gpu::wgpu_finds_a_device();
    if !found {
        let reason =
            "no graphics adapter: install a Vulkan driver (mesa-vulkan-drivers is one in software)";
        skip("GPU kernels", reason);
    }
    found
}

fn fuses(case: &AttentionCase, dtype: DType) -> bool {
    let client = WgpuRuntime::client(&WgpuDevice::default());
    gpu::family(&client, case.dims(), dtype) == Some(Family::Scalar)
}

fn forward<B: HstuBackend>(case: &AttentionCase) -> Vec<f32> {
    let inputs = case.tensors::<B>().into_primitives();
    values::<B, 2>(B::hstu_attention(inputs, case.shape.clone()))
}

fn backward<B: HstuBackend>(case: &AttentionCase) -> CaseValues {
    let inputs = case.tensors::<B>().into_primitives();
    let grad = case.grad_tensor::<B>().into_primitive().tensor();
    read_grads::<B>(B::hstu_attention_backward(inputs, grad, case.shape.clone()))
}

/// The gradients that a backend's backward pass left on its device.
pub fn read_grads<B: HstuBackend>(grads: HstuInputs<FloatTensor<B>>) -> CaseValues {
    HstuInputs {
        q: values::<B, 2>(grads.q),
        k: values::<B, 2>(grads.k),
        v: values::<B, 2>(grads.v),
        position: grads.position.map(values::<B, 1>),
        time: grads.time.map(values::<B, 1>),
    }
}

fn assert_right(case: &AttentionCase) {
    assert!(fuses(case, DType::F32), "{} is not fused", case.name);
    assert_exact(case, "wgpu", forward::<Wgpu>(case), backward::<Wgpu>(case));
}

/// Asserts what f32 kernels on a device owe: the oracle's output and the CPU's gradients.
pub fn assert_exact(case: &AttentionCase, kernels: &str, output: Vec<f32>, grads: CaseValues) {
    assert_close(&format!("{kernels}: {}", case.name), &output, &case.oracle(), 1e-5);
    // Sums over thousands of pairs (the tables' gradients) round apart a little.
    assert_same_grads(case, kernels, grads, &case.raw_backward(Isa::best()), 5e-5);
}

#[test]
fn kernels_equal_the_oracle() {
    if adapter() {
        cases().iter().for_each(assert_right);
    }
}

#[test]
fn kernels_equal_the_oracle_on_random_shapes() {
    if adapter() {
        // Within one variant of each kernel: a driver compiles one for every panel of columns.
        let limits = CaseLimits { dim: 64, buckets: 32 };
        random_cases(17, 40, limits).iter().for_each(assert_right);
    }
}

#[test]
fn wide_heads_have_registers_and_wider_ones_another_path() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(18);
    let options = CaseOptions { position: 20, ..CaseOptions::default() };
    for (qk, v) in [(256, 256), (65, 130)] {
        let recipe = CaseRecipe { requests: &[(70, 3), (5, 1)], heads: 2, qk, v };
        assert_right(&AttentionCase::new(&mut rng, &recipe, options));
    }
    let recipe = CaseRecipe { requests: &[(9, 3)], heads: 1, qk: 8, v: 257 };
    let case = AttentionCase::new(&mut rng, &recipe, options);
    assert!(!fuses(&case, DType::F32), "more columns than the kernels have registers for");
    assert_close("wider", &forward::<Wgpu>(&case), &case.oracle(), 1e-5);
}

#[test]
fn tables_too_long_for_a_row_of_sums_a_workgroup_are_right() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(19);
    let recipe = CaseRecipe { requests: &[(400, 70), (300, 9)], heads: 2, qk: 4, v: 4 };
    for window in [None, Some(AttentionWindow { recent: 90, global: 10 })] {
        let options = CaseOptions { window, position: 1 << 20, time: 70 };
        assert_right(&AttentionCase::new(&mut rng, &recipe, options));
    }
}

#[test]
fn gradients_are_the_same_every_time() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(20);
    let options = CaseOptions { position: 50, time: 20, ..CaseOptions::default() };
    let case = AttentionCase::new(&mut rng, &RECIPES[3], options);
    let first = backward::<Wgpu>(&case);
    assert_same_grads(&case, "again", backward::<Wgpu>(&case), &first, 0.0);
}

#[test]
fn autodiff_gives_the_raw_gradients() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(21);
    let options = CaseOptions { position: 9, time: 30, ..CaseOptions::default() };
    let case = AttentionCase::new(&mut rng, &RECIPES[2], options);
    let found = autodiff_grads::<Autodiff<Wgpu>>(&case);
    assert_same_grads(&case, "autodiff", found, &backward::<Wgpu>(&case), 0.0);
}

#[test]
fn columns_sliced_from_a_wider_tensor_are_read_where_they_are() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(22);
    let case = AttentionCase::new(&mut rng, &RECIPES[3], CaseOptions::default());
    assert_close("sliced", &forward_of_columns::<Wgpu>(&case), &case.oracle(), 1e-5);
}

#[test]
fn an_empty_batch_has_an_empty_result_and_zero_gradients_of_tables() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(23);
    for requests in [&[][..], &[(0, 0), (0, 0)]] {
        let recipe = CaseRecipe { requests, heads: 2, qk: 4, v: 6 };
        let options = CaseOptions { position: 5, time: 40, ..CaseOptions::default() };
        let case = AttentionCase::new(&mut rng, &recipe, options);
        assert!(forward::<Wgpu>(&case).is_empty());
        let grads = backward::<Wgpu>(&case);
        assert_eq!((grads.q, grads.k, grads.v), (vec![], vec![], vec![]));
        assert_eq!((grads.position, grads.time), (Some(vec![0.0; 5]), Some(vec![0.0; 40])));
    }
}

#[test]
fn half_precision_is_right_to_its_own_rounding() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(24);
    let options = CaseOptions { position: 9, time: 30, ..CaseOptions::default() };
    let mut case = AttentionCase::new(&mut rng, &RECIPES[3], options);
    if !fuses(&case, DType::F16) {
        eprintln!("skipped: this adapter has no 16-bit floats");
        return;
    }
    case.inputs = case
        .inputs
        .map(|values| values.into_iter().map(|value| f16::from_f32(value).to_f32()).collect());
    // Sums are f32, so that only the outputs round: by up to 2^-11 of themselves.
    assert_close("f16", &forward::<HalfGpu>(&case), &case.oracle(), 1e-3);
}
