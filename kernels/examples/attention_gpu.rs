//! cargo run -p hypercast-kernels --features cuda --example attention_gpu [-- FILE.json]
//!
//! HSTU attention on the first CUDA device in bf16 (tensor cores) and f32: first whether it is
//! right, against the CPU path on the same inputs, then TFLOP/s at 32 requests of n tokens, 4 heads
//! of 256, and milliseconds of a DLRMv3-shaped stack (32 requests of about 1,024 tokens, 2,048
//! candidates each, 5 layers of d = 512, 4 heads of 128), each beside the same composed of Burn's
//! primitive operators in the same run. Only pairs that are seen count, at 2 (qk + v) operations a
//! pair and head forward, and 5/2 of that backward: published kernels count likewise, so that
//! figures compare. Writes `{"machine", "results"}` to the file, or to standard output.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Distribution, Tensor, TensorData, bf16};
use burn_cuda::{Cuda, CudaDevice};
use burn_flex::Flex;
use cubecl::Runtime;
use cubecl::cuda::CudaRuntime;
use hypercast_kernels::attention::{
    Dims, HstuAttention, HstuBackend, HstuInputs, hstu_attention, primitive, tensor,
};
use hypercast_kernels::{gpu, plain};
use serde_json::{Value, json};

const REQUESTS: usize = 32;
const HEADS: usize = 4;
const RIVAL: &str = "Burn's primitive operators";

fn main() -> Result<()> {
    let mut results = Vec::new();
    check::<Cuda<bf16>>("bf16", DType::BF16, 2e-2)?;
    check::<Cuda<f32>>("f32", DType::F32, 1e-4)?;
    for n in [1024, 2048, 4096] {
        attention::<Cuda<bf16>>("bf16", n, &mut results);
        attention::<Cuda<f32>>("f32", n, &mut results);
    }
    stack::<Cuda<bf16>>("bf16", &mut results);
    stack::<Cuda<f32>>("f32", &mut results);
    let report = json!({ "machine": machine(), "results": results });
    let report = serde_json::to_string_pretty(&report)?;
    match std::env::args().nth(1) {
        Some(file) => std::fs::write(file, report)?,
        None => println!("{report}"),
    }
    Ok(())
}

/// The GPU and its driver, as the driver names them.
fn machine() -> Value {
    let found = std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=name,driver_version", "--format=csv,noheader"])
        .output();
    match found {
        Ok(found) => json!(String::from_utf8_lossy(&found.stdout).lines().next()),
        Err(_) => Value::Null,
    }
}

/// Requests of these lengths, and as many targets each.
fn layout(histories: &[usize], targets: usize, dim: usize) -> Arc<HstuAttention> {
    let ends = histories.iter().scan(0, |end, history| {
        *end += *history as u32;
        Some(*end)
    });
    HstuAttention {
        history_offsets: std::iter::once(0).chain(ends).collect(),
        target_offsets: (0..=histories.len()).map(|b| (b * targets) as u32).collect(),
        heads: HEADS,
        alpha: 1.0 / (dim as f32).sqrt(),
        norm: histories.iter().copied().max().unwrap_or(1) as f32,
        window: None,
        targets_only: false,
        times_s: None,
    }
    .checked()
    .expect("a valid layout")
}

/// Fails unless the output and the gradients are those of the CPU, up to a share of the largest
/// value of each.
fn check<B: HstuBackend<Device = CudaDevice>>(name: &str, dtype: DType, share: f32) -> Result<()> {
    for dim in [32, 64, 128, 256] {
        let shape = layout(&[200, 3, 0, 129], 70, dim);
        let dims = Dims { rows: shape.rows(), qk: dim, v: dim };
        let client = CudaRuntime::client(&CudaDevice::default());
        let family = gpu::family(&client, dims, dtype);
        let cores = gpu::has_tensor_cores(&client, dims, dtype);
        println!("{name}, heads of {dim}: {family:?} kernels, tensor cores: {cores}");
        let draw = |seed: usize| -> Vec<f32> {
            let len = dims.rows * HEADS * dim;
            let value = |at: usize| ((at * (37 + seed) % 1009) as f32 / 504.5 - 1.0) * 1.5;
            (0..len).map(|at| bf16::from_f32(value(at)).to_f32()).collect()
        };
        let values: Vec<_> = (0..4).map(draw).collect();
        let found = outputs::<B>(&values, &shape, dim);
        let expected = outputs::<Flex>(&values, &shape, dim);
        for (what, (found, expected)) in
            ["out", "dq", "dk", "dv"].iter().zip(found.iter().zip(&expected))
        {
            let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
            let worst =
                worst.fold(0.0f32, |worst, x| if x > worst || x.is_nan() { x } else { worst });
            println!("  {what}: off by {worst:e} at most, the largest is {most:e}");
            ensure!(worst <= share * most, "{what} in {name} with heads of {dim} is wrong");
        }
    }
    Ok(())
}

/// The output and the gradients of q, k and v, of q, k, v and an output gradient.
fn outputs<B: HstuBackend>(
    values: &[Vec<f32>],
    shape: &Arc<HstuAttention>,
    dim: usize,
) -> [Vec<f32>; 4] {
    let device = Default::default();
    let matrix = |values: &Vec<f32>| {
        let data = TensorData::new(values.clone(), [shape.rows(), HEADS * dim]);
        primitive(Tensor::<B, 2>::from_data(data, &device))
    };
    let (q, k, v) = (matrix(&values[0]), matrix(&values[1]), matrix(&values[2]));
    let inputs = HstuInputs { q, k, v, position: None, time: None };
    let out = B::hstu_attention(inputs.clone(), shape.clone());
    let grads = B::hstu_attention_backward(inputs, matrix(&values[3]), shape.clone());
    [out, grads.q, grads.k, grads.v]
        .map(|x| tensor::<B, 2>(x).into_data().convert::<f32>().to_vec().expect("f32"))
}

fn attention<B: HstuBackend<Device = CudaDevice>>(dtype: &str, n: usize, results: &mut Vec<Value>) {
    const DIM: usize = 256;
    let shape = layout(&[n; REQUESTS], 0, DIM);
    let device = CudaDevice::default();
    let matrix = || {
        let size = [REQUESTS * n, HEADS * DIM];
        primitive(Tensor::<B, 2>::random(size, Distribution::Uniform(-1.0, 1.0), &device))
    };
    let inputs = HstuInputs { q: matrix(), k: matrix(), v: matrix(), position: None, time: None };
    let grad = matrix();
    let time =
        |run: &dyn Fn(HstuInputs<FloatTensor<B>>)| median_s::<B>(&device, || run(inputs.clone()));
    let operations = (4 * DIM * HEADS * REQUESTS * (n * (n + 1) / 2)) as f64;
    let scores = plain::GROUP_SCORES;
    let fused = [
        time(&|inputs| drop(B::hstu_attention(inputs, shape.clone()))),
        time(&|inputs| drop(B::hstu_attention_backward(inputs, grad.clone(), shape.clone()))),
    ];
    let composed = [
        time(&|inputs| drop(plain::forward::<B>(inputs, &shape, scores))),
        time(&|inputs| drop(plain::backward::<B>(inputs, grad.clone(), &shape, scores))),
    ];
    for (pass, counted, ours, theirs) in [
        ("forward", operations, fused[0], composed[0]),
        ("forward and backward", 3.5 * operations, fused[0] + fused[1], composed[0] + composed[1]),
    ] {
        let teraflops = [ours, theirs].map(|seconds| counted / seconds / 1e12);
        let name = format!("attention {pass}, {dtype}, n {n}");
        results.push(result(&name, "TFLOP/s", teraflops, theirs / ours));
    }
}

/// Prints and returns a figure.
fn result(name: &str, unit: &str, [ours, theirs]: [f64; 2], ratio: f64) -> Value {
    println!("{name}: {ours:.2} {unit}, {RIVAL}: {theirs:.2}");
    json!({
        "name": name,
        "value": ours,
        "unit": unit,
        "rival": RIVAL,
        "rival_value": theirs,
        "ratio": ratio,
    })
}

/// The weights of one layer; norms are plain, since a scale and a shift cost next to nothing.
struct StackLayer<B: Backend> {
    uvqk: Tensor<B, 2>,
    output: Tensor<B, 2>,
}

fn stack<B: HstuBackend<Device = CudaDevice>>(dtype: &str, results: &mut Vec<Value>) {
    const WIDTH: usize = 512;
    let device = CudaDevice::default();
    // From 896 to 1,144 tokens, 1,020 on average.
    let histories: Vec<usize> = (0..REQUESTS).map(|b| 896 + 8 * b).collect();
    let shape = layout(&histories, 2048, WIDTH / HEADS);
    let random = |size| Tensor::<B, 2>::random(size, Distribution::Uniform(-0.05, 0.05), &device);
    let layers: Vec<StackLayer<B>> = (0..5)
        .map(|_| StackLayer { uvqk: random([WIDTH, 4 * WIDTH]), output: random([WIDTH, WIDTH]) })
        .collect();
    let x = random([shape.rows(), WIDTH]);
    let run = |attend: &dyn Fn(HstuInputs<Tensor<B, 2>, Tensor<B, 1>>) -> Tensor<B, 2>| {
        median_s::<B>(&device, || {
            drop(layers.iter().fold(x.clone(), |x, layer| forward(x, layer, attend)));
        })
    };
    let fused = run(&|inputs| hstu_attention(inputs, &shape));
    let composed = run(&|inputs| {
        tensor(plain::forward::<B>(inputs.into_primitives(), &shape, plain::GROUP_SCORES))
    });
    let name = format!("DLRMv3-shaped stack forward, {dtype}");
    results.push(result(&name, "ms", [fused, composed].map(|s| s * 1e3), composed / fused));
}

/// `x + (norm(attention) ⊙ U) W_o`, where U, Q, V and K are columns of `SiLU(norm(x) W)`.
fn forward<B: Backend>(
    x: Tensor<B, 2>,
    layer: &StackLayer<B>,
    attend: &dyn Fn(HstuInputs<Tensor<B, 2>, Tensor<B, 1>>) -> Tensor<B, 2>,
) -> Tensor<B, 2> {
    let width = x.dims()[1];
    let all = silu(norm(x.clone()).matmul(layer.uvqk.clone()));
    let [u, q, v, k] = [0, 1, 2, 3].map(|at| all.clone().narrow(1, at * width, width));
    let attended = attend(HstuInputs { q, k, v, position: None, time: None });
    x + (norm(attended) * u).matmul(layer.output.clone())
}

fn norm<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let centred = x.clone() - x.mean_dim(1);
    let variance = (centred.clone() * centred.clone()).mean_dim(1);
    centred / (variance + 1e-5).sqrt()
}

/// The median seconds of 11 runs, after two to compile and warm up.
fn median_s<B: Backend>(device: &B::Device, run: impl Fn()) -> f64 {
    let mut times: Vec<f64> = (0..13)
        .map(|_| {
            B::sync(device).expect("the device answers");
            let start = Instant::now();
            run();
            B::sync(device).expect("the device answers");
            start.elapsed().as_secs_f64()
        })
        .skip(2)
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
