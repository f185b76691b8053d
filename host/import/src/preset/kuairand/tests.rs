//! Tests on handwritten files, and on the published ones if they are available.

use std::fs;

use super::*;
use hypercast_data::dataset::Dataset;
use hypercast_data::dataset::table::TableWriter;

const LOG_HEADER: &str = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,\
long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n";

fn write(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), text).unwrap();
}

fn log_row(user: u64, video: u64, time_ms: i64, click: u8, tab: u16) -> String {
    format!("{user},{video},20220425,0,{time_ms},{click},0,0,0,0,0,1,3000,6000,0,0,0,0,{tab}\n")
}

fn files(dir: &Path, log: &str) {
    let header = ["user_id,follow_user_num,fans_user_num,friend_user_num,register_days,user_active_degree"]
        .into_iter()
        .chain(["is_lowactive_period,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range"])
        .chain(["friend_user_num_range,register_days_range"])
        .map(String::from)
        .chain((0..18).map(|i| format!("onehot_feat{i}")))
        .collect::<Vec<_>>()
        .join(",");
    let user = |id: u64| {
        format!(
            "{id},10,0,3,799,full,0,-124,1,\"(250,500]\",500+,\"[1,5)\",730+,1,2,,4.0,5{}\n",
            ",0".repeat(13)
        )
    };
    write(dir, "user_features_pure.csv", &format!("{header}\n{}{}", user(7), user(8)));
    write(
        dir,
        "video_features_basic_pure.csv",
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,\
         music_id,music_type,tag\n\
         1,55,NORMAL,2022-04-10,Kmovie,0.0,87433.0,720.0,1280.0,91,9.0,\"39,4\"\n\
         2,56,AD,2022-04-10,LongImport,0.0,,720.0,1440.0,92,,\n",
    );
    write(dir, "log_standard_a_pure.csv", &format!("{LOG_HEADER}{log}"));
}

fn import_into(dir: &Path) -> Result<(ImportReport, Dataset)> {
    let into = dir.join("out");
    let report =
        import(&KuairandOptions { from: dir.to_path_buf(), into: into.clone(), content: None })?;
    Ok((report, Dataset::open(&into)?))
}

#[test]
fn rows_become_impressions_and_close_ones_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let log = [
        log_row(7, 2, 5000, 0, 4),
        log_row(7, 1, 1000, 1, 1),
        log_row(7, 2, 2500, 0, 1),
        log_row(8, 1, 1000, 1, 1),
    ];
    files(dir.path(), &log.concat());
    let (report, data) = import_into(dir.path()).unwrap();
    assert_eq!((report.impressions, report.requests, report.bad_rows), (4, 3, 0));
    assert_eq!(data.schema.surfaces[..3], ["unknown", "tab0", "tab1"]);
    let rows: Vec<Impression> = data.impressions().unwrap().map(|row| row.unwrap()).collect();
    let at = |row: &Impression| {
        (row.request, row.time_ms, row.outcome_ms, row.user, row.item, row.surface)
    };
    assert_eq!(
        rows.iter().map(at).collect::<Vec<_>>(),
        [
            (1, 1000, 4000, 7, 1, 2),
            (1, 1000, 5500, 7, 2, 2),
            (2, 1000, 4000, 8, 1, 2),
            (3, 5000, 8000, 7, 2, 5)
        ]
    );
    assert_eq!(
        (rows[0].outcome.actions, rows[0].outcome.known, rows[0].outcome.values[0]),
        (0b11, 0xff, 0.5)
    );
    let item = &data.items[&1];
    assert_eq!(item.ids[..4], [55, 39, 91, 9]);
    assert!((item.dense[0] - 88.433_f32.ln()).abs() < 1e-5);
    assert_eq!(item.dense[1], 1280.0 / 720.0);
    assert_eq!(data.items[&2].ids[1], 0, "no tag");
    let close = |got: f32, wanted: f32| (got - wanted).abs() < 1e-5;
    assert!(close(data.items[&2].dense[0], 7_f32.ln()), "the log says how long it is");
    assert_eq!(data.items[&2].dense[1], 2.0);
    assert_eq!(data.users[&7].ids[10], 0, "an empty cell is a missing category");
    assert_eq!(data.users[&7].ids[11], 4);
    assert!(close(data.users[&7].dense[0], 11_f32.ln()));
}

#[test]
fn bad_rows_are_counted_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_row(7, 1, 1000, 1, 1);
    log += &log_row(9, 1, 1000, 1, 1);
    log += &log_row(7, 3, 1000, 1, 1);
    log += &log_row(7, 1, 1000, 2, 1);
    log += &log_row(7, 1, 1000, 1, 1).replace("6000", "-6000");
    log += "7,1,20220425\n";
    log += &log_row(7, 1, 1000, 1, 1).replace(",1000,", ",soon,");
    files(dir.path(), &log);
    let (report, data) = import_into(dir.path()).unwrap();
    assert_eq!((report.bad_rows, data.rows), (6, 1));
    let complaints: Vec<(u64, &str)> =
        report.first_bad_rows.iter().map(|bad| (bad.line, bad.column.as_str())).collect();
    let expected = [
        (3, "user_id"),
        (4, "video_id"),
        (5, "is_click"),
        (6, "watch_ratio"),
        (7, "(all)"),
        (8, "time_ms"),
    ];
    assert_eq!(complaints, expected);
    let saved: ImportReport = serde_json::from_str(
        &fs::read_to_string(dir.path().join("out/import-report.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(saved, report);
}

#[test]
fn rows_that_stand_twice_are_told_and_times_in_other_units_are_bad() {
    let dir = tempfile::tempdir().unwrap();
    let shared = log_row(7, 1, 1_650_844_800_000, 1, 1) + &log_row(8, 2, 1_650_844_900_000, 0, 1);
    let seconds = log_row(8, 1, 1_650_844_800, 1, 1);
    files(dir.path(), &format!("{shared}{seconds}"));
    let more = log_row(8, 2, 1_650_844_900_000, 1, 1);
    write(dir.path(), "log_standard_b_pure.csv", &format!("{LOG_HEADER}{shared}{more}"));
    let (report, data) = import_into(dir.path()).unwrap();
    assert_eq!((report.repeated, report.bad_rows, data.rows), (2, 1, 5));
    assert!(report.to_string().contains("2 rows say the same as earlier ones"), "{report}");
    assert_eq!(report.first_bad_rows[0].column, "time_ms");
    assert!(report.first_bad_rows[0].reason.contains("looks like s, not ms"), "{report}");
}

#[test]
fn missing_files_and_columns_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let message = import_into(dir.path()).unwrap_err().to_string();
    assert!(message.contains("log_standard_*_pure.csv"), "{message}");
    files(dir.path(), &log_row(9, 1, 1000, 1, 1));
    let message = import_into(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("none of its 1 rows can be used; line 2, column `user_id`"),
        "{message}"
    );
    let log = LOG_HEADER.replace("long_view", "long_look") + &log_row(7, 1, 1000, 1, 1);
    write(dir.path(), "log_standard_a_pure.csv", &log);
    let message = import_into(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("log_standard_a_pure.csv")
            && message.contains("column `long_view` is missing"),
        "{message}"
    );
    fs::remove_file(dir.path().join("user_features_pure.csv")).unwrap();
    let message = import_into(dir.path()).unwrap_err().to_string();
    assert!(message.contains("user_features_pure.csv: no file has this name"), "{message}");
}

#[test]
fn history_comes_an_hour_apart_and_ends_at_its_time() {
    let dir = tempfile::tempdir().unwrap();
    files(dir.path(), &log_row(7, 1, 100_000_000, 1, 1));
    let fields = vec![
        Field::new("user_id", CellType::I64),
        Field::new("last_time_ms", CellType::I64),
        Field::list("video_id", CellType::I64),
        Field::list("is_like", CellType::I64),
        Field::list("long_view", CellType::I64),
    ];
    let mut table =
        TableWriter::create(&dir.path().join("user_history_x.parquet"), fields).unwrap();
    let list = |values: Vec<i64>| Column::lists(values, [3, 0]);
    let scalars = |values: Vec<i64>| Column::scalars(values);
    table
        .write(&[
            scalars(vec![7, 8]),
            scalars(vec![50_000_000, 1]),
            list(vec![1, 9, 2]),
            list(vec![0, 0, 1]),
            list(vec![1, 0, 0]),
        ])
        .unwrap();
    table.finish().unwrap();
    let (report, data) = import_into(dir.path()).unwrap();
    assert_eq!((report.bad_rows, report.history_only, report.requests), (1, 2, 1));
    let rows: Vec<Impression> = data.impressions().unwrap().map(|row| row.unwrap()).collect();
    let at = |row: &Impression| {
        (
            row.time_ms,
            row.item,
            row.surface,
            row.outcome.actions,
            row.outcome.known,
            row.history_only,
        )
    };
    assert_eq!(at(&rows[0]), (42_800_000, 1, 0, 0b010, 0b110, true));
    assert_eq!(at(&rows[1]), (50_000_000, 2, 0, 0b100, 0b110, true));
}

#[test]
fn the_real_window_has_its_rows() {
    let shared = std::env::var_os("HYPERCAST_SHARED").map(PathBuf::from);
    let shared =
        shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let from = shared.join("data/kuairand-pure");
    if !from.is_dir() {
        eprintln!("SKIPPED: no KuaiRand files at {} (set HYPERCAST_SHARED)", from.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("out");
    let report = import(&KuairandOptions { from, into: into.clone(), content: None }).unwrap();
    let data = Dataset::open(&into).unwrap();
    assert_eq!(report.impressions - report.history_only, 180_495);
    assert_eq!(
        (report.bad_rows, report.history_only, report.users, report.items),
        (0, 817_187, 27_285, 7_583)
    );
    assert_eq!(data.rows as u64, report.impressions);
    let clicks = data
        .impressions()
        .unwrap()
        .map(|row| row.unwrap())
        .filter(|row| !row.history_only && row.outcome.actions & 1 == 1);
    assert_eq!(clicks.count(), 81_235);
}
