//! The FM's phase of an evaluation: the FM over the stream, its TAEs into feature logs, its own
//! predictions into a table beside them.
//!
//! Its files in the work folder are all that the experts' phase needs, so a later run with other
//! expert settings can reuse them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_config::Logs;
use hypercast_core::{atomic_dir, atomic_file};
use hypercast_data::{
    dataset::table::{CellType, Column, Field, TableReader, TableWriter},
    features::FeatureConfig,
    schema::{MainTasks, Schema, SurfaceAlignment, Task},
};
use hypercast_fm::{
    spec::{FmConfig, FmSpec},
    trainer,
};
use hypercast_train::fm::dataset_spec;
use serde::{Deserialize, Serialize};

use super::{
    scores::{EvaluationScores, ScoredImpression},
    stream::{DatasetStream, StreamBatch, TargetRow, TestMode, targets},
};
use crate::{
    demo::replay::{BaseRates, PredictionArm},
    error::{CommonErrors as _, Error, Result},
};

/// The settings of an FM phase. Phases with equal settings write equal files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmPhaseKey {
    mode: TestMode,
    test_from_ms: i64,
    rows: usize,
    fm: FmConfig,
    logs: Logs,
    features: FeatureConfig,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    alignment: BTreeMap<String, SurfaceAlignment>,
}

impl FmPhaseKey {
    /// The settings of a phase over this stream.
    pub fn new(stream: &DatasetStream<'_>) -> Self {
        Self {
            mode: stream.mode,
            test_from_ms: stream.window.test_from_ms,
            rows: stream.dataset.rows,
            fm: stream.config.fm.clone(),
            logs: stream.config.logs.clone(),
            features: stream.config.features,
            alignment: stream.dataset.schema.alignment.clone(),
        }
    }

    fn path(work: &Path) -> PathBuf {
        work.join("fm-phase.json")
    }

    /// Checks that an earlier run in `work` had the same settings.
    ///
    /// # Errors
    /// No earlier run, or one with other settings, which are named.
    pub fn check(&self, work: &Path) -> Result<()> {
        let path = Self::path(work);
        let advice = "run once without --skip-fm";
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::data(&path, format!("no FM phase to reuse ({error}); {advice}"))
        })?;
        let parse = |error: serde_json::Error| Error::data(&path, format!("{error}; {advice}"));
        let left: serde_json::Value = serde_json::from_str(&text).map_err(parse)?;
        // Through text like the file: a 32-bit float reads back as another number than it casts to.
        let own = serde_json::to_string(self).and_then(|text| serde_json::from_str(&text));
        let own: serde_json::Value = own.map_err(parse)?;
        let keys = [&own, &left].into_iter().filter_map(|key| key.as_object());
        // A field that is empty is left out.
        let names: BTreeSet<&str> = keys.flat_map(|key| key.keys().map(String::as_str)).collect();
        let is_other = |name: &&str| left.get(name) != own.get(name);
        let other: Vec<&str> = names.into_iter().filter(is_other).collect();
        if other.is_empty() {
            return Ok(());
        }
        let what = format!("the earlier FM phase differs in {}; {advice}", other.join(", "));
        Err(Error::data(&path, what))
    }
}

/// Runs the phase and writes its results into `work`.
///
/// # Errors
/// A data set, configuration or device that cannot be used; a full disk.
pub fn run(stream: &DatasetStream<'_>, work: &Path) -> Result<()> {
    let config = stream.config;
    let key_path = FmPhaseKey::path(work);
    if key_path.exists() {
        std::fs::remove_file(&key_path).map_err(Error::io(&key_path))?;
    }
    let spec = dataset_spec(stream.dataset)?;
    atomic_dir::remove(&config.paths.fm_work)?;
    let mut trainer = trainer::create(&config.paths.fm_work, &config.fm, &spec, config.device)?;
    let mut table = FmPredictionTable::create(stream, &spec, work)?;
    let main_tasks = MainTasks::new(&stream.dataset.schema);
    stream.log("FM", &[config.fm.tae_width()], None, |part, _| {
        let output = part.through(trainer.as_mut(), &|_| true)?;
        if !part.history_only {
            table.push(part, &output.predictions)?;
        }
        Ok(vec![main_tasks.output(&spec, output.served(&spec))])
    })?;
    table.finish()?;
    let text =
        serde_json::to_string_pretty(&FmPhaseKey::new(stream)).expect("plain structs serialise");
    atomic_file::write(&key_path, (text + "\n").as_bytes()).map_err(Error::io(&key_path))
}

/// Adds the predictions of the FM's heads and the base rates to `scores`.
///
/// # Errors
/// A table that is missing or has other columns.
pub fn score(stream: &DatasetStream<'_>, work: &Path, scores: &mut EvaluationScores) -> Result<()> {
    let schema = &stream.dataset.schema;
    let base = BaseRates::of(stream.dataset, stream.window.test_from_ms)?;
    let path = FmPredictionTable::path(work);
    let reader = TableReader::open(&path)?;
    let fields = fields(schema);
    for group in 0..reader.groups() {
        let columns = reader.read(group, &fields)?;
        let (users, surfaces, times) = (columns[0].u64s(), columns[1].u32s(), columns[2].i64s());
        for row in 0..users.len() {
            let (user, time_ms) = (users[row], times[row]);
            let surface = u16::try_from(surfaces[row])
                .map_err(|_| Error::data(&path, "column `surface` is out of range"))?;
            for (task, columns) in columns[3..].chunks_exact(3).enumerate() {
                let [predicted, label, truth] = [0, 1, 2].map(|column| columns[column].f32s()[row]);
                if label.is_nan() {
                    continue;
                }
                let mut push = |arm, prediction| {
                    let of = ScoredImpression { user, surface, time_ms, task, arm, label };
                    scores.push(of, prediction);
                };
                if time_ms >= stream.window.report_from_ms {
                    push(PredictionArm::Base, base.rate(surface, task));
                    if truth.is_finite() {
                        push(PredictionArm::Best, truth);
                    }
                }
                if !predicted.is_nan() {
                    push(PredictionArm::Fm, predicted);
                }
            }
        }
    }
    Ok(())
}

/// Rows per group of the table.
const GROUP_ROWS: usize = 1 << 15;

/// Writes the predictions of the FM's heads for every target of the stream.
struct FmPredictionTable {
    schema: Arc<Schema>,
    /// Index of each task among the FM's tasks; none of a surface's own.
    places: Vec<Option<usize>>,
    tasks: usize,
    writer: TableWriter,
    users: Vec<u64>,
    surfaces: Vec<u32>,
    times_ms: Vec<i64>,
    values: Vec<Vec<f32>>,
}

impl FmPredictionTable {
    fn path(work: &Path) -> PathBuf {
        work.join("fm-predictions.parquet")
    }

    fn create(stream: &DatasetStream<'_>, spec: &FmSpec, work: &Path) -> Result<Self> {
        let schema = stream.dataset.schema.clone();
        let place = |Task { name, .. }: &Task| spec.tasks.iter().position(|own| own.name == *name);
        let places: Vec<_> = schema.tasks.iter().map(place).collect();
        Ok(Self {
            writer: TableWriter::create(&Self::path(work), fields(&schema))?,
            values: vec![Vec::new(); 3 * places.len()],
            users: Vec::new(),
            surfaces: Vec::new(),
            times_ms: Vec::new(),
            tasks: spec.tasks.len(),
            places,
            schema,
        })
    }

    fn push(&mut self, part: &StreamBatch<'_>, predictions: &[f32]) -> Result<()> {
        let rows = targets(part.examples).zip(predictions.chunks_exact(self.tasks));
        for (TargetRow { example, row }, predicted) in rows {
            self.users.push(example.user.id);
            self.surfaces.push(u32::from(example.surface));
            self.times_ms.push(example.time_ms);
            for (at, place) in self.places.iter().enumerate() {
                let target = &example.targets[row];
                let label = self.schema.label(at, example.surface, &target.outcome);
                let truth = target.truth.get(at).copied().unwrap_or(f32::NAN);
                let label = label.unwrap_or(f32::NAN);
                let said = place.map_or(f32::NAN, |place| predicted[place]);
                for (column, value) in [said, label, truth].into_iter().enumerate() {
                    self.values[3 * at + column].push(value);
                }
            }
        }
        if self.users.len() >= GROUP_ROWS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let mut columns = vec![
            Column::scalars(std::mem::take(&mut self.users)),
            Column::scalars(std::mem::take(&mut self.surfaces)),
            Column::scalars(std::mem::take(&mut self.times_ms)),
        ];
        let values = self.values.iter_mut().map(std::mem::take);
        columns.extend(values.map(Column::scalars));
        Ok(self.writer.write(&columns)?)
    }

    fn finish(mut self) -> Result<()> {
        if !self.users.is_empty() {
            self.flush()?;
        }
        Ok(self.writer.finish()?)
    }
}

/// User, surface, time; then the prediction, label and truth of each task, NaN if missing.
fn fields(schema: &Schema) -> Vec<Field> {
    let mut fields = vec![
        Field::new("user", CellType::U64),
        Field::new("surface", CellType::U32),
        Field::new("time_ms", CellType::I64),
    ];
    for Task { name, .. } in &schema.tasks {
        let named = |suffix: &str| Field::new(format!("{name}_{suffix}"), CellType::F32);
        fields.extend(["said", "label", "truth"].map(named));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_with_another_alignment_module_is_not_reused() {
        let without = FmPhaseKey {
            mode: TestMode::Streaming,
            test_from_ms: 0,
            rows: 1,
            fm: FmConfig::default(),
            logs: Logs::default(),
            features: FeatureConfig::default(),
            alignment: BTreeMap::new(),
        };
        let alignment = [("search".to_owned(), SurfaceAlignment::default())].into();
        let with = FmPhaseKey { alignment, ..without.clone() };
        let dir = tempfile::tempdir().unwrap();
        let path = FmPhaseKey::path(dir.path());
        for (left, own) in [(&without, &with), (&with, &without)] {
            let text = serde_json::to_string(left).unwrap();
            std::fs::write(&path, &text).unwrap();
            left.check(dir.path()).unwrap();
            let message = own.check(dir.path()).unwrap_err().to_string();
            assert!(message.contains("differs in alignment; run once without"), "{message}");
            let is_as_before = !text.contains("alignment");
            assert_eq!(is_as_before, left.alignment.is_empty(), "earlier keys still match");
        }
    }
}
