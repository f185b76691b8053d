//! cargo run -p hypercast-kernels --example attention_speed
//!
//! Useful GFLOP/s of HSTU attention on this CPU: only pairs that are seen count, at
//! 2 (qk + v) operations a pair and head forward, and 5/2 of that backward.

use std::hint::black_box;
use std::time::Instant;

use hypercast_kernels::attention::{Dims, HstuAttention, HstuInputs};
use hypercast_kernels::cpu::{self, Isa, Rows};

struct Size {
    requests: usize,
    heads: usize,
    /// The longest history; where they are jagged, the shortest is half as long.
    history: usize,
    jagged: bool,
    targets: usize,
    dim: usize,
    biases: bool,
}

fn main() {
    let figure = Size {
        requests: 8,
        heads: 4,
        history: 256,
        jagged: true,
        targets: 0,
        dim: 32,
        biases: false,
    };
    let larger = Size { requests: 4, history: 1024, dim: 64, ..figure };
    let train = Size { requests: 64, heads: 2, history: 100, jagged: false, targets: 16, ..figure };
    let biased = Size { biases: true, ..train };
    let narrow = Size { dim: 16, ..train };
    let long = Size { requests: 4, history: 1024, jagged: false, targets: 64, ..figure };
    for size in [figure, larger, train, biased, narrow, long] {
        for isa in Isa::available() {
            measure(&size, isa);
        }
    }
}

impl Size {
    fn histories(&self) -> Vec<usize> {
        let step = self.history / 2 / (self.requests - 1);
        let shorter = |request| if self.jagged { request * step } else { 0 };
        (0..self.requests).map(|request| self.history - shorter(request)).collect()
    }
}

fn measure(size: &Size, isa: Isa) {
    let histories = size.histories();
    let offsets = |lengths: &[usize]| {
        (0..=lengths.len()).map(|b| lengths[..b].iter().sum::<usize>() as u32).collect()
    };
    let targets = vec![size.targets; size.requests];
    let rows = histories.iter().chain(&targets).sum::<usize>();
    let shape = HstuAttention {
        history_offsets: offsets(&histories),
        target_offsets: offsets(&targets),
        heads: size.heads,
        alpha: 1.0 / (size.dim as f32).sqrt(),
        norm: 128.0,
        window: None,
        targets_only: false,
        times_s: size.biases.then(|| (0..rows as i64).map(|row| row * row % 100_000).collect()),
    }
    .checked()
    .expect("a valid layout");
    let values = |seed: usize| -> Vec<f32> {
        let len = rows * size.heads * size.dim;
        (0..len).map(|at| ((at * 31 + seed) % 97) as f32 / 97.0 - 0.5).collect()
    };
    let (q, k, v, grad) = (values(1), values(2), values(3), values(4));
    let table = [0.1; 32];
    let matrix = |data| Rows { data, stride: size.heads * size.dim };
    let inputs = HstuInputs {
        q: matrix(&q),
        k: matrix(&k),
        v: matrix(&v),
        position: size.biases.then_some(&table[..]),
        time: size.biases.then_some(&table[..]),
    };
    let dims = Dims { rows, qk: size.dim, v: size.dim };
    let forward_s = fastest_s(|| {
        black_box(cpu::forward(&shape, dims, &inputs, isa));
    });
    let backward_s = fastest_s(|| {
        black_box(cpu::backward(&shape, dims, &inputs, matrix(&grad), isa));
    });
    let pairs: usize = histories.iter().map(|n| n * (n + 1) / 2 + size.targets * (n + 1)).sum();
    let operations = (4 * size.dim * size.heads * pairs) as f64;
    println!(
        "{} x {} heads, history up to {}, targets {}, dim {}, biases {}, {isa:?}: forward {:.1} ms, {:.0} GFLOP/s; with backward {:.1} ms, {:.0} GFLOP/s",
        size.requests,
        size.heads,
        size.history,
        size.targets,
        size.dim,
        size.biases,
        forward_s * 1e3,
        operations / forward_s / 1e9,
        (forward_s + backward_s) * 1e3,
        3.5 * operations / (forward_s + backward_s) / 1e9,
    );
}

/// The fastest of 30 runs: the machine's other work only ever slows one down.
fn fastest_s(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..30).map(time).fold(f64::INFINITY, f64::min)
}
