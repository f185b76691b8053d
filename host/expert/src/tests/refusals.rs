//! Graphs that the host refuses. Each message names plugin, layer, op and rule.

use super::build::{Net, description, host, int, ints, num};
use crate::graph::{ExpertGraph, GraphLimits};
use crate::wasm::contract::{Column, Description, Initialiser, TaskKind};

fn columns() -> Description {
    let columns = vec![
        Column::Tae,
        Column::HistoryActions,
        Column::Id("item_id".into()),
        Column::HistoryId("item_id".into()),
        Column::Feature("length".into()),
    ];
    description(columns, &[("click", TaskKind::Binary)])
}

/// The refusal of a network with TAE, actions, id, history id and feature as nodes 0 to 4, and the
/// nodes of `build`, which returns the output.
fn refusal(build: impl FnOnce(&mut Net) -> u32) -> String {
    let mut net = Net::new();
    (0..5).for_each(|column| _ = net.input(column));
    let result = build(&mut net);
    net.output("click", result);
    net.graph(&columns()).expect_err("the graph breaks a rule").to_string()
}

#[track_caller]
fn expect(message: &str, parts: &[&str]) {
    // Who the expert is, and what the refusal is to its author and to who operates the host.
    for part in parts.iter().chain(&["test-expert", "Its author", "operators"]) {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn unknown_ops_and_attributes() {
    expect(
        &refusal(|net| net.op("Conv", &[4], vec![])),
        &["layer `test`", "node 5 `Conv`", "unknown"],
    );
    expect(
        &refusal(|net| net.op("Slice", &[4], vec![int("axis", 1), int("start", 0)])),
        &["`Slice`", "`end` is missing"],
    );
    expect(
        &refusal(|net| net.op("Relu", &[4], vec![num("slope", 0.1)])),
        &["no attribute `slope`"],
    );
    expect(
        &refusal(|net| net.op("Softmax", &[4], vec![num("axis", 1.0)])),
        &["`axis` is not an integer"],
    );
    expect(
        &refusal(|net| net.op("Dropout", &[4], vec![num("rate", 1.0), int("per-row", 0)])),
        &["`rate` of 1"],
    );
    expect(
        &refusal(|net| net.op("Clip", &[4], vec![num("min", f32::NAN), num("max", 1.0)])),
        &["`min` is NaN"],
    );
}

#[test]
fn cycles_and_forward_references() {
    expect(&refusal(|net| net.op("Relu", &[5], vec![])), &["node 5 `Relu`", "node 5", "no cycle"]);
    expect(&refusal(|net| net.op("Add", &[4, 99], vec![])), &["node 99", "not before it"]);
}

#[test]
fn shapes_that_do_not_fit() {
    let bad = refusal(|net| {
        let w = net.parameter("w", &[5, 1], Initialiser::Zeros);
        net.op("MatMul", &[0, w], vec![])
    });
    expect(&bad, &["`MatMul` of [rows, 4], [5, 1]", "4 and 5 differ"]);
    expect(
        &refusal(|net| net.op("Add", &[0, 1], vec![])),
        &["[rows, 4], [history, 4]", "`rows` meets `history`"],
    );
    expect(&refusal(|net| net.op("MatMul", &[0, 0], vec![])), &["not a fixed matrix"]);
    expect(
        &refusal(|net| net.op("ReduceSum", &[0], vec![int("axis", 0)])),
        &["axis 0", "symbolic"],
    );
    expect(&refusal(|net| net.op("Softmax", &[0], vec![int("axis", 0)])), &["symbolic"]);
    expect(
        &refusal(|net| net.op("Concat", &[0, 1], vec![int("axis", 1)])),
        &["differ outside axis 1"],
    );
    expect(&refusal(|net| net.op("Concat", &[0, 0], vec![int("axis", 0)])), &["symbolic"]);
    expect(
        &refusal(|net| net.op("Slice", &[0], vec![int("axis", 1), int("start", 2), int("end", 9)])),
        &["2..9"],
    );
    expect(
        &refusal(|net| net.op("Slice", &[0], vec![int("axis", 0), int("start", 0), int("end", 1)])),
        &["symbolic"],
    );
    expect(&refusal(|net| net.op("Reshape", &[0], vec![ints("shape", &[4, 1])])), &["must be 0"]);
    expect(&refusal(|net| net.op("Reshape", &[0], vec![ints("shape", &[0, 3])])), &["[rows, 3]"]);
    expect(
        &refusal(|net| net.op("Transpose", &[0], vec![ints("perm", &[1, 0])])),
        &["symbolic dimension", "stays first"],
    );
    expect(
        &refusal(|net| net.op("Transpose", &[0], vec![ints("perm", &[0, 0])])),
        &["no permutation"],
    );
    expect(
        &refusal(|net| net.op("PoolMean", &[0], vec![])),
        &["pools [history, d], not [rows, 4]"],
    );
    expect(&refusal(|net| net.op("Where", &[0, 0, 4], vec![])), &["differ in shape"]);
    let five = |net: &mut Net| {
        let w = net.parameter("w", &[5, 4], Initialiser::Zeros);
        net.op("Add", &[0, w], vec![])
    };
    expect(&refusal(five), &["[rows, 4], [5, 4]", "symbolic dimension meets 5"]);
    let heads =
        |net: &mut Net| net.op("HstuHistory", &[1, 1, 1], vec![int("heads", 3), int("max-len", 8)]);
    expect(&refusal(heads), &["multiple of its 3 heads"]);
    let rows =
        |net: &mut Net| net.op("HstuHistory", &[0, 0, 0], vec![int("heads", 2), int("max-len", 8)]);
    expect(&refusal(rows), &["[history, heads * d]"]);
}

#[test]
fn types_that_do_not_fit() {
    expect(&refusal(|net| net.op("Relu", &[2], vec![])), &["input 0 is i64 ids"]);
    expect(&refusal(|net| net.op("Cast", &[4], vec![])), &["input 0 is f32"]);
    let bag = |net: &mut Net| {
        let table = net.parameter("table", &[10, 1], Initialiser::Zeros);
        net.op("EmbeddingBag", &[table, 4], vec![])
    };
    expect(&refusal(bag), &["`EmbeddingBag` of [10, 1], [rows, 1]", "input 1 is f32"]);
    expect(&refusal(|net| net.op("Add", &[4], vec![])), &["1 inputs, but takes 2"]);
}

#[test]
fn outputs_that_are_not_one_logit_a_task() {
    expect(&refusal(|_| 0), &["task `click`", "[rows, 4]", "[rows, 1]"]);
    expect(&refusal(|net| net.op("PoolMean", &[1], vec![])), &["[rows, 4]"]);
    expect(&refusal(|_| 2), &["f32 [rows, 1]"]);
    expect(&refusal(|_| 99), &["node 99"]);
    let tasks = |outputs: &[&str]| {
        let mut net = Net::new();
        let x = net.input(4);
        outputs.iter().for_each(|task| net.output(task, x));
        net.graph(&columns()).expect_err("outputs and tasks differ").to_string()
    };
    expect(&tasks(&[]), &["no output for task `click`"]);
    expect(&tasks(&["click", "click"]), &["two outputs for task `click`"]);
    expect(&tasks(&["click", "buy"]), &["task `buy`", "lacks"]);
}

#[test]
fn networks_that_are_too_big() {
    let huge = |net: &mut Net| {
        let w = net.parameter("w", &[100_000, 10_000], Initialiser::Zeros);
        net.op("Gather", &[w, 2], vec![])
    };
    expect(&refusal(huge), &["`w` [100000, 10000]", "1000000000 values", "limit"]);
    let overflow = |net: &mut Net| net.parameter("w", &[u32::MAX; 4], Initialiser::Zeros);
    expect(&refusal(overflow), &["overflows"]);
    let wide = |net: &mut Net| {
        net.op("Constant", &[], vec![num("value", 1.0), ints("shape", &[1 << 40, 1 << 40])])
    };
    expect(&refusal(wide), &["dimension"]);
    let memory = |net: &mut Net| {
        let one = net.op("Constant", &[], vec![num("value", 1.0), ints("shape", &[1, 1_000_000])]);
        net.op("Mul", &[4, one], vec![])
    };
    expect(&refusal(memory), &["values a candidate"]);
    let costly = |net: &mut Net| {
        let w = net.parameter("w", &[4, 4096], Initialiser::Zeros);
        let v = net.parameter("v", &[4096, 4096], Initialiser::Zeros);
        let x = net.op("MatMul", &[0, w], vec![]);
        let x = net.op("MatMul", &[x, v], vec![]);
        let x = net.op("MatMul", &[x, v], vec![]);
        net.op("ReduceSum", &[x], vec![int("axis", 1)])
    };
    expect(&refusal(costly), &["FLOPs a candidate"]);
    let empty = |net: &mut Net| net.parameter("w", &[4, 0], Initialiser::Zeros);
    expect(&refusal(empty), &["`w` has shape [4, 0]"]);
    let mut many = Net::new();
    (0..5000).for_each(|_| _ = many.input(4));
    expect(&many.graph(&columns()).unwrap_err().to_string(), &["5000 nodes"]);
}

#[test]
fn columns_and_parameters_that_do_not_exist() {
    expect(&refusal(|net| net.input(5)), &["column 5", "declares 5"]);
    expect(
        &refusal(|net| net.op("Parameter", &[], vec![int("parameter", 3)])),
        &["parameter 3 of 0"],
    );
    let twice = |net: &mut Net| {
        net.parameter("w", &[1], Initialiser::Zeros);
        net.parameter("w", &[1], Initialiser::Zeros)
    };
    expect(&refusal(twice), &["`w`", "used twice"]);
    let mut without_history = columns();
    without_history.history_len = 0;
    let mut net = Net::new();
    net.input(1);
    expect(
        &net.graph(&without_history).unwrap_err().to_string(),
        &["history actions", "history-len is 0"],
    );
}

#[test]
fn cost_counts_what_the_ops_do() {
    let mut net = Net::new();
    let (tae, past) = (net.input(0), net.input(1));
    let w = net.parameter("w", &[4, 8], Initialiser::Zeros);
    let v = net.parameter("v", &[8, 1], Initialiser::Zeros);
    let past = net.op("Tanh", &[past], vec![]);
    let past = net.op("PoolSum", &[past], vec![]);
    let x = net.op("Add", &[tae, past], vec![]);
    let x = net.op("MatMul", &[x, w], vec![]);
    let x = net.op("Relu", &[x], vec![]);
    let x = net.op("MatMul", &[x, v], vec![]);
    // No prediction needs it.
    net.op("Tanh", &[x], vec![]);
    net.output("click", x);
    let graph =
        ExpertGraph::new(&columns(), &net.network, &host(), &GraphLimits::default()).unwrap();
    assert_eq!(graph.cost.per_row, 4 + 2 * 4 * 8 + 8 + 2 * 8);
    assert_eq!(graph.cost.per_history, 4 + 4);
    assert_eq!(graph.parameter_count(), 40);
}
