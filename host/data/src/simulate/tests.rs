//! Tests of the simulated data set.

use super::*;
use crate::dataset::Dataset;
use crate::features::FeatureConfig;
use crate::features::replay::{Replay, ReplayOptions};

fn options(into: PathBuf, seed: u64, requests: usize) -> SimulateOptions {
    SimulateOptions { into, users: 300, items: 300, requests, surfaces: 3, seed }
}

#[test]
fn a_seed_decides_the_world() {
    let dir = tempfile::tempdir().unwrap();
    let rows = |name: &str, seed| -> String {
        let into = dir.path().join(name);
        simulate(&options(into.clone(), seed, 50)).unwrap();
        let data = Dataset::open(&into).unwrap();
        data.impressions().unwrap().map(|row| format!("{:?}", row.unwrap())).collect()
    };
    assert_eq!(rows("a", 1), rows("b", 1));
    assert_ne!(rows("c", 1), rows("d", 2));
}

#[test]
fn the_best_ne_leaves_something_to_learn_and_labels_agree_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("world");
    let report = simulate(&options(into.clone(), 5, 6000)).unwrap();
    let data = Dataset::open(&into).unwrap();
    let click = &report.tasks[0];
    assert!((0.6..0.85).contains(&click.best_ne), "{report}");
    assert!((0.15..0.5).contains(&click.rate), "{report}");
    // The labels' own log loss under the truth is close to the expected one.
    let (mut loss, mut n) = (0.0, 0.0);
    for row in data.impressions().unwrap() {
        let row = row.unwrap();
        assert!(row.outcome_ms > row.time_ms);
        let p = f64::from(row.truth[0]);
        loss -= if row.outcome.actions & 1 == 1 { p.ln() } else { (1.0 - p).ln() };
        n += 1.0;
    }
    let observed = loss / n / binary_entropy(click.rate);
    assert!((observed - click.best_ne).abs() < 0.02, "{observed} against {}", click.best_ne);
}

/// Actions reveal tastes: the sum of the counters' log odds closes a good part of the gap between
/// the base rate and the truth, without any training.
#[test]
fn history_reveals_tastes() {
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("world");
    simulate(&options(into.clone(), 5, 6000)).unwrap();
    let data = Dataset::open(&into).unwrap();
    let columns = data.schema.feature_columns();
    let used = ["user_click_rate", "item_click_rate", "user_topic_click_rate"]
        .map(|name| columns.iter().position(|column| column == name).unwrap());
    let features = FeatureConfig { prior_strength: 4.0, ..FeatureConfig::default() };
    let replay = Replay::new(
        &data,
        ReplayOptions { span: Default::default(), history_len: 0, max_targets: 16, features },
    )
    .unwrap();
    let (mut loss, mut best, mut positives, mut n) = (0.0, 0.0, 0.0, 0.0);
    for example in replay.skip(3000) {
        for target in example.unwrap().targets {
            let clicked = target.outcome.actions & 1 == 1;
            let score: f32 = used.iter().map(|&column| target.features[column]).sum();
            // The base rate's log odds are about -0.8 in this world.
            let p = 1.0 / (1.0 + (0.8 - f64::from(score)).exp());
            loss -= if clicked { p.ln() } else { (1.0 - p).ln() };
            best += binary_entropy(f64::from(target.truth[0]));
            positives += f64::from(u8::from(clicked));
            n += 1.0;
        }
    }
    let base = binary_entropy(positives / n);
    let closed = (base - loss / n) / (base - best / n);
    eprintln!(
        "rate {:.4}, counters' NE {:.4}, best {:.4}, gap closed {closed:.3}",
        positives / n,
        loss / n / base,
        best / n / base
    );
    assert!(closed > 0.25, "only {closed:.3} of the gap closed");
}
