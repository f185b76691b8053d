//! Ranking scores: computed with the outputs wherever a network predicts.

use super::{Case, batch, check, parameters};
use crate::graph::ExpertGraph;
use crate::tests::build::{Net, description, int};
use crate::wasm::contract::{Column, Description, Initialiser, TaskKind};
use crate::{Device, ExpertPredictions};

fn described(tasks: &[&str]) -> Description {
    let tasks: Vec<_> = tasks.iter().map(|task| (*task, TaskKind::Binary)).collect();
    description(vec![Column::Tae], &tasks)
}

/// A network whose outputs are products of the TAE, as is what is taken from the scores of tasks
/// in `scored`.
fn net(tasks: &[&str], scored: &[&str]) -> Net {
    let mut net = Net::new();
    let tae = net.input(0);
    for task in tasks {
        let weights = net.parameter(task, &[4, 1], Initialiser::Normal(0.7));
        let output = net.op("MatMul", &[tae, weights], vec![]);
        net.output(task, output);
        if scored.contains(task) {
            let weights = net.parameter(&format!("{task}-level"), &[4, 1], Initialiser::Ones);
            let level = net.op("MatMul", &[tae, weights], vec![]);
            let score = net.op("Sub", &[output, level], vec![]);
            net.network.outputs.last_mut().unwrap().options = vec![int("score", score.into())];
        }
    }
    net
}

#[test]
fn every_way_to_predict_computes_scores_and_training_does_not_wait_for_them() {
    let description = described(&["click"]);
    let graph = net(&["click"], &["click"]).valid(&description);
    check("score", &Case { description, graph });
}

#[test]
fn a_score_is_beside_the_prediction_of_its_task() {
    let tasks = ["click", "like", "share"];
    let description = described(&tasks);
    let graph = net(&tasks, &["click", "share"]).valid(&description);
    let case = Case { description, graph };
    let (batch, parameters) = (batch(&case, &[(0, 2), (0, 3)]), parameters(&case.graph));
    let network = crate::network::network(case.graph.clone(), parameters, Device::Cpu).unwrap();
    let outputs = network.outputs(&batch);
    assert_eq!(outputs.len(), 5 * 5);
    let tasks = &case.description.tasks;
    let predictions = ExpertPredictions::new(&case.graph, tasks, &Default::default(), &outputs);
    let sums: Vec<f32> = batch.numbers(0).chunks(4).map(|row| row.iter().sum::<f32>()).collect();
    for task in ["click", "share"] {
        let probabilities = predictions.task(task).unwrap();
        for (row, score) in predictions.score(task).unwrap().iter().enumerate() {
            let logit = (probabilities[row] / (1.0 - probabilities[row])).ln();
            assert!((logit - sums[row] - score).abs() < 1e-4, "{task} {row}: {score} of {logit}");
        }
    }
    assert!(predictions.score("like").is_none());
    let read: Vec<String> = predictions.for_rank().iter().map(|one| one.task.clone()).collect();
    assert_eq!(read, ["click", "like", "share", "click:score", "share:score"]);
}

#[test]
fn what_is_no_score_is_refused_and_a_score_is_in_the_hash() {
    let graph = |net: &Net, tasks: &[&str]| -> Result<ExpertGraph, String> {
        net.graph(&described(tasks)).map_err(|error| error.to_string())
    };
    let refusal = |net: &Net, tasks: &[&str]| graph(net, tasks).expect_err("it breaks a rule");
    let mut ids = net(&["click"], &[]);
    ids.network.outputs[0].options = vec![int("score", 0)];
    let why = refusal(&ids, &["click"]);
    assert!(why.contains("the score of task `click`") && why.contains("[rows, 4]"), "{why}");
    ids.network.outputs[0].options = vec![int("score", -1)];
    let why = refusal(&ids, &["click"]);
    assert!(why.contains("has the score") && why.contains("not a node"), "{why}");
    let tasks = ["click", "click:score"];
    let why = refusal(&net(&tasks, &["click"]), &tasks);
    assert!(why.contains("`click:score`") && why.contains("the ranking score of `click`"), "{why}");

    let mut outcome = net(&["click"], &[]);
    let label = outcome.op("Label", &[], vec![crate::tests::build::text("task", "click")]);
    outcome.network.outputs[0].options = vec![int("score", label.into())];
    let why = refusal(&outcome, &["click"]);
    assert!(why.contains("only training knows it"), "{why}");

    let hash = |scored: &[&str]| graph(&net(&["click"], scored), &["click"]).unwrap().hash;
    let mut bare = net(&["click"], &["click"]);
    bare.network.outputs[0].options.clear();
    assert_ne!(graph(&bare, &["click"]).unwrap().hash, hash(&["click"]));
}
