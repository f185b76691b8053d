//! The normal distribution: who of several normal numbers is the largest.

/// A normal number's distribution.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normal {
    pub(crate) mean: f64,
    /// 0 or above.
    pub(crate) deviation: f64,
}

/// Beyond so many deviations there is nothing that counts.
const REACH: f64 = 8.0;

/// The most intervals of the integral.
const INTERVALS: f64 = 2048.0;

/// The probability that the number at `first` is above all others, or equal to others behind it:
/// the integral of its density times the others' probabilities to be below.
pub(crate) fn probability_of_most(first: usize, all: &[Normal]) -> f64 {
    let own = all[first];
    let others = || all.iter().enumerate().filter(|(at, _)| *at != first);
    if own.deviation == 0.0 {
        return others().map(|(at, other)| below(own.mean, *other, at > first)).product();
    }
    // Below this, some other is surely above.
    let least = others().map(|(_, other)| other.mean - REACH * other.deviation);
    let low = least.fold(own.mean - REACH * own.deviation, f64::max);
    let high = own.mean + REACH * own.deviation;
    if low >= high {
        return 0.0;
    }
    // The others that are not surely below.
    let rivals: Vec<Normal> = others()
        .map(|(_, other)| *other)
        .filter(|other| other.deviation > 0.0 && other.mean + REACH * other.deviation > low)
        .collect();
    let narrowest = rivals.iter().map(|rival| rival.deviation).fold(own.deviation, f64::min);
    // Simpson's rule, by an even number of intervals.
    let intervals = ((high - low) / (0.25 * narrowest)).clamp(64.0, INTERVALS) as usize / 2 * 2;
    let step = (high - low) / intervals as f64;
    let integrand = |at: usize| {
        let x = low + step * at as f64;
        let z = (x - own.mean) / own.deviation;
        let density = (-0.5 * z * z).exp() / (own.deviation * std::f64::consts::TAU.sqrt());
        rivals.iter().fold(density, |product, rival| product * below(x, *rival, true))
    };
    let weight = |at: usize| match at {
        _ if at == 0 || at == intervals => 1.0,
        _ if at % 2 == 1 => 4.0,
        _ => 2.0,
    };
    (0..=intervals).map(|at| weight(at) * integrand(at)).sum::<f64>() * step / 3.0
}

/// The probability of a number to be below `x`, or equal if `or_equal`.
fn below(x: f64, normal: Normal, or_equal: bool) -> f64 {
    let over = x - normal.mean;
    if normal.deviation > 0.0 {
        return cumulative(over / normal.deviation);
    }
    if over > 0.0 || (over == 0.0 && or_equal) { 1.0 } else { 0.0 }
}

/// The probability of a standard normal number to be below `z`, by a Chebyshev fit of the
/// complementary error function (Press et al., Numerical Recipes, `erfcc`): to 1.2e-7 of its value.
fn cumulative(z: f64) -> f64 {
    let x = z.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * x);
    let fit = [
        0.170_872_77,
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
        -1.265_512_23,
    ];
    let sum = fit.into_iter().fold(0.0, |sum, coefficient| sum * t + coefficient);
    let upper = 0.5 * t * (sum - x * x).exp();
    if z > 0.0 { 1.0 - upper } else { upper }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cumulative_distribution_is_that_of_tables() {
        let known = [
            (0.0, 0.5),
            (1.0, 0.841_344_746),
            (-1.0, 0.158_655_254),
            (1.959_964, 0.975),
            (-3.0, 0.001_349_898),
            (-6.0, 9.865_876e-10),
        ];
        for (z, expected) in known {
            let found = cumulative(z);
            assert!((found / expected - 1.0).abs() < 1e-6, "{z}: {found}, not {expected}");
        }
    }

    #[test]
    fn probabilities_to_be_the_most_are_exact_where_they_are_known_and_sum_to_one() {
        let normal = |mean: f64, deviation: f64| Normal { mean, deviation };
        // Of two, the difference is normal.
        let two = [normal(0.3, 0.3), normal(0.1, 0.4)];
        let expected = cumulative(0.2 / 0.5);
        assert!((probability_of_most(0, &two) - expected).abs() < 1e-6);
        // Alike, certain, and far apart.
        let alike = [normal(1.0, 2.0); 5];
        assert!((probability_of_most(3, &alike) - 0.2).abs() < 1e-6);
        let certain = [normal(0.5, 0.0), normal(0.5, 0.0), normal(0.4, 0.1)];
        let first = probability_of_most(0, &certain);
        assert!((first - cumulative(1.0)).abs() < 1e-6, "{first}");
        assert_eq!(probability_of_most(1, &certain), 0.0, "the first of equals is first");
        for all in [
            vec![normal(0.0, 1.0), normal(0.5, 0.01), normal(0.2, 0.3), normal(-5.0, 0.1)],
            vec![normal(0.5, 0.0), normal(0.4, 0.2), normal(0.45, 0.001), normal(100.0, 80.0)],
        ] {
            let sum: f64 = (0..all.len()).map(|at| probability_of_most(at, &all)).sum();
            assert!((sum - 1.0).abs() < 2e-3, "{sum} of {all:?}");
        }
    }
}
