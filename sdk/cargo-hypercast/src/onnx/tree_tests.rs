//! How trees are cut into parts, and ensembles that are refused. What ensembles predict is tested
//! in `tests/tests/onnx_models`.

use std::path::Path;

use super::ImportedModel;
use super::ensemble::{Ensemble, SplitMode, TreeNode, TreeParts};
use super::model::OnnxModel;
use super::network::{SdkCall, SdkNetwork};
use super::proto::{
    AttributeProto, DimensionProto, GraphProto, NodeProto, TensorShapeProto, TensorTypeProto,
    TypeProto, ValueInfoProto,
};
use super::source::network_body;

/// Adds a tree in which each node of `depth` levels is a split, below each of which is its `below`.
fn grow(ensemble: &mut Ensemble, depth: usize, below: &dyn Fn(usize) -> [usize; 2]) -> usize {
    let at = ensemble.nodes.len();
    ensemble.nodes.push(TreeNode::Leaf(vec![at as f32]));
    if depth > 0 {
        let children = below(depth).map(|depth| grow(ensemble, depth, below));
        let (mode, feature, threshold) = (SplitMode::LessOrEqual, at % 3, 0.0);
        ensemble.nodes[at] = TreeNode::Split { mode, feature, threshold, children };
    }
    at
}

fn ensemble(trees: usize, depth: usize, below: &dyn Fn(usize) -> [usize; 2]) -> Ensemble {
    let mut ensemble = Ensemble { nodes: Vec::new(), roots: Vec::new(), targets: 1 };
    for _ in 0..trees {
        let root = grow(&mut ensemble, depth, below);
        ensemble.roots.push(root);
    }
    ensemble
}

fn complete(depth: usize) -> [usize; 2] {
    [depth - 1; 2]
}

/// Each split has a leaf and a split.
fn chain(depth: usize) -> [usize; 2] {
    [0, depth - 1]
}

#[test]
fn complete_trees_are_one_part_and_others_are_cut() {
    let layout = ensemble(300, 6, &complete).layout().unwrap();
    assert_eq!(layout.parts, [TreeParts { count: 300, path: 0, depth: 6 }]);
    assert_eq!(
        (layout.comparisons.len(), &layout.weights.sizes[..]),
        (300 * 63, &[300 * 64, 1][..])
    );
    // Every leaf has one place, and every weight is there.
    let mut weights = layout.weights.values;
    weights.sort_by(f32::total_cmp);
    weights.dedup();
    assert_eq!(weights.len(), 300 * 64);
    // A complete tree of this depth has a million nodes.
    let layout = ensemble(1, 20, &chain).layout().unwrap();
    assert!(layout.comparisons.len() < 150, "{:?}", layout.parts);
    assert!(layout.parts.iter().all(|part| part.count == 1), "{:?}", layout.parts);
    let weights = layout.weights.values.iter().filter(|weight| **weight != 0.0).count();
    assert_eq!(weights, 21);
    // A tree of one leaf is a constant.
    let mut constant = ensemble(2, 1, &complete);
    let root = grow(&mut constant, 0, &complete);
    constant.roots.push(root);
    let layout = constant.layout().unwrap();
    assert_eq!(layout.constant, [root as f32]);
    assert_eq!(layout.parts, [TreeParts { count: 2, path: 0, depth: 1 }]);
}

#[test]
fn ensembles_that_are_too_large_are_refused_with_what_to_do() {
    for (trees, depth, of) in
        [(500, 6, "500 trees"), (1, 15, "15 splits deep"), (1, 16, "max_depth")]
    {
        let error = ensemble(trees, depth, &complete).layout().unwrap_err().to_string();
        assert!(error.contains(of) && error.contains("max_depth"), "{error}");
    }
    assert!(ensemble(490, 6, &complete).layout().is_ok());
    // Of two that an expert has room for, it may not have room for both.
    let layout = ensemble(300, 6, &complete).layout().unwrap();
    let mut network = SdkNetwork::default();
    let x = network.input(SdkCall::Tae, 3).unwrap();
    network.trees(x, "first", &layout).unwrap();
    let error = network.trees(x, "second", &layout).unwrap_err().to_string();
    assert!(error.contains("302400 values") && error.contains("max_depth"), "{error}");
}

fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { name: name.into(), ints: ints.to_vec(), ..Default::default() }
}

fn floats(name: &str, floats: &[f32]) -> AttributeProto {
    AttributeProto { name: name.into(), floats: floats.to_vec(), ..Default::default() }
}

fn text(name: &str, text: &str) -> AttributeProto {
    AttributeProto { name: name.into(), s: text.into(), ..Default::default() }
}

/// A regressor that splits feature 1 of `x` at 0.5.
fn stump() -> NodeProto {
    let modes = ["BRANCH_LEQ", "LEAF", "LEAF"].map(|mode| mode.as_bytes().to_vec());
    let attribute = vec![
        ints("nodes_treeids", &[0, 0, 0]),
        ints("nodes_nodeids", &[0, 1, 2]),
        ints("nodes_featureids", &[1, 0, 0]),
        floats("nodes_values", &[0.5, 0.0, 0.0]),
        AttributeProto {
            name: "nodes_modes".into(),
            strings: modes.to_vec(),
            ..Default::default()
        },
        ints("nodes_truenodeids", &[1, 0, 0]),
        ints("nodes_falsenodeids", &[2, 0, 0]),
        ints("target_treeids", &[0, 0]),
        ints("target_nodeids", &[1, 2]),
        ints("target_ids", &[0, 0]),
        floats("target_weights", &[-1.0, 1.0]),
    ];
    NodeProto {
        input: vec!["x".into()],
        output: vec!["y".into()],
        name: "trees".into(),
        op_type: "TreeEnsembleRegressor".into(),
        attribute,
        domain: "ai.onnx.ml".into(),
    }
}

/// The stump with other attributes.
fn changed(attributes: Vec<AttributeProto>) -> NodeProto {
    let mut node = stump();
    for own in attributes {
        node.attribute.retain(|known| known.name != own.name);
        node.attribute.push(own);
    }
    node
}

/// The stump with a split as its second child, whose children are `child` and a leaf.
fn second_split(child: i64) -> NodeProto {
    let modes = ["BRANCH_LEQ", "LEAF", "BRANCH_EQ", "LEAF"].map(|mode| mode.as_bytes().to_vec());
    changed(vec![
        ints("nodes_treeids", &[0; 4]),
        ints("nodes_nodeids", &[0, 1, 2, 3]),
        ints("nodes_featureids", &[1, 0, 0, 0]),
        floats("nodes_values", &[0.5, 0.0, 2.0, 0.0]),
        AttributeProto {
            name: "nodes_modes".into(),
            strings: modes.to_vec(),
            ..Default::default()
        },
        ints("nodes_truenodeids", &[1, 0, child, 0]),
        ints("nodes_falsenodeids", &[2, 0, 3, 0]),
        ints("target_nodeids", &[1, 3]),
    ])
}

/// The stump as a classifier of two classes.
fn classifier(class: i64, attributes: Vec<AttributeProto>) -> NodeProto {
    let mut node = changed(attributes);
    node.op_type = "TreeEnsembleClassifier".into();
    node.output = vec!["label".into(), "y".into()];
    for own in &mut node.attribute {
        own.name = own.name.replace("target_", "class_");
    }
    node.attribute.retain(|own| own.name != "class_ids");
    node.attribute.extend([ints("class_ids", &[class; 2]), ints("classlabels_int64s", &[0, 1])]);
    node
}

/// A node of the same inputs and outputs.
fn other_op(op: &str) -> NodeProto {
    NodeProto { op_type: op.into(), ..stump() }
}

/// The code of a model of three features with one output bound.
fn bound_body(nodes: Vec<NodeProto>, outputs: [&str; 2], opset: i64) -> Result<String, String> {
    let dim = [None, Some(3)].map(|dim_value| DimensionProto { dim_value }).to_vec();
    let tensor_type = Some(TensorTypeProto { elem_type: 1, shape: Some(TensorShapeProto { dim }) });
    let x = ValueInfoProto { name: "x".into(), r#type: Some(TypeProto { tensor_type }) };
    let names = nodes.iter().flat_map(|node| node.output.clone());
    let output = names.map(|name| ValueInfoProto { name, r#type: None }).collect();
    let graph = GraphProto { node: nodes, initializer: vec![], input: vec![x], output };
    let whole = |error: anyhow::Error| format!("{error:#}");
    let model = OnnxModel::new(graph, opset, Path::new("")).map_err(whole)?;
    let inputs = ["x=feature:age,feature:price,feature:length".parse().unwrap()];
    let outputs = [format!("{}={}", outputs[0], outputs[1]).parse().unwrap()];
    let imported = ImportedModel::new(&model, &inputs, &outputs).map_err(whole)?;
    Ok(network_body(&imported.network, &imported.tasks))
}

fn body(node: NodeProto) -> Result<String, String> {
    bound_body(vec![node], ["y", "value:watch"], 0)
}

#[test]
fn an_ensemble_is_its_leaves_and_their_weights() {
    let text = body(stump()).unwrap();
    let expected = "let x = g.raw_features(&[\"price\"]);\n        \
         let y_leaves = hypercast_sdk::Trees::new(\"trees\", \
         include_bytes!(\"../weights/trees.f32\")).apply(x);\n        \
         let y = y_leaves.matmul(parameter!(g, \"trees.leaves\", [2, 1])) + \
         parameter!(g, \"trees.base\", [1]);\n        \
         g.whole_output(\"watch\", y);";
    assert_eq!(text, expected);
}

/// Weights of one name and equal values are one parameter, but not those of two ensembles.
#[test]
fn ensembles_of_one_name_learn_each_for_itself() {
    let other = NodeProto { output: vec!["z".into()], ..stump() };
    let sum = NodeProto {
        input: vec!["y".into(), "z".into()],
        output: vec!["sum".into()],
        domain: String::new(),
        ..other_op("Add")
    };
    let nodes = vec![stump(), other, sum];
    let of = |opset| bound_body(nodes.clone(), ["sum", "value:watch"], opset);
    let error = of(6).unwrap_err();
    assert!(error.contains("`Add`") && error.contains("opset 6"), "{error}");
    let text = of(7).unwrap();
    for name in ["trees.leaves", "trees.base", "trees.2.leaves", "trees.2.base"] {
        assert_eq!(text.matches(&format!("(g, {name:?}")).count(), 1, "{text}");
    }
}

/// LightGBM's splits by categories are converted to nodes that lead to one and the same.
#[test]
fn a_node_that_several_lead_to_is_copied() {
    let text = body(second_split(1)).unwrap();
    assert!(text.contains("(g, \"trees.leaves\", [4, 1])"), "{text}");
}

#[test]
fn only_what_a_bound_output_depends_on_is_read() {
    let node = classifier(0, vec![text("post_transform", "LOGISTIC")]);
    let mut dictionary = NodeProto { input: vec!["y".into()], ..other_op("ZipMap") };
    dictionary.output = vec!["z".into()];
    let label = NodeProto {
        input: vec!["label".into()],
        output: vec!["chosen".into()],
        domain: String::new(),
        ..other_op("ArgMax")
    };
    let nodes = vec![node, dictionary, label];
    let of = |output, task| bound_body(nodes.clone(), [output, task], 9);
    let text = of("y", "none,probability:click").unwrap();
    assert!(text.contains("g.whole_output(\"click\", y);") && !text.contains("sigmoid"), "{text}");
    for (output, words) in [
        ("z", ["`ZipMap`", "zipmap=False"]),
        ("label", ["it gives a class", "none,probability:TASK"]),
        ("chosen", ["it gives a class", "none,probability:TASK"]),
    ] {
        let error = of(output, "value:click").unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let error = of("y", "none,none").unwrap_err();
    assert!(error.contains("no output is a task"), "{error}");
    let error = of("y", "probability:click").unwrap_err();
    assert!(error.contains("`none`"), "{error}");
}

#[test]
fn ensembles_that_no_expert_has_are_refused_by_name() {
    let modes = |mode: &str| {
        let strings = [mode, "LEAF", "LEAF"].map(|mode| mode.as_bytes().to_vec()).to_vec();
        AttributeProto { name: "nodes_modes".into(), strings, ..Default::default() }
    };
    for (node, words) in [
        (changed(vec![text("post_transform", "SOFTMAX")]), "SOFTMAX is none of NONE and LOGISTIC"),
        (changed(vec![text("aggregate_function", "MAX")]), "MAX is none of SUM and AVERAGE"),
        (changed(vec![modes("BRANCH_MEMBER")]), "BRANCH_MEMBER is not known"),
        (changed(vec![ints("nodes_featureids", &[3, 0, 0])]), "feature 3 of an input of 3"),
        (changed(vec![ints("nodes_truenodeids", &[7, 0, 0])]), "tree 0 has no node 7"),
        (changed(vec![ints("nodes_truenodeids", &[2, 0, 0])]), "its 1 trees have 2 roots"),
        (second_split(2), "below itself"),
        (changed(vec![ints("nodes_treeids", &[0, 0])]), "not as many"),
        (changed(vec![ints("nodes_nodeids", &[0, 1, 1])]), "one id"),
        (changed(vec![floats("nodes_values", &[f32::NAN, 0.0, 0.0])]), "no number"),
        (changed(vec![ints("target_nodeids", &[0, 2])]), "is no leaf"),
        (changed(vec![ints("target_ids", &[0, 1])]), "no class or target 1"),
        (changed(vec![floats("base_values", &[0.1, 0.2])]), "2 base_values"),
        (changed(vec![floats("nodes_values_as_tensor", &[])]), "double precision"),
        (classifier(1, vec![floats("base_values", &[0.1])]), "not of the class of its weights"),
        (classifier(2, vec![]), "no class or target 2"),
        (other_op("TreeEnsemble"), "ai.onnx.ml 5"),
        (other_op("Scaler"), "domain `ai.onnx.ml`"),
        (NodeProto { domain: String::new(), ..other_op("Softmax") }, "opset 13"),
    ] {
        let error = body(node).unwrap_err();
        assert!(error.contains(words) && error.contains("node `trees`"), "{error}");
    }
}
