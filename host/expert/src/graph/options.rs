//! The options of a network, its outputs and parameters, by name. One that the host does not know
//! is refused: it would train something else than what was described.

use std::sync::Arc;

use super::validate::{cut, parameter_elements};
use super::{ParameterOptimiser, ParameterSpec};
use crate::wasm::contract::{Attribute, MAX_FACTOR, Output, Parameter, Value, unknown_option};

/// The largest weight decay, as a share of a parameter for each unit of learning rate.
const MAX_DECAY: f32 = 10.0;

/// The one value of an output's option `base`.
const NO_BASE: &str = "none";

/// What a parameter says of itself, before it is known how it is read: no shape, and the optimiser
/// of a dense one.
pub(super) fn parameter_spec(parameter: &Parameter) -> Result<ParameterSpec, String> {
    let (mut rate_factor, mut weight_decay, mut values) = (1.0, None, None);
    for option in &parameter.options {
        match option.name.as_str() {
            "rate_factor" => rate_factor = bounded(parameter, option, MAX_FACTOR)?,
            "weight_decay" => weight_decay = Some(bounded(parameter, option, MAX_DECAY)?),
            "values" => values = Some(initial_values(parameter, option)?),
            "optimiser" => {}
            _ => {
                let known = "`rate_factor`, `weight_decay`, `optimiser` and `values`";
                let of = format!("its parameter `{}`", cut(&parameter.name));
                return Err(unknown_option(&of, option, known));
            }
        }
    }
    Ok(ParameterSpec {
        name: parameter.name.clone(),
        shape: Vec::new(),
        init: parameter.init,
        table: false,
        rate_factor,
        weight_decay,
        optimiser: ParameterOptimiser::Adam,
        values,
    })
}

/// What a parameter begins with. The limit of a call's output bounds it.
fn initial_values(parameter: &Parameter, option: &Attribute) -> Result<Arc<Vec<f32>>, String> {
    let (name, shape) = (cut(&parameter.name), &parameter.shape);
    let Value::Numbers(values) = &option.value else {
        return Err(format!("the values of its parameter `{name}` are not a list of numbers"));
    };
    refuse_if!(
        values.len() != parameter_elements(parameter)?,
        "its parameter `{name}` {shape:?} has {} values, not as many as its shape",
        values.len()
    );
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(format!("value {at} of its parameter `{name}` is {}", values[at]));
    }
    Ok(Arc::new(values.clone()))
}

/// What a parameter is trained with, which differs between tables and others.
pub(super) fn optimiser(
    parameter: &Parameter,
    is_table: bool,
) -> Result<ParameterOptimiser, String> {
    let chosen = parameter.options.iter().rev().find(|option| option.name == "optimiser");
    let Some(chosen) = chosen else {
        return Ok(if is_table { ParameterOptimiser::Adagrad } else { ParameterOptimiser::Adam });
    };
    let (known, found): (&str, _) = match &chosen.value {
        Value::Text(name) if name == "sgd" => return Ok(ParameterOptimiser::Sgd),
        Value::Text(name) if name == "adagrad" => return Ok(ParameterOptimiser::Adagrad),
        Value::Text(name) if name == "adam" && !is_table => return Ok(ParameterOptimiser::Adam),
        value if is_table => ("`adagrad` or `sgd`, which touch a table's read rows alone", value),
        value => ("`adam`, `adagrad` or `sgd`", value),
    };
    let found = format!("{found:?}");
    Err(format!(
        "the optimiser of its parameter `{}` is {}, not the text {known}",
        cut(&parameter.name),
        cut(&found)
    ))
}

/// The upper bound of the gradient's norm, if a network has its own.
pub(super) fn network_options(options: &[Attribute]) -> Result<Option<f32>, String> {
    let mut gradient_clip = None;
    for option in options {
        gradient_clip = match (option.name.as_str(), &option.value) {
            ("gradient_clip", Value::Number(norm)) if norm.is_finite() && *norm > 0.0 => {
                Some(*norm)
            }
            ("gradient_clip", value) => {
                let value = format!("{value:?}");
                return Err(format!(
                    "its network's gradient_clip is {}, not a number above 0",
                    cut(&value)
                ));
            }
            _ => return Err(unknown_option("its network", option, "`gradient_clip`")),
        };
    }
    Ok(gradient_clip)
}

/// What an output says of itself.
#[derive(Default)]
pub(super) struct OutputOptions {
    /// The node of the task's loss, in place of the host's.
    pub(super) loss: Option<u32>,
    /// The node of the task's ranking score.
    pub(super) score: Option<u32>,
    /// Whether it is the whole logit, or the value in the label's unit.
    pub(super) is_whole: bool,
}

pub(super) fn output_options(output: &Output) -> Result<OutputOptions, String> {
    let mut options = OutputOptions::default();
    let of = || format!("its output for task `{}`", cut(&output.task));
    for option in &output.options {
        match (option.name.as_str(), &option.value) {
            (name @ ("loss" | "score"), Value::Integer(node)) if u32::try_from(*node).is_ok() => {
                let chosen = if name == "loss" { &mut options.loss } else { &mut options.score };
                *chosen = Some(*node as u32);
            }
            (name @ ("loss" | "score"), value) => {
                let value = format!("{value:?}");
                return Err(format!("{} has the {name} {}, not a node", of(), cut(&value)));
            }
            ("base", Value::Text(text)) if text == NO_BASE => options.is_whole = true,
            ("base", _) => return Err(format!("the `base` of {} is not `{NO_BASE}`", of())),
            _ => return Err(unknown_option(&of(), option, "`loss`, `score` and `base`")),
        }
    }
    Ok(options)
}

fn bounded(parameter: &Parameter, option: &Attribute, most: f32) -> Result<f32, String> {
    match option.value {
        Value::Number(number) if (0.0..=most).contains(&number) => Ok(number),
        ref value => {
            let (name, value) = (cut(&parameter.name), format!("{value:?}"));
            let (what, value) = (&option.name, cut(&value));
            Err(format!(
                "the {what} of its parameter `{name}` is {value}, not a number in 0..={most}"
            ))
        }
    }
}
