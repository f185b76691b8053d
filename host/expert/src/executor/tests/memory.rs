//! The memory that is computed for a network against what is allocated.

use super::*;
use crate::graph::{GraphLimits, NetworkMemory, NetworkUse};
use crate::tests::allocations::peak_bytes;
use crate::tests::build::host;
use crate::train::{ExpertOptimizer, OptimizerConfig};

/// What is not counted, in bytes: shapes, lists of nodes, and blocks of products.
const SLACK: u64 = 96 << 10;

fn usage(requests: &[(usize, usize)], learns: bool) -> NetworkUse {
    let rows = requests.iter().map(|(_, targets)| targets).sum();
    let (requests, device) = (requests.len(), crate::Device::Cpu);
    NetworkUse { rows, requests, runs: 1, helpers: 0, device, learns }
}

/// The most bytes that work has at a time. It is done once before: a thread's first product makes a
/// block as large as the processor's second cache, and keeps it.
fn peak_of<T>(work: impl Fn() -> T) -> u64 {
    drop(work());
    peak_bytes(work)
}

/// What serving a batch allocates, parameters and compilation included, and what was computed.
fn served(case: &Case, requests: &[(usize, usize)]) -> [u64; 2] {
    let batch = batch(case, requests);
    let allocated = peak_of(|| {
        let (batch, parameters) = (batch.clone(), parameters(&case.graph));
        let network = network(case.graph.clone(), parameters, crate::Device::Cpu).unwrap();
        (network.outputs(&batch), network)
    });
    let computed = NetworkMemory::new(&case.graph, &case.description, &usage(requests, false));
    [allocated, computed.total()]
}

/// As [`served`], for a training step.
fn trained(case: &Case, requests: &[(usize, usize)]) -> [u64; 2] {
    let batch = batch(case, requests);
    let seed = noise(9, batch.rows);
    let allocated = peak_of(|| {
        let mut parameters = parameters(&case.graph);
        let mut optimizer = ExpertOptimizer::new(&case.graph, OptimizerConfig::default());
        let mut loss =
            |_: &[f32], _: &[f32]| OutputGradients { tasks: seed.clone(), losses: Vec::new() };
        let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
        let mut rng = SmallRng::seed_from_u64(1);
        let gradients = compute.gradients(&parameters, &batch, &mut rng, &mut loss);
        optimizer.step(&mut parameters, &gradients, &case.graph, 1.0);
        (parameters, optimizer)
    });
    let computed = NetworkMemory::new(&case.graph, &case.description, &usage(requests, true));
    [allocated, computed.total()]
}

/// Checks that no more is allocated than was computed.
pub(super) fn check_bound(name: &str, case: &Case) {
    let requests = [(8, 100); 40];
    for (how, [allocated, computed]) in
        [("served", served(case, &requests)), ("trained", trained(case, &requests))]
    {
        assert!(
            allocated <= computed + SLACK,
            "{name} {how}: {allocated} bytes are allocated, {computed} were computed"
        );
    }
}

/// A perceptron over the TAE and an embedding.
fn perceptron() -> Case {
    case(|net, base| {
        let table = net.parameter("table", &[50_000, 16], Initialiser::Normal(1.0));
        let item = net.op("EmbeddingBag", &[table, base.id], vec![]);
        let mut last = net.op("Concat", &[base.rows, item], vec![int("axis", 1)]);
        for (at, [from, to]) in [[20, 256], [256, 256], [256, 64]].into_iter().enumerate() {
            let weights = net.parameter(&format!("w{at}"), &[from, to], Initialiser::Normal(0.1));
            let bias = net.parameter(&format!("b{at}"), &[to], Initialiser::Zeros);
            let product = net.op("MatMul", &[last, weights], vec![]);
            let sum = net.op("Add", &[product, bias], vec![]);
            last = net.op("Relu", &[sum], vec![]);
        }
        last
    })
}

/// Attention of rows to the short history.
fn attention() -> Case {
    case(|net, base| {
        let mut wide = |name: &str, x: u32| {
            let weights = net.parameter(name, &[4, 64], Initialiser::Normal(0.1));
            net.op("MatMul", &[x, weights], vec![])
        };
        let past = ["qh", "kh", "vh"].map(|name| wide(name, base.history));
        let rows = ["q", "k", "v"].map(|name| wide(name, base.rows));
        let inputs = [past, rows].concat();
        net.op("HstuAttention", &inputs, vec![int("heads", 2), int("max-len", 8)])
    })
}

#[test]
fn the_figure_of_an_ordinary_network_is_at_most_twice_what_is_allocated() {
    for (name, case) in [("perceptron", perceptron()), ("attention", attention())] {
        check_bound(name, &case);
        let [allocated, computed] = served(&case, &[(8, 1000)]);
        assert!(
            computed <= 2 * allocated,
            "{name}: {computed} bytes were computed, {allocated} are allocated"
        );
    }
}

/// Products of what `op` makes of a layer, as the leaves of trees are of comparisons. Where it is
/// frozen, only what weighs the products learns.
fn products(op: &'static str, is_frozen: bool) -> Case {
    case(|net, base| {
        let selection = net.parameter("selection", &[4, 512], Initialiser::Normal(1.0));
        let thresholds = net.parameter("thresholds", &[512], Initialiser::Normal(1.0));
        if is_frozen {
            net.freeze();
        }
        let read = net.op("MatMul", &[base.rows, selection], vec![]);
        let first = net.op(op, &[read, thresholds], vec![]);
        (0..20).fold(first, |last, _| net.op("Mul", &[last, first], vec![]))
    })
}

#[test]
fn what_no_gradient_comes_to_is_freed_before_the_backward_pass() {
    let of = |op, is_frozen| {
        let case = products(op, is_frozen);
        check_bound(op, &case);
        NetworkMemory::new(&case.graph, &case.description, &usage(&[(8, 1000)], true)).runs
    };
    let [learning, comparisons] = ["Sub", "Greater"].map(|op| of(op, false));
    let frozen = of("Sub", true);
    assert!(comparisons < learning / 4, "{comparisons} and {learning}");
    assert!(frozen < comparisons, "{frozen} and {comparisons}");
}

#[test]
fn where_passes_end_early_the_best_one_is_counted() {
    let Case { description, graph } = perceptron();
    let (values, config) = (parameters(&graph).to_values(), OptimizerConfig::default());
    let optimizer = ExpertOptimizer::new(&graph, config);
    // With an average, as a trainer saves it.
    let kept = peak_of(|| (values.clone(), values.clone(), optimizer.clone()));
    let patient = Description { patience: Some(1), ..description.clone() };
    let usages = [usage(&[(8, 100)], true), usage(&[(8, 100)], false)];
    let [trained, served] = usages.map(|usage| {
        let total = |of| NetworkMemory::new(&graph, of, &usage).total();
        total(&patient) - total(&description)
    });
    assert!((kept..2 * kept).contains(&(trained + (4 << 10))), "{kept}, {trained} counted");
    assert_eq!(served, 0);
}

/// Rows of a batch in training: so many that no network of [`hoard`] may be trained.
const TRAINED_ROWS: usize = 100_000;

fn hoarding(history_len: u32) -> Description {
    let description = description(vec![Column::HistoryAge], &[("click", TaskKind::Binary)]);
    Description { history_len, ..description }
}

/// A network over `history_len` events whose operators take no FLOPs, or why it is refused:
/// `copies` concatenations of 65,536 values an event.
fn hoard(history_len: u32, copies: usize, serving: NetworkUse) -> Result<ExpertGraph, String> {
    let description = hoarding(history_len);
    let mut net = Net::new();
    let age = net.input(0);
    let wide = net.op("Concat", &[age; 256], vec![int("axis", 1)]);
    let column = |net: &mut Net, x: u32| {
        net.op("Slice", &[x], vec![int("axis", 1), int("start", 0), int("end", 1)])
    };
    let copies: Vec<u32> =
        (0..copies).map(|_| net.op("Concat", &[wide; 256], vec![int("axis", 1)])).collect();
    let columns: Vec<u32> = copies.iter().map(|copy| column(&mut net, *copy)).collect();
    let all = net.op("Concat", &columns, vec![int("axis", 1)]);
    let one = column(&mut net, all);
    let past = net.op("PoolSum", &[one], vec![]);
    net.output("click", past);
    let training = NetworkUse::training(TRAINED_ROWS);
    let limits = GraphLimits { serving, training, ..GraphLimits::default() };
    let graph = ExpertGraph::new(&description, &net.network, &host(), &limits);
    let graph = graph.map_err(|error| error.to_string())?;
    assert!(graph.cost.per_candidate(history_len) < 1000, "{:?}", graph.cost);
    Ok(graph)
}

#[test]
fn what_training_needs_is_refused_where_it_is_trained_alone() {
    let limit = GraphLimits::default().memory_bytes;
    let graph = hoard(8, 1, NetworkUse::serving(1000, 4)).expect("it loads where it only serves");
    assert!(graph.serving_memory.total() < limit && graph.training_memory.total() > limit);
    let training = NetworkUse::training(TRAINED_ROWS);
    let why = graph.check_memory(&hoarding(8), &training, limit).unwrap_err();
    assert!(why.contains("where it is trained") && why.contains("100000 rows"), "{why}");
}

#[test]
fn a_network_without_flops_is_refused_for_what_it_holds() {
    let small = hoard(8, 1, NetworkUse::serving(1000, 4)).unwrap().serving_memory.total();
    assert!((8 << 20..16 << 20).contains(&small), "eight events, four runs: {small}");
    let why = hoard(4096, 1, NetworkUse::serving(1000, 4)).unwrap_err();
    let expected = [
        "more than the limit of 4096 MiB",
        "4 run(s) of 1000 rows",
        "node 2 `Concat` takes most of that",
    ];
    expected.iter().for_each(|part| assert!(why.contains(part), "{part}: {why}"));
    // Within every other limit, and on a daemon of sixteen threads, it would take 60 GB.
    let why = hoard(4096, 3, NetworkUse::serving(1000, 18)).unwrap_err();
    let figure = why.split("needs ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(figure.parse::<u64>().unwrap() > 54_000, "{why}");
}

#[test]
fn a_parameter_that_many_nodes_read_is_held_once() {
    let case = case(|net, base| {
        let vector = net.parameter("vector", &[100_000], Initialiser::Ones);
        let index = net.network.parameters.len() as i64 - 1;
        let mut last = base.rows;
        for _ in 0..50 {
            let again = net.op("Parameter", &[], vec![int("parameter", index)]);
            let bounds = vec![int("axis", 0), int("start", 0), int("end", 4)];
            let four = net.op("Slice", &[again], bounds);
            last = net.op("Add", &[last, four], vec![]);
        }
        let bounds = vec![int("axis", 0), int("start", 0), int("end", 4)];
        let four = net.op("Slice", &[vector], bounds);
        net.op("Add", &[last, four], vec![])
    });
    let [allocated, computed] = served(&case, &[(8, 10)]);
    assert!(allocated < 3 << 20 && computed < 3 << 20, "{allocated} and {computed}");
}
