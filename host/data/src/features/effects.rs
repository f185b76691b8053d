//! Running effects: what a user, an item, a tag adds to the log odds of an
//! action, learned online from every outcome.
//!
//! The rate of a counter confounds its key with what it was shown with: where one
//! click in ten is usual, every user looks averse. Effects explain an outcome
//! together: a logistic regression with a weight for each key of each lasting counter
//! and one for the surface. A weight is a normal distribution; the less is known of
//! it, the more of a surprise it takes on (assumed-density filtering as in Graepel et
//! al., ICML 2010, with MacKay's 1992 approximation of the logistic's mean). Effects do
//! not drift: a counter with a half-life has none.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Variance of a key's effect of which nothing is known, in squared log odds. NE on KuaiRand hardly
/// depends on it: halved or doubled, it changes in the fourth digit.
const KEY_VARIANCE: f32 = 0.3;

/// The same of a surface's, which is the intercept.
const SURFACE_VARIANCE: f32 = 4.0;

/// One weight: log odds that a key adds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Effect {
    pub(super) mean: f32,
    variance: f32,
}

impl Default for Effect {
    fn default() -> Effect {
        Effect { mean: 0.0, variance: KEY_VARIANCE }
    }
}

impl Effect {
    /// The effect of a surface of which nothing is known.
    pub(super) fn of_surface() -> Effect {
        Effect { mean: 0.0, variance: SURFACE_VARIANCE }
    }

    /// Takes on its part of what an outcome taught.
    pub(super) fn learn(&mut self, lesson: Lesson) {
        let variance = f64::from(self.variance);
        self.mean += (variance * lesson.pull) as f32;
        self.variance = (variance - variance * variance * lesson.certainty) as f32;
    }
}

/// The sum of an impression's effects: normally distributed log odds of an action.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Belief {
    pub(super) mean: f64,
    pub(super) variance: f64,
}

/// What an outcome tells each effect that had a part in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lesson {
    /// By how much means move, a unit of variance.
    pull: f64,
    /// By how much variances shrink, a unit of variance squared.
    certainty: f64,
}

impl Belief {
    pub(super) fn add(&mut self, effect: Effect) {
        self.mean += f64::from(effect.mean);
        self.variance += f64::from(effect.variance);
    }

    /// The expected probability.
    pub(super) fn probability(&self) -> f64 {
        let log_odds = self.mean / (1.0 + PI / 8.0 * self.variance).sqrt();
        1.0 / (1.0 + (-log_odds).exp())
    }

    /// What an outcome teaches: one step of a Kalman filter on the logistic's curvature.
    pub(super) fn lesson(&self, positive: bool) -> Lesson {
        let probability = self.probability();
        let curvature = probability * (1.0 - probability);
        let scale = 1.0 + curvature * self.variance;
        let surprise = f64::from(u8::from(positive)) - probability;
        Lesson { pull: surprise / scale, certainty: curvature / scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two users on two surfaces: surface 0 gives much, user 0 likes what surface 1 gives more than user 1 does,
    /// but is mostly seen where little is given.
    #[test]
    fn effects_tell_apart_what_rates_confound() {
        let mut surfaces = [Effect::of_surface(); 2];
        let mut users = [Effect::default(); 2];
        let (mut shown, mut liked) = ([0.0; 2], [0.0; 2]);
        for step in 0..4000_u32 {
            let user = (step % 2) as usize;
            let surface = usize::from((step / 2 % 10 < 8) == (user == 0));
            let odds = if surface == 0 { 3.0 } else { 0.2 } * if user == 0 { 2.0 } else { 0.5 };
            let rate = odds / (1.0 + odds);
            let positive = f64::from(step.wrapping_mul(2_654_435_761) >> 8) / 16_777_216.0 < rate;
            let mut belief = Belief::default();
            belief.add(surfaces[surface]);
            belief.add(users[user]);
            let lesson = belief.lesson(positive);
            surfaces[surface].learn(lesson);
            users[user].learn(lesson);
            shown[user] += 1.0;
            liked[user] += f64::from(u8::from(positive));
        }
        assert!(liked[0] / shown[0] < liked[1] / shown[1], "by rates, user 1 likes more");
        let apart = users[0].mean - users[1].mean;
        // Effects are held to be independent, so part of it stays with the surfaces.
        assert!(apart > 0.5 * 4_f32.ln() && apart < 1.2 * 4_f32.ln(), "{apart}");
        assert!(users[0].variance < KEY_VARIANCE / 2.0, "it has become surer");
    }

    #[test]
    fn doubt_draws_a_probability_to_a_half_and_no_outcome_breaks_it() {
        let sure = Belief { mean: 3.0, variance: 0.0 };
        let unsure = Belief { mean: 3.0, variance: 4.0 };
        assert!(sure.probability() > unsure.probability() && unsure.probability() > 0.5);
        let mut effect = Effect::of_surface();
        for step in 0..100_000 {
            let mut belief = Belief::default();
            belief.add(effect);
            effect.learn(belief.lesson(step % 1000 == 0));
            assert!(effect.mean.is_finite() && effect.variance > 0.0, "{step}: {effect:?}");
        }
        assert!((effect.mean - 0.001_f32.ln()).abs() < 1.0, "{effect:?}");
    }
}
