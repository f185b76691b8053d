//! Whether a fit is a law. A curve can be drawn through any points: through two models, or through
//! some that say nothing of the next.

use super::law::{LargestModel, LawFit};

/// The fewest models that a law is seen in.
pub const LEAST_MODELS: usize = 4;

/// How far b's interval may reach from b, in per cent of b.
pub const EXPONENT_PCT: f64 = 20.0;

/// How far the law of the smaller models may be from the largest one's NE, in per cent of NE.
pub const TOLERANCE_PCT: f64 = 0.2;

/// The same as a share of NE's fall from the cheapest point to the best one: where all models are
/// alike, any curve is within 0.2 %.
pub const TOLERATED_SHARE_OF_FALL: f64 = 0.2;

/// What a fit lacks to be a law, in words; nothing if it is one. `models` is the number of models
/// on the envelope; `largest` is the largest model as the law of the others predicts it.
pub fn shortfalls(fit: &LawFit, models: usize, largest: Option<&LargestModel>) -> Vec<String> {
    let Some(law) = fit.fit else {
        return vec!["there is no fit: fewer than three points, or all of one cost".into()];
    };
    let mut lacks = Vec::new();
    match fit.exponent_ci95 {
        None => lacks.push("b has no interval".to_owned()),
        Some([low, _]) if low.min(law.exponent) <= 0.0 => {
            lacks.push("b's interval is not above 0".to_owned());
        }
        Some([low, high]) => {
            let reach = 100.0 * (law.exponent - low).max(high - law.exponent) / law.exponent;
            if reach > EXPONENT_PCT {
                lacks.push(format!(
                    "b's interval reaches {reach:.0} % from b, more than {EXPONENT_PCT} %"
                ));
            }
        }
    }
    if models < LEAST_MODELS {
        lacks.push(format!("{models} models are on the envelope, not {LEAST_MODELS}"));
    }
    lacks.extend(of_largest(fit.fall_pct, largest));
    lacks
}

/// What the prediction of the largest model lacks.
fn of_largest(fall_pct: f64, largest: Option<&LargestModel>) -> Option<String> {
    let Some(largest) = largest.filter(|largest| largest.difference_pct.is_finite()) else {
        return Some("the other models do not predict the largest".into());
    };
    let tolerance = TOLERANCE_PCT.min(TOLERATED_SHARE_OF_FALL * fall_pct);
    let off = largest.difference_pct.abs();
    if off > tolerance {
        return Some(format!(
            "the largest model is {off:.2} % from its prediction, more than {tolerance:.2} %"
        ));
    }
    let Some([low, high]) = largest.difference_ci95 else {
        return Some("the prediction of the largest model has no interval".into());
    };
    let holds_zero = low <= 0.0 && high >= 0.0;
    let is_within = low >= -tolerance && high <= tolerance;
    (!holds_zero && !is_within).then(|| {
        format!(
            "the interval of the largest model's difference, [{low:.2}, {high:.2}] %, neither \
             holds 0 nor is within {tolerance:.2} %"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::scaling::law::PowerFit;

    fn fit(exponent_ci95: Option<[f64; 2]>) -> LawFit {
        let fit = PowerFit { floor: 0.7, scale: 0.1, exponent: 0.1, reference_flops: 1e12 };
        let fitted = Vec::new();
        LawFit {
            fit: Some(fit),
            exponent_ci95,
            fall_pct: 5.0,
            ne: Vec::new(),
            fitted,
            on_envelope: Vec::new(),
        }
    }

    fn largest(difference_pct: f64, difference_ci95: Option<[f64; 2]>) -> LargestModel {
        let (predicted_ne, measured_ne) = (0.9, 0.9);
        LargestModel { flops: 1e13, predicted_ne, measured_ne, difference_pct, difference_ci95 }
    }

    fn lacks(fit: &LawFit, models: usize, largest: Option<LargestModel>) -> String {
        shortfalls(fit, models, largest.as_ref()).join("; ")
    }

    #[test]
    fn a_law_falls_with_a_known_exponent_and_has_four_models() {
        let said = Some(largest(-0.19, Some([-0.4, 0.1])));
        assert_eq!(lacks(&fit(Some([0.081, 0.119])), 4, said), "");
        assert_eq!(lacks(&fit(Some([-0.01, 0.11])), 5, said), "b's interval is not above 0");
        assert_eq!(lacks(&fit(None), 5, said), "b has no interval");
        let wide = "b's interval reaches 50 % from b, more than 20 %";
        assert_eq!(lacks(&fit(Some([0.09, 0.15])), 5, said), wide);
        let none = LawFit { fit: None, ..fit(None) };
        assert!(lacks(&none, 5, None).starts_with("there is no fit: "));
        // What two models of five once gave.
        let said = "2 models are on the envelope, not 4; \
                    the largest model is 4.30 % from its prediction, more than 0.20 %";
        let off = Some(largest(-4.3, Some([-4.5, -4.1])));
        assert_eq!(lacks(&fit(Some([0.095, 0.105])), 2, off), said);
    }

    #[test]
    fn a_law_predicts_the_largest_model() {
        let falls = fit(Some([0.095, 0.105]));
        let of = |difference, interval| lacks(&falls, 4, Some(largest(difference, interval)));
        assert_eq!(of(0.12, Some([0.05, 0.18])), "", "all of the interval is within 0.2 %");
        assert_eq!(of(0.12, Some([-0.3, 0.6])), "", "the interval holds 0");
        assert!(of(0.12, Some([0.05, 0.25])).contains("[0.05, 0.25] %, neither holds 0"));
        assert!(of(0.12, None).contains("no interval"));
        let nothing = "the other models do not predict the largest";
        assert_eq!(of(f64::NAN, None), nothing);
        assert_eq!(lacks(&falls, 4, None), nothing);
        // NE is near 1 everywhere: 0.12 % is more than a fifth of its fall.
        let flat = LawFit { fall_pct: 0.3, ..falls.clone() };
        let said = lacks(&flat, 4, Some(largest(0.12, Some([-0.1, 0.3]))));
        assert_eq!(said, "the largest model is 0.12 % from its prediction, more than 0.06 %");
    }
}
