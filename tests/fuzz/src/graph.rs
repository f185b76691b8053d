//! Random networks. The validator accepts or refuses them; accepted ones are run and trained.
//!
//! A network is grown node by node. Nodes that the validator refuses are left out, so the result is
//! a valid graph. Then both executors must agree on sizes, gradients must have the right sizes, and
//! the results of a request must not depend, in any bit, on the other requests of its batch.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use hypercast_expert::batch::{ExpertBatch, ExpertColumns, TaskOutcomes};
use hypercast_expert::graph::{ExpertGraph, GraphLimits, Lead, TensorShape};
use hypercast_expert::network::network;
use hypercast_expert::params::hash_text;
use hypercast_expert::train::{Compute, OutputGradients, TaskTargets, compute};
use hypercast_expert::wasm::contract::{
    self, Attribute, Column, Description, Initialiser, Network, Node, Output, Parameter, Task,
    TaskKind, Value,
};
use hypercast_expert::{Device, Normaliser, Parameters, Provenance, Tae};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::world;

/// The number of nodes that an input tries to add.
const NODES: usize = 24;

fn limits() -> GraphLimits {
    GraphLimits {
        nodes: 64,
        parameters: 1 << 14,
        dimension: 1 << 9,
        row_elements: 1 << 11,
        flops_per_candidate: 1 << 20,
        ..GraphLimits::default()
    }
}

/// The ops, and how many inputs each takes.
const OPS: [(&str, usize); 52] = [
    ("MatMul", 2),
    ("Add", 2),
    ("Sub", 2),
    ("Mul", 2),
    ("Div", 2),
    ("Max", 2),
    ("Min", 2),
    ("Exp", 1),
    ("Log", 1),
    ("Sqrt", 1),
    ("Neg", 1),
    ("Abs", 1),
    ("Sigmoid", 1),
    ("Silu", 1),
    ("Relu", 1),
    ("Gelu", 1),
    ("Tanh", 1),
    ("Softplus", 1),
    ("Clip", 1),
    ("Softmax", 1),
    ("Greater", 2),
    ("Less", 2),
    ("Equal", 2),
    ("Where", 3),
    ("Concat", 2),
    ("Concat", 3),
    ("Slice", 1),
    ("Reshape", 1),
    ("Transpose", 1),
    ("Gather", 2),
    ("ReduceSum", 1),
    ("ReduceMean", 1),
    ("ReduceMax", 1),
    ("LayerNormalization", 3),
    ("Dropout", 1),
    ("StopGradient", 1),
    ("EmbeddingBag", 2),
    ("Cast", 1),
    ("HstuAttention", 6),
    ("HstuHistory", 3),
    ("PoolMean", 1),
    ("PoolMax", 1),
    ("PoolSum", 1),
    ("SegmentSum", 1),
    ("SegmentMean", 1),
    ("SegmentMax", 1),
    ("SegmentRank", 1),
    ("SegmentPairSum", 2),
    ("Label", 0),
    ("Mask", 0),
    ("Weight", 0),
    ("BaseLogit", 0),
];

/// Builds a network, checks it, runs it and computes its gradients.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let description = description(u.int_in_range(0..=9)?);
    if u.ratio(1, 8)? {
        // A network with random fields, as a hostile guest may send it.
        let network = wild(u)?;
        if let Ok(graph) = ExpertGraph::new(&description, &network, &world::host(), &limits()) {
            exercise(&description, graph, [(2, 2), (0, 1)]);
        }
        return Ok(());
    }
    let net = GrownNetwork::of(u, &description, limits())?;
    let sizes = sizes(u)?;
    let graph = net.finish(u.ratio(1, 4)?);
    exercise(&description, graph, sizes);
    Ok(())
}

/// The numbers of history events and targets of two requests.
pub fn sizes(u: &mut Unstructured) -> Result<[(usize, usize); 2]> {
    Ok([
        (u.int_in_range(0..=4)?, u.int_in_range(1..=3)?),
        (u.int_in_range(0..=4)?, u.int_in_range(0..=3)?),
    ])
}

/// An expert of two tasks that reads columns of all kinds.
pub fn description(history_len: u32) -> Description {
    let task = |name: &str, kind| Task { name: name.into(), kind };
    let columns = vec![
        Column::Tae,
        Column::Feature("length".into()),
        Column::Id("item_id".into()),
        Column::Id("tag".into()),
        Column::HistoryActions,
        Column::HistoryAge,
        Column::HistoryId("item_id".into()),
    ];
    Description {
        name: "fuzz".into(),
        version: "1.0.0".into(),
        surfaces: Vec::new(),
        tasks: vec![task("click", TaskKind::Binary), task("seconds", TaskKind::Regression)],
        columns,
        rank_columns: Vec::new(),
        training_columns: Vec::new(),
        history_len,
        fm_version: "*".into(),
        limits: contract::Limits { deadline_ms: 0, memory_mib: 0 },
        patience: None,
    }
}

/// A network whose nodes the validator has admitted.
pub struct GrownNetwork<'a> {
    description: &'a Description,
    limits: GraphLimits,
    network: Network,
    shapes: Vec<TensorShape>,
}

impl<'a> GrownNetwork<'a> {
    /// Grows a network of random nodes.
    pub fn of(
        u: &mut Unstructured,
        description: &'a Description,
        limits: GraphLimits,
    ) -> Result<GrownNetwork<'a>> {
        let mut net = GrownNetwork::new(description, limits);
        for _ in 0..u.int_in_range(1..=NODES)? {
            // If the bytes end early, continue with the network so far.
            let Ok((node, parameter)) = net.proposal(u) else { break };
            net.add(node, parameter);
        }
        Ok(net)
    }

    fn new(description: &'a Description, limits: GraphLimits) -> Self {
        let network = Network {
            parameters: Vec::new(),
            nodes: Vec::new(),
            outputs: Vec::new(),
            extra_loss: None,
            options: Vec::new(),
        };
        let mut net = GrownNetwork { description, limits, network, shapes: Vec::new() };
        // The first node is a column of width 1, which can always be an output.
        for column in [1, 0, 2, 3, 4, 5, 6] {
            net.add(node("Input", &[], vec![int("column", column)]), None);
        }
        net
    }

    /// A random node, with a parameter that it may read. It may not fit.
    fn proposal(&self, u: &mut Unstructured) -> Result<(Node, Option<Parameter>)> {
        if u.ratio(1, 4)? {
            let mut shape = Vec::new();
            for _ in 0..u.int_in_range(1..=3)? {
                shape.push(*u.choose(&[1, 2, 3, 4, 8])?);
            }
            let name = format!("p{}", self.network.parameters.len());
            let init = *u.choose(&[
                Initialiser::Normal(0.7),
                Initialiser::XavierUniform,
                Initialiser::KaimingUniform,
                Initialiser::Ones,
                Initialiser::Zeros,
                Initialiser::Constant(-0.5),
            ])?;
            let index = self.network.parameters.len() as i64;
            let node = node("Parameter", &[], vec![int("parameter", index)]);
            return Ok((node, Some(Parameter { name, shape, init, options: Vec::new() })));
        }
        if u.ratio(1, 16)? {
            let shape = vec![*u.choose(&[1, 2, 4])?; u.int_in_range(0..=2)?];
            let value = *u.choose(&[0.0, 1.0, -0.5, 1e-3, 1e30])?;
            return Ok((
                node("Constant", &[], vec![num("value", value), ints("shape", &shape)]),
                None,
            ));
        }
        let (op, arity) = *u.choose(&OPS)?;
        let mut inputs = Vec::new();
        for _ in 0..arity {
            let reach = if u.ratio(1, 2)? { 4 } else { usize::MAX };
            let back = u.choose_index(self.shapes.len().min(reach))?;
            inputs.push((self.shapes.len() - 1 - back) as u32);
        }
        // Some ops need inputs of the same shape.
        let alike = arity >= 3 && op != "LayerNormalization" || op == "SegmentPairSum";
        if alike && u.ratio(3, 4)? {
            inputs = vec![inputs[0]; arity];
        }
        let first = inputs.first().map_or(0, |first| *first as usize);
        let first = self.shapes[first].clone();
        Ok((node(op, &inputs, attributes(u, op, &first)?), None))
    }

    /// Adds a node if the validator admits the graph with it.
    fn add(&mut self, node: Node, parameter: Option<Parameter>) {
        let had = parameter.is_some();
        self.network.parameters.extend(parameter);
        self.network.nodes.push(node);
        match self.graph(&[], &[]) {
            Ok(graph) => {
                self.shapes.push(graph.nodes.last().expect("the node was added").shape.clone())
            }
            Err(_) => {
                self.network.nodes.pop();
                if had {
                    self.network.parameters.pop();
                }
            }
        }
    }

    /// The graph with up to two outputs, for which node 0 stands in, and up to two losses: one of
    /// the second output, and an extra one.
    fn graph(
        &self,
        outputs: &[u32],
        losses: &[u32],
    ) -> std::result::Result<ExpertGraph, hypercast_expert::Error> {
        let outputs = [0, 1].map(|at| outputs.get(at).copied().unwrap_or(0));
        let [loss, extra_loss] = [0, 1].map(|at| losses.get(at).copied());
        let output =
            |(task, node): (&str, u32)| Output { task: task.into(), node, options: Vec::new() };
        let outputs = ["click", "seconds"].into_iter().zip(outputs).map(output);
        let mut outputs: Vec<Output> = outputs.collect();
        outputs[1].options.extend(loss.map(|node| int("loss", node.into())));
        let network = Network { outputs, extra_loss, ..self.network.clone() };
        ExpertGraph::new(self.description, &network, &world::host(), &self.limits)
    }

    /// The graph. Its first output depends on the last node that can be an output, and on others;
    /// if it has losses, they depend on the last nodes that can be one.
    pub fn finish(mut self, has_losses: bool) -> ExpertGraph {
        let (mut outputs, mut losses) = (Vec::new(), Vec::new());
        for at in (0..self.shapes.len()).rev() {
            let shape = self.shapes[at].clone();
            let Some(lead) = shape.lead else { continue };
            let flat = [0, shape.row_elements() as i64];
            let before = self.shapes.len();
            let mut last = at as u32;
            for next in ["Cast", "Reshape", "ReduceMean", "PoolSum"] {
                let attributes = match next {
                    "Reshape" => vec![ints("shape", &flat)],
                    "ReduceMean" => vec![int("axis", 1)],
                    _ => vec![],
                };
                if next == "PoolSum" && lead == Lead::Rows {
                    continue;
                }
                let count = self.shapes.len();
                self.add(node(next, &[last], attributes), None);
                // `Cast` accepts only ids.
                if self.shapes.len() > count {
                    last = count as u32;
                }
            }
            let is_new = self.shapes.len() > before;
            // With those chosen before, since all together may take more FLOPs than the limit.
            if is_new && self.graph(&[&outputs[..], &[last]].concat(), &losses).is_ok() {
                outputs.push(last);
            }
            let takes_loss = has_losses && losses.len() < 2;
            if takes_loss && self.graph(&outputs, &[&losses[..], &[last]].concat()).is_ok() {
                losses.push(last);
            }
            if outputs.len() == 2 {
                break;
            }
        }
        self.graph(&outputs, &losses).expect("the validator admitted it with each part")
    }
}

fn attributes(u: &mut Unstructured, op: &str, first: &TensorShape) -> Result<Vec<Attribute>> {
    let rank = first.rank() as i64;
    let last = *first.dims.last().unwrap_or(&1) as i64;
    let axis = if u.ratio(3, 4)? { rank - 1 } else { u.int_in_range(0..=3)? };
    Ok(match op {
        "Clip" => vec![num("min", -0.5), num("max", *u.choose(&[0.5, -0.5, -1.0])?)],
        "Softmax" | "Concat" | "ReduceSum" | "ReduceMean" | "ReduceMax" => vec![int("axis", axis)],
        "Slice" => {
            let start = u.int_in_range(0..=last)?;
            let end = u.int_in_range(start..=last + 1)?;
            vec![int("axis", axis), int("start", start), int("end", end)]
        }
        "Reshape" => {
            let all = first.row_elements() as i64;
            let mut shape = if first.lead.is_some() { vec![0] } else { vec![] };
            let part = *u.choose(&[1, 2, 4])?;
            let parts = [vec![all], vec![part, all / part], vec![1, all], vec![all, 1, 1]];
            shape.extend(u.choose(&parts)?);
            vec![ints("shape", &shape)]
        }
        "Transpose" => {
            let mut perm: Vec<i64> = (0..rank).collect();
            let (a, b) = (u.choose_index(perm.len())?, u.choose_index(perm.len())?);
            perm.swap(a, b);
            vec![ints("perm", &perm)]
        }
        "LayerNormalization" => vec![num("epsilon", *u.choose(&[1e-5, 0.0, 1.0])?)],
        "Dropout" => {
            vec![num("rate", *u.choose(&[0.0, 0.5, 1.0])?), int("per-row", u.int_in_range(0..=1)?)]
        }
        "SegmentPairSum" => {
            let names = ["Identity", "Step", "Softplus", "Relu", "Sigmoid", "Abs"];
            let mut functions = Vec::new();
            for _ in 0..last {
                functions.push(u.choose(&names)?.to_string());
            }
            vec![Attribute { name: "functions".into(), value: Value::Texts(functions) }]
        }
        "Label" | "Mask" | "Weight" | "BaseLogit" => {
            let task = u.choose(&["click", "seconds"])?.to_string();
            vec![Attribute { name: "task".into(), value: Value::Text(task) }]
        }
        "HstuAttention" | "HstuHistory" => {
            vec![int("heads", *u.choose(&[1, 2, 3])?), int("max-len", *u.choose(&[1, 4, 32])?)]
        }
        _ => vec![],
    })
}

/// A network with random fields, most of which do not fit.
fn wild(u: &mut Unstructured) -> Result<Network> {
    let mut network = Network {
        parameters: Vec::new(),
        nodes: Vec::new(),
        outputs: Vec::new(),
        extra_loss: u.arbitrary::<Option<u8>>()?.map(u32::from),
        options: Vec::new(),
    };
    let number = |u: &mut Unstructured| -> Result<i64> {
        Ok(*u.choose(&[0, 1, 2, 3, 4, 7, -1, 1 << 20, i64::MAX, i64::MIN, u32::MAX as i64])?)
    };
    for at in 0..u.int_in_range(0..=3)? {
        let mut shape = Vec::new();
        for _ in 0..u.int_in_range(0..=5)? {
            shape.push(number(u)? as u32);
        }
        let name = if u.ratio(1, 8)? { "p0".into() } else { format!("p{at}") };
        let init = Initialiser::Normal(*u.choose(&[0.1, f32::NAN, f32::INFINITY, -1.0])?);
        network.parameters.push(Parameter { name, shape, init, options: Vec::new() });
    }
    for _ in 0..u.int_in_range(0..=12)? {
        let names = ["Input", "Parameter", "Constant", "Nothing", ""];
        let op = if u.ratio(1, 3)? { *u.choose(&names)? } else { u.choose(&OPS)?.0 };
        let mut inputs = Vec::new();
        for _ in 0..u.int_in_range(0..=6)? {
            inputs.push(u32::from(u.arbitrary::<u8>()? % 16));
        }
        let mut attributes = Vec::new();
        for _ in 0..u.int_in_range(0..=3)? {
            let names = [
                "column",
                "parameter",
                "axis",
                "start",
                "end",
                "shape",
                "perm",
                "value",
                "heads",
                "max-len",
                "rate",
                "per-row",
                "epsilon",
                "min",
                "max",
                "task",
                "functions",
                "other",
            ];
            let value = match u.int_in_range(0..=5)? {
                0 => Value::Integer(number(u)?),
                1 => Value::Number(*u.choose(&[0.0, 0.5, f32::NAN, 1e30, -1.0])?),
                2 => Value::Integers(vec![number(u)?; u.int_in_range(0..=5)?]),
                3 => Value::Numbers(vec![f32::NAN; u.int_in_range(0..=5)?]),
                4 => Value::Texts(vec![String::new(); u.int_in_range(0..=5)?]),
                _ => Value::Text(u.arbitrary::<&str>()?.to_owned()),
            };
            attributes.push(Attribute { name: (*u.choose(&names)?).into(), value });
        }
        let layer = u.arbitrary::<&str>()?.to_owned();
        network.nodes.push(Node { op: op.into(), inputs, attributes, layer });
    }
    for _ in 0..u.int_in_range(0..=3)? {
        let task = (*u.choose(&["click", "seconds", "other"])?).into();
        let node = u32::from(u.arbitrary::<u8>()? % 16);
        network.outputs.push(Output { task, node, options: Vec::new() });
    }
    Ok(network)
}

/// Parameters as training begins with them.
pub fn parameters(graph: &ExpertGraph, seed: u64) -> Parameters {
    let provenance = Provenance {
        plugin: graph.plugin.clone(),
        plugin_version: "1.0.0".into(),
        contract: contract::VERSION.into(),
        graph: hash_text(graph),
        fm_version: "1.0.0".into(),
        tae_dim: world::TAE_DIM,
        tasks: vec!["click".into(), "seconds".into()],
        trained_rows: 0,
        trained_until_ms: 0,
        normaliser: Normaliser::identity(&world::schema().feature_columns()),
        labels: Default::default(),
    };
    Parameters::init(graph, provenance, seed)
}

fn exercise(description: &Description, graph: ExpertGraph, sizes: [(usize, usize); 2]) {
    let graph = Arc::new(graph);
    let parameters = parameters(&graph, 3);
    let served = network(graph.clone(), parameters.clone(), Device::Cpu).expect("the CPU is there");
    let trained = compute(graph.clone(), Device::Cpu).expect("the CPU is there");
    let (one, other) = (batch(description, sizes, 5), batch(description, sizes, 9));
    let width = description.tasks.len();
    let first = sizes[0].1 * width;
    let of = |batch: &ExpertBatch| [served.outputs(batch), trained.forward(&parameters, batch)];
    for ((with_one, with_other), name) in
        of(&one).iter().zip(&of(&other)).zip(["served", "trained"])
    {
        assert_eq!(with_one.len(), one.rows * width, "{name}: one output per row and task");
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(
            with_one[..first].iter().zip(&with_other[..first]).all(same),
            "{name}: one request's results depend on another's values: {:?}, {:?}, {graph:#?}",
            &with_one[..first],
            &with_other[..first]
        );
    }
    learn(&*trained, &parameters, &one, &graph);
}

fn learn(trained: &dyn Compute, parameters: &Parameters, batch: &ExpertBatch, graph: &ExpertGraph) {
    let mut random = SmallRng::seed_from_u64(1);
    let rows = batch.rows;
    let mut loss = |outputs: &[f32], losses: &[f32]| {
        assert_eq!(losses.len(), rows * graph.loss_nodes().len(), "each loss once a row");
        OutputGradients { tasks: vec![1.0; outputs.len()], losses: vec![1.0; losses.len()] }
    };
    let gradients = trained.gradients(parameters, batch, &mut random, &mut loss);
    assert_eq!(gradients.values.len(), graph.parameters.len());
    for (index, values) in gradients.values.iter().enumerate() {
        let spec = &graph.parameters[index];
        let Some(values) = values else { continue };
        match &gradients.rows[index] {
            Some(rows) => assert_eq!(values.len(), rows.len() * spec.shape[1]),
            None => assert_eq!(values.len(), spec.len()),
        }
    }
}

/// A batch of two requests with these numbers of history events and targets. `other_seed` changes
/// only the values of the second one.
pub fn batch(
    description: &Description,
    sizes: [(usize, usize); 2],
    other_seed: u64,
) -> ExpertBatch {
    let schema = world::schema();
    let columns =
        ExpertColumns::new(description, &schema, world::VECTORS).expect("the schema has them");
    let [first, second] = sizes;
    let examples =
        [world::example(1, first.0, first.1), world::example(other_seed, second.0, second.1)];
    let mut tae = world::noise(5, first.1 * world::TAE_DIM);
    tae.extend(world::noise(other_seed, second.1 * world::TAE_DIM));
    let normaliser = Normaliser::identity(&schema.feature_columns());
    let mut batch = columns.batch(&examples, Tae::Rows(&tae), &normaliser);
    let outcome = |task: u64| {
        let seed = 7 * other_seed + task;
        let targets = TaskTargets {
            labels: world::noise(seed, batch.rows),
            mask: (0..batch.rows as u64).map(|row| !(row + seed).is_multiple_of(3)).collect(),
            weights: world::noise(seed + 1, batch.rows).into_iter().map(f32::abs).collect(),
        };
        TaskOutcomes { targets, base_logit: task as f32 - 0.5 }
    };
    batch.outcomes = (0..description.tasks.len() as u64).map(outcome).collect();
    batch
}

fn node(op: &str, inputs: &[u32], attributes: Vec<Attribute>) -> Node {
    Node { op: op.into(), inputs: inputs.to_vec(), attributes, layer: "fuzz".into() }
}

fn int(name: &str, value: i64) -> Attribute {
    Attribute { name: name.into(), value: Value::Integer(value) }
}

fn num(name: &str, value: f32) -> Attribute {
    Attribute { name: name.into(), value: Value::Number(value) }
}

fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute { name: name.into(), value: Value::Integers(values.to_vec()) }
}
