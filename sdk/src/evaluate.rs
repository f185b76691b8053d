//! Whether what was trained may serve: the rule that every expert has, unless it brings its own.

use crate::raw::types::{Decision, Evaluation, Slice, Verdict};

/// A bound on how much worse than what serves an expert may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoWorse {
    /// The part by which a task's NE may be above that of what serves.
    pub tolerance: f64,
    /// Examples below which a task's NE says nothing.
    pub examples: u64,
}

impl Default for NoWorse {
    /// One per cent, on at least a thousand examples.
    fn default() -> Self {
        Self { tolerance: 0.01, examples: 1000 }
    }
}

impl NoWorse {
    /// Publishes unless some task is worse over all surfaces. Then a publication is held, since the trainer goes on
    /// learning, and a canary, which users see, is rolled back.
    pub fn judge(self, evaluation: &Evaluation) -> Verdict {
        let worse: Vec<String> =
            over_all_surfaces(evaluation).filter_map(|slice| self.worse(slice)).collect();
        match (worse.is_empty(), evaluation.decision) {
            (true, _) => Verdict::Publish,
            (false, Decision::Publication) => Verdict::Hold(worse.join("; ")),
            (false, Decision::Canary) => Verdict::RollBack(worse.join("; ")),
        }
    }

    fn worse(self, slice: &Slice) -> Option<String> {
        let (own, serving) = (slice.candidate.ne?, slice.serving.as_ref()?.ne?);
        let enough = slice.examples >= self.examples;
        // Predictions that are no numbers have an NE that is none, which compares with nothing.
        let worse = own.is_nan() || own > serving * (1.0 + self.tolerance);
        (enough && worse).then(|| {
            format!(
                "NE of {} is {own:.4}, {serving:.4} of what serves, over {} examples",
                slice.task, slice.examples
            )
        })
    }
}

/// The slices of each task over all surfaces.
pub fn over_all_surfaces(evaluation: &Evaluation) -> impl Iterator<Item = &Slice> {
    evaluation.slices.iter().filter(|slice| slice.surface.is_none())
}

/// A task over all surfaces, if it has examples.
pub fn task<'a>(evaluation: &'a Evaluation, name: &str) -> Option<&'a Slice> {
    over_all_surfaces(evaluation).find(|slice| slice.task == name)
}
