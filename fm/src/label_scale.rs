//! The scale on which a model learns a task, and the way back to probabilities and to the unit of a
//! label.
//!
//! Of a binary task it learns how far the log odds are from those of the base rate, which the first
//! labels tell. So the first predictions are not that half of all rows happen, which costs a rare
//! action more than all that is learned later.
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

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::standardise::{OBSERVED_LIMIT, Standardiser};

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
}

/// The ratio of the means of labels and of uncorrected predictions, for the newest half of all
/// rows, at most of some [`CORRECTION_ROWS`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct MeanCorrection {
    rows: f64,
    label: f64,
    prediction: f64,
}

/// Mean and deviation stay as they are after so many labels. The first few thousand rows of a
/// training have taught a model little that another scale would turn.
pub const SETTLED_LABELS: f64 = 10_000.0;

/// Yes and no each count as seen so often before the first label.
const FEW_LABELS: f64 = 0.5;

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

    /// The scale of a regression that has seen no label: until it has, labels are only transformed.
    pub fn of_value(transform: LabelTransform) -> Self {
        LabelScale::Value(ValueScale::new(transform))
    }

    /// Whether all its numbers are finite.
    pub fn is_finite(&self) -> bool {
        match self {
            LabelScale::Rate(BaseRate { labels, positives }) => (labels + positives).is_finite(),
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

    /// Compares a prediction, which was made before its label was learned, with that label.
    pub fn correct(&mut self, prediction: f32, label: f32, weight: f32) {
        if let LabelScale::Value(scale) = self {
            scale.correct(prediction, label, weight);
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
            return 0.0;
        }
        let negatives = self.labels - self.positives;
        ((self.positives + FEW_LABELS) / (negatives + FEW_LABELS)).ln() as f32
    }
}

impl ValueScale {
    fn new(transform: LabelTransform) -> Self {
        let (moments, correction) = (Standardiser::new(1), MeanCorrection::default());
        Self { transform, moments, signed: false, correction }
    }

    fn is_finite(&self) -> bool {
        let MeanCorrection { rows, label, prediction } = self.correction;
        let correction = [rows, label, prediction].iter().all(|number| number.is_finite());
        self.moments.width() == 1 && self.moments.is_finite() && correction
    }

    fn observe(&mut self, label: f32) {
        if label.is_finite() && !self.is_settled() {
            self.moments.observe(&[self.transform.apply(label.into()) as f32]);
            self.signed |= label < 0.0;
        }
    }

    fn correct(&mut self, prediction: f32, label: f32, weight: f32) {
        let numbers = [prediction, label, weight].map(f64::from);
        if numbers.iter().any(|number| !number.is_finite()) {
            return;
        }
        let [prediction, label, weight] = numbers;
        // A label that the moments do not count in full counts as far as there.
        let label = label.min(self.taken_back(OBSERVED_LIMIT));
        let uncorrected = prediction / self.factor();
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
        (self.factor() * self.taken_back(f64::from(output) / LEARNED_DEVIATION)) as f32
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

/// Mean and standard deviation of transformed labels; the deviation is never 0.
struct ScaleMoments {
    mean: f64,
    deviation: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash_rng::uniform;

    /// Revenue: 95 % zeros, and amounts with a long tail.
    fn revenue(row: u64) -> f32 {
        if uniform(&[row, 0]) < 0.95 {
            return 0.0;
        }
        let normal: f64 = (1..13).map(|at| uniform(&[row, at])).sum::<f64>() - 6.0;
        (3.0 + 1.2 * normal).exp() as f32
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

    #[test]
    fn the_sum_of_predictions_becomes_that_of_the_labels() {
        let mut scale = settled(LabelTransform::Log, revenue);
        let seen: f64 = (0..100_000).map(|row| f64::from(revenue(row))).sum();
        assert!(f64::from(scale.prediction(0.0)) * 1e5 < 0.2 * seen, "the mean of logarithms");
        for row in 0..100_000 {
            let prediction = scale.prediction(0.0);
            scale.correct(prediction, revenue(row), 1.0);
        }
        let calibration = f64::from(scale.prediction(0.0)) * 1e5 / seen;
        assert!((calibration - 1.0).abs() < 0.15, "{calibration}");
        // Where labels have both signs, their mean says nothing of a factor.
        let mut signed = settled(LabelTransform::Log, |row| revenue(row) - revenue(row + 1));
        let before = signed.prediction(0.5);
        (0..5000).for_each(|_| signed.correct(before, 40.0, 1.0));
        assert_eq!(signed.prediction(0.5), before);
    }
}
