//! Which requests go through a layer together, and where their rows are.
//!
//! A group's rows are those of its histories, then those of its targets: each
//! a range of the batch's, since requests are in order.

use std::ops::Range;
use std::sync::Arc;

use crate::attention::HstuAttention;

/// A group takes requests until it has this many rows: fewer, and tiles and panels are used badly.
const GROUP_ROWS: usize = 64;

/// A part takes groups until it has this many rows: fewer are not worth a thread.
const PART_ROWS: usize = 2048;

/// Some requests, with their layout.
pub(super) struct Group {
    /// Rows of the batch.
    history: Range<usize>,
    targets: Range<usize>,
    /// The group alone.
    pub(super) attention: HstuAttention,
    /// H where the output is the targets', else 0.
    skipped: usize,
}

impl Group {
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
        Group { history, targets, attention, skipped }
    }

    /// How many rows it has.
    pub(super) fn rows(&self) -> usize {
        self.history.len() + self.targets.len()
    }

    /// Its first row that has an output; all after it have one.
    pub(super) fn first_out(&self) -> usize {
        if self.attention.targets_only { self.history.len() } else { 0 }
    }

    /// The batch's row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> usize {
        match row.checked_sub(self.history.len()) {
            Some(target) => self.targets.start + target,
            None => self.history.start + row,
        }
    }

    /// The output's row.
    #[inline(always)]
    pub(super) fn out_row(&self, row: usize) -> usize {
        self.row(row) - self.skipped
    }
}

/// A batch's groups, by parts.
pub(super) fn parts(attention: &HstuAttention) -> Vec<Vec<Group>> {
    let (mut parts, mut part) = (Vec::new(), Vec::new());
    let (mut first, mut in_group, mut in_part) = (0, 0, 0);
    for b in 0..attention.requests() {
        let request = attention.request(b);
        in_group += request.history.len() + request.targets.len();
        let last = b + 1 == attention.requests();
        if in_group < GROUP_ROWS && !last {
            continue;
        }
        part.push(Group::new(attention, first..b + 1));
        (first, in_part, in_group) = (b + 1, in_part + in_group, 0);
        if in_part >= PART_ROWS || last {
            parts.push(std::mem::take(&mut part));
            in_part = 0;
        }
    }
    parts
}
