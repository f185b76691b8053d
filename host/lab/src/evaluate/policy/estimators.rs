//! Off-policy estimators: what a policy would have earned, from the log of another one.
//!
//! A row of the log has a reward `r` and the propensity `p` with which the log's policy showed the
//! item; the policy in question shows it with probability `π`, so that the row's weight is `w = π /
//! p`. If rewards are modelled, `q` is what the model expects of the item, and `d = Σ_a π(a) q(a)`
//! what it expects of the policy. Over `n` rows:
//!
//! | estimator | value | source |
//! |---|---|---|
//! | logged | `Σ r / n` | what the log's own policy earned |
//! | direct method | `Σ d / n` | as biased as the model |
//! | IPS | `Σ w r / n` | Horvitz & Thompson, 1952 |
//! | SNIPS | `Σ w r / Σ w` | Swaminathan & Joachims, 2015 |
//! | doubly robust | `Σ (d + w (r - q)) / n` | Dudík, Langford & Li, 2011 |
//!
//! IPS is unbiased, SNIPS nearly so and steadier, and doubly robust is unbiased if `p` or `q` is.
//! Each is a ratio `Σ A / Σ B` of sums over requests, whose rows depend on each other. The normal
//! interval is that of the linearised ratio (delta method): with `R` requests, a variance of
//! `R / (R - 1) · Σ (A - V B)² / (Σ B)²` around the value `V`. The bootstrap draws requests with
//! replacement; of more than [`MAX_GROUPS`] requests it draws groups of them, so that no row has to
//! be kept.

use serde::Serialize;

use crate::bootstrap::resample;

/// The 97.5th percentile of the normal distribution.
const Z: f64 = 1.959_964;

/// The most groups of requests that the bootstrap draws from. So many groups make an interval as
/// exact as single requests would, to a hundredth of its width.
const MAX_GROUPS: u64 = 1 << 14;

/// What the estimators are told of a row of the log.
#[derive(Debug, Clone, Copy)]
pub struct LoggedAction {
    /// The rows of a request stand together.
    pub request: u64,
    /// What came of it.
    pub reward: f64,
    /// The probability with which the log's policy showed the item.
    pub propensity: f64,
    /// The probability with which the policy in question shows it.
    pub probability: f64,
    /// If rewards are modelled.
    pub modelled: Option<ModelledReward>,
}

/// What a model expects of a row's situation.
#[derive(Debug, Clone, Copy)]
pub struct ModelledReward {
    /// Of the item that was shown.
    pub shown: f64,
    /// Of the policy in question: the mean over its items, by their probabilities.
    pub policy: f64,
}

/// How a policy's value is estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Estimator {
    /// What the log's own policy earned.
    Logged,
    /// The model of rewards alone.
    DirectMethod,
    /// Rewards weighted by inverse propensities.
    Ips,
    /// The same over the sum of weights.
    Snips,
    /// The model, corrected by what it gets wrong of the rewards that are there.
    DoublyRobust,
}

impl Estimator {
    /// Those that need no model of rewards.
    const WITHOUT_MODEL: &[Estimator] = &[Estimator::Logged, Estimator::Ips, Estimator::Snips];

    /// All of them, in the order of the report.
    const ALL: &[Estimator] = &[
        Estimator::Logged,
        Estimator::DirectMethod,
        Estimator::Ips,
        Estimator::Snips,
        Estimator::DoublyRobust,
    ];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Estimator::Logged => "logged",
            Estimator::DirectMethod => "direct method",
            Estimator::Ips => "IPS",
            Estimator::Snips => "SNIPS",
            Estimator::DoublyRobust => "doubly robust",
        }
    }

    /// What a row adds to both sums of the ratio.
    fn terms(self, row: &LoggedAction, weight: f64) -> RatioTerms {
        let model = row.modelled.unwrap_or(ModelledReward { shown: 0.0, policy: 0.0 });
        let above = match self {
            Estimator::Logged => row.reward,
            Estimator::DirectMethod => model.policy,
            Estimator::Ips | Estimator::Snips => weight * row.reward,
            Estimator::DoublyRobust => model.policy + weight * (row.reward - model.shown),
        };
        RatioTerms { above, below: if self == Estimator::Snips { weight } else { 1.0 } }
    }
}

/// An estimate with its 95 % intervals.
#[derive(Debug, Clone, Serialize)]
pub struct PolicyEstimate {
    /// How it was made.
    pub estimator: Estimator,
    /// The reward of a row.
    pub value: f64,
    /// By the normal approximation.
    pub normal95: [f64; 2],
    /// By the bootstrap.
    pub bootstrap95: [f64; 2],
    /// How much it is above the log's own, in per cent of that.
    pub over_logged_pct: f64,
    /// The bootstrap's interval of that, over the same requests.
    pub over_logged95_pct: [f64; 2],
}

/// How far the log speaks of the policy.
#[derive(Debug, Clone, Serialize)]
pub struct WeightSummary {
    /// The mean before clipping, which is near 1 if the propensities are right and the log has all
    /// that the policy shows.
    pub mean: f64,
    /// The standard error of that, by requests: the rows of one are weighted alike.
    pub mean_error: f64,
    /// The largest before clipping.
    pub largest: f64,
    /// The share of rows whose weight was clipped, in per cent.
    pub clipped_pct: f64,
    /// As many rows with equal weights would say as much: `(Σ w)² / Σ w²` (Kish).
    pub effective_rows: f64,
    /// The same of rewards: `(Σ |w r|)² / Σ (w r)²`.
    pub effective_rewards: f64,
}

/// All that was estimated.
#[derive(Debug, Clone, Serialize)]
pub struct OffPolicyEstimates {
    /// The number of rows.
    pub rows: u64,
    /// The number of requests.
    pub requests: u64,
    /// How far the log speaks of the policy.
    pub weights: WeightSummary,
    /// An estimate for each estimator.
    pub estimates: Vec<PolicyEstimate>,
}

/// The two sums of a ratio.
#[derive(Debug, Clone, Copy, Default)]
struct RatioTerms {
    above: f64,
    below: f64,
}

impl RatioTerms {
    fn add(&mut self, times: f64, other: RatioTerms) {
        self.above += times * other.above;
        self.below += times * other.below;
    }

    fn ratio(self) -> f64 {
        self.above / self.below
    }
}

/// Sums of a ratio's terms over requests, and of their products.
#[derive(Debug, Clone, Copy, Default)]
struct RatioMoments {
    sum: RatioTerms,
    above_above: f64,
    above_below: f64,
    below_below: f64,
}

impl RatioMoments {
    fn add(&mut self, request: RatioTerms) {
        let RatioTerms { above, below } = request;
        self.sum.add(1.0, request);
        self.above_above += above * above;
        self.above_below += above * below;
        self.below_below += below * below;
    }

    /// The standard error of the ratio.
    fn error(&self, requests: f64) -> f64 {
        let value = self.sum.ratio();
        let squares =
            self.above_above - 2.0 * value * self.above_below + value * value * self.below_below;
        (requests / (requests - 1.0) * squares.max(0.0)).sqrt() / self.sum.below
    }

    fn normal95(&self, requests: f64) -> [f64; 2] {
        let (value, error) = (self.sum.ratio(), self.error(requests));
        [value - Z * error, value + Z * error]
    }
}

/// The sum of values, and that of their squares.
#[derive(Debug, Clone, Copy, Default)]
struct SquareSums {
    sum: f64,
    squares: f64,
}

impl SquareSums {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.squares += value * value;
    }

    fn effective(&self) -> f64 {
        if self.squares > 0.0 { self.sum * self.sum / self.squares } else { 0.0 }
    }
}

/// Takes the rows of a log one by one. Memory does not grow with them.
#[derive(Debug)]
pub struct OffPolicyEstimator {
    estimators: &'static [Estimator],
    clip: f64,
    /// The request whose rows come, and its terms by estimator.
    open: Option<u64>,
    terms: Vec<RatioTerms>,
    requests: u64,
    moments: Vec<RatioMoments>,
    /// The sums of requests, each in turn: for each group those of all estimators.
    groups: Vec<RatioTerms>,
    /// The weights of the open request over its rows, and of all.
    open_weights: RatioTerms,
    weights: RatioMoments,
    clipped_weights: SquareSums,
    weighted_rewards: SquareSums,
    largest: f64,
    clipped: u64,
}

impl OffPolicyEstimator {
    /// Weights above `clip` count as that. Without a model of rewards, there are only the
    /// estimators that need none.
    pub fn new(has_model: bool, clip: Option<f64>) -> OffPolicyEstimator {
        let estimators = if has_model { Estimator::ALL } else { Estimator::WITHOUT_MODEL };
        OffPolicyEstimator {
            estimators,
            clip: clip.unwrap_or(f64::INFINITY),
            open: None,
            terms: vec![RatioTerms::default(); estimators.len()],
            requests: 0,
            moments: vec![RatioMoments::default(); estimators.len()],
            groups: Vec::new(),
            open_weights: RatioTerms::default(),
            weights: RatioMoments::default(),
            clipped_weights: SquareSums::default(),
            weighted_rewards: SquareSums::default(),
            largest: 0.0,
            clipped: 0,
        }
    }

    /// Adds a row; those of a request come one after the other.
    pub fn push(&mut self, row: &LoggedAction) {
        if self.open != Some(row.request) {
            self.close();
            self.open = Some(row.request);
        }
        let full = row.probability / row.propensity;
        let weight = full.min(self.clip);
        self.open_weights.add(1.0, RatioTerms { above: full, below: 1.0 });
        self.clipped_weights.add(weight);
        self.weighted_rewards.add((weight * row.reward).abs());
        self.largest = self.largest.max(full);
        self.clipped += u64::from(full > self.clip);
        for (terms, estimator) in self.terms.iter_mut().zip(self.estimators) {
            terms.add(1.0, estimator.terms(row, weight));
        }
    }

    /// The estimates from all rows, with a bootstrap of `replicates` draws; none without a row.
    pub fn finish(mut self, replicates: usize) -> Option<OffPolicyEstimates> {
        self.close();
        let rows = self.weights.sum.below;
        if rows == 0.0 {
            return None;
        }
        let weights = WeightSummary {
            mean: self.weights.sum.ratio(),
            mean_error: self.weights.error(self.requests as f64),
            largest: self.largest,
            clipped_pct: 100.0 * self.clipped as f64 / rows,
            effective_rows: self.clipped_weights.effective(),
            effective_rewards: self.weighted_rewards.effective(),
        };
        let (rows, requests) = (rows as u64, self.requests);
        let estimates = self.estimates(replicates);
        Some(OffPolicyEstimates { rows, requests, weights, estimates })
    }

    /// Ends the request whose rows came last.
    fn close(&mut self) {
        if self.open.take().is_none() {
            return;
        }
        self.weights.add(std::mem::take(&mut self.open_weights));
        for (moments, terms) in self.moments.iter_mut().zip(&self.terms) {
            moments.add(*terms);
        }
        if self.requests < MAX_GROUPS {
            self.groups.extend(&self.terms);
        } else {
            let group = (self.requests % MAX_GROUPS) as usize * self.terms.len();
            let sums = self.groups[group..].iter_mut().zip(&self.terms);
            sums.for_each(|(sum, terms)| sum.add(1.0, *terms));
        }
        self.requests += 1;
        self.terms.fill(RatioTerms::default());
    }

    fn estimates(&self, replicates: usize) -> Vec<PolicyEstimate> {
        let count = self.estimators.len();
        // Of all estimators first the values, and then how far they are above the log's own, which
        // is the first.
        let measure = |sums: &[RatioTerms]| -> Vec<f64> {
            let values = || sums.iter().map(|sum| sum.ratio());
            let logged = sums[0].ratio();
            let over = values().map(|value| 100.0 * (value - logged) / logged.abs());
            values().chain(over).collect()
        };
        let all: Vec<RatioTerms> = self.moments.iter().map(|moments| moments.sum).collect();
        let values = measure(&all);
        let mut bounds = resample(self.groups.len() / count, replicates, |weights| {
            let mut sums = vec![RatioTerms::default(); count];
            for (terms, &times) in self.groups.chunks_exact(count).zip(weights) {
                if times > 0 {
                    let times = f64::from(times);
                    sums.iter_mut().zip(terms).for_each(|(sum, terms)| sum.add(times, *terms));
                }
            }
            measure(&sums)
        });
        bounds.resize(2 * count, [f64::NAN; 2]);
        let estimate = |(at, &estimator): (usize, &Estimator)| PolicyEstimate {
            estimator,
            value: values[at],
            normal95: self.moments[at].normal95(self.requests as f64),
            bootstrap95: bounds[at],
            over_logged_pct: values[count + at],
            over_logged95_pct: bounds[count + at],
        };
        self.estimators.iter().enumerate().map(estimate).collect()
    }
}

#[cfg(test)]
mod tests;
