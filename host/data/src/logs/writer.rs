//! Writing feature logs: rows are buffered up to one row group, files get their
//! names when they are complete, and a directory that has logs is continued.
//!
//! A file ends when it has its rows, when its time is over (the caller says what time it is), and when
//! other FM versions are logged from there on. It says up to where in its stream it goes, so that
//! whoever writes can go on after the last complete file and lose or double nothing.

use std::fs;
use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
use hypercast_fm::example::Example;
use serde::{Deserialize, Serialize};

use super::layout::{Layout, Row};
use super::{
    FORMAT, FileNote, LogManifest, LogVersion, NOTE, examples_path, numbers, requests_path,
    short_history,
};
use crate::dataset::table::TableWriter;
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;
use crate::tae::to_bf16;

/// Examples a row group: what a writer and a reader hold in memory.
const GROUP_ROWS: usize = 4096;

/// What is logged and how.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// Events of short history at most.
    pub history_len: usize,
    /// Examples (targets) a file, about: a file ends with a whole row group.
    pub rows_per_file: usize,
    /// Seconds a file, of the time that [`LogWriter::tick`] is told; 0 for rows alone.
    pub file_seconds: u64,
    /// How exactly embeddings are kept.
    pub tae: TaeStorage,
}

/// How exactly logged embeddings are kept. Either is read as 32-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaeStorage {
    /// As the FM gave them.
    #[default]
    F32,
    /// Rounded to the nearest bf16: about half the bytes.
    Bf16,
}

/// A request to be logged.
#[derive(Debug, Clone, Copy)]
pub struct LogRow<'a> {
    /// The request, with at least one target.
    pub example: &'a Example,
    /// For each version of the writer, in its order, the embeddings of the targets, row-major `[targets, tae_dim]`.
    pub taes: &'a [&'a [f32]],
    /// Whether these are late outcomes.
    pub correction: bool,
    /// When the newest of its events was taken in, milliseconds since the epoch; 0 where that is not known.
    pub ingested_ms: i64,
    /// The position in the stream after the request; none where it is of no stream.
    pub position: Option<u64>,
}

/// Appends requests to a log directory.
pub struct LogWriter {
    dir: PathBuf,
    options: LogOptions,
    layout: Layout,
    versions: Vec<LogVersion>,
    buffer: Vec<Row>,
    buffered_rows: usize,
    /// The pair of tables under way.
    open: Option<Pair>,
    next_number: u32,
    /// In the stream, after the last request that was written.
    position: Option<u64>,
    /// When the file under way began, as far as the caller told.
    begun_ms: Option<i64>,
}

struct Pair {
    requests: TableWriter,
    examples: TableWriter,
    rows: usize,
    corrections: usize,
}

impl LogWriter {
    /// Starts a log directory, or continues one that has the same schema and options, with the embeddings of
    /// `versions`.
    ///
    /// # Errors
    /// A directory with other logs, or what the file system says.
    pub fn create(
        dir: &Path,
        schema: &Schema,
        options: LogOptions,
        versions: Vec<LogVersion>,
    ) -> Result<LogWriter> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let manifest = LogManifest { format: FORMAT, history_len: options.history_len };
        continues(dir, schema, manifest)?;
        let numbers = numbers(dir)?;
        Ok(LogWriter {
            dir: dir.to_path_buf(),
            options,
            layout: Layout::new(schema),
            versions,
            buffer: Vec::new(),
            buffered_rows: 0,
            open: None,
            next_number: numbers.last().map_or(0, |last| last + 1),
            position: last_position(dir, &numbers)?,
            begun_ms: None,
        })
    }

    /// The position in the stream after the last request that was written; after opening, after the last one that
    /// a complete file holds.
    pub fn position(&self) -> Option<u64> {
        self.position
    }

    /// The FM versions whose embeddings are written.
    pub fn versions(&self) -> &[LogVersion] {
        &self.versions
    }

    /// Goes on with the embeddings of other versions, in a new file if they differ.
    ///
    /// # Errors
    /// A full disk.
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
    /// A full disk.
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
        self.position = row.position.or(self.position);
        self.buffered_rows += example.targets.len();
        self.buffer.push(Row {
            example: Example {
                request: example.request,
                user: example.user.clone(),
                surface: example.surface,
                time_ms: example.time_ms,
                history: short_history(&example.history, example.surface, self.options.history_len),
                targets: example.targets.clone(),
            },
            taes: row.taes.iter().map(|tae| self.options.tae.rounded(tae)).collect(),
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

    /// Adds those requests of a batch that `keep` accepts, with the embeddings `[targets of the batch, tae_dim]` of the
    /// writer's one version; returns the rows added. A request without targets has nothing to log.
    ///
    /// # Errors
    /// A full disk.
    pub fn write_batch(
        &mut self,
        batch: &[Example],
        tae: &[f32],
        keep: impl Fn(&Example) -> bool,
    ) -> Result<u64> {
        let [LogVersion { tae_dim, .. }] = self.versions[..] else {
            panic!("a batch has the embeddings of one version")
        };
        let (mut at, mut rows) = (0, 0);
        for example in batch {
            let next = at + example.targets.len() * tae_dim;
            if !example.targets.is_empty() && keep(example) {
                self.write(LogRow {
                    example,
                    taes: &[&tae[at..next]],
                    correction: false,
                    ingested_ms: 0,
                    position: None,
                })?;
                rows += example.targets.len() as u64;
            }
            at = next;
        }
        assert_eq!(at, tae.len(), "one embedding a target");
        Ok(rows)
    }

    /// Says what time it is: a file that began `file_seconds` ago, or more, ends.
    ///
    /// # Errors
    /// A full disk.
    pub fn tick(&mut self, now_ms: i64) -> Result<()> {
        if self.open.is_none() && self.buffer.is_empty() {
            return Ok(());
        }
        let begun_ms = *self.begun_ms.get_or_insert(now_ms);
        let over_ms = self.options.file_seconds as i64 * 1000;
        match over_ms > 0 && now_ms - begun_ms >= over_ms {
            true => self.cut().map(drop),
            false => Ok(()),
        }
    }

    /// Ends the file under way, so that all that was written is in complete files; returns how many
    /// the directory has.
    pub fn cut(&mut self) -> Result<u32> {
        self.flush()?;
        self.close()?;
        Ok(self.next_number)
    }

    /// Writes what is left and gives the last file its name. Without it, the rows since the last
    /// complete file are lost.
    pub fn finish(mut self) -> Result<()> {
        self.cut().map(drop)
    }

    fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let group = self.layout.columns(&self.buffer, &self.versions);
        let pair = match &mut self.open {
            Some(pair) => pair,
            None => {
                let mut fields = self.layout.example_fields();
                fields.extend(self.layout.task_fields());
                fields.extend(self.versions.iter().map(|own| Layout::tae_field(&own.version)));
                self.open.insert(Pair {
                    requests: TableWriter::create(
                        &requests_path(&self.dir, self.next_number),
                        self.layout.request_fields(),
                    )?,
                    examples: TableWriter::create(
                        &examples_path(&self.dir, self.next_number),
                        fields,
                    )?,
                    rows: 0,
                    corrections: 0,
                })
            }
        };
        pair.requests.write(&group.requests)?;
        pair.examples.write(&group.examples)?;
        pair.rows += self.buffered_rows;
        pair.corrections += self.buffer.iter().filter(|row| row.correction).count();
        let full = pair.rows >= self.options.rows_per_file;
        self.buffer.clear();
        self.buffered_rows = 0;
        if full { self.close() } else { Ok(()) }
    }

    /// The requests get their name last: a reader that sees them finds their examples.
    fn close(&mut self) -> Result<()> {
        if let Some(mut pair) = self.open.take() {
            let note = FileNote {
                versions: self.versions.clone(),
                position: self.position,
                corrections: pair.corrections,
            };
            let note = serde_json::to_string(&note).expect("a plain struct serialises");
            pair.examples.note(NOTE, note.clone());
            pair.requests.note(NOTE, note);
            pair.examples.finish()?;
            pair.requests.finish()?;
            // The names are kept too: a follower may already have read the file.
            let dir = fs::File::open(&self.dir).map_err(Error::io(&self.dir))?;
            dir.sync_all().map_err(Error::io(&self.dir))?;
            self.next_number += 1;
        }
        self.begun_ms = None;
        Ok(())
    }
}

impl TaeStorage {
    fn rounded(self, values: &[f32]) -> Vec<f32> {
        match self {
            TaeStorage::F32 => values.to_vec(),
            TaeStorage::Bf16 => values.iter().map(|&value| to_bf16(value)).collect(),
        }
    }
}

/// Checks that a directory can be continued, or starts it.
fn continues(dir: &Path, schema: &Schema, manifest: LogManifest) -> Result<()> {
    let (schema_path, manifest_path) = (dir.join("schema.toml"), dir.join("log-manifest.json"));
    if !manifest_path.exists() {
        schema.save(&schema_path)?;
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|error| Error::data(&manifest_path, error.to_string()))?;
        return atomic_file::write(&manifest_path, (text + "\n").as_bytes())
            .map_err(Error::io(&manifest_path));
    }
    let found = LogManifest::load(dir)?;
    if found != manifest {
        return Err(Error::data(
            dir,
            format!("its logs are {found:?}, these would be {manifest:?}; use another directory"),
        ));
    }
    match Schema::load(&schema_path)? == *schema {
        true => Ok(()),
        false => Err(Error::data(dir, "its logs have another schema; use another directory")),
    }
}

/// Where the newest complete file of a stream ends.
fn last_position(dir: &Path, numbers: &[u32]) -> Result<Option<u64>> {
    for &number in numbers.iter().rev() {
        if let Some(position) = super::pair::Pair::note(dir, number)?.position {
            return Ok(Some(position));
        }
    }
    Ok(None)
}
