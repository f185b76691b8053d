//! The options of a network, its outputs and parameters, by name. One that the host does not know
//! is refused: it would train something else than what was described.

use super::validate::cut;
use super::{ParameterOptimiser, ParameterSpec};
use crate::wasm::contract::{Attribute, MAX_FACTOR, Output, Parameter, Value, unknown_option};

/// The largest weight decay, as a share of a parameter for each unit of learning rate.
const MAX_DECAY: f32 = 10.0;

/// What a parameter says of itself, before it is known how it is read: no shape, and the optimiser
/// of a dense one.
pub(super) fn parameter_spec(parameter: &Parameter) -> Result<ParameterSpec, String> {
    let (mut rate_factor, mut weight_decay) = (1.0, None);
    for option in &parameter.options {
        match option.name.as_str() {
            "rate_factor" => rate_factor = bounded(parameter, option, MAX_FACTOR)?,
            "weight_decay" => weight_decay = Some(bounded(parameter, option, MAX_DECAY)?),
            "optimiser" => {}
            _ => {
                let known = "`rate_factor`, `weight_decay` and `optimiser`";
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
    })
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

/// The node of a task's loss, if its output has one.
pub(super) fn output_loss(output: &Output) -> Result<Option<u32>, String> {
    let mut loss = None;
    for option in &output.options {
        let of = || format!("its output for task `{}`", cut(&output.task));
        loss = match (option.name.as_str(), &option.value) {
            ("loss", Value::Integer(node)) if u32::try_from(*node).is_ok() => Some(*node as u32),
            ("loss", value) => {
                let value = format!("{value:?}");
                return Err(format!("{} has the loss {}, not a node", of(), cut(&value)));
            }
            _ => return Err(unknown_option(&of(), option, "`loss`")),
        };
    }
    Ok(loss)
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
