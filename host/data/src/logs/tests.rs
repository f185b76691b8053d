//! Tests of the feature logs.

use hypercast_fm::example::{Item, Outcome};

use super::layout::LogLayout;
use super::*;
use crate::dataset::Dataset;
use crate::dataset::table::{TableReader, TableWriter};
use crate::dataset::timeline::Span;
use crate::features::FeatureConfig;
use crate::features::replay::{Replay, ReplayOptions};
use crate::simulate::{SimulateOptions, simulate};

/// A small data set with every kind of column.
fn world(dir: &Path) -> Dataset {
    let into = dir.join("world");
    simulate(&SimulateOptions {
        into: into.clone(),
        users: 20,
        items: 30,
        requests: 200,
        surfaces: 2,
        seed: 3,
    })
    .unwrap();
    Dataset::open(&into).unwrap()
}

fn examples(data: &Dataset) -> Vec<Example> {
    let options = ReplayOptions {
        span: Span::default(),
        history_len: 40,
        max_targets: 16,
        features: FeatureConfig::default(),
    };
    Replay::new(data, options).unwrap().map(Result::unwrap).collect()
}

fn options() -> LogOptions {
    LogOptions { history_len: 5, rows_per_file: 500, file_seconds: 60, tae: TaeStorage::F32 }
}

fn one() -> Vec<LogVersion> {
    vec![LogVersion::new("fm-7", 3)]
}

fn row<'a>(example: &'a Example, taes: &'a [&'a [f32]]) -> LogRow<'a> {
    LogRow {
        example,
        taes,
        predictions: &[],
        ranked: &[],
        correction: false,
        ingested_ms: 0,
        place: None,
    }
}

/// A prediction of each main task, some of which are not known.
fn predictions(data: &Dataset, example: &Example) -> Vec<f32> {
    let cells = example.targets.len() * data.schema.main_tasks().count();
    let of = |at: usize| if at % 5 == 4 { f32::NAN } else { at as f32 / cells as f32 };
    (0..cells).map(of).collect()
}

/// Embeddings with unusual bit patterns: signed zeros, subnormals, infinity.
fn tae(example: &Example) -> Vec<f32> {
    let values = [0.1, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY, 1e-45, example.request as f32];
    (0..example.targets.len() * 3).map(|i| values[i % values.len()]).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn logs_read_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = examples(&data);
    let logs = dir.path().join("logs");
    // The second writer continues the directory of the first.
    for half in examples.chunks(120) {
        let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
        for example in half {
            let (tae, predictions) = (tae(example), predictions(&data, example));
            let taes = [&tae[..]];
            let row = LogRow { predictions: &[&predictions], ..row(example, &taes) };
            writer.write(row).unwrap();
        }
        writer.finish().unwrap();
    }
    let reader = LogReader::open(&logs).unwrap();
    assert!(file_numbers(&logs).unwrap().len() > 2);
    assert_eq!((reader.requests, reader.examples), (200, 1200));
    assert_eq!((reader.fm_version.as_str(), reader.tae_dim), ("fm-7", 3));
    assert_eq!(*reader.schema, *data.schema);
    let logged: Vec<LoggedRequest> = reader.iter().map(Result::unwrap).collect();
    assert_eq!(logged.len(), examples.len());
    for (logged, original) in logged.iter().zip(&examples) {
        let read = &logged.example;
        assert_eq!(
            (read.request, read.surface, read.time_ms),
            (original.request, original.surface, original.time_ms)
        );
        assert_eq!((&read.user, logged.correction), (&original.user, false));
        assert_eq!(bits(&logged.tae), bits(&tae(original)));
        assert_eq!(bits(&logged.predictions), bits(&predictions(&data, original)));
        for (read, original) in read.targets.iter().zip(&original.targets) {
            assert_eq!((&read.item, &read.ids), (&original.item, &original.ids));
            assert_eq!(bits(&read.features), bits(&original.features));
            assert_eq!(bits(&read.truth), bits(&original.truth));
            assert_eq!(bits(&read.outcome.values), bits(&original.outcome.values));
            assert_eq!(
                (read.outcome.actions, read.outcome.known),
                (original.outcome.actions, original.outcome.known)
            );
        }
        let short = short_history(&original.history, original.surface, 5);
        assert_eq!(read.history.len(), short.len());
        for (read, original) in read.history.iter().zip(&short) {
            assert_eq!((read.item.id, &read.item.ids), (original.item.id, &original.item.ids));
            assert_eq!((read.surface, read.time_ms), (original.surface, original.time_ms));
            assert_eq!(
                (read.outcome.actions, read.outcome.known),
                (original.outcome.actions, original.outcome.known)
            );
        }
    }
    assert!(
        logged.iter().any(|row| row.example.history.len() == 5),
        "the test must see histories that are cut"
    );
}

#[test]
fn an_unfinished_file_is_not_seen_and_a_foreign_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let logs = dir.path().join("logs");
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    examples(&data)[..100]
        .iter()
        .for_each(|example| writer.write(row(example, &[&tae(example)])).unwrap());
    drop(writer);
    let reader = LogReader::open(&logs).unwrap();
    assert_eq!(reader.iter().count(), reader.requests);
    assert_eq!(reader.requests, 84, "the whole file of 504 rows");
    let other = LogOptions { history_len: 6, ..options() };
    let message = LogWriter::create(&logs, &data.schema, other, one()).err().unwrap().to_string();
    assert!(message.contains("use another directory"), "{message}");
    std::fs::remove_file(examples_path(&logs, 0)).unwrap();
    assert!(LogReader::open(&logs).err().unwrap().to_string().contains("examples-0000.parquet"));
    let message = LogReader::open(dir.path()).err().unwrap().to_string();
    assert!(message.contains("log-manifest.json"), "{message}");
}

#[test]
fn logs_of_an_older_format_are_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("log-manifest.json");
    std::fs::write(manifest, r#"{ "format": 1, "tae_dim": 24, "history_len": 32 }"#).unwrap();
    let message = LogReader::open(dir.path()).err().unwrap().to_string();
    assert!(message.contains("log format 1") && message.contains("materialise"), "{message}");
}

/// Writes logs of two versions: the first in the first two thirds, the second in the last two. The
/// last example has a correction.
fn several(logs: &Path, data: &Dataset, examples: &[Example], tae_storage: TaeStorage) {
    let versions = [LogVersion::new("1.0.0", 3), LogVersion::new("2.0.0", 2)];
    let options = LogOptions { tae: tae_storage, ..options() };
    let mut writer = LogWriter::create(logs, &data.schema, options, vec![]).unwrap();
    let third = examples.len() / 3;
    for (at, example) in examples.iter().enumerate() {
        let second: Vec<f32> = tae(example).chunks(3).flat_map(|row| [row[0], 7.1]).collect();
        let (active, taes) = match at / third {
            0 => (&versions[..1], vec![tae(example)]),
            1 => (&versions[..], vec![tae(example), second]),
            _ => (&versions[1..], vec![second]),
        };
        writer.set_versions(active.to_vec()).unwrap();
        let taes: Vec<&[f32]> = taes.iter().map(Vec::as_slice).collect();
        let place = Some(LoggedPlace { position: at as u64 + 1, checksum: None });
        writer.write(LogRow { place, ingested_ms: 5, ..row(example, &taes) }).unwrap();
    }
    let mut late = examples[examples.len() - 1].clone();
    late.targets.truncate(1);
    late.targets[0].outcome = Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN };
    let correction = LogRow {
        correction: true,
        place: Some(LoggedPlace { position: 1000, checksum: Some(77) }),
        ..row(&late, &[&[0.5, 0.25]])
    };
    writer.write(correction).unwrap();
    writer.finish().unwrap();
}

#[test]
fn each_version_is_read_where_it_was_logged() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = examples(&data);
    let logs = dir.path().join("logs");
    several(&logs, &data, &examples, TaeStorage::F32);
    let third = examples.len() / 3;
    let message = LogReader::open(&logs).err().unwrap().to_string();
    assert!(message.contains("FM 1.0.0, 2.0.0") && message.contains("--fm"), "{message}");
    let message = LogReader::open_for(&logs, Some("3.0.0")).err().unwrap().to_string();
    assert!(message.contains("no TAEs of FM 3.0.0"), "{message}");
    for (version, dim, range) in [("1.0.0", 3, 0..2 * third), ("2.0.0", 2, third..examples.len())] {
        let reader = LogReader::open_for(&logs, Some(version)).unwrap();
        let rows: Vec<LoggedRequest> = reader.iter().map(Result::unwrap).collect();
        assert_eq!((reader.tae_dim, rows.len()), (dim, range.len()));
        for (read, original) in rows.iter().zip(&examples[range]) {
            assert_eq!((read.example.request, read.ingested_ms), (original.request, 5));
            let first: Vec<f32> = read.tae.chunks(dim).map(|row| row[0]).collect();
            let expected: Vec<f32> = tae(original).chunks(3).map(|row| row[0]).collect();
            assert_eq!(bits(&first), bits(&expected));
        }
    }
    // A reader of the past sees the corrected outcome in its place, once.
    let reader = LogReader::open_for(&logs, Some("2.0.0")).unwrap();
    let last = reader.iter().last().unwrap().unwrap();
    let outcome = last.example.targets[0].outcome;
    assert_eq!((outcome.actions & 1, outcome.known & 1), (1, 1));
    let before = examples[examples.len() - 1].targets[0].outcome;
    assert_eq!(
        (outcome.actions >> 1, outcome.known >> 1),
        (before.actions >> 1, before.known >> 1)
    );
    // A new writer continues after the last complete file.
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    let last = LoggedPlace { position: 1000, checksum: Some(77) };
    assert_eq!(writer.place(), Some(last));
    let earlier = writer.earlier_places().unwrap();
    assert_eq!(earlier.last(), Some(&last));
    assert!(earlier.len() > 1 && earlier.is_sorted_by_key(|place| place.position), "{earlier:?}");

    // It notes that the stream goes on somewhere else without a request, which readers pass over.
    let end = LogReader::open_for(&logs, Some("1.0.0")).unwrap().end;
    let mut follower = LogFollower::open(&logs, "1.0.0", end).unwrap();
    let back = LoggedPlace { position: 40, checksum: None };
    writer.go_on_at(back).unwrap();
    let versions = vec![LogVersion::new("1.0.0", 3)];
    let mut writer = LogWriter::create(&logs, &data.schema, options(), versions).unwrap();
    assert_eq!(writer.place(), Some(back));
    assert!(follower.next_request().unwrap().is_none());
    let surface = examples[0].surface;
    let is_behind =
        |from, surface| LogReader::has_requests_behind(&logs, from, &[surface]).unwrap();
    assert!(!is_behind(end, surface), "a file without a request");
    writer.write(row(&examples[0], &[&tae(&examples[0])])).unwrap();
    writer.finish().unwrap();
    let read = follower.next_request().unwrap().unwrap();
    assert_eq!(read.example.request, examples[0].request);
    let reader = LogReader::open_for(&logs, Some("1.0.0")).unwrap();
    assert_eq!(reader.iter().count(), 2 * third + 1);
    assert!(is_behind(end, surface) && is_behind(LogPosition::default(), surface));
    assert!(!is_behind(end, surface + 1) && !is_behind(reader.end, surface));
}

#[test]
fn embeddings_rounded_to_bf16_take_less() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = examples(&data);
    // Values do not repeat, as in real embeddings.
    let value = |request: u64, at: usize| {
        let mixed = (request << 20 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let bytes = [TaeStorage::F32, TaeStorage::Bf16].map(|storage| {
        let logs = dir.path().join(format!("{storage:?}"));
        let options = LogOptions { tae: storage, ..options() };
        let versions = vec![LogVersion::new("1.0.0", 256)];
        let mut writer = LogWriter::create(&logs, &data.schema, options, versions).unwrap();
        for example in &examples {
            let tae: Vec<f32> =
                (0..example.targets.len() * 256).map(|at| value(example.request, at)).collect();
            writer.write(row(example, &[&tae])).unwrap();
        }
        writer.finish().unwrap();
        let read = LogReader::open(&logs).unwrap();
        let first = read.iter().next().unwrap().unwrap();
        let exact = value(first.example.request, 0);
        let allowed = if storage == TaeStorage::F32 { 0.0 } else { exact.abs() / 256.0 };
        assert!((first.tae[0] - exact).abs() <= allowed);
        let files =
            (0..file_numbers(&logs).unwrap().len() as u32).map(|at| examples_path(&logs, at));
        files.map(|path| std::fs::metadata(path).unwrap().len()).sum::<u64>()
    });
    assert!(bytes[1] * 3 < bytes[0] * 2, "{bytes:?}");
}

#[test]
fn a_follower_sees_complete_files_in_order_and_resumes_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = examples(&data);
    let logs = dir.path().join("logs");
    assert!(LogFollower::open(&logs, "fm-7", LogPosition::default()).is_err(), "nothing is there");
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    let mut follower = LogFollower::open(&logs, "fm-7", LogPosition::default()).unwrap();
    let mut seen = Vec::new();
    for (at, example) in examples.iter().enumerate() {
        assert!(follower.next_request().unwrap().is_none(), "an incomplete file is not visible");
        writer.write(row(example, &[&tae(example)])).unwrap();
        // The clock ends a file every minute, which is every 20th example.
        writer.tick(at as i64 * 3000).unwrap();
        while let Some(logged) = follower.next_request().unwrap() {
            seen.push(logged.example.request);
            if seen.len() % 7 == 0 {
                follower = LogFollower::open(&logs, "fm-7", follower.position()).unwrap();
            }
        }
    }
    writer.finish().unwrap();
    while let Some(logged) = follower.next_request().unwrap() {
        seen.push(logged.example.request);
    }
    assert!(file_numbers(&logs).unwrap().len() >= 9);
    assert_eq!(seen, examples.iter().map(|example| example.request).collect::<Vec<_>>());
}

#[test]
fn a_follower_is_given_its_version_and_corrections_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = examples(&data);
    let logs = dir.path().join("logs");
    several(&logs, &data, &examples, TaeStorage::F32);
    let mut follower = LogFollower::open(&logs, "2.0.0", LogPosition::default()).unwrap();
    let mut rows = Vec::new();
    while let Some(logged) = follower.next_request().unwrap() {
        rows.push(logged);
    }
    assert_eq!(rows.len(), examples.len() - examples.len() / 3 + 1);
    let correction = rows.pop().unwrap();
    assert!(correction.correction && correction.tae == [0.5, 0.25]);
    assert!(rows.iter().all(|row| !row.correction));
}

#[test]
fn where_items_were_ranked_reads_back_and_is_unknown_where_nobody_said() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let examples = &examples(&data)[..60];
    let logs = dir.path().join("logs");
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    let place = |position: usize| RankedPlace {
        position: position as u32,
        propensity: position.is_multiple_of(2).then_some(0.25),
        arm: format!("feed@{position}.0.0"),
    };
    let ranked = |example: &Example| -> Vec<Option<RankedPlace>> {
        let of = |at: usize| (at != 1).then(|| place(at));
        // Every third request is of nobody's ranking.
        let targets = 0..example.targets.len();
        targets.map(|at| of(at).filter(|_| !example.request.is_multiple_of(3))).collect()
    };
    for example in examples {
        let ranked = ranked(example);
        let ranked = if ranked.iter().all(Option::is_none) { &[] } else { &ranked[..] };
        writer.write(LogRow { ranked, ..row(example, &[&tae(example)]) }).unwrap();
    }
    writer.finish().unwrap();
    let logged: Vec<LoggedRequest> =
        LogReader::open(&logs).unwrap().iter().collect::<Result<_>>().unwrap();
    assert_eq!(logged.len(), examples.len());
    for (logged, example) in logged.iter().zip(examples) {
        assert_eq!(logged.ranked, ranked(example));
    }
    // As files of earlier versions are.
    let path = examples_path(&logs, 0);
    let mut fields = LogLayout::new(&data.schema).example_fields();
    fields.retain(|field| !field.name.starts_with("ranked:"));
    fields.push(LogLayout::tae_field("fm-7"));
    let table = TableReader::open(&path).unwrap();
    let group = table.read(0, &fields).unwrap();
    assert_eq!(table.groups(), 1);
    let mut earlier = TableWriter::create(&path, fields).unwrap();
    earlier.write(&group).unwrap();
    earlier.finish().unwrap();
    let first = LogReader::open(&logs).unwrap().iter().next().unwrap().unwrap();
    assert_eq!(first.example.request, examples[0].request);
    assert_eq!(first.ranked, vec![None; examples[0].targets.len()]);
}

#[test]
fn tables_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let logs = dir.path().join("logs");
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    examples(&data)
        .iter()
        .for_each(|example| writer.write(row(example, &[&tae(example)])).unwrap());
    writer.finish().unwrap();
    std::fs::copy(examples_path(&logs, 1), examples_path(&logs, 0)).unwrap();
    let outcome: Result<Vec<LoggedRequest>> = LogReader::open(&logs).unwrap().iter().collect();
    assert!(
        outcome.unwrap_err().to_string().contains("examples-0000.parquet: its rows do not fit")
    );
}

#[test]
fn content_vectors_read_back_and_are_in_a_row_group_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let mut examples = examples(&data);
    // Items without a vector, items with one, and one whose vector changes and then goes.
    for (at, example) in examples.iter_mut().enumerate() {
        for target in &mut example.targets {
            let content: Vec<f32> = match target.item.id {
                id if id % 3 == 0 => vec![],
                1 if at >= 100 => vec![],
                1 => vec![at as f32; 256],
                id => vec![id as f32; 256],
            };
            let item = Item { content: content.into(), ..(*target.item).clone() };
            target.item = Arc::new(item);
        }
    }
    let logs = dir.path().join("logs");
    let mut writer = LogWriter::create(&logs, &data.schema, options(), one()).unwrap();
    examples.iter().for_each(|example| writer.write(row(example, &[&tae(example)])).unwrap());
    writer.finish().unwrap();
    let reader = LogReader::open(&logs).unwrap();
    assert_eq!(reader.content_dim, 256);
    let logged: Vec<LoggedRequest> = reader.iter().map(Result::unwrap).collect();
    let mut changed = 0;
    for (logged, original) in logged.iter().zip(&examples) {
        for (read, original) in logged.example.targets.iter().zip(&original.targets) {
            if read.item.content != original.item.content {
                assert_eq!((original.item.id, original.item.content.len()), (1, 0));
                assert!(read.item.content.iter().all(|number| *number == 0.0), "it means none");
                changed += 1;
            }
        }
    }
    assert!(changed > 0, "an item's vector must go");
    // 30 items in 3 files, and some changes of one of them.
    let bytes: u64 = file_numbers(&logs)
        .unwrap()
        .into_iter()
        .map(|number| std::fs::metadata(examples_path(&logs, number)).unwrap().len())
        .sum();
    let each = reader.examples as u64 * 256 * 4;
    assert!(bytes < each / 4, "{bytes} bytes; with a vector in each row it would be {each}");
}
