//! KuaiRand's impressions: its logs, and the history before them.

use std::collections::BTreeMap;
use std::path::Path;

use hypercast_core::clock::mistaken_unit;
use hypercast_fm::example::{MAX_VALUES, Outcome, User};

use super::ACTIONS;
use super::entities::{Video, open};
use crate::ImportReport;
use crate::error::{CommonErrors as _, Error, Result};
use crate::report::RowError;
use hypercast_data::dataset::table::{CellType, Column, Field, TableReader};
use hypercast_data::dataset::{ContextFeatures, Impression};

/// The columns to read of the log's nineteen; `ACTIONS` follow.
const COLUMNS: [&str; 6] = ["user_id", "video_id", "time_ms", "tab", "play_time_ms", "duration_ms"];

/// The actions that the history contains, as bits of `ACTIONS`.
const LONG_VIEW: u32 = 1 << 1;
const IS_LIKE: u32 = 1 << 2;

/// The time between events of the history, whose own times are not known.
const HISTORY_STEP_MS: i64 = 3_600_000;

/// The upper limit of the value `watch_ratio`: play time over duration.
const MAX_WATCH_RATIO: f32 = 4.0;

/// Collects impressions. Their surface is the number of the tab until all tabs are known.
pub(super) struct KuairandReader<'a> {
    pub(super) users: &'a BTreeMap<u64, User>,
    pub(super) videos: &'a mut BTreeMap<u64, Video>,
    pub(super) rows: &'a mut Vec<Impression>,
    pub(super) report: &'a mut ImportReport,
}

impl KuairandReader<'_> {
    pub(super) fn read_log(&mut self, path: &Path) -> Result<()> {
        let columns = [&COLUMNS[..], &ACTIONS].concat();
        let file = open(path, columns, "a KuaiRand log of 19 columns (log_standard_*_pure.csv)")?;
        let (users, videos, rows) = (self.users, &mut *self.videos, &mut *self.rows);
        file.read(self.report, |row| {
            let (user, item) = (row.number(0)?, row.number(1)?);
            let time_ms: i64 = row.number(2)?;
            let surface: u16 = row.number(3)?;
            let (play_ms, duration_ms): (i64, i64) = (row.number(4)?, row.number(5)?);
            let mut actions = 0;
            for action in 0..ACTIONS.len() {
                actions |= u32::from(row.flag(COLUMNS.len() + action)?) << action;
            }
            for (column, value) in [(4, play_ms), (5, duration_ms)] {
                if value < 0 {
                    return Err(row.bad(column, format!("{value} is negative")));
                }
            }
            check_time("time_ms", time_ms)?;
            check_user(users, user)?;
            let video = videos.get_mut(&item).ok_or_else(|| unknown_video(item))?;
            let mut values = [f32::NAN; MAX_VALUES];
            if duration_ms > 0 {
                values[0] = (play_ms as f32 / duration_ms as f32).min(MAX_WATCH_RATIO);
                video.duration_ms.get_or_insert(duration_ms as f32);
            }
            rows.push(Impression {
                request: 0,
                time_ms,
                // The outcome of a view is known when it ends.
                outcome_ms: time_ms.saturating_add(play_ms),
                user,
                item,
                surface,
                outcome: Outcome { actions, known: (1 << ACTIONS.len()) - 1, values },
                context: ContextFeatures::default(),
                truth: Vec::new(),
                history_only: false,
            });
            Ok(())
        })
    }

    pub(super) fn read_history(&mut self, path: &Path) -> Result<()> {
        let table = TableReader::open(path)?;
        let fields = [
            Field::new("user_id", CellType::I64),
            Field::new("last_time_ms", CellType::I64),
            Field::list("video_id", CellType::I64),
            Field::list("is_like", CellType::I64),
            Field::list("long_view", CellType::I64),
        ];
        self.report.open(&path.display().to_string());
        let mut line = 0;
        for group in 0..table.groups() {
            let columns = table.read(group, &fields)?;
            let [user, last, videos, likes, views] = columns.as_slice() else {
                unreachable!("five fields")
            };
            for row in 0..user.i64s().len() {
                line += 1;
                let range = videos.range(row);
                if likes.range(row).len() != range.len() || views.range(row).len() != range.len() {
                    let reason = format!("row {line} has lists of different lengths");
                    return Err(Error::data(path, reason));
                }
                for (place, at) in range.clone().enumerate() {
                    let bit = |column: &Column, bit: u32| {
                        let happened = column.i64s()[column.range(row).start + place] != 0;
                        u32::from(happened) * bit
                    };
                    let actions = bit(views, LONG_VIEW) | bit(likes, IS_LIKE);
                    let before = (range.len() - 1 - place) as i64 * HISTORY_STEP_MS;
                    let last_ms = last.i64s()[row];
                    let outcome = check_time("last_time_ms", last_ms).and_then(|()| {
                        let (user, video) = (user.i64s()[row], videos.i64s()[at]);
                        self.add_event(user, video, last_ms - before, actions)
                    });
                    self.report.row(line, outcome)?;
                }
            }
        }
        self.report.close()
    }

    fn add_event(
        &mut self,
        user: i64,
        video: i64,
        time_ms: i64,
        actions: u32,
    ) -> std::result::Result<(), RowError> {
        let id = |column: &str, id: i64| {
            u64::try_from(id).map_err(|_| {
                let reason = format!("{id} is not an id");
                RowError { column: column.into(), reason }
            })
        };
        let (user, item) = (id("user_id", user)?, id("video_id", video)?);
        check_user(self.users, user)?;
        if !self.videos.contains_key(&item) {
            return Err(unknown_video(item));
        }
        self.rows.push(Impression {
            request: 0,
            time_ms,
            outcome_ms: time_ms,
            user,
            item,
            surface: 0,
            outcome: Outcome { actions, known: LONG_VIEW | IS_LIKE, ..Outcome::UNKNOWN },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: true,
        });
        Ok(())
    }
}

fn check_time(column: &str, time_ms: i64) -> std::result::Result<(), RowError> {
    let bad = |reason| Err(RowError { column: column.into(), reason });
    if time_ms < 0 {
        return bad(format!("{time_ms} is negative"));
    }
    match mistaken_unit(time_ms) {
        Some(unit) => bad(format!("{time_ms} looks like {unit}, not milliseconds")),
        None => Ok(()),
    }
}

fn check_user(users: &BTreeMap<u64, User>, user: u64) -> std::result::Result<(), RowError> {
    if users.contains_key(&user) {
        return Ok(());
    }
    let reason = format!("user {user} has no row in user_features_pure.csv");
    Err(RowError { column: "user_id".into(), reason })
}

fn unknown_video(item: u64) -> RowError {
    RowError {
        column: "video_id".into(),
        reason: format!("video {item} has no row in video_features_basic_pure.csv"),
    }
}
