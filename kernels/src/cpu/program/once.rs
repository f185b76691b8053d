//! What all rows of a run share, which is computed once: results of steps, and the part of a
//! product whose columns are the same in all rows.
//!
//! The candidates of a request share what is of the user and of the moment. Which columns those are
//! is not told by the program but seen from the values. That costs a comparison of rows, which ends
//! at the first that differs. A product's shared columns are summed before its others, so a row's
//! result can differ by rounding when other rows stand beside it. Columns of an input that are the
//! same in all rows beside some that are not are not looked for.

use std::ops::Range;

use super::block::{OperandRows, OperandSources, step_block};
use super::{Operand, Program, ProgramFeed, ProgramStep, RowOperator};
use crate::cpu::StridedRows;
use crate::cpu::dense::{PANEL, Prepared};
use crate::cpu::isa::IsaKernel;
use crate::cpu::lanes::Lanes;
use crate::cpu::product::{Activation, Factor, Matrix, TileBase, multiply_columns};

/// Columns from which a product's share is computed once: fewer cost no more in each row.
const SHARED_FROM: usize = 16;

/// What was computed once.
#[derive(Default)]
pub(super) struct OnceResults {
    /// Where each step's result is in `values`; none for a step with a result for each row.
    places: Vec<Option<usize>>,
    values: Vec<f32>,
    /// What the rows share of each step's result; none where that is nothing, or everything.
    products: Vec<Option<SharedProduct>>,
}

/// A product whose columns are in part the same in all rows.
pub(super) struct SharedProduct {
    /// One row: the bias, and the product of those columns.
    pub(super) sum: Matrix,
    /// The other columns, in ascending order.
    pub(super) own: Vec<Range<usize>>,
}

impl OnceResults {
    /// The result of a step as rows that repeat, if it has one for all rows.
    #[inline(always)]
    pub(super) fn of(&self, step: usize, width: usize) -> Option<OperandRows<'_>> {
        let place = (*self.places.get(step)?)?;
        Some(OperandRows { data: &self.values[place..][..width], width, stride: 0 })
    }

    /// What the rows of a product share.
    #[inline(always)]
    pub(super) fn product(&self, step: usize) -> Option<&SharedProduct> {
        self.products[step].as_ref()
    }

    /// Whether a step has one result for all rows.
    #[inline(always)]
    pub(super) fn has(&self, step: usize) -> bool {
        self.places.get(step).is_some_and(Option::is_some)
    }
}

/// Computes what a run needs once.
pub(super) struct OncePass<'a> {
    pub(super) program: &'a Program,
    pub(super) feed: &'a ProgramFeed<'a>,
}

impl IsaKernel for OncePass<'_> {
    type Output = OnceResults;

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) -> OnceResults {
        let OncePass { program, feed } = self;
        let (mut once, mut result) = (OnceResults::default(), Vec::new());
        for (at, step) in program.steps.iter().enumerate() {
            if is_same(step, &once, feed) {
                once.products.push(None);
                result.clear();
                result.resize(step.width, 0.0);
                let sources = OperandSources::of_first_row(program, feed, &once);
                step_block::<V, R>(at, step, &sources, &mut result);
                once.places.push(Some(once.values.len()));
                once.values.extend_from_slice(&result);
            } else {
                let product = shared_product::<V, R>(step, program, &once);
                once.products.push(product);
                once.places.push(None);
            }
        }
        once
    }
}

/// Whether a step's result is the same in all rows of a run.
fn is_same(step: &ProgramStep, once: &OnceResults, feed: &ProgramFeed<'_>) -> bool {
    let columns = |input: &Operand| match (&step.operator, input) {
        (RowOperator::Slice(from), Operand::Input { .. }) => *from..*from + step.width,
        (_, input) => 0..input.width(),
    };
    let same = |operand: &Operand| match *operand {
        Operand::Constant { .. } => true,
        Operand::Value { step, .. } => once.has(step),
        Operand::Input { index, width } => {
            let (columns, mut rows) = (columns(operand), feed.inputs[index].chunks_exact(width));
            let first = rows.next().map(|row| &row[columns.clone()]).unwrap_or_default();
            // By their bits, since 1 divided by 0 and by -0 are not the same.
            let same = |row: &[f32]| row.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits());
            rows.all(|row| same(&row[columns.clone()]))
        }
    };
    let looked_up = match &step.operator {
        RowOperator::Lookup { index, bag, .. } => {
            let mut rows = feed.indices[*index].chunks_exact(*bag);
            let first = rows.next();
            rows.all(|row| Some(row) == first)
        }
        _ => true,
    };
    looked_up && step.operands.iter().all(same)
}

/// The columns of a product, by whether they are the same in all rows.
#[derive(Default)]
struct SplitColumns {
    /// The values of the first row, with 0 where rows differ.
    values: Vec<f32>,
    shared: Vec<Range<usize>>,
    own: Vec<Range<usize>>,
}

impl SplitColumns {
    /// Appends the columns of an operand; those of a concatenation part by part.
    fn add(&mut self, operand: Operand, program: &Program, once: &OnceResults) {
        let (start, width) = (self.values.len(), operand.width());
        let (columns, values) = match operand {
            Operand::Constant { index, .. } => (&mut self.shared, &program.constants[index][..]),
            Operand::Value { step, .. } => match once.of(step, width) {
                Some(rows) => (&mut self.shared, rows.row(0)),
                None if matches!(program.steps[step].operator, RowOperator::Concat) => {
                    let parts = &program.steps[step].operands;
                    return parts.iter().for_each(|part| self.add(*part, program, once));
                }
                None => (&mut self.own, &[][..]),
            },
            Operand::Input { .. } => (&mut self.own, &[][..]),
        };
        self.values.extend_from_slice(values);
        self.values.resize(start + width, 0.0);
        match columns.last_mut() {
            Some(last) if last.end == start => last.end += width,
            _ => columns.push(start..start + width),
        }
    }
}

/// What the rows of a product share, if that is worth it.
#[inline(always)]
fn shared_product<V: Lanes, const R: usize>(
    step: &ProgramStep,
    program: &Program,
    once: &OnceResults,
) -> Option<SharedProduct> {
    let RowOperator::Linear(weights) = &step.operator else { return None };
    let mut columns = SplitColumns::default();
    columns.add(step.operands[0], program, once);
    let SplitColumns { values, shared, own } = columns;
    let count: usize = shared.iter().map(Range::len).sum();
    (count >= SHARED_FROM).then(|| {
        let mut sum = Matrix::default();
        sum.resize(1, weights.to);
        product_row::<V, R>(&values, &shared, weights, &mut sum);
        SharedProduct { sum, own }
    })
}

/// The product of some columns of one row, and the bias.
#[inline(always)]
fn product_row<V: Lanes, const R: usize>(
    row: &[f32],
    columns: &[Range<usize>],
    weights: &Prepared,
    sum: &mut Matrix,
) {
    let data = StridedRows { data: row, stride: row.len() };
    let (factor, panels) = (Factor { data, rows: 0..1, first: 0 }, 0..weights.to.div_ceil(PANEL));
    let (base, none) = (TileBase::Bias, Activation::None);
    multiply_columns::<V, R>(&factor, columns, weights, panels, base, none, |_, panel, values| {
        sum.row_mut(0)[panel * PANEL..][..PANEL].copy_from_slice(values);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{BLOCK, NO_ROW, Zip};
    use super::*;
    use crate::cpu::isa::Isa;

    /// Values between -1 and 1 that look random.
    fn noise(seed: usize, count: usize) -> Vec<f32> {
        let value = |at: usize| ((seed * 7919 + at) as u32).wrapping_mul(2_654_435_761) >> 8;
        (0..count).map(|at| value(at) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn linear(seed: usize, [from, to]: [usize; 2]) -> RowOperator {
        let weights = StridedRows { data: &noise(seed, from * to), stride: to };
        RowOperator::Linear(Prepared::new(weights, [from, to], &noise(seed + 1, to)))
    }

    /// Two inputs and a table's rows, side by side, through two products and a quotient. Column 0
    /// of the first input is apart as well.
    fn program() -> Program {
        let input = |index, width| Operand::Input { index, width };
        let value = |step, width| Operand::Value { step, width };
        let constant = Operand::Constant { index: 0, width: 1 };
        let lookup = RowOperator::Lookup { table: Arc::new(noise(1, 5 * 16)), index: 0, bag: 2 };
        let step = |operator, operands: &[Operand], width| ProgramStep {
            operator,
            operands: operands.to_vec(),
            width,
        };
        let parts = [value(0, 16), input(1, 3), value(1, 20), constant];
        let steps = vec![
            step(lookup, &[], 16),
            step(linear(2, [17, 20]), &[input(0, 17)], 20),
            step(RowOperator::Concat, &parts, 40),
            step(linear(4, [40, 24]), &[value(2, 40)], 24),
            step(RowOperator::Dot { weights: noise(6, 24), bias: 0.5 }, &[value(3, 24)], 1),
            step(RowOperator::Slice(0), &[input(0, 17)], 1),
            step(RowOperator::Zip(Zip::Div), &[constant, value(5, 1)], 1),
        ];
        Program::new(steps, vec![Arc::new(vec![0.25])], vec![value(4, 1), value(6, 1)])
    }

    /// The rows of a run. Each of the first input, the second and the list is the same in all rows,
    /// or differs in the last one, or in all.
    struct Rows {
        inputs: [Vec<f32>; 2],
        list: Vec<u32>,
    }

    impl Rows {
        fn new(rows: usize, differ: [usize; 3]) -> Self {
            let seed = |row: usize, differ: usize| match differ {
                0 => 0,
                1 => usize::from(row + 1 == rows),
                _ => row,
            };
            let input = |at: usize, width: usize| {
                let row = |row: usize| noise(10 * at + seed(row, differ[at]), width);
                (0..rows).flat_map(row).collect()
            };
            let listed = |row: usize| [(seed(row, differ[2]) % 5) as u32, NO_ROW];
            Rows { inputs: [input(0, 17), input(1, 3)], list: (0..rows).flat_map(listed).collect() }
        }

        fn run(&self, isa: Isa) -> Vec<f32> {
            let [first, second] = &self.inputs;
            let (inputs, indices) = ([&first[..], second], [&self.list[..]]);
            let rows = second.len() / 3;
            program().run(&ProgramFeed { rows, inputs: &inputs, indices: &indices }, isa)
        }
    }

    #[test]
    fn rows_that_share_columns_are_computed_as_each_is_alone() {
        for isa in Isa::available() {
            for rows in [1, 2, 7, 2 * BLOCK + 3] {
                for case in 0..27 {
                    let all = Rows::new(rows, [case % 3, case / 3 % 3, case / 9]);
                    let found = all.run(isa);
                    let [first, second] = &all.inputs;
                    let alone = |row: usize| Rows {
                        inputs: [&first[17 * row..][..17], &second[3 * row..][..3]]
                            .map(<[f32]>::to_vec),
                        list: all.list[2 * row..][..2].to_vec(),
                    };
                    let expected: Vec<f32> =
                        (0..rows).flat_map(|row| alone(row).run(isa)).collect();
                    assert_eq!(found.len(), expected.len());
                    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let error = (found - expected).abs();
                        assert!(
                            error <= 1e-5 * (1.0 + expected.abs()),
                            "{isa:?}, case {case}, {rows} rows, value {at}: {found}, {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_of_two_signs_are_not_the_same() {
        let mut rows = Rows::new(2, [0, 2, 2]);
        rows.inputs[0][0] = 0.0;
        rows.inputs[0][17] = -0.0;
        let found = rows.run(Isa::best());
        assert_eq!([found[1], found[3]], [f32::INFINITY, f32::NEG_INFINITY]);
    }

    #[test]
    fn what_rows_share_is_found() {
        let rows = 5;
        let found = |differ: [usize; 3]| {
            let all = Rows::new(rows, differ);
            let [first, second] = &all.inputs;
            let (inputs, indices) = ([&first[..], second], [&all.list[..]]);
            let feed = &ProgramFeed { rows, inputs: &inputs, indices: &indices };
            let once = Isa::best().checked().run(OncePass { program: &program(), feed });
            let own = once.product(3).map(|product| product.own.iter().cloned().flatten());
            let own: Vec<usize> = own.into_iter().flatten().collect();
            ((0..7).map(|step| once.has(step)).collect::<Vec<_>>(), own)
        };
        let (steps, own) = found([0, 0, 0]);
        assert!(steps.iter().all(|once| *once) && own.is_empty());
        // The table's rows differ in the last row only.
        let (steps, own) = found([0, 0, 1]);
        assert_eq!(steps, [false, true, false, false, false, true, true]);
        assert_eq!(own, (0..19).collect::<Vec<_>>());
        let (steps, own) = found([2, 2, 0]);
        assert_eq!(steps, [true, false, false, false, false, false, false]);
        assert_eq!(own, (16..39).collect::<Vec<_>>());
        let (steps, own) = found([2, 2, 2]);
        assert!(!steps.contains(&true) && own.is_empty());
    }
}
