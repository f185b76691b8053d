//! Which columns an input of the model reads, and which tasks its outputs predict.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use super::grid::Grid;
use super::mapping::Mapper;
use super::model::{ModelInput, OnnxModel};
use super::network::{SdkCall, SdkNetwork, StepId};
use super::value::{BatchedShape, ComputedTensor, IdCell, MappedValue};

/// The columns of an input: `dense=feature:price,feature:age`.
#[derive(Debug, Clone, PartialEq)]
pub struct InputBinding {
    /// The input's name.
    pub input: String,
    /// In the order of the input's values of a row.
    pub columns: Vec<BoundColumn>,
}

/// A column that a model reads.
#[derive(Debug, Clone, PartialEq)]
pub enum BoundColumn {
    /// A numeric feature as it is.
    Feature(String),
    Id(String),
    Vector(String),
    Tae,
}

/// The tasks of an output: `click=probability:click`.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputBinding {
    /// The output's name.
    pub output: String,
    /// In the order of the output's values of a row; none for a value that no task is.
    pub tasks: Vec<Option<BoundTask>>,
}

/// What a value of an output says.
#[derive(Debug, Clone, PartialEq)]
pub struct BoundTask {
    pub kind: OutputKind,
    pub task: String,
}

/// What a number of the model means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// The probability of a binary task.
    Probability,
    /// Its log odds.
    Logit,
    /// The value of a regression, in the unit of its label.
    Value,
}

/// A task of the expert.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskOutput {
    pub task: String,
    pub is_regression: bool,
    /// The logit or the value.
    pub step: StepId,
}

impl FromStr for InputBinding {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        const FORM: &str =
            "write INPUT=KIND:NAME,... with KIND feature, id or vector, or INPUT=tae";
        let (input, columns) = text.split_once('=').context(FORM)?;
        let column = |text: &str| match text.split_once(':') {
            Some(("feature", name)) => Ok(BoundColumn::Feature(name.to_owned())),
            Some(("id", name)) => Ok(BoundColumn::Id(name.to_owned())),
            Some(("vector", name)) => Ok(BoundColumn::Vector(name.to_owned())),
            None if text == "tae" => Ok(BoundColumn::Tae),
            _ => bail!("{text:?} is no column: {FORM}"),
        };
        let columns = columns.split(',').map(column).collect::<Result<_>>()?;
        Ok(Self { input: input.to_owned(), columns })
    }
}

impl FromStr for OutputBinding {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        const FORM: &str = "write OUTPUT=KIND:TASK,... with KIND probability, logit or value, and \
            `none` for a value that no task is";
        let (output, tasks) = text.split_once('=').context(FORM)?;
        let task = |text: &str| {
            if text == "none" {
                return Ok(None);
            }
            let (kind, task) = text.split_once(':').context(FORM)?;
            let kind = match kind {
                "probability" => OutputKind::Probability,
                "logit" => OutputKind::Logit,
                "value" => OutputKind::Value,
                _ => bail!("{kind:?} is no kind of output: {FORM}"),
            };
            Ok(Some(BoundTask { kind, task: task.to_owned() }))
        };
        let tasks = tasks.split(',').map(task).collect::<Result<_>>()?;
        Ok(Self { output: output.to_owned(), tasks })
    }
}

/// The columns of each input of the model: those of `given`, or the column of the input's name.
///
/// # Errors
/// `given` has an input that the model lacks.
pub fn bound_inputs(model: &OnnxModel, given: &[InputBinding]) -> Result<Vec<InputBinding>> {
    let names = || model.inputs.iter().map(|input| input.name.as_str());
    if let Some(other) = given.iter().find(|own| names().all(|name| name != own.input)) {
        let names: Vec<&str> = names().collect();
        bail!("the model has no input `{}`; it has `{}`", other.input, names.join("`, `"));
    }
    let bound = |ModelInput { name, is_integer, .. }: &ModelInput| {
        let own = given.iter().find(|binding| binding.input == *name).cloned();
        own.unwrap_or_else(|| {
            let column = match (name.as_str(), is_integer) {
                ("tae", false) => BoundColumn::Tae,
                (_, true) => BoundColumn::Id(name.clone()),
                (_, false) => BoundColumn::Feature(name.clone()),
            };
            InputBinding { input: name.clone(), columns: vec![column] }
        })
    };
    Ok(model.inputs.iter().map(bound).collect())
}

/// What each input stands for.
///
/// # Errors
/// An input does not have as many values as its columns, or its columns are ids and numbers.
pub fn inputs(
    model: &OnnxModel,
    bound: &[InputBinding],
    network: &mut SdkNetwork,
) -> Result<BTreeMap<String, MappedValue>> {
    let mut values = BTreeMap::new();
    for (input, InputBinding { columns, .. }) in model.inputs.iter().zip(bound) {
        network.name.clone_from(&input.name);
        let value = value(input, columns, network);
        let value = value.with_context(|| format!("input `{}` of the model", input.name))?;
        values.insert(input.name.clone(), value);
    }
    Ok(values)
}

fn value(
    input: &ModelInput,
    columns: &[BoundColumn],
    network: &mut SdkNetwork,
) -> Result<MappedValue> {
    let cell = |column: &BoundColumn| match column {
        BoundColumn::Id(column) => Some(IdCell { column: column.clone(), offset: 0 }),
        _ => None,
    };
    let is_wide =
        |column: &&BoundColumn| matches!(column, BoundColumn::Vector(_) | BoundColumn::Tae);
    let wide = columns.iter().filter(is_wide).count();
    let sizes = sizes(input, (wide == 0).then_some(columns.len()))?;
    let width: usize = sizes.iter().product();
    if columns.iter().any(|column| cell(column).is_some()) {
        let cells: Option<Vec<IdCell>> = columns.iter().map(cell).collect();
        let cells = cells.context("its columns are ids and numbers: bind them to two inputs")?;
        ensure!(input.is_integer, "it takes numbers, and its columns are ids");
        let cells = Grid::new([&[1], &sizes[..]].concat(), cells)?;
        return Ok(MappedValue::Ids { cells, batch: 0 });
    }
    let rest = width.checked_sub(columns.len() - wide);
    let rest = rest.filter(|rest| wide < 2 && (wide == 1) == (*rest > 0)).with_context(|| {
        let count = columns.len();
        format!("it has {width} values a row, which do not fit its {count} columns: see --input")
    })?;
    let mut parts = Vec::new();
    for run in columns.chunk_by(|a, b| !is_wide(&a) && !is_wide(&b)) {
        let feature = |column: &BoundColumn| match column {
            BoundColumn::Feature(name) => Some(name.clone()),
            _ => None,
        };
        let (call, width) = match &run[0] {
            BoundColumn::Vector(name) => (SdkCall::Vector(name.clone()), rest),
            BoundColumn::Tae => (SdkCall::Tae, rest),
            _ => (SdkCall::Features(run.iter().filter_map(feature).collect()), run.len()),
        };
        parts.push(network.input(call, width)?);
    }
    let dims = BatchedShape::batched(&sizes);
    let all = network.concat(&parts, 0)?;
    let step = network.reshape(all, dims.stored())?;
    Ok(MappedValue::Numbers(ComputedTensor { step, dims }))
}

/// The sizes behind the batch; one that the model leaves open is as large as its columns need.
fn sizes(input: &ModelInput, columns: Option<usize>) -> Result<Vec<usize>> {
    let known: usize = input.sizes.iter().flatten().product();
    let open = input.sizes.iter().filter(|size| size.is_none()).count();
    let free = columns.map(|columns| columns / known.max(1));
    let size = |size: &Option<usize>| size.or(free.filter(|_| open == 1));
    let sizes: Option<Vec<usize>> = input.sizes.iter().map(size).collect();
    sizes.context("its sizes are open: export the model with fixed ones behind the batch")
}

/// The tasks of the model's outputs.
///
/// # Errors
/// An output that is not as wide as its tasks are many, or of which nobody says what it means.
pub fn outputs(
    model: &OnnxModel,
    given: &[OutputBinding],
    mapper: &mut Mapper,
) -> Result<Vec<TaskOutput>> {
    let bound = match given {
        [] => model.outputs.iter().map(|name| implied(name, mapper)).collect::<Result<Vec<_>>>()?,
        given => given.to_vec(),
    };
    let mut tasks: Vec<TaskOutput> = Vec::new();
    for OutputBinding { output, tasks: own } in &bound {
        ensure!(
            model.outputs.contains(output),
            "the model has no output `{output}`; it has `{}`",
            model.outputs.join("`, `")
        );
        let columns = columns(output, mapper)?;
        ensure!(
            columns.len() == own.len(),
            "output `{output}` has {} values a row, and {} tasks: name each with --output, or say \
             `none` for it",
            columns.len(),
            own.len()
        );
        let named = own.iter().zip(columns);
        for (BoundTask { kind, task }, step) in
            named.filter_map(|(own, step)| Some((own.as_ref()?, step)))
        {
            let is_new = tasks.iter().all(|known| known.task != *task);
            ensure!(is_new && !task.is_empty(), "task `{task}` is nameless or named twice");
            mapper.network.name = format!("{task}_logit");
            let step = match kind {
                OutputKind::Probability => logit(&mut mapper.network, step)?,
                OutputKind::Logit | OutputKind::Value => step,
            };
            let is_regression = *kind == OutputKind::Value;
            tasks.push(TaskOutput { task: task.clone(), is_regression, step });
        }
    }
    ensure!(!tasks.is_empty(), "no output is a task: name one with --output");
    Ok(tasks)
}

/// A probability, if a sigmoid says it.
fn implied(output: &str, mapper: &mut Mapper) -> Result<OutputBinding> {
    for step in columns(output, mapper)? {
        let is_probability = mapper.network.before_sigmoid(step)?.is_some();
        ensure!(
            is_probability,
            "output `{output}` does not end in a sigmoid: say with --output {output}=KIND:TASK \
             whether it is a probability, a logit or the value of a regression"
        );
    }
    let kind = OutputKind::Probability;
    let tasks = vec![Some(BoundTask { kind, task: output.to_owned() })];
    Ok(OutputBinding { output: output.to_owned(), tasks })
}

/// Each value of a row of an output, as the contract's `[rows, 1]`.
fn columns(output: &str, mapper: &mut Mapper) -> Result<Vec<StepId>> {
    let ComputedTensor { step, dims } = mapper.numbers(output)?;
    let width = dims.others().iter().product();
    ensure!(dims.batch.is_some(), "output `{output}` is the same for all rows");
    output.clone_into(&mut mapper.network.name);
    let flat = mapper.network.reshape(step, vec![width])?;
    (0..width).map(|column| mapper.network.take(flat, 0, &[column])).collect()
}

/// The log odds of a probability.
fn logit(network: &mut SdkNetwork, probability: StepId) -> Result<StepId> {
    if let Some(logit) = network.before_sigmoid(probability)? {
        return Ok(logit);
    }
    let odds_of_not = network.scalar_first("-", 1.0, probability)?;
    let (yes, no) = (network.unary("log", probability)?, network.unary("log", odds_of_not)?);
    network.binary("-", yes, no)
}
