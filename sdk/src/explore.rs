//! Rankings that explore, with the probability of each place, from which what another rule would
//! have brought can be estimated.
//!
//! Chance is a function of the request's seed, so the host's replay of a request ranks it in the
//! same way.

use crate::normal::{Normal, probability_of_most};
use crate::rank::{Request, best_first};
use crate::raw::types::Ranked;
use crate::slate::{Placement, Slate};

/// Chance that is a function of a seed (SplitMix64). A rule of a team's own draws from it, too.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// Starts from a seed, such as `request.seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits, each set as often as not.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number above 0 and below 1.
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// A normal number, of mean 0 and deviation 1 (Box & Muller).
    pub fn normal(&mut self) -> f64 {
        let length = (-2.0 * self.uniform().ln()).sqrt();
        length * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// An index below `count`, which is above 0.
    pub fn below(&mut self, count: usize) -> usize {
        ((self.uniform() * count as f64) as usize).min(count - 1)
    }
}

impl Request {
    /// [`Slate::epsilon_greedy`] of all candidates.
    pub fn epsilon_greedy(&self, scores: &[f32], epsilon: f32) -> Vec<Ranked> {
        self.slate(scores).epsilon_greedy(epsilon)
    }

    /// [`Slate::softmax`] of all candidates.
    pub fn softmax(&self, scores: &[f32], temperature: f32) -> Vec<Ranked> {
        self.slate(scores).softmax(temperature)
    }
}

impl Slate<'_> {
    /// The best candidates by score, except in a share of `epsilon` (0 to 1) of the requests: there
    /// the order is random, each one as likely as any other.
    ///
    /// The propensity of a place is the probability, over both, that its candidate gets this place:
    /// `epsilon / n` for each of n candidates, and `1 - epsilon` more where it has that place by
    /// score. With caps only the first place has one, because what follows depends on it.
    pub fn epsilon_greedy(&self, epsilon: f32) -> Vec<Ranked> {
        let epsilon = epsilon.clamp(0.0, 1.0);
        let mut order = self.by_score();
        let at_random = epsilon / order.len() as f32;
        let best = self.in_order(order.clone());
        let mut chance = Chance::new(self.request.seed);
        if chance.uniform() < f64::from(epsilon) {
            for place in 0..order.len() {
                let other = place + chance.below(order.len() - place);
                order.swap(place, other);
            }
        }
        let mut order = self.in_order(order);
        for (place, (entry, best)) in order.iter_mut().zip(best).enumerate() {
            let by_score = if entry.candidate == best.candidate { 1.0 - epsilon } else { 0.0 };
            let share = Some((by_score + at_random).min(1.0)).filter(|share| *share > 0.0);
            entry.propensity = share.filter(|_| self.caps_leave(place));
        }
        order
    }

    /// A ranking drawn from the Plackett-Luce model: each place is drawn from the candidates that
    /// are left, and that caps allow, in proportion to `exp(score / temperature)`. A low
    /// temperature is close to the order by score.
    ///
    /// The propensity of a place is the probability of its candidate given the places before it, so
    /// that of the first is its probability alone, and their product that of the ranking.
    ///
    /// A `temperature` of 0 or below, or scores that are not finite, give the order by score.
    pub fn softmax(&self, temperature: f32) -> Vec<Ranked> {
        let left = self.by_score();
        let is_drawn = temperature > 0.0 && left.iter().all(|entry| entry.score.is_finite());
        if !is_drawn {
            return self.in_order(left);
        }
        let mut chance = Chance::new(self.request.seed);
        self.place(left, |_, left, choices| {
            // What is left stays in the order of scores, so the first has the largest.
            let top = f64::from(left[choices[0]].score);
            let weight =
                |&at: &usize| ((f64::from(left[at].score) - top) / f64::from(temperature)).exp();
            let total: f64 = choices.iter().map(weight).sum();
            let mut drawn = chance.uniform() * total;
            let past = |at: &usize| {
                drawn -= weight(at);
                drawn <= 0.0
            };
            let choice = choices.iter().position(past).unwrap_or(0);
            // A probability that f32 rounds to 0 is the smallest one.
            let share = ((weight(&choices[choice]) / total) as f32).max(f32::MIN_POSITIVE);
            Placement { choice, propensity: Some(share) }
        })
    }

    /// Thompson sampling: the slate's scores are means, to each of which a normal number is added
    /// with a deviation of its own, and the sums order the candidates. What is uncertain is tried
    /// as often as it may be the best. `deviations` has one for each candidate of the request;
    /// those that are missing, negative or not finite count as 0.
    ///
    /// A place's score is the sum. The first place has a propensity, the probability that its sum
    /// is the largest, to about a thousandth of 1. The others have none: theirs would be integrals
    /// over all sums before them.
    ///
    /// Scores that are not finite give the order by score.
    pub fn thompson(&self, deviations: &[f32]) -> Vec<Ranked> {
        let means = self.by_score();
        if means.iter().any(|entry| !entry.score.is_finite()) {
            return self.in_order(means);
        }
        let deviation = |candidate: u32| {
            let given = deviations.get(candidate as usize).copied().unwrap_or(0.0);
            if given.is_finite() { given.max(0.0) } else { 0.0 }
        };
        let mut chance = Chance::new(self.request.seed);
        let drawn = means.iter().map(|entry| {
            let added = f64::from(deviation(entry.candidate)) * chance.normal();
            Ranked::new(entry.candidate, entry.score + added as f32)
        });
        let mut order = self.in_order(best_first(drawn.collect()));
        if let Some(first) = order.first_mut().filter(|_| self.caps_leave(0)) {
            let of = |entry: &Ranked| Normal {
                mean: f64::from(entry.score),
                deviation: f64::from(deviation(entry.candidate)),
            };
            let normals: Vec<Normal> = means.iter().map(of).collect();
            let at = means.iter().position(|entry| entry.candidate == first.candidate);
            let share = probability_of_most(at.expect("it was drawn"), &normals) as f32;
            first.propensity = Some(share.clamp(f32::MIN_POSITIVE, 1.0));
        }
        order
    }
}
