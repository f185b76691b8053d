//! An ONNX file as the mapping reads it: nodes, constants, and the shapes of inputs and outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Component, Path};

use anyhow::{Context, Result, anyhow, bail, ensure};
use prost::Message as _;

use super::grid::Grid;
use super::proto::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use crate::workspace::read;

/// A tensor whose values the file has.
#[derive(Debug, Clone, PartialEq)]
pub enum Constant {
    /// f32, or f64 as f32.
    Numbers(Grid<f32>),
    /// Integers, and booleans as 0 and 1.
    Integers(Grid<i64>),
}

/// An input of the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    pub name: String,
    /// Whether it is a tensor of integers.
    pub is_integer: bool,
    /// The sizes behind the first dimension, the batch; none where it is not known.
    pub sizes: Vec<Option<usize>>,
}

/// A network in ONNX.
pub struct OnnxModel {
    /// The version of the standard operators; 0 if the file does not say it.
    pub opset: i64,
    pub nodes: Vec<NodeProto>,
    pub constants: BTreeMap<String, Constant>,
    pub inputs: Vec<ModelInput>,
    pub outputs: Vec<String>,
}

/// Values of `TensorProto.DataType` in the format's definition.
mod data_type {
    pub const FLOAT: i32 = 1;
    pub const UINT8: i32 = 2;
    pub const INT8: i32 = 3;
    pub const INT32: i32 = 6;
    pub const INT64: i32 = 7;
    pub const BOOL: i32 = 9;
    pub const DOUBLE: i32 = 11;
}

impl OnnxModel {
    /// Reads a file, and the files of weights beside it that it names.
    ///
    /// # Errors
    /// It is no ONNX file, or it has what no expert can have.
    pub fn read(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        Self::parse(&read(path)?, folder).with_context(|| path.display().to_string())
    }

    fn parse(bytes: &[u8], folder: &Path) -> Result<Self> {
        let model = ModelProto::decode(bytes)
            .map_err(|error| anyhow!("it is no ONNX file, or a damaged one: {error}"))?;
        let is_standard = |set: &&OperatorSetIdProto| ["", "ai.onnx"].contains(&&*set.domain);
        let opset = model.opset_import.iter().find(is_standard).map_or(0, |set| set.version);
        let graph = model.graph.context("the file has no graph: it is no ONNX model")?;
        Self::new(graph, opset, folder)
    }

    /// The model of a graph whose files of weights are in `folder`.
    ///
    /// # Errors
    /// As [`OnnxModel::read`].
    pub fn new(graph: GraphProto, opset: i64, folder: &Path) -> Result<Self> {
        let mut constants = BTreeMap::new();
        for tensor in &graph.initializer {
            let constant = constant(tensor, folder);
            let constant = constant.with_context(|| format!("initializer `{}`", tensor.name))?;
            constants.insert(tensor.name.clone(), constant);
        }
        // Older exporters list the weights among the inputs.
        let inputs = graph.input.iter().filter(|input| !constants.contains_key(&input.name));
        let inputs = inputs.map(model_input).collect::<Result<_>>()?;
        let outputs = graph.output.into_iter().map(|output| output.name).collect();
        Ok(Self { opset, nodes: graph.node, constants, inputs, outputs })
    }

    /// The names that the outputs `wanted` depend on, themselves included.
    pub fn needed<'a>(&'a self, wanted: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let mut needed: BTreeSet<&str> = wanted.collect();
        for node in self.nodes.iter().rev() {
            if node.output.iter().any(|name| needed.contains(name.as_str())) {
                needed.extend(node.input.iter().map(String::as_str));
            }
        }
        needed
    }
}

fn model_input(input: &ValueInfoProto) -> Result<ModelInput> {
    let name = &input.name;
    let tensor = input.r#type.as_ref().and_then(|of| of.tensor_type.as_ref());
    let tensor = tensor.with_context(|| format!("input `{name}` is no tensor"))?;
    let is_integer = match tensor.elem_type {
        data_type::FLOAT | data_type::DOUBLE => false,
        data_type::INT32 | data_type::INT64 => true,
        other => bail!("input `{name}` has data type {other}: export it as float32 or int64"),
    };
    let dims = tensor.shape.as_ref().map(|shape| shape.dim.as_slice()).unwrap_or_default();
    let Some((batch, others)) = dims.split_first() else {
        bail!("input `{name}` has no batch dimension: export it with one that is first")
    };
    ensure!(
        batch.dim_value.is_none(),
        "the first dimension of input `{name}` is fixed to {}: export the model with a batch of \
         any size (`dynamic_shapes` or `dynamic_axes` of torch.onnx.export)",
        batch.dim_value.unwrap_or_default()
    );
    let size = |value: i64| usize::try_from(value).ok().filter(|size| *size > 0);
    let sizes = others.iter().map(|dim| dim.dim_value.and_then(size)).collect();
    Ok(ModelInput { name: name.clone(), is_integer, sizes })
}

/// A tensor's values.
///
/// # Errors
/// They are of a type that no expert computes with, or are not as many as the shape says.
pub fn constant(tensor: &TensorProto, folder: &Path) -> Result<Constant> {
    let size = |dim: &i64| usize::try_from(*dim).context("a negative size");
    let sizes = tensor.dims.iter().map(size).collect::<Result<Vec<usize>>>()?;
    let outside = if tensor.data_location == 1 { external(tensor, folder)? } else { Vec::new() };
    let raw = if outside.is_empty() { &tensor.raw_data } else { &outside };
    let int32s = || tensor.int32_data.iter().map(|value| i64::from(*value)).collect::<Vec<_>>();
    let numbers = |values| Grid::new(sizes.clone(), values).map(Constant::Numbers);
    let integers = |values| Grid::new(sizes.clone(), values).map(Constant::Integers);
    match tensor.data_type {
        data_type::FLOAT if raw.is_empty() => numbers(tensor.float_data.clone()),
        data_type::FLOAT => numbers(values(raw, f32::from_le_bytes)),
        data_type::DOUBLE if raw.is_empty() => {
            numbers(tensor.double_data.iter().map(|value| *value as f32).collect())
        }
        data_type::DOUBLE => numbers(values(raw, |bytes| f64::from_le_bytes(bytes) as f32)),
        data_type::INT64 if raw.is_empty() => integers(tensor.int64_data.clone()),
        data_type::INT64 => integers(values(raw, i64::from_le_bytes)),
        data_type::INT32 | data_type::INT8 | data_type::UINT8 | data_type::BOOL
            if raw.is_empty() =>
        {
            integers(int32s())
        }
        data_type::INT32 => integers(values(raw, |bytes| i32::from_le_bytes(bytes).into())),
        data_type::INT8 => integers(values(raw, |bytes| i8::from_le_bytes(bytes).into())),
        data_type::UINT8 | data_type::BOOL => {
            integers(values(raw, |bytes| u8::from_le_bytes(bytes).into()))
        }
        other => bail!("its data type {other} is not supported: export the model in float32"),
    }
}

fn values<const N: usize, T>(raw: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
}

/// The values of a tensor that are in another file, beside the model's.
fn external(tensor: &TensorProto, folder: &Path) -> Result<Vec<u8>> {
    let entry = |key: &str| {
        let found = tensor.external_data.iter().find(|entry| entry.key == key);
        found.map(|entry| entry.value.as_str())
    };
    let number = |key: &str| -> std::io::Result<Option<u64>> {
        entry(key).map(|text| text.parse().map_err(std::io::Error::other)).transpose()
    };
    let location = Path::new(entry("location").context("its values are nowhere")?);
    let is_beside = location.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(is_beside, "its values are in {}, outside the model's folder", location.display());
    let mut values = Vec::new();
    let file = folder.join(location);
    let mut read = || -> std::io::Result<()> {
        let mut file = std::fs::File::open(&file)?;
        file.seek(SeekFrom::Start(number("offset")?.unwrap_or(0)))?;
        file.take(number("length")?.unwrap_or(u64::MAX)).read_to_end(&mut values)?;
        Ok(())
    };
    read().with_context(|| format!("cannot read its values in {}", file.display()))?;
    Ok(values)
}
