//! Steps with one result for all rows of a run, which are computed once.
//!
//! The candidates of a request share what is of the user and of the moment. Which steps read
//! nothing else is not told by the program but seen from the values. That costs a comparison of
//! rows, which ends at the first that differs. A row's result is the same to the bit whether a
//! step is computed once or for each row, so it never depends on the rows beside it.

use super::block::{OperandRows, OperandSources, step_block};
use super::{Operand, Program, ProgramFeed, ProgramStep, RowOperator};
use crate::cpu::isa::IsaKernel;
use crate::cpu::lanes::Lanes;

/// What was computed once.
pub(super) struct OnceResults {
    /// Where each step's result is in `values`; none for a step with a result for each row.
    places: Vec<Option<usize>>,
    values: Vec<f32>,
}

impl OnceResults {
    /// Without results yet, with room for those of all steps.
    fn with_room<O>(steps: &[ProgramStep<O>]) -> Self {
        let width = steps.iter().map(|step| step.width).sum();
        Self { places: Vec::with_capacity(steps.len()), values: Vec::with_capacity(width) }
    }

    /// The bytes of memory for a program of these steps, that of a result in the making included.
    pub(super) fn bytes<O>(steps: &[ProgramStep<O>]) -> u64 {
        let widest = steps.iter().map(|step| step.width).max().unwrap_or(0);
        let widths = steps.iter().map(|step| step.width as u64).fold(0, u64::saturating_add);
        let places = (steps.len() * size_of::<Option<usize>>()) as u64;
        widths.saturating_add(widest as u64).saturating_mul(4).saturating_add(places)
    }

    /// The result of a step as rows that repeat, if it has one for all rows.
    #[inline(always)]
    pub(super) fn of(&self, step: usize, width: usize) -> Option<OperandRows<'_>> {
        let place = (*self.places.get(step)?)?;
        Some(OperandRows { data: &self.values[place..][..width], width, stride: 0 })
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
        let (mut once, mut result) = (OnceResults::with_room(&program.steps), Vec::new());
        for step in &program.steps {
            if !is_same(step, &once, feed) {
                once.places.push(None);
                continue;
            }
            result.clear();
            result.resize(step.width, 0.0);
            let sources = OperandSources::of_first_row(program, feed, &once);
            step_block::<V, R>(step, &sources, &mut result);
            once.places.push(Some(once.values.len()));
            once.values.extend_from_slice(&result);
        }
        once
    }
}

/// Whether a step's result is the same in all rows of a run.
///
/// # Panics
/// If what the step reads of the run has another number of rows.
fn is_same(step: &ProgramStep, once: &OnceResults, feed: &ProgramFeed<'_>) -> bool {
    let is_same_operand = |operand: &Operand| match *operand {
        Operand::Constant { .. } => true,
        Operand::Value { step, .. } => once.has(step),
        Operand::Input { index, width } => {
            assert_eq!(feed.inputs[index].len(), feed.rows * width, "input {index} of the run");
            let read = match step.operator {
                RowOperator::Slice(from) => from..from + step.width,
                _ => 0..width,
            };
            let mut rows = feed.inputs[index].chunks_exact(width).map(|row| &row[read.clone()]);
            let first = rows.next().unwrap_or_default();
            // By their bits, since 1 divided by 0 and by -0 are not the same.
            rows.all(|row| row.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits()))
        }
    };
    let looks_up_the_same = match &step.operator {
        RowOperator::Lookup { index, bag, .. } => {
            assert_eq!(feed.indices[*index].len(), feed.rows * bag, "list {index} of the run");
            let mut rows = feed.indices[*index].chunks_exact(*bag);
            let first = rows.next();
            rows.all(|row| Some(row) == first)
        }
        _ => true,
    };
    looks_up_the_same && step.operands.iter().all(is_same_operand)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{BLOCK, Fold, Map, NO_ROW, Zip};
    use super::*;
    use crate::cpu::StridedRows;
    use crate::cpu::dense::Prepared;
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

    fn step(operator: RowOperator, operands: &[Operand], width: usize) -> ProgramStep {
        ProgramStep { operator, operands: operands.to_vec(), width }
    }

    /// Two inputs and a table's rows through operators of every kind, widths that are no multiples
    /// of a vector, and pairs of operands of which only one may be the same in all rows.
    fn program() -> Program {
        let input = |index, width| Operand::Input { index, width };
        let value = |step, width| Operand::Value { step, width };
        let constant = |index, width| Operand::Constant { index, width };
        let lookup = RowOperator::Lookup { table: Arc::new(noise(1, 5 * 16)), index: 0, bag: 2 };
        let parts = [value(0, 16), input(1, 3), value(1, 41), constant(0, 1)];
        let mut steps = vec![
            step(lookup, &[], 16),
            step(linear(2, [17, 41]), &[input(0, 17)], 41),
            step(RowOperator::Concat, &parts, 61),
            step(linear(4, [61, 27]), &[value(2, 61)], 27),
            step(RowOperator::Map(Map::Silu), &[value(3, 27)], 27),
            step(RowOperator::Slice(14), &[value(1, 41)], 27),
            step(RowOperator::Zip(Zip::Mul), &[value(4, 27), value(5, 27)], 27),
            step(
                RowOperator::Norm { epsilon: 1e-5 },
                &[value(6, 27), constant(1, 27), constant(0, 1)],
                27,
            ),
            step(RowOperator::Slice(1), &[input(1, 3)], 1),
            step(RowOperator::Select, &[value(8, 1), value(7, 27), value(5, 27)], 27),
            step(RowOperator::Map(Map::Abs), &[value(9, 27)], 27),
            step(RowOperator::Map(Map::Log), &[value(10, 27)], 27),
            step(RowOperator::Dot { weights: noise(6, 27), bias: 0.5 }, &[value(11, 27)], 1),
            step(RowOperator::Slice(0), &[input(0, 17)], 1),
            step(RowOperator::Zip(Zip::Div), &[constant(0, 1), value(13, 1)], 1),
            step(RowOperator::Softmax, &[value(6, 27)], 27),
            step(RowOperator::Zip(Zip::Max), &[value(15, 27), value(8, 1)], 27),
            step(RowOperator::Fold(Fold::Mean), &[value(16, 27)], 1),
        ];
        // One elementwise operator after the other, whose results are added to the mean.
        let maps = [
            Map::Exp,
            Map::Tanh,
            Map::Softplus,
            Map::Sqrt,
            Map::Sigmoid,
            Map::Relu,
            Map::Neg,
            Map::Clip(-0.5, 0.5),
        ];
        let mut last = 16;
        for map in maps {
            steps.push(step(RowOperator::Map(map), &[value(last, 27)], 27));
            last = steps.len() - 1;
        }
        steps.push(step(RowOperator::Fold(Fold::Sum), &[value(last, 27)], 1));
        let constants = vec![Arc::new(vec![0.25]), Arc::new(noise(8, 27))];
        let mut outputs = vec![value(12, 1), value(14, 1), constant(0, 1), value(17, 1)];
        outputs.push(value(steps.len() - 1, 1));
        Program::new(steps, constants, outputs)
    }

    /// The rows of a run, some of whose values are the same in all of them.
    #[derive(Clone)]
    struct Rows {
        inputs: [Vec<f32>; 2],
        list: Vec<u32>,
    }

    impl Rows {
        /// Whether the first input, the second and the list differ from row to row.
        fn new(rows: usize, differ: [bool; 3]) -> Self {
            let seed = |row: usize, differ: bool| if differ { row } else { 0 };
            let input = |at: usize, width: usize| {
                let row = |row: usize| noise(10 * at + seed(row, differ[at]), width);
                (0..rows).flat_map(row).collect()
            };
            let listed = |row: usize| [(seed(row, differ[2]) % 5) as u32, NO_ROW];
            Rows { inputs: [input(0, 17), input(1, 3)], list: (0..rows).flat_map(listed).collect() }
        }

        /// These rows, and one that shares nothing with them.
        fn and_another(mut self) -> Self {
            self.inputs[0].extend(noise(901, 17));
            self.inputs[1].extend(noise(902, 3));
            self.list.extend([4, 4]);
            self
        }

        fn with<T>(&self, use_feed: impl FnOnce(&ProgramFeed<'_>) -> T) -> T {
            let [first, second] = &self.inputs;
            let (inputs, indices) = ([&first[..], second], [&self.list[..]]);
            use_feed(&ProgramFeed { rows: second.len() / 3, inputs: &inputs, indices: &indices })
        }

        fn bits(&self, isa: Isa) -> Vec<u32> {
            let found = self.with(|feed| program().run(feed, isa));
            found.into_iter().map(f32::to_bits).collect()
        }
    }

    #[test]
    fn what_rows_share_changes_no_bit_of_them() {
        for isa in Isa::available() {
            for rows in [0, 1, 2, 7, 2 * BLOCK + 3] {
                for case in 0..8 {
                    let rows = Rows::new(rows, [case & 1, case & 2, case & 4].map(|bit| bit != 0));
                    let found = rows.bits(isa);
                    let beside_another = rows.and_another().bits(isa);
                    assert_eq!(found[..], beside_another[..found.len()], "{isa:?}, case {case}");
                }
            }
        }
    }

    #[test]
    fn what_rows_share_is_found() {
        let steps = |rows: &Rows| {
            let pass = |feed: &ProgramFeed<'_>| {
                Isa::best().checked().run(OncePass { program: &program(), feed })
            };
            let once = rows.with(pass);
            (0..program().steps.len()).filter(|step| once.has(*step)).collect::<Vec<_>>()
        };
        let all = (0..program().steps.len()).collect::<Vec<_>>();
        assert_eq!(steps(&Rows::new(5, [false; 3])), all);
        assert_eq!(steps(&Rows::new(5, [true, true, false])), [0]);
        assert_eq!(steps(&Rows::new(5, [false, true, true])), [1, 5, 13, 14]);
        assert!(steps(&Rows::new(5, [true; 3])).is_empty());
        // The last row counts as every other.
        let mut rows = Rows::new(5, [false; 3]);
        *rows.list.last_mut().unwrap() = 0;
        assert_eq!(steps(&rows), [1, 5, 8, 13, 14]);
    }

    #[test]
    fn zeros_of_two_signs_are_not_the_same() {
        let mut rows = Rows::new(2, [false; 3]);
        (rows.inputs[0][0], rows.inputs[0][17]) = (0.0, -0.0);
        let quotients = [f32::INFINITY, f32::NEG_INFINITY].map(f32::to_bits);
        let found = rows.bits(Isa::best());
        assert_eq!([found[1], found[6]], quotients);
    }
}
