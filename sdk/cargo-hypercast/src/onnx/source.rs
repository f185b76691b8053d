//! The expert's code: the network as calls of the SDK, a line for each value of the model, and a
//! ranking rule to begin with.

use std::collections::BTreeMap;

use super::bindings::TaskOutput;
use super::network::{ModelParameter, NetworkStep, SdkCall, SdkNetwork, StepId};
use crate::new::KEYWORDS;

/// How strongly the outermost operator of an expression binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Binding {
    Sum,
    Product,
    Negation,
    Call,
}

struct Expression {
    text: String,
    binding: Binding,
}

/// Writes the steps that the outputs depend on, each as a variable or within another one.
struct Writer<'a> {
    network: &'a SdkNetwork,
    readers: Vec<usize>,
    /// The variables of the steps that have one.
    variables: BTreeMap<StepId, String>,
    lines: Vec<String>,
}

/// The body of `Expert::network`.
pub fn network_body(network: &SdkNetwork, tasks: &[TaskOutput]) -> String {
    let readers = readers(network, tasks);
    let (variables, lines) = (BTreeMap::new(), Vec::new());
    let mut writer = Writer { network, readers, variables, lines };
    for id in 0..network.steps.len() {
        if writer.has_variable(id) {
            writer.bind(id);
        }
    }
    for TaskOutput { task, step, .. } in tasks {
        let value = writer.expression(*step).text;
        writer.lines.push(format!("g.whole_output({task:?}, {value});"));
    }
    writer.lines.join("\n        ")
}

/// How many calls and outputs read each step: none of what no output depends on.
pub fn readers(network: &SdkNetwork, tasks: &[TaskOutput]) -> Vec<usize> {
    let mut readers = vec![0; network.steps.len()];
    tasks.iter().for_each(|task| readers[task.step] += 1);
    for (id, step) in network.steps.iter().enumerate().rev() {
        if readers[id] > 0 {
            step.call.reads().into_iter().for_each(|read| readers[read] += 1);
        }
    }
    readers
}

impl Writer<'_> {
    /// A step is a part of the one that reads it, if that is the only one and a part of the same
    /// value of the model; so are weights and columns.
    fn has_variable(&self, id: StepId) -> bool {
        let step = &self.network.steps[id];
        match self.readers[id] {
            0 => false,
            1 => {
                let is_leaf = matches!(step.call, SdkCall::Parameter(_) | SdkCall::Id(_));
                let reader = self.network.steps.iter().enumerate().find(|(reader, step)| {
                    self.readers[*reader] > 0 && step.call.reads().contains(&id)
                });
                !is_leaf && reader.is_none_or(|(_, reader)| reader.name != step.name)
            }
            _ => true,
        }
    }

    fn bind(&mut self, id: StepId) {
        let value = self.call(id).text;
        let name = self.free_variable(&self.network.steps[id]);
        self.lines.push(format!("let {name} = {value};"));
        self.variables.insert(id, name);
    }

    fn free_variable(&self, step: &NetworkStep) -> String {
        let name = match &step.call {
            SdkCall::Parameter(index) => &self.network.parameters[*index].name,
            SdkCall::Id(column) => column,
            _ => &step.name,
        };
        let base = variable(name);
        let is_free = |name: &String| self.variables.values().all(|other| other != name);
        let numbered = (2..).map(|number| format!("{base}_{number}"));
        let mut names = std::iter::once(base.clone()).chain(numbered);
        names.find(is_free).expect("the numbers do not end")
    }

    fn expression(&self, id: StepId) -> Expression {
        match self.variables.get(&id) {
            Some(name) => Expression { text: name.clone(), binding: Binding::Call },
            None => self.call(id),
        }
    }

    /// An operand that binds at least as strongly as `least`.
    fn operand(&self, id: StepId, least: Binding) -> String {
        let Expression { text, binding } = self.expression(id);
        if binding < least { format!("({text})") } else { text }
    }

    fn method(&self, of: StepId, name: &str, arguments: &[String]) -> Expression {
        let (of, arguments) = (self.operand(of, Binding::Call), arguments.join(", "));
        Expression { text: format!("{of}.{name}({arguments})"), binding: Binding::Call }
    }

    fn call(&self, id: StepId) -> Expression {
        let NetworkStep { call, rows, sizes, .. } = &self.network.steps[id];
        let value = |id: &StepId| self.expression(*id).text;
        let function = |text: String| Expression { text, binding: Binding::Call };
        match call {
            SdkCall::Features(names) => function(format!("g.raw_features(&{names:?})")),
            SdkCall::Id(name) => function(format!("g.id({name:?})")),
            SdkCall::Vector(name) => function(format!("g.vector({name:?})")),
            SdkCall::Tae => function("g.tae()".to_owned()),
            SdkCall::Parameter(index) => function(parameter(&self.network.parameters[*index])),
            SdkCall::Binary(op @ ("+" | "-" | "*" | "/"), a, b) => {
                let (own, next) = operator(op);
                let (a, b) = (self.operand(*a, own), self.operand(*b, next));
                Expression { text: format!("{a} {op} {b}"), binding: own }
            }
            SdkCall::Binary(method, a, b) => self.method(*a, method, &[value(b)]),
            SdkCall::Scalar { op: op @ ("+" | "-" | "*" | "/"), of, number, number_first } => {
                let ((own, next), number) = (operator(op), literal(*number));
                let text = match number_first {
                    true => format!("{number} {op} {}", self.operand(*of, next)),
                    false => format!("{} {op} {number}", self.operand(*of, own)),
                };
                Expression { text, binding: own }
            }
            SdkCall::Scalar { op, of, number, number_first } => {
                let constant = format!("g.constant({})", literal(*number));
                match number_first {
                    true => function(format!("{constant}.{op}({})", value(of))),
                    false => self.method(*of, op, &[constant]),
                }
            }
            SdkCall::Unary("neg", of) => {
                let of = self.operand(*of, Binding::Negation);
                Expression { text: format!("-{of}"), binding: Binding::Negation }
            }
            SdkCall::Unary(method, of) => self.method(*of, method, &[]),
            SdkCall::Clip(of, min, max) => {
                self.method(*of, "clip", &[literal(*min), literal(*max)])
            }
            SdkCall::MatMul(a, b) => self.method(*a, "matmul", &[value(b)]),
            SdkCall::Reshape(of) => self.method(*of, "reshape", &[format!("&{sizes:?}")]),
            SdkCall::Transpose(of, perm) => {
                let lead = usize::from(*rows);
                let moved = perm.iter().map(|axis| axis + lead);
                let perm: Vec<usize> = (0..lead).chain(moved).collect();
                self.method(*of, "transpose", &[format!("&{perm:?}")])
            }
            SdkCall::Slice(of, start, end) => {
                self.method(*of, "slice", &[start.to_string(), end.to_string()])
            }
            SdkCall::Concat(parts) => {
                let parts: Vec<String> = parts.iter().map(value).collect();
                function(format!("g.concat(&[{}])", parts.join(", ")))
            }
            SdkCall::Gather(table, id) => self.method(*table, "gather", &[value(id)]),
            SdkCall::Trees { of, file, .. } => {
                let (name, of) = (&self.network.parameters[*file].name, value(of));
                function(format!(
                    "hypercast_sdk::Trees::new({name:?}, \
                     include_bytes!(\"../weights/{name}.f32\")).apply({of})"
                ))
            }
            SdkCall::LayerNormalization { of, scale, bias, epsilon } => {
                let arguments = [value(scale), value(bias), literal(*epsilon)];
                self.method(*of, "layer_normalization_with", &arguments)
            }
        }
    }
}

fn parameter(ModelParameter { name, values, is_frozen, .. }: &ModelParameter) -> String {
    let call = format!("parameter!(g, {name:?}, {:?})", values.sizes);
    if *is_frozen { format!("g.rate_factor(0.0, || {call})") } else { call }
}

/// How an operator binds, and how its second operand must.
fn operator(op: &str) -> (Binding, Binding) {
    match op {
        "+" | "-" => (Binding::Sum, Binding::Product),
        _ => (Binding::Product, Binding::Negation),
    }
}

fn literal(number: f32) -> String {
    match number {
        f32::MIN => "f32::MIN".to_owned(),
        f32::MAX => "f32::MAX".to_owned(),
        number => format!("{number:?}"),
    }
}

/// A variable for a name of the model, such as `/deep/deep.0/Gemm_output_0`.
fn variable(name: &str) -> String {
    let name = name.strip_suffix("_output_0").unwrap_or(name);
    let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let mapped: String = name.chars().map(word).collect();
    let words: Vec<&str> = mapped.split('_').filter(|word| !word.is_empty()).collect();
    let name = words.join("_");
    let is_word = name.starts_with(|first: char| first.is_ascii_lowercase());
    // `g` is the graph.
    let is_taken = name == "g" || KEYWORDS.contains(&name.as_str());
    if is_word && !is_taken { name } else { format!("x_{name}") }
}
