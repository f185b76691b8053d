//! Losses against central differences, the exact zero, and the optimisers.

use std::sync::Arc;

use super::optimizer::{ExpertOptimizer, MovingAverage, OptimizerConfig};
use super::step::Gradients;
use super::{TaskTargets, task_loss};
use crate::graph::ExpertGraph;
use crate::params::Parameters;
use crate::tests::build::{Net, description, int, noise, num, parameters, text};
use crate::wasm::contract::{Attribute, Column, Initialiser, TaskKind};

fn targets(rows: usize) -> TaskTargets {
    TaskTargets {
        labels: (0..rows).map(|row| (row % 2) as f32).collect(),
        mask: (0..rows).map(|row| row % 3 != 0).collect(),
        weights: (0..rows).map(|row| 0.5 + row as f32).collect(),
    }
}

#[test]
fn loss_gradients_are_central_differences() {
    for kind in [TaskKind::Binary, TaskKind::Regression] {
        let mut outputs: Vec<f32> = noise(1, 9).iter().map(|x| x * 4.0).collect();
        outputs[1] = 0.0;
        let (_, gradient) = task_loss(kind, &outputs, &targets(9));
        for row in 0..9 {
            let nudge = |by: f32| {
                let mut outputs = outputs.clone();
                outputs[row] += by;
                task_loss(kind, &outputs, &targets(9)).0
            };
            let expected = (nudge(1e-2) - nudge(-1e-2)) / 2e-2;
            assert!(
                (f64::from(gradient[row]) - expected).abs() < 1e-4,
                "{kind:?} row {row}: {} {expected}",
                gradient[row]
            );
            assert_eq!(
                gradient[row] == 0.0,
                row % 3 == 0,
                "rows outside the sample space have no gradient"
            );
        }
    }
}

#[test]
fn a_task_without_valid_sample_contributes_exactly_zero() {
    let none =
        TaskTargets { labels: vec![f32::NAN; 4], mask: vec![false; 4], weights: vec![f32::NAN; 4] };
    for kind in [TaskKind::Binary, TaskKind::Regression] {
        let (loss, gradient) = task_loss(kind, &[1.0, f32::MAX, -2.0, 0.0], &none);
        assert_eq!((loss, gradient), (0.0, vec![0.0; 4]));
    }
}

#[test]
fn the_loss_is_a_mean_over_valid_rows_and_finite_at_the_extremes() {
    let targets = TaskTargets {
        labels: vec![1.0, 0.0, 1.0],
        mask: vec![true, true, false],
        weights: vec![1.0; 3],
    };
    let (loss, _) = task_loss(TaskKind::Binary, &[0.0, 0.0, 55.0], &targets);
    assert!((loss - 2f64.ln()).abs() < 1e-12);
    let (loss, gradient) = task_loss(TaskKind::Binary, &[-1e30, 1e30, 0.0], &targets);
    assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()));
}

#[test]
fn optimisers_touch_what_a_batch_touches_and_skip_what_is_not_finite() {
    let description =
        description(vec![Column::Id("item_id".into())], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let id = net.input(0);
    let table = net.parameter("table", &[10, 2], Initialiser::Normal(1.0));
    let w = net.parameter("w", &[2, 1], Initialiser::Normal(1.0));
    let x = net.op("EmbeddingBag", &[table, id], vec![]);
    let x = net.op("MatMul", &[x, w], vec![]);
    net.output("click", x);
    let graph = net.valid(&description);
    let mut values = parameters(&graph, 1);
    let before = values.clone();
    let config = OptimizerConfig { warmup_steps: 0, ..OptimizerConfig::default() };
    let mut optimizer = ExpertOptimizer::new(&graph, config.clone());
    let gradients = |g: f32| Gradients {
        values: vec![Some(vec![g, 1.0, 1.0, 1.0]), Some(vec![1.0, -1.0])],
        rows: vec![Some(vec![3, 8]), None],
    };
    assert!(!optimizer.step(&mut values, &gradients(f32::NAN), &graph, 1.0));
    assert_eq!((values.values(0), optimizer.steps()), (before.values(0), 0));
    assert!(optimizer.step(&mut values, &gradients(1.0), &graph, 1.0));
    for row in 0..10 {
        let moved = values.values(0)[row * 2..][..2] != before.values(0)[row * 2..][..2];
        assert_eq!(moved, [3, 8].contains(&row), "row {row}");
    }
    // Adam's first step is the learning rate, whatever the gradient's size.
    let first = before.values(1)[0] * (1.0 - config.learning_rate * config.weight_decay)
        - config.learning_rate;
    assert!((values.values(1)[0] - first).abs() < 1e-6);
}

/// Four weights at zero, and the gradient of every step.
fn constant_gradient() -> (Arc<ExpertGraph>, Parameters, Gradients) {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let tae = net.input(0);
    let w = net.parameter("w", &[4, 1], Initialiser::Zeros);
    let x = net.op("MatMul", &[tae, w], vec![]);
    net.output("click", x);
    let graph = net.valid(&description);
    let values = parameters(&graph, 1);
    (graph, values, Gradients { values: vec![Some(vec![1.0; 4])], rows: vec![None] })
}

#[test]
fn a_held_rate_is_constant_and_keeps_the_statistics() {
    let (graph, mut values, gradients) = constant_gradient();
    let config = OptimizerConfig {
        weight_decay: 0.0,
        warmup_steps: 0,
        decay_steps: 3,
        clip_norm: 100.0,
        ..OptimizerConfig::default()
    };
    let mut optimizer = ExpertOptimizer::new(&graph, config.clone());
    let mut moved = || {
        let before = values.values(0)[0];
        assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
        before - values.values(0)[0]
    };
    // With a constant gradient, Adam moves by the rate itself.
    let decayed: Vec<f32> = (0..5).map(|_| moved()).collect();
    assert!((decayed[4] - 0.1 * config.learning_rate).abs() < 1e-6, "{decayed:?}");
    optimizer.hold(5e-4, 1e-3);
    assert_eq!(optimizer.steps(), 5);
    for _ in 0..4 {
        let before = values.values(0)[0];
        assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
        assert!((before - values.values(0)[0] - 5e-4).abs() < 1e-7);
    }
    assert_eq!((optimizer.learning_rate(), optimizer.planned()), (5e-4, 0));
    let before = values.values(0)[0];
    assert!(optimizer.step(&mut values, &gradients, &graph, 3.0));
    assert!((before - values.values(0)[0] - 15e-4).abs() < 1e-7, "a factor scales the step");
}

#[test]
fn a_parameter_learns_at_its_own_rate_and_a_frozen_one_not_at_all() {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let network = |options: [Vec<Attribute>; 2]| {
        let mut net = Net::new();
        let tae = net.input(0);
        let slow = net.parameter("slow", &[4, 1], Initialiser::Zeros);
        let frozen = net.parameter("frozen", &[4, 1], Initialiser::Ones);
        let slow = net.op("MatMul", &[tae, slow], vec![]);
        let frozen = net.op("MatMul", &[tae, frozen], vec![]);
        let sum = net.op("Add", &[slow, frozen], vec![]);
        net.output("click", sum);
        for (parameter, options) in net.network.parameters.iter_mut().zip(options) {
            parameter.options = options;
        }
        net
    };
    let factor = |factor: f32| vec![num("rate_factor", factor)];
    let graph = network([factor(0.5), factor(0.0)]).valid(&description);
    assert_eq!(graph.hash, network([vec![], vec![]]).valid(&description).hash, "it may change");
    let mut values = parameters(&graph, 1);
    let mut optimizer = ExpertOptimizer::new(
        &graph,
        OptimizerConfig {
            weight_decay: 0.1,
            warmup_steps: 0,
            clip_norm: 100.0,
            ..OptimizerConfig::default()
        },
    );
    let gradients = Gradients { values: vec![Some(vec![1.0; 4]), None], rows: vec![None, None] };
    assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
    assert!((values.values(0)[0] + 5e-4).abs() < 1e-7, "{}", values.values(0)[0]);
    assert_eq!(values.values(1), [1.0; 4]);
    for (options, word) in [
        (factor(11.0), "not a number in 0..=10"),
        (factor(f32::NAN), "not a number in 0..=10"),
        (vec![int("rate_factor", 1)], "not a number in 0..=10"),
        (vec![num("momentum", 0.9)], "has the option `momentum`"),
    ] {
        let error = network([options, vec![]]).graph(&description).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("slow"), "{error}");
    }
    let decay = |decay: f32| vec![num("weight_decay", decay)];
    for options in [decay(-1.0), decay(10.5), vec![text("weight_decay", "none")]] {
        let error = network([options, vec![]]).graph(&description).unwrap_err().to_string();
        assert!(error.contains("the weight_decay of its parameter `slow`"), "{error}");
    }
    let of_a_later_host = vec![num("huber", 1.0)];
    let mut net = network(Default::default());
    net.network.outputs[0].options = of_a_later_host.clone();
    let error = net.graph(&description).unwrap_err().to_string();
    assert!(error.contains("its output for task") && error.contains("`huber`"), "{error}");
    net = network(Default::default());
    net.network.options = of_a_later_host;
    let error = net.graph(&description).unwrap_err().to_string();
    assert!(error.contains("its network has the option `huber`"), "{error}");
}

/// A table of ids and a weight for its embeddings, with options.
fn table_and_weight(options: [Vec<Attribute>; 2]) -> Net {
    let mut net = Net::new();
    let id = net.input(0);
    let table = net.parameter("table", &[10, 2], Initialiser::Ones);
    let weight = net.parameter("weight", &[2, 1], Initialiser::Ones);
    let x = net.op("EmbeddingBag", &[table, id], vec![]);
    let x = net.op("MatMul", &[x, weight], vec![]);
    net.output("click", x);
    for (parameter, options) in net.network.parameters.iter_mut().zip(options) {
        parameter.options = options;
    }
    net
}

#[test]
fn a_parameter_has_the_optimiser_and_the_decay_of_its_options() {
    let description =
        description(vec![Column::Id("item_id".into())], &[("click", TaskKind::Binary)]);
    let config = OptimizerConfig {
        learning_rate: 0.1,
        table_learning_rate: 0.2,
        weight_decay: 0.5,
        clip_norm: 1e6,
        warmup_steps: 0,
        decay_steps: 0,
    };
    let gradients = Gradients {
        values: vec![Some(vec![3.0, 4.0]), Some(vec![2.0, -8.0])],
        rows: vec![Some(vec![7]), None],
    };
    let stepped = |options| {
        let graph = table_and_weight(options).valid(&description);
        let (mut values, mut optimizer) =
            (parameters(&graph, 1), ExpertOptimizer::new(&graph, config.clone()));
        for _ in 0..2 {
            assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
        }
        assert!(optimizer.fits(&graph));
        let usual = table_and_weight([vec![], vec![]]).valid(&description);
        assert_eq!(usual.hash, graph.hash, "options do not change what values mean");
        let fits = optimizer.fits(&usual);
        ([values.values(0)[14], values.values(0)[12], values.values(1)[1]], fits)
    };
    let near = |found: [f32; 3], expected: [f32; 3]| {
        let apart = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
        assert!(apart.fold(0.0, f32::max) < 1e-5, "{found:?}, not {expected:?}");
    };
    let sgd = || vec![text("optimiser", "sgd")];
    let no_decay = || vec![text("optimiser", "sgd"), num("weight_decay", 0.0)];
    // Plain descent, and a matrix decays by a twentieth a step as the operator says.
    let (found, fits) = stepped([sgd(), sgd()]);
    near(found, [1.0 - 2.0 * 0.2 * 3.0, 1.0, (0.95 + 0.8) * 0.95 + 0.8]);
    assert!(!fits, "its state is another one's");
    near(stepped([no_decay(), no_decay()]).0, [-0.2, 1.0, 2.6]);
    // Adagrad of single values: the first step is the rate, the second that over root 2.
    let adagrad = vec![text("optimiser", "adagrad"), num("weight_decay", 0.0)];
    let root = 2f32.sqrt();
    let row = 12.5f32.sqrt();
    let of_row = 1.0 - 0.2 * 3.0 / row * (1.0 + 1.0 / root);
    near(stepped([vec![], adagrad]).0, [of_row, 1.0, 1.0 + 0.1 * (1.0 + 1.0 / root)]);
    // A table decays where it is read.
    let decays = vec![text("optimiser", "sgd"), num("weight_decay", 1.0)];
    near(stepped([decays, no_decay()]).0, [(0.8 - 0.6) * 0.8 - 0.6, 1.0, 2.6]);
    let (usual, fits) =
        stepped([vec![text("optimiser", "adagrad")], vec![text("optimiser", "adam")]]);
    assert_eq!((usual, fits), (stepped([vec![], vec![]]).0, true), "these are usual");
    let refused = |options| table_and_weight(options).graph(&description).unwrap_err().to_string();
    let error = refused([vec![text("optimiser", "adam")], vec![]]);
    assert!(error.contains("`table`") && error.contains("`adagrad` or `sgd`"), "{error}");
    let error = refused([vec![], vec![text("optimiser", "lion")]]);
    assert!(error.contains("`weight`") && error.contains("`adam`, `adagrad` or `sgd`"), "{error}");
}

#[test]
fn a_network_bounds_its_gradient_itself() {
    let description =
        description(vec![Column::Id("item_id".into())], &[("click", TaskKind::Binary)]);
    let bounded = |clip: Vec<Attribute>| {
        let mut net = table_and_weight([vec![], vec![text("optimiser", "sgd")]]);
        net.network.options = clip;
        net.graph(&description)
    };
    let graph = Arc::new(bounded(vec![num("gradient_clip", 0.5)]).unwrap());
    let mut values = parameters(&graph, 1);
    let config =
        OptimizerConfig { weight_decay: 0.0, warmup_steps: 0, ..OptimizerConfig::default() };
    let rate = config.learning_rate;
    let mut optimizer = ExpertOptimizer::new(&graph, config);
    let gradients =
        Gradients { values: vec![None, Some(vec![30.0, 40.0])], rows: vec![None, None] };
    assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
    assert!((values.values(1)[0] - (1.0 - rate * 0.3)).abs() < 1e-7, "{:?}", values.values(1));
    for clip in [num("gradient_clip", 0.0), num("gradient_clip", f32::NAN), int("gradient_clip", 1)]
    {
        let error = bounded(vec![clip]).unwrap_err().to_string();
        assert!(error.contains("gradient_clip is") && error.contains("above 0"), "{error}");
    }
}

#[test]
fn the_reported_rate_is_that_of_the_next_step() {
    let (graph, mut values, gradients) = constant_gradient();
    let config = OptimizerConfig {
        weight_decay: 0.0,
        warmup_steps: 4,
        decay_steps: 8,
        clip_norm: 100.0,
        ..OptimizerConfig::default()
    };
    let mut optimizer = ExpertOptimizer::new(&graph, config);
    for step in 0..16 {
        let (rate, before) = (optimizer.learning_rate(), values.values(0)[0]);
        assert!(optimizer.step(&mut values, &gradients, &graph, 1.0));
        // With a constant gradient, Adam moves by the rate itself.
        assert!((before - values.values(0)[0] - rate).abs() < 1e-7, "step {step}: {rate}");
    }
}

#[test]
fn an_average_follows_dense_parameters_slowly_and_copies_table_rows() {
    let description =
        description(vec![Column::Id("item_id".into())], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let id = net.input(0);
    let table = net.parameter("table", &[10, 2], Initialiser::Normal(1.0));
    let w = net.parameter("w", &[2, 1], Initialiser::Normal(1.0));
    let x = net.op("EmbeddingBag", &[table, id], vec![]);
    let x = net.op("MatMul", &[x, w], vec![]);
    net.output("click", x);
    let graph = net.valid(&description);
    let start = parameters(&graph, 1);
    let mut now = start.clone();
    let mut average = MovingAverage::new(&graph, &start, 0.5);
    let gradients =
        Gradients { values: vec![Some(vec![0.0; 2]), None], rows: vec![Some(vec![3]), None] };
    for index in 0..2 {
        now.values_mut(index).iter_mut().for_each(|value| *value += 1.0);
    }
    let mut left = 1.0;
    for step in 0..20u8 {
        average.update(&now, &gradients);
        // A tenth of the old is kept at first, a half once the warm-up allows.
        left *= (f32::from(1 + step) / f32::from(10 + step)).min(0.5);
        let own = average.parameters.values(1)[0];
        assert!((now.values(1)[0] - left - own).abs() < 1e-5, "step {step}");
    }
    for row in 0..10 {
        let as_it_is = average.parameters.values(0)[2 * row] == now.values(0)[2 * row];
        assert_eq!(as_it_is, row == 3, "row {row}");
    }
}
