//! Checks of components before any of their code runs, and of what guests return. Each check
//! returns the rule that was broken.

use std::collections::HashSet;

use wasmtime::component::Component;

use super::column::ColumnReader;
use super::contract::{
    self, Column, Contract, Description, HostInfo, MAX_FACTOR, Ranked, TEXT_BYTES, Task,
    TaskLabels, TaskWeights, Verdict, quote,
};
use super::engine::Engine;
use crate::Error;

const COLUMNS: usize = 1024;
const TASKS: usize = 64;
const HISTORY: u32 = 4096;

/// Checks a component's size in bytes.
pub(super) fn size(name: &str, size: u64, limit: usize) -> Result<(), Error> {
    let why = || format!("the file has {size} bytes, more than the limit of {limit}");
    if size > limit as u64 { Err(Error::refused(name, why())) } else { Ok(()) }
}

/// Checks that the file is a component.
pub(super) fn header(name: &str, bytes: &[u8]) -> Result<(), Error> {
    let why = match bytes {
        [0, b'a', b's', b'm', 0x0d, 0, 1, 0, ..] => return Ok(()),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => {
            "it is a core Wasm module, not a component: build it with `cargo hypercast build`"
        }
        _ => "it is not a WebAssembly file",
    };
    Err(Error::refused(name, why))
}

/// Checks that the component imports an expert contract that this host speaks, and nothing else but
/// `log`; returns the contract.
pub(super) fn imports(
    name: &str,
    engine: &Engine,
    component: &Component,
) -> Result<Contract, Error> {
    let ty = component.component_type();
    let mut foreign = Vec::new();
    let mut version = None;
    for (import, _) in ty.imports(&engine.inner.engine) {
        match import.strip_prefix(contract::TYPES_IMPORT) {
            Some(found) => version = Some(found.to_owned()),
            None if import == "log" => {}
            None => foreign.push(format!("`{import}`")),
        }
    }
    let Some(version) = version else {
        let why = "it does not import the expert contract's types: it is no HyperCast expert; \
                   build it with the HyperCast SDK";
        return Err(Error::refused(name, why));
    };
    let Some(contract) = Contract::of(&version) else {
        return Err(Error::ContractVersion { plugin: name.to_owned(), found: version });
    };
    if !foreign.is_empty() {
        let why =
            format!("it imports {}; an expert may import nothing but `log`", foreign.join(", "));
        return Err(Error::refused(name, why));
    }
    Ok(contract)
}

pub(super) fn description(description: &Description, info: &HostInfo) -> Result<(), String> {
    let d = description;
    refuse_if!(
        d.name.is_empty() || d.name.len() > TEXT_BYTES || d.version.len() > TEXT_BYTES,
        "its description's name or version is empty or longer than {TEXT_BYTES} bytes"
    );
    if let Some(surface) = d.surfaces.iter().find(|surface| !info.surfaces.contains(surface)) {
        let known = info.surfaces.join("`, `");
        return Err(format!(
            "it serves surface `{}`, which the schema lacks (it has `{known}`)",
            quote(surface)
        ));
    }
    tasks(&d.tasks)?;
    let lists = [
        (ColumnReader::Network, &d.columns),
        (ColumnReader::Rank, &d.rank_columns),
        (ColumnReader::Hooks, &d.training_columns),
    ];
    refuse_if!(
        lists.iter().any(|(_, columns)| columns.len() > COLUMNS),
        "it declares more than {COLUMNS} columns"
    );
    refuse_if!(
        d.history_len > HISTORY,
        "its history-len of {} is more than {HISTORY}",
        d.history_len
    );
    for (reader, columns) in lists {
        for column in columns {
            column.check_reader(reader)?;
            refuse_if!(
                matches!(column, Column::Tae | Column::FmLogit(_)) && info.tae_dim == 0,
                "it declares the {}, but there is no foundation model",
                column.label()
            );
            column.index_in(info)?;
        }
    }
    Ok(())
}

fn tasks(tasks: &[Task]) -> Result<(), String> {
    refuse_if!(
        tasks.is_empty() || tasks.len() > TASKS,
        "it declares {} tasks; 1 to {TASKS} are allowed",
        tasks.len()
    );
    let mut names = HashSet::new();
    for Task { name, .. } in tasks {
        let is_new = !name.is_empty() && names.insert(name);
        refuse_if!(!is_new, "its task `{}` is nameless or declared twice", quote(name));
    }
    Ok(())
}

pub(super) fn ranked(ranked: &[Ranked], candidates: usize, limit: usize) -> Result<(), String> {
    refuse_if!(
        ranked.len() > limit,
        "{} ranked candidates, but at most {limit} were asked for",
        ranked.len()
    );
    refuse_if!(ranked.is_empty() && limit > 0, "no ranked candidate of {candidates}");
    let mut seen = vec![false; candidates];
    for entry in ranked {
        let index = entry.candidate as usize;
        refuse_if!(index >= candidates, "candidate index {index} of {candidates} candidates");
        refuse_if!(std::mem::replace(&mut seen[index], true), "candidate index {index} twice");
        refuse_if!(!entry.score.is_finite(), "score {} for candidate index {index}", entry.score);
        let propensity = entry.propensity.unwrap_or(1.0);
        refuse_if!(
            !(propensity > 0.0 && propensity <= 1.0),
            "propensity {propensity} for candidate index {index}; one is above 0 and at most 1"
        );
    }
    Ok(())
}

/// Checks the labels and returns them in the order of `tasks`.
pub(super) fn labels(
    mut labels: Vec<TaskLabels>,
    tasks: &[Task],
    rows: usize,
) -> Result<Vec<TaskLabels>, String> {
    let mut ordered = Vec::with_capacity(tasks.len());
    for task in tasks {
        let name = &task.name;
        let at = labels.iter().position(|entry| entry.task == *name);
        let entry = labels.swap_remove(at.ok_or_else(|| format!("no labels for task `{name}`"))?);
        let (l, m, w) = (entry.labels.len(), entry.mask.len(), entry.weights.len());
        refuse_if!(
            l != rows || m != rows || ![0, rows].contains(&w),
            "task `{name}`: {l} labels, {m} masks and {w} weights for {rows} examples"
        );
        for row in (0..rows).filter(|row| entry.mask[*row] != 0) {
            let (label, weight) = (entry.labels[row], entry.weights.get(row).unwrap_or(&1.0));
            refuse_if!(
                !label.is_finite() || !weight.is_finite() || *weight < 0.0,
                "task `{name}`, example {row}: label {label} with weight {weight}"
            );
        }
        ordered.push(entry);
    }
    match labels.first() {
        Some(extra) => Err(format!(
            "labels for task `{}`, which its description lacks or repeats",
            quote(&extra.task)
        )),
        None => Ok(ordered),
    }
}

/// Checks factors of weights and returns them in the order of `tasks`; none for a task without an
/// entry.
pub(super) fn weights(
    mut weights: Vec<TaskWeights>,
    tasks: &[Task],
    rows: usize,
) -> Result<Vec<Vec<f32>>, String> {
    let mut ordered = Vec::with_capacity(tasks.len());
    for Task { name, .. } in tasks {
        let at = weights.iter().position(|entry| entry.task == *name);
        let own = at.map_or_else(Vec::new, |at| weights.swap_remove(at).weights);
        refuse_if!(
            at.is_some() && own.len() != rows,
            "task `{name}`: {} weights for {rows} examples",
            own.len()
        );
        if let Some(row) = own.iter().position(|own| !own.is_finite() || *own < 0.0) {
            return Err(format!("task `{name}`, example {row}: weight {}", own[row]));
        }
        ordered.push(own);
    }
    match weights.first() {
        Some(extra) => Err(format!(
            "weights for task `{}`, which its description lacks or repeats",
            quote(&extra.task)
        )),
        None => Ok(ordered),
    }
}

pub(super) fn sample(keep: Vec<f32>, rows: usize) -> Result<Vec<f32>, String> {
    if keep.is_empty() {
        return Ok(vec![1.0; rows]);
    }
    refuse_if!(keep.len() != rows, "{} keep probabilities for {rows} examples", keep.len());
    match keep.iter().find(|p| !(0.0..=1.0).contains(*p)) {
        Some(p) => Err(format!("keep probability {p} outside 0..=1")),
        None => Ok(keep),
    }
}

pub(super) fn factor(factor: f32) -> Result<f32, String> {
    refuse_if!(
        !(0.0..=MAX_FACTOR).contains(&factor),
        "learning-rate factor {factor} outside 0..={MAX_FACTOR}"
    );
    Ok(factor)
}

pub(super) fn score(score: Option<f64>) -> Result<Option<f64>, String> {
    match score {
        Some(number) if !number.is_finite() => Err(format!("the score {number}")),
        score => Ok(score),
    }
}

/// The verdict with its reason made fit for a message.
pub(super) fn verdict(verdict: Verdict) -> Verdict {
    let reason = |why: String| match why.trim() {
        "" => "it gave no reason".to_owned(),
        why => quote(why),
    };
    match verdict {
        Verdict::Publish => Verdict::Publish,
        Verdict::Hold(why) => Verdict::Hold(reason(why)),
        Verdict::RollBack(why) => Verdict::RollBack(reason(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_propensity_is_a_probability_of_what_has_happened() {
        let with = |propensity| ranked(&[Ranked { candidate: 0, score: 1.0, propensity }], 1, 1);
        for good in [None, Some(f32::MIN_POSITIVE), Some(0.5), Some(1.0)] {
            assert_eq!(with(good), Ok(()));
        }
        for bad in [f32::NAN, 0.0, -0.1, 1.0 + f32::EPSILON, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(
                with(Some(bad)).is_err_and(|why| why.contains("above 0 and at most 1")),
                "{bad}"
            );
        }
    }
}
