//! From the operators of ONNX to calls of the SDK.
//!
//! Values keep the model's shapes, with the batch in any place; steps of the network have the rows
//! first. What depends on no input is computed here. An operator that no expert can have is refused
//! with its name and that of its node.

mod arithmetic;
mod layers;
mod shapes;
mod trees;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::grid::Grid;
use super::model::{Constant, OnnxModel, constant};
use super::network::SdkNetwork;
use super::proto::{AttributeProto, NodeProto};
use super::value::{BATCH, BatchedShape, ComputedTensor, MappedValue, Weights};

/// The operators that are mapped. `sdk/wit/ops.md` says how.
pub const SUPPORTED: &str = "Abs Add And BatchNormalization Cast Clip Concat Constant \
    ConstantOfShape Div Dropout Elu Equal Exp Expand Flatten Gather GatherND Gelu Gemm Greater \
    GreaterOrEqual HardSigmoid HardSwish Identity LayerNormalization LeakyRelu Less LessOrEqual \
    Log MatMul Max Mean Min Mul Neg Not Or PRelu Pow Reciprocal ReduceMax ReduceMean ReduceSum \
    Relu Reshape Shape Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh \
    Transpose TreeEnsembleClassifier TreeEnsembleRegressor Unsqueeze Where";

/// Earlier `Softmax` and `Unsqueeze` mean something else.
const OLDEST_OPSET: i64 = 13;

/// Operators that mean the same since an earlier opset: a converter of trees declares the oldest
/// one that has those around them.
const UNCHANGED_SINCE: i64 = 7;
const UNCHANGED: [&str; 8] = ["Add", "Cast", "Concat", "Div", "Identity", "Mul", "Sigmoid", "Sub"];

/// The domain of the operators of trees.
const TREES_DOMAIN: &str = "ai.onnx.ml";

/// Maps the nodes of a model.
pub struct Mapper {
    pub network: SdkNetwork,
    values: BTreeMap<String, MappedValue>,
    /// The names of integers that the network has as numbers.
    integers: BTreeSet<String>,
}

impl Mapper {
    /// A mapping of a model whose inputs are these values.
    pub fn new(network: SdkNetwork, inputs: BTreeMap<String, MappedValue>) -> Self {
        Self { network, values: inputs, integers: BTreeSet::new() }
    }

    /// Maps the nodes of `model` that give what is `needed`.
    ///
    /// # Errors
    /// A node that no expert can have: its operator and name, and what to do.
    pub fn map(&mut self, model: &OnnxModel, needed: &BTreeSet<&str>) -> Result<()> {
        for (name, constant) in &model.constants {
            let value = match constant {
                Constant::Numbers(values) => MappedValue::Weights(Weights {
                    values: values.clone(),
                    name: Some(name.clone()),
                }),
                Constant::Integers(values) => MappedValue::Integers(values.clone()),
            };
            self.values.insert(name.clone(), value);
        }
        let integers = model.inputs.iter().filter(|input| input.is_integer);
        self.integers.extend(integers.map(|input| input.name.clone()));
        let is_needed = |name: &String| needed.contains(name.as_str());
        for node in model.nodes.iter().filter(|node| node.output.iter().any(is_needed)) {
            let of = || {
                let name = if node.name.is_empty() { &node.output[0] } else { &node.name };
                format!("operator `{}` of node `{name}`", node.op_type)
            };
            ensure!(
                model.opset >= OLDEST_OPSET
                    || node.domain == TREES_DOMAIN
                    || (model.opset >= UNCHANGED_SINCE
                        && UNCHANGED.contains(&node.op_type.as_str())),
                "{} is of opset {}: export the model with opset {OLDEST_OPSET} or later",
                of(),
                model.opset
            );
            self.network.name.clone_from(&node.output[0]);
            if self.is_of_integers(node) {
                self.integers.extend(node.output.iter().cloned());
            }
            if node.domain == TREES_DOMAIN {
                let (name, value) = self.trees(node, needed).with_context(of)?;
                self.values.insert(name, value);
                continue;
            }
            let outputs = self.node(node).with_context(of)?;
            for (name, value) in node.output.iter().zip(outputs) {
                self.values.insert(name.clone(), value);
            }
        }
        Ok(())
    }

    /// Numbers that the network computes, by their name in the model.
    ///
    /// # Errors
    /// They are something else.
    pub fn numbers(&self, name: &str) -> Result<ComputedTensor> {
        match self.values.get(name) {
            Some(MappedValue::Numbers(numbers)) => Ok(numbers.clone()),
            _ => bail!("output `{name}` does not depend on the inputs, or is no number"),
        }
    }

    /// Whether an operator computes integers of what the network has as numbers.
    fn is_of_integers(&self, node: &NodeProto) -> bool {
        let is_number = |name: &&String| {
            let value = self.values.get(*name);
            matches!(value, Some(MappedValue::Numbers(_) | MappedValue::Weights(_)))
        };
        let mut numbers = node.input.iter().filter(is_number).peekable();
        let has_any = numbers.peek().is_some();
        let is_exact = node.op_type != "Cast" && node.domain != TREES_DOMAIN;
        is_exact && has_any && numbers.all(|name| self.integers.contains(name))
    }

    fn node(&mut self, node: &NodeProto) -> Result<Vec<MappedValue>> {
        ensure!(
            ["", "ai.onnx"].contains(&node.domain.as_str()),
            "operators of domain `{}` are not supported: export the model with standard operators",
            node.domain
        );
        ensure!(
            node.op_type != "Div" || !self.is_of_integers(node),
            "it divides integers, and an expert has no division that drops the remainder: cast \
             them to float in the model"
        );
        let view = self.view(node)?;
        if let Some(values) = self.shape_operator(&view)? {
            return Ok(values);
        }
        let value = match self.arithmetic(&view)? {
            Some(value) => value,
            None => self.layer(&view)?.with_context(|| {
                let hint = match node.op_type.as_str() {
                    "Erf" => "export with opset 20 or later, where GELU is one operator",
                    "If" | "Loop" | "Scan" => {
                        "branches and loops depend on data; nn.EmbeddingBag is exported as one: \
                         use nn.Embedding and a sum"
                    }
                    _ => "change the model, or write that part with the SDK",
                };
                format!("an expert does not have it: {hint}. Supported are {SUPPORTED}")
            })?,
        };
        Ok(vec![value])
    }

    fn view<'a>(&self, node: &'a NodeProto) -> Result<NodeView<'a>> {
        let input = |name: &String| -> Result<Option<MappedValue>> {
            let found = self.values.get(name).cloned();
            ensure!(found.is_some() || name.is_empty(), "its input `{name}` is not known");
            Ok(found)
        };
        let inputs = node.input.iter().map(input).collect::<Result<_>>()?;
        Ok(NodeView { node, inputs })
    }

    /// A value as numbers of the network; weights become a parameter.
    fn computed(&mut self, value: &MappedValue) -> Result<ComputedTensor> {
        match value {
            MappedValue::Numbers(numbers) => Ok(numbers.clone()),
            MappedValue::Weights(weights) => self.parameter(weights),
            MappedValue::Integers(values) => {
                self.parameter(&Weights { values: numbers_of(values)?, name: None })
            }
            MappedValue::Ids { .. } => {
                bail!("it computes with ids: an expert only looks them up in tables")
            }
        }
    }

    fn parameter(&mut self, Weights { values, name }: &Weights) -> Result<ComputedTensor> {
        let dims = BatchedShape { sizes: values.sizes.clone(), batch: None };
        let values = values.reshaped(dims.stored())?;
        let source = name.clone().unwrap_or_else(|| self.network.name.clone());
        let step = self.network.parameter(&source, values, name.is_none())?;
        Ok(ComputedTensor { step, dims })
    }
}

/// Integers that are known, as numbers.
fn numbers_of(values: &Grid<i64>) -> Result<Grid<f32>> {
    ensure!(!values.values.contains(&BATCH), "it computes with the size of the batch");
    Ok(values.mapped(|value| *value as f32))
}

/// A node with the values of its inputs.
struct NodeView<'a> {
    node: &'a NodeProto,
    inputs: Vec<Option<MappedValue>>,
}

impl NodeView<'_> {
    fn op(&self) -> &str {
        &self.node.op_type
    }

    fn optional(&self, index: usize) -> Option<&MappedValue> {
        self.inputs.get(index).and_then(Option::as_ref)
    }

    fn input(&self, index: usize) -> Result<&MappedValue> {
        self.optional(index).with_context(|| format!("its input {index} is missing"))
    }

    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.node.attribute.iter().find(|attribute| attribute.name == name)
    }

    fn integer(&self, name: &str, default: i64) -> i64 {
        self.attribute(name).map_or(default, |attribute| attribute.i)
    }

    fn number(&self, name: &str, default: f32) -> f32 {
        self.attribute(name).map_or(default, |attribute| attribute.f)
    }

    /// Integers of an attribute, or of an input, where later versions of ONNX have them.
    fn integers(&self, name: &str, index: usize) -> Result<Option<Vec<i64>>> {
        if let Some(attribute) = self.attribute(name) {
            return Ok(Some(attribute.ints.clone()));
        }
        match self.optional(index) {
            None => Ok(None),
            Some(MappedValue::Integers(values)) => Ok(Some(values.values.clone())),
            Some(_) => bail!("its `{name}` depends on data"),
        }
    }

    /// A single number of an attribute, or of an input.
    fn single(&self, name: &str, index: usize) -> Result<Option<f32>> {
        if let Some(attribute) = self.attribute(name) {
            return Ok(Some(attribute.f));
        }
        let values = match self.optional(index) {
            None => return Ok(None),
            Some(MappedValue::Weights(weights)) => weights.values.values.clone(),
            Some(MappedValue::Integers(values)) => numbers_of(values)?.values,
            Some(_) => bail!("its `{name}` depends on data"),
        };
        match values.as_slice() {
            [number] => Ok(Some(*number)),
            _ => bail!("its `{name}` has {} values, and can have one", values.len()),
        }
    }

    /// The tensor of an attribute.
    fn tensor(&self, name: &str) -> Result<Option<Constant>> {
        let tensor = self.attribute(name).and_then(|attribute| attribute.t.as_ref());
        // Constants of nodes are never in another file.
        tensor.map(|tensor| constant(tensor, Path::new(""))).transpose()
    }
}
