//! The fit of NE = E∞ + a·(C/C₀)^-b to the envelope of points, C being training FLOPs.
//!
//! The lowest of many noisy points is too low, and a law would be seen where there is none. So a
//! seed's points are chosen by the other seeds, and those of a half of the users by the other half.

use std::cell::RefCell;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde::Serialize;

use crate::{
    bootstrap::resample,
    tally::{ScoreTotals, UserTotals},
};

/// Exponents that are tried, at most.
const STEEPEST: f64 = 2.0;
const EXPONENT_STEP: f64 = 0.05;
/// A curve of two parameters, or three, has this many points at least.
const LEAST_POINTS: usize = 3;
/// Fixed, so that every run draws the same seeds.
const SEED: u64 = 0x5EED_5CA1;

/// NE = floor + scale·(C / reference)^-exponent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PowerFit {
    /// E∞, which no model falls below.
    pub floor: f64,
    /// How far above it NE is at the reference.
    pub scale: f64,
    /// Below 0 if NE rises.
    pub exponent: f64,
    /// C₀, the geometric mean of the points' training FLOPs.
    pub reference_flops: f64,
}

/// A model at some point of its training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostAndNe {
    /// Training FLOPs so far.
    pub flops: f64,
    /// Normalised entropy, or what of it is above the optimum.
    pub ne: f64,
}

impl PowerFit {
    /// The least squares of NE over points; E∞ is fitted if it is not known. None of fewer than
    /// three points, or of points of one cost.
    pub fn of(points: &[CostAndNe], floor: Option<f64>) -> Option<Self> {
        if points.len() < LEAST_POINTS || points.iter().any(|point| !point.ne.is_finite()) {
            return None;
        }
        let mean = points.iter().map(|point| point.flops.ln()).sum::<f64>() / points.len() as f64;
        let spread = points.iter().map(|point| (point.flops.ln() - mean).abs()).sum::<f64>();
        if spread < 1e-9 {
            return None;
        }
        let curves = Curves { points, floor, reference: mean };
        // With E∞ fitted, a curve that rises is one whose scale is below 0.
        let steps = (STEEPEST / EXPONENT_STEP) as i32;
        let first = if floor.is_some() { -steps } else { 1 };
        let tried = (first..=steps).map(|step| f64::from(step) * EXPONENT_STEP);
        let best = tried.min_by(|a, b| curves.error(*a).total_cmp(&curves.error(*b)))?;
        let least = if floor.is_some() { f64::MIN } else { 1e-3 };
        let bounds = [(best - EXPONENT_STEP).max(least), best + EXPONENT_STEP];
        let exponent = least_between(bounds, |exponent| curves.error(exponent));
        let (floor, scale) = curves.coefficients(exponent);
        let rises = scale < 0.0 && curves.floor.is_none();
        let exponent = if rises { -exponent } else { exponent };
        Some(Self { floor, scale, exponent, reference_flops: mean.exp() })
    }

    /// NE after so many training FLOPs.
    pub fn at(&self, flops: f64) -> f64 {
        let exponent = if self.scale < 0.0 { self.exponent.abs() } else { self.exponent };
        self.floor + self.scale * (flops / self.reference_flops).powf(-exponent)
    }
}

/// All curves through some points that differ in the exponent.
struct Curves<'a> {
    points: &'a [CostAndNe],
    floor: Option<f64>,
    /// The mean of ln C.
    reference: f64,
}

impl Curves<'_> {
    fn power(&self, point: &CostAndNe, exponent: f64) -> f64 {
        (-exponent * (point.flops.ln() - self.reference)).exp()
    }

    /// E∞ and the scale with the least squares.
    fn coefficients(&self, exponent: f64) -> (f64, f64) {
        let (mut n, mut x, mut xx, mut y, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for point in self.points {
            let power = self.power(point, exponent);
            n += 1.0;
            x += power;
            xx += power * power;
            y += point.ne;
            xy += power * point.ne;
        }
        let floor = self.floor.unwrap_or_else(|| {
            let scale = (n * xy - x * y) / (n * xx - x * x);
            ((y - scale * x) / n).max(0.0)
        });
        (floor, (xy - floor * x) / xx)
    }

    fn error(&self, exponent: f64) -> f64 {
        let (floor, scale) = self.coefficients(exponent);
        let off = |point: &CostAndNe| point.ne - floor - scale * self.power(point, exponent);
        self.points.iter().map(|point| off(point).powi(2)).sum()
    }
}

/// Where a function with one minimum in a range has it (golden section).
fn least_between([mut low, mut high]: [f64; 2], of: impl Fn(f64) -> f64) -> f64 {
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    for _ in 0..40 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if of(a) <= of(b) { high = b } else { low = a }
    }
    (low + high) / 2.0
}

/// The points of the lower convex hull over ln C as far as it falls, by index, cheapest first. A
/// falling power law is convex there, so all points on one are on the hull.
pub fn envelope(points: &[CostAndNe]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&points[a], &points[b]);
        a.flops.total_cmp(&b.flops).then(a.ne.total_cmp(&b.ne))
    });
    let place = |at: usize| [points[at].flops.ln(), points[at].ne];
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        while let [.., before, last] = hull[..] {
            let ([x0, y0], [x1, y1], [x2, y2]) = (place(before), place(last), place(next));
            if (x1 - x0) * (y2 - y0) > (x2 - x0) * (y1 - y0) {
                break;
            }
            hull.pop();
        }
        if hull.last().is_none_or(|&last| points[next].flops > points[last].flops) {
            hull.push(next);
        }
    }
    let falls = hull.windows(2).take_while(|pair| points[pair[1]].ne < points[pair[0]].ne).count();
    hull.truncate(falls + 1);
    hull
}

/// The arms of a tally to which a law is fitted.
pub struct LawArms<'a> {
    /// The sums by user, seed and arm.
    pub dense: &'a UserTotals,
    /// The arms, by index.
    pub arms: Vec<usize>,
    /// The training FLOPs of each of them.
    pub flops: Vec<f64>,
    /// The arm of the true probabilities, whose NE is E∞.
    pub optimum: Option<usize>,
    /// Whether only the envelope is fitted.
    pub envelope_only: bool,
}

/// A law, and what the points leave open.
#[derive(Debug, Clone, Serialize)]
pub struct LawFit {
    /// The law; none if there are too few points.
    pub fit: Option<PowerFit>,
    /// The 95 % interval of the exponent over users and seeds.
    pub exponent_ci95: Option<[f64; 2]>,
    /// How far NE falls from the cheapest point to the last one on the envelope, in per cent of
    /// that one's.
    pub fall_pct: f64,
    /// NE of each arm, the mean over seeds.
    #[serde(skip)]
    pub ne: Vec<f64>,
    /// The arms that are fitted, as places in the list of arms.
    #[serde(skip)]
    pub fitted: Vec<usize>,
    /// The arms on the lower envelope, as places in the list, also where others are fitted, too.
    #[serde(skip)]
    pub on_envelope: Vec<usize>,
}

/// What a law of smaller models says of the largest, and what that has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LargestModel {
    /// Its training FLOPs.
    pub flops: f64,
    /// The law's NE.
    pub predicted_ne: f64,
    /// Its own NE.
    pub measured_ne: f64,
    /// How far the prediction is from it, in per cent.
    pub difference_pct: f64,
    /// The 95 % interval of the difference.
    pub difference_ci95: Option<[f64; 2]>,
}

impl LawArms<'_> {
    /// The law with its interval.
    pub fn fit(&self, replicates: usize) -> LawFit {
        let bounds = self.resampled(replicates, |halves, seeds| {
            self.law(halves, seeds).map_or(f64::NAN, |fit| fit.exponent)
        });
        let all = self.all_seeds();
        let totals = self.dense.totals(None);
        let ne: Vec<f64> = self.arms.iter().map(|&arm| mean_ne(&totals, &all, arm, None)).collect();
        let fit = self.law(&self.halves(None), &all).map(|fit| PowerFit {
            floor: fit.floor + self.optimum.map_or(0.0, |arm| mean_ne(&totals, &all, arm, None)),
            ..fit
        });
        let points = self.points(&ne);
        let (fitted, on_envelope) = (self.chosen(&points), envelope(&points));
        let [first, last] = [on_envelope.first(), on_envelope.last()]
            .map(|place| place.map_or(f64::NAN, |&place| ne[place]));
        let fall_pct = 100.0 * (first / last - 1.0);
        LawFit { fit, exponent_ci95: bounds, fall_pct, ne, fitted, on_envelope }
    }

    /// What the law of all models but the largest says of that one at its end. `model_of` gives the
    /// model of an arm; the largest has the arm that costs most.
    pub fn predict_largest(
        &self,
        model_of: impl Fn(usize) -> usize,
        replicates: usize,
    ) -> Option<LargestModel> {
        let costs = self.flops.iter().enumerate();
        let (end, &flops) = costs.max_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let end = self.arms[end];
        let places = 0..self.arms.len();
        let smaller: Vec<usize> =
            places.filter(|&place| model_of(self.arms[place]) != model_of(end)).collect();
        let others = LawArms {
            arms: smaller.iter().map(|&place| self.arms[place]).collect(),
            flops: smaller.iter().map(|&place| self.flops[place]).collect(),
            ..*self
        };
        others.predict(end, flops, replicates)
    }

    /// What this law, which is without the largest model, says of it: an arm with its FLOPs.
    fn predict(&self, largest: usize, flops: f64, replicates: usize) -> Option<LargestModel> {
        let of = |halves: &[ScoreTotals; 2], seeds: &[usize]| {
            let above = self.law(halves, seeds)?.at(flops);
            let both = |arm| halves.iter().map(|half| mean_ne(half, seeds, arm, None)).sum::<f64>();
            let predicted = above + self.optimum.map_or(0.0, |arm| both(arm) / 2.0);
            Some([predicted, both(largest) / 2.0])
        };
        let percent = |[predicted, measured]: [f64; 2]| 100.0 * (predicted / measured - 1.0);
        let difference_ci95 =
            self.resampled(replicates, |halves, seeds| of(halves, seeds).map_or(f64::NAN, percent));
        let [predicted_ne, measured_ne] = of(&self.halves(None), &self.all_seeds())?;
        let difference_pct = percent([predicted_ne, measured_ne]);
        Some(LargestModel { flops, predicted_ne, measured_ne, difference_pct, difference_ci95 })
    }

    fn all_seeds(&self) -> Vec<usize> {
        (0..self.dense.nats.len()).collect()
    }

    /// The 95 % interval of a statistic over draws of users and of seeds.
    fn resampled(
        &self,
        replicates: usize,
        measure: impl Fn(&[ScoreTotals; 2], &[usize]) -> f64,
    ) -> Option<[f64; 2]> {
        let seeds = self.dense.nats.len();
        let rng = RefCell::new(SmallRng::seed_from_u64(SEED));
        let bounds = resample(self.dense.users(), replicates, |weights| {
            let draw = |_| rng.borrow_mut().random_range(0..seeds);
            let drawn: Vec<usize> = (0..seeds).map(draw).collect();
            vec![measure(&self.halves(Some(weights)), &drawn)]
        });
        bounds.first().copied().filter(|bounds| bounds[0].is_finite())
    }

    /// The sums of every second user, and of the others.
    fn halves(&self, weights: Option<&[u32]>) -> [ScoreTotals; 2] {
        [0, 1].map(|half| {
            let of_user =
                |user| if user % 2 == half { weights.map_or(1, |all| all[user]) } else { 0 };
            let own: Vec<u32> = (0..self.dense.users()).map(of_user).collect();
            self.dense.totals(Some(&own))
        })
    }

    fn points(&self, ne: &[f64]) -> Vec<CostAndNe> {
        self.flops.iter().zip(ne).map(|(&flops, &ne)| CostAndNe { flops, ne }).collect()
    }

    fn chosen(&self, points: &[CostAndNe]) -> Vec<usize> {
        if self.envelope_only { envelope(points) } else { (0..points.len()).collect() }
    }

    /// The law of some seeds; above the optimum, where there is one.
    fn law(&self, halves: &[ScoreTotals; 2], seeds: &[usize]) -> Option<PowerFit> {
        let mut fitted = Vec::new();
        for &seed in seeds {
            let mut others = self.all_seeds();
            others.retain(|&other| other != seed || self.dense.nats.len() == 1);
            for half in 0..2 {
                let of = |totals: &ScoreTotals, seeds: &[usize]| -> Vec<CostAndNe> {
                    let ne = |&arm: &usize| mean_ne(totals, seeds, arm, self.optimum);
                    self.points(&self.arms.iter().map(ne).collect::<Vec<_>>())
                };
                let measured = of(&halves[1 - half], &[seed]);
                let chosen = self.chosen(&of(&halves[half], &others));
                fitted.extend(chosen.into_iter().map(|at| measured[at]));
            }
        }
        PowerFit::of(&fitted, self.optimum.map(|_| 0.0))
    }
}

/// The mean over seeds of an arm's NE, or of what of it is above another arm's.
fn mean_ne(totals: &ScoreTotals, seeds: &[usize], arm: usize, above: Option<usize>) -> f64 {
    let ne = |seed: usize, arm: usize| totals.ne(seed, arm).unwrap_or(f64::NAN);
    let of_seed = |&seed: &usize| ne(seed, arm) - above.map_or(0.0, |other| ne(seed, other));
    seeds.iter().map(of_seed).sum::<f64>() / seeds.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(floor: f64, scale: f64, exponent: f64) -> Vec<CostAndNe> {
        let point = |at: i32| {
            let flops = 1e9 * 10f64.powf(f64::from(at) / 3.0);
            CostAndNe { flops, ne: floor + scale * (flops / 1e9).powf(-exponent) }
        };
        (0..10).map(point).collect()
    }

    #[test]
    fn a_law_is_found_from_its_points() {
        for (floor, scale, exponent) in [(0.7, 0.2, 0.15), (0.5, 0.05, 0.4), (0.0, 0.9, 0.05)] {
            let points = points(floor, scale, exponent);
            for known in [None, Some(floor)] {
                let fit = PowerFit::of(&points, known).unwrap();
                assert!((fit.exponent - exponent).abs() < 2e-3, "{fit:?}");
                assert!((fit.floor - floor).abs() < 5e-3, "{fit:?}");
                let first = fit.scale * (1e9 / fit.reference_flops).powf(-fit.exponent);
                assert!((first - scale).abs() < 5e-3, "{fit:?}: {first}");
                assert!((fit.at(1e13) - floor - scale * 1e4f64.powf(-exponent)).abs() < 2e-3);
            }
        }
        let rises: Vec<CostAndNe> = points(0.7, 0.2, 0.2)
            .iter()
            .map(|point| CostAndNe { ne: 2.0 - point.ne, ..*point })
            .collect();
        for known in [None, Some(0.5)] {
            assert!(PowerFit::of(&rises, known).unwrap().exponent < 0.0);
        }
        assert_eq!(PowerFit::of(&rises[..2], None), None);
        assert_eq!(PowerFit::of(&[rises[0]; 5], None), None);
    }

    #[test]
    fn the_envelope_is_what_is_best_for_its_cost() {
        let mut all = points(0.7, 0.2, 0.2);
        let on_it = all.len();
        let worse = |point: &CostAndNe| CostAndNe { flops: 1.1 * point.flops, ne: point.ne + 0.01 };
        all.extend(points(0.7, 0.2, 0.2).iter().map(worse));
        assert_eq!(envelope(&all), (0..on_it).collect::<Vec<_>>());
        // What costs more and is worse than the best ends the envelope.
        all.push(CostAndNe { flops: 1e15, ne: 0.9 });
        assert_eq!(envelope(&all).len(), on_it);
        assert_eq!(envelope(&all[..1]), [0]);
    }

    /// 300 users of different difficulty, three seeds, and arms of the given NE with noise of their
    /// own; the last arm is the truth.
    fn dense(ne: &[f64], noise: f64) -> UserTotals {
        let (users, rows) = (300, 40.0);
        let mut rng = SmallRng::seed_from_u64(3);
        let mut about = |spread: f64| spread * (rng.random::<f64>() - 0.5);
        let hardness: Vec<f64> = (0..users).map(|_| 1.0 + about(0.5)).collect();
        let base = std::f64::consts::LN_2;
        let mut of_seed = || {
            let mut of_arm = |ne: &f64| {
                let luck = about(noise / 10.0);
                let of_user = |easy: &f64| rows * base * (ne * easy + luck + about(noise));
                hardness.iter().map(of_user).collect::<Vec<f64>>()
            };
            ne.iter().map(&mut of_arm).collect::<Vec<_>>()
        };
        let nats = (0..3).map(|_| of_seed()).collect();
        UserTotals { rows: vec![rows; users], positives: vec![rows / 2.0; users], nats }
    }

    fn arms(dense: &UserTotals, optimum: bool) -> LawArms<'_> {
        let models = dense.nats[0].len() - 1;
        let flops = points(0.0, 1.0, 1.0).iter().map(|point| point.flops).collect();
        let (arms, optimum) = ((0..models).collect(), optimum.then_some(models));
        LawArms { dense, arms, flops, optimum, envelope_only: true }
    }

    #[test]
    fn a_law_under_noise_is_seen_with_its_exponent_and_predicts_the_largest() {
        let mut ne: Vec<f64> = points(0.7, 0.15, 0.2).iter().map(|point| point.ne).collect();
        ne.push(0.7);
        let dense = dense(&ne, 0.01);
        let law = arms(&dense, true);
        let found = law.fit(100);
        let [low, high] = found.exponent_ci95.unwrap();
        assert!(low > 0.0 && low < 0.21 && high > 0.19 && high - low < 0.04, "{found:?}");
        let fit = found.fit.unwrap();
        assert!((fit.exponent - 0.2).abs() < 0.01 && (fit.floor - 0.7).abs() < 0.02, "{fit:?}");
        assert!(found.fitted.len() >= 6, "{found:?}");
        let fall = 100.0 * (found.ne[0] / found.ne[9] - 1.0);
        assert!((found.fall_pct - fall).abs() < 1e-9 && fall > 10.0, "{found:?}");
        let said = law.predict_largest(|arm| arm, 100).unwrap();
        assert_eq!(said.flops, law.flops[law.flops.len() - 1]);
        assert!(said.difference_pct.abs() < 0.2, "{said:?}");
        let [low, high] = said.difference_ci95.unwrap();
        assert!(low < 0.1 && high > -0.1 && high - low < 0.5, "{said:?}");
    }

    #[test]
    fn models_that_are_alike_show_no_law() {
        for optimum in [false, true] {
            let mut ne = vec![0.85; 10];
            ne.push(0.7);
            let dense = dense(&ne, 0.05);
            let found = arms(&dense, optimum).fit(100);
            let [low, high] = found.exponent_ci95.unwrap_or([0.0; 2]);
            assert!(low <= 0.0 && high >= 0.0, "{found:?}");
        }
    }

    /// All points of a curve that rises at its end are fitted, but not all are on its envelope.
    #[test]
    fn points_that_rise_are_not_on_the_envelope() {
        let mut ne: Vec<f64> = points(0.7, 0.15, 0.2).iter().map(|point| point.ne).collect();
        ne[8] = ne[2];
        ne[9] = ne[1];
        ne.push(0.7);
        let dense = dense(&ne, 1e-6);
        let law = LawArms { envelope_only: false, ..arms(&dense, true) };
        let found = law.fit(10);
        assert_eq!((found.fitted.len(), found.on_envelope), (10, (0..8).collect::<Vec<_>>()));
    }
}
