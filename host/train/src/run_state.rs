//! A saved FM training run: where it stands in its stream, beside the trainer's
//! own state.
//!
//! `fm_work/saved/` holds `trainer/` (see `hypercast_fm::trainer`), `run.toml`
//! (the place in the stream, and what must not change meanwhile) and
//! `progressive.parquet` (the predictions that the report is made of). It is
//! replaced as a whole. Features are not in it: they are rebuilt from the data
//! set, without the FM.

use std::path::{Path, PathBuf};

use hypercast_core::{atomic_dir, atomic_file};
use hypercast_fm::{
    metrics::{MetricsWindow, ScoredPrediction, ScoredValue},
    spec::FmSpec,
    trainer::FmTrainer,
};
use serde::{Deserialize, Serialize};

use super::report::ProgressiveCollector;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, Logs, differing_keys, value_at};
use hypercast_data::dataset::{
    Dataset,
    table::{CellType, Column, ColumnValues, Field, TableReader, TableWriter},
};
use hypercast_data::features::FeatureConfig;

const FORMAT: u32 = 1;

const ROWS_A_GROUP: usize = 1 << 16;

/// The predictions of regressions.
const VALUES_FILE: &str = "progressive-values.parquet";

/// What a run goes through, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RunPhase {
    /// Examples made of mere history.
    #[default]
    Pretraining,
    /// The requests.
    Stream,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct RunPosition {
    pub(super) phase: RunPhase,
    /// Examples of the phase that were learned from.
    pub(super) done: u64,
    /// Requests and rows of all phases.
    pub(super) requests: u64,
    pub(super) rows: u64,
    /// Rows in the logs, which end with a complete file.
    pub(super) logged_rows: u64,
    pub(super) log_files: u32,
}

/// The content of `run.toml`.
#[derive(Debug, Serialize, Deserialize)]
struct RunState {
    format: u32,
    place: RunPosition,
    conditions: Conditions,
}

/// What a run is resumed with as it was begun with, besides what the trainer checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Conditions {
    dataset: DatasetConditions,
    logs: Logs,
    features: FeatureConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct DatasetConditions {
    rows: u64,
    items: u64,
    users: u64,
    until_ms: Option<i64>,
}

/// What a run is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Over<'a> {
    pub(super) dataset: &'a Dataset,
    pub(super) config: &'a Config,
    pub(super) until_ms: Option<i64>,
}

impl Over<'_> {
    fn conditions(&self) -> Conditions {
        Conditions {
            dataset: DatasetConditions {
                rows: self.dataset.rows as u64,
                items: self.dataset.items.len() as u64,
                users: self.dataset.users.len() as u64,
                until_ms: self.until_ms,
            },
            logs: self.config.logs.clone(),
            features: self.config.features,
        }
    }

    fn dir(&self) -> PathBuf {
        self.config.paths.fm_work.join("saved")
    }

    /// The trainer's part of a saved run.
    pub(super) fn trainer_dir(&self) -> PathBuf {
        self.dir().join("trainer")
    }

    /// Saves a run at a place.
    pub(super) fn save(
        &self,
        place: RunPosition,
        trainer: &mut dyn FmTrainer,
        collector: &ProgressiveCollector,
    ) -> Result<()> {
        let saved = RunState { format: FORMAT, place, conditions: self.conditions() };
        atomic_dir::replace(&self.dir(), |draft| {
            trainer.save(&draft.join("trainer"))?;
            write_collector(collector, &draft.join("progressive.parquet"))?;
            write_values(collector, &draft.join(VALUES_FILE))?;
            let path = draft.join("run.toml");
            let text = toml::to_string_pretty(&saved)
                .map_err(|error| Error::data(&path, error.to_string()))?;
            atomic_file::write(&path, text.as_bytes()).map_err(Error::io(&path))
        })
    }

    /// Where the saved run stands, and what it predicted so far.
    pub(super) fn load(&self, spec: &FmSpec) -> Result<(RunPosition, ProgressiveCollector)> {
        let dir = self.dir();
        atomic_dir::recover(&dir)?;
        let path = dir.join("run.toml");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            let advice = "no run is saved here; train without --resume (fm.save_every_requests sets how often a run is saved)";
            Error::data(&path, format!("{error}; {advice}"))
        })?;
        let saved: RunState =
            toml::from_str(&text).map_err(|error| Error::data(&path, error.to_string()))?;
        if saved.format != FORMAT {
            let reason = format!("format {}, this build reads {FORMAT}; train anew", saved.format);
            return Err(Error::data(&path, reason));
        }
        if let Some(difference) = difference(&saved.conditions, &self.conditions()) {
            let advice = "a run is resumed as it was begun: put it back, or train without --resume";
            return Err(Error::data(&path, format!("{difference}; {advice}")));
        }
        let mut collector = read_collector(spec, &dir.join("progressive.parquet"))?;
        let values = dir.join(VALUES_FILE);
        // A run of before regressions were reported has none.
        if values.exists() {
            read_values(&mut collector, &values)?;
        }
        Ok((saved.place, collector))
    }
}

/// The first key whose values differ, in words.
fn difference(saved: &Conditions, now: &Conditions) -> Option<String> {
    let table = |of: &Conditions| toml::Table::try_from(of).expect("plain values");
    let (saved, now) = (table(saved), table(now));
    let [part, key] = differing_keys(&saved, &now).into_iter().next()?;
    let show = |of| value_at(of, &part, &key).map_or("none".into(), toml::Value::to_string);
    Some(format!("{part}.{key} was {} and is {} now", show(&saved), show(&now)))
}

fn fields() -> Vec<Field> {
    [
        ("truth", CellType::Bool),
        ("surface", CellType::U32),
        ("task", CellType::U32),
        ("user", CellType::U64),
        ("probability", CellType::F32),
        ("label", CellType::Bool),
    ]
    .map(|(name, kind)| Field::new(name, kind))
    .to_vec()
}

/// A kept prediction: of the truth or of the model, surface and task, and the row.
type KeptRows = (bool, (usize, usize), ScoredPrediction);

fn write_collector(collector: &ProgressiveCollector, path: &Path) -> Result<()> {
    let of = |keeper: &MetricsWindow<(usize, usize)>, truth: bool| -> Vec<KeptRows> {
        keeper.rows().map(|(&slice, row)| (truth, slice, *row)).collect()
    };
    let mut kept = of(&collector.said, false);
    kept.extend(of(&collector.truth, true));
    let mut writer = TableWriter::create(path, fields())?;
    for rows in kept.chunks(ROWS_A_GROUP) {
        let u32s = |get: &dyn Fn(&KeptRows) -> usize| {
            ColumnValues::U32(rows.iter().map(|row| get(row) as u32).collect())
        };
        let bools =
            |get: &dyn Fn(&KeptRows) -> bool| ColumnValues::Bool(rows.iter().map(get).collect());
        let columns = [
            bools(&|row| row.0),
            u32s(&|row| row.1.0),
            u32s(&|row| row.1.1),
            ColumnValues::U64(rows.iter().map(|row| row.2.user).collect()),
            ColumnValues::F32(rows.iter().map(|row| row.2.probability).collect()),
            bools(&|row| row.2.label),
        ];
        writer.write(&columns.map(|values| Column { values, offsets: None }))?;
    }
    Ok(writer.finish()?)
}

fn read_collector(spec: &FmSpec, path: &Path) -> Result<ProgressiveCollector> {
    let mut collector = ProgressiveCollector::new(spec);
    let reader = TableReader::open(path)?;
    for group in 0..reader.groups() {
        let columns = reader.read(group, &fields())?;
        for (row, &truth) in columns[0].bools().iter().enumerate() {
            let at = |column: usize| columns[column].u32s()[row] as usize;
            let scored = ScoredPrediction {
                user: columns[3].u64s()[row],
                probability: columns[4].f32s()[row],
                label: columns[5].bools()[row],
            };
            let window = if truth { &mut collector.truth } else { &mut collector.said };
            window.push((at(1), at(2)), scored);
        }
    }
    Ok(collector)
}

fn value_fields() -> Vec<Field> {
    let kinds = [CellType::U32, CellType::U32, CellType::F32, CellType::F32];
    let names = ["surface", "task", "prediction", "label"];
    names.into_iter().zip(kinds).map(|(name, kind)| Field::new(name, kind)).collect()
}

fn write_values(collector: &ProgressiveCollector, path: &Path) -> Result<()> {
    let kept: Vec<_> = collector.said.values().collect();
    let mut writer = TableWriter::create(path, value_fields())?;
    for rows in kept.chunks(ROWS_A_GROUP) {
        let columns = [
            ColumnValues::U32(rows.iter().map(|(slice, _)| slice.0 as u32).collect()),
            ColumnValues::U32(rows.iter().map(|(slice, _)| slice.1 as u32).collect()),
            ColumnValues::F32(rows.iter().map(|(_, row)| row.prediction).collect()),
            ColumnValues::F32(rows.iter().map(|(_, row)| row.label).collect()),
        ];
        writer.write(&columns.map(|values| Column { values, offsets: None }))?;
    }
    Ok(writer.finish()?)
}

fn read_values(collector: &mut ProgressiveCollector, path: &Path) -> Result<()> {
    let reader = TableReader::open(path)?;
    for group in 0..reader.groups() {
        let columns = reader.read(group, &value_fields())?;
        for row in 0..columns[2].f32s().len() {
            let at = |column: usize| columns[column].u32s()[row] as usize;
            let [prediction, label] = [2, 3].map(|column| columns[column].f32s()[row]);
            collector.said.push_value((at(0), at(1)), ScoredValue { prediction, label });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_named() {
        let conditions = Conditions {
            dataset: DatasetConditions { rows: 5, items: 2, users: 1, until_ms: None },
            logs: Logs::default(),
            features: FeatureConfig::default(),
        };
        assert_eq!(difference(&conditions, &conditions), None);
        let mut other = conditions.clone();
        other.logs.history_len = 3;
        let said = difference(&conditions, &other).unwrap();
        assert!(said.contains("logs.history_len was 32 and is 3 now"), "{said}");
        let mut other = conditions.clone();
        other.dataset.until_ms = Some(7);
        let said = difference(&conditions, &other).unwrap();
        assert!(said.contains("dataset.until_ms was none and is 7 now"), "{said}");
    }
}
