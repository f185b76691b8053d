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
