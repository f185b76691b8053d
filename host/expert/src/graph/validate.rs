//! Checks the network that a guest described and turns it into an [`ExpertGraph`]. The error of a
//! broken rule names plugin, layer, op and shapes.

use std::collections::HashSet;

use super::infer::{Cost, infer, working_elements};
use super::{ExpertGraph, Lead, Node, Op, ParameterSpec, TensorShape, Type, fnv1a};
use crate::Error;
use crate::wasm::contract::{Column, Description, HostInfo, Network, Parameter};

/// The highest rank of a tensor.
pub(super) const MAX_RANK: usize = 4;
const TEXT_BYTES: usize = 256;

/// How large and costly a graph may be.
#[derive(Debug, Clone, PartialEq)]
pub struct GraphLimits {
    /// The number of nodes, and of parameters.
    pub nodes: usize,
    /// The number of values over all parameters.
    pub parameters: usize,
    /// The size of a fixed dimension, parameters excepted.
    pub dimension: usize,
    /// The number of values that one candidate (or event) needs over all nodes. Limits memory.
    pub row_elements: usize,
    /// Floating-point operations a candidate, as [`Cost::per_candidate`] counts them.
    pub flops_per_candidate: u64,
}

impl Default for GraphLimits {
    fn default() -> Self {
        GraphLimits {
            nodes: 4096,
            parameters: 64 << 20,
            dimension: 1 << 20,
            row_elements: 1 << 18,
            flops_per_candidate: 50_000_000,
        }
    }
}

impl ExpertGraph {
    /// Checks a plugin's network against the rules of `sdk/wit/ops.md` and the limits.
    pub fn new(
        description: &Description,
        network: &Network,
        info: &HostInfo,
        limits: &GraphLimits,
    ) -> Result<ExpertGraph, Error> {
        let validator = Validator { description, network, info, limits };
        validator.graph().map_err(|why| Error::refused(&description.name, why))
    }
}

struct Validator<'a> {
    description: &'a Description,
    network: &'a Network,
    info: &'a HostInfo,
    limits: &'a GraphLimits,
}

impl Validator<'_> {
    fn graph(&self) -> Result<ExpertGraph, String> {
        let mut parameters = self.parameters()?;
        if self.network.nodes.len() > self.limits.nodes {
            let (nodes, limit) = (self.network.nodes.len(), self.limits.nodes);
            return Err(format!("its network has {nodes} nodes, more than the limit of {limit}"));
        }
        let mut nodes = Vec::with_capacity(self.network.nodes.len());
        let mut cost = Cost::default();
        let mut elements = Elements::default();
        for index in 0..self.network.nodes.len() {
            let node = self.node(index, &nodes, &parameters)?;
            let inputs: Vec<&TensorShape> =
                node.inputs.iter().map(|input| &nodes[*input].shape).collect();
            cost.add(&node.op, &inputs, &node.shape, self.description.history_len);
            elements.add(&node, &inputs);
            self.check_size(index, &node, &elements)?;
            nodes.push(node);
        }
        self.check_cost(&cost)?;
        let outputs = self.outputs(&nodes)?;
        let extra_loss = self
            .network
            .extra_loss
            .map(|node| self.output("the extra loss", node, &nodes))
            .transpose()?;
        mark_tables(&mut parameters, &nodes, &outputs, extra_loss);
        let hash = fnv1a(0, format!("{nodes:?}{parameters:?}{outputs:?}{extra_loss:?}").as_bytes());
        let (plugin, columns) = (self.description.name.clone(), self.description.columns.clone());
        Ok(ExpertGraph { plugin, columns, nodes, parameters, outputs, extra_loss, cost, hash })
    }

    fn parameters(&self) -> Result<Vec<ParameterSpec>, String> {
        if self.network.parameters.len() > self.limits.nodes {
            let (count, limit) = (self.network.parameters.len(), self.limits.nodes);
            return Err(format!(
                "its network has {count} parameters, more than the limit of {limit}"
            ));
        }
        let mut names = HashSet::new();
        let mut total = 0usize;
        let mut specs = Vec::new();
        for parameter in &self.network.parameters {
            let name = parameter.name.as_str();
            if name.is_empty() || name.len() > TEXT_BYTES || !names.insert(name) {
                let name = &name[..name.floor_char_boundary(TEXT_BYTES)];
                return Err(format!(
                    "the name of its parameter `{name}` is empty, too long or used twice"
                ));
            }
            let elements = parameter_elements(parameter)?;
            total = total.saturating_add(elements);
            if total > self.limits.parameters {
                let limit = self.limits.parameters;
                return Err(format!(
                    "its parameters up to `{name}` {:?} have {total} values, more than the limit \
                     of {limit}",
                    parameter.shape
                ));
            }
            let shape = parameter.shape.iter().map(|dim| *dim as usize).collect();
            let (name, init) = (name.to_owned(), parameter.init);
            specs.push(ParameterSpec { name, shape, init, table: false });
        }
        Ok(specs)
    }

    fn node(
        &self,
        index: usize,
        earlier: &[Node],
        parameters: &[ParameterSpec],
    ) -> Result<Node, String> {
        let raw = &self.network.nodes[index];
        let mut inputs = Vec::with_capacity(raw.inputs.len());
        for input in &raw.inputs {
            let input = *input as usize;
            if input >= index {
                let why = format!(
                    "its input is node {input}, which is not before it: a graph has no cycle or \
                     forward reference"
                );
                return Err(self.at(index, &[], &why));
            }
            inputs.push(input);
        }
        let typed: Vec<(Type, &TensorShape)> =
            inputs.iter().map(|input| (earlier[*input].ty, &earlier[*input].shape)).collect();
        let shapes: Vec<&TensorShape> = typed.iter().map(|(_, shape)| *shape).collect();
        let op =
            Op::parse(&raw.op, &raw.attributes).map_err(|why| self.at(index, &shapes, &why))?;
        let (ty, shape) = match &op {
            Op::Input { .. } | Op::Parameter { .. } if !inputs.is_empty() => {
                Err("it takes no input".to_owned())
            }
            Op::Input { column } => self.column(*column),
            Op::Parameter { parameter } => match parameters.get(*parameter) {
                Some(spec) => Ok((Type::Number, TensorShape::fixed(&spec.shape))),
                None => Err(format!("parameter {parameter} of {} parameters", parameters.len())),
            },
            _ => infer(&op, &typed),
        }
        .map_err(|why| self.at(index, &shapes, &why))?;
        if shape.rank() > MAX_RANK {
            let why = format!("its result {shape} has a rank above {MAX_RANK}");
            return Err(self.at(index, &shapes, &why));
        }
        let layer = raw.layer[..raw.layer.floor_char_boundary(TEXT_BYTES)].to_owned();
        Ok(Node { op, inputs, ty, shape, layer })
    }

    fn column(&self, index: usize) -> Result<(Type, TensorShape), String> {
        let columns = &self.description.columns;
        let column = columns.get(index).ok_or_else(|| {
            format!("column {index}, but its description declares {} columns", columns.len())
        })?;
        refuse_if!(
            self.description.history_len == 0 && column.is_history(),
            "it reads {}, but the description's history-len is 0",
            column.label()
        );
        refuse_if!(
            matches!(column, Column::HistoryActions) && self.info.actions.is_empty(),
            "it reads history actions, but the schema has no action"
        );
        Ok(match column {
            Column::Tae => {
                (Type::Number, TensorShape::led(Lead::Rows, &[self.info.tae_dim as usize]))
            }
            Column::Feature(_) => (Type::Number, TensorShape::led(Lead::Rows, &[1])),
            Column::Id(_) => (Type::Id, TensorShape::led(Lead::Rows, &[1])),
            Column::HistoryId(_) => (Type::Id, TensorShape::led(Lead::History, &[1])),
            Column::HistoryActions => {
                (Type::Number, TensorShape::led(Lead::History, &[self.info.actions.len()]))
            }
            Column::HistoryAge => (Type::Number, TensorShape::led(Lead::History, &[1])),
        })
    }

    fn check_size(&self, index: usize, node: &Node, elements: &Elements) -> Result<(), String> {
        let limits = self.limits;
        let is_parameter = matches!(node.op, Op::Parameter { .. });
        if let Some(dim) =
            node.shape.dims.iter().find(|dim| !is_parameter && **dim > limits.dimension)
        {
            let why = format!(
                "its result {} has a dimension of {dim}, more than the limit of {}",
                node.shape, limits.dimension
            );
            return Err(self.at(index, &[], &why));
        }
        if elements.led > limits.row_elements || elements.fixed > limits.parameters {
            let why = format!(
                "with its result {} the network has {} values a candidate and {} others, more than \
                 the limits of {} and {}",
                node.shape, elements.led, elements.fixed, limits.row_elements, limits.parameters
            );
            return Err(self.at(index, &[], &why));
        }
        Ok(())
    }

    fn check_cost(&self, cost: &Cost) -> Result<(), String> {
        let flops = cost.per_candidate(self.description.history_len);
        let limit = self.limits.flops_per_candidate;
        refuse_if!(
            flops > limit,
            "its network takes {flops} FLOPs a candidate, more than the limit of {limit}"
        );
        Ok(())
    }

    fn outputs(&self, nodes: &[Node]) -> Result<Vec<usize>, String> {
        let tasks = &self.description.tasks;
        let outputs = &self.network.outputs;
        if let Some(extra) =
            outputs.iter().find(|output| tasks.iter().all(|task| task.name != output.task))
        {
            let name = &extra.task[..extra.task.floor_char_boundary(TEXT_BYTES)];
            return Err(format!(
                "its network has an output for task `{name}`, which its description lacks"
            ));
        }
        let output = |task: &str| {
            let mut found = outputs.iter().filter(|output| output.task == task);
            match (found.next(), found.next()) {
                (Some(output), None) => self.output(&format!("task `{task}`"), output.node, nodes),
                (None, _) => Err(format!("its network has no output for task `{task}`")),
                _ => Err(format!("its network has two outputs for task `{task}`")),
            }
        };
        tasks.iter().map(|task| output(&task.name)).collect()
    }

    fn output(&self, what: &str, node: u32, nodes: &[Node]) -> Result<usize, String> {
        let index = node as usize;
        let found = nodes
            .get(index)
            .ok_or_else(|| format!("the output of {what} is node {index} of {}", nodes.len()))?;
        let expected = TensorShape::led(Lead::Rows, &[1]);
        if found.shape != expected || found.ty != Type::Number {
            let why = format!(
                "it is the output of {what} with shape {}; an output is f32 {expected}",
                found.shape
            );
            return Err(self.at(index, &[], &why));
        }
        Ok(index)
    }

    /// A message about node `index` with these inputs.
    fn at(&self, index: usize, inputs: &[&TensorShape], why: &str) -> String {
        let node = &self.network.nodes[index];
        let text =
            |text: &str| text[..text.floor_char_boundary(TEXT_BYTES)].escape_debug().to_string();
        let shapes: Vec<String> = inputs.iter().map(|shape| shape.to_string()).collect();
        let of =
            if shapes.is_empty() { String::new() } else { format!(" of {}", shapes.join(", ")) };
        format!("layer `{}`, node {index} `{}`{of}: {why}", text(&node.layer), text(&node.op))
    }
}

fn parameter_elements(parameter: &Parameter) -> Result<usize, String> {
    let (name, shape) = (&parameter.name, &parameter.shape);
    if shape.is_empty() || shape.len() > MAX_RANK || shape.contains(&0) {
        let shown = &shape[..shape.len().min(8)];
        return Err(format!(
            "its parameter `{name}` has shape {shown:?}; rank 1 to {MAX_RANK} without 0 is allowed"
        ));
    }
    let product = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim as usize));
    product.ok_or_else(|| format!("the size of its parameter `{name}` {shape:?} overflows"))
}

/// The number of values of all nodes together.
#[derive(Default)]
struct Elements {
    /// A candidate or event.
    led: usize,
    fixed: usize,
}

impl Elements {
    fn add(&mut self, node: &Node, inputs: &[&TensorShape]) {
        let working = working_elements(&node.op, inputs, &node.shape);
        let elements = node.shape.row_elements();
        match node.shape.lead {
            Some(_) => self.led = self.led.saturating_add(elements).saturating_add(working),
            // `GraphLimits::parameters` limits them.
            None if matches!(node.op, Op::Parameter { .. }) => {}
            None => self.fixed = self.fixed.saturating_add(elements),
        }
    }
}

/// Marks as tables the parameters that only lookups read.
fn mark_tables(
    parameters: &mut [ParameterSpec],
    nodes: &[Node],
    outputs: &[usize],
    extra_loss: Option<usize>,
) {
    let mut has_lookup = vec![false; parameters.len()];
    let mut has_other_reader = vec![false; parameters.len()];
    let parameter = |node: usize| match nodes[node].op {
        Op::Parameter { parameter } => Some(parameter),
        _ => None,
    };
    for node in nodes {
        for (position, input) in node.inputs.iter().enumerate() {
            let Some(parameter) = parameter(*input) else {
                continue;
            };
            match node.op {
                Op::EmbeddingBag | Op::Gather if position == 0 => has_lookup[parameter] = true,
                _ => has_other_reader[parameter] = true,
            }
        }
    }
    for node in outputs.iter().copied().chain(extra_loss) {
        if let Some(parameter) = parameter(node) {
            has_other_reader[parameter] = true;
        }
    }
    for (index, spec) in parameters.iter_mut().enumerate() {
        spec.table = has_lookup[index] && !has_other_reader[index];
    }
}
