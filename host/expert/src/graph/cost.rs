//! What running a graph costs, known before it is admitted.

use super::{Lead, Op, Shape};

/// Floating-point operations: a multiply and an add count two, any other
/// arithmetic one an element. Attention counts the full short history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// For each candidate.
    pub per_row: u64,
    /// For each event of the short history.
    pub per_history: u64,
    /// Once a batch, on parameters alone.
    pub fixed: u64,
}

impl Cost {
    /// What one candidate takes of a request that shares a full short history, and the parameters' own arithmetic, with 19
    /// others: what is held against `GraphLimits::flops_per_candidate`.
    pub fn per_candidate(&self, history_len: u32) -> u64 {
        let history = self.per_history.saturating_mul(u64::from(history_len));
        self.per_row.saturating_add(history.saturating_add(self.fixed) / 20)
    }

    /// Adds one node's cost.
    pub(super) fn add(&mut self, op: &Op, inputs: &[&Shape], result: &Shape, history_len: u32) {
        let history = u64::from(history_len);
        let count = |shape: &Shape| shape.row_elements() as u64;
        let elements = count(result);
        match op {
            // Both halves of the joint attention: Q K^T and A V.
            Op::HstuAttention { .. } => {
                let width = elements;
                self.per_row = self
                    .per_row
                    .saturating_add(4u64.saturating_mul(width).saturating_mul(history + 1));
                return;
            }
            // Causal: half of the pairs.
            Op::HstuHistory { .. } => {
                let width = elements;
                self.per_history = self
                    .per_history
                    .saturating_add(2u64.saturating_mul(width).saturating_mul(history + 1));
                return;
            }
            Op::Pool(_) => {
                self.per_history = self.per_history.saturating_add(elements);
                return;
            }
            _ => {}
        }
        let flops = match op {
            Op::Input { .. } | Op::Parameter { .. } | Op::Constant { .. } | Op::StopGradient => 0,
            // Moving values is not arithmetic, and dropout is not served.
            Op::Concat { .. } | Op::Slice { .. } | Op::Reshape { .. } | Op::Transpose { .. } => 0,
            Op::Gather | Op::Cast | Op::Dropout { .. } => 0,
            Op::MatMul => 2u64.saturating_mul(elements).saturating_mul(inputs[1].dims[0] as u64),
            Op::EmbeddingBag => elements.saturating_mul(inputs[1].dims[0] as u64),
            Op::LayerNormalization { .. } => elements.saturating_mul(8),
            Op::Softmax { .. } => elements.saturating_mul(4),
            Op::Reduce { .. } => count(inputs[0]),
            _ => elements,
        };
        let bucket = match result.lead {
            Some(Lead::Rows) => &mut self.per_row,
            Some(Lead::History) => &mut self.per_history,
            None => &mut self.fixed,
        };
        *bucket = bucket.saturating_add(flops);
    }
}
