//! Rankings that explore, with the probability of each place, from which what another rule would
//! have brought can be estimated.
//!
//! Chance is a function of the request's seed, so the host's replay of a request ranks it in the
//! same way.

use crate::rank::{Request, by_score};
use crate::raw::types::Ranked;

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

    /// An index below `count`, which is above 0.
    pub fn below(&mut self, count: usize) -> usize {
        ((self.uniform() * count as f64) as usize).min(count - 1)
    }
}

impl Request {
    /// The `limit` best candidates by score, except in a share of `epsilon` (0 to 1) of the
    /// requests: there the order is random, each one as likely as any other.
    ///
    /// The propensity of a place is the probability, over both, that its candidate gets this place:
    /// `epsilon / n` for each of n candidates, and `1 - epsilon` more where it has that place by
    /// score.
    pub fn epsilon_greedy(&self, scores: &[f32], epsilon: f32) -> Vec<Ranked> {
        let epsilon = epsilon.clamp(0.0, 1.0);
        let best = by_score(scores);
        let mut chance = Chance::new(self.seed);
        let mut order = best.clone();
        if chance.uniform() < f64::from(epsilon) {
            for place in 0..order.len() {
                let other = place + chance.below(order.len() - place);
                order.swap(place, other);
            }
        }
        let at_random = epsilon / scores.len() as f32;
        let greedy = best.iter().map(|place| place.candidate);
        for (place, by_score) in order.iter_mut().zip(greedy) {
            let by_score = if place.candidate == by_score { 1.0 - epsilon } else { 0.0 };
            place.propensity = Some((by_score + at_random).min(1.0)).filter(|share| *share > 0.0);
        }
        order.truncate(self.limit);
        order
    }

    /// A ranking drawn from the Plackett-Luce model: each place is drawn from the candidates that
    /// are left, in proportion to `exp(score / temperature)`. A low temperature is close to the
    /// order by score.
    ///
    /// The propensity of a place is the probability of its candidate given the places before it, so
    /// that of the first is its probability alone, and their product that of the ranking.
    ///
    /// A `temperature` of 0 or below, or scores that are not finite, give the order by score.
    pub fn softmax(&self, scores: &[f32], temperature: f32) -> Vec<Ranked> {
        let mut left = by_score(scores);
        let is_drawn = temperature > 0.0 && scores.iter().all(|score| score.is_finite());
        if !is_drawn {
            left.truncate(self.limit);
            return left;
        }
        let mut chance = Chance::new(self.seed);
        let mut ranked = Vec::with_capacity(self.limit.min(left.len()));
        while ranked.len() < self.limit && !left.is_empty() {
            // `left` stays in the order of scores, so the first has the largest.
            let (top, temperature) = (f64::from(left[0].score), f64::from(temperature));
            let weight = |place: &Ranked| ((f64::from(place.score) - top) / temperature).exp();
            let total: f64 = left.iter().map(weight).sum();
            let mut drawn = chance.uniform() * total;
            let past = |place: &Ranked| {
                drawn -= weight(place);
                drawn <= 0.0
            };
            let at = left.iter().position(past).unwrap_or(0);
            let place = left.remove(at);
            // A probability that f32 rounds to 0 is the smallest one.
            let propensity = ((weight(&place) / total) as f32).max(f32::MIN_POSITIVE);
            ranked.push(Ranked { propensity: Some(propensity), ..place });
        }
        ranked
    }
}
