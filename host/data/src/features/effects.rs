//! Running effects: the log odds that a user, an item or a tag adds to an action, learned online
//! from every outcome.
//!
//! The rate of a counter mixes its key with what it was shown with: where one click in ten is
//! usual, every user looks averse. Effects explain an outcome together: a logistic regression with
//! a weight for the surface and one for each key of each lasting counter. Each weight is a normal
//! distribution, and a surprise moves the most uncertain weights most (assumed-density filtering as
//! in Graepel et al., ICML 2010, with MacKay's 1992 approximation of the logistic's mean). Effects
//! do not drift, so a counter with a half-life has none.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The prior variance of a key's effect, in squared log odds. NE on KuaiRand hardly depends on it:
/// doubling or halving it changes the fourth digit.
const KEY_VARIANCE: f32 = 0.3;

/// The prior variance of a surface's effect, which is the intercept.
const SURFACE_VARIANCE: f32 = 4.0;

/// One weight: the log odds that a key adds.
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
    /// The prior effect of a surface.
    pub(super) fn of_surface() -> Effect {
        Effect { mean: 0.0, variance: SURFACE_VARIANCE }
    }

    /// Applies this effect's part of an update.
    pub(super) fn apply(&mut self, update: PosteriorUpdate) {
        let variance = f64::from(self.variance);
        self.mean += (variance * update.pull) as f32;
        self.variance = (variance - variance * variance * update.certainty) as f32;
    }
}

/// The sum of an impression's effects: the normally distributed log odds of an action.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Posterior {
    pub(super) mean: f64,
    pub(super) variance: f64,
}

/// The change that an outcome causes in each effect of its impression.
#[derive(Debug, Clone, Copy)]
pub(super) struct PosteriorUpdate {
    /// The change of the mean per unit of variance.
    pull: f64,
    /// The decrease of the variance per unit of variance squared.
    certainty: f64,
}

impl Posterior {
    pub(super) fn add(&mut self, effect: Effect) {
        self.mean += f64::from(effect.mean);
        self.variance += f64::from(effect.variance);
    }

    /// The expected probability of the action.
    pub(super) fn probability(&self) -> f64 {
        let log_odds = self.mean / (1.0 + PI / 8.0 * self.variance).sqrt();
        1.0 / (1.0 + (-log_odds).exp())
    }

    /// The update by one outcome: a step of a Kalman filter with the logistic's curvature.
    pub(super) fn update(&self, positive: bool) -> PosteriorUpdate {
        let probability = self.probability();
        let curvature = probability * (1.0 - probability);
        let scale = 1.0 + curvature * self.variance;
        let surprise = f64::from(u8::from(positive)) - probability;
        PosteriorUpdate { pull: surprise / scale, certainty: curvature / scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two users on two surfaces. Surface 0 has high rates. User 0 likes more than user 1 on either
    /// surface, but mostly uses the surface with low rates.
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
            let mut posterior = Posterior::default();
            posterior.add(surfaces[surface]);
            posterior.add(users[user]);
            let update = posterior.update(positive);
            surfaces[surface].apply(update);
            users[user].apply(update);
            shown[user] += 1.0;
            liked[user] += f64::from(u8::from(positive));
        }
        assert!(liked[0] / shown[0] < liked[1] / shown[1], "by rates, user 1 likes more");
        let apart = users[0].mean - users[1].mean;
        // Effects are assumed to be independent, so the surfaces keep part of the difference.
        assert!(apart > 0.5 * 4_f32.ln() && apart < 1.2 * 4_f32.ln(), "{apart}");
        assert!(users[0].variance < KEY_VARIANCE / 2.0, "the variance has shrunk");
    }

    #[test]
    fn doubt_draws_a_probability_to_a_half_and_no_outcome_breaks_it() {
        let sure = Posterior { mean: 3.0, variance: 0.0 };
        let unsure = Posterior { mean: 3.0, variance: 4.0 };
        assert!(sure.probability() > unsure.probability() && unsure.probability() > 0.5);
        let mut effect = Effect::of_surface();
        for step in 0..100_000 {
            let mut posterior = Posterior::default();
            posterior.add(effect);
            effect.apply(posterior.update(step % 1000 == 0));
            assert!(effect.mean.is_finite() && effect.variance > 0.0, "{step}: {effect:?}");
        }
        assert!((effect.mean - 0.001_f32.ln()).abs() < 1.0, "{effect:?}");
    }
}
