//! Experts that `cargo hypercast from-onnx` made of models of PyTorch and of ensembles of trees, in
//! the host's executor: they predict what onnxruntime said of the models. The tool's own tests hold
//! it to these crates.

use std::collections::BTreeMap;
use std::path::PathBuf;

use hypercast_core::prerequisite::hostile;
use hypercast_harness::{Harness, World};
use hypercast_sdk::Expert;
use serde_json::Value;

#[rustfmt::skip]
#[path = "../../onnx/dcn/src/lib.rs"]
mod dcn;
#[rustfmt::skip]
#[path = "../../onnx/dlrm/src/lib.rs"]
mod dlrm;
#[rustfmt::skip]
#[path = "../../onnx/ensembles/src/lib.rs"]
mod ensembles;
#[rustfmt::skip]
#[path = "../../onnx/mixed/src/lib.rs"]
mod mixed;

/// The models, what they predict, and their crates.
fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/onnx"))
}

/// The inputs and outputs that were recorded of a model.
fn recorded(model: &str) -> Value {
    let text = std::fs::read_to_string(fixtures().join(format!("{model}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Column `index` of an input or output.
fn column(rows: &Value, index: usize) -> Vec<f64> {
    let value = |row: &Value| row.get(index).unwrap_or(row).as_f64().unwrap();
    rows.as_array().unwrap().iter().map(value).collect()
}

fn numbers(rows: &Value, index: usize) -> Vec<f32> {
    column(rows, index).into_iter().map(|value| value as f32).collect()
}

fn ids(rows: &Value, index: usize) -> Vec<u64> {
    column(rows, index).into_iter().map(|value| value as u64).collect()
}

/// A world with the columns and tasks of a model.
fn world(model: &str) -> World {
    World::from_file(&fixtures().join(model).join("schema.toml")).unwrap()
}

/// An expert with the weights of its model.
fn native<E: Expert + 'static>(model: &str) -> Harness {
    world(model).native::<E>().unwrap().untrained().unwrap()
}

fn assert_near(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let off = (f64::from(*found) - expected).abs();
        assert!(off <= 1e-5, "{found}, and the model says {expected}");
    }
}

#[test]
fn a_dlrm_predicts_as_in_onnx() {
    predicts_as_the_dlrm(&native::<dlrm::Dlrm>("dlrm"));
}

#[test]
fn a_component_brings_its_weights_along() {
    let Some(component) = hostile("weights of a component", "dlrm") else { return };
    predicts_as_the_dlrm(&world("dlrm").component(&component).unwrap().untrained().unwrap());
}

fn predicts_as_the_dlrm(harness: &Harness) {
    let rows = recorded("dlrm");
    let input = |name: &str| &rows["inputs"][name];
    let request = harness.world().request(1).candidates(column(input("item"), 0).len());
    let request = request
        .feature_rows("length", &numbers(input("dense"), 0))
        .feature_rows("battery", &numbers(input("dense"), 1))
        .feature_rows("price", &numbers(input("dense"), 2))
        .id_rows("item_id", &ids(input("item"), 0))
        .id_rows("topic", &ids(input("topic"), 0))
        .id_rows("device", &ids(input("device"), 0));
    let predictions = harness.predict(&request.serving().build()).unwrap();
    assert_near(predictions.task("click").unwrap(), &column(&rows["outputs"]["click"], 0));
}

#[test]
fn a_dcn_with_a_logit_and_a_value_predicts_as_in_onnx() {
    let (harness, rows) = (native::<dcn::Dcn>("dcn"), recorded("dcn"));
    let input = |name: &str| &rows["inputs"][name];
    let request = harness.world().request(1).candidates(column(input("ids"), 0).len());
    let request = request
        .feature_rows("length", &numbers(input("dense"), 0))
        .feature_rows("battery", &numbers(input("dense"), 1))
        .id_rows("topic", &ids(input("ids"), 0))
        .id_rows("device", &ids(input("ids"), 1));
    let predictions = harness.predict(&request.serving().build()).unwrap();
    let logits = column(&rows["outputs"]["click"], 0);
    let clicks: Vec<f64> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
    assert_near(predictions.task("click").unwrap(), &clicks);
    assert_near(predictions.task("watch").unwrap(), &column(&rows["outputs"]["watch"], 0));
}

#[test]
fn other_operators_give_the_probabilities_of_onnx() {
    let (harness, rows) = (native::<mixed::Mixed>("mixed"), recorded("mixed"));
    let input = |name: &str| &rows["inputs"][name];
    let request = harness.world().request(1).candidates(column(input("item"), 0).len());
    let request = request
        .feature_rows("length", &numbers(input("x"), 0))
        .feature_rows("battery", &numbers(input("x"), 1))
        .feature_rows("price", &numbers(input("x"), 2))
        .feature_rows("age", &numbers(input("age"), 0))
        .id_rows("item_id", &ids(input("item"), 0));
    let predictions = harness.predict(&request.serving().build()).unwrap();
    let both = &rows["outputs"]["both"];
    assert_near(predictions.task("click").unwrap(), &column(both, 0));
    assert_near(predictions.task("buy").unwrap(), &column(both, 1));
}

#[test]
fn ensembles_of_trees_predict_as_in_onnx() {
    let (harness, rows) = (native::<ensembles::Ensembles>("ensembles"), recorded("ensembles"));
    let x = &rows["inputs"]["x"];
    let mut request = harness.world().request(1).candidates(column(x, 0).len());
    for (index, feature) in ["length", "battery", "price", "unread", "age"].iter().enumerate() {
        request = request.feature_rows(feature, &numbers(x, index));
    }
    let predictions = harness.predict(&request.serving().build()).unwrap();
    let said = |output: &str, index| column(&rows["outputs"][output], index);
    let sigmoid = |logits: Vec<f64>| logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    for (task, expected) in [
        ("watch", said("values", 0)),
        ("dwell", said("values", 1)),
        ("click", said("first", 1)),
        ("like", said("second", 1)),
        ("hide", sigmoid(said("both", 0))),
        ("share", sigmoid(said("both", 1))),
    ] {
        assert_near(predictions.task(task).unwrap(), &expected);
    }
}

/// The host's trainer has weight decay, and every parameter of the ensemble has a gradient or none.
#[test]
fn training_moves_the_weights_of_leaves_and_no_comparison() {
    let Some(component) = hostile("training of trees", "ensembles") else { return };
    let fresh = world("ensembles").component(&component).unwrap().untrained().unwrap();
    let trained = fresh.clone().trained(&fresh.world().log(200, &[0])).unwrap();
    let after: BTreeMap<_, _> =
        trained.parameter_values().tensors().map(|(name, _, values)| (name, values)).collect();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let (mut learned, mut kept) = (0, 0);
    for (name, _, before) in fresh.parameter_values().tensors() {
        let is_same = bits(before) == bits(after[name]);
        let is_weight = name.ends_with(".leaves") || name.ends_with(".base");
        assert_eq!(is_same, !is_weight, "{name}");
        if is_weight { learned += 1 } else { kept += 1 }
    }
    // Of four ensembles leaves and base; what they compare, and two ask for equality.
    assert_eq!((learned, kept), (8, 14));
}

/// Those of the test that comes with each crate.
#[test]
fn the_crates_pass_their_checks() {
    for harness in [
        native::<dlrm::Dlrm>("dlrm"),
        native::<dcn::Dcn>("dcn"),
        native::<mixed::Mixed>("mixed"),
        native::<ensembles::Ensembles>("ensembles"),
    ] {
        for check in [
            Harness::check_predictions,
            Harness::check_ranking,
            Harness::check_determinism,
            Harness::check_unknown_features,
            Harness::check_labels,
            Harness::check_gates,
        ] {
            check(&harness).unwrap_or_else(|failure| panic!("{failure}"));
        }
    }
}
