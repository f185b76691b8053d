//! Models of PyTorch as crates, and models that are refused. What the crates predict is tested in
//! `tests/tests/onnx_models`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::bindings::{InputBinding, OutputBinding};
use super::mapping::SUPPORTED;
use super::model::OnnxModel;
use super::proto::{
    AttributeProto, DimensionProto, GraphProto, NodeProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use super::source::network_body;
use super::{FromOnnxArgs, ImportedModel, from_onnx, name_of};

const INT64: i32 = 7;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/onnx")
}

fn bound<T: std::str::FromStr<Err = anyhow::Error>>(texts: &[&str]) -> Vec<T> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn args(model: &str, into: &Path, inputs: &[&str], outputs: &[&str]) -> FromOnnxArgs {
    FromOnnxArgs {
        model: fixtures().join(format!("{model}.onnx")),
        name: None,
        inputs: bound(inputs),
        outputs: bound(outputs),
        expect: Some(fixtures().join(format!("{model}.json"))),
        surface: "feed".into(),
        schema: None,
        into: Some(into.to_owned()),
        sdk: None,
    }
}

/// All files of a folder, by their path in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    let mut found: Vec<_> =
        found.iter().map(|path| path.strip_prefix(folder).unwrap().to_owned()).collect();
    found.sort();
    found
}

/// Set `HYPERCAST_GOLDEN=write` to write the crates anew.
#[test]
fn models_become_the_crates_that_are_checked_in() {
    let dlrm = ["dense=feature:length,feature:battery,feature:price", "item=id:item_id"];
    let dcn = ["dense=feature:length,feature:battery", "ids=id:topic,id:device"];
    let mixed =
        ["x=feature:length,feature:battery,feature:price", "age=feature:age", "item=id:item_id"];
    let ensembles = ["x=feature:length,feature:battery,feature:price,feature:unread,feature:age"];
    let of_ensembles = [
        "values=value:watch,value:dwell",
        "first=none,probability:click",
        "second=none,probability:like",
        "both=logit:hide,logit:share",
    ];
    let models: [(&str, &[&str], &[&str]); 4] = [
        ("dlrm", &dlrm, &[]),
        ("dcn", &dcn, &["click=logit:click", "watch=value:watch"]),
        ("mixed", &mixed, &["both=probability:click,probability:buy"]),
        ("ensembles", &ensembles, &of_ensembles),
    ];
    for (model, inputs, outputs) in models {
        let dir = tempfile::tempdir().unwrap();
        let made = from_onnx(&args(model, &dir.path().join(model), inputs, outputs)).unwrap();
        let test = std::fs::read_to_string(made.join("tests/expert.rs")).unwrap();
        assert!(test.contains("fn it_predicts_what_the_model_does"), "{test}");
        let kept = fixtures().join(model);
        for file in files(&made) {
            let is_of_model = file.starts_with("src") || file.starts_with("weights");
            if !is_of_model && file != Path::new("schema.toml") {
                continue;
            }
            let content = std::fs::read(made.join(&file)).unwrap();
            if std::env::var("HYPERCAST_GOLDEN").as_deref() == Ok("write") {
                crate::workspace::write(&kept.join(&file), content).unwrap();
            } else {
                let expected = std::fs::read(kept.join(&file)).unwrap_or_default();
                assert!(content == expected, "{model}/{} differs", file.display());
            }
        }
        for file in files(&kept) {
            assert!(
                made.join(&file).is_file(),
                "{model}/{} is of an earlier crate",
                file.display()
            );
        }
    }
}

#[test]
fn every_operator_is_documented() {
    let document = include_str!("../../../wit/ops.md");
    let (_, section) = document.split_once("## From ONNX").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('|').next());
    let documented: BTreeSet<&str> =
        rows.flat_map(|row| row.split(['`', ' '])).filter(|word| is_operator(word)).collect();
    let supported: BTreeSet<&str> = SUPPORTED.split(' ').collect();
    assert_eq!(documented, supported);
}

fn is_operator(word: &str) -> bool {
    word.starts_with(|first: char| first.is_ascii_uppercase())
}

/// An input `[batch, sizes...]`.
fn input(name: &str, elem_type: i32, sizes: &[i64]) -> ValueInfoProto {
    let sizes = sizes.iter().map(|size| Some(*size));
    let dim = std::iter::once(None).chain(sizes).map(|dim_value| DimensionProto { dim_value });
    let shape = Some(TensorShapeProto { dim: dim.collect() });
    let tensor_type = Some(TensorTypeProto { elem_type, shape });
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type }) }
}

fn node(op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|name| name.to_string()).collect(),
        output: vec![output.into()],
        name: format!("node_{output}"),
        op_type: op.into(),
        attribute,
        domain: String::new(),
    }
}

fn integer(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i, ..Default::default() }
}

fn weights(name: &str, dims: &[i64]) -> TensorProto {
    let count = dims.iter().product::<i64>();
    let float_data = (0..count).map(|value| value as f32).collect();
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 1,
        float_data,
        ..Default::default()
    }
}

fn integers(name: &str, values: &[i64]) -> TensorProto {
    let dims = vec![values.len() as i64];
    let int64_data = values.to_vec();
    TensorProto { name: name.into(), dims, data_type: INT64, int64_data, ..Default::default() }
}

/// A model of `x` `[batch, 4, 3]` and ids `i` `[batch]` whose output is `y`, in the expert's code.
fn body(nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> Result<String, String> {
    bound_body(&["x=vector:content"], nodes, initializer)
}

/// The same with other columns.
fn bound_body(
    columns: &[&str],
    nodes: Vec<NodeProto>,
    initializer: Vec<TensorProto>,
) -> Result<String, String> {
    let output = ValueInfoProto { name: "y".into(), r#type: None };
    let input = vec![input("x", 1, &[4, 3]), input("i", INT64, &[])];
    let graph = GraphProto { node: nodes, initializer, input, output: vec![output] };
    let whole = |error: anyhow::Error| format!("{error:#}");
    let model = OnnxModel::new(graph, 18, Path::new("")).map_err(whole)?;
    let inputs: Vec<InputBinding> = bound(columns);
    let outputs: Vec<OutputBinding> = bound(&["y=logit:click"]);
    let imported = ImportedModel::new(&model, &inputs, &outputs).map_err(whole)?;
    Ok(network_body(&imported.network, &imported.tasks))
}

/// The sum of all values of `x` or of another value of each row.
fn sum(of: &str) -> Vec<NodeProto> {
    vec![
        node("Flatten", &[of], "flat", vec![integer("axis", 1)]),
        node("ReduceSum", &["flat", "end"], "y", vec![]),
    ]
}

fn summed(mut nodes: Vec<NodeProto>, mut constants: Vec<TensorProto>) -> Result<String, String> {
    nodes.extend(sum("z"));
    constants.push(integers("end", &[-1]));
    body(nodes, constants)
}

#[test]
fn dimensions_behind_the_batch_move_and_are_reduced() {
    let one = |op: &str, inputs: &[&str], attribute, constants| {
        summed(vec![node(op, inputs, "z", attribute)], constants).unwrap()
    };
    let perm = |axes: &[i64]| {
        vec![AttributeProto { name: "perm".into(), ints: axes.to_vec(), ..Default::default() }]
    };
    // The batch is last for a while; the rows of a tensor of the contract stay first.
    let there = node("Transpose", &["x"], "last", perm(&[1, 2, 0]));
    let back = node("Transpose", &["last"], "z", perm(&[2, 1, 0]));
    let text = summed(vec![there, back], vec![]).unwrap();
    assert!(text.contains("x.transpose(&[0, 2, 1])"), "{text}");
    assert_eq!(text.matches("transpose").count(), 1, "{text}");
    let text = one("ReduceMax", &["x", "axes"], vec![], vec![integers("axes", &[1])]);
    assert!(text.contains("x.transpose(&[0, 2, 1]).largest()"), "{text}");
    let text = one("Gather", &["x", "at"], vec![integer("axis", 1)], vec![integers("at", &[3, 0])]);
    assert!(text.contains(".slice(9, 12)") && text.contains(".slice(0, 3)"), "{text}");
    let text = one("Softmax", &["x"], vec![integer("axis", 1)], vec![]);
    assert!(text.contains(".transpose(&[0, 2, 1]).softmax()"), "{text}");
    let text = one("MatMul", &["x", "w"], vec![], vec![weights("w", &[3, 2])]);
    assert!(text.contains(".matmul(parameter!(g, \"w\", [3, 2]))"), "{text}");
}

#[test]
fn shapes_and_indices_are_computed_when_the_model_is_read() {
    // Each is the size of the last dimension, which is an index of the one before.
    for (start, end, by) in [(-1, 9, 0), (1, -1, 1)] {
        let nodes = vec![
            node("Shape", &["x"], "shape", vec![integer("start", start), integer("end", end)]),
            node("Sub", &["shape", "by"], "at", vec![]),
            node("Gather", &["x", "at"], "z", vec![integer("axis", 1)]),
        ];
        let text = summed(nodes, vec![integers("by", &[by])]).unwrap();
        assert!(text.contains(".slice(9, 12)") && !text.contains(".slice(0, 3)"), "{text}");
    }
    let chosen = vec![
        node("Where", &["is", "three", "zero"], "at", vec![]),
        node("Gather", &["x", "at"], "z", vec![integer("axis", 1)]),
    ];
    let constants = vec![integers("is", &[1, 0]), integers("three", &[3]), integers("zero", &[0])];
    let text = summed(chosen, constants).unwrap();
    assert!(text.contains(".slice(9, 12)") && text.contains(".slice(0, 3)"), "{text}");
    // The batch has no size that the network could compute with.
    let nodes = vec![
        node("Shape", &["x"], "shape", vec![integer("end", 1)]),
        node("Cast", &["shape"], "size", vec![integer("to", 1)]),
        node("Div", &["x", "size"], "z", vec![]),
    ];
    let error = summed(nodes, vec![]).unwrap_err();
    assert!(error.contains("`Cast`") && error.contains("the size of the batch"), "{error}");
}

#[test]
fn integers_that_are_read_as_numbers_are_not_divided() {
    let columns = ["x=vector:content", "i=feature:age"];
    let halved = |of: &str| {
        let cast = node("Cast", &["i"], "number", vec![integer("to", 1)]);
        let nodes = vec![cast, node("Div", &[of, "two"], "y", vec![])];
        bound_body(&columns, nodes, vec![integers("two", &[2])])
    };
    let error = halved("i").unwrap_err();
    assert!(error.contains("`Div`") && error.contains("cast them to float"), "{error}");
    let text = halved("number").unwrap();
    assert!(text.contains("let y = i / 2.0;"), "{text}");
}

#[test]
fn ids_are_rows_of_tables() {
    let nodes = vec![
        node("Gather", &["table", "i"], "row", vec![]),
        node("Gather", &["table", "i"], "again", vec![]),
        node("Mul", &["row", "again"], "z", vec![]),
    ];
    let text = summed(nodes, vec![weights("table", &[9, 2])]).unwrap();
    // One table, and one column, however often they are read.
    assert_eq!(text.matches("parameter!(g, \"table\", [9, 2])").count(), 1, "{text}");
    assert_eq!(text.matches("g.id(\"i\")").count(), 1, "{text}");
    // Offsets cut a table into one for each column, unless one had a single row.
    for (offset, tables) in [(4, ["[4, 2]", "[5, 2]"]), (1, ["[9, 2]", "[8, 2]"])] {
        let nodes = vec![
            node("Unsqueeze", &["i", "one"], "column", vec![]),
            node("Concat", &["column", "column"], "two", vec![integer("axis", 1)]),
            node("Add", &["two", "offsets"], "ids", vec![]),
            node("Gather", &["table", "ids"], "z", vec![]),
        ];
        let constants = vec![
            weights("table", &[9, 2]),
            integers("one", &[1]),
            integers("offsets", &[0, offset]),
        ];
        let text = summed(nodes, constants).unwrap();
        assert!(tables.iter().all(|sizes| text.contains(sizes)), "{text}");
    }
}

#[test]
fn what_no_expert_has_is_refused_by_name() {
    let one = |op: &str, inputs: &[&str], attribute, constants| {
        summed(vec![node(op, inputs, "z", attribute)], constants).unwrap_err()
    };
    let shape = |values: &[i64]| vec![integers("shape", values)];
    for (error, words) in [
        (
            one("Conv", &["x"], vec![], vec![]),
            ["operator `Conv` of node `node_z`", "Supported are"],
        ),
        (one("Erf", &["x"], vec![], vec![]), ["`Erf`", "opset 20"]),
        (one("Loop", &["x"], vec![], vec![]), ["`Loop`", "nn.EmbeddingBag"]),
        (one("Mul", &["i", "i"], vec![], vec![]), ["`Mul`", "computes with ids"]),
        (one("ReduceSum", &["x", "shape"], vec![], shape(&[0])), ["along the batch", "axis 0"]),
        (one("Reshape", &["x", "shape"], vec![], shape(&[-1, 3])), ["[-1, 3]", "does not fit"]),
        (one("Add", &["x", "w"], vec![], vec![weights("w", &[5])]), ["[1, 4, 3]", "broadcast"]),
        (one("Add", &["x", "gone"], vec![], vec![]), ["its input `gone`", "is not known"]),
        (one("ReduceSum", &["x", "shape"], vec![], shape(&[])), ["along the batch", "axis 0"]),
        (one("Pow", &["x", "w"], vec![], vec![weights("w", &[3])]), ["`exponent`", "3 values"]),
    ] {
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn inputs_and_outputs_are_bound_by_name() {
    let refused = |text: &str| text.parse::<InputBinding>().unwrap_err().to_string();
    assert!(refused("dense").contains("INPUT=KIND:NAME"));
    assert!(refused("dense=price").contains("\"price\" is no column"));
    let refused = |text: &str| text.parse::<OutputBinding>().unwrap_err().to_string();
    assert!(refused("y=click").contains("KIND:TASK") && refused("y=odds:click").contains("odds"));
    let said = |inputs: &[&str], outputs: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        format!("{:#}", from_onnx(&args("dcn", dir.path(), inputs, outputs)).unwrap_err())
    };
    let ids = "ids=id:topic,id:device";
    let error = said(&["dense=feature:length", ids], &[]);
    assert!(error.contains("input `dense`") && error.contains("2 values a row"), "{error}");
    let error = said(&["price=feature:price"], &[]);
    assert!(error.contains("no input `price`; it has `dense`, `ids`"), "{error}");
    let dense = "dense=feature:length,feature:battery";
    let error = said(&[dense, ids], &[]);
    assert!(error.contains("`click` does not end in a sigmoid"), "{error}");
    let error = said(&[dense, ids], &["click=logit:click,logit:like"]);
    assert!(error.contains("1 values a row, and 2 tasks"), "{error}");
    assert_eq!(name_of(Path::new("models/Home_Feed.v2.onnx")), "home-feed-v2");
}

#[test]
fn a_probability_without_a_sigmoid_becomes_a_logit() {
    let nodes = vec![
        node("Sigmoid", &["x"], "p", vec![]),
        node("Mul", &["p", "p"], "both", vec![]),
        node("Flatten", &["both"], "flat", vec![]),
        node("ReduceMax", &["flat", "last"], "y", vec![]),
    ];
    let output = ValueInfoProto { name: "y".into(), r#type: None };
    let (input, output) = (vec![input("x", 1, &[4, 3])], vec![output]);
    let initializer = vec![integers("last", &[1])];
    let graph = GraphProto { node: nodes, initializer, input, output };
    let model = OnnxModel::new(graph, 18, Path::new("")).unwrap();
    let (inputs, outputs) = (bound(&["x=vector:content"]), bound(&["y=probability:click"]));
    let imported = ImportedModel::new(&model, &inputs, &outputs).unwrap();
    let text = network_body(&imported.network, &imported.tasks);
    assert!(text.contains("let click_logit = y.log() - (1.0 - y).log();"), "{text}");
    assert!(text.contains("g.whole_output(\"click\", click_logit);"), "{text}");
}

#[test]
fn files_are_read_whole_or_refused() {
    let error = |graph: GraphProto, folder: &Path| {
        format!("{:#}", OnnxModel::new(graph, 18, folder).err().expect("it is refused"))
    };
    let mut fixed = input("x", 1, &[3]);
    let shape = fixed.r#type.as_mut().and_then(|of| of.tensor_type.as_mut()).unwrap();
    shape.shape.as_mut().unwrap().dim[0].dim_value = Some(1);
    let graph = GraphProto { input: vec![fixed], ..Default::default() };
    assert!(error(graph, Path::new("")).contains("batch of any size"));
    let dir = tempfile::tempdir().unwrap();
    let values = [0.0f32, 1.0, 2.0, 3.0].map(f32::to_le_bytes).concat();
    std::fs::write(dir.path().join("weights.data"), values).unwrap();
    let entry =
        |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
    let external = |location: &str, offset: &str| {
        let external_data =
            vec![entry("location", location), entry("offset", offset), entry("length", "8")];
        let own = weights("w", &[2]);
        TensorProto { float_data: vec![], data_location: 1, external_data, ..own }
    };
    let graph = |tensor| GraphProto { initializer: vec![tensor], ..Default::default() };
    let model = OnnxModel::new(graph(external("weights.data", "4")), 18, dir.path()).unwrap();
    assert!(format!("{:?}", model.constants["w"]).contains("[1.0, 2.0]"));
    let outside = error(graph(external("../weights.data", "0")), dir.path());
    assert!(outside.contains("outside the model's folder"), "{outside}");
    assert!(error(graph(external("weights.data", "12")), dir.path()).contains("1 values"));
    assert!(error(graph(external("gone.data", "0")), dir.path()).contains("gone.data"));
    let file = dir.path().join("text.onnx");
    std::fs::write(&file, "a text").unwrap();
    let refused = format!("{:#}", OnnxModel::read(&file).err().expect("it is refused"));
    assert!(refused.contains("text.onnx") && refused.contains("no ONNX"), "{refused}");
}
