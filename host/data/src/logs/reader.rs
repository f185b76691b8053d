//! Reading feature logs of the past for one FM version: in the order they were written, one row
//! group at a time, with corrections applied to the requests that they belong to.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_fm::example::Outcome;

use super::file::{FileNote, LogFile, OpenLog, file_numbers, sync_names};
use super::layout::LogLayout;
use super::{LogManifest, LogPosition, LogVersion, LoggedRequest, load_header};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// The position behind some files.
fn end(numbers: &[u32]) -> LogPosition {
    numbers.last().map_or(LogPosition::default(), |last| LogPosition::file(last + 1))
}

/// The description of a complete file.
struct FileInfo {
    number: u32,
    requests: usize,
    examples: usize,
    note: FileNote,
}

/// A log directory, opened for one FM version.
pub struct LogReader {
    /// The schema that defines its columns.
    pub schema: Arc<Schema>,
    /// Properties of all its files.
    pub manifest: LogManifest,
    /// The FM version whose embeddings are read; empty if there are none.
    pub fm_version: String,
    /// The length of its embeddings.
    pub tae_dim: usize,
    /// The length of the items' content vectors in the newest file that has any; 0 without any.
    pub content_dim: usize,
    /// How many files have requests, and content vectors of another length or none.
    pub other_content: usize,
    /// The number of requests, including corrections.
    pub requests: usize,
    /// The number of examples (targets).
    pub examples: usize,
    dir: PathBuf,
    /// The complete files that contain the version.
    numbers: Vec<u32>,
    /// The position from which a follower continues after these logs: after the last complete file,
    /// whether or not it contains the version.
    pub end: LogPosition,
    corrections: Corrections,
}

impl LogReader {
    /// Opens a log directory for its only FM version, and counts its rows.
    ///
    /// # Errors
    /// The directory has no logs, logs of several FM versions, or logs of another format.
    pub fn open(dir: &Path) -> Result<LogReader> {
        Self::open_for(dir, None)
    }

    /// As `open`, for a given FM version. Files without its embeddings are skipped.
    ///
    /// # Errors
    /// The directory has no logs, or none of that version.
    pub fn open_for(dir: &Path, version: Option<&str>) -> Result<LogReader> {
        Self::open_with(dir, |found| choose(dir, found, version).map(Some))
    }

    /// Opens all requests of a log directory, whichever FMs embedded them, without embeddings.
    ///
    /// # Errors
    /// The directory has no logs, or logs of another format.
    pub fn open_without_tae(dir: &Path) -> Result<LogReader> {
        Self::open_with(dir, |_| Ok(None))
    }

    fn open_with(
        dir: &Path,
        choose: impl Fn(&BTreeSet<&LogVersion>) -> Result<Option<LogVersion>>,
    ) -> Result<LogReader> {
        let (manifest, schema) = load_header(dir)?;
        let numbers = file_numbers(dir)?;
        // A follower will save that it goes on behind them.
        sync_names(dir)?;
        let end = end(&numbers);
        let mut files = Vec::with_capacity(numbers.len());
        for number in numbers {
            // One at a time: there can be more files than a process may have open.
            let file = LogFile::open(dir, number)?;
            let (requests, examples) = (file.requests.rows(), file.examples.rows());
            files.push(FileInfo { number, requests, examples, note: file.note });
        }
        let notes = files.iter().flat_map(|file| &file.note.versions);
        let chosen = choose(&notes.collect())?;
        let with_rows = |files: &[FileInfo]| files.iter().filter(|file| file.requests > 0).count();
        let all = with_rows(&files);
        let is_read = |file: &FileInfo| {
            chosen.as_ref().is_none_or(|chosen| file.note.versions.contains(chosen))
        };
        files.retain(is_read);
        let chosen = chosen.unwrap_or_else(|| LogVersion::new("", 0));
        if with_rows(&files) < all {
            let (version, without) = (&chosen.version, all - with_rows(&files));
            tracing::warn!(
                "{}: skipping {without} of {all} files, which have no TAEs of FM {version}",
                dir.display()
            );
        }
        let content_dims = files.iter().rev().map(|file| file.note.content_dim);
        let content_dim = content_dims.into_iter().find(|dim| *dim > 0).unwrap_or_default();
        let has_other = |file: &&FileInfo| {
            file.requests > file.note.corrections && file.note.content_dim != content_dim
        };
        let mut reader = LogReader {
            schema,
            manifest,
            requests: files.iter().map(|file| file.requests).sum(),
            examples: files.iter().map(|file| file.examples).sum(),
            fm_version: chosen.version,
            tae_dim: chosen.tae_dim,
            content_dim,
            other_content: files.iter().filter(has_other).count(),
            dir: dir.to_path_buf(),
            numbers: files.iter().map(|file| file.number).collect(),
            end,
            corrections: Corrections::default(),
        };
        reader.gather_corrections(&files)?;
        Ok(reader)
    }

    /// The position behind the last complete file of a log directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn end_of(dir: &Path) -> Result<LogPosition> {
        Ok(end(&file_numbers(dir)?))
    }

    /// Whether the files behind a position have a request on one of these surfaces, whichever FMs
    /// embedded it. Corrections of earlier requests do not count.
    ///
    /// # Errors
    /// The directory has no logs, or damaged ones.
    pub fn has_requests_behind(dir: &Path, from: LogPosition, surfaces: &[u16]) -> Result<bool> {
        let (_, schema) = load_header(dir)?;
        let layout = LogLayout::new(&schema);
        for number in file_numbers(dir)?.into_iter().filter(|&number| number >= from.file) {
            let mut open = LogFile::open(dir, number)?.starting_at(0, None);
            while let Some(logged) = open.next_request(&layout)? {
                if !logged.correction && surfaces.contains(&logged.example.surface) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The FM versions whose embeddings a log directory contains.
    ///
    /// # Errors
    /// The directory has no logs, or damaged ones.
    pub fn versions(dir: &Path) -> Result<Vec<LogVersion>> {
        load_header(dir)?;
        let mut found = BTreeSet::new();
        for number in file_numbers(dir)? {
            found.extend(FileNote::read(dir, number)?.versions);
        }
        Ok(found.into_iter().collect())
    }

    /// All requests in the order they were written, with the outcomes that are known by now.
    pub fn iter(&self) -> LogIter<'_> {
        LogIter {
            log: self,
            layout: LogLayout::new(&self.schema),
            numbers: self.numbers.iter(),
            open: None,
        }
    }

    fn gather_corrections(&mut self, files: &[FileInfo]) -> Result<()> {
        let layout = LogLayout::new(&self.schema);
        for info in files.iter().filter(|info| info.note.corrections > 0) {
            let mut open = self.open_file(info.number)?;
            while let Some(row) = open.next_request(&layout)? {
                if row.correction {
                    self.corrections.add(&row);
                }
            }
        }
        Ok(())
    }

    fn open_file(&self, number: u32) -> Result<OpenLog> {
        let version = LogVersion::new(&self.fm_version, self.tae_dim);
        let version = Some(version).filter(|version| !version.version.is_empty());
        Ok(LogFile::open(&self.dir, number)?.starting_at(0, version))
    }
}

/// The version to read among those in `found`; one without a name, which no file has, if none is
/// there.
fn choose(dir: &Path, found: &BTreeSet<&LogVersion>, version: Option<&str>) -> Result<LogVersion> {
    let names = || {
        let names: Vec<&str> = found.iter().map(|own| own.version.as_str()).collect();
        names.join(", ")
    };
    let wanted = |own: &&&LogVersion| version.is_none_or(|version| own.version == version);
    let mut matching = found.iter().filter(wanted);
    let reason = match (matching.next(), matching.next(), version) {
        (Some(one), None, _) => return Ok((*one).clone()),
        (None, _, None) => return Ok(LogVersion::new("", 0)),
        (None, _, Some(version)) => {
            format!("it has no TAEs of FM {version}; it has those of {:?}", names())
        }
        (Some(_), Some(_), None) => {
            format!("it has TAEs of FM {}; choose one of them (`--fm VERSION`)", names())
        }
        (Some(one), Some(other), Some(version)) => format!(
            "TAEs of FM {version} have {} values in some files and {} in others; write the logs again",
            one.tae_dim, other.tae_dim
        ),
    };
    Err(Error::data(dir, reason))
}

/// The outcomes of corrections, by request.
#[derive(Debug, Default)]
struct Corrections {
    /// Items and their outcomes, in the order written: a later correction is applied after it.
    by_request: HashMap<u64, Vec<(u64, Outcome)>>,
}

impl Corrections {
    fn add(&mut self, correction: &LoggedRequest) {
        let targets = correction.example.targets.iter();
        self.by_request
            .entry(correction.example.request)
            .or_default()
            .extend(targets.map(|target| (target.item.id, target.outcome)));
    }

    fn apply(&self, logged: &mut LoggedRequest) {
        let Some(changes) = self.by_request.get(&logged.example.request) else { return };
        for (item, change) in changes {
            for target in logged.example.targets.iter_mut().filter(|own| own.item.id == *item) {
                target.outcome = corrected(target.outcome, *change);
            }
        }
    }
}

/// An outcome in which everything that a correction knows is replaced.
fn corrected(outcome: Outcome, change: Outcome) -> Outcome {
    let mut values = outcome.values;
    for (value, change) in values.iter_mut().zip(change.values) {
        if !change.is_nan() {
            *value = change;
        }
    }
    Outcome {
        actions: outcome.actions & !change.known | change.actions & change.known,
        known: outcome.known | change.known,
        values,
    }
}

/// Streams the requests of a log.
pub struct LogIter<'a> {
    log: &'a LogReader,
    layout: LogLayout,
    /// The files that are not open yet.
    numbers: std::slice::Iter<'a, u32>,
    open: Option<OpenLog>,
}

impl LogIter<'_> {
    fn next_request(&mut self) -> Result<Option<LoggedRequest>> {
        loop {
            while let Some(open) = &mut self.open
                && let Some(mut logged) = open.next_request(&self.layout)?
            {
                if !logged.correction {
                    self.log.corrections.apply(&mut logged);
                    return Ok(Some(logged));
                }
            }
            let Some(&number) = self.numbers.next() else { return Ok(None) };
            self.open = Some(self.log.open_file(number)?);
        }
    }
}

impl Iterator for LogIter<'_> {
    type Item = Result<LoggedRequest>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_request().transpose()
    }
}
