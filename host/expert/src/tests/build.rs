//! Networks and examples for tests, built directly on the contract.

use std::sync::Arc;

use hypercast_core::hash::mix64;
use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};

use crate::graph::{ExpertGraph, GraphLimits};
use crate::normalise::Normaliser;
use crate::params::{Parameters, Provenance, hash_text};
use crate::wasm::contract::{
    Attribute, Column, Description, HostSchema, Initialiser, Limits, Network, Node, Output,
    Parameter, Task, TaskKind, Value, VectorWidths,
};
use hypercast_data::schema::{Feature, FeatureKind, Schema, TaskRole, fill_tags};

pub(crate) const TAE_DIM: usize = 4;

/// Two surfaces, four actions, two tasks, and item features: a category, a number and up to three
/// topics.
pub(crate) fn schema() -> Schema {
    let task = |name: &str| hypercast_data::schema::Task {
        name: name.into(),
        role: TaskRole::Main,
        kind: hypercast_data::schema::TaskKind::Binary,
        label: name.into(),
        transform: Default::default(),
        surfaces: Vec::new(),
        weight: 1.0,
    };
    let feature = |name: &str, kind| Feature::new(name, kind);
    Schema {
        surfaces: vec!["feed".into(), "reels".into()],
        actions: ["click", "like", "share", "hide"].map(String::from).to_vec(),
        values: vec!["seconds".into()],
        tasks: vec![task("click"), task("like")],
        item_features: vec![
            feature("tag", FeatureKind::Categorical),
            feature("length", FeatureKind::Dense),
            Feature::tags("topics", 3),
        ],
        user_features: Vec::new(),
        context_features: Vec::new(),
        counters: Vec::new(),
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: Vec::new(),
    }
}

pub(crate) fn host() -> HostSchema {
    HostSchema::new(&schema(), vectors())
}

/// A TAE, and no content vectors.
pub(crate) fn vectors() -> VectorWidths {
    VectorWidths { tae: TAE_DIM, content: 0 }
}

pub(crate) fn description(columns: Vec<Column>, tasks: &[(&str, TaskKind)]) -> Description {
    Description {
        name: "test-expert".into(),
        version: "1.2.3".into(),
        surfaces: Vec::new(),
        tasks: tasks
            .iter()
            .map(|(name, kind)| Task { name: (*name).into(), kind: *kind })
            .collect(),
        columns,
        rank_columns: Vec::new(),
        training_columns: Vec::new(),
        history_len: 8,
        fm_version: "*".into(),
        limits: Limits { deadline_ms: 0, memory_mib: 0 },
        patience: None,
    }
}

/// Builds a raw network; every node is in layer `test`.
#[derive(Clone)]
pub(crate) struct Net {
    pub(crate) network: Network,
}

pub(crate) fn int(name: &str, value: i64) -> Attribute {
    Attribute { name: name.into(), value: Value::Integer(value) }
}

pub(crate) fn num(name: &str, value: f32) -> Attribute {
    Attribute { name: name.into(), value: Value::Number(value) }
}

pub(crate) fn text(name: &str, value: &str) -> Attribute {
    Attribute { name: name.into(), value: Value::Text(value.into()) }
}

pub(crate) fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute { name: name.into(), value: Value::Integers(values.to_vec()) }
}

impl Net {
    pub(crate) fn new() -> Net {
        Net {
            network: Network {
                parameters: vec![],
                nodes: vec![],
                outputs: vec![],
                extra_loss: None,
                options: vec![],
            },
        }
    }

    pub(crate) fn op(&mut self, op: &str, inputs: &[u32], attributes: Vec<Attribute>) -> u32 {
        let node =
            Node { op: op.into(), inputs: inputs.to_vec(), attributes, layer: "test".into() };
        self.network.nodes.push(node);
        self.network.nodes.len() as u32 - 1
    }

    pub(crate) fn input(&mut self, column: i64) -> u32 {
        self.op("Input", &[], vec![int("column", column)])
    }

    pub(crate) fn parameter(&mut self, name: &str, shape: &[u32], init: Initialiser) -> u32 {
        let (name, shape, options) = (name.into(), shape.to_vec(), Vec::new());
        self.network.parameters.push(Parameter { name, shape, init, options });
        let index = self.network.parameters.len() as i64 - 1;
        self.op("Parameter", &[], vec![int("parameter", index)])
    }

    /// Freezes all parameters that there are.
    pub(crate) fn freeze(&mut self) {
        for parameter in &mut self.network.parameters {
            parameter.options = vec![num("rate_factor", 0.0)];
        }
    }

    pub(crate) fn output(&mut self, task: &str, node: u32) {
        self.network.outputs.push(Output { task: task.into(), node, options: Vec::new() });
    }

    pub(crate) fn graph(&self, description: &Description) -> Result<ExpertGraph, crate::Error> {
        ExpertGraph::new(description, &self.network, &host(), &GraphLimits::default())
    }

    /// The graph of a network that is valid.
    pub(crate) fn valid(&self, description: &Description) -> Arc<ExpertGraph> {
        Arc::new(self.graph(description).expect("the test's network is valid"))
    }
}

/// A request at time 1000 s with `history` events on surface 0, as many on surface 1, and `targets`
/// candidates.
pub(crate) fn example(request: u64, history: usize, targets: usize) -> Example {
    let item = |id: u64| {
        Arc::new(Item { id, ids: item_ids(id), dense: vec![id as f32], ..Item::default() })
    };
    let event = |index: usize| Event {
        item: item(request * 31 + index as u64),
        surface: (index % 2) as u16,
        time_ms: 1_000_000 - 3_000 * (2 * history - index) as i64,
        outcome: Outcome { actions: (request + index as u64) % 16, known: 15, ..Outcome::UNKNOWN },
    };
    let target = |index: usize| {
        let id = request * 17 + index as u64;
        let actions = u64::from(id.is_multiple_of(3)) | (u64::from(id % 5 < 2) << 1);
        Target {
            item: item(id),
            ids: [vec![request, id, 0, 3], item_ids(id)].concat(),
            features: vec![id as f32, 1.0, 2.0, (id % 4) as f32],
            outcome: Outcome { actions, known: 15, values: [id as f32; MAX_VALUES] },
            truth: Vec::new(),
        }
    };
    Example {
        request,
        user: Arc::new(User { id: request, ..User::default() }),
        surface: 0,
        time_ms: 1_000_000,
        history: (0..2 * history).map(event).collect(),
        targets: (0..targets).map(target).collect(),
    }
}

/// An item's category and its topics, of which it has none to three.
fn item_ids(id: u64) -> Vec<u64> {
    let mut ids = vec![id % 7, 0, 0, 0];
    fill_tags(&mut ids[1..], (0..id % 4).map(|at| 10 * at + id % 5 + 1));
    ids
}

/// Values in -1..1 that look random.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<f32> {
    let value = |index: u64| {
        let hash = mix64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index);
        (hash >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count as u64).map(value).collect()
}

/// Fresh parameters of a graph with a made-up provenance.
pub(crate) fn parameters(graph: &ExpertGraph, seed: u64) -> Parameters {
    let provenance = Provenance {
        plugin: graph.plugin.clone(),
        plugin_version: "1.2.3".into(),
        contract: crate::wasm::contract::VERSION.into(),
        graph: hash_text(graph),
        fm_version: "1.0.0".into(),
        tae_dim: TAE_DIM,
        tasks: vec!["click".into()],
        trained_rows: 0,
        trained_until_ms: 0,
        normaliser: Normaliser::identity(&schema().feature_columns()),
        labels: Default::default(),
    };
    Parameters::init(graph, provenance, seed)
}
