//! KuaiRand's features of users and videos.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use hypercast_fm::example::{Item, User};

use crate::ImportReport;
use crate::error::{CommonErrors as _, Error, Result};
use crate::text::{TextFile, TextRow};
use hypercast_data::schema::category_id;

/// Categorical user features before the anonymous ones.
const NAMED_CATEGORIES: [&str; 8] = [
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
];

/// Numbers of a user, after the categories.
const USER_NUMBERS: [&str; 4] =
    ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"];

/// Categorical user features: the columns of `user_features_pure.csv` between the id and the
/// numbers.
pub(super) fn user_categories() -> Vec<String> {
    let anonymous = (0..18).map(|at| format!("onehot_feat{at}"));
    NAMED_CATEGORIES.map(String::from).into_iter().chain(anonymous).collect()
}

/// Dense user features: log(1 + n) for each number.
pub(super) const USER_DENSE: [&str; 4] =
    ["log_follow_users", "log_fans", "log_friends", "log_register_days"];

const VIDEO_COLUMNS: [&str; 10] = [
    "video_id",
    "author_id",
    "tag",
    "music_id",
    "music_type",
    "upload_type",
    "video_type",
    "video_duration",
    "server_width",
    "server_height",
];

const FIRST_VIDEO_NUMBER: usize = 7;

/// Categorical item features: the columns after the id, and the duration in steps of factor √2.
pub(super) const ITEM_CATEGORIES: [&str; 7] =
    ["author_id", "tag", "music_id", "music_type", "upload_type", "video_type", "duration_step"];

/// Dense item features: log(1 + seconds) and height over width, both 0 if unknown.
pub(super) const ITEM_DENSE: [&str; 2] = ["log_duration", "aspect"];

/// A video whose duration may be missing until a log contains it.
pub(super) struct Video {
    item: Item,
    /// In milliseconds; `None` while unknown.
    pub(super) duration_ms: Option<f32>,
}

pub(super) fn read_users(path: &Path, report: &mut ImportReport) -> Result<BTreeMap<u64, User>> {
    let categories = user_categories();
    let first_number = 1 + categories.len();
    let numbers = USER_NUMBERS.map(String::from);
    let columns = ["user_id".into()].into_iter().chain(categories).chain(numbers);
    let file = open(path, columns, "KuaiRand-Pure's user_features_pure.csv")?;
    let mut users = BTreeMap::new();
    file.read(report, |row| {
        let id = row.number(0)?;
        let ids = (1..first_number).map(|column| category(row, column)).collect();
        let mut dense = Vec::with_capacity(USER_DENSE.len());
        for column in first_number..first_number + USER_NUMBERS.len() {
            dense.push(row.optional(column)?.unwrap_or(0.0).max(0.0).ln_1p());
        }
        match users.insert(id, User { id, ids, dense }) {
            None => Ok(()),
            Some(_) => Err(row.bad(0, format!("user {id} has two rows; the last one counts"))),
        }
    })?;
    Ok(users)
}

pub(super) fn read_videos(path: &Path, report: &mut ImportReport) -> Result<BTreeMap<u64, Video>> {
    let file = open(path, VIDEO_COLUMNS, "KuaiRand-Pure's video_features_basic_pure.csv")?;
    let mut videos = BTreeMap::new();
    file.read(report, |row| {
        let id = row.number(0)?;
        let ids = (1..FIRST_VIDEO_NUMBER).map(|column| category(row, column)).collect();
        let duration_ms = row.optional(FIRST_VIDEO_NUMBER)?;
        if duration_ms.is_some_and(|duration_ms| duration_ms < 0.0) {
            return Err(row.bad(FIRST_VIDEO_NUMBER, "a negative duration".into()));
        }
        let (width, height) = (row.optional(8)?.unwrap_or(0.0), row.optional(9)?.unwrap_or(0.0));
        let aspect = if width > 0.0 { height / width } else { 0.0 };
        let item = Item { id, ids, dense: vec![0.0, aspect], ..Item::default() };
        match videos.insert(id, Video { item, duration_ms }) {
            None => Ok(()),
            Some(_) => Err(row.bad(0, format!("video {id} has two rows; the last one counts"))),
        }
    })?;
    Ok(videos)
}

/// The items, sorted by id, with the durations that are known by now.
pub(super) fn items(videos: &BTreeMap<u64, Video>) -> Vec<Item> {
    let finished = |video: &Video| {
        let mut item = video.item.clone();
        let duration_s = video.duration_ms.unwrap_or(0.0) / 1e3;
        item.dense[0] = duration_s.ln_1p();
        item.ids.push((2.0 * (1.0 + duration_s).log2()) as u64);
        item
    };
    videos.values().map(finished).collect()
}

/// Opens a comma-separated file of the data set.
pub(super) fn open(
    path: &Path,
    columns: impl IntoIterator<Item = impl Into<String>>,
    expected: &'static str,
) -> Result<TextFile<std::io::BufReader<File>>> {
    let missing = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            Error::data(path, format!("no such file; expected {expected}"))
        }
        _ => Error::io(path)(error),
    };
    let content = std::io::BufReader::new(File::open(path).map_err(missing)?);
    let columns = columns.into_iter().map(Into::into).collect();
    Ok(TextFile {
        name: path.display().to_string(),
        content,
        delimiter: b',',
        quoting: true,
        columns,
        expected,
        most_rows: u64::MAX,
    })
}

/// The category of the cell's first value. A whole number is the same category with and without
/// `.0`.
fn category(row: &TextRow<'_>, column: usize) -> u64 {
    let text = row.text(column);
    // Ranges such as `(250,500]` contain a comma too, but no list of tags starts with a bracket.
    let first =
        if text.starts_with(['(', '[']) { &text } else { text.split(',').next().unwrap_or("") };
    category_id(first.strip_suffix(".0").unwrap_or(first))
}
