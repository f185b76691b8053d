//! The default rule that decides whether newly trained parameters may serve, and metrics of rows
//! for others.

use std::ops::Range;

use crate::raw::types::{Decision, Evaluation, EvaluationRows, ScoredTask, Slice, Verdict};

/// Accepts parameters whose NE is at most `tolerance` worse than that of the serving version.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoWorse {
    /// How far a task's NE may exceed that of the serving version, as a fraction of the latter.
    pub tolerance: f64,
    /// The fewest examples for which a task is judged; with fewer, its NE is mostly noise.
    pub examples: u64,
}

impl Default for NoWorse {
    /// A tolerance of one per cent, for tasks with at least a thousand examples.
    fn default() -> Self {
        Self { tolerance: 0.01, examples: 1000 }
    }
}

impl NoWorse {
    /// Returns `Publish` unless some task is worse over all surfaces. If one is, a publication is
    /// held, because the trainer keeps learning, and a canary is rolled back, because users see it.
    pub fn judge(self, evaluation: &Evaluation) -> Verdict {
        let worse: Vec<String> =
            over_all_surfaces(evaluation).filter_map(|slice| self.worse(slice)).collect();
        if worse.is_empty() {
            return Verdict::Publish;
        }
        match evaluation.decision {
            Decision::Publication => Verdict::Hold(worse.join("; ")),
            Decision::Canary => Verdict::RollBack(worse.join("; ")),
        }
    }

    fn worse(self, slice: &Slice) -> Option<String> {
        let (own, serving) = (slice.candidate.ne?, slice.serving.as_ref()?.ne?);
        let enough = slice.examples >= self.examples;
        // NaN predictions give a NaN NE, for which `>` is always false.
        let worse = own.is_nan() || own > serving * (1.0 + self.tolerance);
        (enough && worse).then(|| {
            format!(
                "NE of {} is {own:.4}, {serving:.4} for the serving version, over {} examples",
                slice.task, slice.examples
            )
        })
    }
}

/// Returns the slices that cover all surfaces, one for each task that has examples.
pub fn over_all_surfaces(evaluation: &Evaluation) -> impl Iterator<Item = &Slice> {
    evaluation.slices.iter().filter(|slice| slice.surface.is_none())
}

/// Returns the slice of one task over all surfaces, or `None` if it has no examples.
pub fn task<'a>(evaluation: &'a Evaluation, name: &str) -> Option<&'a Slice> {
    over_all_surfaces(evaluation).find(|slice| slice.task == name)
}

impl EvaluationRows {
    /// The rows of each request.
    pub fn requests(&self) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        self.request.chunk_by(|a, b| a == b).map(move |rows| {
            let own = start..start + rows.len();
            start = own.end;
            own
        })
    }

    /// One task's labels and predictions.
    ///
    /// # Errors
    /// The description has no such task.
    pub fn task(&self, name: &str) -> Result<&ScoredTask, String> {
        let found = self.tasks.iter().find(|task| task.task == name);
        found.ok_or_else(|| format!("the expert has no task `{name}`"))
    }
}

/// The mean NDCG over requests: labels are gains, `scores` the order, and places beyond `most`
/// count for nothing. Only requests that `counts` accepts, rows that `task` counts and requests
/// with a gain are taken; `None` if there are none.
pub fn ndcg(
    rows: &EvaluationRows,
    task: &ScoredTask,
    scores: &[f32],
    most: usize,
    counts: impl Fn(Range<usize>) -> bool,
) -> Option<f64> {
    let mut all = Vec::new();
    for request in rows.requests().filter(|request| counts(request.clone())) {
        let mut own: Vec<usize> = request.filter(|&row| task.mask[row] != 0).collect();
        own.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let gained = discounted(own.iter().map(|&row| task.labels[row]), most);
        own.sort_by(|&a, &b| task.labels[b].total_cmp(&task.labels[a]));
        let best = discounted(own.iter().map(|&row| task.labels[row]), most);
        all.extend((best > 0.0).then(|| gained / best));
    }
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

fn discounted(gains: impl Iterator<Item = f32>, most: usize) -> f64 {
    let gain = |(place, gain): (usize, f32)| f64::from(gain) / (place as f64 + 2.0).log2();
    gains.take(most).enumerate().map(gain).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::types::ActionBatch;

    #[test]
    fn ndcg_counts_requests_with_a_gain_by_the_order_of_their_scores() {
        let task = ScoredTask {
            task: "click".into(),
            labels: vec![0.0, 1.0, 1.0, 0.0, 0.0, 1.0],
            mask: vec![1, 1, 1, 1, 1, 0],
            candidate: vec![0.3, 0.2, 0.1, 0.9, 0.8, 0.7],
            serving: vec![],
        };
        let request = vec![0, 0, 0, 1, 1, 1];
        let rows = EvaluationRows { request, batch: ActionBatch::default(), tasks: vec![task] };
        assert_eq!(rows.requests().collect::<Vec<_>>(), [0..3, 3..6]);
        let task = rows.task("click").unwrap();
        let of = |scores: &[f32], most| ndcg(&rows, task, scores, most, |_| true).unwrap();
        // Gains at the second and third place, of a best of the first and second.
        let log = |place: f64| (place + 1.0).log2();
        let expected = (1.0 / log(2.0) + 1.0 / log(3.0)) / (1.0 + 1.0 / log(2.0));
        assert!((of(&task.candidate, 10) - expected).abs() < 1e-12);
        assert_eq!((of(&task.candidate, 1), of(&task.labels, 10)), (0.0, 1.0));
        // What is masked gains nothing, so the second request does not count.
        assert_eq!(ndcg(&rows, task, &task.candidate, 10, |own| own.start == 3), None);
        assert!(rows.task("like").is_err());
    }
}
