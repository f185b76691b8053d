//! Following feature logs that another process writes: complete files in their
//! order, for one FM version, from a position that can be saved.
//!
//! A file is complete once it has its name, and never changes, so a position in
//! it stays what it is. Corrections come as they were written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::pair::Pair;
use super::reader::opened;
use super::{LogManifest, LogVersion, Logged, numbers, requests_path};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// How far a log was read.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize,
)]
pub struct LogPosition {
    /// The file's number.
    pub file: u32,
    /// Its requests that were read.
    pub row: u32,
}

impl LogPosition {
    /// The beginning of a file.
    pub fn file(file: u32) -> LogPosition {
        LogPosition { file, row: 0 }
    }

    /// One number that grows as the log is read.
    pub fn number(self) -> u64 {
        u64::from(self.file) << 32 | u64::from(self.row)
    }
}

/// Reads logs as they grow.
pub struct LogFollower {
    /// The schema of their columns.
    pub schema: Arc<Schema>,
    /// What holds for all their files.
    pub manifest: LogManifest,
    dir: PathBuf,
    version: String,
    tae_dim: Option<usize>,
    layout: Layout,
    position: LogPosition,
    open: Option<Open>,
    ready: std::vec::IntoIter<Logged>,
    /// Whether it was said that files lack the version.
    said: bool,
}

struct Open {
    pair: Pair,
    next_group: usize,
}

impl LogFollower {
    /// Goes on at `from` with the embeddings of FM `version`.
    ///
    /// # Errors
    /// No logs yet, or of another format.
    pub fn open(dir: &Path, version: &str, from: LogPosition) -> Result<LogFollower> {
        let (manifest, schema) = opened(dir)?;
        Ok(LogFollower {
            layout: Layout::new(&schema),
            schema,
            manifest,
            dir: dir.to_path_buf(),
            version: version.to_owned(),
            tae_dim: None,
            position: from,
            open: None,
            ready: Vec::new().into_iter(),
            said: false,
        })
    }

    /// After the last request that was given.
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// The next request; none if no complete file holds one yet.
    ///
    /// # Errors
    /// Damage, a file that is gone though only a part of it was read, embeddings of another length than before.
    pub fn next_request(&mut self) -> Result<Option<Logged>> {
        loop {
            if let Some(logged) = self.ready.next() {
                self.position.row += 1;
                return Ok(Some(logged));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads the next row group, or finds that there is none; false where a file must appear first.
    fn fill(&mut self) -> Result<bool> {
        let Some(open) = &mut self.open else { return self.open_next() };
        let version = LogVersion::new(&self.version, self.tae_dim.unwrap_or(0));
        if open.next_group == open.pair.groups() {
            self.position = LogPosition::file(self.position.file + 1);
            self.open = None;
            return Ok(true);
        }
        let rows = open.pair.read(open.next_group, &self.layout, &version)?;
        open.next_group += 1;
        self.ready = rows.into_iter();
        Ok(true)
    }

    fn open_next(&mut self) -> Result<bool> {
        let wanted = self.position.file;
        let number = match requests_path(&self.dir, wanted).exists() {
            true => Some(wanted),
            false => numbers(&self.dir)?.into_iter().find(|&number| number >= wanted),
        };
        let Some(number) = number else { return Ok(false) };
        if number > wanted {
            if self.position.row > 0 {
                return Err(Error::data(
                    &self.dir,
                    format!(
                        "file {wanted} is gone and was read to request {} only; the rest is lost: train without what was saved",
                        self.position.row
                    ),
                ));
            }
            tracing::warn!("{}: files {wanted} to {} are gone", self.dir.display(), number - 1);
            self.position = LogPosition::file(number);
        }
        let pair = Pair::open(&self.dir, number)?;
        let Some(version) = pair.version(&self.version) else {
            if !self.said {
                tracing::warn!(
                    "{}: file {number} has no TAEs of FM {}; such files are passed over",
                    self.dir.display(),
                    self.version
                );
                self.said = true;
            }
            self.position = LogPosition::file(number + 1);
            return Ok(true);
        };
        let before = *self.tae_dim.get_or_insert(version.tae_dim);
        if before != version.tae_dim {
            return Err(Error::data(
                &self.dir,
                format!(
                    "file {number}: TAEs of FM {} have {} values, {before} in the files before",
                    self.version, version.tae_dim
                ),
            ));
        }
        self.start(pair)?;
        Ok(true)
    }

    /// Stands where the position says within a file.
    fn start(&mut self, pair: Pair) -> Result<()> {
        let mut left = self.position.row as usize;
        let mut group = 0;
        while group < pair.groups() && left >= pair.group_requests(group) {
            left -= pair.group_requests(group);
            group += 1;
        }
        let mut open = Open { pair, next_group: group };
        if left > 0 {
            if group == open.pair.groups() {
                return Err(Error::data(
                    &self.dir,
                    format!(
                        "file {} has fewer requests than the {} that were read of it; these are other logs",
                        self.position.file, self.position.row
                    ),
                ));
            }
            let version = LogVersion::new(&self.version, self.tae_dim.unwrap_or(0));
            let mut rows = open.pair.read(group, &self.layout, &version)?;
            rows.drain(..left);
            self.ready = rows.into_iter();
            open.next_group += 1;
        }
        self.open = Some(open);
        Ok(())
    }
}
