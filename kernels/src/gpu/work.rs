//! What each workgroup of a launch does: a small list made on the host and
//! uploaded with the times of the tokens.
//!
//! All that depends on the layout alone is decided here, once a launch: which
//! rows belong together, which tiles of keys a block of queries sees and which
//! the window lets it skip. The kernels decide only what is visible within a tile.

use std::cmp::Reverse;

use crate::attention::{HstuAttention, Request, Window};

/// Rows of a tile of scores, and its columns.
pub(super) const TILE: usize = 64;

/// Words of an item of either list.
pub(super) const WORDS: usize = 10;

/// A word that the kernels read: row numbers and counts fit 32 bits, as the offsets do.
fn word(value: usize) -> u32 {
    u32::try_from(value).expect("rows are numbered by u32 offsets")
}

/// A block of up to [`TILE`] queries, and the tiles of keys it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueryItem {
    pub(super) first: usize,
    pub(super) count: usize,
    /// The first query's position; its successors' are `step` apart.
    pub(super) position: usize,
    /// 1 for history tokens, 0 for targets, which also see themselves.
    pub(super) step: usize,
    /// The first row of the request's history.
    pub(super) history: usize,
    /// History keys at this position and later are seen by no query of the block.
    pub(super) end: usize,
    /// Tiles of history keys before those that are skipped,
    pub(super) before: usize,
    /// those that are skipped,
    pub(super) skipped: usize,
    /// and all that are not, with the targets' own tile, which comes last.
    pub(super) tiles: usize,
}

/// A block of up to [`TILE`] keys, and the queries that may see one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyItem {
    pub(super) first: usize,
    pub(super) count: usize,
    /// The first key's position.
    pub(super) position: usize,
    /// 1 for keys of the history, 0 for targets, which only they themselves see.
    pub(super) step: usize,
    /// The first row of the request's history.
    pub(super) history: usize,
    /// The history tokens that see a key of the block are at positions `from..to`.
    pub(super) from: usize,
    pub(super) to: usize,
    /// The targets that do are these rows.
    pub(super) first_target: usize,
    pub(super) targets: usize,
    /// The length of the history.
    pub(super) n: usize,
}

/// What is uploaded of an item.
pub(super) trait Words {
    /// Its fields in their order.
    fn words(&self) -> [u32; WORDS];
}

impl Words for QueryItem {
    fn words(&self) -> [u32; WORDS] {
        let Self { first, count, position, step, history, end, before, skipped, tiles } = *self;
        [first, count, position, step, history, end, before, skipped, tiles, 0].map(word)
    }
}

impl Words for KeyItem {
    fn words(&self) -> [u32; WORDS] {
        let Self { first, count, position, step, history, from, to, first_target, targets, n } =
            *self;
        [first, count, position, step, history, from, to, first_target, targets, n].map(word)
    }
}

impl KeyItem {
    /// How many queries see a key of the block, at most.
    fn queries(&self) -> usize {
        self.to - self.from + self.targets
    }
}

/// Every block of queries, the one with most to do first, so that none is left for the end.
pub(super) fn query_items(shape: &HstuAttention) -> Vec<QueryItem> {
    let mut items = Vec::new();
    for request in (0..shape.requests()).map(|b| shape.request(b)) {
        let n = request.history.len();
        for first in request.history.clone().step_by(TILE) {
            let count = TILE.min(request.history.end - first);
            let position = first - request.history.start;
            let end = if shape.targets_only { 0 } else { position + count };
            items.push(queries(shape.window, &request, [first, count, position, 1, end]));
        }
        for first in request.targets.clone().step_by(TILE) {
            let count = TILE.min(request.targets.end - first);
            items.push(queries(shape.window, &request, [first, count, n, 0, n]));
        }
    }
    items.sort_by_key(|item| Reverse(item.tiles));
    items
}

fn queries(
    window: Option<Window>,
    request: &Request,
    [first, count, position, step, end]: [usize; 5],
) -> QueryItem {
    let all = end.div_ceil(TILE);
    // What the window hides from the first query it hides from at most some of the others' keys:
    // the hidden range only grows at its end with the position.
    let hidden = window.map_or(0..0, |window| {
        window.global..(position + 1).saturating_sub(window.recent).min(end)
    });
    let before = hidden.start.div_ceil(TILE).min(all);
    let skipped = (hidden.end / TILE).saturating_sub(before);
    let tiles = all - skipped + usize::from(step == 0);
    let history = request.history.start;
    QueryItem { first, count, position, step, history, end, before, skipped, tiles }
}

/// Every block of keys, the one with most to do first.
pub(super) fn key_items(shape: &HstuAttention) -> Vec<KeyItem> {
    let mut items = Vec::new();
    for request in (0..shape.requests()).map(|b| shape.request(b)) {
        let (n, history) = (request.history.len(), request.history.start);
        for first in request.history.clone().step_by(TILE) {
            let count = TILE.min(request.history.end - first);
            let from = first - history;
            // The last position from which the last key of the block is still seen, plus one.
            let reach = shape.window.map_or(usize::MAX, |window| {
                let far = (from + count - 1).saturating_add(window.recent);
                if from < window.global { usize::MAX } else { far }
            });
            let to = if shape.targets_only { from } else { n.min(reach) };
            let targets = if n < reach { request.targets.len() } else { 0 };
            let first_target = request.targets.start;
            items.push(KeyItem {
                first,
                count,
                position: from,
                step: 1,
                history,
                from,
                to,
                first_target,
                targets,
                n,
            });
        }
        for first in request.targets.clone().step_by(TILE) {
            let count = TILE.min(request.targets.end - first);
            items.push(KeyItem {
                first,
                count,
                position: n,
                step: 0,
                history,
                from: 0,
                to: 0,
                first_target: first,
                targets: count,
                n,
            });
        }
    }
    items.sort_by_key(|item| Reverse(item.queries()));
    items
}

/// The words to upload: the items, then, where times are given, the lower halves of all times and
/// their upper halves.
pub(super) fn upload(items: &[impl Words], times_s: Option<&[i64]>) -> Vec<u32> {
    let mut words: Vec<u32> = items.iter().flat_map(Words::words).collect();
    if let Some(times) = times_s {
        // Flipping the sign bit keeps every distance and makes the order that of unsigned numbers.
        let unsigned = |time: &i64| (*time as u64) ^ (1 << 63);
        words.extend(times.iter().map(|time| unsigned(time) as u32));
        words.extend(times.iter().map(|time| (unsigned(time) >> 32) as u32));
    }
    words
}
