//! `cargo hypercast from-onnx`: creates the crate of an expert whose network is a model in ONNX,
//! with the model's weights and a ranking rule to begin with.
//!
//! ```text
//! proto, model  the file: nodes, weights, inputs and outputs
//! bindings      columns of the inputs, and tasks of the outputs
//! mapping       from the model's operators to calls of the SDK
//! ensemble      decision trees, in the order in which the SDK evaluates them
//! network       those calls, with the shapes of their results
//! grid, value   what is known of a name of the model while it is mapped
//! source        the calls as Rust
//! recorded      predictions of the model, as a test of the expert
//! ```

mod bindings;
mod ensemble;
mod grid;
mod mapping;
mod model;
mod network;
mod proto;
mod recorded;
mod source;
mod value;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tree_tests;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use bindings::{BoundColumn, InputBinding, OutputBinding, TaskOutput};
use mapping::Mapper;
use model::OnnxModel;
use network::{ModelParameter, NetworkStep, SdkCall, SdkNetwork};
use recorded::Recorded;

use crate::new::{NewExpertArgs, new, type_name};
use crate::workspace::write;

const EXPERT: &str = include_str!("../../template/onnx.lib.rs.in");
const TEST: &str = include_str!("../../template/onnx.expert.rs.in");

/// The columns that every schema has.
const BUILT_IN: [&str; 7] = [
    "user_id",
    "item_id",
    "surface",
    "hour",
    "user_history_len",
    "seconds_since_last_event",
    "item_age",
];

/// Bytes of weights that a host's default limit of a call's output has room for, beside the nodes.
const COMMON_BYTES: usize = 15 << 20;

/// The options of `cargo hypercast from-onnx`.
#[derive(Debug, clap::Args)]
pub struct FromOnnxArgs {
    /// Model to read, exported with a batch of any size
    pub model: PathBuf,
    /// Name of the expert and its crate [default: that of the model's file]
    pub name: Option<String>,
    /// Columns of an input: INPUT=KIND:NAME,... with KIND feature (as it is), id or vector; or
    /// INPUT=tae [default: the column of the input's name]
    #[arg(long = "input", value_name = "BINDING")]
    pub inputs: Vec<InputBinding>,
    /// Tasks of an output: OUTPUT=KIND:TASK,... with KIND probability, logit or value, and none for
    /// a value that no task is [default: an output that ends in a sigmoid is the probability of the
    /// task of its name]
    #[arg(long = "output", value_name = "BINDING")]
    pub outputs: Vec<OutputBinding>,
    /// Inputs and outputs of the model for some rows, as JSON, which the expert is tested with
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Surface that the expert serves
    #[arg(long, default_value = "feed")]
    pub surface: String,
    /// Schema to test with, a data set's `schema.toml` [default: one with the model's columns]
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Folder to create [default: NAME]
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Checkout of HyperCast, as `new` has it
    #[arg(long, value_name = "DIR")]
    pub sdk: Option<PathBuf>,
}

/// A model as an expert's network.
struct ImportedModel {
    inputs: Vec<InputBinding>,
    network: SdkNetwork,
    tasks: Vec<TaskOutput>,
    recorded: Option<Recorded>,
}

/// Creates the crate and returns its folder.
///
/// # Errors
/// The model has what no expert can have, its inputs or outputs are not bound, or a file cannot be
/// read or written.
pub fn from_onnx(args: &FromOnnxArgs) -> Result<PathBuf> {
    let imported = ImportedModel::read(args)?;
    let name = args.name.clone().unwrap_or_else(|| name_of(&args.model));
    let folder = new(&NewExpertArgs {
        name: name.clone(),
        surface: args.surface.clone(),
        schema: args.schema.clone(),
        into: args.into.clone(),
        sdk: args.sdk.clone(),
    })?;
    imported.write(args, &name, &folder)?;
    let network = &imported.network;
    let values = imported.used().map(|step| network.parameter_values(step));
    let bytes = 4 * values.sum::<usize>();
    if bytes > COMMON_BYTES {
        let mib = bytes.div_ceil(1 << 20);
        eprintln!(
            "note: the weights have {mib} MiB; plugin_limits.output_mib of its hosts, 16 by \
             default, must be {} at least, and plugin_limits.memory_mib {}",
            mib + 1,
            2 * mib + 16
        );
    }
    Ok(folder)
}

impl ImportedModel {
    fn read(args: &FromOnnxArgs) -> Result<Self> {
        let model = OnnxModel::read(&args.model)?;
        let of_model = || args.model.display().to_string();
        let mut imported = Self::new(&model, &args.inputs, &args.outputs).with_context(of_model)?;
        if let Some(file) = &args.expect {
            let recorded = Recorded::read(file, &imported.inputs, &args.outputs, &imported.tasks);
            imported.recorded = Some(recorded.with_context(|| file.display().to_string())?);
        }
        Ok(imported)
    }

    fn new(model: &OnnxModel, inputs: &[InputBinding], outputs: &[OutputBinding]) -> Result<Self> {
        let inputs = bindings::bound_inputs(model, inputs)?;
        let mut network = SdkNetwork::default();
        let values = bindings::inputs(model, &inputs, &mut network)?;
        let mut mapper = Mapper::new(network, values);
        let wanted: Vec<&str> = match outputs {
            [] => model.outputs.iter().map(String::as_str).collect(),
            bound => bound.iter().map(|own| own.output.as_str()).collect(),
        };
        mapper.map(model, &model.needed(wanted.into_iter()))?;
        let tasks = bindings::outputs(model, outputs, &mut mapper)?;
        Ok(Self { inputs, network: mapper.network, tasks, recorded: None })
    }

    /// The steps that the predictions depend on.
    fn used(&self) -> impl Iterator<Item = &NetworkStep> {
        let readers = source::readers(&self.network, &self.tasks);
        let used = self.network.steps.iter().zip(readers).filter(|(_, readers)| *readers > 0);
        used.map(|(step, _)| step)
    }

    /// What has a file of its own in `weights/`.
    fn stored(&self) -> impl Iterator<Item = &ModelParameter> {
        self.used().filter_map(|step| match step.call {
            SdkCall::Parameter(index) | SdkCall::Trees { file: index, .. } => {
                Some(&self.network.parameters[index])
            }
            _ => None,
        })
    }

    /// Writes the files that differ from those of a new crate.
    fn write(&self, args: &FromOnnxArgs, name: &str, folder: &Path) -> Result<()> {
        for (file, content) in self.files(args, name) {
            write(&folder.join(file), content)?;
        }
        for file in ["src/lib.rs", "tests/expert.rs"] {
            format(&folder.join(file));
        }
        Ok(())
    }

    fn files(&self, args: &FromOnnxArgs, name: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let filled = |template: &str| {
            let model = args.model.file_name().unwrap_or_default().to_string_lossy();
            let text = template
                .replace("{{name}}", name)
                .replace("{{crate}}", &name.replace('-', "_"))
                .replace("{{type}}", &type_name(name))
                .replace("{{surface}}", &args.surface)
                .replace("{{model}}", &model)
                .replace("{{tasks}}", &self.declared_tasks())
                .replace("{{network}}", &source::network_body(&self.network, &self.tasks))
                .replace("{{values}}", &self.value_arms())
                .replace("{{world}}", &self.world())
                .replace("{{recorded}}", &self.recorded_test(&args.surface));
            text.into_bytes()
        };
        let mut files = vec![
            (PathBuf::from("src/lib.rs"), filled(EXPERT)),
            (PathBuf::from("tests/expert.rs"), filled(TEST)),
        ];
        if args.schema.is_none() {
            files.push((PathBuf::from("schema.toml"), self.schema(&args.surface).into_bytes()));
        }
        for ModelParameter { name, values, .. } in self.stored() {
            let bytes = values.values.iter().flat_map(|value| value.to_le_bytes()).collect();
            files.push((Path::new("weights").join(format!("{name}.f32")), bytes));
        }
        files
    }

    fn declared_tasks(&self) -> String {
        let line = |TaskOutput { task, is_regression, .. }: &TaskOutput| {
            let kind = if *is_regression { "Regression" } else { "Binary" };
            format!("            .task({task:?}, TaskKind::{kind})")
        };
        self.tasks.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn value_arms(&self) -> String {
        let is_alone = self.tasks.len() == 1;
        let arm = |TaskOutput { task, is_regression, .. }: &TaskOutput| match is_regression {
            true if !is_alone => {
                format!("        // In the unit of its label: weigh it.\n        {task:?} => 0.0,")
            }
            _ => format!("        {task:?} => 1.0,"),
        };
        self.tasks.iter().map(arm).collect::<Vec<_>>().join("\n")
    }

    /// What the world of the tests has besides the schema.
    fn world(&self) -> String {
        let width = |is_it: fn(&SdkCall) -> bool| {
            let step = self.network.steps.iter().find(|step| is_it(&step.call));
            step.map(|step| step.sizes[0])
        };
        let content = width(|call| matches!(call, SdkCall::Vector(_)));
        let tae = width(|call| *call == SdkCall::Tae);
        let set = |name: &str, width: Option<usize>| {
            width.map(|width| format!(".{name}({width})")).unwrap_or_default()
        };
        set("tae_dim", tae) + &set("content_dim", content)
    }

    fn recorded_test(&self, surface: &str) -> String {
        self.recorded.as_ref().map(|recorded| recorded.test(surface)).unwrap_or_default()
    }

    /// A schema that has what the model reads and predicts.
    fn schema(&self, surface: &str) -> String {
        let labels = |is_regression: bool| {
            let own = self.tasks.iter().filter(move |task| task.is_regression == is_regression);
            own.map(|task| task.task.as_str()).collect::<Vec<_>>()
        };
        let (mut actions, values) = (labels(false), labels(true));
        if actions.is_empty() {
            actions.push("click");
        }
        let mut text =
            format!("surfaces = [{surface:?}]\nactions = {actions:?}\nvalues = {values:?}\n");
        for TaskOutput { task, is_regression, .. } in &self.tasks {
            let kind = if *is_regression { "regression" } else { "binary" };
            text += &format!(
                "\n[[tasks]]\nname = {task:?}\nrole = \"main\"\nkind = {kind:?}\nlabel = {task:?}\n\
                 surfaces = []\nweight = 1.0\n"
            );
        }
        let mut known: Vec<&String> = Vec::new();
        for column in self.inputs.iter().flat_map(|input| &input.columns) {
            let (name, kind) = match column {
                BoundColumn::Feature(name) => (name, "dense"),
                BoundColumn::Id(name) => (name, "categorical"),
                BoundColumn::Vector(_) | BoundColumn::Tae => continue,
            };
            if !BUILT_IN.contains(&name.as_str()) && !known.contains(&name) {
                known.push(name);
                text += &format!("\n[[item_features]]\nname = {name:?}\nkind = {kind:?}\n");
            }
        }
        text
    }
}

/// A name for the expert of a file.
fn name_of(model: &Path) -> String {
    let stem = model.file_stem().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let words = stem.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-")
}

/// Formats a file, if the toolchain has a formatter: it is only for who reads the file.
fn format(file: &Path) {
    let mut command = Command::new("rustfmt");
    command.args(["--edition", "2024"]).arg(file).stdout(Stdio::null()).stderr(Stdio::null());
    drop(command.status());
}
