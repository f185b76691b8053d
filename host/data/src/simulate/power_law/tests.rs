//! The statistics of the power-law world, and its optimum.

use hypercast_fm::metrics::binary_entropy;

use super::latent::{DIMENSIONS, lag_weight};
use super::*;
use crate::dataset::Dataset;

fn world(items: usize, seed: u64) -> PowerLawWorld {
    let into = Default::default();
    PowerLawWorld::new(&SimulateOptions { into, users: 60, items, requests: 1, surfaces: 2, seed })
}

/// The slope of a line through points, by least squares.
fn slope(points: &[[f64; 2]]) -> f64 {
    let n = points.len() as f64;
    let mean = |at: usize| points.iter().map(|point| point[at]).sum::<f64>() / n;
    let [x, y] = [mean(0), mean(1)];
    let covariance: f64 = points.iter().map(|point| (point[0] - x) * (point[1] - y)).sum();
    covariance / points.iter().map(|point| (point[0] - x).powi(2)).sum::<f64>()
}

#[test]
fn a_seed_decides_the_world_and_what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let simulated = |name: &str, seed| {
        let into = dir.path().join(name);
        let size = SimulateOptions { into, users: 9, items: 500, requests: 40, surfaces: 2, seed };
        let report = simulate_power_law(&size).unwrap();
        let data = Dataset::open(&size.into).unwrap();
        assert_eq!(
            (data.items.len(), data.users.len(), report.impressions),
            (500, 9, 40 * SLATE as u64)
        );
        let rows = data.impressions().unwrap().map(|row| row.unwrap());
        (format!("{:?}", rows.collect::<Vec<_>>()), report)
    };
    assert_eq!(simulated("a", 1), simulated("b", 1));
    assert_ne!(simulated("c", 1).0, simulated("d", 2).0);
}

/// Dimensions, lags and popularity each fall by the power that they should.
#[test]
fn the_spectrum_the_lags_and_the_popularity_are_power_laws() {
    let spectrum = spectrum();
    let point = |at: usize| [1.0 + at as f64, f64::from(spectrum[at])].map(f64::ln);
    let of_spectrum = 2.0 * slope(&(0..DIMENSIONS).map(point).collect::<Vec<_>>());
    assert!((of_spectrum + 1.5).abs() < 1e-3, "{of_spectrum}");
    let total: f32 = spectrum.iter().map(|part| part * part).sum();
    assert!((total - 1.0).abs() < 1e-5, "{total}");

    let point = |lag: i32| [f64::from(lag), f64::from(lag_weight(lag))].map(f64::ln);
    let of_lags = slope(&(0..8).map(|at| point(1 << at)).collect::<Vec<_>>());
    assert!((of_lags + 1.0).abs() < 0.15, "{of_lags}");

    let mut world = world(100_000, 3);
    let mut shown = vec![0u32; 100_000];
    for _ in 0..40_000 {
        world.slate().into_iter().for_each(|item| shown[item as usize] += 1);
    }
    // From rank to twice the rank there are as many impressions, far above the shift.
    let between = |from: usize| f64::from(shown[from..2 * from].iter().sum::<u32>());
    let ranks = [500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000];
    let point = |&rank: &usize| [(rank as f64).ln(), (between(rank) / rank as f64).ln()];
    let of_popularity = slope(&ranks.iter().map(point).collect::<Vec<_>>());
    assert!((of_popularity + 1.0).abs() < 0.03, "{of_popularity}");
}

/// The dimensions of the items that are there have mean 0, variance 1, and are not correlated.
#[test]
fn coordinates_are_independent_with_variance_one() {
    let world = world(100_000, 5);
    let (mut sums, mut squares, mut products) = ([0.0f64; 3], [0.0f64; 3], 0.0f64);
    let items = 6_000;
    for item in 0..items {
        let vector = world.item_vector(item * 16);
        for (at, dimension) in [0, 20, 63].into_iter().enumerate() {
            sums[at] += f64::from(vector[dimension]);
            squares[at] += f64::from(vector[dimension]).powi(2);
        }
        products += f64::from(vector[0] * vector[63]);
    }
    // The 16 topics have two thirds of the variance, so few draws decide it.
    for at in 0..3 {
        let mean = sums[at] / items as f64;
        let variance = squares[at] / items as f64 - mean * mean;
        assert!(mean.abs() < 0.5 && (0.5..1.6).contains(&variance), "{mean} {variance}");
    }
    assert!((products / items as f64).abs() < 0.35, "{products}");
}

/// The optimum is the entropy of the truth: labels agree with it, the world does not drift away,
/// and there is much to learn.
#[test]
fn the_truth_is_stable_and_labels_agree_with_it() {
    let mut world = world(20_000, 1);
    let (mut rates, mut optima) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let (mut n, mut entropy, mut loss, mut clicks) = (0.0, 0.0, 0.0, 0.0);
        for number in 0..2_500 {
            for row in world.request(number) {
                let p = f64::from(row.truth[0]);
                let clicked = row.outcome.actions & 1 == 1;
                assert!(row.truth[1] < row.truth[0] && row.outcome.actions != 0b10);
                n += 1.0;
                entropy += binary_entropy(p);
                loss -= if clicked { p.ln() } else { (1.0 - p).ln() };
                clicks += f64::from(u8::from(clicked));
            }
        }
        let base = n * binary_entropy(clicks / n);
        assert!((loss - entropy).abs() / base < 0.015, "{loss} against {entropy}");
        rates.push(clicks / n);
        optima.push(entropy / base);
    }
    eprintln!("rates {rates:.3?}, optima {optima:.3?}");
    assert!(rates.iter().all(|rate| (0.2..0.45).contains(rate)), "{rates:?}");
    assert!(optima.iter().all(|best| (0.6..0.85).contains(best)), "{optima:?}");
    // Interests build up in the beginning; then the world stays as it is.
    assert!((optima[3] - optima[2]).abs() < 0.04, "{optima:?}");
}

/// What decides a request is what was seen before it: no outcome is still unknown then.
#[test]
fn outcomes_are_known_before_the_users_next_request_and_gaps_have_a_heavy_tail() {
    let mut world = world(20_000, 2);
    let (mut last, mut gaps) = (std::collections::HashMap::new(), Vec::new());
    let mut before_ms = 0;
    for number in 0..6_000 {
        let row = world.request(number)[0].clone();
        assert!(row.time_ms >= before_ms, "requests are in the order of time");
        before_ms = row.time_ms;
        if let Some(outcome_ms) = last.insert(row.user, row.outcome_ms) {
            assert!(outcome_ms < row.time_ms);
            gaps.push(row.time_ms - (outcome_ms - OUTCOME_MS));
        }
    }
    let beyond = |ms: i64| gaps.iter().filter(|&&gap| gap > ms).count() as f64;
    // A tail of index 0.6: four times the gap, 0.44 times as many.
    let ratio = beyond(8 * 180_000) / beyond(2 * 180_000);
    assert!((ratio - 0.435).abs() < 0.05, "{ratio}");
}

/// Rows as a model reads them that knows a part of what decides a click, and the truth.
#[derive(Default)]
struct PartlyKnown {
    /// The part of the logit that it knows.
    logits: Vec<f64>,
    truths: Vec<f64>,
}

impl PartlyKnown {
    fn add(&mut self, vector: &Coordinates, interest: &Coordinates, truth: f32) {
        let affinity: f32 = vector.iter().zip(interest).map(|(x, wanted)| x * wanted).sum();
        self.logits.push(affinity.into());
        self.truths.push(truth.into());
    }

    /// NE above the optimum, with the scale and shift of the logits that fit best.
    fn above_optimum(&self) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let rows = || self.logits.iter().zip(&self.truths);
        let (mut scale, mut shift) = (1.0, -1.0);
        for _ in 0..12 {
            // A step of Newton's method.
            let [mut g0, mut g1, mut h00, mut h01, mut h11] = [0.0; 5];
            for (x, truth) in rows() {
                let p = sigmoid(scale * x + shift);
                let (off, weight) = (p - truth, p * (1.0 - p));
                (g0, g1) = (g0 + off, g1 + off * x);
                (h00, h01, h11) = (h00 + weight, h01 + weight * x, h11 + weight * x * x);
            }
            // Without any logit there is no scale to fit.
            h11 += 1e-9;
            let determinant = h00 * h11 - h01 * h01;
            shift -= (h11 * g0 - h01 * g1) / determinant;
            scale -= (h00 * g1 - h01 * g0) / determinant;
        }
        let nats = |p: f64, truth: f64| -truth * p.ln() - (1.0 - truth) * (1.0 - p).ln();
        let own: f64 = rows().map(|(x, &truth)| nats(sigmoid(scale * x + shift), truth)).sum();
        let best: f64 = self.truths.iter().map(|&truth| binary_entropy(truth)).sum();
        let n = self.truths.len() as f64;
        let base = n * binary_entropy(self.truths.iter().sum::<f64>() / n);
        (own - best) / base
    }
}

/// How far above the optimum a model stays that knows all but some of what decides a click. The
/// README of `examples/scaling` has these numbers.
#[test]
fn what_a_small_model_misses_has_a_long_tail() {
    const DIMENSIONS_KNOWN: [usize; 5] = [2, 4, 8, 16, 32];
    const HISTORIES: [usize; 6] = [4, 8, 16, 32, 64, 128];
    let mut world = world(100_000, 1);
    let events_of = |user: usize| (user, Vec::<(f32, Coordinates)>::new());
    let mut events: std::collections::HashMap<_, _> = (0..60).map(events_of).collect();
    let [mut dimensions, mut histories] = [DIMENSIONS_KNOWN.len(), HISTORIES.len()]
        .map(|models| (0..models).map(|_| PartlyKnown::default()).collect::<Vec<_>>());
    let [mut no_cohorts, mut no_returning, mut nothing_shared] =
        [0; 3].map(|_| PartlyKnown::default());
    for number in 0..6_000 {
        let Some(&Reverse((now_ms, user))) = world.next.peek() else { break };
        let interest = world.interest(user, now_ms);
        let without = |weight: f32, part: &Coordinates| -> Coordinates {
            std::array::from_fn(|at| interest[at] - weight * world.spectrum[at] * part[at])
        };
        let past: &Vec<_> = &events[&user];
        let returning = world.users[user].interests.sum(world.lag_norm);
        let missed = HISTORIES.map(|length| {
            let mut read: Coordinates = [0.0; DIMENSIONS];
            for (lag, (sign, vector)) in past.iter().rev().take(length).enumerate() {
                let weight = sign * lag_weight(lag as i32) / world.lag_norm;
                read.iter_mut().zip(vector).for_each(|(sum, x)| *sum += weight * x);
            }
            without(RETURNING, &std::array::from_fn(|at| returning[at] - read[at]))
        });
        let cohort = coordinates(world.seed, VectorOf::Cohort, world.cohort(user));
        let parts = [
            without(OF_COHORT, &cohort),
            without(RETURNING, &returning),
            without(OF_ALL, &coordinates(world.seed, VectorOf::Everybody, 0)),
        ];
        let has_long_past = past.len() >= 600;
        for row in world.request(number) {
            // What the surface adds to the logit is known to every model.
            let vector = world.item_vector(row.item - 1);
            let clicked = row.outcome.actions & 1 == 1;
            events.get_mut(&user).unwrap().push((if clicked { 1.0 } else { -AWAY }, vector));
            if !has_long_past || row.surface != 0 {
                continue;
            }
            let truth = row.truth[0];
            for (known, model) in DIMENSIONS_KNOWN.iter().zip(&mut dimensions) {
                let held = std::array::from_fn(|at| if at < *known { interest[at] } else { 0.0 });
                model.add(&vector, &held, truth);
            }
            for (interest, model) in missed.iter().zip(&mut histories) {
                model.add(&vector, interest, truth);
            }
            for (interest, model) in
                parts.iter().zip([&mut no_cohorts, &mut no_returning, &mut nothing_shared])
            {
                model.add(&vector, interest, truth);
            }
        }
    }
    let gaps = |models: &[PartlyKnown]| -> Vec<f64> {
        models.iter().map(PartlyKnown::above_optimum).collect()
    };
    let (dimensions, histories) = (gaps(&dimensions), gaps(&histories));
    let parts = gaps(&[no_cohorts, no_returning, nothing_shared]);
    eprintln!("dimensions {dimensions:.4?}, histories {histories:.4?}, parts {parts:.4?}");
    let of_dimensions = [0.124, 0.089, 0.058, 0.028, 0.013];
    let of_histories = [0.0084, 0.0054, 0.0036, 0.0022, 0.0013, 0.0007];
    let of_parts = [0.079, 0.041, 0.025];
    for (own, said) in
        [(&dimensions, &of_dimensions[..]), (&histories, &of_histories), (&parts, &of_parts)]
    {
        for (own, said) in own.iter().zip(said) {
            assert!((own / said - 1.0).abs() < 0.1, "{own} against {said}");
        }
    }
}
