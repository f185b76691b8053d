//! Reading feature logs in the order they were written, a row group at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layout::{Group, Layout};
use super::{LogManifest, Logged, examples_path, numbers, requests_path};
use crate::dataset::table::TableReader;
use crate::error::{Error, Result};
use crate::schema::Schema;

/// A log directory.
pub struct LogReader {
    /// The schema of its columns.
    pub schema: Arc<Schema>,
    /// What holds for all its files.
    pub manifest: LogManifest,
    /// The number of requests in it.
    pub requests: usize,
    /// The number of examples (targets) in it.
    pub examples: usize,
    dir: PathBuf,
    numbers: Vec<u32>,
}

impl LogReader {
    /// Opens a log directory and counts its rows.
    pub fn open(dir: &Path) -> Result<LogReader> {
        if !dir.join("log-manifest.json").is_file() {
            return Err(Error::data(
                dir,
                "no feature logs here: `log-manifest.json` is missing; `hypercast materialise` writes it",
            ));
        }
        let manifest = LogManifest::load(dir)?;
        let schema = Arc::new(Schema::load(&dir.join("schema.toml"))?);
        let numbers = numbers(dir)?;
        let (mut requests, mut examples) = (0, 0);
        for &number in &numbers {
            requests += TableReader::open(&requests_path(dir, number))?.rows();
            examples += TableReader::open(&examples_path(dir, number))?.rows();
        }
        Ok(LogReader { schema, manifest, requests, examples, dir: dir.to_path_buf(), numbers })
    }

    /// All requests, in the order they were written.
    pub fn iter(&self) -> LogIter<'_> {
        LogIter {
            log: self,
            layout: Layout::new(&self.schema),
            next_file: 0,
            open: None,
            ready: Vec::new().into_iter(),
        }
    }
}

/// Streams the requests of a log.
pub struct LogIter<'a> {
    log: &'a LogReader,
    layout: Layout,
    next_file: usize,
    open: Option<Pair>,
    ready: std::vec::IntoIter<Logged>,
}

struct Pair {
    requests: TableReader,
    examples: TableReader,
    path: PathBuf,
    next_group: usize,
}

impl LogIter<'_> {
    /// Reads the next row group; false at the end.
    fn fill(&mut self) -> Result<bool> {
        loop {
            let Some(pair) = self.open.as_mut() else {
                let Some(&number) = self.log.numbers.get(self.next_file) else {
                    return Ok(false);
                };
                self.next_file += 1;
                self.open = Some(Pair::open(&self.log.dir, number)?);
                continue;
            };
            if pair.next_group == pair.requests.groups() {
                self.open = None;
                continue;
            }
            let (at, path) = (pair.next_group, pair.path.clone());
            pair.next_group += 1;
            let group = Group {
                requests: pair.requests.read(at, &self.layout.request_fields())?,
                examples: pair.examples.read(at, &self.layout.example_fields())?,
            };
            let rows = self.layout.rows(&group).filter(|rows| self.fit(rows));
            let rows = rows.ok_or_else(|| Error::data(path, "its rows do not fit the requests file of the same number, the manifest or the schema"))?;
            self.ready = rows.into_iter();
            return Ok(true);
        }
    }

    fn fit(&self, rows: &[Logged]) -> bool {
        let (dim, surfaces) = (self.log.manifest.tae_dim, self.log.schema.surfaces.len());
        rows.iter().all(|row| {
            row.tae.len() == dim * row.example.targets.len()
                && usize::from(row.example.surface) < surfaces
        })
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

impl Pair {
    fn open(dir: &Path, number: u32) -> Result<Pair> {
        let path = examples_path(dir, number);
        let (requests, examples) =
            (TableReader::open(&requests_path(dir, number))?, TableReader::open(&path)?);
        if requests.groups() != examples.groups() {
            return Err(Error::data(
                path,
                "it has not as many row groups as the requests file of the same number",
            ));
        }
        Ok(Pair { requests, examples, path, next_group: 0 })
    }
}
