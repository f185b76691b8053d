//! The expert passes every check and answers as before; its training hooks do what they should.

use hypercast_harness::standard_tests;
use hypercast_sdk::{
    ActionBatch, Decision, Evaluation, Expert, HostInfo, Quality, SchemaTask, Slice, TaskKind,
    TrainingStep, Verdict, build,
};
use value_model::{ENGAGED, ValueModel};

standard_tests!(ValueModel);

fn info(tae_dim: u32, features: &[&str]) -> HostInfo {
    let strings = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    let task = |name: &str| SchemaTask {
        name: name.into(),
        kind: TaskKind::Binary,
        label: name.into(),
        surfaces: Vec::new(),
    };
    HostInfo {
        tae_dim,
        surfaces: strings(&["feed"]),
        actions: strings(&["click", "like", "hide"]),
        values: Vec::new(),
        tasks: ["click", "hide"].map(task).to_vec(),
        features: strings(features),
        ids: Vec::new(),
        history_ids: Vec::new(),
        ..HostInfo::default()
    }
}

/// Five examples: clicked, liked, hidden, no action, and one without a known good action.
fn batch() -> ActionBatch {
    ActionBatch {
        surface: vec![0; 5],
        actions: vec![0b001, 0b010, 0b100, 0, 0],
        known: vec![0b101, 0b111, 0b111, 0b111, 0b100],
        ..ActionBatch::default()
    }
}

#[test]
fn the_network_has_an_output_for_its_own_task_and_an_extra_loss() {
    for info in [info(8, &["click_rate"]), info(8, &[]), info(0, &["click_rate"])] {
        let (description, network) = build::<ValueModel>(&info).expect("a valid network");
        assert_eq!((description.tasks.len(), network.outputs.len()), (3, 3));
        assert!(network.extra_loss.is_some());
    }
    let error = build::<ValueModel>(&info(0, &[])).expect_err("nothing to learn from");
    assert!(error.contains("neither"), "{error}");
}

#[test]
fn labels_of_its_own_task_follow_from_known_good_actions() {
    let labels = ValueModel::labels(&info(8, &[]), &batch()).expect("labels");
    let engaged = labels.iter().find(|own| own.task == ENGAGED).expect("the own task");
    assert_eq!(engaged.labels, [1.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(engaged.mask, [1, 1, 1, 1, 0], "the mask depends only on what is known");
    assert_eq!(labels.len(), 3, "labels of the schema's tasks too");
}

#[test]
fn examples_without_good_actions_are_sampled() {
    assert_eq!(ValueModel::sample(&info(8, &[]), &batch()), [1.0, 1.0, 0.5, 0.5, 0.5]);
}

#[test]
fn the_learning_rate_falls_at_the_end_of_a_training_but_not_on_a_stream() {
    let factor = |taken, planned| {
        let step = TrainingStep { taken, planned, trained_rows: 0, rows: 64, learning_rate: 1e-3 };
        ValueModel::schedule(&step)
    };
    assert_eq!((factor(0, 100), factor(50, 100), factor(100, 100)), (1.0, 1.0, 0.1));
    assert!((factor(90, 100) - 0.5).abs() < 1e-6);
    assert_eq!(factor(1_000_000, 0), 1.0);
}

fn quality(ne: f64, calibration: f64) -> Quality {
    Quality { ne: Some(ne), auc: None, gauc: None, calibration: Some(calibration), mse: None }
}

fn evaluation(candidate: Quality, serving: Option<Quality>, examples: u64) -> Evaluation {
    let slice = Slice { task: ENGAGED.into(), surface: None, examples, candidate, serving };
    Evaluation { decision: Decision::Publication, slices: vec![slice] }
}

#[test]
fn a_worse_model_is_held_and_a_miscalibrated_one_is_rolled_back() {
    let judge = |candidate, serving, examples| {
        ValueModel::evaluate(&info(8, &[]), &evaluation(candidate, serving, examples))
    };
    let serving = Some(quality(0.9, 1.0));
    assert!(matches!(judge(quality(0.9, 1.1), serving, 5000), Verdict::Publish));
    assert!(matches!(judge(quality(0.91, 1.1), serving, 5000), Verdict::Hold(_)));
    assert!(matches!(judge(quality(0.91, 1.1), serving, 1500), Verdict::Publish));
    let Verdict::RollBack(why) = judge(quality(0.9, 2.0), serving, 5000) else {
        panic!("it is miscalibrated")
    };
    assert!(why.contains("2.00 times"), "{why}");
    let first = judge(quality(0.9, 2.0), None, 5000);
    assert!(matches!(first, Verdict::Publish), "there is nothing to roll back to");
}
