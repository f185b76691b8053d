//! The scale on which a model learns a task, and the way back to probabilities and to the unit of a
//! label.
//!
//! Of a binary task it learns how far the log odds are from those of the base rate, which the first
//! labels tell. So the first predictions are not that half of all rows happen, which costs a rare
//! action more than all that is learned later. Before its first label a task that is added to a
//! model is taken to be as frequent as those that the model knows.
//!
//! Of a regression it learns `(t(label) - mean) / (2 deviation)`, where t is what the schema says
//! of the task's label ([`LabelTransform`]). Learned labels have a deviation of one half, as those
//! of a binary task at even odds, so that their loss has the scale of its cross-entropy. So no
//! task's loss is larger because its label is written in cents, and no label of a long tail decides
//! a step alone.
//!
//! The first [`SETTLED_LABELS`] labels fix a scale, and it is saved and published with the weights
//! that learned by it. Whatever leaves a model is in the label's unit. A model of before there were
//! scales has none, and learns and predicts as it did.
//!
//! The prediction of a mean on a logarithmic scale, taken back, is nearer to the label's median,
//! and labels are clipped. Both make the sum of the predictions too small. It is corrected by the
//! ratio of the means of labels and predictions (Snowdon, "A ratio estimator for bias correction
//! in logarithmic regressions", 1991). Duan's smearing factor would need residuals whose spread is
//! the same for all rows, which labels that are mostly zero do not have.
//!
//! Differences between such predictions are too large or too small: an exponential makes more of
//! what was learned of logarithms than labels of a long tail confirm. So predictions are drawn
//! towards the mean of the labels as far as the slope of labels over predictions says, and its own
//! doubt (James and Stein, 1961). A model that knows nothing yet predicts the mean.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::standardise::{OBSERVED_LIMIT, Standardiser, text_only};

/// What is learned of a regression's label, before it is standardised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelTransform {
    /// The label itself.
    #[default]
    Identity,
    /// sign(x) ln(1 + |x|), for amounts with a long tail: revenue, seconds, counts.
    Log,
}

/// The scales of a model's tasks by name. A task that has none is learned as plain log odds, or in
/// its label's own unit.
pub type LabelScales = BTreeMap<String, LabelScale>;

/// How one task is learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelScale {
    /// A binary task.
    Rate(BaseRate),
    /// A regression.
    Value(ValueScale),
}

/// The base rate of a binary task: the share of its first labels that are yes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseRate {
    labels: f64,
    positives: f64,
    /// The log odds before the first label, which count as one label then.
    #[serde(default, skip_serializing_if = "is_zero", with = "text_only")]
    prior: f64,
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

/// How the label of a regression is learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValueScale {
    transform: LabelTransform,
    /// Of the transformed labels, up to [`SETTLED_LABELS`].
    moments: Standardiser,
    /// Whether any of those labels is below 0. A ratio of means means nothing then.
    signed: bool,
    correction: MeanCorrection,
    /// None in a model of before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "text_only")]
    agreement: Option<Agreement>,
}

/// The ratio of the means of labels and of uncorrected predictions, for the newest half of all
/// rows, at most of some [`CORRECTION_ROWS`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct MeanCorrection {
    rows: f64,
    label: f64,
    prediction: f64,
}

/// How labels vary with predictions whose mean is corrected: weighted means over the rows of which
/// [`MeanCorrection`] is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Agreement {
    rows: f64,
    weight: f64,
    label: f64,
    prediction: f64,
    label_square: f64,
    prediction_square: f64,
    product: f64,
}

/// What later releases have added to scales. Binary forms keep it apart from them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ScaleAddition {
    /// Of a base rate: the log odds before the first label.
    prior: f64,
    agreement: Option<Agreement>,
}

/// A prediction that was made before its label was learned, both in the label's unit.
#[derive(Debug, Clone, Copy)]
pub struct LearnedRow {
    /// What a scale said of the model's output.
    pub prediction: f32,
    /// What came.
    pub label: f32,
    /// For how many rows it stands.
    pub weight: f32,
}

/// Mean and deviation stay as they are after so many labels. The first few thousand rows of a
/// training have taught a model little that another scale would turn.
pub const SETTLED_LABELS: f64 = 10_000.0;

/// The standard deviation of learned labels.
const LEARNED_DEVIATION: f64 = 0.5;

/// Labels are clipped to so many deviations.
const LABEL_LIMIT: f64 = 10.0;

/// A label so many deviations from the mean is of no tail but a fault. It becomes infinite, so that
/// its example is set aside (`harm`).
const FAULTY_LABEL: f64 = 1e9;

/// Labels by which a fault can be told.
const FAULT_LABELS: f64 = 32.0;

/// Rows after which a row's weight in the correction falls to 37 %.
const CORRECTION_ROWS: f64 = 1e5;

/// So many rows count as half of the evidence for a correction: fewer correct less.
const CORRECTION_DOUBT: f64 = 1000.0;

/// No mean is corrected by more than this factor, up or down.
const MAX_CORRECTION: f64 = 1000.0;

/// Predictions keep at least this share of their distances from the mean, so that they keep their
/// order.
const LEAST_SLOPE: f64 = 0.05;

/// A transformed value beyond it would not fit an f32 when it is taken back and corrected.
const MAX_EXPONENT: f64 = 80.0;

impl LabelTransform {
    /// Whether labels are learned as they are.
    pub fn is_identity(&self) -> bool {
        *self == LabelTransform::Identity
    }

    fn apply(self, label: f64) -> f64 {
        match self {
            LabelTransform::Identity => label,
            LabelTransform::Log => label.signum() * label.abs().ln_1p(),
        }
    }

    fn invert(self, value: f64) -> f64 {
        match self {
            LabelTransform::Identity => value,
            LabelTransform::Log => value.signum() * value.abs().min(MAX_EXPONENT).exp_m1(),
        }
    }
}

impl LabelScale {
    /// The scale of a binary task that has seen no label.
    pub fn of_rate() -> Self {
        LabelScale::Rate(BaseRate::default())
    }

    /// The scale of a binary task that is added to those of `scales`: before its first label it has
    /// the mean of their log odds.
    pub fn of_rate_beside(scales: &LabelScales) -> Self {
        let known = scales.values().filter_map(|scale| match scale {
            LabelScale::Rate(rate) if rate.labels > 0.0 => Some(f64::from(rate.log_odds())),
            _ => None,
        });
        let (count, sum) = known.fold((0.0, 0.0), |(count, sum), odds| (count + 1.0, sum + odds));
        let prior = if count > 0.0 { sum / count } else { 0.0 };
        LabelScale::Rate(BaseRate { prior, ..BaseRate::default() })
    }

    /// The scale of a regression that has seen no label: until it has, labels are only transformed.
    pub fn of_value(transform: LabelTransform) -> Self {
        LabelScale::Value(ValueScale::new(transform))
    }

    /// Whether all its numbers are finite.
    pub fn is_finite(&self) -> bool {
        match self {
            LabelScale::Rate(BaseRate { labels, positives, prior }) => {
                (labels + positives + prior).is_finite()
            }
            LabelScale::Value(scale) => scale.is_finite(),
        }
    }

    /// Takes a label into account that is about to be learned, if the scale is not settled. A row
    /// that stands for others has their number for its weight.
    pub fn observe(&mut self, label: f32, weight: f32) {
        match self {
            LabelScale::Rate(rate) => rate.observe(label, weight),
            LabelScale::Value(scale) => scale.observe(label),
        }
    }

    /// Compares predictions of this scale with their labels.
    pub fn correct(&mut self, rows: impl IntoIterator<Item = LearnedRow>) {
        if let LabelScale::Value(scale) = self {
            let made_by = scale.clone();
            rows.into_iter().for_each(|row| scale.correct(&made_by, row));
        }
    }

    /// What a binary form of this scale does not have.
    pub fn addition(&self) -> ScaleAddition {
        match self {
            LabelScale::Rate(rate) => ScaleAddition { prior: rate.prior, agreement: None },
            LabelScale::Value(scale) => ScaleAddition { prior: 0.0, agreement: scale.agreement },
        }
    }

    /// Sets what [`LabelScale::addition`] gave.
    pub fn set_addition(&mut self, addition: ScaleAddition) {
        match self {
            LabelScale::Rate(rate) => rate.prior = addition.prior,
            LabelScale::Value(scale) => scale.agreement = addition.agreement,
        }
    }

    /// What a model learns of a label: of a regression, its distance from the mean in two
    /// deviations; infinite if the label is a fault.
    pub fn learned(&self, label: f32) -> f32 {
        match self {
            LabelScale::Rate(_) => label,
            LabelScale::Value(scale) => scale.learned(label),
        }
    }

    /// The probability, or the prediction in the label's unit, of a model's output.
    pub fn prediction(&self, output: f32) -> f32 {
        match self {
            LabelScale::Rate(_) => 1.0 / (1.0 + (-output - self.log_odds()).exp()),
            LabelScale::Value(scale) => scale.prediction(output),
        }
    }

    /// What is added to an output before it is the log odds of a binary task; 0 of a regression.
    pub fn log_odds(&self) -> f32 {
        match self {
            LabelScale::Rate(rate) => rate.log_odds(),
            LabelScale::Value(_) => 0.0,
        }
    }
}

impl BaseRate {
    fn observe(&mut self, label: f32, weight: f32) {
        if self.labels < SETTLED_LABELS && weight.is_finite() {
            self.labels += f64::from(weight);
            self.positives += f64::from(weight * label);
        }
    }

    fn log_odds(self) -> f32 {
        if self.labels == 0.0 {
            return self.prior as f32;
        }
        let (negatives, prior) = (self.labels - self.positives, 1.0 / (1.0 + (-self.prior).exp()));
        ((self.positives + prior) / (negatives + 1.0 - prior)).ln() as f32
    }
}

impl ValueScale {
    fn new(transform: LabelTransform) -> Self {
        let (moments, correction) = (Standardiser::new(1), MeanCorrection::default());
        Self { transform, moments, signed: false, correction, agreement: Some(Default::default()) }
    }

    fn is_finite(&self) -> bool {
        let MeanCorrection { rows, label, prediction } = self.correction;
        let correction = [rows, label, prediction].iter().all(|number| number.is_finite());
        let agreement = self.agreement.is_none_or(|agreement| agreement.is_finite());
        self.moments.width() == 1 && self.moments.is_finite() && correction && agreement
    }

    fn observe(&mut self, label: f32) {
        if label.is_finite() && !self.is_settled() {
            self.moments.observe(&[self.transform.apply(label.into()) as f32]);
            self.signed |= label < 0.0;
        }
    }

    fn correct(&mut self, made_by: &ValueScale, row: LearnedRow) {
        let numbers = [row.prediction, row.label, row.weight].map(f64::from);
        if numbers.iter().any(|number| !number.is_finite()) {
            return;
        }
        let [prediction, label, weight] = numbers;
        // A label that the moments do not count in full counts as far as there.
        let label = label.min(self.taken_back(OBSERVED_LIMIT));
        let mean_corrected = made_by.slope().map_or(prediction, |slope| slope.undo(prediction));
        let uncorrected = mean_corrected / made_by.factor();
        if let Some(agreement) = &mut self.agreement {
            agreement.observe([mean_corrected, label, weight]);
        }
        let MeanCorrection { rows, label: labels, prediction: predictions } = &mut self.correction;
        let rate = (2.0 / (*rows + 2.0)).max(1.0 / CORRECTION_ROWS);
        *rows += 1.0;
        *labels += rate * (weight * label - *labels);
        *predictions += rate * (weight * uncorrected - *predictions);
    }

    fn learned(&self, label: f32) -> f32 {
        let ScaleMoments { mean, deviation } = self.moments();
        let value = (self.transform.apply(label.into()) - mean) / deviation;
        if value.abs() > FAULTY_LABEL && self.moments.rows() >= FAULT_LABELS {
            return f32::INFINITY;
        }
        (LEARNED_DEVIATION * value.clamp(-LABEL_LIMIT, LABEL_LIMIT)) as f32
    }

    fn prediction(&self, output: f32) -> f32 {
        let mean_corrected = self.factor() * self.taken_back(f64::from(output) / LEARNED_DEVIATION);
        self.slope().map_or(mean_corrected, |slope| slope.apply(mean_corrected)) as f32
    }

    fn is_settled(&self) -> bool {
        self.moments.rows() >= SETTLED_LABELS
    }

    /// The label at so many deviations from the mean.
    fn taken_back(&self, value: f64) -> f64 {
        let ScaleMoments { mean, deviation } = self.moments();
        self.transform.invert(mean + deviation * value)
    }

    fn moments(&self) -> ScaleMoments {
        let moments = self.moments.moments().next().expect("a scale has one column");
        let deviation = moments.variance.sqrt();
        let deviation = if deviation > 0.0 { deviation } else { 1.0 };
        ScaleMoments { mean: moments.mean, deviation }
    }

    /// How predictions are drawn towards the mean; none before the first row, and in a model of
    /// before there was one.
    fn slope(&self) -> Option<Slope> {
        self.agreement.filter(|agreement| agreement.weight > 0.0).map(Agreement::slope)
    }

    /// What predictions are multiplied with.
    fn factor(&self) -> f64 {
        let MeanCorrection { rows, label, prediction } = self.correction;
        if self.signed || label <= 0.0 || prediction <= 0.0 {
            return 1.0;
        }
        let trust = rows / (rows + CORRECTION_DOUBT);
        let factor = (trust * (label / prediction).ln()).exp();
        factor.clamp(1.0 / MAX_CORRECTION, MAX_CORRECTION)
    }
}

/// A line through the mean of the labels.
#[derive(Clone, Copy)]
struct Slope {
    mean: f64,
    share: f64,
}

impl Slope {
    fn apply(self, prediction: f64) -> f64 {
        self.mean + self.share * (prediction - self.mean)
    }

    fn undo(self, prediction: f64) -> f64 {
        self.mean + (prediction - self.mean) / self.share
    }
}

impl Agreement {
    fn is_finite(&self) -> bool {
        let Agreement { rows, weight, label, prediction, .. } = self;
        let squares = self.label_square + self.prediction_square + self.product;
        (rows + weight + label + prediction + squares).is_finite()
    }

    fn observe(&mut self, [prediction, label, weight]: [f64; 3]) {
        let rate = (2.0 / (self.rows + 2.0)).max(1.0 / CORRECTION_ROWS);
        self.rows += 1.0;
        let means = [
            (&mut self.weight, 1.0),
            (&mut self.label, label),
            (&mut self.prediction, prediction),
            (&mut self.label_square, label * label),
            (&mut self.prediction_square, prediction * prediction),
            (&mut self.product, label * prediction),
        ];
        means.into_iter().for_each(|(mean, value)| *mean += rate * (weight * value - *mean));
    }

    /// The slope of labels over predictions, less what chance explains of it, from 0 to 1.
    fn slope(self) -> Slope {
        let mean = |sum: f64| sum / self.weight;
        let (label, prediction) = (mean(self.label), mean(self.prediction));
        let label_variance = mean(self.label_square) - label * label;
        let variance = mean(self.prediction_square) - prediction * prediction;
        let covariance = mean(self.product) - label * prediction;
        let share = if variance > 0.0 && covariance > 0.0 {
            let correlation_square = covariance * covariance / (variance * label_variance);
            let doubt = 1.0 / (self.rows.min(CORRECTION_ROWS) * correlation_square);
            covariance / variance * (1.0 - doubt)
        } else {
            0.0
        };
        Slope { mean: label, share: share.clamp(LEAST_SLOPE, 1.0) }
    }
}

/// Mean and standard deviation of transformed labels; the deviation is never 0.
struct ScaleMoments {
    mean: f64,
    deviation: f64,
}

#[cfg(test)]
mod tests {
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
        LearnedRow { prediction, label, weight: 1.0 }
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
        assert!(
            (constant.prediction(0.0) - 7.0).abs() < 1e-3 && constant.learned(7.0).abs() < 1e-6
        );
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
    /// model's outputs know `signal` of a label beside chance.
    fn relative_error(scale: &mut LabelScale, signal: f32) -> f64 {
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
        }
        let RegressionMetrics { mse, base_mse, .. } = sums.metrics();
        mse.unwrap() / base_mse.unwrap()
    }

    #[test]
    fn predictions_differ_as_far_as_labels_confirm() {
        for (signal, most) in [(0.0, 1.005), (0.3, 0.93)] {
            let mut scale = settled(LabelTransform::Log, revenue);
            let found = relative_error(&mut scale, signal);
            let mut before = settled(LabelTransform::Log, revenue);
            before.set_addition(ScaleAddition::default());
            let without = relative_error(&mut before, signal);
            assert!(found < most && without > found + 0.01, "{signal}: {found}, {without} without");
            assert!(scale.prediction(1.0) < scale.prediction(1.5), "their order stays");
        }
        let known = |signal| relative_error(&mut settled(LabelTransform::Log, revenue), signal);
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
        let mean =
            (f64::from(scales["click"].log_odds()) + f64::from(scales["like"].log_odds())) / 2.0;
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
        (0..5000).for_each(|_| signed.correct([learned_row(before, 40.0)]));
        assert_eq!(signed.prediction(0.5), before);
    }
}
