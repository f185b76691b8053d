//! The FM's phase of an evaluation: the FM over the stream, its TAEs into feature
//! logs, its own predictions into a table beside them.
//!
//! What it leaves in the work folder is all that the experts' phase needs, so a
//! later run with other expert settings can take it over.

use std::path::{Path, PathBuf};

use hypercast_data::labels::Labels;
use hypercast_fm::{
    spec::{FmConfig, FmSpec},
    trainer,
};
use serde::{Deserialize, Serialize};

use super::{
    scores::{Impression, Scores},
    stream::{Mode, Part, Stream},
};
use crate::demo::replay::{Arm, BaseRates};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Logs;
use hypercast_data::dataset::table::{Column, Field, Kind, TableReader, TableWriter, Values};
use hypercast_data::features::FeatureConfig;
use hypercast_data::logs::{LogVersion, LogWriter};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec, remove_dir};

/// What an FM phase was run with; another phase with the same would leave the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    mode: Mode,
    test_from_ms: i64,
    rows: usize,
    fm: FmConfig,
    logs: Logs,
    features: FeatureConfig,
}

impl Key {
    /// Of a stream.
    pub fn new(stream: &Stream<'_>) -> Self {
        Self {
            mode: stream.mode,
            test_from_ms: stream.window.test_from_ms,
            rows: stream.dataset.rows,
            fm: stream.config.fm.clone(),
            logs: stream.config.logs.clone(),
            features: stream.config.features,
        }
    }

    fn path(work: &Path) -> PathBuf {
        work.join("fm-phase.json")
    }

    /// Refuses what an earlier run left if it was run with anything else.
    ///
    /// # Errors
    /// Nothing was left, or with other settings: they are named.
    pub fn check(&self, work: &Path) -> Result<()> {
        let path = Self::path(work);
        let advice = "run once without --skip-fm";
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::data(&path, format!("no FM phase to take over ({error}); {advice}"))
        })?;
        let parse = |error: serde_json::Error| Error::data(&path, format!("{error}; {advice}"));
        let left: serde_json::Value = serde_json::from_str(&text).map_err(parse)?;
        // Through text, as what was left: a 32-bit float reads back as another number than it casts to.
        let own = serde_json::to_string(self).and_then(|text| serde_json::from_str(&text));
        let own: serde_json::Value = own.map_err(parse)?;
        let fields = own.as_object().into_iter().flatten();
        let other: Vec<String> = fields
            .filter(|(name, value)| left.get(name) != Some(value))
            .map(|(name, _)| name.clone())
            .collect();
        match other.is_empty() {
            true => Ok(()),
            false => Err(Error::data(
                &path,
                format!("the FM phase that was left differs in {}; {advice}", other.join(", ")),
            )),
        }
    }
}

/// Runs the phase and leaves its results in `work`.
///
/// # Errors
/// A data set, configuration or device that cannot be used; a full disk.
pub fn run(stream: &Stream<'_>, work: &Path) -> Result<()> {
    let config = stream.config;
    let key_path = Key::path(work);
    if key_path.exists() {
        std::fs::remove_file(&key_path).map_err(Error::io(&key_path))?;
    }
    let spec = dataset_spec(stream.dataset)?;
    remove_dir(&config.paths.fm_work)?;
    remove_dir(&config.paths.logs)?;
    let mut trainer = trainer::create(&config.paths.fm_work, &config.fm, &spec, config.device)?;
    let versions = vec![LogVersion::new(FIRST_VERSION, config.fm.tae_width())];
    let mut log = LogWriter::create(
        &config.paths.logs,
        &stream.dataset.schema,
        config.logs.options(),
        versions,
    )?;
    let mut said_of = Predictions::create(stream, &spec, work)?;
    let skip = stream.skip()?;
    stream.run("FM", |part| {
        let said = part.through(trainer.as_mut(), &|_| true)?;
        if part.history_only {
            return Ok(());
        }
        said_of.push(&part, &said.predictions)?;
        if part.seen >= skip {
            log.write_batch(part.examples, &said.tae, |_| true)?;
        }
        Ok(())
    })?;
    log.finish()?;
    said_of.finish()?;
    let text = serde_json::to_string_pretty(&Key::new(stream)).expect("plain structs serialise");
    std::fs::write(&key_path, text + "\n").map_err(Error::io(&key_path))
}

/// Reads what the FM's heads said, and the base rates, into `scores`.
///
/// # Errors
/// A table that is missing or foreign.
pub fn score(stream: &Stream<'_>, work: &Path, scores: &mut Scores) -> Result<()> {
    let labels = Labels::new(&stream.dataset.schema);
    let base = BaseRates::of(stream.dataset, stream.window.test_from_ms)?;
    let path = Predictions::path(work);
    let reader = TableReader::open(&path)?;
    let tasks: Vec<usize> = labels.tasks().collect();
    let fields = fields(&labels);
    for group in 0..reader.groups() {
        let columns = reader.read(group, &fields)?;
        let (users, surfaces, times) = (columns[0].u64s(), columns[1].u32s(), columns[2].i64s());
        for row in 0..users.len() {
            let at = Impression {
                user: users[row],
                surface: u16::try_from(surfaces[row])
                    .map_err(|_| Error::data(&path, "column `surface` is out of range"))?,
                time_ms: times[row],
            };
            for (task, columns) in tasks.iter().zip(columns[3..].chunks_exact(3)) {
                let [said, label, truth] = [0, 1, 2].map(|column| columns[column].f32s()[row]);
                if label.is_nan() {
                    continue;
                }
                let mut push =
                    |arm, probability| scores.push(at, (*task, arm), probability, label > 0.5);
                if at.time_ms >= stream.window.report_from_ms {
                    push(Arm::Base, base.rate(at.surface, *task));
                    if truth.is_finite() {
                        push(Arm::Best, truth);
                    }
                }
                if !said.is_nan() {
                    push(Arm::Fm, said);
                }
            }
        }
    }
    Ok(())
}

/// Rows a group of the table.
const GROUP_ROWS: usize = 1 << 15;

/// Writes what the FM's heads said of every target of the stream.
struct Predictions {
    labels: Labels,
    /// Where each binary task stands among the FM's.
    places: Vec<usize>,
    tasks: usize,
    writer: TableWriter,
    rows: (Vec<u64>, Vec<u32>, Vec<i64>),
    values: Vec<Vec<f32>>,
}

impl Predictions {
    fn path(work: &Path) -> PathBuf {
        work.join("fm-predictions.parquet")
    }

    fn create(stream: &Stream<'_>, spec: &FmSpec, work: &Path) -> Result<Self> {
        let labels = Labels::new(&stream.dataset.schema);
        let place = |task: usize| {
            let name = &labels.schema.tasks[task].name;
            spec.tasks.iter().position(|own| own.name == *name).expect("the FM has every task")
        };
        let places: Vec<usize> = labels.tasks().map(place).collect();
        Ok(Self {
            writer: TableWriter::create(&Self::path(work), fields(&labels))?,
            values: vec![Vec::new(); 3 * places.len()],
            rows: Default::default(),
            tasks: spec.tasks.len(),
            places,
            labels,
        })
    }

    fn push(&mut self, part: &Part<'_>, predictions: &[f32]) -> Result<()> {
        let rows = part.examples.iter().flat_map(|e| (0..e.targets.len()).map(move |row| (e, row)));
        for ((example, row), said) in rows.zip(predictions.chunks_exact(self.tasks)) {
            self.rows.0.push(example.user.id);
            self.rows.1.push(u32::from(example.surface));
            self.rows.2.push(example.time_ms);
            for (at, task) in self.labels.tasks().enumerate() {
                let label = self.labels.label(example, row, task);
                let truth = example.targets[row].truth.get(task).copied().unwrap_or(f32::NAN);
                let label = label.map_or(f32::NAN, |label| f32::from(u8::from(label)));
                for (column, value) in [said[self.places[at]], label, truth].into_iter().enumerate()
                {
                    self.values[3 * at + column].push(value);
                }
            }
        }
        if self.rows.0.len() >= GROUP_ROWS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let (users, surfaces, times) = std::mem::take(&mut self.rows);
        let mut columns = vec![
            Column::scalars(Values::U64(users)),
            Column::scalars(Values::U32(surfaces)),
            Column::scalars(Values::I64(times)),
        ];
        let values = self.values.iter_mut().map(std::mem::take);
        columns.extend(values.map(|values| Column::scalars(Values::F32(values))));
        Ok(self.writer.write(&columns)?)
    }

    fn finish(mut self) -> Result<()> {
        if !self.rows.0.is_empty() {
            self.flush()?;
        }
        Ok(self.writer.finish()?)
    }
}

/// User, surface, time; then, a binary task, prediction, label and truth, NaN where there is none.
fn fields(labels: &Labels) -> Vec<Field> {
    let mut fields = vec![
        Field::new("user", Kind::U64),
        Field::new("surface", Kind::U32),
        Field::new("time_ms", Kind::I64),
    ];
    for task in labels.tasks() {
        let name = &labels.schema.tasks[task].name;
        let named = |suffix: &str| Field::new(format!("{name}_{suffix}"), Kind::F32);
        fields.extend(["said", "label", "truth"].map(named));
    }
    fields
}
