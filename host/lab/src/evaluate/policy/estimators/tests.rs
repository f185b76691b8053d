//! The formulas against numbers computed by hand, and intervals against a truth that is known.

use hypercast_core::hash::mix64;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

fn action(request: u64, reward: f64, propensity: f64, probability: f64) -> LoggedAction {
    LoggedAction { request, reward, propensity, probability, modelled: None }
}

fn estimates(rows: &[LoggedAction], clip: Option<f64>, replicates: usize) -> OffPolicyEstimates {
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
fn the_error_of_the_mean_weight_is_that_of_requests() {
    // Of each ten rows a request, with weights of 0 or 2 all alike: as many requests tell as much.
    let of = |rows: u64| -> WeightSummary {
        let all: Vec<LoggedAction> =
            (0..100 * rows).map(|at| action(at / rows, 1.0, 0.5, (at / rows % 2) as f64)).collect();
        estimates(&all, None, 0).weights
    };
    let (one, ten) = (of(1), of(10));
    assert_near(one.mean, 1.0);
    assert_near(one.mean_error, (1.0_f64 / 99.0).sqrt());
    assert_near(ten.mean_error, one.mean_error);
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
