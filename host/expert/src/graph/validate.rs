//! Checks the network that a guest described and turns it into an [`ExpertGraph`]. The error of a
//! broken rule names plugin, layer, op and shapes.

use std::collections::HashSet;

use super::infer::{Cost, infer, working_elements};
use super::options::{OutputOptions, network_options, optimiser, output_options, parameter_spec};
use super::{
    ColumnValues, ExpertGraph, Lead, NetworkMemory, NetworkUse, Node, Op, ParameterSpec,
    TensorShape, Type, fnv1a,
};
use crate::Error;
use crate::plan::reach;
use crate::wasm::contract::{
    Column, Description, HostSchema, Network, Parameter, Task, score_name,
};

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
    /// The memory in bytes that serving may need, and that training may need, each where it is
    /// done.
    pub memory_bytes: u64,
    /// How large its requests are, and how many run at a time, where it serves.
    pub serving: NetworkUse,
    /// How it is trained.
    pub training: NetworkUse,
}

impl Default for GraphLimits {
    fn default() -> Self {
        GraphLimits {
            nodes: 4096,
            parameters: 64 << 20,
            dimension: 1 << 20,
            row_elements: 1 << 18,
            flops_per_candidate: 50_000_000,
            memory_bytes: 4 << 30,
            serving: NetworkUse::serving(1000, 4),
            training: NetworkUse::training(2048),
        }
    }
}

impl ExpertGraph {
    /// Checks a plugin's network against the rules of `sdk/wit/ops.md` and the limits. The memory
    /// of training is computed and not limited here: see [`ExpertGraph::check_memory`].
    pub fn new(
        description: &Description,
        network: &Network,
        host: &HostSchema,
        limits: &GraphLimits,
    ) -> Result<ExpertGraph, Error> {
        let validator = Validator { description, network, host, limits };
        validator.graph().map_err(|why| Error::refused(&description.name, why))
    }
}

/// What the outputs say of themselves, for each task.
#[derive(Default)]
struct TaskOptions {
    losses: Vec<Option<usize>>,
    scores: Vec<Option<usize>>,
    whole_outputs: Vec<bool>,
}

struct Validator<'a> {
    description: &'a Description,
    network: &'a Network,
    host: &'a HostSchema,
    limits: &'a GraphLimits,
}

impl Validator<'_> {
    fn graph(&self) -> Result<ExpertGraph, String> {
        let Network { nodes: raw, extra_loss, options, .. } = self.network;
        let gradient_clip = network_options(options)?;
        let mut parameters = self.parameters()?;
        let (count, limit) = (raw.len(), self.limits.nodes);
        refuse_if!(count > limit, "its network has {count} nodes, more than the limit of {limit}");
        let mut nodes = Vec::with_capacity(count);
        let mut elements = Elements::default();
        for index in 0..count {
            let at = |why: String| self.at(index, &nodes, &why);
            let node = self.node(index, &nodes, &parameters).map_err(at)?;
            let inputs: Vec<&TensorShape> =
                node.inputs.iter().map(|input| &nodes[*input].shape).collect();
            elements.add(&node, &inputs);
            self.check_size(&node, &elements).map_err(at)?;
            nodes.push(node);
        }
        let outputs = self.outputs(&nodes)?;
        let extra_loss =
            extra_loss.map(|node| self.output("the extra loss", node, &nodes)).transpose()?;
        let TaskOptions { losses, scores, whole_outputs } = self.task_options(&nodes)?;
        let further = losses.iter().chain(&scores).flatten().chain(&extra_loss);
        let read = outputs.iter().chain(further);
        mark_tables(&mut parameters, &nodes, read);
        self.choose_optimisers(&mut parameters)?;
        // Networks without options of their outputs have the hash that they always had.
        let has_own = losses.iter().any(Option::is_some) || whole_outputs.contains(&true);
        let mut own = if has_own { format!("{losses:?}{whole_outputs:?}") } else { "".into() };
        if scores.iter().any(Option::is_some) {
            own += &format!("scores {scores:?}");
        }
        let text = format!("{nodes:?}{parameters:?}{outputs:?}{extra_loss:?}{own}");
        let hash = fnv1a(0, text.as_bytes());
        let (plugin, columns) = (self.description.name.clone(), self.description.columns.clone());
        let column_values = columns.iter().map(|column| self.values(column));
        let column_values = column_values.collect::<Result<Vec<_>, _>>()?;
        let (serving_memory, training_memory) = Default::default();
        let mut graph = ExpertGraph {
            plugin,
            columns,
            column_values,
            nodes,
            parameters,
            outputs,
            whole_outputs,
            scores,
            losses,
            extra_loss,
            gradient_clip,
            cost: Cost::default(),
            serving_memory,
            training_memory,
            hash,
        };
        self.check_outcomes(&graph)?;
        graph.cost = self.cost(&graph)?;
        let GraphLimits { serving, training, memory_bytes, .. } = self.limits;
        graph.serving_memory = graph.check_memory(self.description, serving, *memory_bytes)?;
        // Most processes that load it never train it.
        graph.training_memory = NetworkMemory::new(&graph, self.description, training);
        Ok(graph)
    }

    fn parameters(&self) -> Result<Vec<ParameterSpec>, String> {
        let (count, limit) = (self.network.parameters.len(), self.limits.nodes);
        refuse_if!(
            count > limit,
            "its network has {count} parameters, more than the limit of {limit}"
        );
        let mut names = HashSet::new();
        let mut total = 0usize;
        let mut specs = Vec::with_capacity(count);
        for parameter in &self.network.parameters {
            let name = parameter.name.as_str();
            refuse_if!(
                name.is_empty() || name.len() > TEXT_BYTES || !names.insert(name),
                "the name of its parameter `{}` is empty, too long or used twice",
                cut(name)
            );
            total = total.saturating_add(parameter_elements(parameter)?);
            let limit = self.limits.parameters;
            refuse_if!(
                total > limit,
                "its parameters up to `{name}` {:?} have {total} values, more than the limit of \
                 {limit}",
                parameter.shape
            );
            let shape = parameter.shape.iter().map(|dim| *dim as usize).collect();
            specs.push(ParameterSpec { shape, ..parameter_spec(parameter)? });
        }
        Ok(specs)
    }

    /// Sets what each parameter is trained with, once it is known which of them are tables.
    fn choose_optimisers(&self, parameters: &mut [ParameterSpec]) -> Result<(), String> {
        for (spec, raw) in parameters.iter_mut().zip(&self.network.parameters) {
            spec.optimiser = optimiser(raw, spec.table)?;
        }
        Ok(())
    }

    /// What the output of each task says of itself.
    fn task_options(&self, nodes: &[Node]) -> Result<TaskOptions, String> {
        let mut all = TaskOptions::default();
        for Task { name, .. } in &self.description.tasks {
            let output = self.network.outputs.iter().find(|output| output.task == *name);
            let OutputOptions { loss, score, is_whole } =
                output.map_or(Ok(OutputOptions::default()), output_options)?;
            let node = |what: &str, node: Option<u32>| {
                let what = format!("the {what} of task `{name}`");
                node.map(|node| self.output(&what, node, nodes)).transpose()
            };
            all.losses.push(node("loss", loss)?);
            all.scores.push(node("score", score)?);
            all.whole_outputs.push(is_whole);
            let scored = score_name(name);
            refuse_if!(
                score.is_some() && self.description.tasks.iter().any(|task| task.name == scored),
                "its task `{scored}` has the name of the ranking score of `{name}`"
            );
        }
        Ok(all)
    }

    /// What predictions cost. What losses alone need is computed where the network is trained.
    fn cost(&self, graph: &ExpertGraph) -> Result<Cost, String> {
        let history_len = self.description.history_len;
        let mut cost = Cost::default();
        let nodes = graph.nodes.iter().zip(reach(graph, &graph.predicted()));
        for (node, _) in nodes.filter(|(_, needed)| *needed) {
            let inputs: Vec<&TensorShape> =
                node.inputs.iter().map(|input| &graph.nodes[*input].shape).collect();
            cost.add(&node.op, &inputs, &node.shape, history_len);
        }
        let (flops, limit) = (cost.per_candidate(history_len), self.limits.flops_per_candidate);
        refuse_if!(
            flops > limit,
            "its network takes {flops} FLOPs a candidate, more than the limit of {limit}"
        );
        Ok(cost)
    }

    /// Refuses predictions that depend on what only training knows.
    fn check_outcomes(&self, graph: &ExpertGraph) -> Result<(), String> {
        let needed = reach(graph, &graph.predicted());
        let is_outcome =
            |at: &usize| needed[*at] && matches!(graph.nodes[*at].op, Op::Outcome { .. });
        let Some(index) = (0..graph.nodes.len()).find(is_outcome) else { return Ok(()) };
        let why = "an output depends on it, and only training knows it: read it in losses alone";
        Err(self.at(index, &graph.nodes, why))
    }

    fn node(
        &self,
        index: usize,
        earlier: &[Node],
        parameters: &[ParameterSpec],
    ) -> Result<Node, String> {
        let raw = &self.network.nodes[index];
        let inputs: Vec<usize> = raw.inputs.iter().map(|input| *input as usize).collect();
        if let Some(input) = inputs.iter().find(|input| **input >= index) {
            return Err(format!(
                "its input is node {input}, which is not before it: a graph has no cycle or \
                 forward reference"
            ));
        }
        let typed: Vec<(Type, &TensorShape)> =
            inputs.iter().map(|input| (earlier[*input].ty, &earlier[*input].shape)).collect();
        let op = Op::parse(&raw.op, &raw.attributes, &self.description.tasks)?;
        let (ty, shape) = match &op {
            Op::Input { .. } | Op::Parameter { .. } if !inputs.is_empty() => {
                return Err("it takes no input".to_owned());
            }
            Op::Input { column } => self.column(*column)?,
            Op::Parameter { parameter } => match parameters.get(*parameter) {
                Some(spec) => (Type::Number, TensorShape::fixed(&spec.shape)),
                None => {
                    return Err(format!(
                        "parameter {parameter} of {} parameters",
                        parameters.len()
                    ));
                }
            },
            _ => infer(&op, &typed)?,
        };
        refuse_if!(shape.rank() > MAX_RANK, "its result {shape} has a rank above {MAX_RANK}");
        Ok(Node { op, inputs, ty, shape, layer: cut(&raw.layer).to_owned() })
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
            matches!(column, Column::HistoryActions) && self.host.info.actions.is_empty(),
            "it reads history actions, but the schema has no action"
        );
        let ColumnValues { ty, shape } = self.values(column)?;
        Ok((ty, shape))
    }

    fn values(&self, column: &Column) -> Result<ColumnValues, String> {
        let ty = match column {
            Column::Id(_) | Column::HistoryId(_) => Type::Id,
            _ => Type::Number,
        };
        let width = self.host.width(column)?;
        let lead = if column.is_history() { Lead::History } else { Lead::Rows };
        Ok(ColumnValues { ty, shape: TensorShape::led(lead, &[width]) })
    }

    fn check_size(&self, node: &Node, elements: &Elements) -> Result<(), String> {
        let (limits, shape) = (self.limits, &node.shape);
        let is_parameter = matches!(node.op, Op::Parameter { .. });
        let largest = shape.dims.iter().copied().max().filter(|_| !is_parameter).unwrap_or(0);
        refuse_if!(
            largest > limits.dimension,
            "its result {shape} has a dimension of {largest}, more than the limit of {}",
            limits.dimension
        );
        refuse_if!(
            elements.led > limits.row_elements || elements.fixed > limits.parameters,
            "with its result {shape} the network has {} values a candidate and {} others, more \
             than the limits of {} and {}",
            elements.led,
            elements.fixed,
            limits.row_elements,
            limits.parameters
        );
        Ok(())
    }

    fn outputs(&self, nodes: &[Node]) -> Result<Vec<usize>, String> {
        let tasks = &self.description.tasks;
        let outputs = &self.network.outputs;
        let is_foreign = |task: &str| tasks.iter().all(|known| known.name != task);
        if let Some(extra) = outputs.iter().find(|output| is_foreign(&output.task)) {
            let name = cut(&extra.task);
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
        if found.shape == expected && found.ty == Type::Number {
            return Ok(index);
        }
        let shape = &found.shape;
        let why =
            format!("it is the output of {what} with shape {shape}; an output is f32 {expected}");
        Err(self.at(index, nodes, &why))
    }

    /// A message about node `index`, whose inputs are among the checked nodes.
    fn at(&self, index: usize, nodes: &[Node], why: &str) -> String {
        let node = &self.network.nodes[index];
        let inputs = node.inputs.iter().filter_map(|input| nodes.get(*input as usize));
        let shapes: Vec<String> = inputs.map(|input| input.shape.to_string()).collect();
        let of =
            if shapes.is_empty() { String::new() } else { format!(" of {}", shapes.join(", ")) };
        let (layer, op) = (cut(&node.layer).escape_debug(), cut(&node.op).escape_debug());
        format!("layer `{layer}`, node {index} `{op}`{of}: {why}")
    }
}

/// The beginning of a guest's text.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES)]
}

pub(super) fn parameter_elements(parameter: &Parameter) -> Result<usize, String> {
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
fn mark_tables<'a>(
    parameters: &mut [ParameterSpec],
    nodes: &[Node],
    outputs: impl Iterator<Item = &'a usize>,
) {
    let is_lookup = |node: &Node, position: usize| {
        position == 0 && matches!(node.op, Op::EmbeddingBag | Op::Gather)
    };
    let reads = nodes.iter().flat_map(|node| {
        let inputs = node.inputs.iter().enumerate();
        inputs.map(move |(position, input)| (*input, is_lookup(node, position)))
    });
    let mut has_other_reader = vec![false; parameters.len()];
    for (node, is_lookup) in reads.chain(outputs.map(|output| (*output, false))) {
        if let Op::Parameter { parameter } = nodes[node].op {
            parameters[parameter].table |= is_lookup;
            has_other_reader[parameter] |= !is_lookup;
        }
    }
    for (spec, has_other_reader) in parameters.iter_mut().zip(has_other_reader) {
        spec.table &= !has_other_reader;
    }
}
