//! The ops within the rows of a request, and what training knows of these rows, as methods of
//! `Tensor` and `Graph`. No op leads from one request to another.

use crate::graph::{Graph, Tensor, attribute};
use crate::ops::describe;
use crate::raw::types::Value;
use crate::shape::{Dim, Shape};

/// A function of the difference of two rows of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairwiseFunction {
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

/// What training knows of the rows of a task. Losses alone may read it: the host refuses a network
/// with an output that depends on it.
impl Graph {
    /// The labels of a task, `[rows, 1]`: 0 or 1, or a regression's label on the scale on which the
    /// network predicts it. 0 where [`Graph::mask`] is.
    pub fn label(&self, task: &str) -> Tensor<'_> {
        self.outcome("Label", task)
    }

    /// 1 for rows of the task's sample space, `[rows, 1]`; 0 for others and for what `sample`
    /// drops.
    pub fn mask(&self, task: &str) -> Tensor<'_> {
        self.outcome("Mask", task)
    }

    /// The loss weights of a task, `[rows, 1]`; 0 where [`Graph::mask`] is.
    pub fn weight(&self, task: &str) -> Tensor<'_> {
        self.outcome("Weight", task)
    }

    /// What the host adds to the output of a binary task before it is a logit: the log odds of the
    /// base rate, `[rows, 1]`. A loss that reads output and label reads it, too.
    pub fn base_logit(&self, task: &str) -> Tensor<'_> {
        self.outcome("BaseLogit", task)
    }

    fn outcome(&self, op: &str, task: &str) -> Tensor<'_> {
        if !self.tasks().iter().any(|known| known.name == task) {
            return self.fail(&format!("{op} of `{task}`, which is not in the description"));
        }
        let task = attribute("task", Value::Text(task.into()));
        self.push(op, &[], &[task], Shape::rows(1))
    }
}

impl<'g> Tensor<'g> {
    /// The sum over the rows of each request, given to each of them: `[rows, d]`.
    pub fn segment_sum(self) -> Tensor<'g> {
        self.segment("SegmentSum")
    }

    /// The mean over the rows of each request, given to each of them.
    pub fn segment_mean(self) -> Tensor<'g> {
        self.segment("SegmentMean")
    }

    /// The maximum over the rows of each request, given to each of them.
    pub fn segment_max(self) -> Tensor<'g> {
        self.segment("SegmentMax")
    }

    /// How many rows of its request come before each, the largest first; without gradient.
    pub fn segment_rank(self) -> Tensor<'g> {
        self.segment("SegmentRank")
    }

    /// The logarithm of the softmax over the rows of each request of which `mask`, of the same
    /// shape, is 1. Others, where it is 0, have no share of it.
    pub fn segment_log_softmax(self, mask: Tensor<'g>) -> Tensor<'g> {
        // In the place of a row that does not count the lowest is never above those that do.
        let lowest = -(-self).segment_max().stop_gradient();
        let scores = self.where_or(mask, lowest);
        let shifted = scores - scores.segment_max().stop_gradient();
        shifted - (shifted.exp() * mask).segment_sum().log()
    }

    /// For each row i, the sum over the other rows j of its request of the product over the columns
    /// of `functions[c](others[j, c] - self[i, c])`: `[rows, d]` and `[rows, d]` to `[rows, 1]`.
    pub fn segment_pair_sum(
        self,
        others: Tensor<'g>,
        functions: &[PairwiseFunction],
    ) -> Tensor<'g> {
        let shape = Shape::rows(functions.len() as u32);
        if self.shape() != shape || others.shape() != shape || self.is_ids() || others.is_ids() {
            return self.mismatch("SegmentPairSum", others, "both must have a column a function");
        }
        let names = functions.iter().map(|function| format!("{function:?}")).collect();
        let functions = attribute("functions", Value::Texts(names));
        self.graph().push("SegmentPairSum", &[self, others], &[functions], Shape::rows(1))
    }

    fn segment(self, op: &str) -> Tensor<'g> {
        let shape = self.shape();
        match shape.dims() {
            [Dim::Rows, Dim::Fixed(_)] if !self.is_ids() => {
                self.graph().push(op, &[self], &[], shape)
            }
            _ => self.graph().fail(&format!("{op} of {}: it takes [rows, d]", describe(self))),
        }
    }
}
