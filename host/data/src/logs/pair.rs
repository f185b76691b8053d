//! One file of the feature logs: its pair of tables and what it says of itself.
//! Which files there are, and what is read of them, is the readers' business.

use std::path::{Path, PathBuf};

use super::layout::{Group, Layout};
use super::{FileNote, LogVersion, Logged, NOTE, examples_path, requests_path};
use crate::dataset::table::TableReader;
use crate::error::{CommonErrors as _, Error, Result};

/// An open pair.
pub(super) struct Pair {
    pub(super) note: FileNote,
    requests: TableReader,
    examples: TableReader,
    path: PathBuf,
}

impl Pair {
    /// Opens the pair of a number, which is complete.
    pub(super) fn open(dir: &Path, number: u32) -> Result<Pair> {
        let path = examples_path(dir, number);
        let (requests, examples) =
            (TableReader::open(&requests_path(dir, number))?, TableReader::open(&path)?);
        if requests.groups() != examples.groups() {
            return Err(Error::data(
                path,
                "it has not as many row groups as the requests file of the same number",
            ));
        }
        let note = note(&requests, &requests_path(dir, number))?;
        Ok(Pair { note, requests, examples, path })
    }

    /// What a file says of itself, without its rows.
    pub(super) fn note(dir: &Path, number: u32) -> Result<FileNote> {
        let path = requests_path(dir, number);
        note(&TableReader::open(&path)?, &path)
    }

    /// The version among those that it has.
    pub(super) fn version(&self, version: &str) -> Option<&LogVersion> {
        self.note.versions.iter().find(|own| own.version == version)
    }

    /// Requests and examples.
    pub(super) fn rows(&self) -> (usize, usize) {
        (self.requests.rows(), self.examples.rows())
    }

    /// The number of row groups.
    pub(super) fn groups(&self) -> usize {
        self.requests.groups()
    }

    /// The number of requests of a row group.
    pub(super) fn group_requests(&self, group: usize) -> usize {
        self.requests.group_rows(group)
    }

    /// The requests of a row group, with the embeddings of a version that it has.
    pub(super) fn read(
        &self,
        group: usize,
        layout: &Layout,
        version: &LogVersion,
    ) -> Result<Vec<Logged>> {
        let mut fields = layout.example_fields();
        fields.push(Layout::tae_field(&version.version));
        let group = Group {
            requests: self.requests.read(group, &layout.request_fields())?,
            examples: self.examples.read(group, &fields)?,
        };
        let fits = |rows: &Vec<Logged>| {
            rows.iter().all(|row| {
                row.tae.len() == version.tae_dim * row.example.targets.len()
                    && layout.has_surface(row.example.surface)
            })
        };
        layout.rows(&group).filter(fits).ok_or_else(|| {
            Error::data(&self.path, "its rows do not fit the requests file of the same number, what that says of itself, or the schema")
        })
    }
}

fn note(requests: &TableReader, path: &Path) -> Result<FileNote> {
    let wrong = |why: String| Error::data(path, format!("{why}; write the logs again"));
    let text = requests.note(NOTE).ok_or_else(|| wrong("it does not say what it holds".into()))?;
    serde_json::from_str(text).map_err(|error| wrong(format!("what it says it holds: {error}")))
}
