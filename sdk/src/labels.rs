//! The default training labels: the label of each task is an action or a value. And weights.

use crate::raw::types::{ActionBatch, HostInfo, Task, TaskKind, TaskLabels, TaskWeights};

/// Makes labels as the host's schema defines them.
///
/// The label of a binary task is the bit of its action; it counts where that bit is known. The
/// label of a regression is its value; it counts where the value is not NaN. Both count only on the
/// surfaces for which the schema declares the task. A task that the schema does not declare uses
/// the action or value of the task's own name.
///
/// # Errors
/// The schema has no such action or value.
pub fn from_schema(
    tasks: &[Task],
    info: &HostInfo,
    batch: &ActionBatch,
) -> Result<Vec<TaskLabels>, String> {
    tasks.iter().map(|task| task_labels(task, info, batch)).collect()
}

fn task_labels(task: &Task, info: &HostInfo, batch: &ActionBatch) -> Result<TaskLabels, String> {
    let schema = info.tasks.iter().find(|t| t.name == task.name);
    let label = schema.map_or(task.name.as_str(), |t| &t.label);
    let missing = |what, names: &[String]| {
        format!(
            "labels: the label of task `{}` is {what} `{label}`, which the schema does not have; it has: {}. Name one of these, or implement `Expert::labels`",
            task.name,
            names.join(", ")
        )
    };
    let (labels, mut mask): (Vec<f32>, Vec<u8>) = match task.kind {
        TaskKind::Binary => {
            let bit = info.actions.iter().position(|a| a == label);
            let bit = bit.ok_or_else(|| missing("action", &info.actions))?;
            let is_set = |bits: u64| u8::from(bits >> bit & 1 == 1);
            let pair = |(&actions, &known)| (f32::from(is_set(actions)), is_set(known));
            batch.actions.iter().zip(&batch.known).map(pair).unzip()
        }
        TaskKind::Regression => {
            let values = batch.values.iter().find(|v| v.name == label);
            let values = values.ok_or_else(|| missing("value", &info.values))?;
            let pair = |&v: &f32| if v.is_nan() { (0.0, 0) } else { (v, 1) };
            values.values.iter().map(pair).unzip()
        }
    };
    if let Some(task) = schema.filter(|task| !task.surfaces.is_empty()) {
        for (mask, &surface) in mask.iter_mut().zip(&batch.surface) {
            let name = info.surfaces.get(surface as usize);
            *mask *= u8::from(name.is_some_and(|name| task.surfaces.contains(name)));
        }
    }
    Ok(TaskLabels { task: task.name.clone(), labels, mask, weights: Vec::new() })
}

impl ActionBatch {
    /// The labels of a binary task: 1 where a value of the outcome is at least the row's threshold,
    /// which `threshold` gives by the row. A row counts where the value is known and the threshold
    /// is a number.
    ///
    /// # Errors
    /// The schema has no such value.
    pub fn at_least(
        &self,
        task: &str,
        value: &str,
        threshold: impl Fn(usize) -> f32,
    ) -> Result<TaskLabels, String> {
        let known = self.values.iter().find(|own| own.name == value);
        let values = known.ok_or_else(|| format!("the schema has no value `{value}`"))?;
        let rows = values.values.iter().enumerate().map(|(row, value)| (*value, threshold(row)));
        let of_row = |(value, threshold): (f32, f32)| {
            let counts = !value.is_nan() && !threshold.is_nan();
            (f32::from(u8::from(value >= threshold)), u8::from(counts))
        };
        let (labels, mask) = rows.map(of_row).unzip();
        Ok(TaskLabels { task: task.into(), labels, mask, weights: Vec::new() })
    }

    /// The weights of some tasks, all with that of each row: `weight` is called with the row.
    pub fn weighted(&self, tasks: &[Task], weight: impl Fn(usize) -> f32) -> Vec<TaskWeights> {
        let weights: Vec<f32> = (0..self.surface.len()).map(weight).collect();
        let of = |task: &Task| TaskWeights { task: task.name.clone(), weights: weights.clone() };
        tasks.iter().map(of).collect()
    }
}
