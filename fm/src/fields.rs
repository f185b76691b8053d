//! Categorical fields of a token: their columns, and the embedding of each.
//!
//! A field has one column and the row of its value; a field of several values has a column for
//! each, and the mean of their rows: zeros without any. This is the one definition for training and
//! serving.

use std::sync::Arc;

use burn::tensor::Tensor;
use hypercast_kernels::{
    attention::HstuBackend,
    embedding_bag::{EmbeddingBags, embedding_bag},
};

/// The index in a column of a field of several values that has none.
pub(crate) const ABSENT: u32 = u32::MAX;

/// The number of columns of each field.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FieldWidths(Vec<usize>);

/// A column of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FieldColumn {
    pub(crate) field: usize,
    /// Whether the field has others, so that 0 stands for no value.
    pub(crate) is_of_several: bool,
}

impl FieldWidths {
    /// Of fields with these numbers of columns, each at least 1.
    pub(crate) fn new(widths: impl IntoIterator<Item = usize>) -> FieldWidths {
        FieldWidths(widths.into_iter().collect())
    }

    /// The columns of all fields.
    pub(crate) fn columns(&self) -> Vec<FieldColumn> {
        let column = |(field, &width): (usize, &usize)| {
            std::iter::repeat_n(FieldColumn { field, is_of_several: width > 1 }, width)
        };
        self.0.iter().enumerate().flat_map(column).collect()
    }

    /// The embeddings `[places, fields * dim]` of the columns `[places, columns]`, which index
    /// `table` `[keys, dim]`, where the table is.
    pub(crate) fn embedded<B: HstuBackend>(
        &self,
        index: &[u32],
        table: &Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let ([keys, dim], fields) = (table.dims(), self.0.len());
        let bags = Arc::new(self.bags(index, keys));
        embedding_bag(table.clone(), &bags).reshape([bags.bags() / fields, fields * dim])
    }

    /// A bag for each field of each place, of its values' rows of a table with so many: the columns
    /// `[places, columns]` have the rows.
    fn bags(&self, index: &[u32], rows: usize) -> EmbeddingBags {
        if self.0.iter().all(|&width| width == 1) {
            return EmbeddingBags::of_one(rows, index.to_vec());
        }
        let (mut offsets, mut present_index) = (vec![0], Vec::with_capacity(index.len()));
        self.each(index, |_, values| {
            present_index.extend(present(values));
            offsets.push(present_index.len() as u32);
        });
        EmbeddingBags::new(rows, offsets, present_index)
    }

    /// The same of `rows` `[keys, dim]` on the host, with the numbers of each place,
    /// `[places, any]`, behind its embeddings.
    pub(crate) fn gather(
        &self,
        index: &[u32],
        rows: &[f32],
        dim: usize,
        numbers: &[f32],
    ) -> Vec<f32> {
        let row = |at: u32| &rows[at as usize * dim..][..dim];
        let places = index.len() / self.0.iter().sum::<usize>().max(1);
        let beside = numbers.len() / places.max(1);
        let mut flat = Vec::with_capacity(places * self.0.len() * dim + numbers.len());
        let mut numbers = numbers.chunks_exact(beside.max(1));
        self.each(index, |field, values| {
            match values {
                [one] => flat.extend_from_slice(row(*one)),
                several => {
                    let start = flat.len();
                    flat.resize(start + dim, 0.0);
                    let mean = &mut flat[start..];
                    let share = share_of(several);
                    for at in present(several) {
                        mean.iter_mut().zip(row(at)).for_each(|(mean, x)| *mean += share * x);
                    }
                }
            }
            if field + 1 == self.0.len() {
                flat.extend(numbers.next().into_iter().flatten());
            }
        });
        flat
    }

    /// Calls `take` with each field of each place, and its columns.
    fn each<'a>(&self, index: &'a [u32], mut take: impl FnMut(usize, &'a [u32])) {
        let mut rest = index;
        while !rest.is_empty() {
            for (field, &width) in self.0.iter().enumerate() {
                let (values, after) = rest.split_at(width);
                take(field, values);
                rest = after;
            }
        }
    }
}

/// The values in the columns of a field.
fn present(columns: &[u32]) -> impl Iterator<Item = u32> + '_ {
    columns.iter().copied().filter(|&at| at != ABSENT)
}

/// What each of the values counts in their mean.
fn share_of(columns: &[u32]) -> f32 {
    1.0 / present(columns).count().max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two places with a field of one value, one of up to three, and one of one.
    const INDEX: [u32; 10] = [0, 1, 2, 3, 4, 2, 3, ABSENT, ABSENT, 1];
    const DIM: usize = 2;

    fn widths() -> FieldWidths {
        FieldWidths::new([1, 3, 1])
    }

    fn rows() -> Vec<f32> {
        (0..5 * DIM).map(|at| (at as f32 * 0.37).sin()).collect()
    }

    /// The values of each field at each place.
    fn values() -> Vec<Vec<usize>> {
        vec![vec![0], vec![1, 2, 3], vec![4], vec![2], vec![3], vec![1]]
    }

    #[test]
    fn an_embedding_is_the_mean_of_the_rows_of_its_values() {
        let rows = rows();
        let expected = values().into_iter().flat_map(|values| {
            let rows = &rows;
            (0..DIM).map(move |at| {
                let cells = values.iter().map(|value| f64::from(rows[value * DIM + at]));
                cells.sum::<f64>() / values.len() as f64
            })
        });
        let found = widths().gather(&INDEX, &rows, DIM, &[]);
        assert_eq!(found.len(), 6 * DIM);
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} is not {expected}");
        }
        let none = FieldWidths::new([2]).gather(&[ABSENT, ABSENT], &rows, DIM, &[]);
        assert_eq!(none, [0.0; DIM], "zeros without a value");
    }

    #[test]
    fn bags_have_the_same_embeddings() {
        let rows = rows();
        let bags = widths().bags(&INDEX, 5);
        assert_eq!(bags.forward(&rows, DIM), widths().gather(&INDEX, &rows, DIM, &[]));
        let one = FieldWidths::new([1, 1]).bags(&[4, 2, 0, 0], 5);
        assert_eq!((one.offsets(), one.index()), (None, &[4, 2, 0, 0][..]));
    }

    #[test]
    fn columns_know_their_field() {
        let fields: Vec<_> =
            widths().columns().iter().map(|of| (of.field, of.is_of_several)).collect();
        assert_eq!(fields, [(0, false), (1, true), (1, true), (1, true), (2, false)]);
    }
}
