//! Tests of the feature logs.

use super::*;
use crate::dataset::Dataset;
use crate::dataset::timeline::Span;
use crate::features::FeatureConfig;
use crate::features::replay::{Replay, ReplayOptions};
use crate::import::simulate::{Options, simulate};

/// A small world with every kind of column.
fn world(dir: &Path) -> Dataset {
    let into = dir.join("world");
    simulate(&Options {
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
    LogOptions { tae_dim: 3, history_len: 5, rows_per_file: 500 }
}

/// Embeddings with every difficult bit pattern.
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
    // Two writers in turn: the second continues the directory.
    for half in examples.chunks(120) {
        let mut writer = LogWriter::create(&logs, &data.schema, options()).unwrap();
        half.iter().for_each(|example| writer.write(example, &tae(example), "fm-7").unwrap());
        writer.finish().unwrap();
    }
    let reader = LogReader::open(&logs).unwrap();
    assert!(numbers(&logs).unwrap().len() > 2);
    assert_eq!((reader.requests, reader.examples), (200, 1200));
    assert_eq!(*reader.schema, *data.schema);
    let logged: Vec<Logged> = reader.iter().map(Result::unwrap).collect();
    assert_eq!(logged.len(), examples.len());
    for (logged, original) in logged.iter().zip(&examples) {
        let read = &logged.example;
        assert_eq!(
            (read.request, read.surface, read.time_ms),
            (original.request, original.surface, original.time_ms)
        );
        assert_eq!((&read.user, logged.fm_version.as_str()), (&original.user, "fm-7"));
        assert_eq!(bits(&logged.tae), bits(&tae(original)));
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
    let mut writer = LogWriter::create(&logs, &data.schema, options()).unwrap();
    examples(&data)[..100]
        .iter()
        .for_each(|example| writer.write(example, &tae(example), "1").unwrap());
    drop(writer);
    let reader = LogReader::open(&logs).unwrap();
    assert_eq!(reader.iter().count(), reader.requests);
    assert_eq!(reader.requests, 84, "the whole file of 504 rows");
    let other = LogOptions { tae_dim: 4, ..options() };
    let message = LogWriter::create(&logs, &data.schema, other).err().unwrap().to_string();
    assert!(message.contains("use another directory"), "{message}");
    std::fs::remove_file(examples_path(&logs, 0)).unwrap();
    assert!(LogReader::open(&logs).err().unwrap().to_string().contains("examples-0000.parquet"));
    let message = LogReader::open(dir.path()).err().unwrap().to_string();
    assert!(message.contains("log-manifest.json"), "{message}");
}

#[test]
fn tables_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = world(dir.path());
    let logs = dir.path().join("logs");
    let mut writer = LogWriter::create(&logs, &data.schema, options()).unwrap();
    examples(&data).iter().for_each(|example| writer.write(example, &tae(example), "1").unwrap());
    writer.finish().unwrap();
    std::fs::copy(examples_path(&logs, 1), examples_path(&logs, 0)).unwrap();
    let outcome: Result<Vec<Logged>> = LogReader::open(&logs).unwrap().iter().collect();
    assert!(
        outcome.unwrap_err().to_string().contains("examples-0000.parquet: its rows do not fit")
    );
}
