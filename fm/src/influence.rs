//! Bounds what the outcomes of one request can teach.
//!
//! A user who likes all of 8 candidates, where the model expects one like in 30, teaches as many
//! false likes as 30 honest requests teach true ones. No range tells false likes from true ones,
//! but their number does: the sum of a task's errors over a request, which is the gradient of the
//! prediction's bias, is more than chance explains. The loss of such a request is weighted down to
//! what chance explains. One or two surprises are never too many, however rare the action is. A
//! regression has no such sum; the ranges of the schema bound its labels. All is computed where the
//! predictions are, so that a backward pass need not wait until the host has them.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use hypercast_kernels::{
    attention::HstuBackend,
    embedding_bag::{EmbeddingBags, embedding_bag},
};

/// How unlikely errors are that count in full, as -ln of their probability: about 1 in 1000.
const SURPRISE: f32 = 7.0;

/// How probable predictions found some labels, `[rows, tasks]` each: 0 where a row does not count.
pub(crate) struct Surprise<B: HstuBackend> {
    /// Labels less probabilities.
    pub(crate) errors: Tensor<B, 2>,
    /// Of the labels, if the probabilities are true.
    pub(crate) variances: Tensor<B, 2>,
}

impl<B: HstuBackend> Surprise<B> {
    /// The factor of each row's loss, `[rows, tasks]`: 1 for what chance explains, else the
    /// greatest error of its request that counts in full over the request's error. Request r has
    /// the rows from `request_offsets[r]` to `request_offsets[r + 1]`.
    ///
    /// Bernstein's inequality: a sum of independent errors with variance V exceeds t with a
    /// probability of at most exp(-t² / (2V + 2t/3)).
    pub(crate) fn factors(self, request_offsets: &[u32]) -> Tensor<B, 2> {
        let [rows, tasks] = self.errors.dims();
        let (device, requests) = (self.errors.device(), request_offsets.len() - 1);
        let sizes = request_offsets.windows(2).map(|ends| ends[1] - ends[0]);
        let request_of = (0..).zip(sizes.clone()).flat_map(|(at, size)| vec![at; size as usize]);
        let to_rows = EmbeddingBags::of_one(requests, request_of.collect());
        let of_rows = (0..rows as u32).collect();
        let to_requests = EmbeddingBags::new(rows, request_offsets.to_vec(), of_rows);

        let sizes: Vec<f32> = sizes.map(|size| size as f32).collect();
        let sizes = Tensor::<B, 2>::from_data(TensorData::new(sizes, [requests, 1]), &device);
        let both = Tensor::cat(vec![self.errors, self.variances], 1);
        let sums = embedding_bag(both, &Arc::new(to_requests)) * sizes;
        let errors = sums.clone().slice([0..requests, 0..tasks]).abs();
        let variances = sums.slice([0..requests, tasks..2 * tasks]);
        let most = (variances * (2.0 * SURPRISE) + (SURPRISE / 3.0).powi(2)).sqrt();
        let most = most + SURPRISE / 3.0;
        embedding_bag(most.clone() / errors.max_pair(most), &Arc::new(to_rows))
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;

    /// The factors of requests with these numbers of positive rows, of rows, and their prediction.
    fn of(requests: &[(usize, usize, f32)]) -> Vec<f32> {
        let (mut offsets, mut errors, mut variances) = (vec![0], Vec::new(), Vec::new());
        for &(positives, rows, prediction) in requests {
            let label = |row| if row < positives { 1.0 } else { 0.0 };
            errors.extend((0..rows).map(|row| label(row) - prediction));
            variances.extend((0..rows).map(|_| prediction * (1.0 - prediction)));
            offsets.push(errors.len() as u32);
        }
        let column = |values: Vec<f32>| {
            let shape = [values.len(), 1];
            Tensor::<Flex, 2>::from_data(TensorData::new(values, shape), &Default::default())
        };
        let surprise = Surprise { errors: column(errors), variances: column(variances) };
        let rows = surprise.factors(&offsets).into_data().to_vec::<f32>().unwrap();
        for ends in offsets.windows(2) {
            let own = &rows[ends[0] as usize..ends[1] as usize];
            assert!(own.iter().all(|factor| *factor == own[0]), "one for each request: {own:?}");
        }
        offsets[..offsets.len() - 1].iter().map(|&first| rows[first as usize]).collect()
    }

    #[test]
    fn what_chance_explains_counts_in_full() {
        for prediction in [1e-6, 0.03, 0.5, 0.97] {
            assert_eq!(of(&[(1, 1, prediction), (0, 8, prediction.min(0.5))]), [1.0; 2]);
        }
        assert_eq!(of(&[(4, 32, 1e-6)]), [1.0], "a few are never too many");
        assert_eq!(of(&[(8, 8, 0.5), (24, 32, 0.5)]), [1.0; 2]);
    }

    #[test]
    fn more_errors_than_chance_explains_are_bounded_on_both_sides() {
        for factor in of(&[(32, 32, 0.03), (0, 32, 0.97)]) {
            // Of 31 errors, with a variance of 0.93.
            assert!((factor * 31.0 - 6.65).abs() < 0.05, "{factor}");
        }
        let many = |rows: usize| of(&[(rows, rows, 0.5)])[0] * rows as f32 / 2.0;
        assert!(many(512) < 2.1 * many(128), "they grow as the root of the rows");
    }
}
