//! The kernels for tensor cores, through wgpu, with the one instruction replaced.
//!
//! A device without tensor cores computes each fragment of a product where a tensor core would
//! leave it. Everything else is what runs on tensor cores: tiles, masks, biases, the order of
//! work and what is written. In f32 these kernels must be as exact as the others. 16-bit floats are
//! tested as f16 where the adapter has them. Where it has none, and for bf16, which wgpu has
//! nowhere, inputs are rounded to the type and held in f32, which tests the range of
//! such inputs and not the rounding of weights to the type between two products.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, bf16, f16};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use cubecl::Runtime;
use hypercast_kernels::attention::{AttentionWindow, HstuBackend};
use hypercast_kernels::cpu::Isa;
use hypercast_kernels::gpu::{self, Family};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::case::{
    AttentionCase, CaseLimits, CaseOptions, CaseRecipe, CaseValues, RECIPES, cases, random_cases,
};
use crate::gpu::{adapter, assert_exact, read_grads};
use crate::{assert_close, assert_same_grads, values};

type HalfFragments = CubeBackend<WgpuRuntime, f16, i32, u32>;

/// A backend whose tensors the kernels take.
trait OnWgpu: HstuBackend + Backend<FloatTensorPrimitive = CubeTensor<WgpuRuntime>> {}
impl<B: HstuBackend + Backend<FloatTensorPrimitive = CubeTensor<WgpuRuntime>>> OnWgpu for B {}

fn runs(case: &AttentionCase, dtype: DType) -> bool {
    let client = WgpuRuntime::client(&WgpuDevice::default());
    gpu::runs(Family::Fragments, &client, case.dims(), dtype)
}

fn forward<B: OnWgpu>(case: &AttentionCase) -> Vec<f32> {
    let inputs = case.tensors::<B>().into_primitives();
    values::<B, 2>(gpu::forward(Family::Fragments, inputs, &case.shape))
}

fn backward<B: OnWgpu>(case: &AttentionCase) -> CaseValues {
    let inputs = case.tensors::<B>().into_primitives();
    let grad = case.grad_tensor::<B>().into_primitive().tensor();
    read_grads::<B>(gpu::backward(Family::Fragments, inputs, grad, &case.shape))
}

fn assert_right(case: &AttentionCase) {
    assert!(runs(case, DType::F32), "{} does not run", case.name);
    assert_exact(case, "fragments", forward::<Wgpu>(case), backward::<Wgpu>(case));
}

#[test]
fn gpu_fragments_equal_the_oracle() {
    if adapter() {
        cases().iter().for_each(assert_right);
    }
}

#[test]
fn gpu_fragments_equal_the_oracle_on_random_shapes() {
    if adapter() {
        // Within one variant of each kernel: a driver compiles one for every padded width.
        let limits = CaseLimits { dim: 32, buckets: 32 };
        random_cases(31, 30, limits).iter().for_each(assert_right);
    }
}

#[test]
fn gpu_fragments_of_wider_heads_are_right() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(32);
    let options = CaseOptions { position: 20, time: 30, ..CaseOptions::default() };
    for (qk, v) in [(64, 64), (40, 33)] {
        let recipe = CaseRecipe { requests: &[(70, 3), (5, 1)], heads: 2, qk, v };
        assert_right(&AttentionCase::new(&mut rng, &recipe, options));
    }
}

#[test]
fn gpu_fragments_give_the_same_gradients_every_time() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(33);
    let window = Some(AttentionWindow { recent: 40, global: 5 });
    let case =
        AttentionCase::new(&mut rng, &RECIPES[3], CaseOptions { window, position: 50, time: 20 });
    let first = backward::<Wgpu>(&case);
    assert_same_grads(&case, "again", backward::<Wgpu>(&case), &first, 0.0);
}

/// The case with every input rounded.
fn rounded(mut case: AttentionCase, round: fn(f32) -> f32) -> AttentionCase {
    case.inputs = case.inputs.map(|values| values.into_iter().map(round).collect());
    case
}

#[test]
fn gpu_fragments_of_bf16_inputs_held_in_f32_are_right() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(34);
    let options = CaseOptions { position: 9, time: 30, ..CaseOptions::default() };
    let case = AttentionCase::new(&mut rng, &RECIPES[3], options);
    assert_right(&rounded(case, |value| bf16::from_f32(value).to_f32()));
}

#[test]
fn gpu_fragments_of_f16_are_right_to_its_rounding() {
    if !adapter() {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(35);
    let options = CaseOptions { position: 9, time: 30, ..CaseOptions::default() };
    let case = AttentionCase::new(&mut rng, &RECIPES[3], options);
    if !runs(&case, DType::F16) {
        eprintln!("skipped: this adapter has no 16-bit floats");
        return;
    }
    let case = rounded(case, |value| f16::from_f32(value).to_f32());
    // A weight rounds once, by up to 2^-11 of itself, and so does the output: the sum of at most
    // 117 weights below 1 times values below 1.5, over a norm of 13, is within 117 * 1.5 * 2^-11
    // / 13 of the right one at the very most, and rounding errors of either sign leave a tenth.
    assert_close("f16", &forward::<HalfFragments>(&case), &case.oracle(), 2e-3);
    let expected = case.raw_backward(Isa::best());
    assert_same_grads(&case, "f16", backward::<HalfFragments>(&case), &expected, 1e-2);
}
