//! The ops within requests, and losses that read what only training knows.

use super::super::segments::{fold, rank};
use super::*;
use crate::batch::TaskOutcomes;
use crate::tests::build::text;
use crate::train::{TaskTargets, task_loss};
use crate::wasm::contract::{Attribute, Value};

fn texts(name: &str, values: &[&str]) -> Attribute {
    let values = values.iter().map(|value| value.to_string()).collect();
    Attribute { name: name.into(), value: Value::Texts(values) }
}

fn column(net: &mut Net, x: u32, at: i64) -> u32 {
    net.op("Slice", &[x], vec![int("axis", 1), int("start", at), int("end", at + 1)])
}

#[test]
fn rows_of_a_request_are_folded_and_ranked() {
    for op in ["SegmentSum", "SegmentMean", "SegmentMax"] {
        check(op, &case(|net, base| net.op(op, &[base.rows], vec![])));
    }
    check(
        "SegmentRank",
        &case(|net, base| {
            let rank = net.op("SegmentRank", &[base.rows], vec![]);
            net.op("Mul", &[rank, base.other], vec![])
        }),
    );
}

#[test]
fn pairs_of_a_request_are_summed() {
    for functions in [
        ["Softplus", "Sigmoid", "Abs", "Identity"],
        ["Step", "Identity", "Relu", "Softplus"],
        ["Step", "Step", "Sigmoid", "Step"],
    ] {
        let build = |net: &mut Net, base: &Base| {
            let functions = vec![texts("functions", &functions)];
            net.op("SegmentPairSum", &[base.rows, base.other], functions)
        };
        check(&format!("SegmentPairSum {functions:?}"), &case(build));
    }
}

#[test]
fn equal_rows_are_ranked_by_their_place_and_a_maximum_has_one() {
    let run = |op: &str, values: Vec<f32>| {
        let case = case(|net, base| net.op(op, &[base.rows], vec![]));
        let batch = batch(&case, &[(0, 3), (0, 0), (0, 1)]);
        let dims = [batch.rows, 1];
        let x = upload::<burn_flex::Flex>(values, &dims, &Default::default());
        download::<burn_flex::Flex>(match op {
            "SegmentRank" => rank::<burn_flex::Flex>(&batch, x),
            _ => fold::<burn_flex::Flex>(&batch, crate::graph::Fold::Max, x),
        })
    };
    assert_eq!(run("SegmentRank", vec![-0.0, 2.0, 0.0, -5.0]), [1.0, 0.0, 2.0, 0.0]);
    assert_eq!(run("SegmentMax", vec![-3.0, -1.0, -2.0, -5.0]), [-1.0, -1.0, -1.0, -5.0]);
}

/// A network of a binary task and its own cross-entropy, as an SDK writes it.
fn cross_entropy(is_own: bool) -> Case {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let tae = net.input(0);
    let weights = net.parameter("weights", &[4, 1], Initialiser::Normal(0.7));
    let output = net.op("MatMul", &[tae, weights], vec![]);
    net.output("click", output);
    if is_own {
        let of_task = || vec![text("task", "click")];
        let [label, base] = ["Label", "BaseLogit"].map(|op| net.op(op, &[], of_task()));
        let logit = net.op("Add", &[output, base], vec![]);
        let softplus = net.op("Softplus", &[logit], vec![]);
        let product = net.op("Mul", &[logit, label], vec![]);
        let loss = net.op("Sub", &[softplus, product], vec![]);
        net.network.outputs[0].options = vec![int("loss", loss.into())];
    }
    let graph = net.valid(&description);
    Case { description, graph }
}

/// Every third row is in no sample space.
fn outcomes(rows: usize) -> TaskOutcomes {
    let targets = TaskTargets {
        labels: (0..rows)
            .map(|row| if row % 3 == 0 { f32::NAN } else { (row % 2) as f32 })
            .collect(),
        mask: (0..rows).map(|row| row % 3 != 0).collect(),
        weights: (0..rows)
            .map(|row| if row % 3 == 0 { f32::NAN } else { 0.5 + row as f32 })
            .collect(),
    };
    TaskOutcomes { targets, base_logit: -1.5 }
}

#[test]
fn a_networks_own_cross_entropy_has_the_gradient_of_the_hosts() {
    let requests = [(0, 3), (0, 1), (0, 4)];
    let outcomes = outcomes(8);
    let learn = |is_own: bool| {
        let case = cross_entropy(is_own);
        let mut batch = batch(&case, &requests);
        batch.outcomes = vec![outcomes.clone()];
        let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
        let mut value = 0.0;
        let mut loss = |outputs: &[f32], losses: &[f32]| {
            let TaskOutcomes { targets, base_logit } = &outcomes;
            let logits: Vec<f32> = outputs.iter().map(|output| output + base_logit).collect();
            let (host, tasks) = task_loss(TaskKind::Binary, &logits, targets);
            value = host;
            if !is_own {
                return OutputGradients { tasks, losses: Vec::new() };
            }
            let valid = targets.mask.iter().filter(|valid| **valid).count() as f32;
            let weight =
                |row: usize| if targets.mask[row] { targets.weights[row] / valid } else { 0.0 };
            let weights: Vec<f32> = (0..losses.len()).map(weight).collect();
            value = losses.iter().zip(&weights).map(|(loss, by)| f64::from(loss * by)).sum();
            OutputGradients { tasks: vec![0.0; 8], losses: weights }
        };
        let mut random = SmallRng::seed_from_u64(1);
        let found = compute.gradients(&parameters(&case.graph), &batch, &mut random, &mut loss);
        (value, found.values[0].clone().expect("the output depends on it"))
    };
    let ((own, of_own), (host, of_host)) = (learn(true), learn(false));
    assert!((own - host).abs() < 1e-5 * host, "{own} and {host}");
    for (own, host) in of_own.iter().zip(&of_host) {
        assert!((own - host).abs() < 1e-5, "{of_own:?} and {of_host:?}");
    }
}

#[test]
fn losses_agree_with_the_oracle_and_predictions_do_without_outcomes() {
    // Every part of the outcomes, within requests.
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let tae = net.input(0);
    let weights = net.parameter("weights", &[4, 1], Initialiser::Normal(0.7));
    let output = net.op("MatMul", &[tae, weights], vec![]);
    net.output("click", output);
    let of_task = || vec![text("task", "click")];
    let outcome = ["Label", "Mask", "Weight", "BaseLogit"].map(|op| net.op(op, &[], of_task()));
    let [label, mask, weight, base] = outcome;
    let logit = net.op("Add", &[output, base], vec![]);
    let beside = |net: &mut Net, parts: &[u32]| net.op("Concat", parts, vec![int("axis", 1)]);
    let (own, others) = (beside(&mut net, &[label, logit]), beside(&mut net, &[weight, logit]));
    let functions = vec![texts("functions", &["Identity", "Softplus"])];
    let loss = net.op("SegmentPairSum", &[own, others], functions);
    net.network.outputs[0].options = vec![int("loss", loss.into())];
    net.network.extra_loss = Some(net.op("Mul", &[logit, mask], vec![]));
    let graph = net.valid(&description);
    let case = Case { description, graph };
    let requests = [(0, 3), (0, 1), (0, 4)];
    let mut batch = batch(&case, &requests);
    let served = network(case.graph.clone(), parameters(&case.graph), crate::Device::Cpu).unwrap();
    let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
    let without = compute.forward(&parameters(&case.graph), &batch);
    assert_eq!(served.outputs(&batch).len(), 8, "what serves has no outcomes");
    batch.outcomes = vec![outcomes(8)];
    assert_eq!(compute.forward(&parameters(&case.graph), &batch), without);
    let loss = OutputGradients { tasks: noise(9, 8), losses: noise(7, 16) };
    let (graph, parameters, batch) = (&case.graph, &parameters(&case.graph), &batch);
    compare(&Comparison { graph, parameters, batch, loss: &loss, seed: 1 }).unwrap();
    check_slopes("losses", &case, batch, &loss);
}

#[test]
fn an_output_that_reads_an_outcome_is_refused() {
    let refused = |build: &dyn Fn(&mut Net) -> u32| {
        let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
        let mut net = Net::new();
        net.input(0);
        let output = build(&mut net);
        net.output("click", output);
        net.graph(&description).unwrap_err().to_string()
    };
    let outcome = |task: &'static str| {
        move |net: &mut Net| {
            let label = net.op("Label", &[], vec![text("task", task)]);
            net.op("SegmentMean", &[label], vec![])
        }
    };
    let why = refused(&outcome("click"));
    assert!(why.contains("layer `test`, node 1 `Label`") && why.contains("losses alone"), "{why}");
    let why = refused(&outcome("like"));
    assert!(why.contains("its task `like` is not in the description"), "{why}");
    let pairs = |functions: &'static [&'static str]| {
        move |net: &mut Net| {
            let functions = vec![texts("functions", functions)];
            net.op("SegmentPairSum", &[0, 0], functions)
        }
    };
    let why = refused(&pairs(&["Step", "Cube", "Step", "Step"]));
    assert!(why.contains("`Cube` is unknown") && why.contains("Softplus"), "{why}");
    assert!(refused(&pairs(&["Step"])).contains("a column for each function"));
    assert!(refused(&pairs(&[])).contains("1 to 8 are allowed"));
    let fixed = |net: &mut Net| {
        let x = net.parameter("x", &[2, 3], Initialiser::Ones);
        net.op("SegmentRank", &[x], vec![])
    };
    assert!(refused(&fixed).contains("within a request's [rows, d]"));
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let with_loss = |loss: Attribute| {
        let mut net = Net::new();
        let tae = net.input(0);
        let output = column(&mut net, tae, 0);
        net.output("click", output);
        net.network.outputs[0].options = vec![loss];
        net.graph(&description).unwrap_err().to_string()
    };
    assert!(with_loss(int("loss", 0)).contains("output of the loss of task `click` with shape"));
    assert!(with_loss(int("loss", -1)).contains("not a node"));
    assert!(with_loss(num("loss", 1.0)).contains("not a node"));
}
