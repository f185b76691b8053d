//! Arithmetic on estimates that remembers how each result depends on its operands, so that one pass
//! backwards gives all derivatives, with the error of an f32 form of each.

use std::cell::RefCell;

use super::estimate::{Estimate, UNIT};

/// A number of a computation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traced {
    /// Its place on the tape; none if no derivative passes it.
    at: Option<usize>,
    pub(super) estimate: Estimate,
}

/// The dependence of a result on an operand.
struct Edge {
    operand: usize,
    slope: Estimate,
}

/// All results that depend on a leaf, in the order of their computation.
#[derive(Default)]
pub(super) struct Tape {
    edges: RefCell<Vec<Edge>>,
    /// For each result, the end of its edges.
    ends: RefCell<Vec<usize>>,
}

/// A sum in any order.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    value: f64,
    error: f64,
    magnitude: f64,
    terms: usize,
}

impl Sum {
    fn push(&mut self, term: Estimate) {
        self.value += term.value;
        self.error += term.error;
        self.magnitude += term.value.abs();
        self.terms += 1;
    }

    fn total(self) -> Estimate {
        let rounding = UNIT * self.terms as f64 * self.magnitude;
        Estimate::computed(self.value, self.error + rounding, self.value.abs())
    }
}

impl FromIterator<Estimate> for Sum {
    fn from_iter<T: IntoIterator<Item = Estimate>>(terms: T) -> Sum {
        let mut sum = Sum::default();
        terms.into_iter().for_each(|term| sum.push(term));
        sum
    }
}

impl Traced {
    /// A number without derivatives.
    pub(super) fn constant(value: f64) -> Traced {
        Traced { at: None, estimate: Estimate::exact(value) }
    }

    /// The same number, through which no derivative passes.
    pub(super) fn detached(self) -> Traced {
        Traced { at: None, ..self }
    }
}

impl Tape {
    /// A number of which derivatives are asked.
    pub(super) fn leaf(&self, value: f64) -> Traced {
        let mut ends = self.ends.borrow_mut();
        ends.push(self.edges.borrow().len());
        Traced { at: Some(ends.len() - 1), estimate: Estimate::exact(value) }
    }

    fn result(
        &self,
        estimate: Estimate,
        slopes: impl IntoIterator<Item = (Traced, Estimate)>,
    ) -> Traced {
        let mut edges = self.edges.borrow_mut();
        let before = edges.len();
        let edge = |(of, slope): (Traced, Estimate)| of.at.map(|operand| Edge { operand, slope });
        edges.extend(slopes.into_iter().filter_map(edge));
        if edges.len() == before {
            return Traced { at: None, estimate };
        }
        let mut ends = self.ends.borrow_mut();
        ends.push(edges.len());
        Traced { at: Some(ends.len() - 1), estimate }
    }

    /// The derivative of the sum of results times their seeds, by each number on the tape. What no
    /// derivative reaches has the derivative 0 times its own slopes, as tensors compute it.
    pub(super) fn derivatives(&self, seeds: impl Iterator<Item = (Traced, f64)>) -> Derivatives {
        let (edges, ends) = (self.edges.borrow(), self.ends.borrow());
        let mut sums = vec![Sum::default(); ends.len()];
        for (of, seed) in seeds {
            if let Some(at) = of.at {
                sums[at].push(Estimate::exact(seed));
            }
        }
        for at in (0..ends.len()).rev() {
            let start = if at == 0 { 0 } else { ends[at - 1] };
            let derivative = sums[at].total();
            for edge in &edges[start..ends[at]] {
                sums[edge.operand].push(derivative * edge.slope);
            }
        }
        Derivatives(sums)
    }

    pub(super) fn sum(&self, terms: &[Traced]) -> Traced {
        let sum: Sum = terms.iter().map(|term| term.estimate).collect();
        self.result(sum.total(), terms.iter().map(|term| (*term, Estimate::exact(1.0))))
    }

    pub(super) fn mean(&self, terms: &[Traced]) -> Traced {
        self.scaled(self.sum(terms), 1.0 / terms.len() as f64)
    }

    /// The sum of products.
    pub(super) fn dot(&self, pairs: &[(Traced, Traced)]) -> Traced {
        let sum: Sum = pairs.iter().map(|(a, b)| a.estimate * b.estimate).collect();
        let slopes = pairs.iter().flat_map(|(a, b)| [(*a, b.estimate), (*b, a.estimate)]);
        self.result(sum.total(), slopes)
    }

    pub(super) fn product(&self, a: Traced, b: Traced) -> Traced {
        self.dot(&[(a, b)])
    }

    /// The product with a number that f32 rounds.
    pub(super) fn scaled(&self, x: Traced, by: f64) -> Traced {
        let by = Estimate::computed(by, 0.0, by.abs());
        self.result(x.estimate * by, [(x, by)])
    }

    pub(super) fn add(&self, a: Traced, b: Traced) -> Traced {
        self.sum(&[a, b])
    }

    pub(super) fn sub(&self, a: Traced, b: Traced) -> Traced {
        self.add(a, self.neg(b))
    }

    pub(super) fn neg(&self, x: Traced) -> Traced {
        self.result(-x.estimate, [(x, Estimate::exact(-1.0))])
    }

    pub(super) fn quotient(&self, a: Traced, b: Traced) -> Traced {
        let (x, y) = (a.estimate, b.estimate);
        let by_divisor = -(x / (y * y));
        self.result(x / y, [(a, Estimate::exact(1.0) / y), (b, by_divisor)])
    }

    /// The largest of some numbers. The derivative passes to the one that is largest, to any share
    /// where rounding decides.
    pub(super) fn largest(&self, all: &[Traced]) -> Traced {
        let estimates = || all.iter().map(|x| x.estimate);
        let value = estimates().map(|x| x.value).fold(f64::NEG_INFINITY, f64::max);
        let error = estimates().map(|x| x.error).fold(0.0, f64::max);
        let least = estimates().map(|x| x.value - x.error).fold(f64::NEG_INFINITY, f64::max);
        // A number of which nothing is known may be the largest.
        let may_be = |x: &Estimate| !x.is_known() || x.value + x.error >= least;
        let is_decided = estimates().filter(may_be).count() == 1;
        let slope = |x: &Traced| match (may_be(&x.estimate), is_decided) {
            (false, _) => Estimate::exact(0.0),
            (true, true) => Estimate::exact(1.0),
            (true, false) => Estimate::between(0.0, 1.0),
        };
        self.result(Estimate { value, error }, all.iter().map(|x| (*x, slope(x))))
    }

    pub(super) fn smallest(&self, all: &[Traced]) -> Traced {
        let negated: Vec<Traced> = all.iter().map(|x| self.neg(*x)).collect();
        self.neg(self.largest(&negated))
    }

    pub(super) fn clip(&self, x: Traced, min: f64, max: f64) -> Traced {
        let raised = self.largest(&[x, Traced::constant(min)]);
        self.smallest(&[raised, Traced::constant(max)])
    }

    /// `a` where `c` is not 0, else `b`; either where rounding decides.
    pub(super) fn select(&self, c: Traced, a: Traced, b: Traced) -> Traced {
        let (one, zero) = (Estimate::exact(1.0), Estimate::exact(0.0));
        let chosen = if c.estimate.value == 0.0 { b } else { a };
        if c.estimate.sign().is_some() {
            self.result(a.estimate, [(a, one), (b, zero)])
        } else if c.estimate == zero {
            self.result(b.estimate, [(a, zero), (b, one)])
        } else {
            let apart = (a.estimate.value - b.estimate.value).abs();
            let error = apart + a.estimate.error + b.estimate.error;
            let either = Estimate::between(0.0, 1.0);
            let estimate = Estimate::computed(chosen.estimate.value, error, 0.0);
            self.result(estimate, [(a, either), (b, either)])
        }
    }

    /// 1 if `test` holds for the difference, else 0; either where rounding decides.
    pub(super) fn truth(&self, a: Traced, b: Traced, test: impl Fn(f64) -> bool) -> Traced {
        let truth = f64::from(u8::from(test(a.estimate.value - b.estimate.value)));
        let apart = (a.estimate.value - b.estimate.value).abs();
        let error = a.estimate.error + b.estimate.error;
        let is_decided = error == 0.0 || apart > error;
        let error = if is_decided { 0.0 } else { 1.0 };
        Traced { at: None, estimate: Estimate { value: truth, error } }
    }

    pub(super) fn abs(&self, x: Traced) -> Traced {
        let Estimate { value, error } = x.estimate;
        let slope = match x.estimate.sign() {
            Some(sign) => Estimate::exact(sign),
            None => Estimate::between(-1.0, 1.0),
        };
        self.result(Estimate { value: value.abs(), error }, [(x, slope)])
    }

    pub(super) fn exp(&self, x: Traced) -> Traced {
        let exp = x.estimate.monotone(f64::exp, 0.0);
        self.result(exp, [(x, exp)])
    }

    /// The logarithm of a number that is not below `least`, not in f32 either.
    pub(super) fn ln(&self, x: Traced, least: f64) -> Traced {
        let ln = x.estimate.monotone(|x| x.max(least).ln(), 1.0);
        self.result(ln, [(x, Estimate::exact(1.0) / x.estimate)])
    }

    /// The root of a number that is not negative, not in f32 either.
    pub(super) fn sqrt(&self, x: Traced) -> Traced {
        let sqrt = x.estimate.monotone(|x| x.max(0.0).sqrt(), 0.0);
        self.result(sqrt, [(x, Estimate::exact(0.5) / sqrt)])
    }

    pub(super) fn sigmoid(&self, x: Traced) -> Traced {
        let sigmoid = x.estimate.monotone(sigmoid, 1.0);
        self.result(sigmoid, [(x, sigmoid * (Estimate::exact(1.0) - sigmoid))])
    }

    pub(super) fn silu(&self, x: Traced) -> Traced {
        self.product(x, self.sigmoid(x))
    }

    pub(super) fn tanh(&self, x: Traced) -> Traced {
        let tanh = x.estimate.monotone(f64::tanh, 1.0);
        self.result(tanh, [(x, Estimate::exact(1.0) - tanh * tanh)])
    }

    pub(super) fn softplus(&self, x: Traced) -> Traced {
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let slope = x.estimate.monotone(sigmoid, 1.0);
        self.result(x.estimate.monotone(softplus, 1.0), [(x, slope)])
    }

    /// x times the share of a standard normal distribution below it.
    pub(super) fn gelu(&self, x: Traced) -> Traced {
        let below = |x: f64| 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
        let squared = x.estimate * x.estimate;
        let density = |x: f64| (-x / 2.0).exp() / std::f64::consts::TAU.sqrt();
        let slope = squared.monotone(density, 0.0);
        let below = self.result(x.estimate.monotone(below, 1.0), [(x, slope)]);
        self.product(x, below)
    }
}

/// The derivatives of a computation.
pub(super) struct Derivatives(Vec<Sum>);

impl Derivatives {
    /// That by a leaf.
    pub(super) fn by(&self, leaf: Traced) -> Estimate {
        leaf.at.map_or(Estimate::exact(0.0), |at| self.0[at].total())
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The error function: its Taylor series near 0, a continued fraction of its complement elsewhere.
fn erf(x: f64) -> f64 {
    if x.abs() > 2.0 {
        let fraction = (1..=100).rev().fold(x.abs(), |rest, k| x.abs() + f64::from(k) / 2.0 / rest);
        let complement = (-x * x).exp() / std::f64::consts::PI.sqrt() / fraction;
        return x.signum() * (1.0 - complement);
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..60 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_has_the_digits_of_tables() {
        for (x, expected) in [
            (0.5, 0.520_499_877_813_046_5),
            (1.9, 0.992_790_429_235_257_5),
            (-2.5, -0.999_593_047_982_555),
            (30.0, 1.0),
        ] {
            assert!((erf(x) - expected).abs() < 1e-14, "{x}: {}", erf(x));
        }
    }

    #[test]
    fn a_bound_is_as_wide_as_rounding_makes_it() {
        let tape = Tape::default();
        let (a, b) = (tape.leaf(3.0), tape.leaf(-3.0));
        let one = tape.product(a, b);
        assert!(one.estimate.error > 9.0 * UNIT && one.estimate.error < 1e-5);
        // What cancels keeps the error of what it cancels.
        let nothing = tape.add(one, tape.product(a, a));
        assert!(nothing.estimate.error > 9.0 * UNIT && nothing.estimate.allows(1e-6));
        assert!(!nothing.estimate.allows(1e-4) && !nothing.estimate.allows(f32::NAN));
        // Rounding decides which of two equal numbers is the largest.
        let largest = tape.largest(&[tape.product(a, a), tape.neg(one)]);
        let derivatives = tape.derivatives([(largest, 1.0)].into_iter());
        let by = derivatives.by(a);
        assert!((3.0..6.1).contains(&by.error), "{by:?}");
        assert!(!tape.quotient(one, nothing).estimate.is_known());
    }
}
