//! The fused layer against its composition of plain operators, and against
//! differences of a computation in f64.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;
use hypercast_kernels::attention::{AttentionWindow, HstuAttention, HstuInputs};
use hypercast_kernels::cpu::{CpuLayer, Isa, StridedRows, layer_backward, layer_forward};
use hypercast_kernels::layer::{
    Affine, HstuLayerWidths, LayerInputs, LayerOptions, LayerOutput, SeededDropout, composed,
    hstu_layer,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{assert_close, forward_f64};

type LayerAutodiff = Autodiff<Flex>;
type LayerValues = LayerInputs<Vec<f32>>;

/// A layer with its inputs.
struct LayerCase {
    name: String,
    widths: HstuLayerWidths,
    options: LayerOptions,
    inputs: LayerValues,
}

/// What a case is made of.
struct LayerRecipe<'a> {
    /// (history, targets) of each request.
    requests: &'a [(usize, usize)],
    heads: usize,
    dim: usize,
    /// Per head.
    qk: usize,
    v: usize,
}

#[derive(Debug, Clone, Copy)]
struct Switches {
    targets_only: bool,
    window: Option<AttentionWindow>,
    tables: bool,
    dropout: f64,
}

const RECIPES: &[LayerRecipe<'static>] = &[
    LayerRecipe {
        requests: &[(0, 3), (1, 1), (5, 0), (17, 4), (0, 0)],
        heads: 2,
        dim: 12,
        qk: 5,
        v: 4,
    },
    LayerRecipe { requests: &[(40, 9), (33, 9), (2, 30), (90, 1)], heads: 1, dim: 7, qk: 5, v: 33 },
    LayerRecipe {
        requests: &[(131, 17), (700, 5), (600, 3), (9, 9)],
        heads: 2,
        dim: 64,
        qk: 32,
        v: 32,
    },
    LayerRecipe { requests: &[(0, 2), (0, 0), (0, 5)], heads: 3, dim: 40, qk: 8, v: 16 },
    LayerRecipe { requests: &[(70, 0), (3, 0)], heads: 1, dim: 33, qk: 16, v: 1 },
];

fn switches() -> Vec<Switches> {
    let window = Some(AttentionWindow { recent: 7, global: 3 });
    let plain = Switches { targets_only: false, window: None, tables: false, dropout: 0.0 };
    vec![
        plain,
        Switches { targets_only: true, ..plain },
        Switches { targets_only: true, window, tables: true, dropout: 0.3 },
        Switches { window, tables: true, dropout: 0.1, ..plain },
    ]
}

impl LayerCase {
    fn new(rng: &mut SmallRng, recipe: &LayerRecipe<'_>, switches: Switches) -> Self {
        let offsets = |lengths: Vec<usize>| -> Arc<[u32]> {
            let ends = lengths.iter().scan(0, |end, length| {
                *end += *length as u32;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect()
        };
        let LayerRecipe { requests, heads, dim, .. } = *recipe;
        let (v, qk) = (heads * recipe.v, heads * recipe.qk);
        let rows = requests.iter().map(|r| r.0 + r.1).sum::<usize>();
        let attention = HstuAttention {
            history_offsets: offsets(requests.iter().map(|r| r.0).collect()),
            target_offsets: offsets(requests.iter().map(|r| r.1).collect()),
            heads,
            alpha: 1.0 / (recipe.qk as f32).sqrt(),
            norm: 11.0,
            window: switches.window,
            targets_only: switches.targets_only,
            times_s: switches
                .tables
                .then(|| (0..rows).map(|_| 1i64 << rng.random_range(0..24)).collect()),
        };
        let mut draw = |len: usize, scale: f32| -> Vec<f32> {
            (0..len).map(|_| rng.random_range(-scale..scale)).collect()
        };
        let inputs = LayerInputs {
            x: draw(rows * dim, 1.5),
            norm_in: Affine { scale: draw(dim, 1.5), shift: draw(dim, 0.5) },
            uvqk: draw(dim * 2 * (v + qk), 2.0 / (dim as f32).sqrt()),
            bias: draw(2 * (v + qk), 0.5),
            position: switches.tables.then(|| draw(9, 1.0)),
            time: switches.tables.then(|| draw(12, 1.0)),
            norm_out: Affine { scale: draw(v, 1.5), shift: draw(v, 0.5) },
            output: draw(v * dim, 2.0 / (v as f32).sqrt()),
        };
        let attention = attention.checked().expect("a valid layout");
        // A large epsilon, so that rows that attention leaves near zero do not blow rounding up.
        let options = LayerOptions {
            attention,
            epsilon: 1e-2,
            dropout: SeededDropout::new(switches.dropout, 77),
        };
        let name = format!("{requests:?}, {heads} heads, d {dim}, v {v}, qk {qk}, {switches:?}");
        LayerCase { name, widths: HstuLayerWidths { rows, dim, v, qk }, options, inputs }
    }

    fn out_rows(&self) -> usize {
        let attention = &self.options.attention;
        self.widths.rows - if attention.targets_only { attention.history_rows() } else { 0 }
    }

    /// An output gradient that is different everywhere.
    fn grad(&self) -> Vec<f32> {
        let len = self.out_rows() * self.widths.dim;
        (0..len).map(|at| ((at * 37 % 101) as f32 - 50.0) / 40.0).collect()
    }

    fn borrow(&self) -> CpuLayer<'_> {
        let HstuLayerWidths { dim, v, qk, .. } = self.widths;
        let LayerInputs { x, norm_in, uvqk, bias, position, time, norm_out, output } = &self.inputs;
        let rows = |data, stride| StridedRows { data, stride };
        LayerInputs {
            x: rows(x, dim),
            norm_in: Affine { scale: &norm_in.scale, shift: &norm_in.shift },
            uvqk: rows(uvqk, 2 * (v + qk)),
            bias,
            position: position.as_deref(),
            time: time.as_deref(),
            norm_out: Affine { scale: &norm_out.scale, shift: &norm_out.shift },
            output: rows(output, dim),
        }
    }

    fn forward(&self, isa: Isa) -> LayerOutput<Vec<f32>> {
        layer_forward(&self.borrow(), self.widths, &self.options, isa)
    }

    fn backward(&self, isa: Isa) -> LayerValues {
        let (attended, grad) = (self.forward(isa).attended, self.grad());
        let given = LayerOutput {
            out: StridedRows { data: &grad, stride: self.widths.dim },
            attended: StridedRows { data: &attended, stride: self.widths.v },
        };
        layer_backward(&self.borrow(), self.widths, &given, &self.options, isa)
    }

    fn tensors<B: Backend>(&self) -> LayerInputs<Tensor<B, 2>, Tensor<B, 1>> {
        let HstuLayerWidths { rows, dim, v, qk } = self.widths;
        let device = Default::default();
        let shapes =
            std::cell::RefCell::new(vec![[rows, dim], [dim, 2 * (v + qk)], [v, dim]].into_iter());
        self.inputs.clone().map(
            |values| {
                let shape = shapes.borrow_mut().next().expect("three matrices");
                Tensor::from_data(TensorData::new(values, shape), &device).require_grad()
            },
            |values| Tensor::from_data(values.as_slice(), &device).require_grad(),
        )
    }
}

fn cases() -> Vec<LayerCase> {
    let mut rng = SmallRng::seed_from_u64(5);
    let pairs = RECIPES.iter().flat_map(|recipe| switches().into_iter().map(move |s| (recipe, s)));
    pairs.map(|(recipe, switches)| LayerCase::new(&mut rng, recipe, switches)).collect()
}

fn named<T>(values: LayerInputs<T>) -> Vec<(&'static str, T)> {
    let mut all = vec![("x", values.x), ("W", values.uvqk), ("b", values.bias)];
    all.extend([("scale in", values.norm_in.scale), ("shift in", values.norm_in.shift)]);
    all.extend([("scale out", values.norm_out.scale), ("shift out", values.norm_out.shift)]);
    all.push(("W_o", values.output));
    all.extend(values.position.map(|table| ("position", table)));
    all.extend(values.time.map(|table| ("time", table)));
    all
}

/// Within a share of the largest value: sums of thousands of terms cancel.
fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(1.0f32, |largest, x| largest.max(x.abs()));
    let scaled = |values: &[f32]| -> Vec<f32> { values.iter().map(|x| x / largest).collect() };
    let expected: Vec<f64> = scaled(expected).into_iter().map(f64::from).collect();
    assert_close(what, &scaled(found), &expected, 2e-5);
}

fn numbers<const D: usize>(tensor: Tensor<LayerAutodiff, D>) -> Vec<f32> {
    tensor.into_data().to_vec().expect("f32")
}

#[test]
fn a_fused_layer_equals_the_composed_one_with_all_gradients() {
    for case in cases() {
        if case.out_rows() == 0 {
            for (name, grad) in named(case.backward(Isa::best())) {
                assert!(grad.iter().all(|&x| x == 0.0), "d{name} of nothing: {}", case.name);
            }
            continue;
        }
        let leaves = case.tensors::<LayerAutodiff>();
        let primitive =
            leaves.clone().map(|x| x.into_primitive().tensor(), |x| x.into_primitive().tensor());
        let out = composed::<LayerAutodiff>(primitive, &case.options);
        let out =
            Tensor::<LayerAutodiff, 2>::from_primitive(burn::tensor::TensorPrimitive::Float(out));
        let shape = [case.out_rows(), case.widths.dim];
        assert_eq!(out.dims(), shape, "{}", case.name);
        let grad = Tensor::from_data(TensorData::new(case.grad(), shape), &Default::default());
        let grads = (out.clone() * grad.clone()).sum().backward();
        let wanted = leaves.map(
            |x| x.grad(&grads).map_or_else(Vec::new, |g| g.into_data().to_vec().expect("f32")),
            |x| x.grad(&grads).map_or_else(Vec::new, |g| g.into_data().to_vec().expect("f32")),
        );
        let expected = numbers(out);
        for isa in Isa::available() {
            let found = case.forward(isa);
            assert_near(&format!("{isa:?}: {}", case.name), &found.out, &expected);
            let found = named(case.backward(isa));
            for ((name, found), (_, wanted)) in found.iter().zip(&named(wanted.clone())) {
                // The composition has no gradient for what it never used: no rows, no targets.
                let zeros = vec![0.0; found.len()];
                let wanted = if wanted.is_empty() { &zeros } else { wanted };
                assert_near(&format!("{isa:?}, d{name}: {}", case.name), found, wanted);
            }
        }
        let leaves = case.tensors::<LayerAutodiff>();
        let out = hstu_layer(leaves.clone(), &case.options);
        let grads = (out * grad).sum().backward();
        let found = leaves.x.grad(&grads).expect("x is tracked").into_data();
        let best = case.backward(Isa::best());
        assert_eq!(found.to_vec::<f32>().expect("f32"), best.x, "the node's: {}", case.name);
        let found = leaves.output.grad(&grads).expect("W_o is tracked").into_data();
        assert_eq!(found.to_vec::<f32>().expect("f32"), best.output, "{}", case.name);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn gpu_layers_equal_those_of_the_cpu_with_all_gradients() {
    type OnGpu = Autodiff<hypercast_kernels::gpu::WgpuBackend>;
    if !crate::gpu::adapter() {
        return;
    }
    // Those of two recipes: compiling a kernel for each shape takes seconds.
    for case in cases().iter().take(2 * switches().len()) {
        let leaves = case.tensors::<OnGpu>();
        let out = hstu_layer(leaves.clone(), &case.options);
        let shape = [case.out_rows(), case.widths.dim];
        let grad = Tensor::from_data(TensorData::new(case.grad(), shape), &Default::default());
        let mut grads = (out.clone() * grad).sum().backward();
        let grads = std::cell::RefCell::new(&mut grads);
        let found = leaves.map(
            |x| x.grad_remove(*grads.borrow_mut()).map(|g| g.into_data().to_vec().expect("f32")),
            |x| x.grad_remove(*grads.borrow_mut()).map(|g| g.into_data().to_vec().expect("f32")),
        );
        let out: Vec<f32> = out.into_data().to_vec().expect("f32");
        assert_near(&case.name, &out, &case.forward(Isa::best()).out);
        let expected = named(case.backward(Isa::best()));
        for ((name, found), (_, expected)) in named(found).into_iter().zip(&expected) {
            let found: Vec<f32> = found.expect("every input is tracked");
            assert_near(&format!("d{name}: {}", case.name), &found, expected);
        }
    }
}

#[test]
fn untracked_inputs_get_no_gradient() {
    let case = &cases()[2];
    let leaves = case.tensors::<LayerAutodiff>();
    let inputs = LayerInputs { x: leaves.x.clone().detach(), ..leaves.clone() };
    let grads = hstu_layer(inputs, &case.options).sum().backward();
    assert!(leaves.x.grad(&grads).is_none(), "x was detached");
    assert!(leaves.bias.grad(&grads).is_some() && leaves.time.unwrap().grad(&grads).is_some());
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let mut rng = SmallRng::seed_from_u64(6);
    // Enough rows for several parts.
    let case = LayerCase::new(&mut rng, &RECIPES[2], switches()[3]);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| named(case.backward(Isa::best())))
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn gradients_equal_differences_of_f64() {
    const STEP: f64 = 1e-5;
    let recipe = LayerRecipe { requests: &[(3, 2), (0, 2), (6, 0)], heads: 2, dim: 5, qk: 3, v: 2 };
    let mut rng = SmallRng::seed_from_u64(9);
    for switches in switches() {
        let case = LayerCase::new(&mut rng, &recipe, switches);
        let values = case.inputs.clone().map_all(|x| x.into_iter().map(f64::from).collect());
        let loss = |values: &LayerInputs<Vec<f64>>| -> f64 {
            let out = layer_f64(&case, values);
            out.iter().zip(case.grad()).map(|(out, grad)| out * f64::from(grad)).sum()
        };
        let found = named(case.backward(Isa::best()));
        for (at, (name, found)) in found.iter().enumerate() {
            let expected: Vec<f64> = (0..found.len())
                .map(|i| {
                    let moved = |step: f64| {
                        let mut values = values.clone();
                        pick(&mut values, at)[i] += step;
                        loss(&values)
                    };
                    (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
                })
                .collect();
            assert_close(&format!("d{name}: {}", case.name), found, &expected, 5e-5);
        }
    }
}

/// The `at`-th of `named`.
fn pick(values: &mut LayerInputs<Vec<f64>>, at: usize) -> &mut Vec<f64> {
    let LayerInputs { x, norm_in, uvqk, bias, position, time, norm_out, output } = values;
    let mut all = vec![x, uvqk, bias, &mut norm_in.scale, &mut norm_in.shift];
    all.extend([&mut norm_out.scale, &mut norm_out.shift, output]);
    all.extend(position);
    all.extend(time);
    all.swap_remove(at)
}

/// The layer, step by step.
fn layer_f64(case: &LayerCase, values: &LayerInputs<Vec<f64>>) -> Vec<f64> {
    let HstuLayerWidths { dim, v, qk, .. } = case.widths;
    let norm = |x: &[f64], width: usize, weights: &Affine<Vec<f64>>| -> Vec<f64> {
        let row = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let deviation = (variance + f64::from(case.options.epsilon)).sqrt();
            let normed = x.iter().map(|x| (x - mean) / deviation);
            let weights = weights.scale.iter().zip(&weights.shift);
            normed.zip(weights).map(|(x, (scale, shift))| x * scale + shift).collect()
        };
        x.chunks_exact(width).flat_map(row).collect()
    };
    let product = |x: &[f64], from: usize, weight: &[f64]| -> Vec<f64> {
        let to = weight.len() / from;
        let cell = |row: &[f64], o: usize| (0..from).map(|i| row[i] * weight[i * to + o]).sum();
        x.chunks_exact(from)
            .flat_map(|row| (0..to).map(move |o| cell(row, o)).collect::<Vec<f64>>())
            .collect()
    };
    let width = 2 * (v + qk);
    let mixed: Vec<f64> = product(&norm(&values.x, dim, &values.norm_in), dim, &values.uvqk)
        .iter()
        .enumerate()
        .map(|(at, z)| z + values.bias[at % width])
        .map(|z| z / (1.0 + (-z).exp()))
        .collect();
    let columns = |from: usize, count: usize| -> Vec<f64> {
        mixed.chunks_exact(width).flat_map(|row| row[from..from + count].to_vec()).collect()
    };
    let inputs = HstuInputs {
        q: columns(v, qk),
        v: columns(v + qk, v),
        k: columns(2 * v + qk, qk),
        position: values.position.clone(),
        time: values.time.clone(),
    };
    let attended = forward_f64(&case.options.attention, &inputs);
    let mut gated = norm(&attended, v, &values.norm_out);
    gated.iter_mut().zip(columns(0, v)).for_each(|(gated, u)| *gated *= u);
    let first = case.widths.rows - case.out_rows();
    let mut gated = gated.split_off(first * v);
    if let Some(dropout) = case.options.dropout {
        let mask = dropout.mask([case.out_rows(), v]);
        gated.iter_mut().zip(mask).for_each(|(gated, mask)| *gated *= f64::from(mask));
    }
    let out = product(&gated, v, &values.output);
    out.iter().zip(&values.x[first * dim..]).map(|(out, x)| out + x).collect()
}

#[test]
fn a_mask_is_a_function_of_its_seed_and_keeps_the_mean() {
    let mask = |seed| SeededDropout::new(0.25, seed).expect("a rate").mask([200, 64]);
    assert_eq!(mask(5), mask(5));
    assert_ne!(mask(5), mask(6));
    assert!(SeededDropout::new(0.0, 5).is_none());
    let zeros = |values: &[f32]| values.iter().filter(|&&v| v == 0.0).count() as f64;
    let first = mask(5);
    assert!((zeros(&first) / 12_800.0 - 0.25).abs() < 0.015, "{}", zeros(&first));
    assert!((first.iter().sum::<f32>() / 12_800.0 - 1.0).abs() < 0.02);
    // Neighbours, by row, by column and by seed, are dropped together as often as chance has it.
    let other = mask(6);
    let both = |shift: usize, with: &[f32]| {
        let pairs = first.iter().zip(&with[shift..]);
        pairs.filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64 / 12_800.0
    };
    for (what, share) in
        [("column", both(1, &first)), ("row", both(64, &first)), ("seed", both(0, &other))]
    {
        assert!((share - 0.0625).abs() < 0.01, "{what}: {share}");
    }
}
