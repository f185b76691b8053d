//! A raw revenue beside a click: neither drowns the other, and predictions are in its unit.

use std::sync::Arc;

use hypercast_core::hash::mix_parts;
use hypercast_fm::{
    device::DeviceKind,
    example::{Example, Item, Outcome, Target, User},
    inference::{self, FmServingOptions},
    label_scale::LabelTransform,
    metrics::{LogLossSums, RegressionMetrics, ScoredValue, regression_metrics},
    spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
    trainer,
};

const REQUESTS: u64 = 1000;
const CANDIDATES: u64 = 16;
const ITEMS: u64 = 30;

fn config() -> FmConfig {
    FmConfig {
        dim: 16,
        layers: 1,
        heads: 1,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        batch_requests: 16,
        learning_rate: 4e-3,
        sparse_learning_rate: 0.1,
        average_decay: 0.9,
        warmup_steps: 10,
        ..FmConfig::default()
    }
}

fn spec(revenue: Option<LabelTransform>) -> FmSpec {
    let task = |name: &str, label, transform| TaskSpec {
        name: name.into(),
        main: true,
        label,
        transform,
        surfaces: vec![true],
        weight: 1.0,
    };
    let click = task("click", TaskLabel::Action(0), LabelTransform::Identity);
    let revenue = revenue.map(|transform| task("revenue", TaskLabel::Value(0), transform));
    FmSpec {
        surfaces: vec!["shop".into()],
        actions: 1,
        values: 1,
        item_ids: 0,
        item_dense: 0,
        item_optional: Vec::new(),
        features: 0,
        profile_ids: vec![],
        id_widths: Default::default(),
        tasks: [Some(click), revenue].into_iter().flatten().collect(),
        content: 0,
        training_only: Default::default(),
        alignments: Default::default(),
    }
}

/// A click in four; a fifth of the clicks pay, and few pay a lot: zeros in 95 % of the rows, a mean
/// of some 3 and a deviation of some 20.
fn outcome(request: u64, item: u64) -> Outcome {
    let chance = |at: u64| (mix_parts(&[request, item, at]) >> 11) as f64 / (1u64 << 53) as f64;
    let clicked = chance(0) < 0.05 + 0.4 * (item % 10) as f64 / 9.0;
    let paid = clicked && chance(1) < 0.05 + 0.3 * (item % 3) as f64 / 2.0;
    let normal = (2..14).map(chance).sum::<f64>() - 6.0;
    let amount = (2.5 + 0.7 * (item % 3) as f64 + normal).exp();
    let revenue = if paid { amount as f32 } else { 0.0 };
    let mut outcome = Outcome { actions: u64::from(clicked), known: 1, ..Outcome::UNKNOWN };
    outcome.values[0] = revenue;
    outcome
}

fn example(request: u64) -> Example {
    let target = |at: u64| {
        let id = mix_parts(&[request, at, 99]) % ITEMS;
        Target {
            item: Arc::new(Item { id, ..Item::default() }),
            ids: vec![],
            features: vec![],
            outcome: outcome(request, id),
            truth: vec![],
        }
    };
    Example {
        request,
        user: Arc::new(User::default()),
        surface: 0,
        time_ms: request as i64 * 1000,
        history: vec![],
        targets: (0..CANDIDATES).map(target).collect(),
    }
}

/// The quality of the predictions for the later half of the requests.
struct Learned {
    click_ne: f64,
    revenue: RegressionMetrics,
}

/// Learns from all requests, and leaves a checkpoint in `dir`.
fn learned(dir: &std::path::Path, revenue: Option<LabelTransform>) -> Learned {
    let (config, spec) = (config(), spec(revenue));
    let mut trainer = trainer::create(&dir.join("work"), &config, &spec, DeviceKind::Cpu).unwrap();
    let (mut click, mut values) = (LogLossSums::default(), Vec::new());
    let examples: Vec<Example> = (0..REQUESTS).map(example).collect();
    for batch in examples.chunks(config.batch_requests) {
        let said = trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
        if batch[0].request < REQUESTS / 2 {
            continue;
        }
        let tasks = spec.tasks.len();
        for (said, labels) in said.predictions.chunks(tasks).zip(said.labels.chunks(tasks)) {
            click.push(said[0], labels[0] == 1.0);
            if tasks == 2 {
                values.push(ScoredValue { prediction: said[1], label: labels[1] });
            }
        }
    }
    trainer.checkpoint(&dir.join("fm"), "1.0.0").unwrap();
    Learned { click_ne: click.normalized_entropy().unwrap(), revenue: regression_metrics(&values) }
}

#[test]
fn rows_of_a_later_pass_confirm_no_prediction() {
    let dir = tempfile::tempdir().unwrap();
    let (config, spec) = (config(), spec(Some(LabelTransform::Log)));
    let mut trainer = trainer::create(dir.path(), &config, &spec, DeviceKind::Cpu).unwrap();
    let examples: Vec<Example> = (0..16).map(example).collect();
    let mut confirmed = |repeats| {
        trainer.set_repeats(repeats);
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
        let manifest = trainer.trained_weights("1.0.0").unwrap().manifest;
        manifest.statistics.labels["revenue"].addition()
    };
    let first = confirmed(false);
    assert_eq!(confirmed(true), first);
    assert_ne!(confirmed(false), first);
}

#[test]
fn a_raw_revenue_drowns_no_click_and_is_predicted_in_its_unit() {
    let dir = tempfile::tempdir().unwrap();
    let alone = learned(&dir.path().join("alone"), None);
    for transform in [LabelTransform::Log, LabelTransform::Identity] {
        let dir = dir.path().join(format!("{transform:?}"));
        let Learned { click_ne, revenue } = learned(&dir, Some(transform));
        assert!(click_ne < alone.click_ne + 0.005, "{transform:?}: {click_ne} {}", alone.click_ne);
        let (mse, base) = (revenue.mse.unwrap(), revenue.base_mse.unwrap());
        assert!(mse < base, "{transform:?}: {revenue:?}");
        assert!(revenue.rank_correlation.unwrap() > 0.1, "{transform:?}: {revenue:?}");
        let calibration = revenue.calibration.unwrap();
        assert!((calibration - 1.0).abs() < 0.25, "{transform:?}: {revenue:?}");
        // A checkpoint carries its scale.
        let fm = inference::load(&dir.join("fm"), FmServingOptions::default()).unwrap();
        let next = example(REQUESTS);
        let served: Vec<f32> =
            fm.infer(&[&next]).unwrap().main.chunks(2).map(|row| row[1]).collect();
        let mean = served.iter().sum::<f32>() / served.len() as f32;
        assert!((0.5..20.0).contains(&mean), "{transform:?}: {served:?}");
    }
}
