//! The default rule that decides whether newly trained parameters may serve.

use crate::raw::types::{Decision, Evaluation, Slice, Verdict};

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
