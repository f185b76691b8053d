//! Files in KuaiRand-Pure's form with made-up rows, imported by the preset: a data set with its
//! schema, of some 120 numeric columns and 26 categories of users. Only its speed means something.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
use hypercast_import::preset::kuairand::{KuairandOptions, import};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::error::{CommonErrors as _, Error, Result};

const VIDEOS: u32 = 5_000;
const REQUESTS_A_USER: i64 = 50;
const VIDEOS_A_REQUEST: i64 = 6;
const START_MS: i64 = 1_650_000_000_000;

const LOG_HEAD: &str = "user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,\
                        is_hate,long_view,play_time_ms,duration_ms,is_profile_enter,tab\n";
const VIDEO_HEAD: &str = "video_id,author_id,video_type,upload_type,video_duration,server_width,\
                          server_height,music_id,music_type,tag\n";
const USER_HEAD: &str = "user_id,user_active_degree,is_lowactive_period,is_live_streamer,\
                         is_video_author,follow_user_num,follow_user_num_range,fans_user_num,\
                         fans_user_num_range,friend_user_num,friend_user_num_range,register_days,\
                         register_days_range";

/// Writes the files of some users below `dir`, and returns the data set that is made from them.
pub(super) fn dataset(dir: &Path, users: u64) -> Result<PathBuf> {
    let (from, into) = (dir.join("files"), dir.join("data"));
    std::fs::create_dir_all(&from).map_err(Error::io(&from))?;
    let files = [
        ("log_standard_4_08_to_4_21_pure.csv", log(users)),
        ("video_features_basic_pure.csv", videos()),
        ("user_features_pure.csv", users_of(users)),
    ];
    for (name, text) in files {
        let path = from.join(name);
        atomic_file::write(&path, text.as_bytes()).map_err(Error::io(&path))?;
    }
    let options = KuairandOptions { from, into, content: None };
    import(&options).map_err(|error| Error::internal(error.to_string()))?;
    Ok(options.into)
}

fn log(users: u64) -> String {
    let (mut text, mut random) = (LOG_HEAD.to_owned(), SmallRng::seed_from_u64(1));
    for at in 0..REQUESTS_A_USER * VIDEOS_A_REQUEST {
        let (request, row) = (at / VIDEOS_A_REQUEST, at % VIDEOS_A_REQUEST);
        for user in 1..=users {
            let time_ms = START_MS + request * 3_600_000 + row * 100 + user as i64;
            let video = random.random_range(1..=VIDEOS);
            let mut is = |share: f64| u8::from(random.random_bool(share));
            let [click, like, long_view, profile] = [0.4, 0.02, 0.3, 0.01].map(&mut is);
            let duration_ms = 5_000 + video % 60 * 1_000;
            let play_ms = if click == 1 { duration_ms / 2 } else { 500 };
            let tab = user % 3;
            _ = writeln!(
                text,
                "{user},{video},{time_ms},{click},{like},0,0,0,0,{long_view},{play_ms},\
                 {duration_ms},{profile},{tab}"
            );
        }
    }
    text
}

fn videos() -> String {
    let mut text = VIDEO_HEAD.to_owned();
    for video in 1..=VIDEOS {
        let (author, music, tag) = (video % 900, video % 700, video % 60);
        let (duration_ms, kind) = (5_000 + video % 60 * 1_000, video % 3);
        _ = writeln!(
            text,
            "{video},{author},NORMAL,upload{kind},{duration_ms},720,1280,{music},{kind},{tag}"
        );
    }
    text
}

fn users_of(users: u64) -> String {
    let mut text = USER_HEAD.to_owned();
    (0..18).for_each(|at| _ = write!(text, ",onehot_feat{at}"));
    text.push('\n');
    for user in 1..=users {
        let (active, range) = (user % 4, user % 7);
        _ = write!(
            text,
            "{user},degree{active},0,0,1,{user},range{range},{user},range{range},{active},\
             range{active},{user},range{range}"
        );
        (0..18).for_each(|at| _ = write!(text, ",{}", user % (at + 2)));
        text.push('\n');
    }
    text
}
