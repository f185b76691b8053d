//! Embedding bags as one op: of each bag the mean of its rows of a table, zeros without any.
//!
//! The table holds the distinct rows of a batch, so each crosses to a device once, however many
//! tokens have it. The gradient of a row is a sum over the bags that it is in, in the order of the
//! bags: no atomics, and the same result each time.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata};

use crate::attention::{HstuBackend, primitive, tensor};
use crate::transfer::{download, upload};

/// Which rows of a table are in each bag.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingBags {
    rows: usize,
    /// `[bags + 1]`, from 0: where each bag's rows begin in `index`; none if each bag has one row.
    offsets: Option<Vec<u32>>,
    index: Vec<u32>,
}

/// For each row of a table, the bags that it is in.
#[derive(Debug, Clone, PartialEq)]
pub struct BagsByRow {
    /// `[rows + 1]`, from 0: where each row's bags begin in `bags`.
    pub offsets: Vec<u32>,
    /// In ascending order for each row.
    pub bags: Vec<u32>,
}

impl EmbeddingBags {
    /// Bags of a table of so many rows, each of one row: `index` has one for each bag.
    ///
    /// # Panics
    /// If an index is beyond the rows.
    pub fn of_one(rows: usize, index: Vec<u32>) -> EmbeddingBags {
        EmbeddingBags { rows, offsets: None, index }.checked()
    }

    /// Bags of a table of so many rows: bag b has the rows `index[offsets[b]..offsets[b + 1]]`.
    ///
    /// # Panics
    /// If an index is beyond the rows, or the offsets are not those of `index`.
    pub fn new(rows: usize, offsets: Vec<u32>, index: Vec<u32>) -> EmbeddingBags {
        EmbeddingBags { rows, offsets: Some(offsets), index }.checked()
    }

    fn checked(self) -> EmbeddingBags {
        assert!(self.index.iter().all(|&row| (row as usize) < self.rows), "a row of the table");
        if let Some(offsets) = &self.offsets {
            let ends = [offsets.first(), offsets.last()].map(|end| end.map(|&end| end as usize));
            assert_eq!(ends, [Some(0), Some(self.index.len())], "the offsets are of the index");
            assert!(offsets.is_sorted(), "the offsets ascend");
        }
        self
    }

    /// The number of rows of the table.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of bags.
    pub fn bags(&self) -> usize {
        self.offsets.as_ref().map_or(self.index.len(), |offsets| offsets.len() - 1)
    }

    /// Where each bag's rows begin, `[bags + 1]`; none if each bag has one row.
    pub fn offsets(&self) -> Option<&[u32]> {
        self.offsets.as_deref()
    }

    /// The rows of all bags, one after the other.
    pub fn index(&self) -> &[u32] {
        &self.index
    }

    /// The means `[bags, dim]`, given the `table` `[rows, dim]`.
    ///
    /// # Panics
    /// If the table has another number of rows.
    pub fn forward(&self, table: &[f32], dim: usize) -> Vec<f32> {
        assert_eq!(table.len(), self.rows * dim, "a table of {} rows", self.rows);
        let row = |at: u32| &table[at as usize * dim..][..dim];
        let mut means = Vec::with_capacity(self.bags() * dim);
        self.each(|rows| match rows {
            [one] => means.extend_from_slice(row(*one)),
            several => {
                let start = means.len();
                means.resize(start + dim, 0.0);
                for &at in several {
                    let share = share_of(several);
                    let mean = means[start..].iter_mut();
                    mean.zip(row(at)).for_each(|(mean, x)| *mean += share * x);
                }
            }
        });
        means
    }

    /// The gradient of the table, `[rows, dim]`, given that of the means.
    ///
    /// # Panics
    /// If the gradient has another number of bags.
    pub fn backward(&self, gradient: &[f32], dim: usize) -> Vec<f32> {
        assert_eq!(gradient.len(), self.bags() * dim, "a gradient of {} bags", self.bags());
        let mut table = vec![0.0; self.rows * dim];
        let mut parts = gradient.chunks_exact(dim);
        self.each(|rows| {
            let part = parts.next().expect("one for each bag");
            for &at in rows {
                let share = share_of(rows);
                let row = table[at as usize * dim..][..dim].iter_mut();
                row.zip(part).for_each(|(sum, g)| *sum += share * g);
            }
        });
        table
    }

    /// The same the other way round.
    pub fn by_row(&self) -> BagsByRow {
        let mut offsets = vec![0; self.rows + 1];
        self.index.iter().for_each(|&row| offsets[row as usize + 1] += 1);
        (0..self.rows).for_each(|row| offsets[row + 1] += offsets[row]);
        let mut next = offsets.clone();
        let mut bags = vec![0; self.index.len()];
        let mut bag = 0;
        self.each(|rows| {
            for &row in rows {
                let place = &mut next[row as usize];
                bags[*place as usize] = bag;
                *place += 1;
            }
            bag += 1;
        });
        BagsByRow { offsets, bags }
    }

    /// Calls `take` with the rows of each bag.
    fn each<'a>(&'a self, mut take: impl FnMut(&'a [u32])) {
        match &self.offsets {
            None => self.index.iter().for_each(|row| take(std::slice::from_ref(row))),
            Some(offsets) => offsets
                .windows(2)
                .for_each(|ends| take(&self.index[ends[0] as usize..ends[1] as usize])),
        }
    }
}

/// What each of the rows counts in their mean.
fn share_of(rows: &[u32]) -> f32 {
    1.0 / rows.len() as f32
}

/// The op on tensors: `[bags, dim]`, given the table `[rows, dim]`.
///
/// # Panics
/// If the table has another number of rows than the bags were made for.
pub fn embedding_bag<B: HstuBackend>(
    table: Tensor<B, 2>,
    bags: &Arc<EmbeddingBags>,
) -> Tensor<B, 2> {
    assert_eq!(table.dims()[0], bags.rows(), "the table of the bags");
    tensor(B::embedding_bag(primitive(table), bags.clone()))
}

/// [`EmbeddingBags::forward`] on the host, of tensors of any backend.
pub(crate) fn forward<B: Backend>(table: FloatTensor<B>, bags: &EmbeddingBags) -> FloatTensor<B> {
    let (device, dim) = (B::float_device(&table), table.shape()[1]);
    upload::<B>(bags.forward(&download::<B>(table), dim), &[bags.bags(), dim], &device)
}

/// [`EmbeddingBags::backward`] on the host, of tensors of any backend.
pub(crate) fn backward<B: Backend>(
    gradient: FloatTensor<B>,
    bags: &EmbeddingBags,
) -> FloatTensor<B> {
    let (device, dim) = (B::float_device(&gradient), gradient.shape()[1]);
    upload::<B>(bags.backward(&download::<B>(gradient), dim), &[bags.rows(), dim], &device)
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::tensor::TensorData;
    use burn_flex::Flex;

    use super::*;

    const DIM: usize = 2;

    /// Bags of 1, 3, 1, 0 and 2 rows; row 4 is in two, row 5 in none.
    fn bags() -> EmbeddingBags {
        EmbeddingBags::new(6, vec![0, 1, 4, 5, 5, 7], vec![0, 1, 2, 4, 4, 3, 1])
    }

    fn waves(count: usize) -> Vec<f32> {
        (0..count).map(|at| (at as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn a_bag_is_the_mean_of_its_rows_and_zeros_without_any() {
        let table = waves(6 * DIM);
        let found = bags().forward(&table, DIM);
        let bags: [&[usize]; 5] = [&[0], &[1, 2, 4], &[4], &[], &[3, 1]];
        for (at, rows) in bags.iter().enumerate() {
            for column in 0..DIM {
                let sum: f64 = rows.iter().map(|row| f64::from(table[row * DIM + column])).sum();
                let expected = sum / rows.len().max(1) as f64;
                assert!((f64::from(found[at * DIM + column]) - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_sum_of_products() {
        let (table, weights) = (waves(6 * DIM), waves(5 * DIM));
        let value = |table: &[f32]| -> f64 {
            let means = bags().forward(table, DIM);
            means.iter().zip(&weights).map(|(mean, w)| f64::from(*mean) * f64::from(*w)).sum()
        };
        let device = Default::default();
        let tracked = |values: &[f32], rows| {
            let data = TensorData::new(values.to_vec(), [rows, DIM]);
            Tensor::<Autodiff<Flex>, 2>::from_data(data, &device)
        };
        let leaf = tracked(&table, 6).require_grad();
        let means = embedding_bag(leaf.clone(), &Arc::new(bags()));
        let gradients = (means * tracked(&weights, 5)).sum().backward();
        let found: Vec<f32> = leaf.grad(&gradients).unwrap().into_data().to_vec().unwrap();
        for at in 0..table.len() {
            let moved = |by: f32| {
                let mut table = table.clone();
                table[at] += by;
                value(&table)
            };
            let expected = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!((f64::from(found[at]) - expected).abs() < 1e-5, "at {at}");
        }
    }

    #[test]
    fn bags_of_one_row_need_no_offsets() {
        let index = vec![3, 0, 3, 5];
        let (one, several) = (
            EmbeddingBags::of_one(6, index.clone()),
            EmbeddingBags::new(6, vec![0, 1, 2, 3, 4], index),
        );
        let (table, gradient) = (waves(6 * DIM), waves(4 * DIM));
        assert_eq!(one.forward(&table, DIM), several.forward(&table, DIM));
        assert_eq!(one.backward(&gradient, DIM), several.backward(&gradient, DIM));
        assert_eq!(one.by_row(), several.by_row());
        let BagsByRow { offsets, bags } = one.by_row();
        assert_eq!((&offsets[..], &bags[..]), (&[0, 1, 1, 1, 3, 3, 4][..], &[1, 0, 2, 3][..]));
    }
}
