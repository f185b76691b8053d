//! The operators within the rows of each request.

use super::array::Array;
use super::tape::{Tape, Traced};
use super::{owner, reduce, span};
use crate::graph::{Fold, PairFunction};

/// Each row's request, folded.
pub(super) fn fold(tape: &Tape, offsets: &[u32], kind: Fold, x: &Array<Traced>) -> Array<Traced> {
    Array::fill(x.dims.clone(), |i| {
        let rows = span(offsets, owner(offsets, i[0]));
        reduce(tape, kind, &rows.map(|row| x.at(&[row, i[1]])).collect::<Vec<_>>())
    })
}

/// How many rows of its request are before each row, the largest first.
pub(super) fn rank(tape: &Tape, offsets: &[u32], x: &Array<Traced>) -> Array<Traced> {
    Array::fill(x.dims.clone(), |i| {
        let rows = span(offsets, owner(offsets, i[0])).filter(|row| *row != i[0]);
        let own = x.at(i);
        let before = |row: usize| {
            let other = x.at(&[row, i[1]]);
            tape.truth(other, own, |difference| difference > 0.0 || difference == 0.0 && row < i[0])
        };
        tape.sum(&rows.map(before).collect::<Vec<_>>())
    })
}

/// For each row, the sum over the others of its request of the product of functions.
pub(super) fn pair_sum(
    tape: &Tape,
    offsets: &[u32],
    functions: &[PairFunction],
    [a, b]: [&Array<Traced>; 2],
) -> Array<Traced> {
    Array::fill(vec![a.dims[0], 1], |i| {
        let rows = span(offsets, owner(offsets, i[0])).filter(|row| *row != i[0]);
        let product = |row: usize| {
            let factors = functions.iter().enumerate().map(|(column, of)| {
                pair_function(tape, *of, b.at(&[row, column]), a.at(&[i[0], column]))
            });
            let product = factors.reduce(|one, other| tape.product(one, other));
            product.expect("there is a function")
        };
        tape.sum(&rows.map(product).collect::<Vec<_>>())
    })
}

fn pair_function(tape: &Tape, function: PairFunction, b: Traced, a: Traced) -> Traced {
    let difference = tape.sub(b, a);
    match function {
        PairFunction::Identity => difference,
        PairFunction::Step => tape.truth(b, a, |difference| difference > 0.0),
        PairFunction::Softplus => tape.softplus(difference),
        PairFunction::Relu => tape.largest(&[difference, Traced::constant(0.0)]),
        PairFunction::Sigmoid => tape.sigmoid(difference),
        PairFunction::Abs => tape.abs(difference),
    }
}
