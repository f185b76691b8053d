//! Histories that are kept between passes: however a history is split into passes, each token's
//! output equals the oracle's over the whole history.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_flex::Flex;
use hypercast_kernels::attention::{HstuAttention, HstuInputs};
use hypercast_kernels::cpu::CpuKeptHistory;
use hypercast_kernels::history::{JoinedHistory, KeptHistory, KeptLayer};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::assert_close;
use crate::case::{AttentionCase, cases};

/// A batch of some rows of a case: a range of history tokens of each request, and all targets or
/// none.
struct KeptPass {
    history: Vec<Range<usize>>,
    targets: bool,
}

impl KeptPass {
    /// The rows of the case in the order of the batch.
    fn rows(&self, case: &AttentionCase) -> Vec<usize> {
        let history = self.history.iter().cloned().flatten();
        let requests = (0..case.shape.requests()).filter(|_| self.targets);
        history.chain(requests.flat_map(|b| case.shape.request(b).targets)).collect()
    }

    fn shape(&self, case: &AttentionCase, rows: &[usize]) -> Arc<HstuAttention> {
        let mut history_offsets = vec![0];
        for range in &self.history {
            history_offsets.push(history_offsets.last().unwrap() + range.len() as u32);
        }
        let none = vec![0; self.history.len() + 1].into();
        let times = case.shape.times_s.as_ref();
        let shape = HstuAttention {
            history_offsets: history_offsets.into(),
            target_offsets: if self.targets { case.shape.target_offsets.clone() } else { none },
            times_s: times.map(|times| rows.iter().map(|&row| times[row]).collect()),
            targets_only: false,
            ..(*case.shape).clone()
        };
        shape.checked().expect("a valid layout")
    }
}

fn inputs(case: &AttentionCase, rows: &[usize]) -> HstuInputs<FloatTensor<Flex>> {
    let matrix = |values: &[f32], width: usize| {
        let flat: Vec<f32> =
            rows.iter().flat_map(|row| values[row * width..][..width].to_vec()).collect();
        tensor(TensorData::new(flat, [rows.len(), width]))
    };
    let table = |values: &Vec<f32>| {
        let table = Tensor::<Flex, 1>::from_data(values.as_slice(), &Default::default());
        table.into_primitive().tensor()
    };
    let (qk, v) = (case.shape.heads * case.qk, case.shape.heads * case.v);
    HstuInputs {
        q: matrix(&case.inputs.q, qk),
        k: matrix(&case.inputs.k, qk),
        v: matrix(&case.inputs.v, v),
        position: case.inputs.position.as_ref().map(table),
        time: case.inputs.time.as_ref().map(table),
    }
}

fn tensor(data: TensorData) -> FloatTensor<Flex> {
    Tensor::<Flex, 2>::from_data(data, &Default::default()).into_primitive().tensor()
}

/// Each history in up to four parts, then the targets.
fn passes(case: &AttentionCase, random: &mut SmallRng) -> Vec<KeptPass> {
    let cuts: Vec<Vec<usize>> = (0..case.shape.requests())
        .map(|b| {
            let history = case.shape.request(b).history;
            let mut cuts: Vec<usize> =
                (0..3).map(|_| random.random_range(history.start..=history.end)).collect();
            cuts.extend([history.start, history.end]);
            cuts.sort_unstable();
            cuts
        })
        .collect();
    let part = |at: usize| KeptPass {
        history: cuts.iter().map(|cuts| cuts[at]..cuts[at + 1]).collect(),
        targets: at == 3,
    };
    (0..4).map(part).collect()
}

fn check<K: KeptLayer<Flex>>(path: &str) {
    let mut random = SmallRng::seed_from_u64(21);
    let mut rows_checked = 0;
    for mut case in cases() {
        let whole = HstuAttention { targets_only: false, ..(*case.shape).clone() };
        case.shape = whole.checked().expect("valid");
        let expected = case.oracle();
        let width = case.shape.heads * case.v;
        let requests = case.shape.requests();
        let (mut kept, mut times) = (vec![K::default(); requests], vec![Vec::new(); requests]);
        for pass in passes(&case, &mut random) {
            let rows = pass.rows(&case);
            let (shape, inputs) = (pass.shape(&case, &rows), inputs(&case, &rows));
            let mut own: Vec<&mut K> = kept.iter_mut().collect();
            K::keep(inputs.k.clone(), inputs.v.clone(), &shape, &mut own);
            for (times, range) in times.iter_mut().zip(&pass.history) {
                let all = case.shape.times_s.as_deref();
                times.extend(all.into_iter().flat_map(|all| all[range.clone()].iter().copied()));
            }
            let kept: Vec<_> = kept
                .iter()
                .zip(&times)
                .map(|(layer, times_s)| KeptHistory { layer, times_s })
                .collect();
            let found = K::attend(inputs, &kept, &shape);
            let found = Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(found));
            let found: Vec<f32> = found.into_data().to_vec().expect("f32");
            let expected: Vec<f64> =
                rows.iter().flat_map(|row| expected[row * width..][..width].to_vec()).collect();
            assert_close(&format!("{path}: {}", case.name), &found, &expected, 1e-5);
            rows_checked += rows.len();
        }
    }
    assert!(rows_checked > 1000, "{rows_checked} rows test little");
}

#[test]
fn packed_histories_give_what_whole_passes_give() {
    check::<CpuKeptHistory>("packed");
}

#[test]
fn joined_histories_give_what_whole_passes_give() {
    check::<JoinedHistory<Flex>>("joined");
}

#[test]
fn what_a_packed_history_forgot_can_be_kept_anew() {
    check_forgetting::<CpuKeptHistory>("packed");
}

#[test]
fn what_a_joined_history_forgot_can_be_kept_anew() {
    check_forgetting::<JoinedHistory<Flex>>("joined");
}

fn check_forgetting<K: KeptLayer<Flex>>(path: &str) {
    let mut random = SmallRng::seed_from_u64(22);
    for case in cases().into_iter().step_by(5) {
        let requests = case.shape.requests();
        let all: Vec<Range<usize>> = (0..requests).map(|b| case.shape.request(b).history).collect();
        let whole = KeptPass { history: all.clone(), targets: false };
        let rows = whole.rows(&case);
        let mut kept = vec![K::default(); requests];
        let put = |pass: &KeptPass, kept: &mut [K]| {
            let rows = pass.rows(&case);
            let inputs = inputs(&case, &rows);
            let mut own: Vec<_> = kept.iter_mut().collect();
            K::keep(inputs.k, inputs.v, &pass.shape(&case, &rows), &mut own);
        };
        put(&whole, &mut kept);
        let tokens: Vec<_> = kept.iter().map(KeptLayer::tokens).collect();
        let stay: Vec<usize> = all.iter().map(|rows| random.random_range(0..=rows.len())).collect();
        for (kept, stay) in kept.iter_mut().zip(&stay) {
            kept.truncate(*stay);
            assert_eq!(kept.tokens(), *stay);
        }
        let rest = all.iter().zip(&stay).map(|(rows, stay)| rows.start + stay..rows.end).collect();
        put(&KeptPass { history: rest, targets: false }, &mut kept);
        assert_eq!(kept.iter().map(KeptLayer::tokens).collect::<Vec<_>>(), tokens);

        let expected = HstuAttention { targets_only: false, ..(*case.shape).clone() };
        let expected = AttentionCase {
            name: String::new(),
            shape: Arc::new(expected),
            inputs: case.inputs.clone(),
            ..case
        };
        let (expected, width) = (expected.oracle(), case.shape.heads * case.v);
        let shape = whole.shape(&case, &rows);
        let times: Vec<Vec<i64>> = all
            .iter()
            .map(|range| {
                case.shape.times_s.as_deref().map_or(vec![], |all| all[range.clone()].to_vec())
            })
            .collect();
        let kept: Vec<_> = kept
            .iter()
            .zip(&times)
            .map(|(layer, times_s)| KeptHistory { layer, times_s })
            .collect();
        let found = K::attend(inputs(&case, &rows), &kept, &shape);
        let found = Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(found));
        let found: Vec<f32> = found.into_data().to_vec().expect("f32");
        assert_close(
            &format!("{path}: {}", case.name),
            &found,
            &expected[..rows.len() * width],
            1e-5,
        );
    }
}
