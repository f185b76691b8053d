//! The multi-task multi-label (MTML) loss (eq. 3): the weighted sum of each task's mean loss over
//! its own sample space (eq. 4).
//!
//! The means are folded into a weight matrix on the CPU, so a task without a valid sample has
//! weights of exactly zero and contributes exactly zero.

use burn::tensor::{
    Tensor, TensorData,
    activation::{log_sigmoid, sigmoid},
    backend::AutodiffBackend,
};
use hypercast_kernels::attention::HstuBackend;

use crate::{
    batch::FmBatch,
    influence::Surprise,
    label_scale::LabelScales,
    spec::{TaskLabel, TaskSpec},
};

/// The factor of the loss of each target and task, `[targets * tasks]`: ω δ / Σδ, times the
/// target's weight. `valid` is each task's number of valid samples, which exceeds the mask's if the
/// batch is a part of a larger one.
pub fn cell_weights(batch: &FmBatch, tasks: &[TaskSpec], valid: &[u32]) -> Vec<f32> {
    let mut weights = vec![0.0; batch.mask.len()];
    for (row, weights) in weights.chunks_exact_mut(tasks.len()).enumerate() {
        for (at, task) in tasks.iter().enumerate() {
            if batch.mask[row * tasks.len() + at] {
                weights[at] = task.weight / valid[at] as f32 * batch.weights[row];
            }
        }
    }
    weights
}

/// Labels and the weights that turn an elementwise loss into eq. 3, for some rows and tasks.
#[derive(Debug, Clone, Default)]
pub struct LossTargets {
    /// `[rows * columns]`, on the scales of their tasks; arbitrary where both weights are 0.
    pub labels: Vec<f32>,
    /// `[columns]`: what outputs of binary tasks are log odds apart from, in learning.
    pub log_odds: Vec<f32>,
    /// `[columns]`: the same in predicting, which knows none of the batch's labels.
    pub predicting_log_odds: Vec<f32>,
    /// `[rows * columns]`: ω δ / Σδ for binary tasks, else 0.
    pub binary: Vec<f32>,
    /// `[rows * columns]`: ω δ / Σδ for regressions, else 0.
    pub regression: Vec<f32>,
    /// `[requests + 1]`, from 0: where each request's rows begin.
    pub request_offsets: Vec<u32>,
}

impl LossTargets {
    /// The targets of some rows of a batch, which ascend, for the tasks `columns` of all `tasks`,
    /// with the [`cell_weights`] of the whole batch. Predictions are made on `scales`.
    pub fn new(
        batch: &FmBatch,
        rows: impl IntoIterator<Item = usize>,
        tasks: &[TaskSpec],
        columns: impl IntoIterator<Item = usize> + Clone,
        weights: &[f32],
        scales: &LabelScales,
    ) -> Self {
        let log_odds = columns.clone().into_iter().map(|task| batch.log_odds[task]).collect();
        let predicting =
            |task: usize| scales.get(&tasks[task].name).map_or(0.0, |of| of.log_odds());
        let predicting_log_odds = columns.clone().into_iter().map(predicting).collect();
        let mut targets = Self { log_odds, predicting_log_odds, ..Self::default() };
        let (mut count, mut end) = (0, 0);
        for row in rows {
            if row >= end as usize {
                targets.request_offsets.push(count);
                let after = batch.target_offsets.partition_point(|&begin| begin as usize <= row);
                end = batch.target_offsets[after];
            }
            count += 1;
            for task in columns.clone() {
                let cell = row * tasks.len() + task;
                let binary = matches!(tasks[task].label, TaskLabel::Action(_));
                targets.labels.push(batch.learned_labels[cell]);
                targets.binary.push(if binary { weights[cell] } else { 0.0 });
                targets.regression.push(if binary { 0.0 } else { weights[cell] });
            }
        }
        targets.request_offsets.push(count);
        targets
    }
}

/// The loss of `outputs` `[rows, columns]`: cross-entropy of log odds, bounded by what one request
/// can teach (`influence`), and half the squared error of regressions.
pub fn mtml_loss<A>(outputs: Tensor<A, 2>, targets: &LossTargets) -> Tensor<A, 1>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    let [rows, columns] = outputs.dims();
    assert_eq!(rows * columns, targets.labels.len());
    let device = outputs.device();
    let matrix = |values: &[f32]| {
        Tensor::<A, 2>::from_data(TensorData::new(values.to_vec(), [rows, columns]), &device)
    };
    let labels = matrix(&targets.labels);
    // (1 - y) z - ln σ(z) does not overflow, and is smooth at 0, unlike the form with max(z, 0).
    let row = |values: &[f32]| TensorData::new(values.to_vec(), [1, columns]);
    let logits = outputs.clone() + Tensor::from_data(row(&targets.log_odds), &device);
    let weights = matrix(&targets.binary).inner();
    let counted = weights.clone().greater_elem(0.0).float();
    let predicting = Tensor::from_data(row(&targets.predicting_log_odds), &device);
    let probabilities = sigmoid(outputs.clone().inner() + predicting);
    let surprise = Surprise {
        errors: (labels.clone().inner() - probabilities.clone()) * counted.clone(),
        variances: probabilities.clone() * (probabilities.neg() + 1.0) * counted,
    };
    let weights = weights * surprise.factors(&targets.request_offsets);
    let entropy = logits.clone() * (labels.clone().neg() + 1.0) - log_sigmoid(logits);
    let mut loss = (entropy * Tensor::from_inner(weights)).sum();
    if targets.regression.iter().any(|&weight| weight != 0.0) {
        let error = outputs - labels;
        loss = loss + (error.clone() * error * matrix(&targets.regression)).sum() * 0.5;
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label_scale::LabelTransform;
    use burn::backend::Autodiff;
    use burn_flex::Flex;

    type A = Autodiff<Flex>;

    /// What a logit of 0 is apart from the log odds.
    const LOG_ODDS: f32 = -0.7;

    fn task(label: TaskLabel, weight: f32) -> TaskSpec {
        let transform = LabelTransform::Identity;
        TaskSpec { name: "t".into(), main: true, label, transform, surfaces: vec![true], weight }
    }

    /// A batch of one request.
    fn batch(labels: Vec<f32>, mask: Vec<bool>, targets: u32) -> FmBatch {
        let weights = vec![1.0; targets as usize];
        let (target_offsets, learned_labels) = (vec![0, targets], labels.clone());
        let log_odds = vec![LOG_ODDS; labels.len() / targets as usize];
        let batch = FmBatch { target_offsets, weights, labels, ..FmBatch::default() };
        FmBatch { learned_labels, log_odds, mask, ..batch }
    }

    fn targets(batch: &FmBatch, tasks: &[TaskSpec], valid: &[u32]) -> LossTargets {
        let rows = batch.targets();
        let weights = cell_weights(batch, tasks, valid);
        LossTargets::new(batch, 0..rows, tasks, 0..tasks.len(), &weights, &LabelScales::default())
    }

    fn oracle(z: &[f64], labels: &[f32], mask: &[bool], tasks: &[TaskSpec]) -> f64 {
        let columns = tasks.len();
        let mut total = 0.0;
        for (c, task) in tasks.iter().enumerate() {
            let rows: Vec<usize> = (c..z.len()).step_by(columns).filter(|&i| mask[i]).collect();
            let mut sum = 0.0;
            for &i in &rows {
                let (z, y) = (z[i], f64::from(labels[i]));
                sum += match task.label {
                    TaskLabel::Action(_) => {
                        let z = z + f64::from(LOG_ODDS);
                        -(y * (1.0 / (1.0 + (-z).exp())).ln()
                            + (1.0 - y) * (1.0 / (1.0 + z.exp())).ln())
                    }
                    TaskLabel::Value(_) => 0.5 * (z - y) * (z - y),
                };
            }
            if !rows.is_empty() {
                total += f64::from(task.weight) * sum / rows.len() as f64;
            }
        }
        total
    }

    #[test]
    fn the_loss_and_its_gradient_agree_with_the_oracle() {
        let tasks = [
            task(TaskLabel::Action(0), 1.0),
            task(TaskLabel::Value(0), 0.3),
            task(TaskLabel::Action(1), 2.0),
        ];
        let z: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let labels: Vec<f32> =
            (0..12).map(|i| if i % 3 == 1 { 0.7 } else { (i % 2) as f32 }).collect();
        // The last task has no valid sample at all.
        let mask: Vec<bool> = (0..12).map(|i| i % 3 != 2 && i != 4).collect();
        let targets = targets(&batch(labels.clone(), mask.clone(), 4), &tasks, &[4, 3, 0]);
        let device = Default::default();
        let leaf =
            Tensor::<A, 2>::from_data(TensorData::new(z.clone(), [4, 3]), &device).require_grad();
        let loss = mtml_loss(leaf.clone(), &targets);
        let z64: Vec<f64> = z.iter().map(|&v| f64::from(v)).collect();
        let expected = oracle(&z64, &labels, &mask, &tasks);
        let value = f64::from(loss.clone().into_scalar());
        assert!((value - expected).abs() < 1e-5, "{value} {expected}");
        let gradient = leaf.grad(&loss.backward()).unwrap().into_data().to_vec::<f32>().unwrap();
        for i in 0..12 {
            let mut moved = [z64.clone(), z64.clone()];
            moved[0][i] += 1e-4;
            moved[1][i] -= 1e-4;
            let [up, down] = moved.map(|z| oracle(&z, &labels, &mask, &tasks));
            let difference = (up - down) / 2e-4;
            assert!(
                (f64::from(gradient[i]) - difference).abs() < 1e-5,
                "{i}: {} {difference}",
                gradient[i]
            );
        }
    }

    #[test]
    fn a_request_counts_as_far_as_chance_explains_it() {
        let tasks = [task(TaskLabel::Action(0), 3.0), task(TaskLabel::Value(0), 1.0)];
        // Three requests, of which 16, 16 and 2 targets did what the first task expects of few.
        let mut batch = batch(vec![1.0; 68], vec![true; 68], 34);
        batch.target_offsets = vec![0, 16, 32, 34];
        batch.weights[17] = 2.0;
        // Of the first request, five rows more are in no sample space.
        for row in 0..5 {
            batch.mask[2 * row] = false;
        }
        // The batch's own labels change what is learned, but not what is surprising.
        let log_odds_of = |probability: f32| (probability / (1.0 - probability)).ln();
        let output = |cell| log_odds_of(if (32..64).contains(&cell) { 0.9 } else { 0.03 });
        let device = Default::default();
        let gradient = |rows: Vec<usize>| {
            let weights = cell_weights(&batch, &tasks, &[34, 34]);
            let (own, scales) = (rows.iter().copied(), LabelScales::default());
            let targets = LossTargets::new(&batch, own, &tasks, 0..2, &weights, &scales);
            let own = rows.iter().flat_map(|row| [output(2 * row), 0.5]).collect();
            let own = TensorData::new::<f32, _>(own, [rows.len(), 2]);
            let leaf = Tensor::<A, 2>::from_data(own, &device).require_grad();
            let loss = mtml_loss(leaf.clone(), &targets);
            leaf.grad(&loss.backward()).unwrap().into_data().to_vec::<f32>().unwrap()
        };
        let all = gradient((0..34).collect());
        let [full, value] = [-3.0 / 34.0, -0.5 / 34.0];
        let learned = |row: usize| 1.0 / (1.0 + (-output(2 * row) - LOG_ODDS).exp());
        let shares: Vec<f32> =
            [0, 5, 15, 16, 17, 32, 33].map(|row| all[2 * row] / full / (1.0 - learned(row))).into();
        // Of errors that sum to 10.67, with a variance of 0.3201, 5.48 count.
        for (share, expected) in shares.iter().zip([0.0, 0.514, 0.514, 1.0, 2.0, 1.0, 1.0]) {
            assert!((share - expected).abs() < 1e-3, "{shares:?}");
        }
        assert!((0..34).all(|row| (all[2 * row + 1] / value - batch.weights[row]).abs() < 1e-6));
        // The rows of a surface: the first request's and the last's.
        let part = gradient((0..16).chain(32..34).collect());
        assert_eq!(part, [&all[..32], &all[64..]].concat());
    }

    #[test]
    fn without_a_valid_sample_the_loss_is_exactly_zero() {
        let tasks = [task(TaskLabel::Action(0), 1.0), task(TaskLabel::Value(0), 1.0)];
        let targets = targets(&batch(vec![0.0; 4], vec![false; 4], 2), &tasks, &[0, 0]);
        let device = Default::default();
        let leaf = Tensor::<A, 2>::from_data(
            TensorData::new(vec![60.0f32, -60.0, 1e30, 3.0], [2, 2]),
            &device,
        )
        .require_grad();
        let loss = mtml_loss(leaf.clone(), &targets);
        assert_eq!(loss.clone().into_scalar(), 0.0);
        let gradient = leaf.grad(&loss.backward()).unwrap().into_data().to_vec::<f32>().unwrap();
        assert!(gradient.iter().all(|&g| g == 0.0), "{gradient:?}");
    }
}
