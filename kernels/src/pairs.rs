//! Sums over the pairs of rows within a segment, such as pairwise ranking losses of a request.
//!
//! A pair is visited in a loop and its value is not kept, so memory grows with the rows and not
//! with their square; the backward pass visits the pairs again. The loops run on the host in f64,
//! whatever the backend: each row has one number in and out for thousands of pairs.

use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;

use crate::transfer::{download, upload};

/// A function of the difference of two rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairFunction {
    /// The difference itself.
    Identity,
    /// 1 above 0, else 0; without gradient.
    Step,
    /// ln(1 + e^x).
    Softplus,
    /// max(x, 0).
    Relu,
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// |x|.
    Abs,
}

impl PairFunction {
    /// Its value and its slope at `x`.
    pub fn at(self, x: f64) -> PairValue {
        let of = |value, slope| PairValue { value, slope };
        match self {
            PairFunction::Identity => of(x, 1.0),
            PairFunction::Step => of(if x > 0.0 { 1.0 } else { 0.0 }, 0.0),
            PairFunction::Softplus => of(x.max(0.0) + (-x.abs()).exp().ln_1p(), sigmoid(x)),
            PairFunction::Relu => of(x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
            PairFunction::Sigmoid => {
                let value = sigmoid(x);
                of(value, value * (1.0 - value))
            }
            PairFunction::Abs if x == 0.0 => of(0.0, 0.0),
            PairFunction::Abs => of(x.abs(), x.signum()),
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// A function's value and slope at a point.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PairValue {
    /// The value.
    pub value: f64,
    /// The derivative.
    pub slope: f64,
}

/// For each row i of a segment, the sum over its other rows j of the product over the columns c of
/// `functions[c](b[j, c] - a[i, c])`.
#[derive(Debug, Clone, PartialEq)]
pub struct PairSum {
    /// `[segments + 1]`, from 0: where each segment's rows begin.
    pub offsets: Arc<[u32]>,
    /// One for each column of `a` and `b`.
    pub functions: Vec<PairFunction>,
}

/// The two inputs of a [`PairSum`], `[rows, columns]` each, or their gradients.
#[derive(Debug, Clone)]
pub struct PairInputs<T> {
    /// Of the row that the sum is for.
    pub a: T,
    /// Of the other rows.
    pub b: T,
}

impl PairSum {
    /// The sums, one a row.
    ///
    /// # Panics
    /// If the inputs do not have a value for each row and function.
    pub fn forward(&self, PairInputs { a, b }: PairInputs<&[f32]>) -> Vec<f32> {
        let mut sums = vec![0.0; self.rows()];
        let mut factors = vec![PairValue::default(); self.functions.len()];
        self.each_pair([a, b], &mut factors, |[i, _], factors| {
            sums[i] += factors.iter().map(|factor| factor.value).product::<f64>();
        });
        sums.into_iter().map(|sum| sum as f32).collect()
    }

    /// The gradients of both inputs, given that of the sums.
    ///
    /// # Panics
    /// As [`PairSum::forward`].
    pub fn backward(
        &self,
        PairInputs { a, b }: PairInputs<&[f32]>,
        gradient: &[f32],
    ) -> PairInputs<Vec<f32>> {
        let width = self.functions.len();
        let mut by_a = vec![0.0; a.len()];
        let mut by_b = vec![0.0; b.len()];
        let mut factors = vec![PairValue::default(); width];
        self.each_pair([a, b], &mut factors, |[i, j], factors| {
            for column in (0..width).filter(|column| factors[*column].slope != 0.0) {
                let others = factors.iter().enumerate().filter(|(other, _)| *other != column);
                let others: f64 = others.map(|(_, factor)| factor.value).product();
                let slope = f64::from(gradient[i]) * others * factors[column].slope;
                by_a[i * width + column] -= slope;
                by_b[j * width + column] += slope;
            }
        });
        let rounded = |all: Vec<f64>| all.into_iter().map(|value| value as f32).collect();
        PairInputs { a: rounded(by_a), b: rounded(by_b) }
    }

    fn rows(&self) -> usize {
        self.offsets.last().map_or(0, |rows| *rows as usize)
    }

    /// Visits all pairs of different rows of a segment for which no step is 0: of the others,
    /// product and slopes are 0.
    fn each_pair(
        &self,
        [a, b]: [&[f32]; 2],
        factors: &mut [PairValue],
        mut visit: impl FnMut([usize; 2], &[PairValue]),
    ) {
        let width = self.functions.len();
        assert!(
            a.len() == b.len() && a.len() == self.rows() * width,
            "{} and {} values for {} rows of {width}",
            a.len(),
            b.len(),
            self.rows()
        );
        let steps = |column: &usize| self.functions[*column] == PairFunction::Step;
        let (first, later): (Vec<usize>, Vec<usize>) = (0..width).partition(steps);
        for segment in self.offsets.windows(2) {
            let rows = segment[0] as usize..segment[1] as usize;
            for i in rows.clone() {
                for j in rows.clone().filter(|j| *j != i) {
                    let at = |column: usize| {
                        let [b, a] = [b[j * width + column], a[i * width + column]].map(f64::from);
                        self.functions[column].at(b - a)
                    };
                    first.iter().for_each(|column| factors[*column] = at(*column));
                    if first.iter().all(|column| factors[*column].value != 0.0) {
                        later.iter().for_each(|column| factors[*column] = at(*column));
                        visit([i, j], factors);
                    }
                }
            }
        }
    }
}

/// [`PairSum::forward`] of tensors of any backend: `[rows, 1]`.
pub(crate) fn forward<B: Backend>(
    inputs: PairInputs<FloatTensor<B>>,
    pairs: &PairSum,
) -> FloatTensor<B> {
    let device = B::float_device(&inputs.a);
    let [a, b] = [inputs.a, inputs.b].map(download::<B>);
    upload::<B>(pairs.forward(PairInputs { a: &a, b: &b }), &[pairs.rows(), 1], &device)
}

/// [`PairSum::backward`] of tensors of any backend.
pub(crate) fn backward<B: Backend>(
    inputs: PairInputs<FloatTensor<B>>,
    gradient: FloatTensor<B>,
    pairs: &PairSum,
) -> PairInputs<FloatTensor<B>> {
    let (device, shape) = (B::float_device(&inputs.a), inputs.a.shape());
    let [a, b] = [inputs.a, inputs.b].map(download::<B>);
    let found = pairs.backward(PairInputs { a: &a, b: &b }, &download::<B>(gradient));
    let [a, b] = [found.a, found.b].map(|own| upload::<B>(own, shape.as_slice(), &device));
    PairInputs { a, b }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTIONS: [PairFunction; 6] = {
        use PairFunction::*;
        [Identity, Step, Softplus, Relu, Sigmoid, Abs]
    };

    #[test]
    fn slopes_are_central_differences() {
        for function in FUNCTIONS {
            for x in [-30.0, -1.3, -0.2, 0.4, 2.5, 700.0] {
                let expected = (function.at(x + 1e-5).value - function.at(x - 1e-5).value) / 2e-5;
                let found = function.at(x).slope;
                assert!((found - expected).abs() < 1e-6, "{function:?} at {x}: {found}");
            }
        }
    }

    #[test]
    fn a_row_is_paired_with_the_others_of_its_segment() {
        let functions = vec![PairFunction::Step, PairFunction::Identity];
        let pairs = PairSum { offsets: [0, 3, 3, 4].into(), functions };
        // A later row is above an earlier one; what it counts is in the second column of `b`.
        let a = [0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0];
        let b = [0.0, 1.0, 1.0, 10.0, 2.0, 100.0, 9.0, 1000.0];
        let sums = pairs.forward(PairInputs { a: &a, b: &b });
        assert_eq!(sums, [110.0, 100.0, 0.0, 0.0]);
        let slopes = pairs.backward(PairInputs { a: &a, b: &b }, &[1.0, 3.0, 7.0, 9.0]);
        assert_eq!(slopes.b, [0.0, 0.0, 0.0, 1.0, 0.0, 4.0, 0.0, 0.0]);
        assert_eq!(slopes.a, [0.0, -2.0, 0.0, -3.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
