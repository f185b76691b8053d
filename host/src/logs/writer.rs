//! Writing feature logs: rows are buffered up to one row group, files get their
//! names when they are complete, and a directory that has logs is continued.

use std::fs;
use std::path::{Path, PathBuf};

use hypercast_fm::example::Example;

use super::layout::Layout;
use super::{FORMAT, LogManifest, Logged, examples_path, numbers, requests_path, short_history};
use crate::dataset::table::TableWriter;
use crate::error::{Error, Result};
use crate::schema::Schema;

/// Examples a row group: what a writer and a reader hold in memory.
const GROUP_ROWS: usize = 4096;

/// What is logged and how.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// Length of a target-aware embedding.
    pub tae_dim: usize,
    /// Events of short history at most.
    pub history_len: usize,
    /// Examples (targets) a file, about: a file ends with a whole row group.
    pub rows_per_file: usize,
}

/// Appends requests to a log directory.
pub struct LogWriter {
    dir: PathBuf,
    options: LogOptions,
    layout: Layout,
    buffer: Vec<Logged>,
    buffered_rows: usize,
    /// The pair of tables under way, and how many examples it holds.
    open: Option<Pair>,
    next_number: u32,
}

struct Pair {
    requests: TableWriter,
    examples: TableWriter,
    rows: usize,
}

impl LogWriter {
    /// Starts a log directory, or continues one that has the same schema and options.
    pub fn create(dir: &Path, schema: &Schema, options: LogOptions) -> Result<LogWriter> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let manifest = LogManifest {
            format: FORMAT,
            tae_dim: options.tae_dim,
            history_len: options.history_len,
        };
        let (schema_path, manifest_path) = (dir.join("schema.toml"), dir.join("log-manifest.json"));
        if manifest_path.exists() {
            let found = LogManifest::load(dir)?;
            if found != manifest {
                return Err(Error::data(
                    dir,
                    format!(
                        "its logs are {found:?}, these would be {manifest:?}; use another directory"
                    ),
                ));
            }
            if Schema::load(&schema_path)? != *schema {
                return Err(Error::data(
                    dir,
                    "its logs have another schema; use another directory",
                ));
            }
        } else {
            schema.save(&schema_path)?;
            let text = serde_json::to_string_pretty(&manifest)
                .map_err(|error| Error::data(&manifest_path, error.to_string()))?;
            fs::write(&manifest_path, text + "\n").map_err(Error::io(&manifest_path))?;
        }
        let next_number = numbers(dir)?.last().map_or(0, |last| last + 1);
        Ok(LogWriter {
            dir: dir.to_path_buf(),
            options,
            layout: Layout::new(schema),
            buffer: Vec::new(),
            buffered_rows: 0,
            open: None,
            next_number,
        })
    }

    /// Adds a request with the embeddings of its targets, row-major `[targets, tae_dim]`.
    pub fn write(&mut self, example: &Example, tae: &[f32], fm_version: &str) -> Result<()> {
        assert_eq!(
            tae.len(),
            example.targets.len() * self.options.tae_dim,
            "one embedding a target"
        );
        self.buffered_rows += example.targets.len();
        self.buffer.push(Logged {
            example: Example {
                request: example.request,
                user: example.user.clone(),
                surface: example.surface,
                time_ms: example.time_ms,
                history: short_history(&example.history, example.surface, self.options.history_len),
                targets: example.targets.clone(),
            },
            tae: tae.to_vec(),
            fm_version: fm_version.to_string(),
        });
        if self.buffered_rows >= GROUP_ROWS.min(self.options.rows_per_file)
            || self.buffer.len() >= GROUP_ROWS
        {
            self.flush()?;
        }
        Ok(())
    }

    /// Adds those requests of a batch that `keep` accepts, with the embeddings `[targets of the batch, tae_dim]`;
    /// returns the rows added. A request without targets has nothing to log.
    pub fn write_batch(
        &mut self,
        batch: &[Example],
        tae: &[f32],
        fm_version: &str,
        keep: impl Fn(&Example) -> bool,
    ) -> Result<u64> {
        let (mut at, mut rows) = (0, 0);
        for example in batch {
            let next = at + example.targets.len() * self.options.tae_dim;
            if !example.targets.is_empty() && keep(example) {
                self.write(example, &tae[at..next], fm_version)?;
                rows += example.targets.len() as u64;
            }
            at = next;
        }
        assert_eq!(at, tae.len(), "one embedding a target");
        Ok(rows)
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
        let group = self.layout.columns(&self.buffer, self.options.tae_dim);
        let pair = match &mut self.open {
            Some(pair) => pair,
            None => self.open.insert(Pair {
                requests: TableWriter::create(
                    &requests_path(&self.dir, self.next_number),
                    self.layout.request_fields(),
                )?,
                examples: TableWriter::create(
                    &examples_path(&self.dir, self.next_number),
                    self.layout.example_fields(),
                )?,
                rows: 0,
            }),
        };
        pair.requests.write(&group.requests)?;
        pair.examples.write(&group.examples)?;
        pair.rows += self.buffered_rows;
        let full = pair.rows >= self.options.rows_per_file;
        self.buffer.clear();
        self.buffered_rows = 0;
        if full { self.close() } else { Ok(()) }
    }

    /// The requests get their name last: a reader that sees them finds their examples.
    fn close(&mut self) -> Result<()> {
        if let Some(pair) = self.open.take() {
            pair.examples.finish()?;
            pair.requests.finish()?;
            self.next_number += 1;
        }
        Ok(())
    }
}
