//! What the team says of examples, steps and models.

use hypercast_sdk::{
    ActionBatch, Decision, Evaluation, Expert, HostInfo, Quality, SchemaTask, Slice, TaskKind,
    TrainingStep, Verdict, build,
};
use value_model::{ENGAGED, ValueModel};

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
    }
}

/// Five examples: clicked, liked, hidden, nothing, and nothing known that is good.
fn batch() -> ActionBatch {
    ActionBatch {
        surface: vec![0; 5],
        actions: vec![0b001, 0b010, 0b100, 0, 0],
        known: vec![0b101, 0b111, 0b111, 0b111, 0b100],
        values: Vec::new(),
    }
}

#[test]
fn its_network_has_the_own_task_and_an_extra_loss() {
    for info in [info(8, &["click_rate"]), info(8, &[]), info(0, &["click_rate"])] {
        let (description, network) = build::<ValueModel>(&info).expect("a valid network");
        assert_eq!((description.tasks.len(), network.outputs.len()), (3, 3));
        assert!(network.extra_loss.is_some());
    }
    let error = build::<ValueModel>(&info(0, &[])).expect_err("nothing to learn from");
    assert!(error.contains("neither"), "{error}");
}

#[test]
fn the_own_task_is_labelled_by_the_good_actions_that_are_known() {
    let labels = ValueModel::labels(&info(8, &[]), &batch()).expect("labels");
    let engaged = labels.iter().find(|own| own.task == ENGAGED).expect("the own task");
    assert_eq!(engaged.labels, [1.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(engaged.mask, [1, 1, 1, 1, 0], "by what is known, whatever came");
    assert_eq!(labels.len(), 3, "and the schema's tasks");
}

#[test]
fn examples_without_good_actions_are_thinned() {
    assert_eq!(ValueModel::sample(&info(8, &[]), &batch()), [1.0, 1.0, 0.5, 0.5, 0.5]);
}

#[test]
fn training_comes_to_rest_and_a_stream_does_not() {
    let factor = |taken, planned| {
        let step = TrainingStep { taken, planned, trained_rows: 0, rows: 64, learning_rate: 1e-3 };
        ValueModel::schedule(&step)
    };
    assert_eq!((factor(0, 100), factor(50, 100), factor(100, 100)), (1.0, 1.0, 0.1));
    assert!((factor(90, 100) - 0.5).abs() < 1e-6);
    assert_eq!(factor(1_000_000, 0), 1.0);
}

fn evaluation(candidate: (f64, f64), serving: Option<(f64, f64)>, examples: u64) -> Evaluation {
    let quality = |(ne, calibration)| Quality {
        ne: Some(ne),
        auc: None,
        gauc: None,
        calibration: Some(calibration),
        mse: None,
    };
    let slice = Slice {
        task: ENGAGED.into(),
        surface: None,
        examples,
        candidate: quality(candidate),
        serving: serving.map(quality),
    };
    Evaluation { decision: Decision::Publication, slices: vec![slice] }
}

#[test]
fn a_model_that_is_worse_is_held_and_one_that_ran_away_is_taken_back() {
    let judge = |candidate, serving, examples| {
        ValueModel::evaluate(&info(8, &[]), &evaluation(candidate, serving, examples))
    };
    assert!(matches!(judge((0.9, 1.1), Some((0.9, 1.0)), 5000), Verdict::Publish));
    assert!(matches!(judge((0.91, 1.1), Some((0.9, 1.0)), 5000), Verdict::Hold(_)));
    assert!(matches!(judge((0.91, 1.1), Some((0.9, 1.0)), 1500), Verdict::Publish));
    let Verdict::RollBack(why) = judge((0.9, 2.0), Some((0.9, 1.0)), 5000) else {
        panic!("it has run away")
    };
    assert!(why.contains("2.00 times"), "{why}");
    assert!(matches!(judge((0.9, 2.0), None, 5000), Verdict::Publish), "nothing to go back to");
}
