//! Random jagged batches, over all masks and biases.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use hypercast_kernels::attention::{AttentionWindow, Dims, HstuAttention, HstuBackend, HstuInputs};
use hypercast_kernels::cpu::{self, CpuInputs, Isa, StridedRows};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{forward_f64, wide};

pub type CaseValues = HstuInputs<Vec<f32>>;

/// A layout with inputs that fit it.
pub struct AttentionCase {
    pub name: String,
    pub shape: Arc<HstuAttention>,
    pub inputs: CaseValues,
    pub qk: usize,
    pub v: usize,
}

/// What a case is made of.
pub struct CaseRecipe<'a> {
    /// (history, targets) of each request.
    pub requests: &'a [(usize, usize)],
    pub heads: usize,
    pub qk: usize,
    pub v: usize,
}

impl AttentionCase {
    pub fn new(rng: &mut SmallRng, recipe: &CaseRecipe<'_>, options: CaseOptions) -> AttentionCase {
        let offsets = |lengths: Vec<usize>| -> Arc<[u32]> {
            let mut end = 0;
            let ends = lengths.iter().map(|length| {
                end += *length as u32;
                end
            });
            std::iter::once(0).chain(ends).collect()
        };
        let history_offsets = offsets(recipe.requests.iter().map(|r| r.0).collect());
        let target_offsets = offsets(recipe.requests.iter().map(|r| r.1).collect());
        let rows = recipe.requests.iter().map(|r| r.0 + r.1).sum::<usize>();
        let CaseRecipe { heads, qk, v, .. } = *recipe;
        let shape = HstuAttention {
            history_offsets,
            target_offsets,
            heads,
            alpha: 1.0 / (qk as f32).sqrt(),
            norm: 13.0,
            window: options.window,
            targets_only: rng.random_bool(0.3),
            // Spread over the buckets, and not in order.
            times_s: (options.time > 0)
                .then(|| (0..rows).map(|_| 1i64 << rng.random_range(0..24)).collect()),
        };
        let mut draw =
            |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect() };
        let inputs = HstuInputs {
            q: draw(rows * heads * qk),
            k: draw(rows * heads * qk),
            v: draw(rows * heads * v),
            position: (options.position > 0).then(|| draw(options.position)),
            time: (options.time > 0).then(|| draw(options.time)),
        };
        let targets_only = shape.targets_only;
        let name = format!(
            "{:?}, {heads} heads, {qk}/{v}, {options:?}, targets only: {targets_only}",
            recipe.requests
        );
        let shape = shape.checked().expect("a valid layout");
        AttentionCase { name, shape, inputs, qk, v }
    }

    pub fn dims(&self) -> Dims {
        Dims { rows: self.shape.rows(), qk: self.qk, v: self.v }
    }

    pub fn borrow(&self) -> CpuInputs<'_> {
        let rows = |data, width| StridedRows { data, stride: self.shape.heads * width };
        HstuInputs {
            q: rows(&self.inputs.q, self.qk),
            k: rows(&self.inputs.k, self.qk),
            v: rows(&self.inputs.v, self.v),
            position: self.inputs.position.as_deref(),
            time: self.inputs.time.as_deref(),
        }
    }

    pub fn oracle(&self) -> Vec<f64> {
        forward_f64(&self.shape, &wide(&self.inputs))
    }

    pub fn tensors<B: HstuBackend>(&self) -> HstuInputs<Tensor<B, 2>, Tensor<B, 1>> {
        let device = Default::default();
        let matrix = |values: &Vec<f32>, width: usize| {
            let shape = [self.shape.rows(), self.shape.heads * width];
            Tensor::from_data(TensorData::new(values.clone(), shape), &device)
        };
        let table = |values: &Vec<f32>| Tensor::from_data(values.as_slice(), &device);
        HstuInputs {
            q: matrix(&self.inputs.q, self.qk),
            k: matrix(&self.inputs.k, self.qk),
            v: matrix(&self.inputs.v, self.v),
            position: self.inputs.position.as_ref().map(table),
            time: self.inputs.time.as_ref().map(table),
        }
    }

    /// An output gradient that is different everywhere.
    pub fn grad(&self) -> Vec<f32> {
        let len = self.shape.rows() * self.shape.heads * self.v;
        (0..len).map(|at| ((at * 37 % 101) as f32 - 50.0) / 40.0).collect()
    }

    pub fn grad_tensor<B: HstuBackend>(&self) -> Tensor<B, 2> {
        let width = [self.shape.rows(), self.shape.heads * self.v];
        Tensor::from_data(TensorData::new(self.grad(), width), &Default::default())
    }

    pub fn raw_backward(&self, isa: Isa) -> CaseValues {
        let grad = self.grad();
        let grad = StridedRows { data: &grad, stride: self.shape.heads * self.v };
        cpu::backward(&self.shape, self.dims(), &self.borrow(), grad, isa)
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct CaseOptions {
    pub window: Option<AttentionWindow>,
    /// Entries of the position table; 0 for none.
    pub position: usize,
    /// Entries of the time table; 0 for none.
    pub time: usize,
}

pub fn options() -> Vec<CaseOptions> {
    let windows = [
        None,
        Some(AttentionWindow { recent: 1, global: 0 }),
        Some(AttentionWindow { recent: 7, global: 3 }),
        Some(AttentionWindow { recent: 70, global: 0 }),
        Some(AttentionWindow { recent: 20, global: 90 }),
    ];
    let tables = [(0, 0), (5, 0), (400, 0), (0, 12), (9, 30), (1, 1)];
    let pairs = windows.iter().flat_map(|window| tables.map(|table| (*window, table)));
    pairs.map(|(window, (position, time))| CaseOptions { window, position, time }).collect()
}

pub const RECIPES: &[CaseRecipe<'static>] = &[
    CaseRecipe { requests: &[(0, 3), (1, 1), (5, 0), (17, 4), (0, 0)], heads: 2, qk: 16, v: 16 },
    CaseRecipe { requests: &[(64, 8), (33, 9)], heads: 1, qk: 5, v: 7 },
    CaseRecipe { requests: &[(131, 17)], heads: 3, qk: 24, v: 40 },
    CaseRecipe { requests: &[(65, 1), (100, 16), (2, 2)], heads: 2, qk: 32, v: 32 },
    CaseRecipe { requests: &[(300, 5)], heads: 1, qk: 8, v: 1 },
];

pub fn cases() -> Vec<AttentionCase> {
    let mut rng = SmallRng::seed_from_u64(7);
    let pairs = RECIPES.iter().flat_map(|recipe| options().into_iter().map(move |o| (recipe, o)));
    pairs.map(|(recipe, options)| AttentionCase::new(&mut rng, recipe, options)).collect()
}

/// Small ones: a numeric gradient needs two forwards an input value.
pub fn small_cases() -> Vec<AttentionCase> {
    let mut rng = SmallRng::seed_from_u64(8);
    let recipe = CaseRecipe { requests: &[(3, 2), (0, 2), (6, 0), (9, 1)], heads: 2, qk: 3, v: 2 };
    let window = Some(AttentionWindow { recent: 3, global: 2 });
    let all = [None, window].map(|window| {
        [(0, 0), (4, 0), (0, 9), (20, 5)].map(|(position, time)| CaseOptions {
            window,
            position,
            time,
        })
    });
    all.into_iter()
        .flatten()
        .map(|options| AttentionCase::new(&mut rng, &recipe, options))
        .collect()
}

/// Batches drawn at random: sizes that divide nothing, empty histories, requests without targets
/// or without anything, windows and tables of any size, times of any distance.
pub fn random_cases(seed: u64, count: usize, limits: CaseLimits) -> Vec<AttentionCase> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..count).map(|_| random_case(&mut rng, limits)).collect()
}

/// How large a random case may be.
#[derive(Debug, Clone, Copy)]
pub struct CaseLimits {
    /// Columns a head.
    pub dim: usize,
    /// Entries of the time table.
    pub buckets: usize,
}

fn random_case(rng: &mut SmallRng, limits: CaseLimits) -> AttentionCase {
    let longest = [3, 40, 180][rng.random_range(0..3)];
    // One row at least, for a case to test something.
    let mut requests = vec![(rng.random_range(0..longest), rng.random_range(1..=70))];
    for _ in 0..rng.random_range(0..4) {
        let mut length = |most| match rng.random_range(0..4) {
            0 => 0,
            _ => rng.random_range(0..=most),
        };
        requests.push((length(longest), length(70)));
    }
    let recipe = CaseRecipe {
        requests: &requests,
        heads: rng.random_range(1..4),
        qk: rng.random_range(1..=limits.dim),
        v: rng.random_range(1..=limits.dim),
    };
    let window = rng.random_bool(0.6).then(|| AttentionWindow {
        recent: rng.random_range(1..=longest),
        global: rng.random_range(0..=longest),
    });
    let mut entries = |most| if rng.random_bool(0.6) { rng.random_range(1..=most) } else { 0 };
    let options =
        CaseOptions { window, position: entries(longest + 20), time: entries(limits.buckets) };
    let mut case = AttentionCase::new(rng, &recipe, options);
    if case.shape.times_s.is_some() && rng.random_bool(0.7) {
        let mut shape = (*case.shape).clone();
        let any = |_| rng.random_range(i64::MIN..=i64::MAX) >> rng.random_range(0..64);
        let mut times: Vec<i64> = (0..shape.rows()).map(any).collect();
        case.name += ", times of any distance";
        if rng.random_bool(0.5) {
            times.iter_mut().for_each(|time_s| *time_s >>= 34);
            times.sort_unstable();
            case.name += " below 2^31 s, ascending";
        }
        shape.times_s = Some(times.into());
        case.shape = shape.checked().expect("a valid layout");
    }
    case
}
