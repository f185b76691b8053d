//! Writing feature logs: rows are buffered up to one row group, files get their names when they are
//! complete, and an existing directory of logs is continued.
//!
//! A file ends when it has its rows, when its time is over (callers pass the time), and when the FM
//! versions change. It records its position in the stream, so that a restarted writer continues
//! after the last complete file without losing or repeating requests.

use std::ops::Range;
use std::path::{Path, PathBuf};

use hypercast_core::{atomic_dir, disk};
use hypercast_fm::example::Example;
use hypercast_fm::inference::FmOutput;
use serde::{Deserialize, Serialize};

use super::file::{FileNote, NOTE, examples_path, file_numbers, requests_path};
use super::layout::{BufferedRow, LogLayout};
use super::{FORMAT, LogManifest, LogVersion, schema_path, short_history};
use crate::dataset::table::TableWriter;
use crate::error::{CommonErrors as _, Error, Result, write_json};
use crate::ranked_place::RankedPlace;
use crate::schema::Schema;
use crate::tae::TaeFormat;

/// Examples in a row group, which writers and readers keep in memory.
const GROUP_ROWS: usize = 4096;

/// Options of a log writer.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// The most events in a request's history.
    pub history_len: usize,
    /// Examples (targets) after which a file ends, at the end of a row group.
    pub rows_per_file: usize,
    /// Seconds after which a file ends, by the time that is passed to [`LogWriter::tick`]; 0 ends
    /// files by rows alone.
    pub file_seconds: u64,
    /// The precision of embeddings.
    pub tae: TaeStorage,
}

/// The precision of logged embeddings. Readers get 32-bit floats in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaeStorage {
    /// As the FM computed them.
    #[default]
    F32,
    /// Rounded to the nearest bf16: about half the bytes.
    Bf16,
}

/// A place in the stream that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoggedPlace {
    /// The position after a record.
    pub position: u64,
    /// A checksum of that record, for the follower of the stream; none if it is not known.
    pub checksum: Option<u32>,
}

/// A request to log.
#[derive(Debug, Clone, Copy)]
pub struct LogRow<'a> {
    /// The request, with at least one target.
    pub example: &'a Example,
    /// For each version of the writer, in its order, the embeddings of the targets, row-major
    /// `[targets, tae_dim]`.
    pub taes: &'a [&'a [f32]],
    /// For each version, the predictions of the FM's main tasks, row-major `[targets, main tasks]`:
    /// probabilities, or values in the unit of the label. Empty where they are not known.
    pub predictions: &'a [&'a [f32]],
    /// Where each target was ranked before it was shown; empty if none is known.
    pub ranked: &'a [Option<RankedPlace>],
    /// Whether these are outcomes that became known after the request was logged.
    pub correction: bool,
    /// The time when the newest of its events was received, in milliseconds since the epoch; 0 if
    /// unknown.
    pub ingested_ms: i64,
    /// After the request; none if it is not of a stream.
    pub place: Option<LoggedPlace>,
}

/// Appends requests to a log directory.
pub struct LogWriter {
    dir: PathBuf,
    options: LogOptions,
    layout: LogLayout,
    versions: Vec<LogVersion>,
    buffer: Vec<BufferedRow>,
    buffered_rows: usize,
    open: Option<OpenFile>,
    next_number: u32,
    /// After the last request that was written.
    place: Option<LoggedPlace>,
    /// The time of the first tick of the open file.
    begun_ms: Option<i64>,
}

/// The tables of an incomplete file.
struct OpenFile {
    requests: TableWriter,
    examples: TableWriter,
    rows: usize,
    corrections: usize,
    content_dim: usize,
}

impl LogWriter {
    /// Starts a log directory with the embeddings of `versions`, or continues one that has the same
    /// schema and length of histories.
    ///
    /// # Errors
    /// The directory has other logs, or the file system fails.
    pub fn create(
        dir: &Path,
        schema: &Schema,
        options: LogOptions,
        versions: Vec<LogVersion>,
    ) -> Result<LogWriter> {
        atomic_dir::create(dir)?;
        let manifest = LogManifest { format: FORMAT, history_len: options.history_len };
        start_or_check(dir, schema, manifest)?;
        let numbers = file_numbers(dir)?;
        let last = last_note(dir, &numbers)?;
        Ok(LogWriter {
            dir: dir.to_path_buf(),
            options,
            layout: LogLayout::new(schema),
            versions,
            buffer: Vec::new(),
            buffered_rows: 0,
            open: None,
            next_number: numbers.last().map_or(0, |last| last + 1),
            place: last.and_then(|note| note.place()),
            begun_ms: None,
        })
    }

    /// The place in the stream after the last request that was written. In a new writer, after the
    /// last complete file.
    pub fn place(&self) -> Option<LoggedPlace> {
        self.place
    }

    /// Places after complete files, oldest first: of the last file, of that before, and of others
    /// each about twice as far back. A damaged file gives none.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn earlier_places(&self) -> Result<Vec<LoggedPlace>> {
        let numbers = file_numbers(&self.dir)?;
        let back = std::iter::successors(Some(1), |back: &usize| back.checked_mul(2));
        let files = back.map_while(|back| Some(numbers[numbers.len().checked_sub(back)?]));
        let places = files.filter_map(|number| FileNote::read(&self.dir, number).ok()?.place());
        let newest_first: Vec<LoggedPlace> = places.collect();
        Ok(newest_first.into_iter().rev().collect())
    }

    /// The FM versions whose embeddings are written.
    pub fn versions(&self) -> &[LogVersion] {
        &self.versions
    }

    /// Changes the versions whose embeddings are written; other versions start a new file.
    ///
    /// # Errors
    /// The file system fails.
    pub fn set_versions(&mut self, versions: Vec<LogVersion>) -> Result<()> {
        if versions != self.versions {
            self.cut()?;
            self.versions = versions;
        }
        Ok(())
    }

    /// Adds a request.
    ///
    /// # Errors
    /// The file system fails.
    ///
    /// # Panics
    /// The embeddings or predictions are not those of the writer's versions.
    pub fn write(&mut self, row: LogRow<'_>) -> Result<()> {
        let example = row.example;
        assert_eq!(row.taes.len(), self.versions.len(), "embeddings of every version");
        for (tae, version) in row.taes.iter().zip(&self.versions) {
            assert_eq!(
                tae.len(),
                example.targets.len() * version.tae_dim,
                "one embedding a target"
            );
        }
        let cells = example.targets.len() * self.layout.main_tasks();
        for version in 0..self.versions.len() {
            let known = row.predictions.get(version).map_or(0, |own| own.len());
            assert!(known == 0 || known == cells, "one prediction a target and main task");
        }
        if row.place.is_some() {
            self.place = row.place;
        }
        let mut ranked = row.ranked.to_vec();
        ranked.resize(example.targets.len(), None);
        self.buffered_rows += example.targets.len();
        self.buffer.push(BufferedRow {
            example: Example {
                history: short_history(&example.history, example.surface, self.options.history_len),
                ..example.clone()
            },
            taes: row.taes.iter().map(|tae| self.options.tae.rounded(tae)).collect(),
            predictions: (0..self.versions.len())
                .map(|at| row.predictions.get(at).map_or_else(Vec::new, |own| own.to_vec()))
                .collect(),
            ranked,
            correction: row.correction,
            ingested_ms: row.ingested_ms,
        });
        if self.buffered_rows >= GROUP_ROWS.min(self.options.rows_per_file)
            || self.buffer.len() >= GROUP_ROWS
        {
            self.flush()?;
        }
        Ok(())
    }

    /// Adds the requests of a batch that `keep` accepts and that have targets. `said` is what each
    /// of the writer's versions answers for the targets of the batch; without predictions where
    /// these are not known. Returns the number of rows added.
    ///
    /// # Errors
    /// The file system fails.
    ///
    /// # Panics
    /// `said` is not of as many versions, or has another length.
    pub fn write_batch(
        &mut self,
        batch: &[Example],
        said: &[FmOutput],
        keep: impl Fn(&Example) -> bool,
    ) -> Result<u64> {
        let targets: usize = batch.iter().map(|example| example.targets.len()).sum();
        let lengths: Vec<usize> = said.iter().map(|said| said.tae.len()).collect();
        let expected: Vec<usize> =
            self.versions.iter().map(|version| targets * version.tae_dim).collect();
        assert_eq!(lengths, expected, "one embedding a target and version");
        // Where some rows are in a matrix with a row a target.
        let part = |values: &[f32], rows: &Range<usize>| {
            let width = values.len() / targets.max(1);
            rows.start * width..rows.end * width
        };
        let (mut at, mut rows) = (0, 0);
        for example in batch {
            let next = at + example.targets.len();
            if !example.targets.is_empty() && keep(example) {
                let own = at..next;
                let taes: Vec<&[f32]> =
                    said.iter().map(|said| &said.tae[part(&said.tae, &own)]).collect();
                let predictions: Vec<&[f32]> =
                    said.iter().map(|said| &said.main[part(&said.main, &own)]).collect();
                self.write(LogRow {
                    example,
                    taes: &taes,
                    predictions: &predictions,
                    ranked: &[],
                    correction: false,
                    ingested_ms: 0,
                    place: None,
                })?;
                rows += example.targets.len() as u64;
            }
            at = next;
        }
        Ok(rows)
    }

    /// Ends the open file if its first tick was at least `file_seconds` ago.
    ///
    /// # Errors
    /// The file system fails.
    pub fn tick(&mut self, now_ms: i64) -> Result<()> {
        if self.open.is_none() && self.buffer.is_empty() {
            return Ok(());
        }
        let begun_ms = *self.begun_ms.get_or_insert(now_ms);
        let over_ms = self.options.file_seconds as i64 * 1000;
        if over_ms > 0 && now_ms - begun_ms >= over_ms {
            self.cut()?;
        }
        Ok(())
    }

    /// Ends the open file, so that all requests are in complete files. Returns the number of files.
    ///
    /// # Errors
    /// The file system fails.
    pub fn cut(&mut self) -> Result<u32> {
        self.flush()?;
        self.close()?;
        Ok(self.next_number)
    }

    /// Ends the open file, and notes in a file without requests that the stream goes on at another
    /// place.
    ///
    /// # Errors
    /// The file system fails.
    pub fn go_on_at(&mut self, place: LoggedPlace) -> Result<()> {
        self.cut()?;
        self.place = Some(place);
        self.open = Some(self.create_file()?);
        self.close()
    }

    /// Ends the open file. Without this call, the rows since the last complete file are lost.
    ///
    /// # Errors
    /// The file system fails.
    pub fn finish(mut self) -> Result<()> {
        self.cut().map(drop)
    }

    fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let group = self.layout.columns(&self.buffer, &self.versions);
        if self.open.is_none() {
            self.open = Some(self.create_file()?);
        }
        let file = self.open.as_mut().expect("opened above");
        file.requests.write(&group.requests)?;
        file.examples.write(&group.examples)?;
        file.rows += self.buffered_rows;
        file.corrections += self.buffer.iter().filter(|row| row.correction).count();
        let targets = self.buffer.iter().flat_map(|row| &row.example.targets);
        let content_dim = targets.map(|target| target.item.content.len()).max();
        file.content_dim = file.content_dim.max(content_dim.unwrap_or_default());
        let full = file.rows >= self.options.rows_per_file;
        self.buffer.clear();
        self.buffered_rows = 0;
        if full { self.close() } else { Ok(()) }
    }

    fn create_file(&self) -> Result<OpenFile> {
        let mut fields = self.layout.example_fields();
        fields.extend(self.layout.task_fields());
        for LogVersion { version, .. } in &self.versions {
            fields.extend(self.layout.prediction_fields(version));
            fields.push(LogLayout::tae_field(version));
        }
        let requests = requests_path(&self.dir, self.next_number);
        let examples = examples_path(&self.dir, self.next_number);
        Ok(OpenFile {
            requests: TableWriter::create(&requests, self.layout.request_fields())?,
            examples: TableWriter::create(&examples, fields)?,
            rows: 0,
            corrections: 0,
            content_dim: 0,
        })
    }

    /// Completes the open file. The table of requests gets its name last, so a reader that sees it
    /// finds the examples.
    fn close(&mut self) -> Result<()> {
        if let Some(mut file) = self.open.take() {
            let note = FileNote {
                versions: self.versions.clone(),
                position: self.place.map(|place| place.position),
                position_checksum: self.place.and_then(|place| place.checksum),
                corrections: file.corrections,
                content_dim: file.content_dim,
            };
            let note = serde_json::to_string(&note).expect("a plain struct serialises");
            file.examples.note(NOTE, note.clone());
            file.requests.note(NOTE, note);
            file.examples.finish()?;
            file.requests.finish()?;
            self.next_number += 1;
        }
        self.begun_ms = None;
        Ok(())
    }
}

impl TaeStorage {
    fn rounded(self, values: &[f32]) -> Vec<f32> {
        let mut rounded = values.to_vec();
        if self == TaeStorage::Bf16 {
            TaeFormat::Bf16.round(&mut rounded);
        }
        rounded
    }
}

/// Starts a log directory, or checks that it can be continued.
fn start_or_check(dir: &Path, schema: &Schema, manifest: LogManifest) -> Result<()> {
    let (schema_path, manifest_path) = (schema_path(dir), dir.join("log-manifest.json"));
    if !disk::exists(&manifest_path) {
        schema.save(&schema_path)?;
        return write_json(&manifest_path, &manifest);
    }
    let found = LogManifest::load(dir)?;
    if found != manifest {
        let reason =
            format!("its logs have {found:?} instead of {manifest:?}; use another directory");
        return Err(Error::data(dir, reason));
    }
    let logged = Schema::load(&schema_path)?;
    match schema.layouts().any(|layout| layout == logged.layout()) {
        _ if logged == *schema => Ok(()),
        // Readers make up what files of before lack.
        true => schema.save(&schema_path),
        false => Err(Error::data(dir, "its logs have another schema; use another directory")),
    }
}

/// The note of the newest complete file that has a position.
fn last_note(dir: &Path, numbers: &[u32]) -> Result<Option<FileNote>> {
    for &number in numbers.iter().rev() {
        let note = FileNote::read(dir, number)?;
        if note.position.is_some() {
            return Ok(Some(note));
        }
    }
    Ok(None)
}
