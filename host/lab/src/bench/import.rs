//! An import of a log in Parquet whose rows stand in no order, beside DuckDB, which sorts and casts
//! the same rows into a Parquet file of the same columns.
//!
//! Both run as processes of their own, one after the other, so that the peak of their memory can be
//! told; DuckDB has as many threads as the machine and as much memory as we took. Its first query
//! sorts rows by their own time. Its second does what an import does: a request has the time of its
//! first row. Everything is in a temporary folder (`TMPDIR`), which takes about 200 bytes a row.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use hypercast_core::atomic_file;
use hypercast_core::hash::mix64;
use hypercast_data::dataset::table::{CellType, Column, Field, TableReader, TableWriter};

use super::{BenchOptions, BenchReport, temporary};
use crate::error::{CommonErrors as _, Error, Result};
use crate::processes::program;

const MAPPING: &str = include_str!("import_mapping.toml");
const DUCKDB: &str = include_str!("duckdb_rival.py");

const ROWS_PER_GROUP: u64 = 1 << 17;
const ROWS_A_REQUEST: u64 = 8;
/// Time between two requests, and when the log begins.
const REQUEST_MS: u64 = 100;
const START_MS: i64 = 1_764_000_000_000;

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What a process took.
struct Consumption {
    seconds: f64,
    peak_mib: f64,
    output: String,
}

/// Measures the import of `--rows` rows.
pub(super) fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    let dir = dir.path();
    write_log(&dir.join("log.parquet"), options.rows as u64)?;
    let mapping = dir.join("mapping.toml");
    atomic_file::write(&mapping, MAPPING.as_bytes()).map_err(Error::io(&mapping))?;
    let into = dir.join("data");
    let mut import = Command::new(program()?);
    import.args(["data", "import", "--mapping"]).arg(&mapping).arg("--into").arg(&into);
    let ours = consumed(&mut import, "hypercast data import")?;
    let written = TableReader::open(&into.join("impressions.parquet"))?.rows();
    if written != options.rows {
        return Err(Error::internal(format!("{written} of {} rows imported", options.rows)));
    }
    let rate = |of: &Consumption| options.rows as f64 / of.seconds;
    let name = format!("import of {} rows", options.rows);
    let memory = format!("memory, {name}");
    let rivals =
        [("DuckDB, rows by their time", "rows"), ("DuckDB, requests by their time", "requests")];
    let mut is_compared = false;
    for (rival, order) in rivals {
        let mut duckdb = Command::new(&options.python);
        duckdb.args(["-c", DUCKDB, order]).current_dir(dir);
        duckdb.arg(available_parallelism().map_or(1, usize::from).to_string());
        duckdb.arg(format!("{}MiB", ours.peak_mib.ceil()));
        match consumed(&mut duckdb, "DuckDB") {
            Ok(theirs) => {
                report.version("duckdb", theirs.output.trim());
                report.versus(&name, rate(&ours), "rows/s", rival, rate(&theirs));
                report.versus(&memory, ours.peak_mib, "MiB", rival, theirs.peak_mib);
                is_compared = true;
            }
            Err(error) => {
                report.note(format!("{rival}: {error}; name a Python with duckdb by --python"))
            }
        }
    }
    if !is_compared {
        report.figure(&name, rate(&ours), "rows/s");
        report.figure(&memory, ours.peak_mib, "MiB");
    }
    Ok(())
}

/// Runs a program to its end, and tells what it took and printed.
fn consumed(command: &mut Command, name: &str) -> Result<Consumption> {
    let failed = |why: String| Error::internal(format!("{name}: {why}"));
    let start = Instant::now();
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let mut peak_mib = 0.0_f64;
    // What both print fits into a pipe.
    while child.try_wait().map_err(|error| failed(error.to_string()))?.is_none() {
        peak_mib = peak_mib.max(peak_memory_mib(&child));
        sleep(POLL_INTERVAL);
    }
    let seconds = start.elapsed().as_secs_f64();
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(failed(text.lines().last().unwrap_or("it ended without a word").to_owned()));
    }
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(Consumption { seconds, peak_mib, output })
}

/// The most memory that a process had in use so far; 0 once it has ended.
fn peak_memory_mib(child: &Child) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

/// Writes a log of requests, whose rows stand in a random order.
fn write_log(path: &Path, rows: u64) -> Result<()> {
    let fields = vec![
        Field::new("request_id", CellType::U64),
        Field::new("user_id", CellType::U64),
        Field::new("item_id", CellType::U64),
        Field::new("placement", CellType::Text),
        Field::new("shown_at", CellType::I64),
        Field::new("closed_at", CellType::I64),
        Field::new("clicked", CellType::Bool),
        Field::new("bought", CellType::U32),
        Field::new("watch_ratio", CellType::F32),
        Field::new("device", CellType::Text),
        Field::new("battery", CellType::F32),
    ];
    let stride = stride(rows);
    let mut writer = TableWriter::create(path, fields)?;
    for start in (0..rows).step_by(ROWS_PER_GROUP as usize) {
        let group = start..rows.min(start + ROWS_PER_GROUP);
        let group: Vec<LoggedRow> = group
            .map(|at| {
                LoggedRow::new(
                    (u128::from(at) * u128::from(stride) % u128::from(rows)) as u64,
                    rows,
                )
            })
            .collect();
        writer.write(&columns(&group))?;
    }
    Ok(writer.finish()?)
}

/// A number whose multiples, modulo `rows`, are all numbers below it in an order without a pattern.
fn stride(rows: u64) -> u64 {
    fn divisor(a: u64, b: u64) -> u64 {
        if b == 0 { a } else { divisor(b, a % b) }
    }
    let golden = (rows as f64 * 0.618_034) as u64;
    (golden.max(1)..).find(|&stride| divisor(stride, rows) == 1).expect("1 is one")
}

struct LoggedRow {
    request: u64,
    /// Random bits of the row, and of its request.
    row: u64,
    of_request: u64,
    /// The number of rows of the log.
    rows: u64,
}

impl LoggedRow {
    fn new(at: u64, rows: u64) -> LoggedRow {
        let request = at / ROWS_A_REQUEST;
        LoggedRow { request, row: mix64(at + 1), of_request: mix64(!request), rows }
    }

    fn shown_ms(&self) -> i64 {
        START_MS + (self.request * REQUEST_MS) as i64
    }
}

fn columns(rows: &[LoggedRow]) -> Vec<Column> {
    let text = |of: &[&str], bits: u64| of[bits as usize % of.len()].to_owned();
    let placement = |bits| text(&["home", "search", "related"], bits);
    let device = |bits| text(&["ios", "android", "web", "tv"], bits);
    vec![
        Column::scalars(rows.iter().map(|row| row.request + 1)),
        Column::scalars(rows.iter().map(|row| row.of_request % (row.rows / 100 + 10))),
        Column::scalars(rows.iter().map(|row| row.row % (row.rows / 1000 + 100))),
        Column::scalars(rows.iter().map(|row| placement(row.of_request >> 40))),
        Column::scalars(rows.iter().map(LoggedRow::shown_ms)),
        Column::scalars(rows.iter().map(|row| row.shown_ms() + (row.row >> 48) as i64)),
        Column::scalars(rows.iter().map(|row| row.row >> 32 & 7 == 0)),
        Column::scalars(rows.iter().map(|row| u32::from(row.row >> 35 & 31 == 0))),
        Column::scalars(rows.iter().map(|row| (row.row >> 20 & 1023) as f32 / 256.0)),
        Column::scalars(rows.iter().map(|row| device(row.of_request >> 20))),
        Column::scalars(rows.iter().map(|row| (row.of_request >> 10 & 127) as f32 / 128.0)),
    ]
}
