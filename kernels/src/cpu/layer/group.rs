//! Groups of requests that a layer processes together, and their rows.
//!
//! A group's rows are those of its histories, then those of its targets. Each is a range of the
//! batch's rows, because a group's requests are consecutive.

use std::ops::Range;
use std::sync::Arc;

use crate::attention::HstuAttention;

/// Requests are added to a group until it has this many rows, which use tiles and panels well.
const GROUP_ROWS: usize = 64;

/// Groups are added to a part until it has this many rows, which repay a thread.
const PART_ROWS: usize = 2048;

/// Consecutive requests, with their layout.
pub(super) struct RequestGroup {
    /// The group's rows in the batch.
    history: Range<usize>,
    targets: Range<usize>,
    /// The layout of the group alone.
    pub(super) attention: HstuAttention,
    /// H if the layer's output has only the targets' rows, else 0.
    skipped: usize,
}

impl RequestGroup {
    fn new(whole: &HstuAttention, requests: Range<usize>) -> Self {
        let rebased = |offsets: &[u32]| -> Arc<[u32]> {
            let ends = &offsets[requests.start..=requests.end];
            ends.iter().map(|end| end - ends[0]).collect()
        };
        let (first, last) = (whole.request(requests.start), whole.request(requests.end - 1));
        let (history, targets) =
            (first.history.start..last.history.end, first.targets.start..last.targets.end);
        let times = |times: &Arc<[i64]>| -> Arc<[i64]> {
            times[history.clone()].iter().chain(&times[targets.clone()]).copied().collect()
        };
        let attention = HstuAttention {
            history_offsets: rebased(&whole.history_offsets),
            target_offsets: rebased(&whole.target_offsets),
            times_s: whole.times_s.as_ref().map(times),
            ..whole.clone()
        };
        let skipped = if whole.targets_only { whole.history_rows() } else { 0 };
        RequestGroup { history, targets, attention, skipped }
    }

    /// The number of rows.
    pub(super) fn rows(&self) -> usize {
        self.history.len() + self.targets.len()
    }

    /// The first row with an output; all later ones have one too.
    pub(super) fn first_out(&self) -> usize {
        if self.attention.targets_only { self.history.len() } else { 0 }
    }

    /// The index in the batch of a row of the group.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> usize {
        match row.checked_sub(self.history.len()) {
            Some(target) => self.targets.start + target,
            None => self.history.start + row,
        }
    }

    /// The index in the layer's output of a row of the group.
    #[inline(always)]
    pub(super) fn out_row(&self, row: usize) -> usize {
        self.row(row) - self.skipped
    }
}

/// The groups of a batch, in parts that are each processed by one thread.
pub(super) fn parts(attention: &HstuAttention) -> Vec<Vec<RequestGroup>> {
    let (mut parts, mut part) = (Vec::new(), Vec::new());
    let (mut first, mut in_group, mut in_part) = (0, 0, 0);
    for b in 0..attention.requests() {
        let request = attention.request(b);
        in_group += request.history.len() + request.targets.len();
        let last = b + 1 == attention.requests();
        if in_group < GROUP_ROWS && !last {
            continue;
        }
        part.push(RequestGroup::new(attention, first..b + 1));
        (first, in_part, in_group) = (b + 1, in_part + in_group, 0);
        if in_part >= PART_ROWS || last {
            parts.push(std::mem::take(&mut part));
            in_part = 0;
        }
    }
    parts
}
