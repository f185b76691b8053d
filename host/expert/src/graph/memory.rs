//! The memory that a network needs, computed before anything of it is allocated.
//!
//! The figure is an upper bound. It counts each parameter once, the values that a plugin gives it
//! to begin with, what is derived from parameters (laid-out weights in serving; gradients, the
//! optimizer's state and the best pass in training), and what all runs at a time hold at their
//! peaks. A run frees a value after its last reader, except in training, where what gradients come
//! to stays for the backward pass.

use super::{ColumnValues, ExpertGraph, Fold, Lead, Node, Op, TensorShape, Type, Unary, Zip};
use crate::Device;
use crate::plan::{NetworkPlan, has_gradient, reach};
use crate::wasm::contract::Description;

/// How a network is run, as far as its memory depends on it.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkUse {
    /// The most rows of a run.
    pub rows: usize,
    /// The most requests of a run; each may have a full short history.
    pub requests: usize,
    /// The most runs at a time.
    pub runs: usize,
    /// Threads that help the runs, each with a scratch buffer.
    pub helpers: usize,
    /// Where it runs.
    pub device: Device,
    /// Whether it is trained, and not only asked for predictions.
    pub learns: bool,
}

impl NetworkUse {
    /// Serving requests of up to `rows` candidates, `runs` at a time.
    pub fn serving(rows: usize, runs: usize) -> NetworkUse {
        let helpers = std::thread::available_parallelism().map_or(1, usize::from);
        NetworkUse { rows, requests: 1, runs, helpers, device: Device::Cpu, learns: false }
    }

    /// Training with batches of up to `rows` rows, of as many requests.
    pub fn training(rows: usize) -> NetworkUse {
        let device = Device::Cpu;
        NetworkUse { rows, requests: rows, runs: 1, helpers: 0, device, learns: true }
    }
}

/// The memory that one use of a network needs, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkMemory {
    /// All parameters, once, and the values that the plugin gave them to begin with.
    pub parameters: u64,
    /// What is derived from parameters and stays.
    pub derived: u64,
    /// What all runs at a time hold at their peaks.
    pub runs: u64,
    /// The node that takes most of it, if any takes some.
    pub largest: Option<LargestNode>,
}

/// The node that takes most of a network's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestNode {
    /// Its index.
    pub node: usize,
    /// What it takes, in bytes: of a parameter its values, of any other node its result and what it
    /// needs to compute that, over all runs.
    pub bytes: u64,
}

impl NetworkMemory {
    /// The memory that the network of a description needs.
    pub fn new(
        graph: &ExpertGraph,
        description: &Description,
        usage: &NetworkUse,
    ) -> NetworkMemory {
        let sizes = RunSizes::new(description.history_len, usage);
        let bytes_of = |tables: bool| {
            let specs = graph.parameters.iter().filter(|spec| spec.table == tables);
            specs.map(|spec| 4 * spec.len() as u64).fold(0, u64::saturating_add)
        };
        let (tables, dense) = (bytes_of(true), bytes_of(false));
        let values = graph.parameters.iter().filter_map(|spec| spec.values.as_ref());
        let values = values.map(|values| 4 * values.len() as u64).fold(0, u64::saturating_add);
        let demand = if usage.learns {
            // A gradient, a copy on the device, two moments and an average of each dense parameter;
            // of a table an average, and a sum for each row.
            let mut derived = dense.saturating_mul(5).saturating_add(tables.saturating_mul(2));
            if description.patience.is_some() {
                // The best pass beside that: values, average and the optimizer's state.
                let kept = dense.saturating_mul(4).saturating_add(tables.saturating_mul(3));
                derived = derived.saturating_add(kept);
            }
            Demand { derived, scratch: 0, run: sizes.tape(graph) }
        } else {
            sizes.serving(graph, dense, usage)
        };
        let count = usage.runs as u64;
        let each_run = demand.run.bytes.saturating_add(sizes.inputs(graph));
        let of_values = demand.run.largest.map(|LargestNode { node, bytes }| LargestNode {
            node,
            bytes: bytes.saturating_mul(count),
        });
        let largest = parameter_nodes(graph).chain(of_values).max_by_key(|largest| largest.bytes);
        NetworkMemory {
            parameters: tables.saturating_add(dense).saturating_add(values),
            derived: demand.derived,
            runs: each_run.saturating_mul(count).saturating_add(demand.scratch),
            largest,
        }
    }

    /// The sum of its parts, in bytes.
    pub fn total(&self) -> u64 {
        self.parameters.saturating_add(self.derived).saturating_add(self.runs)
    }
}

impl ExpertGraph {
    /// The memory that it, the network of a description, needs for one use, in bytes.
    ///
    /// # Errors
    /// It is more than `limit` bytes; the figure, its parts, and the node that takes most.
    pub fn check_memory(
        &self,
        description: &Description,
        usage: &NetworkUse,
        limit: u64,
    ) -> Result<NetworkMemory, String> {
        let memory = NetworkMemory::new(self, description, usage);
        refuse_if!(
            memory.total() > limit,
            "its network needs {} MiB of memory where it {}, more than the limit of {} MiB \
             (plugin_limits.network_memory_mib): parameters {}, what is derived from them {}, {} \
             run(s) of {} rows {}{}",
            mib(memory.total()),
            if usage.learns { "is trained" } else { "serves" },
            mib(limit),
            mib(memory.parameters),
            mib(memory.derived),
            usage.runs,
            usage.rows,
            mib(memory.runs),
            memory.largest.map_or(String::new(), |largest| self.most(largest))
        );
        Ok(memory)
    }

    fn most(&self, LargestNode { node, bytes }: LargestNode) -> String {
        let Node { layer, op, .. } = &self.nodes[node];
        let (layer, op) = (layer.escape_debug(), op.name());
        format!("; layer `{layer}`, node {node} `{op}` takes most of that, {} MiB", mib(bytes))
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn parameter_nodes(graph: &ExpertGraph) -> impl Iterator<Item = LargestNode> {
    graph.nodes.iter().enumerate().filter_map(|(node, Node { op, .. })| match op {
        Op::Parameter { parameter } => {
            let bytes = 4 * graph.parameters[*parameter].len() as u64;
            Some(LargestNode { node, bytes })
        }
        _ => None,
    })
}

/// What a network needs besides its parameters and the inputs of its runs, in bytes.
struct Demand {
    derived: u64,
    /// The scratch buffers of all threads.
    scratch: u64,
    run: RunPeak,
}

/// The most memory at a time, and the node that takes most.
#[derive(Debug, Clone, Copy, Default)]
struct RunPeak {
    bytes: u64,
    /// What of that is held through the whole run.
    lookups: u64,
    largest: Option<LargestNode>,
}

impl RunPeak {
    fn note(&mut self, node: usize, bytes: u64) {
        if self.largest.is_none_or(|largest| bytes > largest.bytes) {
            self.largest = Some(LargestNode { node, bytes });
        }
    }
}

/// The sizes of the symbolic dimensions in the largest run.
struct RunSizes {
    rows: u64,
    events: u64,
    requests: u64,
}

impl RunSizes {
    fn new(history_len: u32, usage: &NetworkUse) -> RunSizes {
        let (rows, requests) = (usage.rows.max(1) as u64, usage.requests.max(1) as u64);
        RunSizes { rows, events: requests.saturating_mul(history_len.into()).max(1), requests }
    }

    fn lead(&self, shape: &TensorShape) -> u64 {
        match shape.lead {
            Some(Lead::Rows) => self.rows,
            Some(Lead::History) => self.events,
            None => 1,
        }
    }

    fn elements(&self, shape: &TensorShape) -> u64 {
        self.lead(shape).saturating_mul(shape.row_elements() as u64)
    }

    fn bytes(&self, shape: &TensorShape) -> u64 {
        self.elements(shape).saturating_mul(4)
    }

    /// The batch: each declared column, since it is filled whether or not a node reads it.
    fn inputs(&self, graph: &ExpertGraph) -> u64 {
        let bytes = |ColumnValues { ty, shape }: &ColumnValues| match ty {
            Type::Number => self.bytes(shape),
            Type::Id => self.elements(shape).saturating_mul(8),
        };
        graph.column_values.iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// A version that serves: its program, and what the executor runs.
    fn serving(&self, graph: &ExpertGraph, dense: u64, usage: &NetworkUse) -> Demand {
        let plan = (usage.device == Device::Cpu).then(|| NetworkPlan::new(graph));
        let predicted = graph.predicted();
        let executed = plan.as_ref().map_or(&predicted, |plan| &plan.rest);
        let mut run = self.peak(graph, executed);
        // After the run its results are concatenated, downloaded and cut apart.
        let results = executed.iter().map(|node| self.bytes(&graph.nodes[*node].shape));
        let results = results.fold(0, u64::saturating_add).saturating_mul(3);
        run.bytes = run.bytes.max(run.lookups.saturating_add(results));
        let outputs = self.rows.saturating_mul(12 * predicted.len() as u64);
        run.bytes = run.bytes.saturating_add(outputs);
        let on_device = if executed.is_empty() { 0 } else { dense };
        let Some(NetworkPlan { program, lookups, .. }) = plan else {
            return Demand { derived: on_device, scratch: 0, run };
        };
        let looked_up: usize = lookups.iter().map(|lookup| lookup.bag).sum();
        run.bytes = run.bytes.saturating_add(self.rows.saturating_mul(4 * looked_up as u64));
        run.bytes = run.bytes.saturating_add(program.once_bytes());
        let derived = program.compiled_bytes().saturating_add(on_device);
        let threads = usage.runs.saturating_add(usage.helpers) as u64;
        Demand { derived, scratch: program.scratch_bytes().saturating_mul(threads), run }
    }

    /// A training step: what gradients come to, with these, all at a time. What none comes to is
    /// freed as in any run.
    fn tape(&self, graph: &ExpertGraph) -> RunPeak {
        let ends = graph.ends();
        let (needed, learns) = (reach(graph, &ends), has_gradient(graph));
        let readers = (0..graph.nodes.len()).filter(|at| needed[*at] && learns[*at]);
        let read = readers.flat_map(|at| &graph.nodes[at].inputs).chain(&ends);
        let read: Vec<usize> = read.copied().filter(|at| !learns[*at]).collect();
        let mut peak = self.peak(graph, &read);
        // Label, mask and weight of each task.
        let outcomes = self.rows.saturating_mul(12 * graph.outputs.len() as u64);
        let lookups = self.lookups(graph, &needed);
        peak.bytes = (peak.bytes - peak.lookups).saturating_add(lookups).saturating_add(outcomes);
        peak.lookups = lookups;
        for (at, node) in graph.nodes.iter().enumerate() {
            if needed[at] && learns[at] && !matches!(node.op, Op::Parameter { .. }) {
                let working = self.working(graph, node, node.inputs.len());
                let bytes = self.result(node).saturating_add(working).saturating_mul(3);
                peak.note(at, bytes);
                peak.bytes = peak.bytes.saturating_add(bytes);
            }
        }
        peak
    }

    /// A run of the executor that computes `outputs`.
    fn peak(&self, graph: &ExpertGraph, outputs: &[usize]) -> RunPeak {
        let needed = reach(graph, outputs);
        let lookups = self.lookups(graph, &needed);
        let (mut peak, mut live) = (RunPeak { bytes: lookups, lookups, largest: None }, lookups);
        let mut buffers = Buffers::new(graph, &needed, outputs);
        for (at, node) in graph.nodes.iter().enumerate() {
            if !needed[at] || node.ty != Type::Number {
                continue;
            }
            let own = buffers.place(graph, at, self.result(node));
            // A value whose elements are not in order may be copied first.
            let copied = node.inputs.iter().filter(|input| buffers.strided[**input]);
            let copied = copied.map(|input| self.bytes(&graph.nodes[*input].shape));
            let kept = node.inputs.iter().filter(|input| buffers.readers[**input] > 1).count();
            let working = copied.fold(self.working(graph, node, kept), u64::saturating_add);
            live = live.saturating_add(own);
            peak.bytes = peak.bytes.max(live.saturating_add(working));
            peak.note(at, own.saturating_add(working));
            let freed = node.inputs.iter().map(|input| buffers.read(*input));
            live = freed.fold(live, u64::saturating_sub);
        }
        peak
    }

    /// The ids, table rows and copies of touched rows of a run.
    fn lookups(&self, graph: &ExpertGraph, needed: &[bool]) -> u64 {
        let mut touched = vec![0u64; graph.parameters.len()];
        let mut bytes = 0u64;
        for (_, node) in graph.nodes.iter().enumerate().filter(|(at, _)| needed[*at]) {
            let ids = match node.op {
                Op::EmbeddingBag | Op::Gather => {
                    let read = self.elements(&graph.nodes[node.inputs[1]].shape);
                    if let Op::Parameter { parameter } = graph.nodes[node.inputs[0]].op {
                        touched[parameter] = touched[parameter].saturating_add(read);
                    }
                    read.saturating_mul(12)
                }
                Op::Cast => self.elements(&node.shape).saturating_mul(8),
                _ if node.ty == Type::Id => self.elements(&node.shape).saturating_mul(8),
                _ => 0,
            };
            bytes = bytes.saturating_add(ids);
        }
        let tables = graph.parameters.iter().zip(touched).filter(|(spec, _)| spec.table);
        let rows = tables.map(|(spec, touched)| {
            touched.min(spec.shape[0] as u64).saturating_mul(4 * spec.shape[1] as u64)
        });
        rows.fold(bytes, u64::saturating_add)
    }

    /// The memory of a node's result.
    fn result(&self, node: &Node) -> u64 {
        match node.op {
            // The rows of the result are cut out of history and rows together.
            Op::HstuAttention { .. } => self.joint(node),
            _ => self.bytes(&node.shape),
        }
    }

    /// A value for each event and each row.
    fn joint(&self, node: &Node) -> u64 {
        let places = self.rows.saturating_add(self.events);
        places.saturating_mul(4 * node.shape.row_elements() as u64)
    }

    /// What a node needs at a time besides its inputs, of which `kept` are read again later, and
    /// its result.
    fn working(&self, graph: &ExpertGraph, node: &Node, kept: usize) -> u64 {
        let input = |at: usize| &graph.nodes[node.inputs[at]].shape;
        let result = self.bytes(&node.shape);
        match &node.op {
            Op::Binary(Zip::Max | Zip::Min) | Op::Compare(_) => result.saturating_mul(3),
            Op::Where | Op::Softmax { .. } | Op::Dropout { .. } => result.saturating_mul(2),
            Op::LayerNormalization { .. } => result.saturating_mul(3),
            Op::Unary(Unary::Softplus) => result.saturating_mul(2),
            Op::Unary(Unary::Gelu) => result.saturating_mul(3),
            Op::Unary(_) => result,
            Op::EmbeddingBag | Op::Gather => {
                let read = self.elements(input(1));
                // Of several ids, each row counts with its share of the mean.
                let times = if input(1).row_elements() > 1 { 2 } else { 1 };
                read.saturating_mul(times * (16 + 4 * node.shape.row_elements() as u64))
            }
            Op::Pool(kind) => {
                let history = self.bytes(input(0)).saturating_add(16 * self.events);
                let width = 4 * node.shape.row_elements() as u64;
                let pooled = self.requests.saturating_mul(width).saturating_mul(3);
                let times = if *kind == Fold::Max { 2 } else { 1 };
                history.saturating_mul(times).saturating_add(pooled)
            }
            // Which rows are of which request, a value a request, and a copy of the input.
            Op::Segment(_) | Op::SegmentRank => {
                result.saturating_mul(4).saturating_add(self.rows.saturating_mul(16))
            }
            // Copies of both inputs on the host, beside their gradients in f64. No pair is kept.
            Op::SegmentPairSum { .. } => self.bytes(input(0)).saturating_mul(6),
            // History and rows side by side, which takes the place of inputs that nobody reads
            // again, and what the kernel lays out.
            Op::HstuAttention { .. } | Op::HstuHistory { .. } => {
                self.joint(node).saturating_mul(kept.min(3) as u64 + 1)
            }
            _ => 0,
        }
    }
}

/// Which values of a run share memory, and until when it is held.
struct Buffers {
    /// The node that allocated each value's memory.
    owner: Vec<usize>,
    /// What each node allocated, in bytes, while it is held.
    bytes: Vec<u64>,
    /// The number of values that hold each node's memory.
    holders: Vec<usize>,
    /// The readers of each value that are still to come.
    readers: Vec<usize>,
    /// Whether a value's elements are not in their order in memory.
    strided: Vec<bool>,
}

impl Buffers {
    fn new(graph: &ExpertGraph, needed: &[bool], outputs: &[usize]) -> Buffers {
        let count = graph.nodes.len();
        let mut readers = vec![0; count];
        let nodes = graph.nodes.iter().zip(needed).filter(|(_, needed)| **needed);
        for read in nodes.flat_map(|(node, _)| &node.inputs).chain(outputs) {
            readers[*read] += 1;
        }
        let (bytes, holders, strided) = (vec![0; count], vec![0; count], vec![false; count]);
        Buffers { owner: (0..count).collect(), bytes, holders, readers, strided }
    }

    /// Places the value of a node, of `bytes` bytes. Returns what it allocates.
    fn place(&mut self, graph: &ExpertGraph, at: usize, bytes: u64) -> u64 {
        let node = &graph.nodes[at];
        let source = node.inputs.first().copied();
        let view = match (&node.op, source) {
            (Op::Slice { .. } | Op::Transpose { .. }, Some(source)) => Some((source, true)),
            (Op::StopGradient | Op::Dropout { .. }, Some(source)) => {
                Some((source, self.strided[source]))
            }
            (Op::Reshape { .. }, Some(source)) if !self.strided[source] => Some((source, false)),
            _ => None,
        };
        if let Some((source, strided)) = view {
            (self.owner[at], self.strided[at]) = (self.owner[source], strided);
        } else if !matches!(node.op, Op::Parameter { .. }) {
            self.bytes[at] = bytes;
        }
        self.holders[self.owner[at]] += 1;
        self.bytes[at]
    }

    /// One reader less of a value. Returns what is free after that, in bytes.
    fn read(&mut self, input: usize) -> u64 {
        self.readers[input] -= 1;
        let owner = self.owner[input];
        if self.readers[input] == 0 {
            self.holders[owner] = self.holders[owner].saturating_sub(1);
        }
        if self.holders[owner] > 0 { 0 } else { std::mem::take(&mut self.bytes[owner]) }
    }
}
