//! Whether a version predicts well enough to answer more users: its NE on live traffic beside that of the version before.

use serde::Serialize;

use crate::expert::Expert;

/// One task on one surface, over the outcomes that are known of late.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Slice {
    /// The task.
    pub task: String,
    /// The surface; none for all together.
    pub surface: Option<String>,
    /// Outcomes of the version's predictions.
    pub examples: u64,
    /// Its quality.
    pub candidate: Measured,
    /// That of the version before; none where it has no outcomes.
    pub serving: Option<Measured>,
}

/// How good predictions were.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Normalised entropy (paper eq. 5).
    pub ne: Option<f64>,
    /// Predicted over observed.
    pub calibration: Option<f64>,
}

/// What is to become of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may answer more.
    Publish,
    /// Not yet, with the reason.
    Hold(String),
    /// It is to go, with the reason.
    RollBack(String),
}

/// The part by which a task's NE may be above that of the version before.
const TOLERANCE: f64 = 0.01;

/// Outcomes below which an NE says nothing.
const EXAMPLES: u64 = 1000;

/// What is to become of a canary that measures so.
pub fn verdict(_expert: &Expert, slices: &[Slice]) -> Verdict {
    no_worse(slices)
}

/// Goes unless some task is worse over all surfaces.
fn no_worse(slices: &[Slice]) -> Verdict {
    let worse = |slice: &Slice| {
        let (own, before) = (slice.candidate.ne?, slice.serving?.ne?);
        (slice.examples >= EXAMPLES && own > before * (1.0 + TOLERANCE)).then(|| {
            format!(
                "NE of {} is {own:.4}, {before:.4} of the version before, over {} outcomes",
                slice.task, slice.examples
            )
        })
    };
    let whole = slices.iter().filter(|slice| slice.surface.is_none());
    let worse: Vec<String> = whole.filter_map(worse).collect();
    match worse.is_empty() {
        true => Verdict::Publish,
        false => Verdict::RollBack(worse.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_is_worse_on_enough_outcomes_goes() {
        let of = |ne| Measured { ne: Some(ne), calibration: Some(1.0) };
        let slice = |own, before, examples| Slice {
            task: "click".into(),
            surface: None,
            examples,
            candidate: of(own),
            serving: Some(of(before)),
        };
        assert_eq!(no_worse(&[slice(0.8, 0.9, 5000), slice(0.905, 0.9, 5000)]), Verdict::Publish);
        assert_eq!(no_worse(&[slice(1.5, 0.9, 999)]), Verdict::Publish);
        let Verdict::RollBack(why) = no_worse(&[slice(0.95, 0.9, 1000)]) else { panic!() };
        assert!(why.contains("0.9500") && why.contains("click"), "{why}");
        let on_one = Slice { surface: Some("feed".into()), ..slice(1.5, 0.9, 5000) };
        assert_eq!(no_worse(&[on_one]), Verdict::Publish);
    }
}
