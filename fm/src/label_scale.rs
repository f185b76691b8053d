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
//! doubt (James and Stein, 1961). From its second step on, a model that knows nothing yet predicts
//! the mean. Rows that were learned before agree with their predictions more than new ones will, so
//! that they do not count.

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
    /// None in a model of before there was one, until that learns again.
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

/// How labels vary with predictions whose mean is corrected: weighted means over those of
/// [`MeanCorrection`]'s rows that were new when they were predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Agreement {
    /// It says nothing before so many rows.
    least_rows: f64,
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
    /// The label that came for it.
    pub label: f32,
    /// For how many rows it stands.
    pub weight: f32,
    /// Whether no earlier pass learned from the row.
    pub is_new: bool,
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

/// The largest log odds of a probability: nearer to 0 or 1 32 bits do not tell it.
const MAX_LOG_ODDS: f64 = 16.0;

/// A transformed value beyond it would not fit an f32 when it is taken back and corrected.
const MAX_EXPONENT: f64 = 80.0;

/// The log odds of a probability; 0 of what is none.
pub fn log_odds_of(probability: f32) -> f32 {
    let probability = f64::from(probability);
    let log_odds = (probability / (1.0 - probability)).ln();
    if log_odds.is_nan() { 0.0 } else { log_odds.clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS) as f32 }
}

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

    /// The output whose prediction this is, apart from corrections, which the models that share a
    /// scale do not share. What is no number gives 0: the base rate, or the mean.
    pub fn output(&self, prediction: f32) -> f32 {
        match self {
            LabelScale::Rate(_) if prediction.is_nan() => 0.0,
            LabelScale::Rate(_) => log_odds_of(prediction) - self.log_odds(),
            LabelScale::Value(scale) => scale.output(prediction),
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
        let mean_corrected = made_by.slope().map_or(prediction, |slope| slope.undo(prediction));
        // What the moments do not count in full counts as far as there.
        let [least, most] = [-OBSERVED_LIMIT, OBSERVED_LIMIT].map(|limit| self.taken_back(limit));
        let [label, mean_corrected] =
            [label, mean_corrected].map(|value| value.max(least).min(most));
        let agreement = self.agreement.get_or_insert_with(Agreement::of_earlier_release);
        let mean_corrected = agreement.limited(mean_corrected);
        let uncorrected = mean_corrected / made_by.factor();
        if row.is_new {
            agreement.observe([mean_corrected, label, weight]);
        }
        let MeanCorrection { rows, label: labels, prediction: predictions } = &mut self.correction;
        let rate = (2.0 / (*rows + 2.0)).max(1.0 / CORRECTION_ROWS);
        *rows += 1.0;
        *labels += rate * (weight * label - *labels);
        *predictions += rate * (weight * uncorrected - *predictions);
    }

    fn learned(&self, label: f32) -> f32 {
        let value = self.deviations(label);
        if value.abs() > FAULTY_LABEL && self.moments.rows() >= FAULT_LABELS {
            return f32::INFINITY;
        }
        (LEARNED_DEVIATION * value.clamp(-LABEL_LIMIT, LABEL_LIMIT)) as f32
    }

    fn prediction(&self, output: f32) -> f32 {
        let mean_corrected = self.factor() * self.taken_back(f64::from(output) / LEARNED_DEVIATION);
        self.slope().map_or(mean_corrected, |slope| slope.apply(mean_corrected)) as f32
    }

    fn output(&self, prediction: f32) -> f32 {
        let value = self.deviations(prediction);
        let value = if value.is_nan() { 0.0 } else { value };
        (LEARNED_DEVIATION * value.clamp(-FAULTY_LABEL, FAULTY_LABEL)) as f32
    }

    /// How many deviations a label is from the mean.
    fn deviations(&self, label: f32) -> f64 {
        let ScaleMoments { mean, deviation } = self.moments();
        (self.transform.apply(label.into()) - mean) / deviation
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

    /// How predictions are drawn towards the mean; none before the first rows, and in a model of
    /// before there was one.
    fn slope(&self) -> Option<Slope> {
        self.agreement.filter(Agreement::is_known).map(Agreement::slope)
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
    /// That of a scale of before there was one. A model that has predicted without it for long is
    /// not to predict the mean because of its first few rows.
    fn of_earlier_release() -> Self {
        Agreement { least_rows: CORRECTION_DOUBT, ..Agreement::default() }
    }

    fn is_known(&self) -> bool {
        self.weight > 0.0 && self.rows >= self.least_rows
    }

    fn is_finite(&self) -> bool {
        let Agreement { least_rows, rows, weight, label, prediction, .. } = self;
        let squares = self.label_square + self.prediction_square + self.product;
        (least_rows + rows + weight + label + prediction + squares).is_finite()
    }

    /// A prediction as far as it counts: the exponential of a wild one would say more than all
    /// other rows. Labels have no say before two differ.
    fn limited(&self, prediction: f64) -> f64 {
        let (mean, variance) = (self.label / self.weight, self.label_variance());
        if self.weight > 0.0 && variance > 0.0 {
            let most = OBSERVED_LIMIT * variance.sqrt();
            prediction.max(mean - most).min(mean + most)
        } else {
            prediction
        }
    }

    fn label_variance(&self) -> f64 {
        self.label_square / self.weight - (self.label / self.weight).powi(2)
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
        let variance = mean(self.prediction_square) - prediction * prediction;
        let covariance = mean(self.product) - label * prediction;
        let share = if variance > 0.0 && covariance > 0.0 {
            let correlation_square = covariance * covariance / (variance * self.label_variance());
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
mod tests;
