//! KuaiRand's impressions: the logs, and the history before them.

use std::collections::HashMap;
use std::path::Path;

use hypercast_fm::example::{MAX_VALUES, Outcome, User};

use super::ACTIONS;
use super::entities::{Video, open};
use crate::dataset::table::{Field, Kind, TableReader};
use crate::dataset::{Context, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::import::ImportReport;
use crate::import::report::Bad;

/// The columns that are read of the log's nineteen: who, what, when, where, how long, then `ACTIONS`.
const COLUMNS: [&str; 14] = [
    "user_id",
    "video_id",
    "time_ms",
    "tab",
    "play_time_ms",
    "duration_ms",
    "is_click",
    "long_view",
    "is_like",
    "is_profile_enter",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
];

const FIRST_ACTION: usize = 6;

/// Bits of the actions that the history holds: `long_view` and `is_like`.
const HISTORY_ACTIONS: (u32, u32) = (1 << 1, 1 << 2);

/// How far apart the history's events are set, since their times are not known.
const HISTORY_STEP_MS: i64 = 3_600_000;

/// A longer view counts as so many lengths of the video.
const MAX_WATCH_RATIO: f32 = 4.0;

/// Collects impressions; their surface is the number of the tab until all tabs are known.
pub(super) struct Reader<'a> {
    pub(super) users: &'a HashMap<u64, User>,
    pub(super) videos: &'a mut HashMap<u64, Video>,
    pub(super) rows: &'a mut Vec<Impression>,
    pub(super) report: &'a mut ImportReport,
}

impl Reader<'_> {
    pub(super) fn read_log(&mut self, path: &Path) -> Result<()> {
        let file = open(path, &COLUMNS, "a KuaiRand log of 19 columns (log_standard_*_pure.csv)")?;
        let (users, videos, rows) = (self.users, &mut *self.videos, &mut *self.rows);
        file.read(self.report, |row| {
            let (user, item) = (row.number(0)?, row.number(1)?);
            let time_ms: i64 = row.number(2)?;
            let surface: u16 = row.number(3)?;
            let (play_ms, duration_ms): (i64, i64) = (row.number(4)?, row.number(5)?);
            let mut actions = 0;
            for action in 0..ACTIONS.len() {
                actions |= u32::from(row.flag(FIRST_ACTION + action)?) << action;
            }
            for (column, value) in [(2, time_ms), (4, play_ms), (5, duration_ms)] {
                if value < 0 {
                    return Err(row.bad(column, format!("{value} is negative")));
                }
            }
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
                // What a view led to is known when it ends.
                outcome_ms: time_ms.saturating_add(play_ms),
                user,
                item,
                surface,
                outcome: Outcome { actions, known: (1 << ACTIONS.len()) - 1, values },
                context: Context::default(),
                truth: Vec::new(),
                history_only: false,
            });
            Ok(())
        })
    }

    pub(super) fn read_history(&mut self, path: &Path) -> Result<()> {
        let table = TableReader::open(path)?;
        let fields = [
            Field::new("user_id", Kind::I64),
            Field::new("last_time_ms", Kind::I64),
            Field::list("video_id", Kind::I64),
            Field::list("is_like", Kind::I64),
            Field::list("long_view", Kind::I64),
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
                    let reason = format!("row {line}: its lists have different lengths");
                    return Err(Error::data(path, reason));
                }
                for (place, at) in range.clone().enumerate() {
                    let event = HistoryEvent {
                        user: user.i64s()[row],
                        video: videos.i64s()[at],
                        time_ms: last.i64s()[row]
                            - (range.len() - 1 - place) as i64 * HISTORY_STEP_MS,
                        liked: likes.i64s()[likes.range(row).start + place] != 0,
                        viewed: views.i64s()[views.range(row).start + place] != 0,
                    };
                    let outcome = self.take_event(&event);
                    self.report.row(line, outcome);
                }
            }
        }
        self.report.close()
    }

    fn take_event(&mut self, event: &HistoryEvent) -> std::result::Result<(), Bad> {
        let negative = |column, id: i64| Bad { column, reason: format!("{id} is no id") };
        let user = u64::try_from(event.user).map_err(|_| negative("user_id", event.user))?;
        let item = u64::try_from(event.video).map_err(|_| negative("video_id", event.video))?;
        check_user(self.users, user)?;
        if !self.videos.contains_key(&item) {
            return Err(unknown_video(item));
        }
        let (view, like) = HISTORY_ACTIONS;
        let actions = if event.viewed { view } else { 0 } | if event.liked { like } else { 0 };
        self.rows.push(Impression {
            request: 0,
            time_ms: event.time_ms,
            outcome_ms: event.time_ms,
            user,
            item,
            surface: 0,
            outcome: Outcome { actions, known: view | like, values: [f32::NAN; MAX_VALUES] },
            context: Context::default(),
            truth: Vec::new(),
            history_only: true,
        });
        Ok(())
    }
}

struct HistoryEvent {
    user: i64,
    video: i64,
    time_ms: i64,
    liked: bool,
    viewed: bool,
}

fn check_user(users: &HashMap<u64, User>, user: u64) -> std::result::Result<(), Bad> {
    match users.contains_key(&user) {
        true => Ok(()),
        false => Err(Bad {
            column: "user_id",
            reason: format!("user {user} has no row in user_features_pure.csv"),
        }),
    }
}

fn unknown_video(item: u64) -> Bad {
    Bad {
        column: "video_id",
        reason: format!("video {item} has no row in video_features_basic_pure.csv"),
    }
}
