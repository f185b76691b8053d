//! Following feature logs that another process writes: complete files in their order, for one FM
//! version, from a position that can be saved.
//!
//! A file is complete once it has its name, and never changes afterwards. The follower makes the
//! name durable before it returns a row of the file, so a position stays valid also if the power
//! fails. Corrections are returned as they were written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_core::disk;
use serde::{Deserialize, Serialize};

use super::file::{LogFile, OpenLog, file_numbers, requests_path, sync_names};
use super::layout::LogLayout;
use super::{LogManifest, LogVersion, LoggedRequest, load_header};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// A position in the logs: everything before it was read.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize,
)]
pub struct LogPosition {
    /// The number of the file.
    pub file: u32,
    /// The number of its requests that were read.
    pub row: u32,
}

impl LogPosition {
    /// The start of a file.
    pub fn file(file: u32) -> LogPosition {
        LogPosition { file, row: 0 }
    }

    /// A single number with the same order.
    pub fn number(self) -> u64 {
        u64::from(self.file) << 32 | u64::from(self.row)
    }

    /// The position with a number ([`LogPosition::number`]).
    pub fn from_number(number: u64) -> LogPosition {
        LogPosition { file: (number >> 32) as u32, row: number as u32 }
    }
}

/// Reads logs as they grow.
pub struct LogFollower {
    /// The schema that defines their columns.
    pub schema: Arc<Schema>,
    /// Properties of all their files.
    pub manifest: LogManifest,
    dir: PathBuf,
    version: String,
    tae_dim: Option<usize>,
    layout: LogLayout,
    position: LogPosition,
    open: Option<OpenLog>,
    /// Whether a warning about files without the version was logged.
    warned: bool,
}

impl LogFollower {
    /// Follows the logs from `from` on, with the embeddings of FM `version`.
    ///
    /// # Errors
    /// The directory has no logs yet, or logs of another format.
    pub fn open(dir: &Path, version: &str, from: LogPosition) -> Result<LogFollower> {
        let (manifest, schema) = load_header(dir)?;
        Ok(LogFollower {
            layout: LogLayout::new(&schema),
            schema,
            manifest,
            dir: dir.to_path_buf(),
            version: version.to_owned(),
            tae_dim: None,
            position: from,
            open: None,
            warned: false,
        })
    }

    /// The position after the last request that was returned.
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// The request at an earlier position, as [`LogFollower::next_request`] returned it.
    ///
    /// # Errors
    /// Its file was removed, is damaged, or has no such request.
    pub fn request_at(&self, position: LogPosition) -> Result<LoggedRequest> {
        let gone = || self.error(format!("{position:?} is no longer there"));
        if !disk::exists(&requests_path(&self.dir, position.file)) {
            return Err(gone());
        }
        LogFollower::open(&self.dir, &self.version, position)?.next_request()?.ok_or_else(gone)
    }

    /// The next request; none if no complete file contains one yet.
    ///
    /// # Errors
    /// A file is damaged, or was removed before it was read to its end, its embeddings have
    /// another length than before, or the directory cannot be synced.
    pub fn next_request(&mut self) -> Result<Option<LoggedRequest>> {
        loop {
            if let Some(open) = &mut self.open {
                if let Some(logged) = open.next_request(&self.layout)? {
                    self.position.row += 1;
                    return Ok(Some(logged));
                }
                self.position = LogPosition::file(self.position.file + 1);
                self.open = None;
            }
            if !self.open_next()? {
                return Ok(None);
            }
        }
    }

    /// Opens the next file, or passes over it; false if there is none yet.
    fn open_next(&mut self) -> Result<bool> {
        let wanted = self.position.file;
        let number = if disk::exists(&requests_path(&self.dir, wanted)) {
            Some(wanted)
        } else {
            file_numbers(&self.dir)?.into_iter().find(|&number| number >= wanted)
        };
        let Some(number) = number else { return Ok(false) };
        sync_names(&self.dir)?;
        if number > wanted {
            self.skip_to(number)?;
        }
        let file = LogFile::open(&self.dir, number)?;
        let Some(version) = file.version(&self.version).cloned() else {
            if !self.warned && file.requests.rows() > 0 {
                tracing::warn!(
                    "{}: file {number} has no TAEs of FM {}; skipping all such files",
                    self.dir.display(),
                    self.version
                );
                self.warned = true;
            }
            self.position = LogPosition::file(number + 1);
            return Ok(true);
        };
        let before = *self.tae_dim.get_or_insert(version.tae_dim);
        if before != version.tae_dim {
            return Err(self.error(format!(
                "file {number}: TAEs of FM {} have {} values, {before} in the files before",
                self.version, version.tae_dim
            )));
        }
        self.start(file, version)?;
        Ok(true)
    }

    /// Continues at file `number`, because the files before it were removed.
    fn skip_to(&mut self, number: u32) -> Result<()> {
        let LogPosition { file, row } = self.position;
        if row > 0 {
            return Err(self.error(format!(
                "file {file} was removed after {row} of its requests were read, and the rest is \
                 lost; train without the saved state"
            )));
        }
        tracing::warn!("{}: files {file} to {} were removed", self.dir.display(), number - 1);
        self.position = LogPosition::file(number);
        Ok(())
    }

    /// Moves to the row of the current position within a file.
    fn start(&mut self, file: LogFile, version: LogVersion) -> Result<()> {
        let mut left = self.position.row as usize;
        let mut group = 0;
        let groups = file.requests.groups();
        while group < groups && left >= file.requests.group_rows(group) {
            left -= file.requests.group_rows(group);
            group += 1;
        }
        if left > 0 && group == groups {
            return Err(self.error(format!(
                "file {} has fewer than the {} requests that were read of it; these are other logs",
                self.position.file, self.position.row
            )));
        }
        let mut open = file.starting_at(group, Some(version));
        for _ in 0..left {
            open.next_request(&self.layout)?;
        }
        self.open = Some(open);
        Ok(())
    }

    fn error(&self, reason: String) -> Error {
        Error::data(&self.dir, reason)
    }
}
