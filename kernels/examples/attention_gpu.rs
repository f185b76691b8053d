//! cargo run -p hypercast-kernels --features cuda --example attention_gpu
//!
//! TFLOP/s of HSTU attention on the first CUDA device, 32 requests, 4 heads of 256: the fused
//! kernels beside the same op composed of Burn's primitive ops in the same run. Only pairs that
//! are seen count, at 2 (qk + v) operations a pair and head forward, and 5/2 of that backward.
//! Published kernels for such shapes count likewise, so that figures compare.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Distribution, Tensor, bf16};
use burn_cuda::{Cuda, CudaDevice};
use hypercast_kernels::attention::{HstuAttention, HstuBackend, HstuInputs};
use hypercast_kernels::plain;

const REQUESTS: usize = 32;
const HEADS: usize = 4;
const DIM: usize = 256;

fn main() {
    for history in [1024, 2048, 4096] {
        measure::<Cuda<bf16>>("bf16", history);
        measure::<Cuda<f32>>("f32", history);
    }
}

fn measure<B: HstuBackend<Device = CudaDevice>>(dtype: &str, history: usize) {
    let shape = HstuAttention {
        history_offsets: (0..=REQUESTS).map(|b| (b * history) as u32).collect(),
        target_offsets: [0; REQUESTS + 1].into(),
        heads: HEADS,
        alpha: 1.0 / (DIM as f32).sqrt(),
        norm: history as f32,
        window: None,
        targets_only: false,
        times_s: None,
    }
    .checked()
    .expect("a valid layout");
    let device = CudaDevice::default();
    let matrix = || {
        let shape = [REQUESTS * history, HEADS * DIM];
        let values = Tensor::<B, 2>::random(shape, Distribution::Uniform(-1.0, 1.0), &device);
        values.into_primitive().tensor()
    };
    let inputs = HstuInputs { q: matrix(), k: matrix(), v: matrix(), position: None, time: None };
    let grad = matrix();
    let operations = (4 * DIM * HEADS * REQUESTS * (history * (history + 1) / 2)) as f64;
    let report = |path: &str, forward_s: f64, both_s: f64| {
        println!(
            "n {history}, {dtype}, {path}: forward {:.2} ms, {:.1} TFLOP/s; with backward {:.2} ms, {:.1} TFLOP/s",
            forward_s * 1e3,
            operations / forward_s / 1e12,
            both_s * 1e3,
            3.5 * operations / both_s / 1e12,
        );
    };
    let fused = times_s::<B>(&device, &inputs, &grad, |inputs, grad| match grad {
        None => drop(B::hstu_attention(inputs, shape.clone())),
        Some(grad) => drop(B::hstu_attention_backward(inputs, grad, shape.clone())),
    });
    report("fused", fused[0], fused[0] + fused[1]);
    let composed = times_s::<B>(&device, &inputs, &grad, |inputs, grad| {
        let shape: &Arc<HstuAttention> = &shape;
        match grad {
            None => drop(plain::forward::<B>(inputs, shape, plain::GROUP_SCORES)),
            Some(grad) => drop(plain::backward::<B>(inputs, grad, shape, plain::GROUP_SCORES)),
        }
    });
    report("primitive ops", composed[0], composed[0] + composed[1]);
    let ratio = (composed[0] + composed[1]) / (fused[0] + fused[1]);
    println!("n {history}, {dtype}: fused is {ratio:.1} times as fast");
}

/// The median seconds of 11 forwards and of 11 backwards, after two to compile and warm up.
fn times_s<B: Backend>(
    device: &B::Device,
    inputs: &HstuInputs<FloatTensor<B>>,
    grad: &FloatTensor<B>,
    run: impl Fn(HstuInputs<FloatTensor<B>>, Option<FloatTensor<B>>),
) -> [f64; 2] {
    [None, Some(grad)].map(|grad| {
        let mut times: Vec<f64> = (0..13)
            .map(|_| {
                let (inputs, grad) = (inputs.clone(), grad.cloned());
                B::sync(device).expect("the device answers");
                let start = Instant::now();
                run(inputs, grad);
                B::sync(device).expect("the device answers");
                start.elapsed().as_secs_f64()
            })
            .skip(2)
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}
