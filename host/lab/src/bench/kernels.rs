//! HSTU attention on this machine, beside PyTorch's eager operators and plain
//! Burn operators.
//!
//! Useful operations alone count: pairs that are seen, at `2 (qk + v)` operations a
//! pair and head forward and 5/2 of that backward, whatever a contender computes.

use std::{hint::black_box, sync::Arc};

use burn::tensor::{Distribution, Tensor, TensorPrimitive, ops::FloatTensor};
use burn_flex::Flex;
use hypercast_kernels::{
    attention::{HstuAttention, HstuBackend, HstuInputs, Window},
    history::{HistoryBackend, KeptHistory},
    plain,
};
use serde_json::{Value, json};

use super::{
    Options, Report, Rival,
    timing::{Contender, median_s, medians_s},
    torch,
};

/// A batch of histories.
#[derive(Debug, Clone)]
struct Size {
    lengths: Vec<usize>,
    heads: usize,
    dim: usize,
    window: Option<Window>,
}

impl Size {
    /// Histories between half of `longest` and all of it: what padding costs is part of the comparison.
    fn jagged(requests: usize, heads: usize, longest: usize, dim: usize) -> Self {
        let step = longest / 2 / requests.saturating_sub(1).max(1);
        let lengths = (0..requests).map(|request| longest - request * step).collect();
        Self { lengths, heads, dim, window: None }
    }

    fn name(&self) -> String {
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        format!("B{} H{} N{longest} d{}", self.lengths.len(), self.heads, self.dim)
    }

    /// Operations of a forward that count.
    fn operations(&self) -> f64 {
        let pairs: usize = self.lengths.iter().map(|n| n * (n + 1) / 2).sum();
        (4 * self.dim * self.heads * pairs) as f64
    }

    fn case(&self, backward: bool) -> Value {
        json!({
            "kind": "attention", "lengths": self.lengths, "heads": self.heads,
            "qk": self.dim, "v": self.dim, "backward": backward,
        })
    }

    fn shape(&self) -> Arc<HstuAttention> {
        let mut offsets = vec![0];
        for length in &self.lengths {
            offsets.push(offsets[offsets.len() - 1] + *length as u32);
        }
        let shape = HstuAttention {
            target_offsets: vec![0; offsets.len()].into(),
            history_offsets: offsets.into(),
            heads: self.heads,
            alpha: 1.0 / (self.dim as f32).sqrt(),
            norm: self.lengths.iter().max().map_or(1.0, |&n| n as f32),
            window: self.window,
            targets_only: false,
            times_s: None,
        };
        shape.checked().expect("a valid layout")
    }

    fn inputs(&self) -> HstuInputs<FloatTensor<Flex>> {
        let rows = self.lengths.iter().sum();
        HstuInputs {
            q: matrix(rows, self.heads * self.dim),
            k: matrix(rows, self.heads * self.dim),
            v: matrix(rows, self.heads * self.dim),
            position: None,
            time: None,
        }
    }
}

fn matrix(rows: usize, columns: usize) -> FloatTensor<Flex> {
    let device = Default::default();
    let tensor =
        Tensor::<Flex, 2>::random([rows, columns], Distribution::Normal(0.0, 0.5), &device);
    match tensor.into_primitive() {
        TensorPrimitive::Float(tensor) => tensor,
        other => other.tensor(),
    }
}

/// Adds the figures of the part.
pub fn measure(options: &Options, report: &mut Report) {
    let sizes = [Size::jagged(8, 4, 256, 32), Size::jagged(4, 4, 1024, 64)];
    if options.wants("attention") {
        attention(options, report, &sizes);
    }
    if options.wants("window") {
        sparse(options, report);
    }
    if options.wants("shared") {
        shared(options, report);
    }
}

/// Both sizes, forward and with backward.
fn attention(options: &Options, report: &mut Report, sizes: &[Size]) {
    let cases: Vec<Value> =
        sizes.iter().flat_map(|size| [size.case(false), size.case(true)]).collect();
    let torch = torch::run(&options.python, &cases, options.runs);
    match &torch {
        Ok(torch) => report.version("torch", &torch.version),
        Err(why) => report.note(why.clone()),
    }
    for (at, size) in sizes.iter().enumerate() {
        let (shape, inputs) = (size.shape(), size.inputs());
        let grad = matrix(shape.rows(), size.heads * size.dim);
        let [fused, with_backward, plain, plain_backward] = {
            let forward = || Flex::hstu_attention(inputs.clone(), shape.clone());
            let backward =
                || Flex::hstu_attention_backward(inputs.clone(), grad.clone(), shape.clone());
            let of_plain = || plain::forward::<Flex>(inputs.clone(), &shape, plain::GROUP_SCORES);
            let plain_back = || {
                plain::backward::<Flex>(inputs.clone(), grad.clone(), &shape, plain::GROUP_SCORES)
            };
            let mut contenders: [Contender<'_>; 4] = [
                Box::new(|| drop(black_box(forward()))),
                Box::new(|| drop(black_box((forward(), backward())))),
                Box::new(|| drop(black_box(of_plain()))),
                Box::new(|| drop(black_box((of_plain(), plain_back())))),
            ];
            let medians = medians_s(options.runs, &mut contenders);
            [medians[0], medians[1], medians[2], medians[3]]
        };
        let kinds = [
            ("forward", 1.0, fused, plain),
            ("forward+backward", 3.5, with_backward, plain_backward),
        ];
        for (kind, (name, factor, ours, of_plain)) in kinds.into_iter().enumerate() {
            let speed = |seconds: f64| factor * size.operations() / seconds / 1e9;
            let rival =
                |name: &str, seconds| Some(Rival { name: name.into(), value: speed(seconds) });
            let name = format!("attention {name}, {}", size.name());
            if let Ok(torch) = &torch {
                let seconds = torch.seconds[2 * at + kind];
                report.add(name.clone(), (speed(ours), "GFLOP/s"), rival("PyTorch eager", seconds));
            }
            report.add(name, (speed(ours), "GFLOP/s"), rival("plain Burn ops", of_plain));
        }
    }
}

/// A window beside the dense kernel.
fn sparse(options: &Options, report: &mut Report) {
    let dense = Size { lengths: vec![4096; 2], heads: 4, dim: 64, window: None };
    let sparse = Size { window: Some(Window { recent: 256, global: 0 }), ..dense.clone() };
    let inputs = dense.inputs();
    let grad = matrix(2 * 4096, 4 * 64);
    let (whole, window) = (dense.shape(), sparse.shape());
    let forward = |shape: &Arc<HstuAttention>| Flex::hstu_attention(inputs.clone(), shape.clone());
    let both = |shape: &Arc<HstuAttention>| {
        let grads = Flex::hstu_attention_backward(inputs.clone(), grad.clone(), shape.clone());
        (forward(shape), grads)
    };
    let mut contenders: [Contender<'_>; 4] = [
        Box::new(|| drop(black_box(forward(&window)))),
        Box::new(|| drop(black_box(forward(&whole)))),
        Box::new(|| drop(black_box(both(&window)))),
        Box::new(|| drop(black_box(both(&whole)))),
    ];
    let runs = options.runs.min(10);
    let took = medians_s(runs, &mut contenders);
    for (name, at) in [("forward", 0), ("forward+backward", 2)] {
        let rival = Rival { name: "the dense fused kernel".into(), value: took[at + 1] * 1e3 };
        let name = format!("window 256 of N4096, B2 H4 d64, {name}");
        report.add(name, (took[at] * 1e3, "ms"), Some(rival));
    }
}

/// Candidates over one shared history, beside each with its own copy of it.
fn shared(options: &Options, report: &mut Report) {
    const CANDIDATES: usize = 100;
    let history = Size { lengths: vec![1024], heads: 4, dim: 32, window: None };
    let width = history.heads * history.dim;
    let mut kept = <Flex as HistoryBackend>::Kept::default();
    let own = history.inputs();
    Flex::keep(own.k.clone(), own.v.clone(), &history.shape(), &mut [&mut kept]);
    let targets = HstuInputs {
        q: matrix(CANDIDATES, width),
        k: matrix(CANDIDATES, width),
        v: matrix(CANDIDATES, width),
        position: None,
        time: None,
    };
    let layout = HstuAttention {
        history_offsets: [0, 0].into(),
        target_offsets: [0, CANDIDATES as u32].into(),
        ..(*history.shape()).clone()
    };
    let layout = layout.checked().expect("a valid layout");
    let shared_s = median_s(options.runs, || {
        let kept = [KeptHistory { layer: &kept, times_s: &[] }];
        black_box(Flex::attend(targets.clone(), &kept, &layout));
    });
    // Each candidate is the last token of a copy of the history.
    let copies = Size { lengths: vec![1025; CANDIDATES], ..history };
    let (shape, inputs) = (copies.shape(), copies.inputs());
    let copied_s = median_s(options.runs.min(5), || {
        black_box(Flex::hstu_attention(inputs.clone(), shape.clone()));
    });
    let rival = Rival { name: "a copy of the history each".into(), value: copied_s * 1e3 };
    let name = format!("attention of {CANDIDATES} candidates over one history of 1024, H4 d32");
    report.add(name, (shared_s * 1e3, "ms"), Some(rival));
}
