//! Files of rows: CSV, TSV, lines of JSON and Parquet, as they are or compressed.
//!
//! All are read one row or one batch at a time, so that memory does not grow with the files. A row
//! that cannot be read costs that row alone; a file that cannot be read ends the import.

mod compressed;
mod json;
mod parquet;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hypercast_core::progress::Progress;
use serde::{Deserialize, Serialize};

use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::report::{ImportReport, RowFailure};
use crate::text::{TextFile, column_names};

/// Rows between two looks at how far a file was read.
const PROGRESS_ROWS: u64 = 4096;

/// A row of any file.
pub(crate) trait Row {
    /// The cell of one of the columns that were asked for, by index.
    fn cell(&self, column: usize) -> Cell<'_>;
}

/// The form of a file's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileFormat {
    /// Cells between commas, in quotes or not, below a header.
    Csv,
    /// Cells between tabs, without quotes, below a header.
    Tsv,
    /// A JSON object a line.
    Jsonl,
    /// Apache Parquet, compressed inside or not.
    Parquet,
}

impl FromStr for FileFormat {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<FileFormat, String> {
        match name {
            "csv" => Ok(FileFormat::Csv),
            "tsv" => Ok(FileFormat::Tsv),
            "jsonl" => Ok(FileFormat::Jsonl),
            "parquet" => Ok(FileFormat::Parquet),
            _ => Err("csv, tsv, jsonl or parquet".to_owned()),
        }
    }
}

impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileFormat::Csv => "csv",
            FileFormat::Tsv => "tsv",
            FileFormat::Jsonl => "jsonl",
            FileFormat::Parquet => "parquet",
        })
    }
}

/// What the names of files do not say. All of it is optional.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputOptions {
    /// The form of the rows; by default the file's ending says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FileFormat>,
    /// The ASCII character between two cells; a comma in CSV, a tab in TSV.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delimiter: Option<char>,
    /// Whether a cell may stand in quotes; so it is in CSV and not in TSV.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quoting: Option<bool>,
}

/// A file to read.
#[derive(Debug, Clone)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    format: FileFormat,
    /// What is between two cells of a text.
    delimiter: u8,
    quoting: bool,
}

/// What reads files: the columns that are wanted, and where it tells what it met.
pub(crate) struct Reading<'a> {
    pub(crate) columns: &'a [String],
    pub(crate) report: &'a mut ImportReport,
    pub(crate) progress: &'a mut Progress,
    /// The most rows that are read of a file.
    pub(crate) most_rows: u64,
}

impl<'a> Reading<'a> {
    /// Reads all rows of each file.
    pub(crate) fn new(
        columns: &'a [String],
        report: &'a mut ImportReport,
        progress: &'a mut Progress,
    ) -> Reading<'a> {
        Reading { columns, report, progress, most_rows: u64::MAX }
    }

    /// The same with other columns.
    pub(crate) fn of_columns<'b>(&'b mut self, columns: &'b [String]) -> Reading<'b> {
        Reading { columns, report: self.report, progress: self.progress, most_rows: self.most_rows }
    }
}

impl InputFile {
    /// The files that `patterns` name, in the order of the patterns, those of a pattern sorted by
    /// path. `*` and `?` stand for parts of a name, `**` for folders. Relative ones count from
    /// `base`.
    ///
    /// # Errors
    /// A pattern is wrong or names no file, or nothing says the form of a file's rows.
    pub(crate) fn find(
        patterns: &[String],
        base: &Path,
        options: &InputOptions,
    ) -> Result<Vec<InputFile>> {
        let mut files = Vec::new();
        for pattern in patterns {
            // The folder is one, whatever it is called; only the pattern is a pattern.
            let base = glob::Pattern::escape(&base.to_string_lossy());
            let full = Path::new(&base).join(pattern);
            let wrong = |reason: String| Error::data(&full, reason);
            let found = glob::glob(&full.to_string_lossy())
                .map_err(|error| wrong(format!("not a pattern of files: {error}")))?;
            let first = files.len();
            for path in found {
                let path = path.map_err(|error| wrong(error.to_string()))?;
                if path.is_file() {
                    files.push(InputFile::new(path, options)?);
                }
            }
            if files.len() == first {
                let folder =
                    if full.is_dir() { "; it is a folder: name it as FOLDER/*" } else { "" };
                return Err(wrong(format!("no file has this name{folder}")));
            }
        }
        if files.is_empty() {
            return Err(Error::invalid("`files` is empty; name at least one"));
        }
        Ok(files)
    }

    fn new(path: PathBuf, options: &InputOptions) -> Result<InputFile> {
        let name = path.to_string_lossy().to_lowercase();
        let bare = compressed::ENDINGS.iter().find_map(|ending| name.strip_suffix(ending));
        let format = match bare.unwrap_or(&name).rsplit_once('.').map(|(_, ending)| ending) {
            _ if options.format.is_some() => options.format,
            Some("csv") => Some(FileFormat::Csv),
            Some("tsv" | "tab") => Some(FileFormat::Tsv),
            Some("jsonl" | "ndjson" | "json") => Some(FileFormat::Jsonl),
            Some("parquet" | "parq" | "pq") => Some(FileFormat::Parquet),
            _ => None,
        };
        let Some(format) = format else {
            let reason = "its ending does not say what it is; set `options.format` in the mapping, or \
                          `--format` of `data infer`, to csv, tsv, jsonl or parquet";
            return Err(Error::data(path, reason));
        };
        if format == FileFormat::Parquet && bare.is_some() {
            let reason = "Parquet is compressed inside; decompress the file around it first";
            return Err(Error::data(path, reason));
        }
        let usual = if format == FileFormat::Tsv { '\t' } else { ',' };
        let delimiter = options.delimiter.unwrap_or(usual);
        let Some(delimiter) = u8::try_from(delimiter).ok().filter(u8::is_ascii) else {
            return Err(Error::invalid(format!("delimiter {delimiter:?} is no ASCII character")));
        };
        let quoting = options.quoting.unwrap_or(format != FileFormat::Tsv);
        Ok(InputFile { path, format, delimiter, quoting })
    }

    /// Its size in bytes, compressed as it is; progress counts these.
    pub(crate) fn size(&self) -> Result<u64> {
        Ok(self.path.metadata().map_err(Error::io(&self.path))?.len())
    }

    /// The names of its columns. A file of JSON has those of its first rows.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn column_names(&self) -> Result<Vec<String>> {
        let names = match self.format {
            FileFormat::Parquet => return parquet::column_names(&self.path),
            FileFormat::Jsonl => json::column_names(self.open(&Arc::default())?),
            _ => column_names(self.open(&Arc::default())?, self.delimiter, self.quoting),
        };
        names.map_err(|reason| Error::data(&self.path, reason))
    }

    /// Calls `add` with each row, and counts the rows that it refuses.
    ///
    /// # Errors
    /// The file cannot be read or lacks a column, no row of it can be used, or `add` ends the
    /// import.
    pub(crate) fn read(
        &self,
        reading: &mut Reading<'_>,
        mut add: impl FnMut(&dyn Row) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        if self.format == FileFormat::Parquet {
            return parquet::read(&self.path, reading, add);
        }
        let position = Arc::<AtomicU64>::default();
        let content = self.open(&position)?;
        let (mut rows, mut told) = (0_u64, 0);
        let progress = &mut *reading.progress;
        let counted = |row: &dyn Row| {
            rows += 1;
            if rows.is_multiple_of(PROGRESS_ROWS) {
                let at = position.load(Ordering::Relaxed);
                progress.advance(at - told, || self.path.display().to_string());
                told = at;
            }
            add(row)
        };
        let name = self.path.display().to_string();
        let (columns, report) = (reading.columns, &mut *reading.report);
        let most_rows = reading.most_rows;
        match self.format {
            FileFormat::Jsonl => {
                json::JsonFile { name, content, columns, most_rows }.read(report, counted)?;
            }
            _ => {
                let file = TextFile {
                    name,
                    content,
                    delimiter: self.delimiter,
                    quoting: self.quoting,
                    columns: columns.to_vec(),
                    most_rows,
                };
                file.read(report, counted)?;
            }
        }
        let size = self.size()?;
        progress.advance(size.saturating_sub(told), || self.path.display().to_string());
        Ok(())
    }

    /// Calls `add` with each line that is not empty, and counts those that it refuses.
    ///
    /// # Errors
    /// The file cannot be read, no line of it can be used, or `add` ends the import.
    pub(crate) fn read_lines(
        &self,
        reading: &mut Reading<'_>,
        add: impl FnMut(&[u8]) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        let content = self.open(&Arc::default())?;
        let name = self.path.display().to_string();
        let lines = json::LineFile { name, content, most_rows: reading.most_rows };
        lines.read(reading.report, add)?;
        reading.progress.advance(self.size()?, || self.path.display().to_string());
        reading.report.close()
    }

    /// Opens a text, whose bytes on disk are counted in `position`.
    fn open(&self, position: &Arc<AtomicU64>) -> Result<Box<dyn Read>> {
        let file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let counted = CountingReader { file, position: position.clone() };
        compressed::decompress(counted).map_err(Error::io(&self.path))
    }
}

/// Reads a file and counts its bytes.
struct CountingReader {
    file: File,
    position: Arc<AtomicU64>,
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.position.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
