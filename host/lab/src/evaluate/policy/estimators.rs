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
    /// The standard error of that.
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

    fn normal95(&self, requests: f64) -> [f64; 2] {
        let value = self.sum.ratio();
        let squares =
            self.above_above - 2.0 * value * self.above_below + value * value * self.below_below;
        let error = (requests / (requests - 1.0) * squares.max(0.0)).sqrt() / self.sum.below;
        [value - Z * error, value + Z * error]
    }
}

/// The number of values, their sum, and that of their squares.
#[derive(Debug, Clone, Copy, Default)]
struct SquareSums {
    count: f64,
    sum: f64,
    squares: f64,
}

impl SquareSums {
    fn add(&mut self, value: f64) {
        self.count += 1.0;
        self.sum += value;
        self.squares += value * value;
    }

    fn effective(&self) -> f64 {
        if self.squares > 0.0 { self.sum * self.sum / self.squares } else { 0.0 }
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    fn mean_error(&self) -> f64 {
        let variance = (self.squares - self.sum * self.mean()) / (self.count - 1.0);
        (variance.max(0.0) / self.count).sqrt()
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
    weights: SquareSums,
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
            weights: SquareSums::default(),
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
        self.weights.add(full);
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
        let rows = self.weights.count;
        if rows == 0.0 {
            return None;
        }
        let weights = WeightSummary {
            mean: self.weights.mean(),
            mean_error: self.weights.mean_error(),
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
mod tests {
    use super::*;
    use hypercast_core::hash::mix64;
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    fn action(request: u64, reward: f64, propensity: f64, probability: f64) -> LoggedAction {
        LoggedAction { request, reward, propensity, probability, modelled: None }
    }

    fn estimates(
        rows: &[LoggedAction],
        clip: Option<f64>,
        replicates: usize,
    ) -> OffPolicyEstimates {
        let has_model = rows[0].modelled.is_some();
        let mut estimator = OffPolicyEstimator::new(has_model, clip);
        rows.iter().for_each(|row| estimator.push(row));
        estimator.finish(replicates).unwrap()
    }

    fn assert_near(value: f64, expected: f64) {
        assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
    }

    /// Four rows, with weights 2, 0.5, 0 and 1.5.
    fn four() -> Vec<LoggedAction> {
        let modelled = |row: LoggedAction, shown, policy| LoggedAction {
            modelled: Some(ModelledReward { shown, policy }),
            ..row
        };
        vec![
            modelled(action(1, 1.0, 0.25, 0.5), 0.5, 0.5),
            modelled(action(2, 1.0, 0.5, 0.25), 0.75, 0.25),
            modelled(action(3, 1.0, 0.5, 0.0), 0.25, 0.5),
            modelled(action(4, 0.0, 0.5, 0.75), 0.5, 0.75),
        ]
    }

    #[test]
    fn estimates_are_those_of_the_formulas() {
        let found = estimates(&four(), None, 0);
        let values: Vec<f64> = found.estimates.iter().map(|of| of.value).collect();
        let names: Vec<&str> = found.estimates.iter().map(|of| of.estimator.name()).collect();
        assert_eq!(names, ["logged", "direct method", "IPS", "SNIPS", "doubly robust"]);
        assert_near(values[0], 0.75);
        // (0.5 + 0.25 + 0.5 + 0.75) / 4
        assert_near(values[1], 0.5);
        // (2 + 0.5) / 4, and over the weights' sum of 4
        assert_near(values[2], 0.625);
        assert_near(values[3], 0.625);
        // (0.5 + 2 · 0.5) + (0.25 + 0.5 · 0.25) + 0.5 + (0.75 - 1.5 · 0.5) = 2.375
        assert_near(values[4], 0.59375);
        assert_near(found.estimates[2].over_logged_pct, -100.0 / 6.0);
        // 4² / (4 + 0.25 + 2.25); 2.5² / (4 + 0.25)
        assert_near(found.weights.effective_rows, 16.0 / 6.5);
        assert_near(found.weights.effective_rewards, 6.25 / 4.25);
        assert_near(found.weights.mean, 1.0);
        assert_near(found.weights.largest, 2.0);
    }

    #[test]
    fn weights_are_clipped_and_that_is_told() {
        let found = estimates(&four(), Some(1.0), 0);
        // Weights are 1, 0.5, 0 and 1.
        assert_near(found.estimates[2].value, 1.5 / 4.0);
        assert_near(found.estimates[3].value, 1.5 / 2.5);
        assert_near(found.weights.clipped_pct, 50.0);
        assert_near(found.weights.largest, 2.0);
        assert_near(found.weights.mean, 1.0);
        assert_near(found.weights.effective_rows, 6.25 / 2.25);
    }

    #[test]
    fn the_log_s_own_policy_earns_what_it_did() {
        let rows: Vec<_> = (0..50).map(|at| action(at, (at % 3) as f64, 0.2, 0.2)).collect();
        for of in &estimates(&rows, None, 100).estimates {
            assert_near(of.value, 0.98);
            assert_near(of.over_logged_pct, 0.0);
            assert_near(of.over_logged95_pct[1], 0.0);
        }
    }

    #[test]
    fn normal_intervals_are_those_of_the_formulas() {
        let interval =
            |rows: &[LoggedAction], at: usize| estimates(rows, None, 0).estimates[at].normal95;
        // w r = 2, 0.5, 0, 0: a mean of 0.625 and a sample variance of 2.6875 / 3.
        let error = (2.6875 / 3.0 / 4.0_f64).sqrt();
        let [low, high] = interval(&four(), 2);
        assert_near(high - 0.625, Z * error);
        assert_near(0.625 - low, Z * error);
        // w (r - V): 0.75, 0.1875, 0, -0.9375, over a sum of weights of 4.
        let squares = 0.5625 + 0.03515625 + 0.87890625_f64;
        assert_near(interval(&four(), 3)[1] - 0.625, Z * (4.0 / 3.0 * squares).sqrt() / 4.0);
        // Two rows of each request say the same, so they count as one: the interval stays.
        let doubled: Vec<_> = four().into_iter().flat_map(|row| [row, row]).collect();
        for at in 0..5 {
            let [one, two] = [interval(&four(), at), interval(&doubled, at)];
            assert_near(one[0], two[0]);
            assert_near(one[1], two[1]);
        }
    }

    #[test]
    fn groups_of_requests_have_the_interval_of_single_ones() {
        // Rewards of 0 and 1 by halves: the standard error of the mean is 0.5 / √n.
        for requests in [MAX_GROUPS / 2, 3 * MAX_GROUPS] {
            let rewarded = |at: u64| mix64(at).is_multiple_of(2);
            let rows = (0..requests).map(|at| action(at, f64::from(rewarded(at)), 0.5, 0.5));
            let mut estimator = OffPolicyEstimator::new(false, None);
            rows.for_each(|row| estimator.push(&row));
            assert!(estimator.groups.len() as u64 <= MAX_GROUPS * 3, "memory is bounded");
            let found = estimator.finish(200).unwrap();
            let width = Z * (requests as f64).sqrt().recip();
            for [low, high] in [found.estimates[0].normal95, found.estimates[0].bootstrap95] {
                assert!(((high - low) / width - 1.0).abs() < 0.15, "{low} {high} {width}");
            }
        }
    }

    /// Requests of one to three rows with a truth that is known: four situations, five items, a
    /// reward that also depends on the request, so that its rows are alike, and a model that is
    /// wrong.
    struct BanditWorld {
        rng: SmallRng,
    }

    const ITEMS: usize = 5;
    const SITUATIONS: usize = 4;

    impl BanditWorld {
        /// What is better has more of it.
        fn quality(situation: usize, item: usize) -> f64 {
            ((situation * 3 + item * 2) % ITEMS) as f64
        }

        /// By situation and item, each situation's sum 1.
        fn probability(situation: usize, item: usize, sharpness: f64) -> f64 {
            let score = |item| (sharpness * Self::quality(situation, item)).exp();
            score(item) / (0..ITEMS).map(score).sum::<f64>()
        }

        fn logging(situation: usize, item: usize) -> f64 {
            Self::probability(situation, item, -0.2)
        }

        fn target(situation: usize, item: usize) -> f64 {
            Self::probability(situation, item, 0.3)
        }

        fn reward(situation: usize, item: usize) -> f64 {
            0.2 + 0.08 * Self::quality(situation, item)
        }

        fn modelled(situation: usize, item: usize) -> f64 {
            0.5 * Self::reward(situation, item) + 0.1 * (item % 2) as f64
        }

        /// The mean of `of` under the target policy.
        fn under_target(situation: usize, of: fn(usize, usize) -> f64) -> f64 {
            (0..ITEMS).map(|item| Self::target(situation, item) * of(situation, item)).sum()
        }

        fn truth() -> f64 {
            let values = (0..SITUATIONS).map(|at| Self::under_target(at, Self::reward));
            values.sum::<f64>() / SITUATIONS as f64
        }

        fn run(&mut self, requests: u64, replicates: usize) -> OffPolicyEstimates {
            let mut estimator = OffPolicyEstimator::new(true, None);
            for request in 0..requests {
                let situation = self.rng.random_range(0..SITUATIONS);
                let mood = if self.rng.random() { 0.15 } else { -0.15 };
                for _ in 0..self.rng.random_range(1..4) {
                    let mut chance: f64 = self.rng.random();
                    let item = (0..ITEMS - 1).find(|&item| {
                        chance -= Self::logging(situation, item);
                        chance < 0.0
                    });
                    let item = item.unwrap_or(ITEMS - 1);
                    let happens = self.rng.random_bool(Self::reward(situation, item) + mood);
                    estimator.push(&LoggedAction {
                        request,
                        reward: f64::from(u8::from(happens)),
                        propensity: Self::logging(situation, item),
                        probability: Self::target(situation, item),
                        modelled: Some(ModelledReward {
                            shown: Self::modelled(situation, item),
                            policy: Self::under_target(situation, Self::modelled),
                        }),
                    });
                }
            }
            estimator.finish(replicates).unwrap()
        }
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        const RUNS: usize = 500;
        let mut world = BanditWorld { rng: SmallRng::seed_from_u64(20) };
        let truth = BanditWorld::truth();
        let holds = |interval: [f64; 2]| interval[0] <= truth && truth <= interval[1];
        let (mut normal, mut bootstrap) = ([0; 5], [0; 5]);
        for _ in 0..RUNS {
            for (at, of) in world.run(400, 200).estimates.iter().enumerate() {
                normal[at] += usize::from(holds(of.normal95));
                bootstrap[at] += usize::from(holds(of.bootstrap95));
            }
        }
        for at in 2..5 {
            for held in [normal[at], bootstrap[at]] {
                let is_right = (93 * RUNS / 100..=97 * RUNS / 100).contains(&held);
                assert!(is_right, "{}: {normal:?} and {bootstrap:?}", Estimator::ALL[at].name());
            }
        }
        // The model is wrong, and the log's policy is another one.
        assert!(normal[0] < RUNS / 2 && normal[1] < RUNS / 2, "{normal:?}");
    }
}
