//! KuaiRand-Pure (Gao et al., CIKM 2022): short videos, a surface a tab. `kuairand.toml` maps the
//! published files.
//!
//! The optional `user_history_*.parquet` contains what users saw before the logs start, without
//! exact times and tabs. It becomes history-only impressions on the surface `unknown`, one hour
//! apart, of which the newest has its true time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hypercast_data::dataset::Impression;
use hypercast_data::dataset::table::{CellType, Column, Field, TableReader};
use hypercast_fm::example::Outcome;

use super::{Computed, cell, float, look_at, number, wrong};
use crate::ImportReport;
use crate::cell::{Cell, TimeUnit};
use crate::error::{CommonErrors as _, Error, Result};
use crate::input::{InputFile, InputOptions};
use crate::mapping::{DerivedColumn, ImpressionSink, Mapping, PresetImport};
use crate::report::RowError;
use crate::requests::no_row;

const MAPPING: &str = include_str!("kuairand.toml");

/// The actions that the history contains, as bits of the mapping's actions.
const LONG_VIEW: u64 = 1 << 1;
const IS_LIKE: u64 = 1 << 2;

/// The time between events of the history, whose own times are not known.
const HISTORY_STEP_MS: i64 = 3_600_000;

/// The upper limit of the value `watch_ratio`: play time over duration.
const MAX_WATCH_RATIO: f32 = 4.0;

/// Options of an import of KuaiRand-Pure.
#[derive(Debug, Clone)]
pub struct KuairandOptions {
    /// The folder with the published files.
    pub from: PathBuf,
    /// The data set directory to write.
    pub into: PathBuf,
    /// A file with content vectors of the videos (see `dataset::content`).
    pub content: Option<PathBuf>,
}

/// Imports KuaiRand-Pure.
///
/// # Errors
/// A file or a column is missing, or a file has no usable row.
pub fn import(options: &KuairandOptions) -> Result<ImportReport> {
    let mapping = Mapping::parse(MAPPING, &options.from.join("kuairand.toml"))?;
    let durations_ms = durations_in_logs(&mapping)?;
    let history = |sink: &mut ImpressionSink<'_>| read_histories(&options.from, sink);
    PresetImport {
        mapping: &mapping,
        derived: &derived(&durations_ms),
        more_impressions: &history,
        content: options.content.as_deref(),
    }
    .run(&options.into)
}

/// The first duration that a log tells of each video; some have none in the videos' file.
fn durations_in_logs(mapping: &Mapping) -> Result<HashMap<u64, f32>> {
    let mut durations_ms = HashMap::new();
    look_at(&mapping.impressions.find_files(mapping)?, &["video_id", "duration_ms"], |row| {
        let [video, duration_ms] = [0, 1].map(|at| row.cell(at).integer_id());
        if let (Ok(Some(video)), Ok(Some(duration_ms @ 1..))) = (video, duration_ms) {
            durations_ms.entry(video).or_insert(duration_ms as f32);
        }
    })?;
    Ok(durations_ms)
}

/// What the mapping's columns are computed from.
fn derived(durations_ms: &HashMap<u64, f32>) -> Vec<DerivedColumn<'_>> {
    let length = &["video_id", "video_duration"];
    vec![
        DerivedColumn::new("outcome_ms", &["time_ms", "play_time_ms"], |cells| {
            cell(outcome_ms(cells))
        }),
        DerivedColumn::new("watch_ratio", &["play_time_ms", "duration_ms"], |cells| {
            cell(watch_ratio(cells))
        }),
        DerivedColumn::new("duration_step", length, |cells| {
            let step = duration_s(cells, durations_ms).map(|s| (2.0 * (1.0 + s).log2()) as u64);
            cell(step.map(|step| if step > 0 { Cell::Integer(step.into()) } else { Cell::Missing }))
        }),
        DerivedColumn::new("log_duration", length, |cells| {
            cell(duration_s(cells, durations_ms).map(|duration_s| float(duration_s.ln_1p())))
        }),
        DerivedColumn::new("aspect", &["server_width", "server_height"], |cells| {
            let size = |at: usize| cells[at].number().ok().flatten().unwrap_or(0.0) as f32;
            if size(0) > 0.0 { float(size(1) / size(0)) } else { Cell::Missing }
        }),
    ]
}

fn outcome_ms(cells: &[Cell<'_>]) -> Computed {
    Ok(Cell::Number(number(&cells[0])? + number(&cells[1])?))
}

fn watch_ratio(cells: &[Cell<'_>]) -> Computed {
    let (play_ms, duration_ms) = (number(&cells[0])?, number(&cells[1])?);
    if let Some(time_ms) = [play_ms, duration_ms].into_iter().find(|&time_ms| time_ms < 0.0) {
        return Err(wrong(format!("{time_ms} is negative")));
    }
    let ratio = (play_ms as f32 / duration_ms as f32).min(MAX_WATCH_RATIO);
    Ok(if duration_ms > 0.0 { float(ratio) } else { Cell::Missing })
}

/// How long a video is: as its file says, else as a log does, else 0.
fn duration_s(cells: &[Cell<'_>], of_logs_ms: &HashMap<u64, f32>) -> Computed<f32> {
    let of_log = || of_logs_ms.get(&cells[0].integer_id().ok()??).copied();
    match cells[1].number() {
        Ok(Some(duration_ms)) if duration_ms < 0.0 => Err(wrong("a negative duration")),
        Ok(Some(duration_ms)) => Ok(duration_ms as f32 / 1e3),
        Ok(None) => Ok(of_log().unwrap_or(0.0) / 1e3),
        Err(reason) => Err(Cell::Wrong(reason)),
    }
}

/// Adds the impressions of all files of histories.
fn read_histories(from: &Path, sink: &mut ImpressionSink<'_>) -> Result<()> {
    let patterns = ["user_history_*.parquet".to_owned()];
    let Ok(files) = InputFile::find(&patterns, from, &InputOptions::default()) else {
        return Ok(());
    };
    files.iter().try_for_each(|file| read_history(&file.path, sink))
}

fn read_history(path: &Path, sink: &mut ImpressionSink<'_>) -> Result<()> {
    let table = TableReader::open(path)?;
    let fields = [
        Field::new("user_id", CellType::I64),
        Field::new("last_time_ms", CellType::I64),
        Field::list("video_id", CellType::I64),
        Field::list("is_like", CellType::I64),
        Field::list("long_view", CellType::I64),
    ];
    // Nobody has the greatest id, so that rows with another number are left out, too.
    let id = |id: i64| u64::try_from(id).unwrap_or(u64::MAX);
    sink.report.open(&path.display().to_string());
    let mut line = 0;
    for group in 0..table.groups() {
        let columns = table.read(group, &fields)?;
        let [users, last, videos, likes, views] = columns.as_slice() else {
            unreachable!("five fields")
        };
        for (row, (&user, &last_ms)) in users.i64s().iter().zip(last.i64s()).enumerate() {
            line += 1;
            let of = |column: &'_ Column| column.i64s()[column.range(row)].to_vec();
            let (videos, likes, views) = (of(videos), of(likes), of(views));
            if likes.len() != videos.len() || views.len() != videos.len() {
                let reason = format!("row {line} has lists of different lengths");
                return Err(Error::data(path, reason));
            }
            for (at, &video) in videos.iter().enumerate() {
                let bit = |happened: i64, bit: u64| u64::from(happened != 0) * bit;
                let actions = bit(views[at], LONG_VIEW) | bit(likes[at], IS_LIKE);
                let before_ms = (videos.len() - 1 - at) as i64 * HISTORY_STEP_MS;
                let time_ms = Cell::Integer(last_ms.into()).time_ms(TimeUnit::Ms);
                let time_ms = time_ms
                    .map(|_| last_ms - before_ms)
                    .map_err(|reason| RowError { column: "last_time_ms".to_owned(), reason });
                sink.add(
                    line,
                    time_ms.map(|time_ms| history_row(time_ms, id(user), id(video), actions)),
                )?;
            }
        }
    }
    sink.report.close()
}

fn history_row(time_ms: i64, user: u64, item: u64, actions: u64) -> Impression {
    Impression {
        time_ms,
        outcome_ms: time_ms,
        user,
        item,
        outcome: Outcome { actions, known: LONG_VIEW | IS_LIKE, ..Outcome::UNKNOWN },
        history_only: true,
        ..no_row()
    }
}

#[cfg(test)]
mod tests;
