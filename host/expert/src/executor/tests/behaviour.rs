//! What the oracle does not show: clamps, dropout, stopped gradients, and that requests do not
//! influence each other.

use burn::backend::Autodiff;
use burn_flex::Flex;

use super::*;
use crate::batch::ColumnData;

#[test]
fn clamps_of_log_and_sqrt_and_the_slope_of_softplus_at_zero() {
    let zero = case(|net, base| {
        let nothing = net.op("Sub", &[base.rows, base.rows], vec![]);
        let log = net.op("Log", &[nothing], vec![]);
        let sqrt = net.op("Sqrt", &[nothing], vec![]);
        net.op("Add", &[log, sqrt], vec![])
    });
    let batch = batch(&zero, &[(1, 2)]);
    let compute = compute(zero.graph.clone(), crate::Device::Cpu).unwrap();
    assert!(
        compute.forward(&parameters(&zero.graph), &batch).iter().all(|output| output.is_finite())
    );
    type A = Autodiff<Flex>;
    let x = A::float_set_require_grad(upload::<A>(vec![0.0], &[1], &Default::default()), true);
    let y = ops::unary::<A>(crate::graph::Unary::Softplus, x.clone());
    use burn::tensor::backend::AutodiffBackend;
    use burn::tensor::ops::FloatTensorOps;
    let slope = A::grad(&x, &A::backward(y)).expect("softplus has a gradient");
    assert!((download::<Flex>(slope)[0] - 0.5).abs() < 1e-6);
}

#[test]
fn dropout_scales_what_it_keeps_and_serves_as_identity() {
    for per_row in [0, 1] {
        let case = case(|net, base| {
            net.op("Dropout", &[base.rows], vec![num("rate", 0.25), int("per-row", per_row)])
        });
        check_dropout(&case);
        let x = upload::<Flex>(vec![1.0; 4000], &[1000, 4], &Default::default());
        let y = download::<Flex>(ops::dropout::<Flex>(
            x,
            0.25,
            per_row == 1,
            &mut SmallRng::seed_from_u64(2),
        ));
        let kept = y.iter().filter(|value| **value != 0.0).count();
        assert!(y.iter().all(|value| *value == 0.0 || (*value - 4.0 / 3.0).abs() < 1e-6));
        assert!((2800..3200).contains(&kept), "{kept} of 4000 kept at a rate of 0.25");
        let whole = y.chunks(4).all(|row| row.iter().all(|value| *value == row[0]));
        assert_eq!(whole, per_row == 1, "per-row drops whole rows, and only it");
    }
}

/// What serves ignores dropout, and a step drops what the oracle drops with the same draws.
fn check_dropout(case: &Case) {
    let (batch, parameters) = (batch(case, &[(1, 3)]), parameters(&case.graph));
    let loss = OutputGradients { tasks: vec![1.0; 3], losses: Vec::new() };
    for seed in 0..8 {
        let (graph, parameters, batch, loss) = (&case.graph, &parameters, &batch, &loss);
        compare(&Comparison { graph, parameters, batch, loss, seed }).unwrap();
    }
}

#[test]
fn stop_gradient_stops_gradients() {
    let case = case(|net, base| net.op("StopGradient", &[base.rows], vec![]));
    let batch = batch(&case, &[(1, 3)]);
    let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
    let mut loss =
        |_: &[f32], _: &[f32]| OutputGradients { tasks: vec![1.0; 3], losses: Vec::new() };
    let parameters = parameters(&case.graph);
    let gradients =
        compute.gradients(&parameters, &batch, &mut SmallRng::seed_from_u64(1), &mut loss);
    let of = |name: &str| {
        let index = case.graph.parameters.iter().position(|spec| spec.name == name).unwrap();
        gradients.values[index].clone()
    };
    assert!(of("rows.scale").is_none_or(|gradient| gradient.iter().all(|g| *g == 0.0)));
    assert!(of("weights").is_some_and(|gradient| gradient.iter().any(|g| *g != 0.0)));
}

#[test]
fn what_is_frozen_has_no_gradient() {
    let frozen = case(|net, base| {
        net.freeze();
        base.rows
    });
    let frozen_table = case(|net, base| {
        let table = net.parameter("table", &[8, 4], Initialiser::Normal(0.7));
        let item = net.op("EmbeddingBag", &[table, base.id], vec![]);
        let both = net.op("Add", &[item, base.rows], vec![]);
        net.freeze();
        both
    });
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let of_net = |build: &dyn Fn(&mut Net, u32) -> u32| {
        let mut net = Net::new();
        let tae = net.input(0);
        let result = build(&mut net, tae);
        finish(&mut net, &description, result);
        net.freeze();
        let graph = net.valid(&description);
        Case { description: description.clone(), graph }
    };
    let all = of_net(&|_, tae| tae);
    // Only the condition learns, and a condition has no gradient.
    let by_condition = {
        let mut net = Net::new();
        let tae = net.input(0);
        let frozen = net.parameter("frozen", &[4], Initialiser::Normal(0.7));
        let [first, second] = ["Add", "Mul"].map(|op| net.op(op, &[tae, frozen], vec![]));
        net.freeze();
        let learning = net.parameter("learning", &[4], Initialiser::Normal(0.7));
        let condition = net.op("Mul", &[tae, learning], vec![]);
        let chosen = net.op("Where", &[condition, first, second], vec![]);
        let column = [int("axis", 1), int("start", 0), int("end", 1)];
        let output = net.op("Slice", &[chosen], column.to_vec());
        net.output("click", output);
        let graph = net.valid(&description);
        Case { description: description.clone(), graph }
    };
    let of = |case: Case| {
        let batch = batch(&case, &[(1, 3)]);
        let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
        let mut loss =
            |_: &[f32], _: &[f32]| OutputGradients { tasks: vec![1.0; 3], losses: Vec::new() };
        let mut rng = SmallRng::seed_from_u64(1);
        let gradients = compute.gradients(&parameters(&case.graph), &batch, &mut rng, &mut loss);
        let names = case.graph.parameters.iter().zip(gradients.values);
        let learned = names.filter(|(_, gradient)| gradient.is_some());
        learned.map(|(spec, _)| spec.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(frozen), ["weights"]);
    assert_eq!(of(frozen_table), ["weights"]);
    assert!(of(all).is_empty());
    assert!(of(by_condition).is_empty());
}

#[test]
fn features_are_read_from_their_block_and_products_are_cut_at_the_tae() {
    let feature = |name: &str| Column::Feature(name.into());
    let columns = vec![
        feature("length"),
        Column::Tae,
        feature("user_history_len"),
        feature("seconds_since_last_event"),
        feature("item_age"),
    ];
    let description = description(columns, &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let [length, tae, count, last, age] = [0, 1, 2, 3, 4].map(|column| net.input(column));
    let beside = |net: &mut Net, parts: &[u32]| net.op("Concat", parts, vec![int("axis", 1)]);
    let all = beside(&mut net, &[length, count, last, age]);
    let neighbours = beside(&mut net, &[count, last]);
    let others = beside(&mut net, &[age, length, last]);
    let squashed = net.op("Sigmoid", &[tae], vec![]);
    let mixed = beside(&mut net, &[neighbours, squashed, all, tae, others]);
    let weights = net.parameter("mixed", &[17, 5], Initialiser::Normal(0.3));
    let bias = net.parameter("bias", &[5], Initialiser::Normal(0.3));
    let product = net.op("MatMul", &[mixed, weights], vec![]);
    let product = net.op("Add", &[product, bias], vec![]);
    let column = net.parameter("column", &[4, 1], Initialiser::Normal(0.3));
    let single = net.op("MatMul", &[all, column], vec![]);
    let result = beside(&mut net, &[product, single, age]);
    finish(&mut net, &description, result);
    let graph = net.valid(&description);
    check("features and TAE", &Case { description, graph });
}

#[test]
fn one_request_does_not_reach_another() {
    let mixed = case(|net, b| {
        let inputs = [b.history, b.past, b.history, b.rows, b.other, b.rows];
        let attended = net.op("HstuAttention", &inputs, vec![int("heads", 2), int("max-len", 8)]);
        let most = net.op("PoolMax", &[b.history], vec![]);
        let mean = net.op("PoolMean", &[b.past], vec![]);
        let [sum, peak, rank] =
            ["SegmentSum", "SegmentMax", "SegmentRank"].map(|op| net.op(op, &[b.rows], vec![]));
        net.op("Concat", &[attended, most, mean, sum, peak, rank], vec![int("axis", 1)])
    });
    let together = batch(&mixed, &[(3, 2), (0, 1), (2, 3)]);
    let mut changed = together.clone();
    // The first request's TAE and history become something else entirely.
    if let ColumnData::Numbers(tae) = &mut changed.columns[0] {
        tae[..2 * TAE_DIM].fill(7.0);
    }
    if let ColumnData::Numbers(actions) = &mut changed.columns[1] {
        actions[..3 * 4].fill(5.0);
    }
    let compute = compute(mixed.graph.clone(), crate::Device::Cpu).unwrap();
    let parameters = parameters(&mixed.graph);
    let (before, after) =
        (compute.forward(&parameters, &together), compute.forward(&parameters, &changed));
    assert_ne!(before[..2], after[..2]);
    assert_eq!(before[2..], after[2..], "the other requests' outputs stay, bit for bit");
}
