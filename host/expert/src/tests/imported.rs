//! What networks need that were trained elsewhere: values to begin with, features as they are, and
//! outputs to which nothing is added.

use std::sync::Arc;

use hypercast_fm::label_scale::LabelScale;

use super::build::{Net, description, example, parameters, schema, vectors};
use crate::batch::ExpertColumns;
use crate::fm_rows::Tae;
use crate::graph::ExpertGraph;
use crate::normalise::Normaliser;
use crate::runtime::fresh_scales;
use crate::wasm::contract::{Attribute, Column, Initialiser, TaskKind, Value};

/// A network of one product, with options of its parameter and its output.
fn network(parameter: &[Attribute], output: &[Attribute]) -> Result<Arc<ExpertGraph>, String> {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let tae = net.input(0);
    let weight = net.parameter("weight", &[4, 1], Initialiser::Ones);
    let product = net.op("MatMul", &[tae, weight], vec![]);
    net.output("click", product);
    net.network.parameters[0].options = parameter.to_vec();
    net.network.outputs[0].options = output.to_vec();
    net.graph(&description).map(Arc::new).map_err(|error| error.to_string())
}

fn values(values: &[f32]) -> Attribute {
    Attribute { name: "values".into(), value: Value::Numbers(values.to_vec()) }
}

fn base(text: &str) -> Attribute {
    Attribute { name: "base".into(), value: Value::Text(text.into()) }
}

#[test]
fn a_parameter_begins_with_its_values() {
    let given = [0.5, -1.0, 2.0, 0.0];
    let with_values = network(&[values(&given)], &[]).unwrap();
    for seed in [1, 2] {
        assert_eq!(parameters(&with_values, seed).by_name("weight"), Some(&given[..]));
    }
    let without = network(&[], &[]).unwrap();
    assert_eq!(with_values.hash, without.hash, "another export fits the parameters of before");
    // They stay beside those that are trained.
    let [more, less] = [&with_values, &without].map(|graph| graph.serving_memory.parameters);
    assert_eq!(more, less + 4 * given.len() as u64);
    for (option, word) in [
        (values(&given[1..]), "has 3 values, not as many as its shape"),
        (values(&[0.0, f32::NAN, 0.0, 0.0]), "value 1 of its parameter `weight` is NaN"),
        (Attribute { value: Value::Number(1.0), ..values(&[]) }, "not a list of numbers"),
    ] {
        let error = network(&[option], &[]).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn nothing_is_added_to_a_whole_output() {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let scales = |graph: &ExpertGraph| fresh_scales(&description, &schema(), graph);
    let plain = network(&[], &[]).unwrap();
    assert!(matches!(scales(&plain)["click"], LabelScale::Rate(_)));
    assert!(scales(&network(&[], &[base("none")]).unwrap()).is_empty());
    let error = network(&[], &[base("one")]).unwrap_err();
    assert!(error.contains("`base`") && error.contains("task `click`"), "{error}");
}

#[test]
fn a_raw_feature_is_read_as_it_is() {
    let schema = schema();
    let names = schema.feature_columns();
    let columns = vec![Column::RawFeature("length".into()), Column::Feature("length".into())];
    let description = description(columns, &[("click", TaskKind::Binary)]);
    let columns = ExpertColumns::new(&description, &schema, vectors()).unwrap();
    let mut normaliser = Normaliser::identity(&names);
    normaliser.mean.fill(1.0);
    normaliser.deviation.fill(2.0);
    let mut example = example(1, 0, 3);
    let at = names.iter().position(|name| name == "length").unwrap();
    for (target, value) in example.targets.iter_mut().zip([3.0, -100.0, f32::NAN]) {
        target.features[at] = value;
    }
    let batch = columns.batch(&[example], Tae::Without, &normaliser);
    assert_eq!(*batch.numbers(0), [3.0, -100.0, 0.0]);
    assert_eq!(*batch.numbers(1), [1.0, -5.0, 0.0]);
}
