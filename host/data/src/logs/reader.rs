//! Reading feature logs of the past, for one FM version, in the order they were
//! written, a row group at a time. Corrections are applied to their rows.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::corrections::Corrections;
use super::layout::Layout;
use super::pair::Pair;
use super::{FileNote, LogManifest, LogPosition, LogVersion, Logged, numbers};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// A complete file.
struct File {
    number: u32,
    /// Requests and examples.
    rows: (usize, usize),
    note: FileNote,
}

/// A log directory, opened for one FM version.
pub struct LogReader {
    /// The schema of its columns.
    pub schema: Arc<Schema>,
    /// What holds for all its files.
    pub manifest: LogManifest,
    /// The FM version whose embeddings are read; empty where there are no files.
    pub fm_version: String,
    /// Length of its target-aware embedding.
    pub tae_dim: usize,
    /// The number of requests in it, corrections among them.
    pub requests: usize,
    /// The number of examples (targets) in it.
    pub examples: usize,
    dir: PathBuf,
    /// Complete files that hold the version.
    numbers: Vec<u32>,
    /// After the last complete file, whether it holds the version or not.
    end: LogPosition,
    corrections: Corrections,
}

impl LogReader {
    /// Opens a log directory for the one FM version that it holds, and counts its rows.
    ///
    /// # Errors
    /// No logs, logs of several FM versions, or of another format.
    pub fn open(dir: &Path) -> Result<LogReader> {
        Self::open_for(dir, None)
    }

    /// As `open`, for a given FM version. Files without its embeddings are passed over.
    ///
    /// # Errors
    /// No logs, or none of that version.
    pub fn open_for(dir: &Path, version: Option<&str>) -> Result<LogReader> {
        let (manifest, schema) = opened(dir)?;
        let numbers = numbers(dir)?;
        let end = numbers.last().map_or(LogPosition::default(), |last| LogPosition::file(last + 1));
        let mut files = Vec::with_capacity(numbers.len());
        for number in numbers {
            // Opened one at a time: there can be more files than a process may have open.
            let pair = Pair::open(dir, number)?;
            files.push(File { number, rows: pair.rows(), note: pair.note });
        }
        let notes = files.iter().flat_map(|file| &file.note.versions);
        let chosen = choose(dir, &notes.collect(), version)?;
        let all = files.len();
        files.retain(|file| file.note.versions.contains(&chosen));
        if files.len() < all {
            let (version, without) = (&chosen.version, all - files.len());
            tracing::warn!(
                "{}: {without} of {all} files have no TAEs of FM {version}; they are passed over",
                dir.display()
            );
        }
        let mut reader = LogReader {
            schema,
            manifest,
            requests: files.iter().map(|file| file.rows.0).sum(),
            examples: files.iter().map(|file| file.rows.1).sum(),
            fm_version: chosen.version,
            tae_dim: chosen.tae_dim,
            dir: dir.to_path_buf(),
            numbers: files.iter().map(|file| file.number).collect(),
            end,
            corrections: Corrections::default(),
        };
        reader.gather_corrections(&files)?;
        Ok(reader)
    }

    /// The FM versions whose embeddings a log directory holds.
    ///
    /// # Errors
    /// No logs, or damaged ones.
    pub fn versions(dir: &Path) -> Result<Vec<LogVersion>> {
        opened(dir)?;
        let mut found = BTreeSet::new();
        for number in numbers(dir)? {
            found.extend(Pair::note(dir, number)?.versions);
        }
        Ok(found.into_iter().collect())
    }

    /// All requests, in the order they were written, with what is known of them by now.
    pub fn iter(&self) -> LogIter<'_> {
        LogIter {
            log: self,
            layout: Layout::new(&self.schema),
            next_file: 0,
            open: None,
            ready: Vec::new().into_iter(),
        }
    }

    /// Where a follower goes on after all that is read here.
    pub fn end(&self) -> LogPosition {
        self.end
    }

    fn gather_corrections(&mut self, files: &[File]) -> Result<()> {
        let layout = Layout::new(&self.schema);
        let version = self.version();
        for file in files.iter().filter(|file| file.note.corrections > 0) {
            let pair = Pair::open(&self.dir, file.number)?;
            for group in 0..pair.groups() {
                let rows = pair.read(group, &layout, &version)?;
                rows.iter().filter(|row| row.correction).for_each(|row| self.corrections.add(row));
            }
        }
        Ok(())
    }

    fn version(&self) -> LogVersion {
        LogVersion::new(&self.fm_version, self.tae_dim)
    }
}

/// The manifest and the schema of a log directory.
pub(super) fn opened(dir: &Path) -> Result<(LogManifest, Arc<Schema>)> {
    if !dir.join("log-manifest.json").is_file() {
        return Err(Error::data(
            dir,
            "no feature logs here: `log-manifest.json` is missing; `hypercast materialise` writes it",
        ));
    }
    Ok((LogManifest::load(dir)?, Arc::new(Schema::load(&dir.join("schema.toml"))?)))
}

fn choose(dir: &Path, found: &BTreeSet<&LogVersion>, asked: Option<&str>) -> Result<LogVersion> {
    let names = || {
        let names: Vec<&str> = found.iter().map(|version| version.version.as_str()).collect();
        names.join(", ")
    };
    let own = |version: &&&LogVersion| asked.is_none_or(|asked| version.version == asked);
    let mut fitting = found.iter().filter(own);
    match (fitting.next(), fitting.next(), asked) {
        (Some(one), None, _) => Ok((*one).clone()),
        (None, _, None) => Ok(LogVersion::new("", 0)),
        (None, _, Some(asked)) => Err(Error::data(
            dir,
            format!("it holds no TAEs of FM {asked}; there are those of {:?}", names()),
        )),
        (Some(_), Some(_), None) => Err(Error::data(
            dir,
            format!("it holds TAEs of FM {}; choose one of them (`--fm VERSION`)", names()),
        )),
        (Some(one), Some(other), Some(asked)) => Err(Error::data(
            dir,
            format!(
                "TAEs of FM {asked} have {} values in some of its files and {} in others; write the logs again",
                one.tae_dim, other.tae_dim
            ),
        )),
    }
}

/// Streams the requests of a log.
pub struct LogIter<'a> {
    log: &'a LogReader,
    layout: Layout,
    next_file: usize,
    /// The open file and its next row group.
    open: Option<(Pair, usize)>,
    ready: std::vec::IntoIter<Logged>,
}

impl LogIter<'_> {
    /// Reads the next row group; false at the end.
    fn fill(&mut self) -> Result<bool> {
        loop {
            let Some((pair, group)) = self.open.as_mut() else {
                let Some(&number) = self.log.numbers.get(self.next_file) else {
                    return Ok(false);
                };
                self.next_file += 1;
                self.open = Some((Pair::open(&self.log.dir, number)?, 0));
                continue;
            };
            if *group == pair.groups() {
                self.open = None;
                continue;
            }
            *group += 1;
            let mut rows = pair.read(*group - 1, &self.layout, &self.log.version())?;
            rows.retain(|row| !row.correction);
            rows.iter_mut().for_each(|row| self.log.corrections.apply(row));
            self.ready = rows.into_iter();
            return Ok(true);
        }
    }
}

impl Iterator for LogIter<'_> {
    type Item = Result<Logged>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(logged) = self.ready.next() {
                return Some(Ok(logged));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
