//! The graph that `Expert::network` builds: columns, parameters, nodes and outputs.
//!
//! A `Tensor` is a handle to a node. Nothing is computed here: the host runs the graph. A mistake
//! does not interrupt the code that builds the graph. Instead, the graph records the first mistake
//! with the layer where it happened, and `Graph::finish` returns it.

mod task_losses;

use std::cell::RefCell;
use std::collections::HashSet;

use crate::description::Description;
use crate::raw::types::{
    Attribute, Column, HostInfo, Initialiser, Network, Node, Output, Parameter, Task, Value,
};
use crate::shape::{Dim, Shape};

/// The network under construction.
pub struct Graph {
    info: HostInfo,
    tasks: Vec<Task>,
    history_len: u32,
    state: RefCell<GraphState>,
}

#[derive(Default)]
struct GraphState {
    /// The columns so far, and the node of each.
    columns: Vec<(Column, u32)>,
    parameters: Vec<Parameter>,
    names: HashSet<String>,
    nodes: Vec<Node>,
    /// The shape of each node's result, in the order of `nodes`.
    shapes: Vec<Shape>,
    outputs: Vec<Output>,
    /// The losses of tasks, each with its node.
    losses: Vec<(String, u32)>,
    /// The ranking scores of tasks, each with its node.
    scores: Vec<(String, u32)>,
    extra_loss: Option<u32>,
    gradient_clip: Option<f32>,
    scope: Vec<String>,
    /// The options of parameters that enclose what is built now.
    training: Vec<Attribute>,
    error: Option<String>,
}

/// The result of a finished graph: the contract's network and the columns that it reads.
pub struct Finished {
    /// The network as the contract defines it.
    pub network: Network,
    /// The value of `description.columns`, which the network's `Input` nodes index.
    pub columns: Vec<Column>,
}

/// A handle to a node whose result is a tensor of numbers (f32) or of ids.
#[derive(Clone, Copy)]
pub struct Tensor<'g> {
    pub(crate) graph: &'g Graph,
    node: u32,
    /// True for ids (i64), which only an input can contain; false for numbers (f32).
    ids: bool,
}

/// What a parameter is trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optimiser {
    /// AdamW, as usual; not for an embedding table, of which a step touches few rows.
    Adam,
    /// Gradient descent without state.
    Sgd,
    /// Adagrad: by row for an embedding table, as usual, by value for others.
    Adagrad,
}

impl Graph {
    /// An empty graph for the expert that `description` describes.
    pub fn new(info: HostInfo, description: &Description) -> Self {
        Self {
            info,
            tasks: description.0.tasks.clone(),
            history_len: description.0.history_len,
            state: RefCell::default(),
        }
    }

    /// The schema that the host told the expert.
    pub fn info(&self) -> &HostInfo {
        &self.info
    }

    /// The tasks of the description. Each needs an `output`.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// The most events that the history columns contain for one request.
    pub fn history_len(&self) -> u32 {
        self.history_len
    }

    /// The FM's target-aware embedding, `[rows, tae_dim]`.
    pub fn tae(&self) -> Tensor<'_> {
        if self.info.tae_dim == 0 {
            return self.fail("the host has no FM, so there is no target-aware embedding");
        }
        self.column(Column::tae(), Shape::rows(self.info.tae_dim), false)
    }

    /// A numeric feature, `[rows, 1]`: standardised, and 0, the mean, where it is missing. Of a
    /// feature that the schema declares optional, `NAME_missing` is another one.
    pub fn feature(&self, name: &str) -> Tensor<'_> {
        self.known_or_own("feature", name, &self.info.features, self.info.own_features());
        self.column(Column::feature(name), Shape::rows(1), false)
    }

    /// Several numeric features, concatenated to `[rows, names]`.
    pub fn features<N: AsRef<str>>(&self, names: &[N]) -> Tensor<'_> {
        let columns: Vec<_> = names.iter().map(|name| self.feature(name.as_ref())).collect();
        self.concat(&columns)
    }

    /// Several numeric features as they are, `[rows, names]`, with 0 where one is missing: for a
    /// network that was trained elsewhere.
    pub fn raw_features<N: AsRef<str>>(&self, names: &[N]) -> Tensor<'_> {
        let raw = |name: &N| {
            let name = name.as_ref();
            self.known_or_own("feature", name, &self.info.features, self.info.own_features());
            self.column(Column::raw_feature(name), Shape::rows(1), false)
        };
        self.concat(&names.iter().map(raw).collect::<Vec<_>>())
    }

    /// A categorical feature or raw id of the candidates, `[rows, 1]`. One of several values, as
    /// tags, is for an `Embedding`, which gives the mean over them: it has more columns where it
    /// runs.
    pub fn id(&self, name: &str) -> Tensor<'_> {
        self.known_or_own("id", name, &self.info.ids, self.info.own_ids());
        self.column(Column::id(name), Shape::rows(1), true)
    }

    /// A vector of the items, such as `content`, `[rows, width]`. An item without one has zeros.
    pub fn vector(&self, name: &str) -> Tensor<'_> {
        let Some((_, width)) = self.info.vectors().find(|(known, _)| *known == name) else {
            let known: Vec<_> = self.info.vectors().map(|(name, _)| name.to_owned()).collect();
            self.known("vector", name, &known);
            return self.fail("a vector that the host lacks");
        };
        self.column(Column::vector(name), Shape::rows(width), false)
    }

    /// The FM's own prediction of a main task, `[rows, 1]`, on the scale of this network's output
    /// for the task of that name: a network that outputs it predicts what the FM does (of a
    /// regression, before the host corrects the network's own predictions by their labels). 0 where
    /// the FM did not answer, which is the base rate or the mean. `TaskHeads::from_fm` blends it
    /// with what the heads predict themselves.
    pub fn fm_logit(&self, task: &str) -> Tensor<'_> {
        if self.info.tae_dim == 0 {
            return self.fail("the host has no FM, so there are no predictions of it");
        }
        let known: Vec<String> = self.info.fm_logits().map(str::to_owned).collect();
        self.known("prediction of the FM for task", task, &known);
        self.column(Column::fm_logit(task), Shape::rows(1), false)
    }

    /// A categorical feature of the short history's items, `[history, 1]`, of several values as
    /// [`Graph::id`] is.
    pub fn history_id(&self, name: &str) -> Tensor<'_> {
        self.known("history id", name, &self.info.history_ids);
        self.column(Column::history_id(name), Shape::history(1), true)
    }

    /// The short history's actions as a multi-hot, `[history, actions]`.
    pub fn history_actions(&self) -> Tensor<'_> {
        let width = self.info.actions.len() as u32;
        self.column(Column::history_actions(), Shape::history(width), false)
    }

    /// log2(1 + seconds before the request) of the short history's events, `[history, 1]`.
    pub fn history_age(&self) -> Tensor<'_> {
        self.column(Column::history_age(), Shape::history(1), false)
    }

    /// A trained parameter. Its full name, the layer path followed by `name`, must be unique in the
    /// graph.
    pub fn parameter(&self, name: &str, shape: &[u32], init: Initialiser) -> Tensor<'_> {
        self.declare(name, shape, init, Vec::new())
    }

    /// A trained parameter that begins with given values: f32, little-endian and row-major, as many
    /// as `shape` has. For a network that was trained elsewhere, with `include_bytes!`.
    pub fn parameter_from(&self, name: &str, shape: &[u32], values: &[u8]) -> Tensor<'_> {
        let count: u64 = shape.iter().map(|&size| u64::from(size)).product();
        if values.len() as u64 != 4 * count {
            let (bytes, shape) = (values.len(), Shape::fixed(shape));
            return self.fail(&format!(
                "parameter `{name}` of shape {shape} needs {} bytes of values, not {bytes}",
                4 * count
            ));
        }
        let values = values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let values = attribute("values", Value::Numbers(values.collect()));
        self.declare(name, shape, Initialiser::Zeros, vec![values])
    }

    pub(crate) fn declare(
        &self,
        name: &str,
        shape: &[u32],
        init: Initialiser,
        mut options: Vec<Attribute>,
    ) -> Tensor<'_> {
        let path = self.path(name);
        if shape.contains(&0) {
            return self
                .fail(&format!("parameter `{path}` of shape {} is empty", Shape::fixed(shape)));
        }
        if !self.state.borrow_mut().names.insert(path.clone()) {
            return self.fail(&format!(
                "two parameters are called `{path}`: rename one of the layers, or apply one layer twice"
            ));
        }
        options.extend(parameter_options(&self.state.borrow().training));
        let parameter = Parameter { name: path, shape: shape.to_vec(), init, options };
        let index = self.state.borrow().parameters.len();
        self.state.borrow_mut().parameters.push(parameter);
        self.push("Parameter", &[], &[integer("parameter", index as i64)], Shape::fixed(shape))
    }

    /// A constant of shape `[1]`.
    pub fn constant(&self, value: f32) -> Tensor<'_> {
        let shape = attribute("shape", Value::Integers(vec![1]));
        let value = attribute("value", Value::Number(value));
        self.push("Constant", &[], &[value, shape], Shape::fixed(&[1]))
    }

    /// Runs `build` with `name` appended to the layer path.
    pub fn scope<T>(&self, name: &str, build: impl FnOnce() -> T) -> T {
        self.state.borrow_mut().scope.push(name.into());
        let built = build();
        self.state.borrow_mut().scope.pop();
        built
    }

    /// Runs `build`, whose parameters learn at `factor` (0 to 10) times the rate; 0 freezes them.
    pub fn rate_factor<T>(&self, factor: f32, build: impl FnOnce() -> T) -> T {
        self.trained(attribute(RATE_FACTOR, Value::Number(factor)), build)
    }

    /// Runs `build`, whose parameters have this weight decay (0 to 10) in place of the operator's:
    /// a step at the learning rate r takes r times `decay` of their values away.
    pub fn weight_decay<T>(&self, decay: f32, build: impl FnOnce() -> T) -> T {
        self.trained(attribute("weight_decay", Value::Number(decay)), build)
    }

    /// Runs `build`, whose parameters are trained with `optimiser`.
    pub fn optimiser<T>(&self, optimiser: Optimiser, build: impl FnOnce() -> T) -> T {
        let name = format!("{optimiser:?}").to_lowercase();
        self.trained(attribute("optimiser", Value::Text(name)), build)
    }

    fn trained<T>(&self, option: Attribute, build: impl FnOnce() -> T) -> T {
        self.state.borrow_mut().training.push(option);
        let built = build();
        self.state.borrow_mut().training.pop();
        built
    }

    /// Bounds the norm of a step's gradient, in place of the operator's bound.
    pub fn gradient_clip(&self, norm: f32) {
        self.state.borrow_mut().gradient_clip = Some(norm);
    }

    /// Sets the prediction of a task, `[rows, 1]`: the logit of a binary task, or the value of a
    /// regression.
    pub fn output(&self, task: &str, value: Tensor<'_>) {
        self.set_output(task, value, Vec::new());
    }

    /// Sets the prediction of a task to a value that is the whole logit, or the value of a
    /// regression in the unit of its label: the host adds no base rate and no scale. For a network
    /// that was trained elsewhere.
    pub fn whole_output(&self, task: &str, value: Tensor<'_>) {
        self.set_output(task, value, vec![attribute("base", Value::Text("none".into()))]);
    }

    fn set_output(&self, task: &str, value: Tensor<'_>, options: Vec<Attribute>) {
        if !self.tasks.iter().any(|t| t.name == task) {
            self.fail(&format!(
                "output for `{task}`, which is not in the description: add it with `Description::task`"
            ));
        } else if self.state.borrow().outputs.iter().any(|o| o.task == task) {
            self.fail(&format!("two outputs for task `{task}`"));
        } else if value.shape() != Shape::rows(1) || value.ids {
            self.fail(&format!("output `{task}` must have shape [rows, 1], not {}", value.shape()));
        } else {
            self.state.borrow_mut().outputs.push(Output {
                task: task.into(),
                node: value.node,
                options,
            });
        }
    }

    /// Sets the ranking score of a task, `[rows, 1]`, which `rank` reads with
    /// [`Request::score`](crate::Request::score) beside the prediction: for an order that the
    /// prediction does not give. Earlier hosts refuse it by name.
    pub fn score(&self, task: &str, score: Tensor<'_>) {
        if !self.tasks.iter().any(|known| known.name == task) {
            self.fail(&format!("score of `{task}`, which is not in the description"));
        } else if self.state.borrow().scores.iter().any(|(known, _)| known == task) {
            self.fail(&format!("two scores of task `{task}`"));
        } else if score.shape() != Shape::rows(1) || score.ids {
            self.fail(&format!("the score of `{task}` must be [rows, 1], not {}", score.shape()));
        } else {
            self.state.borrow_mut().scores.push((task.into(), score.node));
        }
    }

    /// Records a mistake, unless one was recorded before. Returns a placeholder tensor, so that the
    /// code that builds the graph can continue.
    pub fn fail(&self, message: &str) -> Tensor<'_> {
        {
            let mut state = self.state.borrow_mut();
            if state.error.is_none() {
                let layer = state.scope.join("/");
                let place = if layer.is_empty() { String::new() } else { format!("{layer}: ") };
                state.error = Some(format!("{place}{message}"));
            }
        }
        self.push("Constant", &[], &[], Shape::rows(1))
    }

    /// Returns the network.
    ///
    /// # Errors
    /// The first mistake, or a task without an output.
    pub fn finish(self) -> Result<Finished, String> {
        let GraphState {
            columns,
            parameters,
            nodes,
            mut outputs,
            losses,
            scores,
            extra_loss,
            gradient_clip,
            error,
            ..
        } = self.state.into_inner();
        if let Some(error) = error {
            return Err(error);
        }
        let lacks_output = |t: &&Task| !outputs.iter().any(|o| o.task == t.name);
        if let Some(task) = self.tasks.iter().find(lacks_output) {
            let name = &task.name;
            return Err(format!("task `{name}` has no output: call `g.output(\"{name}\", ..)`"));
        }
        let losses = losses.into_iter().map(|own| ("loss", own));
        for (name, (task, node)) in losses.chain(scores.into_iter().map(|own| ("score", own))) {
            let output = outputs.iter_mut().find(|output| output.task == task);
            output.expect("each task has one").options.push(integer(name, node.into()));
        }
        let clip = |norm| attribute("gradient_clip", Value::Number(norm));
        let options = gradient_clip.map(clip).into_iter().collect();
        Ok(Finished {
            network: Network { parameters, nodes, outputs, extra_loss, options },
            columns: columns.into_iter().map(|(column, _)| column).collect(),
        })
    }

    pub(crate) fn push(
        &self,
        op: &str,
        inputs: &[Tensor<'_>],
        attributes: &[Attribute],
        shape: Shape,
    ) -> Tensor<'_> {
        let mut state = self.state.borrow_mut();
        let inputs = inputs.iter().map(|input| input.node).collect();
        let (layer, attributes) = (state.scope.join("/"), attributes.to_vec());
        state.nodes.push(Node { op: op.into(), inputs, attributes, layer });
        state.shapes.push(shape);
        Tensor { graph: self, node: (state.nodes.len() - 1) as u32, ids: false }
    }

    fn path(&self, name: &str) -> String {
        [&self.state.borrow().scope[..], &[name.into()]].concat().join("/")
    }

    fn known(&self, what: &str, name: &str, names: &[String]) {
        if !names.iter().any(|n| n == name) {
            self.fail(&format!(
                "the host's schema has no {what} `{name}`; it has: {}",
                names.join(", ")
            ));
        }
    }

    fn known_or_own<'a>(
        &self,
        what: &str,
        name: &str,
        names: &[String],
        mut own: impl Iterator<Item = &'a str>,
    ) {
        if own.all(|known| known != name) && !names.iter().any(|known| known == name) {
            self.fail(&format!(
                "the host has no {what} `{name}` for this expert; it has: {}. One that belongs to \
                 a surface is told to experts whose description names that surface alone",
                names.join(", ")
            ));
        }
    }

    // Reading a column twice gives the same input node.
    fn column(&self, column: Column, shape: Shape, ids: bool) -> Tensor<'_> {
        if matches!(shape.dims()[0], Dim::History) && self.history_len == 0 {
            return self.fail("a history column needs `Description::history_len` above 0");
        }
        let state = self.state.borrow();
        if let Some(&(_, node)) = state.columns.iter().find(|(c, _)| *c == column) {
            return Tensor { graph: self, node, ids };
        }
        let index = state.columns.len();
        drop(state);
        let input = self.push("Input", &[], &[integer("column", index as i64)], shape);
        self.state.borrow_mut().columns.push((column, input.node));
        Tensor { ids, ..input }
    }
}

impl<'g> Tensor<'g> {
    /// The graph that the tensor belongs to.
    pub fn graph(&self) -> &'g Graph {
        self.graph
    }

    /// The shape, which may have one symbolic dimension.
    pub fn shape(&self) -> Shape {
        self.graph.state.borrow().shapes[self.node as usize].clone()
    }

    /// Whether the tensor contains ids rather than numbers.
    pub fn is_ids(&self) -> bool {
        self.ids
    }
}

/// The option that scales a learning rate; what encloses a parameter multiplies it.
const RATE_FACTOR: &str = "rate_factor";

/// The options of a parameter that is built inside of some, the outermost first.
fn parameter_options(enclosing: &[Attribute]) -> Vec<Attribute> {
    let factor = |option: &Attribute| match option.value {
        Value::Number(factor) if option.name == RATE_FACTOR => factor,
        _ => 1.0,
    };
    let factor: f32 = enclosing.iter().map(factor).product();
    let mut options = Vec::new();
    if factor != 1.0 {
        options.push(attribute(RATE_FACTOR, Value::Number(factor)));
    }
    for name in ["weight_decay", "optimiser"] {
        options.extend(enclosing.iter().rev().find(|option| option.name == name).cloned());
    }
    options
}

pub(crate) fn integer(name: &str, value: i64) -> Attribute {
    attribute(name, Value::Integer(value))
}

pub(crate) fn attribute(name: &str, value: Value) -> Attribute {
    Attribute { name: name.into(), value }
}
