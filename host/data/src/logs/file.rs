//! One file of the feature logs: a pair of tables and its metadata.

use std::path::{Path, PathBuf};

use hypercast_core::{atomic_file, disk};
use serde::{Deserialize, Serialize};

use super::layout::{LogLayout, ReadFields, RowGroup};
use super::{LogVersion, LoggedPlace, LoggedRequest};
use crate::dataset::table::TableReader;
use crate::error::{CommonErrors as _, Error, Result};

/// The key of [`FileNote`] in a file's metadata.
pub(super) const NOTE: &str = "hypercast";

/// A file's description of itself, as JSON in its metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileNote {
    /// The FM versions, in the order of their columns.
    pub(super) versions: Vec<LogVersion>,
    /// The position in the stream `joined` after the last request; none if the logs are not of a
    /// stream.
    pub(super) position: Option<u64>,
    /// A checksum of the record before that position; files of earlier versions have none.
    #[serde(default)]
    pub(super) position_checksum: Option<u32>,
    /// The number of corrections among the requests.
    pub(super) corrections: usize,
    /// The length of the content vectors; 0 without any, as in files of earlier versions.
    #[serde(default)]
    pub(super) content_dim: usize,
}

impl FileNote {
    /// The place in the stream after the last request.
    pub(super) fn place(&self) -> Option<LoggedPlace> {
        let checksum = self.position_checksum;
        self.position.map(|position| LoggedPlace { position, checksum })
    }

    /// Reads the note of a file, without its rows.
    pub(super) fn read(dir: &Path, number: u32) -> Result<FileNote> {
        let path = requests_path(dir, number);
        FileNote::of(&TableReader::open(&path)?, &path)
    }

    fn of(requests: &TableReader, path: &Path) -> Result<FileNote> {
        let wrong = |why: String| Error::data(path, format!("{why}; write the logs again"));
        let text = requests
            .note(NOTE)
            .ok_or_else(|| wrong(format!("its metadata has no entry `{NOTE}`")))?;
        serde_json::from_str(text)
            .map_err(|error| wrong(format!("its metadata's entry `{NOTE}`: {error}")))
    }
}

pub(super) fn requests_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("requests-{number:04}.parquet"))
}

pub(super) fn examples_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("examples-{number:04}.parquet"))
}

/// The numbers of the complete files, ascending. A file is complete once its table of requests has
/// its name.
pub(super) fn file_numbers(dir: &Path) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for name in disk::names(dir).map_err(Error::io(dir))? {
        let name = name.to_string_lossy();
        let number = name.strip_prefix("requests-").and_then(|name| name.strip_suffix(".parquet"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes the names of the files durable that are there.
///
/// A reader sees a file as soon as its writer has renamed it, before the writer has synced the
/// folder. If the power fails in between, the name is gone, and the writer makes another file of
/// that number. So whoever saves a position in a file first sees to it that the file stays.
pub(super) fn sync_names(dir: &Path) -> Result<()> {
    atomic_file::sync_dir(dir).map_err(Error::io(dir))
}

/// A complete file that is read from a row group on.
pub(super) struct OpenLog {
    file: LogFile,
    /// Whose embeddings are read; none if nobody needs any.
    version: Option<LogVersion>,
    next_group: usize,
    /// Requests of the row group before that.
    ready: std::vec::IntoIter<LoggedRequest>,
}

impl OpenLog {
    /// The next request; none at the end of the file.
    pub(super) fn next_request(&mut self, layout: &LogLayout) -> Result<Option<LoggedRequest>> {
        loop {
            if let Some(logged) = self.ready.next() {
                return Ok(Some(logged));
            }
            if self.next_group == self.file.requests.groups() {
                return Ok(None);
            }
            self.ready =
                self.file.read(self.next_group, layout, self.version.as_ref())?.into_iter();
            self.next_group += 1;
        }
    }
}

/// A complete file, open for reading.
pub(super) struct LogFile {
    pub(super) note: FileNote,
    pub(super) requests: TableReader,
    pub(super) examples: TableReader,
    path: PathBuf,
}

impl LogFile {
    /// Opens a complete file by its number.
    pub(super) fn open(dir: &Path, number: u32) -> Result<LogFile> {
        let path = examples_path(dir, number);
        let (requests, examples) =
            (TableReader::open(&requests_path(dir, number))?, TableReader::open(&path)?);
        if requests.groups() != examples.groups() {
            return Err(Error::data(
                path,
                "it has another number of row groups than the requests file of the same number",
            ));
        }
        let note = FileNote::of(&requests, &requests_path(dir, number))?;
        Ok(LogFile { note, requests, examples, path })
    }

    /// The version by its name, if the file contains its embeddings.
    pub(super) fn version(&self, version: &str) -> Option<&LogVersion> {
        self.note.versions.iter().find(|own| own.version == version)
    }

    /// Goes through the requests from row group `group` on, with the embeddings of `version`, which
    /// the file must contain, or without any.
    pub(super) fn starting_at(self, group: usize, version: Option<LogVersion>) -> OpenLog {
        OpenLog { file: self, version, next_group: group, ready: Vec::new().into_iter() }
    }

    fn read(
        &self,
        group: usize,
        layout: &LogLayout,
        version: Option<&LogVersion>,
    ) -> Result<Vec<LoggedRequest>> {
        let ReadFields { fields, defaults } =
            layout.read_fields(version.map(|version| version.version.as_str()));
        let requests =
            self.requests.read_grown(group, &layout.request_fields(), &layout.defaults)?;
        let mut examples = self.examples.read_grown(group, &fields, &defaults)?;
        if version.is_none() {
            examples.extend(layout.columns_of_no_version(self.examples.group_rows(group)));
        }
        let group = RowGroup { requests, examples };
        let tae_dim = version.map_or(0, |version| version.tae_dim);
        let fits = |rows: &Vec<LoggedRequest>| {
            rows.iter().all(|row| row.tae.len() == tae_dim * row.example.targets.len())
        };
        layout.rows(&group).filter(fits).ok_or_else(|| {
            Error::data(
                &self.path,
                "its rows do not fit the requests file of the same number, its metadata or the \
                 schema",
            )
        })
    }
}
