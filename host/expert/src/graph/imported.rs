//! Options of networks that were trained elsewhere: values that parameters begin with, and outputs
//! that need no base rate and no scale.

use std::sync::Arc;

use super::validate::{cut, parameter_elements};
use crate::wasm::contract::{Output, Parameter, Task, Value, unknown_option};

/// The one value of an output's option `base`.
const NO_BASE: &str = "none";

/// What a parameter begins with by its option `values`. The limit of a call's output bounds it.
pub(super) fn initial_values(parameter: &Parameter) -> Result<Option<Arc<Vec<f32>>>, String> {
    let Some(option) = parameter.options.iter().find(|option| option.name == "values") else {
        return Ok(None);
    };
    let (name, shape) = (&parameter.name, &parameter.shape);
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
    Ok(Some(Arc::new(values.clone())))
}

/// Of each task, whether its output is whole.
///
/// # Errors
/// An output has an option or a base that this host does not know.
pub(super) fn whole_outputs(tasks: &[Task], outputs: &[Output]) -> Result<Vec<bool>, String> {
    let of_task = |task: &Task| {
        let output = outputs.iter().find(|output| output.task == task.name);
        output.map_or(Ok(false), is_whole)
    };
    tasks.iter().map(of_task).collect()
}

/// Whether an output is the whole logit, or the value in the label's unit, by its option `base`.
fn is_whole(output: &Output) -> Result<bool, String> {
    let of = || format!("its output for task `{}`", cut(&output.task));
    for option in &output.options {
        match (option.name.as_str(), &option.value) {
            ("base", Value::Text(text)) if text == NO_BASE => {}
            ("base", _) => return Err(format!("the `base` of {} is not `{NO_BASE}`", of())),
            _ => return Err(unknown_option(&of(), option, "`base`")),
        }
    }
    Ok(!output.options.is_empty())
}
