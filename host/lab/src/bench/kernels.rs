//! HSTU attention on this machine, beside PyTorch and plain Burn operators.
//!
//! Only useful operations count: the pairs that the mask allows, at `2 (qk + v)` operations per
//! pair and head forward and 5/2 of that backward, whatever a contender computes.

use std::sync::Arc;

use burn::tensor::{Distribution, Tensor, TensorPrimitive, ops::FloatTensor};
use burn_flex::Flex;
use hypercast_fm::spec::FmConfig;
use hypercast_kernels::{
    attention::{AttentionWindow, HstuAttention, HstuBackend, HstuInputs},
    cpu::CpuKeptHistory,
    history::{KeptHistory, KeptLayer},
    plain,
};
use serde_json::{Value, json};

use super::{
    BenchOptions, BenchReport,
    timing::{MS, Rival, Scale, timed},
    torch::Torch,
};
use crate::error::Result;

/// A batch of histories.
#[derive(Debug, Clone)]
struct AttentionSize {
    lengths: Vec<usize>,
    heads: usize,
    dim: usize,
    window: Option<AttentionWindow>,
    /// Entries of the position and of the time bias; none for attention without biases.
    buckets: Option<[usize; 2]>,
}

impl AttentionSize {
    fn full(requests: usize, heads: usize, longest: usize, dim: usize) -> Self {
        Self { lengths: vec![longest; requests], heads, dim, window: None, buckets: None }
    }

    /// Lengths spread evenly from half of the longest to all of it. Rivals must pad.
    fn jagged(&self) -> Self {
        let longest = self.lengths[0];
        let step = longest / 2 / (self.lengths.len() - 1).max(1);
        let lengths = (0..self.lengths.len()).map(|request| longest - request * step).collect();
        Self { lengths, ..self.clone() }
    }

    /// With as many entries of biases as the FM has by default.
    fn biased(&self) -> Self {
        let FmConfig { position_buckets, time_buckets, .. } = FmConfig::default();
        Self { buckets: Some([position_buckets, time_buckets]), ..self.clone() }
    }

    /// `B8 H4 N256 d32`; `N128-256` where lengths differ.
    fn name(&self) -> String {
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        let shortest = self.lengths.iter().min().copied().unwrap_or(0);
        let length =
            if shortest < longest { format!("{shortest}-{longest}") } else { longest.to_string() };
        let biases = if self.buckets.is_some() { ", biases" } else { "" };
        format!("B{} H{} N{length} d{}{biases}", self.lengths.len(), self.heads, self.dim)
    }

    /// Useful operations of a forward pass.
    fn operations(&self) -> f64 {
        let pairs: usize = self.lengths.iter().map(|n| n * (n + 1) / 2).sum();
        (4 * self.dim * self.heads * pairs) as f64
    }

    fn case(&self, backward: bool) -> Value {
        json!({
            "kind": "attention", "lengths": self.lengths, "heads": self.heads, "qk": self.dim,
            "v": self.dim, "backward": backward, "buckets": self.buckets,
        })
    }

    fn layout(&self) -> Arc<HstuAttention> {
        let mut offsets = vec![0];
        for length in &self.lengths {
            offsets.push(offsets[offsets.len() - 1] + *length as u32);
        }
        let times = || self.lengths.iter().flat_map(|&n| (0..n as i64).map(|at| at * 1000));
        let layout = HstuAttention {
            target_offsets: vec![0; offsets.len()].into(),
            history_offsets: offsets.into(),
            heads: self.heads,
            alpha: 1.0 / (self.dim as f32).sqrt(),
            norm: self.lengths.iter().max().map_or(1.0, |&n| n as f32),
            window: self.window,
            targets_only: false,
            times_s: self.buckets.map(|_| times().collect()),
        };
        layout.checked().expect("a valid layout")
    }

    fn inputs(&self) -> HstuInputs<FloatTensor<Flex>> {
        let rows = self.lengths.iter().sum();
        let table = |at: usize| self.buckets.map(|buckets| random([buckets[at]]));
        HstuInputs {
            q: random([rows, self.heads * self.dim]),
            k: random([rows, self.heads * self.dim]),
            v: random([rows, self.heads * self.dim]),
            position: table(0),
            time: table(1),
        }
    }
}

fn random<const D: usize>(shape: [usize; D]) -> FloatTensor<Flex> {
    let tensor =
        Tensor::<Flex, D>::random(shape, Distribution::Normal(0.0, 0.5), &Default::default());
    match tensor.into_primitive() {
        TensorPrimitive::Float(tensor) => tensor,
        other => other.tensor(),
    }
}

/// Two shapes, each with full and jagged lengths and with biases, forward and with backward.
pub fn attention(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let shapes = [AttentionSize::full(8, 4, 256, 32), AttentionSize::full(4, 4, 1024, 64)];
    let variants = |size: AttentionSize| [size.jagged(), size.jagged().biased(), size];
    let sizes: Vec<AttentionSize> = shapes.into_iter().flat_map(variants).collect();
    let cases: Vec<Value> =
        sizes.iter().flat_map(|size| [size.case(false), size.case(true)]).collect();
    let torch = Torch::start(options, report, &cases);
    for (at, size) in sizes.iter().enumerate() {
        let (layout, inputs) = (size.layout(), size.inputs());
        let grad = random([layout.rows(), size.heads * size.dim]);
        let forward = || Flex::hstu_attention(inputs.clone(), layout.clone());
        let backward =
            || Flex::hstu_attention_backward(inputs.clone(), grad.clone(), layout.clone());
        let plain = || plain::forward::<Flex>(inputs.clone(), &layout, plain::GROUP_SCORES);
        let plain_backward =
            || plain::backward::<Flex>(inputs.clone(), grad.clone(), &layout, plain::GROUP_SCORES);
        let both = || Ok((forward(), backward()));
        let plain_both = || Ok((plain(), plain_backward()));
        let contenders =
            [(timed(|| Ok(forward())), timed(|| Ok(plain()))), (timed(both), timed(plain_both))];
        let kinds = [("forward", 1.0), ("forward+backward", 3.5)];
        for (kind, ((ours, plain), (name, factor))) in contenders.into_iter().zip(kinds).enumerate()
        {
            let mut rivals = vec![Rival { name: "plain Burn ops", run: plain }];
            rivals.extend(torch.iter().flat_map(|torch| torch.rivals(2 * at + kind)));
            let name = format!("attention {name}, {}", size.name());
            let speed = |seconds: f64| factor * size.operations() / seconds / 1e9;
            report.race(
                &name,
                Scale { unit: "GFLOP/s", of_seconds: speed },
                options.runs,
                ours,
                rivals,
            )?;
        }
    }
    Ok(())
}

/// A window of the newest events beside the dense kernel.
pub fn window(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dense = AttentionSize::full(2, 4, 4096, 64);
    let windowed =
        AttentionSize { window: Some(AttentionWindow { recent: 256, global: 0 }), ..dense.clone() };
    let inputs = dense.inputs();
    let grad = random([2 * 4096, 4 * 64]);
    let (dense, windowed) = (dense.layout(), windowed.layout());
    let forward =
        |layout: &Arc<HstuAttention>| Flex::hstu_attention(inputs.clone(), layout.clone());
    let both = |layout: &Arc<HstuAttention>| {
        let grads = Flex::hstu_attention_backward(inputs.clone(), grad.clone(), layout.clone());
        (forward(layout), grads)
    };
    let contenders = [
        ("forward", timed(|| Ok(forward(&windowed))), timed(|| Ok(forward(&dense)))),
        ("forward+backward", timed(|| Ok(both(&windowed))), timed(|| Ok(both(&dense)))),
    ];
    for (name, ours, run) in contenders {
        let rivals = vec![Rival { name: "the dense fused kernel", run }];
        let name = format!("window 256 of N4096, B2 H4 d64, {name}");
        report.race(&name, MS, options.runs.min(10), ours, rivals)?;
    }
    Ok(())
}

/// Candidates over one shared history, beside each with its own copy of it.
pub fn shared(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    const CANDIDATES: usize = 100;
    let history = AttentionSize::full(1, 4, 1024, 32);
    let width = history.heads * history.dim;
    let mut kept = CpuKeptHistory::default();
    let own = history.inputs();
    CpuKeptHistory::keep(own.k.clone(), own.v.clone(), &history.layout(), &mut [&mut kept]);
    let targets = HstuInputs {
        q: random([CANDIDATES, width]),
        k: random([CANDIDATES, width]),
        v: random([CANDIDATES, width]),
        position: None,
        time: None,
    };
    let layout = HstuAttention {
        history_offsets: [0, 0].into(),
        target_offsets: [0, CANDIDATES as u32].into(),
        ..(*history.layout()).clone()
    };
    let layout = layout.checked().expect("a valid layout");
    // Each candidate is the last token of a copy of the history.
    let copies = AttentionSize { lengths: vec![1025; CANDIDATES], ..history };
    let (copies_layout, inputs) = (copies.layout(), copies.inputs());
    let ours = timed(|| {
        let kept = [KeptHistory { layer: &kept, times_s: &[] }];
        Ok(CpuKeptHistory::attend(targets.clone(), &kept, &layout))
    });
    let run = timed(|| Ok(Flex::hstu_attention(inputs.clone(), copies_layout.clone())));
    let rivals = vec![Rival { name: "a copy of the history each", run }];
    let name = format!("attention of {CANDIDATES} candidates over one history of 1024, H4 d32");
    report.race(&name, MS, options.runs.min(5), ours, rivals)?;
    Ok(())
}
