//! A number in f64 beside how far a computation of it in f32 may be off.
//!
//! Each operation adds what its operands' errors can do to its result, and its own rounding. So the
//! bound is as wide as the computation is ill-conditioned: it neither asks f32 for digits that it
//! cannot have, nor lets a mistake pass where it has them.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// Half the distance between 1 and the next f32.
pub(super) const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// The relative error of one operation on exact operands: 8 half units in the last place, for the
/// approximations of exp, log and their like.
const ROUNDING: f64 = 8.0 * UNIT;

/// The absolute error of each operation. Factors of smaller numbers may become 0 in f32.
const SMALLEST: f64 = 1e-30;

/// A value that is larger is unknown: f32 may not hold its square.
const LARGEST: f64 = 1e18;

/// A number and the bound of its f32 forms.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// The most that a computation in f32 may be off; infinite if nothing is known of it.
    pub error: f64,
}

impl Estimate {
    /// A number that f32 holds exactly.
    pub fn exact(value: f64) -> Self {
        Self { value, error: 0.0 }
    }

    /// Any number from `a` to `b`: what a comparison gives that rounding may turn.
    pub(super) fn between(a: f64, b: f64) -> Self {
        Self::computed(f64::midpoint(a, b), (a - b).abs() / 2.0, a.abs().max(b.abs()))
    }

    /// The result of one operation, with the error that its operands bring. The operation rounds
    /// numbers of the size `magnitude`.
    pub(super) fn computed(value: f64, error: f64, magnitude: f64) -> Self {
        let error = error + ROUNDING * magnitude + SMALLEST;
        let is_known = value.abs() + error < LARGEST;
        Self { value, error: if is_known { error } else { f64::INFINITY } }
    }

    /// Whether anything is known of its f32 forms.
    pub fn is_known(&self) -> bool {
        self.error < f64::INFINITY
    }

    /// Whether an implementation may give `found`.
    pub fn allows(&self, found: f32) -> bool {
        !self.is_known() || (f64::from(found) - self.value).abs() <= self.error
    }

    /// Whether rounding cannot turn the sign, and which it is.
    pub(super) fn sign(&self) -> Option<f64> {
        (self.value.abs() > self.error).then(|| self.value.signum())
    }

    /// A function that rises or falls everywhere. It rounds numbers of the size of its result plus
    /// `scale`.
    pub(super) fn monotone(self, function: impl Fn(f64) -> f64, scale: f64) -> Self {
        let value = function(self.value);
        let moved = |by: f64| (function(self.value + by) - value).abs();
        let error = match self.is_known() {
            true => moved(self.error).max(moved(-self.error)),
            false => f64::INFINITY,
        };
        Self::computed(value, error, value.abs() + scale)
    }
}

impl Add for Estimate {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let value = self.value + other.value;
        Self::computed(value, self.error + other.error, value.abs())
    }
}

impl Neg for Estimate {
    type Output = Self;

    fn neg(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

impl Sub for Estimate {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Estimate {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        let value = self.value * other.value;
        let error = self.value.abs() * other.error
            + other.value.abs() * self.error
            + self.error * other.error;
        Self::computed(value, error, value.abs())
    }
}

impl Div for Estimate {
    type Output = Self;

    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        let error = match other.sign() {
            Some(_) => (self.error + value.abs() * other.error) / (other.value.abs() - other.error),
            None => f64::INFINITY,
        };
        Self::computed(value, error, value.abs())
    }
}
