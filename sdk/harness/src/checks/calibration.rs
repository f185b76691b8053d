//! The check of calibration: after a short training, the mean prediction is near the mean label.

use hypercast_expert::graph::ExpertGraph;

use super::CheckResult;
use crate::cases::Case;
use crate::contract::{TaskKind, TaskLabels};
use crate::error::{Failure, FailureLocation};
use crate::harness::Harness;

const CHECK: &str = "calibration";
const FAULT: &str = "a training hook or the network faults on an ordinary log; run `check_labels` and `check_predictions` for details";
const STEP: &str = "gradients must stay finite: look for a logarithm, a square root or a division near 0 in the network";
const MEAN: &str = "the network does not learn the rates of its tasks: check that every head has a bias, that outputs are logits and not probabilities, and that labels and weights are right";

/// The number of requests in the log, each with six candidates.
const REQUESTS: usize = 600;

/// The allowed ratio of the mean prediction to the mean label of a binary task.
const RATIO: std::ops::Range<f64> = 0.67..1.5;

/// The allowed difference of the means of a regression, in standard deviations of the label.
const DEVIATIONS: f64 = 0.75;

/// The fewest positives (or values) for which a mean is compared.
const LEAST: f64 = 30.0;

impl Harness {
    /// Trains the expert on a small simulated log with the host's trainer and the expert's hooks.
    /// Checks that the gradient of every step is finite, and that the mean prediction of each task
    /// is near its mean label; but not of a task whose loss is the network's own, which may be of a
    /// quantile or an order, or whose output is whole, as that of a model that was trained
    /// elsewhere. A native expert always passes, because it cannot be trained.
    ///
    /// # Errors
    /// The first task whose mean prediction is far from its mean label.
    pub fn check_calibration(&self) -> CheckResult {
        let log = self.world.log(REQUESTS, &self.surfaces());
        let fail = |place, seen, advice| Err(Failure::new(CHECK, place, seen, advice));
        let trained = match self.train(&log) {
            Ok(None) => return Ok(()),
            Ok(Some(trained)) => trained,
            Err(error) => return fail(FailureLocation::default(), error.to_string(), FAULT),
        };
        if let Some(step) = trained.lost_step {
            let seen = format!("the gradient of step {step} was not finite");
            return fail(FailureLocation::default(), seen, STEP);
        }
        let trained = self.with_parameters(trained.parameters).map_err(|error| error.to_string());
        let means = trained.and_then(|trained| trained.means(&log));
        match means {
            Err(fault) => fail(FailureLocation::default(), fault, FAULT),
            Ok(means) => match means.iter().find_map(Means::far_off) {
                Some((task, seen)) => fail(FailureLocation::default().task(&task), seen, MEAN),
                None => Ok(()),
            },
        }
    }

    /// Weighted means of labels and predictions for each task. Examples that sampling drops count
    /// too, because the trainer weights the kept ones to make up for them.
    fn means(&self, log: &[Case]) -> Result<Vec<Means>, String> {
        let labels = self.labels(log)?;
        let mut predictions: Vec<Vec<f32>> = vec![Vec::new(); self.description().tasks.len()];
        for case in log {
            for (all, part) in predictions.iter_mut().zip(self.predict(case)?.tasks) {
                all.extend(part.values);
            }
        }
        let ExpertGraph { losses, whole_outputs, .. } = &*self.graph;
        let by_host = losses.iter().zip(whole_outputs).map(|(own, whole)| own.is_none() && !whole);
        let tasks = self.description().tasks.iter().zip(&predictions).zip(by_host);
        let means = tasks.filter(|(_, by_host)| *by_host).filter_map(|((task, predictions), _)| {
            let labels = labels.iter().find(|entry| entry.task == task.name)?;
            Some(Means::new(task.kind, labels, predictions))
        });
        Ok(means.collect())
    }
}

/// Weighted sums of the labels and predictions of one task.
struct Means {
    task: String,
    kind: TaskKind,
    weight: f64,
    label: f64,
    label_squares: f64,
    prediction: f64,
}

impl Means {
    fn new(kind: TaskKind, labels: &TaskLabels, predictions: &[f32]) -> Means {
        let task = labels.task.clone();
        let mut means =
            Means { task, kind, weight: 0.0, label: 0.0, label_squares: 0.0, prediction: 0.0 };
        for row in (0..predictions.len()).filter(|row| labels.mask[*row] != 0) {
            let weight = f64::from(labels.weights.get(row).copied().unwrap_or(1.0));
            let label = f64::from(labels.labels[row]);
            means.weight += weight;
            means.label += weight * label;
            means.label_squares += weight * label * label;
            means.prediction += weight * f64::from(predictions[row]);
        }
        means
    }

    fn far_off(&self) -> Option<(String, String)> {
        let (label, prediction) = (self.label / self.weight, self.prediction / self.weight);
        let known = match self.kind {
            TaskKind::Binary => self.label,
            TaskKind::Regression => self.weight,
        };
        let near = match self.kind {
            TaskKind::Binary => RATIO.contains(&(prediction / label)),
            TaskKind::Regression => {
                let deviation =
                    (self.label_squares / self.weight - label * label).max(1e-12).sqrt();
                (prediction - label).abs() <= DEVIATIONS * deviation
            }
        };
        let seen = || {
            format!(
                "after training, the mean prediction is {prediction:.4} and the mean label {label:.4}"
            )
        };
        (known >= LEAST && !near).then(|| (self.task.clone(), seen()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(kind: TaskKind, label: impl Fn(usize) -> f32, prediction: f32) -> Means {
        let labels = TaskLabels {
            task: "click".into(),
            labels: (0..200).map(label).collect(),
            mask: vec![1; 200],
            weights: Vec::new(),
        };
        Means::new(kind, &labels, &[prediction; 200])
    }

    #[test]
    fn a_mean_prediction_far_from_the_mean_label_is_reported_with_both() {
        let half = |row: usize| (row % 2) as f32;
        assert_eq!(means(TaskKind::Binary, half, 0.6).far_off(), None);
        let (task, seen) = means(TaskKind::Binary, half, 0.9).far_off().unwrap();
        assert!(task == "click" && seen.contains("0.9000") && seen.contains("0.5000"), "{seen}");
        assert!(means(TaskKind::Binary, half, f32::NAN).far_off().is_some());
        assert_eq!(means(TaskKind::Regression, half, 0.8).far_off(), None);
        assert!(means(TaskKind::Regression, half, 1.2).far_off().is_some());
        // Ten positives are too few to estimate a rate.
        assert_eq!(
            means(TaskKind::Binary, |row| f32::from(u8::from(row < 10)), 0.9).far_off(),
            None
        );
    }
}
