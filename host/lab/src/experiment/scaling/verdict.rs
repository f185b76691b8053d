//! Whether a fit is a law. A curve can be drawn through any points: through two models, or through
//! some that say nothing of the next.

use super::law::{LargestModel, LawFit};

/// The fewest models that a law is seen in.
pub const LEAST_MODELS: usize = 4;

/// How far the law of the smaller models may be from the largest one's NE, in per cent.
pub const TOLERANCE_PCT: f64 = 0.2;

/// What a fit lacks to be a law, in words; nothing if it is one. `models` have a point that is
/// fitted; `largest` is the largest model as the others' law predicts it.
pub fn shortfalls(fit: &LawFit, models: usize, largest: Option<&LargestModel>) -> Vec<String> {
    let off = largest.map_or(f64::NAN, |largest| largest.difference_pct.abs());
    let of_largest = if off.is_nan() {
        "the others say nothing of the largest model".to_owned()
    } else {
        format!("the largest model is {off:.2} % from its prediction, more than {TOLERANCE_PCT} %")
    };
    [
        (fit.fit.is_some() && fit.falls(), "b's interval is not above 0".to_owned()),
        (models >= LEAST_MODELS, format!("it holds for {models} models, not {LEAST_MODELS}")),
        (off <= TOLERANCE_PCT, of_largest),
    ]
    .into_iter()
    .filter_map(|(is_met, lacks)| (!is_met).then_some(lacks))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::scaling::law::PowerFit;

    fn fit(exponent_ci95: Option<[f64; 2]>) -> LawFit {
        let fit = PowerFit { floor: 0.7, scale: 0.1, exponent: 0.1, reference_flops: 1e12 };
        LawFit { fit: Some(fit), exponent_ci95, ne: Vec::new(), fitted: Vec::new() }
    }

    fn largest(difference_pct: f64) -> LargestModel {
        LargestModel {
            flops: 1e13,
            predicted_ne: 0.9,
            measured_ne: 0.9,
            difference_pct,
            difference_ci95: None,
        }
    }

    #[test]
    fn a_law_falls_holds_for_four_models_and_predicts_the_largest() {
        let falls = fit(Some([0.05, 0.15]));
        assert_eq!(shortfalls(&falls, 4, Some(&largest(-0.19))), [""; 0]);
        let lacks = |fit: &LawFit, models, difference: Option<f64>| {
            shortfalls(fit, models, difference.map(largest).as_ref()).join("; ")
        };
        let flat = fit(Some([-0.01, 0.15]));
        assert_eq!(lacks(&flat, 5, Some(0.1)), "b's interval is not above 0");
        assert_eq!(lacks(&fit(None), 5, Some(0.1)), "b's interval is not above 0");
        // What two models of five once gave: b = 0.055 [0.048, 0.060].
        let said = "it holds for 2 models, not 4; \
                    the largest model is 4.30 % from its prediction, more than 0.2 %";
        assert_eq!(lacks(&fit(Some([0.048, 0.060])), 2, Some(-4.3)), said);
        let nothing = "the others say nothing of the largest model";
        assert_eq!(lacks(&falls, 4, Some(f64::NAN)), nothing);
        assert_eq!(lacks(&falls, 4, None), nothing);
    }
}
