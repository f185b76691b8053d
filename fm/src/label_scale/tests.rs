use super::*;
use crate::hash_rng::uniform;
use crate::metrics::{RegressionMetrics, ScoredValue, ValueSums};

/// Revenue: 95 % zeros, and amounts with a long tail.
fn revenue(row: u64) -> f32 {
    if uniform(&[row, 0]) < 0.95 {
        return 0.0;
    }
    let normal: f64 = (1..13).map(|at| uniform(&[row, at])).sum::<f64>() - 6.0;
    (3.0 + 1.2 * normal).exp() as f32
}

fn learned_row(prediction: f32, label: f32) -> LearnedRow {
    LearnedRow { prediction, label, weight: 1.0, is_new: true }
}

fn settled(transform: LabelTransform, label: impl Fn(u64) -> f32) -> LabelScale {
    let mut scale = LabelScale::of_value(transform);
    (0..20_000).for_each(|row| scale.observe(label(row), 1.0));
    scale
}

#[test]
fn learned_labels_have_one_scale_and_come_back() {
    for transform in [LabelTransform::Identity, LabelTransform::Log] {
        for unit in [1e-3, 1.0, 1e4] {
            let scale = settled(transform, |row| unit * revenue(row));
            let labels: Vec<f32> = (0..10_000).map(|row| unit * revenue(row)).collect();
            let learned: Vec<f64> =
                labels.iter().map(|&label| scale.learned(label).into()).collect();
            let mean = learned.iter().sum::<f64>() / 1e4;
            let variance = learned.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 1e4;
            assert!(mean.abs() < 0.1 && (0.07..0.28).contains(&variance), "{mean} {variance}");
            let back = scale.prediction(scale.learned(labels[3]));
            assert!((back - labels[3]).abs() <= 1e-4 * unit, "{back} {}", labels[3]);
        }
    }
    let signed = settled(LabelTransform::Log, |row| revenue(row) - revenue(row + 1));
    let back = signed.prediction(signed.learned(-20.0));
    assert!((back + 20.0).abs() < 1e-3, "{back}");
}

#[test]
fn a_scale_settles_and_no_label_is_learned_beyond_its_limit() {
    let mut scale = settled(LabelTransform::Identity, revenue);
    let before = scale.clone();
    (0..1000).for_each(|_| scale.observe(1e30, 1.0));
    assert_eq!(scale, before);
    assert_eq!(scale.learned(1e5), 5.0);
    assert_eq!(scale.learned(1e15), f32::INFINITY, "no tail is so long");
    assert!(settled(LabelTransform::Log, |_| 3e38).prediction(1e30).is_finite());
    assert!(scale.prediction(f32::NAN).is_nan(), "what is broken stays visible");
    let constant = settled(LabelTransform::Log, |_| 7.0);
    assert!((constant.prediction(0.0) - 7.0).abs() < 1e-3 && constant.learned(7.0).abs() < 1e-6);
}

#[test]
fn an_output_of_0_is_the_base_rate() {
    let mut scale = LabelScale::of_rate();
    assert_eq!(scale.prediction(0.0), 0.5);
    // Rows that stand for ten others each.
    for row in 0..100_000_u64 {
        let label = if row.is_multiple_of(50) { 1.0 } else { 0.0 };
        scale.observe(label, 10.0);
        assert!((0.0..0.5).contains(&scale.prediction(0.0)) || row < 2);
    }
    assert!((scale.prediction(0.0) - 0.02).abs() < 1e-3, "{}", scale.prediction(0.0));
    assert_eq!((scale.learned(1.0), scale.learned(0.0)), (1.0, 0.0));
    assert_eq!(scale.prediction(-scale.log_odds()), 0.5);
}

/// The squared errors of progressive predictions over those of the labels' mean, where the
/// model's outputs know `signal` of a label beside chance. Of a scale that `forgets`, predictions
/// are never drawn towards the mean.
fn relative_error(scale: &mut LabelScale, signal: f32, forgets: bool) -> f64 {
    let mut sums = ValueSums::default();
    for step in 0..200_u64 {
        let row = |row| {
            let (label, chance) = (revenue(row), 3.0 * uniform(&[row, 99]) as f32);
            learned_row(scale.prediction(signal * scale.learned(label) + chance), label)
        };
        let rows: Vec<LearnedRow> = (100 * step..100 * (step + 1)).map(row).collect();
        // Nothing is known in the first step.
        for &LearnedRow { prediction, label, .. } in rows.iter().filter(|_| step > 0) {
            sums.push(ScoredValue { prediction, label });
        }
        scale.correct(rows);
        if forgets {
            scale.set_addition(ScaleAddition::default());
        }
    }
    let RegressionMetrics { mse, base_mse, .. } = sums.metrics();
    mse.unwrap() / base_mse.unwrap()
}

#[test]
fn predictions_differ_as_far_as_labels_confirm() {
    for (signal, most) in [(0.0, 1.005), (0.3, 0.93)] {
        let mut scale = settled(LabelTransform::Log, revenue);
        let found = relative_error(&mut scale, signal, false);
        let mut before = settled(LabelTransform::Log, revenue);
        let without = relative_error(&mut before, signal, true);
        assert!(found < most && without > found + 0.01, "{signal}: {found}, {without} without");
        assert!(scale.prediction(1.0) < scale.prediction(1.5), "their order stays");
    }
    let known = |signal| relative_error(&mut settled(LabelTransform::Log, revenue), signal, false);
    assert!(known(1.0) < 0.9, "{}", known(1.0));
}

#[test]
fn a_task_that_is_added_begins_as_frequent_as_the_others() {
    let mut scales = LabelScales::new();
    assert_eq!(LabelScale::of_rate_beside(&scales), LabelScale::of_rate(), "there are none");
    for (name, every) in [("click", 4), ("like", 100)] {
        let mut scale = LabelScale::of_rate();
        (0..20_000).for_each(|row| scale.observe(f32::from(row % every == 0), 1.0));
        scales.insert(name.into(), scale);
    }
    scales.insert("fresh".into(), LabelScale::of_rate());
    scales.insert("watch".into(), LabelScale::of_value(LabelTransform::Identity));
    let mut added = LabelScale::of_rate_beside(&scales);
    let mean = (f64::from(scales["click"].log_odds()) + f64::from(scales["like"].log_odds())) / 2.0;
    assert!((f64::from(added.log_odds()) - mean).abs() < 1e-6, "{}", added.log_odds());
    let text = serde_json::to_string(&added).unwrap();
    assert_eq!(serde_json::from_str::<LabelScale>(&text).unwrap(), added);
    // Its own labels count for all but one.
    (0..1000).for_each(|row| added.observe(f32::from(row % 2 == 0), 1.0));
    assert!((added.prediction(0.0) - 0.5).abs() < 1e-3, "{}", added.prediction(0.0));
    let before = r#"{"rate":{"labels":4.0,"positives":1.0}}"#;
    let before: LabelScale = serde_json::from_str(before).unwrap();
    assert!((before.prediction(0.0) - 1.5 / 5.0).abs() < 1e-6, "of earlier releases");
}

#[test]
fn the_sum_of_predictions_becomes_that_of_the_labels() {
    let mut scale = settled(LabelTransform::Log, revenue);
    let seen: f64 = (0..100_000).map(|row| f64::from(revenue(row))).sum();
    assert!(f64::from(scale.prediction(0.0)) * 1e5 < 0.2 * seen, "the mean of logarithms");
    for row in 0..100_000 {
        let prediction = scale.prediction(0.0);
        scale.correct([learned_row(prediction, revenue(row))]);
    }
    let calibration = f64::from(scale.prediction(0.0)) * 1e5 / seen;
    assert!((calibration - 1.0).abs() < 0.15, "{calibration}");
    // Where labels have both signs, their mean says nothing of a factor.
    let mut signed = settled(LabelTransform::Log, |row| revenue(row) - revenue(row + 1));
    signed.set_addition(ScaleAddition::default());
    let before = signed.prediction(0.5);
    (0..500).for_each(|_| signed.correct([learned_row(before, 40.0)]));
    assert_eq!(signed.prediction(0.5), before);
}

/// Learns from rows whose predictions know nothing of their labels.
fn correct_blindly(scale: &mut LabelScale, rows: std::ops::Range<u64>) {
    for row in rows {
        let prediction = scale.prediction(3.0 * uniform(&[row, 99]) as f32);
        scale.correct([learned_row(prediction, revenue(row))]);
    }
}

/// How far apart two outputs are predicted, over the mean of the labels.
fn spread(scale: &LabelScale) -> f64 {
    let mean = (0..20_000).map(|row| f64::from(revenue(row))).sum::<f64>() / 2e4;
    f64::from(scale.prediction(2.0) - scale.prediction(1.0)) / mean
}

#[test]
fn rows_that_were_learned_before_confirm_nothing() {
    let mut scale = settled(LabelTransform::Log, revenue);
    correct_blindly(&mut scale, 0..5000);
    let before = scale.clone();
    // Their labels are known by heart.
    for row in 0..5000 {
        let label = revenue(row);
        let said = learned_row(scale.prediction(scale.learned(label)), label);
        scale.correct([LearnedRow { is_new: false, ..said }]);
    }
    assert_eq!(scale.addition(), before.addition());
    assert_ne!(scale, before, "means are corrected all the same");
}

#[test]
fn a_scale_of_an_earlier_release_is_drawn_to_the_mean_once_enough_rows_say_so() {
    let mut earlier = settled(LabelTransform::Identity, |row| revenue(row) - 1.0);
    earlier.set_addition(ScaleAddition::default());
    let text = serde_json::to_string(&earlier).unwrap();
    assert!(!text.contains("agreement"), "{text}");
    let mut scale: LabelScale = serde_json::from_str(&text).unwrap();
    let before = spread(&scale);
    correct_blindly(&mut scale, 0..CORRECTION_DOUBT as u64 - 1);
    assert_eq!(spread(&scale), before, "nothing jumps at first");
    correct_blindly(&mut scale, CORRECTION_DOUBT as u64..3000);
    assert!(spread(&scale) < 0.5 * before, "{} {before}", spread(&scale));
}

#[test]
fn a_wild_prediction_says_no_more_than_other_rows() {
    let mut scale = settled(LabelTransform::Log, revenue);
    relative_error(&mut scale, 0.6, false);
    let (before, mean) = (spread(&scale), scale.prediction(0.0));
    let wild = scale.prediction(60.0);
    assert!(wild > 1e9, "{wild}");
    scale.correct([learned_row(wild, 0.0)]);
    assert!(spread(&scale) > 0.4 * before, "{} {before}", spread(&scale));
    assert!((scale.prediction(0.0) / mean - 1.0).abs() < 0.5, "{} {mean}", scale.prediction(0.0));
    assert!(scale.prediction(60.0) > 1e9, "what is predicted is not limited");
}

#[test]
fn what_another_model_predicts_is_an_output_of_any_scale() {
    let close = |a: f32, b: f32| (a - b).abs() <= 1e-5 * (1.0 + b.abs());
    for transform in [LabelTransform::Identity, LabelTransform::Log] {
        for scale in [LabelScale::of_value(transform), settled(transform, revenue)] {
            for value in [0.0, 0.3, 40.0, 700.0] {
                let back = scale.prediction(scale.output(value));
                assert!(close(back, value), "{transform:?}: {value} is {back}");
            }
            assert_eq!(scale.output(f32::NAN), 0.0, "the mean");
        }
    }
    let mut rate = LabelScale::of_rate();
    for _ in 0..2 {
        for probability in [1e-6, 0.02, 0.5, 0.9999] {
            let back = rate.prediction(rate.output(probability));
            assert!((back - probability).abs() < 1e-6, "{probability} is {back}");
        }
        assert_eq!(rate.output(f32::NAN), 0.0, "the base rate");
        (0..500).for_each(|row| rate.observe(f32::from(u8::from(row % 50 == 0)), 1.0));
    }
    assert!(log_odds_of(0.0) == -16.0 && log_odds_of(1.0) == 16.0 && log_odds_of(f32::NAN) == 0.0);
}
