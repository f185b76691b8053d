//! Every op against the f64 oracle, within its bounds, and against the memory that is computed for
//! it, and every gradient also against the oracle's central differences; also with batches without
//! history and of one row.

mod behaviour;
mod memory;
mod scores;
mod segments;
mod tags;

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::Tae;
use crate::batch::ExpertColumns;
use crate::graph::{ExpertGraph, names_of_variants};
use crate::network::network;
use crate::normalise::Normaliser;
use crate::oracle::{Comparison, Evaluation, compare, whole_gradients};
use crate::tests::build::{
    Net, TAE_DIM, description, example, int, ints, noise, num, schema, vectors,
};
use crate::train::{OutputGradients, compute};
use crate::wasm::contract::{Column, Description, Initialiser, TaskKind};

/// The nodes that a case can start from. All but the ids have gradients.
struct Base {
    /// `[rows, 4]`
    rows: u32,
    /// `[rows, 4]`
    other: u32,
    /// `[history, 4]`
    history: u32,
    /// `[history, 4]`
    past: u32,
    /// `[4, 3]`
    matrix: u32,
    /// `[rows, 1]` ids
    id: u32,
    /// `[history, 1]` ids
    history_id: u32,
    /// `[rows, 3]` ids
    topics: u32,
    /// `[history, 3]` ids
    history_topics: u32,
}

struct Case {
    description: Description,
    graph: Arc<ExpertGraph>,
}

fn case(build: impl FnOnce(&mut Net, &Base) -> u32) -> Case {
    let columns = vec![
        Column::Tae,
        Column::HistoryActions,
        Column::Id("item_id".into()),
        Column::HistoryId("item_id".into()),
        Column::Id("topics".into()),
        Column::HistoryId("topics".into()),
    ];
    let description = description(columns, &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let (tae, actions) = (net.input(0), net.input(1));
    let mut affine = |name: &str, x: u32| {
        let scale = net.parameter(&format!("{name}.scale"), &[4], Initialiser::Normal(0.7));
        let bias = net.parameter(&format!("{name}.bias"), &[4], Initialiser::Normal(0.7));
        let scaled = net.op("Mul", &[x, scale], vec![]);
        net.op("Add", &[scaled, bias], vec![])
    };
    let (rows, other) = (affine("rows", tae), affine("other", tae));
    let (history, past) = (affine("history", actions), affine("past", actions));
    let matrix = net.parameter("matrix", &[4, 3], Initialiser::Normal(0.7));
    let (id, history_id) = (net.input(2), net.input(3));
    let (topics, history_topics) = (net.input(4), net.input(5));
    let base = Base { rows, other, history, past, matrix, id, history_id, topics, history_topics };
    let result = build(&mut net, &base);
    finish(&mut net, &description, result);
    let graph = net.valid(&description);
    Case { description, graph }
}

/// Brings any result to `[rows, 1]` with a weight for each of its elements.
fn finish(net: &mut Net, description: &Description, result: u32) {
    let mut probe = net.clone();
    let column = probe.op("Slice", &[0], vec![int("axis", 1), int("start", 0), int("end", 1)]);
    probe.output("click", column);
    let shape = probe.valid(description).nodes[result as usize].shape.clone();
    let count = shape.row_elements() as i64;
    let lead = i64::from(shape.lead.is_some());
    let flat = if lead == 1 { vec![0, count] } else { vec![1, count] };
    let flat = net.op("Reshape", &[result], vec![ints("shape", &flat)]);
    let weights = net.parameter("weights", &[count as u32, 1], Initialiser::Normal(1.0));
    let sum = net.op("MatMul", &[flat, weights], vec![]);
    let led = match shape.lead {
        Some(Lead::Rows) => sum,
        Some(Lead::History) => net.op("PoolSum", &[sum], vec![]),
        None => {
            let column =
                net.op("Slice", &[0], vec![int("axis", 1), int("start", 0), int("end", 1)]);
            net.op("Add", &[column, sum], vec![])
        }
    };
    net.output("click", led);
}

fn batch(case: &Case, requests: &[(usize, usize)]) -> ExpertBatch {
    let schema = schema();
    let columns = ExpertColumns::new(&case.description, &schema, vectors()).unwrap();
    let sizes = requests.iter().enumerate();
    let examples: Vec<_> = sizes
        .map(|(index, (history, targets))| example(index as u64 + 1, *history, *targets))
        .collect();
    let rows: usize = requests.iter().map(|(_, targets)| targets).sum();
    columns.batch(
        &examples,
        Tae::Rows(&noise(5, rows * TAE_DIM)),
        &Normaliser::identity(&schema.feature_columns()),
    )
}

fn parameters(graph: &ExpertGraph) -> Parameters {
    crate::tests::build::parameters(graph, 3)
}

/// The widest bound in these cases, relative to values above 1, so that no comparison is void.
const WIDEST: f64 = 5e-4;

/// Compares outputs and all gradients with the oracle's.
fn check(name: &str, case: &Case) {
    memory::check_bound(name, case);
    for requests in [&[(3, 2), (0, 1), (2, 3)][..], &[(0, 2), (0, 1)], &[(1, 1)], &[(0, 1)]] {
        let batch = batch(case, requests);
        let parameters = parameters(&case.graph);
        let loss = OutputGradients { tasks: noise(9, batch.rows), losses: Vec::new() };
        let compared = compare(&Comparison {
            graph: &case.graph,
            parameters: &parameters,
            batch: &batch,
            loss: &loss,
            seed: 1,
        });
        let compared = compared.unwrap_or_else(|error| panic!("{name} {requests:?}: {error}"));
        assert!(
            compared.unknown == 0 && compared.widest < WIDEST,
            "{name} {requests:?}: {compared:?}"
        );
        check_slopes(&format!("{name} {requests:?}"), case, &batch, &loss);
    }
}

/// Compares gradients with central differences, which know nothing of slopes.
fn check_slopes(name: &str, case: &Case, batch: &ExpertBatch, loss: &OutputGradients) {
    let parameters = parameters(&case.graph);
    let values: Vec<Vec<f64>> = (0..case.graph.parameters.len())
        .map(|index| parameters.values(index).iter().map(|value| f64::from(*value)).collect())
        .collect();
    let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    let gradients = compute.gradients(&parameters, batch, &mut random, &mut |_, _| loss.clone());
    let value = |values: &[Vec<f64>]| -> f64 {
        let evaluation = Evaluation::new(&case.graph, values, batch, None);
        let (outputs, losses) = (evaluation.outputs(), evaluation.losses());
        let seeded = outputs.iter().zip(&loss.tasks).chain(losses.iter().zip(&loss.losses));
        seeded.map(|(x, seed)| x.value * f64::from(*seed)).sum()
    };
    for (index, gradient) in whole_gradients(&case.graph, &gradients).iter().enumerate() {
        let spec = &case.graph.parameters[index];
        for (position, gradient) in gradient.iter().enumerate() {
            let nudge = |by: f64| {
                let mut values = values.to_vec();
                values[index][position] += by;
                value(&values)
            };
            let expected = (nudge(1e-5) - nudge(-1e-5)) / 2e-5;
            let error = (f64::from(*gradient) - expected).abs();
            let at = format!("{name}: gradient of {}[{position}]", spec.name);
            assert!(error <= 2e-4 * expected.abs().max(1.0), "{at} is {gradient}, not {expected}");
        }
    }
}

#[test]
fn elementwise_ops_of_one_input() {
    for op in
        ["Exp", "Log", "Sqrt", "Neg", "Abs", "Sigmoid", "Silu", "Relu", "Gelu", "Tanh", "Softplus"]
    {
        check(
            op,
            &case(|net, base| match op {
                // Their inputs are positive here; the clamp has a test of its own.
                "Log" | "Sqrt" => {
                    let positive = net.op("Exp", &[base.rows], vec![]);
                    net.op(op, &[positive], vec![])
                }
                _ => net.op(op, &[base.rows], vec![]),
            }),
        );
    }
    check(
        "Clip",
        &case(|net, base| net.op("Clip", &[base.rows], vec![num("min", -0.5), num("max", 0.4)])),
    );
}

#[test]
fn elementwise_ops_of_two_inputs_broadcast() {
    for op in ["Add", "Sub", "Mul", "Div", "Max", "Min"] {
        check(op, &case(|net, base| net.op(op, &[base.rows, base.other], vec![])));
        check(
            &format!("{op} with a vector"),
            &case(|net, base| {
                let vector = net.parameter("vector", &[4], Initialiser::Normal(1.0));
                net.op(op, &[vector, base.history], vec![])
            }),
        );
        check(
            &format!("{op} of ranks 3 and 2"),
            &case(|net, base| {
                let cube = net.op("Reshape", &[base.rows], vec![ints("shape", &[0, 2, 2])]);
                let grid = net.parameter("grid", &[2, 1], Initialiser::Normal(1.0));
                net.op(op, &[cube, grid], vec![])
            }),
        );
        check(
            &format!("{op} of a row and a fixed one"),
            &case(|net, base| {
                let column = net.op(
                    "Slice",
                    &[base.rows],
                    vec![int("axis", 1), int("start", 1), int("end", 2)],
                );
                let one = net.parameter("one", &[1, 4], Initialiser::Normal(1.0));
                net.op(op, &[column, one], vec![])
            }),
        );
    }
}

#[test]
fn comparisons_and_where() {
    for op in ["Greater", "Less", "Equal"] {
        check(
            op,
            &case(|net, base| {
                let truth = net.op(op, &[base.rows, base.other], vec![]);
                net.op("Where", &[truth, base.rows, base.other], vec![])
            }),
        );
    }
}

#[test]
fn matrix_products_of_rank_2_and_3() {
    check("MatMul", &case(|net, base| net.op("MatMul", &[base.rows, base.matrix], vec![])));
    check(
        "MatMul history",
        &case(|net, base| net.op("MatMul", &[base.history, base.matrix], vec![])),
    );
    check(
        "MatMul rank 3",
        &case(|net, base| {
            let small = net.parameter("small", &[2, 5], Initialiser::Normal(1.0));
            let cube = net.op("Reshape", &[base.rows], vec![ints("shape", &[0, 2, 2])]);
            net.op("MatMul", &[cube, small], vec![])
        }),
    );
    check(
        "MatMul of parameters",
        &case(|net, base| {
            let left = net.parameter("left", &[2, 4], Initialiser::Normal(1.0));
            net.op("MatMul", &[left, base.matrix], vec![])
        }),
    );
}

#[test]
fn shapes_are_moved_as_onnx_says() {
    check(
        "Concat",
        &case(|net, base| {
            net.op("Concat", &[base.rows, base.other, base.rows], vec![int("axis", 1)])
        }),
    );
    check(
        "Slice",
        &case(|net, base| {
            net.op("Slice", &[base.rows], vec![int("axis", 1), int("start", 1), int("end", 3)])
        }),
    );
    check(
        "Transpose",
        &case(|net, base| {
            let cube = net.op("Reshape", &[base.rows], vec![ints("shape", &[0, 2, 2])]);
            net.op("Transpose", &[cube], vec![ints("perm", &[0, 2, 1])])
        }),
    );
    check(
        "Transpose of a parameter",
        &case(|net, base| net.op("Transpose", &[base.matrix], vec![ints("perm", &[1, 0])])),
    );
}

#[test]
fn reductions_and_normalisation() {
    for op in ["ReduceSum", "ReduceMean", "ReduceMax", "Softmax"] {
        check(op, &case(|net, base| net.op(op, &[base.rows], vec![int("axis", 1)])));
        check(
            &format!("{op} inside"),
            &case(|net, base| {
                let cube = net.op("Reshape", &[base.history], vec![ints("shape", &[0, 2, 2])]);
                net.op(op, &[cube], vec![int("axis", 1)])
            }),
        );
    }
    check(
        "LayerNormalization",
        &case(|net, base| {
            let scale = net.parameter("norm.scale", &[4], Initialiser::Normal(1.0));
            let bias = net.parameter("norm.bias", &[4], Initialiser::Normal(1.0));
            net.op("LayerNormalization", &[base.rows, scale, bias], vec![num("epsilon", 1e-3)])
        }),
    );
}

#[test]
fn lookups_read_rows_by_id() {
    for dense in [false, true] {
        for op in ["EmbeddingBag", "Gather"] {
            check(
                &format!("{op}, dense {dense}"),
                &case(|net, base| {
                    let table = net.parameter("table", &[5, 3], Initialiser::Normal(1.0));
                    // Arithmetic on the table makes it a dense parameter.
                    let table = if dense { net.op("Tanh", &[table], vec![]) } else { table };
                    let past = net.op(op, &[table, base.history_id], vec![]);
                    let past = net.op("PoolMean", &[past], vec![]);
                    let now = net.op(op, &[table, base.id], vec![]);
                    net.op("Mul", &[now, past], vec![])
                }),
            );
        }
    }
    check(
        "EmbeddingBag of several ids",
        &case(|net, base| {
            let table = net.parameter("table", &[7, 3], Initialiser::Normal(1.0));
            let ids = net.op("Concat", &[base.id, base.id, base.id, base.id], vec![int("axis", 1)]);
            let ids = net.op("Reshape", &[ids], vec![ints("shape", &[0, 2, 2])]);
            let ids = net.op("Transpose", &[ids], vec![ints("perm", &[0, 2, 1])]);
            let ids = net.op("Reshape", &[ids], vec![ints("shape", &[0, 4])]);
            let ids = net.op("Slice", &[ids], vec![int("axis", 1), int("start", 1), int("end", 4)]);
            net.op("EmbeddingBag", &[table, ids], vec![])
        }),
    );
    for dense in [false, true] {
        check(
            &format!("EmbeddingBag of a feature of several values, dense {dense}"),
            &case(|net, base| {
                let table = net.parameter("table", &[7, 3], Initialiser::Normal(1.0));
                let table = if dense { net.op("Tanh", &[table], vec![]) } else { table };
                let past = net.op("EmbeddingBag", &[table, base.history_topics], vec![]);
                let past = net.op("PoolMean", &[past], vec![]);
                let now = net.op("EmbeddingBag", &[table, base.topics], vec![]);
                net.op("Add", &[now, past], vec![])
            }),
        );
    }
    check(
        "Cast",
        &case(|net, base| {
            let number = net.op("Cast", &[base.id], vec![]);
            let scale = net.op("Constant", &[], vec![num("value", 0.01), ints("shape", &[1])]);
            let number = net.op("Mul", &[number, scale], vec![]);
            net.op("Mul", &[number, base.rows], vec![])
        }),
    );
}

#[test]
fn hstu_and_pooling_cross_by_request() {
    check(
        "HstuAttention",
        &case(|net, b| {
            let inputs = [b.history, b.past, b.history, b.rows, b.other, b.rows];
            net.op("HstuAttention", &inputs, vec![int("heads", 2), int("max-len", 8)])
        }),
    );
    check(
        "HstuHistory",
        &case(|net, b| {
            net.op(
                "HstuHistory",
                &[b.history, b.past, b.history],
                vec![int("heads", 2), int("max-len", 8)],
            )
        }),
    );
    for op in ["PoolSum", "PoolMean", "PoolMax"] {
        // Multi-hot histories tie in their maxima; a product with the age-free id breaks ties.
        check(
            op,
            &case(|net, base| {
                let table = net.parameter("table", &[64, 4], Initialiser::Normal(1.0));
                let item = net.op("EmbeddingBag", &[table, base.history_id], vec![]);
                let mixed = net.op("Add", &[base.history, item], vec![]);
                net.op(op, &[mixed], vec![])
            }),
        );
    }
}

/// The words in quotes that look like an operator's name.
fn quoted_operators(text: &str) -> BTreeSet<&str> {
    let words = text.split('"').skip(1).step_by(2);
    let is_name = |word: &&str| {
        word.starts_with(|first: char| first.is_ascii_uppercase())
            && word.chars().all(|letter| letter.is_ascii_alphabetic())
    };
    words.filter(is_name).collect()
}

#[test]
fn every_operator_is_documented_and_tested() {
    let document = include_str!("../../../../../sdk/wit/ops.md");
    // Its first table; others follow under headings.
    let (table, _) = document.split_once("\n## ").unwrap();
    let first_cells = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<&str> = first_cells
        .filter_map(|row| row.split('|').next())
        .flat_map(|cell| cell.split(['`', ' ']).filter(|word| !word.is_empty()))
        .collect();
    let leaves = BTreeSet::from(["Constant", "Input", "Parameter"]);
    let cases = [include_str!("mod.rs"), include_str!("behaviour.rs"), include_str!("segments.rs")];
    let cases = cases.map(quoted_operators);
    let tested: BTreeSet<&str> = cases.into_iter().flatten().chain(leaves.clone()).collect();
    let fuzzed = quoted_operators(include_str!("../../../../../tests/fuzz/src/graph.rs"));
    let in_sdk = [
        include_str!("../../../../../sdk/src/ops.rs"),
        include_str!("../../../../../sdk/src/segment.rs"),
    ];
    let in_sdk: BTreeSet<&str> = in_sdk.into_iter().flat_map(quoted_operators).collect();
    let missing = |from: &BTreeSet<&str>| -> Vec<String> {
        documented.difference(from).map(|name| name.to_string()).collect()
    };
    assert_eq!(missing(&tested), [""; 0], "operators without a case in these tests");
    assert_eq!(missing(&fuzzed), [""; 0], "operators without a place in the fuzz target");
    let in_sdk = in_sdk.union(&leaves).copied().collect();
    assert_eq!(missing(&in_sdk), [""; 0], "operators without a method in the SDK");
    // Names such as `ReduceSum` are parsed from two parts.
    let parts = BTreeSet::from(["Pool", "Reduce", "Segment"]);
    let composed = names_of_variants();
    let mut known = &quoted_operators(include_str!("../../graph/op.rs")) - &parts;
    known.extend(composed.iter().map(String::as_str));
    let undocumented: Vec<&&str> = known.difference(&documented).collect();
    assert!(undocumented.is_empty(), "operators that sdk/wit/ops.md lacks: {undocumented:?}");
}
