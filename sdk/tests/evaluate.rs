//! Tests of the default rule that decides whether newly trained parameters may serve.

use hypercast_sdk::evaluate::{NoWorse, over_all_surfaces, task};
use hypercast_sdk::{Decision, Evaluation, Quality, Slice, Verdict};

fn quality(ne: Option<f64>) -> Quality {
    Quality { ne, auc: None, gauc: None, calibration: None, mse: None }
}

/// A slice over all surfaces, with the NE of the candidate and of the serving version.
fn slice(task: &str, candidate: Option<f64>, serving: Option<f64>) -> Slice {
    Slice {
        task: task.into(),
        surface: None,
        examples: 1000,
        candidate: quality(candidate),
        serving: serving.map(|serving| quality(Some(serving))),
    }
}

fn judge(decision: Decision, slices: Vec<Slice>) -> Verdict {
    NoWorse::default().judge(&Evaluation { decision, slices })
}

#[test]
fn parameters_that_are_no_worse_are_published() {
    let slices = || {
        vec![
            slice("click", Some(0.909), Some(0.9)),
            // Ignored: one surface alone is noisy, no classes means no NE, and nothing serves yet.
            Slice { surface: Some("feed".into()), ..slice("click", Some(1.5), Some(0.9)) },
            slice("like", None, Some(0.9)),
            slice("share", Some(1.5), None),
        ]
    };
    for decision in [Decision::Publication, Decision::Canary] {
        assert!(matches!(judge(decision, slices()), Verdict::Publish));
    }
    let evaluation = Evaluation { decision: Decision::Publication, slices: slices() };
    assert_eq!(over_all_surfaces(&evaluation).count(), 3);
    assert!(task(&evaluation, "click").is_some_and(|own| own.surface.is_none()));
    assert!(task(&evaluation, "buy").is_none());
}

#[test]
fn worse_parameters_are_held_in_training_and_rolled_back_as_a_canary() {
    let slices =
        || vec![slice("click", Some(0.8), Some(0.9)), slice("like", Some(0.95), Some(0.9))];
    let Verdict::Hold(why) = judge(Decision::Publication, slices()) else { panic!("it is worse") };
    assert!(why.contains("like is 0.9500, 0.9000") && !why.contains("click"), "{why}");
    assert!(matches!(judge(Decision::Canary, slices()), Verdict::RollBack(_)));
}

#[test]
fn nan_predictions_count_as_worse() {
    let broken = slice("like", Some(f64::NAN), Some(0.9));
    assert!(matches!(judge(Decision::Publication, vec![broken]), Verdict::Hold(_)));
}

#[test]
fn a_task_with_few_examples_is_not_judged() {
    let few = Slice { examples: 999, ..slice("like", Some(0.95), Some(0.9)) };
    assert!(matches!(judge(Decision::Publication, vec![few]), Verdict::Publish));
}
