//! What the model itself said of some rows, and the test that holds the expert to it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value as Json;

use super::bindings::{
    BoundColumn, BoundTask, InputBinding, OutputBinding, OutputKind, TaskOutput,
};
use crate::workspace::read;

/// A file of inputs and outputs by name, each a list of rows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordedFile {
    inputs: BTreeMap<String, Vec<Json>>,
    outputs: BTreeMap<String, Vec<Json>>,
}

/// The rows as columns of the expert, and its predictions of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    rows: usize,
    features: Vec<(String, Vec<f32>)>,
    ids: Vec<(String, Vec<u64>)>,
    tae: Vec<f32>,
    predictions: Vec<(String, Vec<f32>)>,
}

impl Recorded {
    /// # Errors
    /// The file has other inputs, outputs or sizes than the model.
    pub fn read(
        file: &Path,
        inputs: &[InputBinding],
        outputs: &[OutputBinding],
        tasks: &[TaskOutput],
    ) -> Result<Self> {
        let RecordedFile { inputs: given, outputs: said } = serde_json::from_slice(&read(file)?)?;
        let rows = given.values().map(Vec::len).max().context("it has no inputs")?;
        let (features, ids, tae) = (Vec::new(), Vec::new(), Vec::new());
        let mut recorded = Self { rows, features, ids, tae, predictions: Vec::new() };
        for InputBinding { input, columns } in inputs {
            let values = of_name(&given, input, rows)?;
            recorded.add(columns, &values).with_context(|| format!("input `{input}`"))?;
        }
        for TaskOutput { task, .. } in tasks {
            let bound = |own: &OutputBinding| {
                let mut places = own.tasks.iter().enumerate();
                let is_it = |(index, bound): (usize, &Option<BoundTask>)| {
                    bound.as_ref().filter(|bound| bound.task == *task).map(|own| (index, own.kind))
                };
                let (index, kind) = places.find_map(is_it)?;
                Some((own.output.clone(), index, kind))
            };
            let implied = || (task.clone(), 0, OutputKind::Probability);
            let (output, index, kind) = outputs.iter().find_map(bound).unwrap_or_else(implied);
            let value = |row: &Vec<f64>| {
                let value =
                    row.get(index).with_context(|| format!("output `{output}` is short"))?;
                Ok(match kind {
                    OutputKind::Probability | OutputKind::Value => *value as f32,
                    OutputKind::Logit => (1.0 / (1.0 + (-value).exp())) as f32,
                })
            };
            let values = of_name(&said, &output, rows)?;
            let values = values.iter().map(value).collect::<Result<_>>()?;
            recorded.predictions.push((task.clone(), values));
        }
        Ok(recorded)
    }

    fn add(&mut self, columns: &[BoundColumn], rows: &[Vec<f64>]) -> Result<()> {
        if columns == [BoundColumn::Tae] {
            self.tae = rows.iter().flatten().map(|value| *value as f32).collect();
            return Ok(());
        }
        let fits = rows.iter().all(|row| row.len() == columns.len());
        ensure!(fits, "its rows do not have a value for each of its columns");
        for (index, column) in columns.iter().enumerate() {
            let values = rows.iter().map(|row| row[index]);
            match column {
                BoundColumn::Feature(name) => {
                    self.features.push((name.clone(), values.map(|value| value as f32).collect()));
                }
                BoundColumn::Id(name) => {
                    self.ids.push((name.clone(), values.map(|value| value as u64).collect()));
                }
                BoundColumn::Vector(_) | BoundColumn::Tae => {
                    bail!("recorded rows can have features, ids and a whole tae")
                }
            }
        }
        Ok(())
    }

    /// The test, as Rust.
    pub fn test(&self, surface: &str) -> String {
        let line = |name: &str, values: String| format!(".features({name:?}, {values})");
        let features = self.features.iter().map(|(name, own)| line(name, format!("{own:?}")));
        let id = |id: &u64| format!("{id}u64");
        let ids = self.ids.iter().map(|(name, own)| {
            let own: Vec<String> = own.iter().map(id).collect();
            line(name, format!("[{}]", own.join(", ")))
        });
        let columns: String = features.chain(ids).collect();
        let tae = match self.tae.as_slice() {
            [] => String::new(),
            tae => format!(".tae(&{tae:?})"),
        };
        let task = |(task, values): &(String, Vec<f32>)| format!("({task:?}, vec!{values:?})");
        let tasks: Vec<String> = self.predictions.iter().map(task).collect();
        format!(
            "
#[test]
fn it_predicts_what_the_model_does() {{
    let request = TestRequest::new(1).surface({surface:?}).items(1..={rows}){columns}{tae};
    let predictions = expert().predict(&request).unwrap_or_else(|error| panic!(\"{{error}}\"));
    let model: [(&str, Vec<f32>); {count}] = [{tasks}];
    for (task, expected) in model {{
        for (row, (found, expected)) in predictions[task].iter().zip(&expected).enumerate() {{
            let allowed = 1e-5 * expected.abs().max(1.0);
            let off = (found - expected).abs();
            assert!(off <= allowed, \"{{task}}, row {{row}}: {{found}}, not {{expected}}\");
        }}
    }}
}}
",
            rows = self.rows,
            count = tasks.len(),
            tasks = tasks.join(", "),
        )
    }
}

/// The numbers of each row.
fn of_name(values: &BTreeMap<String, Vec<Json>>, name: &str, rows: usize) -> Result<Vec<Vec<f64>>> {
    let own = values.get(name).with_context(|| format!("it lacks `{name}`"))?;
    ensure!(own.len() == rows, "`{name}` has {} rows, and others {rows}", own.len());
    own.iter().map(|row| numbers(row).with_context(|| format!("`{name}`"))).collect()
}

fn numbers(row: &Json) -> Result<Vec<f64>> {
    match row {
        Json::Number(number) => Ok(vec![number.as_f64().context("a number that is too large")?]),
        Json::Array(parts) => {
            let parts = parts.iter().map(numbers).collect::<Result<Vec<_>>>()?;
            Ok(parts.concat())
        }
        other => bail!("{other} is no number"),
    }
}
