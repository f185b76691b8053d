//! Checks of what a guest returned: each answers with the rule that was broken.

use std::collections::HashSet;

use super::contract::{Column, Description, HostInfo, Ranked, Task, TaskLabels, Verdict};

/// Names longer than this are refused, and quoted text is cut here.
const TEXT_BYTES: usize = 256;
const COLUMNS: usize = 1024;
const TASKS: usize = 64;
const HISTORY: u32 = 4096;
/// The most by which a step's learning rate may be multiplied.
const FACTOR: f32 = 10.0;

/// A guest's own words, cut to a length that suits a message.
pub(super) fn quote(text: &str) -> String {
    let end = text.floor_char_boundary(TEXT_BYTES);
    let cut = if end < text.len() { "..." } else { "" };
    format!("{}{cut}", text[..end].escape_debug())
}

pub(super) fn description(description: &Description, info: &HostInfo) -> Result<(), String> {
    let d = description;
    if d.name.is_empty() || d.name.len() > TEXT_BYTES || d.version.len() > TEXT_BYTES {
        return Err(format!(
            "its description's name or version is empty or longer than {TEXT_BYTES} bytes"
        ));
    }
    if let Some(surface) = d.surfaces.iter().find(|surface| !info.surfaces.contains(surface)) {
        let known = info.surfaces.join("`, `");
        return Err(format!(
            "it serves surface `{}`, which the schema lacks (it has `{known}`)",
            quote(surface)
        ));
    }
    tasks(&d.tasks)?;
    if d.columns.len() > COLUMNS || d.rank_columns.len() > COLUMNS {
        return Err(format!("it declares more than {COLUMNS} columns"));
    }
    if d.history_len > HISTORY {
        return Err(format!("its history-len of {} is more than {HISTORY}", d.history_len));
    }
    for column in &d.columns {
        column_exists(column, info)?;
    }
    for column in &d.rank_columns {
        if matches!(column, Column::HistoryId(_) | Column::HistoryActions | Column::HistoryAge) {
            return Err(format!(
                "its rank-columns hold {}; `rank` reads tae, feature and id columns only",
                column.label()
            ));
        }
        column_exists(column, info)?;
    }
    Ok(())
}

fn tasks(tasks: &[Task]) -> Result<(), String> {
    if tasks.is_empty() || tasks.len() > TASKS {
        return Err(format!("it declares {} tasks; 1 to {TASKS} are allowed", tasks.len()));
    }
    let mut names = HashSet::new();
    match tasks.iter().find(|task| task.name.is_empty() || !names.insert(task.name.as_str())) {
        Some(task) => {
            Err(format!("its task `{}` is nameless or declared twice", quote(&task.name)))
        }
        None => Ok(()),
    }
}

fn column_exists(column: &Column, info: &HostInfo) -> Result<(), String> {
    let (name, known) = match column {
        Column::Tae if info.tae_dim == 0 => {
            return Err("it declares the tae, but there is no foundation model".into());
        }
        Column::Tae | Column::HistoryActions | Column::HistoryAge => return Ok(()),
        Column::Feature(name) => (name, &info.features),
        Column::Id(name) => (name, &info.ids),
        Column::HistoryId(name) => (name, &info.history_ids),
    };
    if known.contains(name) {
        return Ok(());
    }
    let kind = match column {
        Column::Feature(_) => "feature",
        Column::Id(_) => "id",
        _ => "history-id",
    };
    Err(format!(
        "it declares {kind} column `{}`, which the schema lacks (it has `{}`)",
        quote(name),
        known.join("`, `")
    ))
}

pub(super) fn ranked(ranked: &[Ranked], candidates: usize, limit: usize) -> Result<(), String> {
    if ranked.len() > limit {
        return Err(format!(
            "{} ranked candidates, but at most {limit} were asked for",
            ranked.len()
        ));
    }
    if ranked.is_empty() && limit > 0 {
        return Err(format!("no ranked candidate of {candidates}"));
    }
    let mut seen = vec![false; candidates];
    for entry in ranked {
        let index = entry.candidate as usize;
        match seen.get_mut(index) {
            None => {
                return Err(format!("candidate index {index} of {candidates} candidates"));
            }
            Some(true) => return Err(format!("candidate index {index} twice")),
            Some(seen) => *seen = true,
        }
        if !entry.score.is_finite() {
            return Err(format!("score {} for candidate index {index}", entry.score));
        }
    }
    Ok(())
}

/// Checks the labels and brings them into the order of `tasks`.
pub(super) fn labels(
    mut labels: Vec<TaskLabels>,
    tasks: &[Task],
    rows: usize,
) -> Result<Vec<TaskLabels>, String> {
    let mut ordered = Vec::with_capacity(tasks.len());
    for task in tasks {
        let name = &task.name;
        let Some(at) = labels.iter().position(|entry| entry.task == *name) else {
            return Err(format!("no labels for task `{name}`"));
        };
        let entry = labels.swap_remove(at);
        if entry.labels.len() != rows
            || entry.mask.len() != rows
            || ![0, rows].contains(&entry.weights.len())
        {
            let (l, m, w) = (entry.labels.len(), entry.mask.len(), entry.weights.len());
            return Err(format!(
                "task `{name}`: {l} labels, {m} masks and {w} weights for {rows} examples"
            ));
        }
        for row in (0..rows).filter(|row| entry.mask[*row] != 0) {
            let weight = entry.weights.get(row).copied().unwrap_or(1.0);
            if !entry.labels[row].is_finite() || !weight.is_finite() || weight < 0.0 {
                let label = entry.labels[row];
                return Err(format!(
                    "task `{name}`, example {row}: label {label} with weight {weight}"
                ));
            }
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

pub(super) fn sample(keep: Vec<f32>, rows: usize) -> Result<Vec<f32>, String> {
    if keep.is_empty() {
        return Ok(vec![1.0; rows]);
    }
    if keep.len() != rows {
        return Err(format!("{} keep probabilities for {rows} examples", keep.len()));
    }
    match keep.iter().find(|p| !(0.0..=1.0).contains(*p)) {
        Some(p) => Err(format!("keep probability {p} outside 0..=1")),
        None => Ok(keep),
    }
}

pub(super) fn factor(factor: f32) -> Result<f32, String> {
    match (0.0..=FACTOR).contains(&factor) {
        true => Ok(factor),
        false => Err(format!("learning-rate factor {factor} outside 0..={FACTOR}")),
    }
}

/// A verdict whose reason suits a message.
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
