//! Work items, one per workgroup of a launch: a small list that the CPU computes and uploads with
//! the times of the tokens.
//!
//! Everything that depends only on the layout is computed here, once per layout: which rows form a
//! block, which tiles of keys a block of queries sees, and which of them the window hides. The
//! kernels decide only what is visible within a tile.

use std::cmp::Reverse;

use crate::attention::{AttentionWindow, HstuAttention, RequestRows};

/// Rows and columns of a tile of scores of the kernels without tensor cores.
pub(super) const TILE: usize = 64;

/// The size of a kernel's tiles of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Queries per block, or keys in the kernel that goes by keys.
    pub(super) rows: usize,
    /// Keys per tile, or queries in the kernel that goes by keys.
    pub(super) columns: usize,
}

impl Tiling {
    /// The tiling of the kernels without tensor cores.
    pub(super) const SQUARE: Tiling = Tiling { rows: TILE, columns: TILE };
}

/// Words per item of either list.
pub(super) const WORDS: usize = 10;

/// A word that the kernels read: row numbers and counts fit 32 bits, as the offsets do.
fn word(value: usize) -> u32 {
    u32::try_from(value).expect("rows are numbered by u32 offsets")
}

/// A block of queries, and the tiles of keys that it sees.
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
    /// No query of the block sees history keys at this position or later.
    pub(super) end: usize,
    /// The number of tiles of history keys before the skipped ones.
    pub(super) before: usize,
    /// The number of skipped tiles.
    pub(super) skipped: usize,
    /// The number of tiles that are not skipped, including the targets' own tiles, which come last.
    pub(super) tiles: usize,
}

/// A block of keys, and the queries that may see one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyItem {
    pub(super) first: usize,
    pub(super) count: usize,
    /// The first key's position.
    pub(super) position: usize,
    /// 1 for history keys, 0 for targets, which only they themselves see.
    pub(super) step: usize,
    /// The first row of the request's history.
    pub(super) history: usize,
    /// The history tokens that see a key of the block are at positions `from..to`.
    pub(super) from: usize,
    pub(super) to: usize,
    /// The rows of the targets that see a key of the block.
    pub(super) first_target: usize,
    pub(super) targets: usize,
    /// The length of the history.
    pub(super) n: usize,
}

/// A work item in the form that is uploaded.
pub(super) trait Words {
    /// The fields in their order.
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
    /// The most queries that may see a key of the block.
    fn queries(&self) -> usize {
        self.to - self.from + self.targets
    }
}

/// All blocks of queries, those with the most work first, so that no long one runs last.
pub(super) fn query_items(shape: &HstuAttention, tiling: Tiling) -> Vec<QueryItem> {
    let mut items = Vec::new();
    for request in (0..shape.requests()).map(|b| shape.request(b)) {
        let n = request.history.len();
        for first in request.history.clone().step_by(tiling.rows) {
            let count = tiling.rows.min(request.history.end - first);
            let position = first - request.history.start;
            let end = if shape.targets_only { 0 } else { position + count };
            let block = [first, count, position, 1, end];
            items.push(queries(shape.window, &request, tiling.columns, block));
        }
        for first in request.targets.clone().step_by(tiling.rows) {
            let count = tiling.rows.min(request.targets.end - first);
            items.push(queries(shape.window, &request, tiling.columns, [first, count, n, 0, n]));
        }
    }
    items.sort_by_key(|item| Reverse(item.tiles));
    items
}

fn queries(
    window: Option<AttentionWindow>,
    request: &RequestRows,
    columns: usize,
    [first, count, position, step, end]: [usize; 5],
) -> QueryItem {
    let all = end.div_ceil(columns);
    // What the window hides from the first query it hides from at most some of the others' keys:
    // the hidden range only grows at its end with the position.
    let hidden = window.map_or(0..0, |window| {
        window.global..(position + 1).saturating_sub(window.recent).min(end)
    });
    let before = hidden.start.div_ceil(columns).min(all);
    let skipped = (hidden.end / columns).saturating_sub(before);
    let own = if step == 0 { count.div_ceil(columns) } else { 0 };
    let tiles = all - skipped + own;
    let history = request.history.start;
    QueryItem { first, count, position, step, history, end, before, skipped, tiles }
}

/// All blocks of keys, those with the most work first.
pub(super) fn key_items(shape: &HstuAttention, tiling: Tiling) -> Vec<KeyItem> {
    let mut items = Vec::new();
    for request in (0..shape.requests()).map(|b| shape.request(b)) {
        let (n, history) = (request.history.len(), request.history.start);
        for first in request.history.clone().step_by(tiling.rows) {
            let count = tiling.rows.min(request.history.end - first);
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
        for first in request.targets.clone().step_by(tiling.rows) {
            let count = tiling.rows.min(request.targets.end - first);
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

/// The words to upload: the items, then, if there are times, the lower halves of all times and
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(requests: &[(u32, u32)], window: Option<AttentionWindow>) -> HstuAttention {
        let offsets = |length: fn(&(u32, u32)) -> u32| {
            let ends = requests.iter().scan(0, move |end, request| {
                *end += length(request);
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect()
        };
        HstuAttention {
            history_offsets: offsets(|request| request.0),
            target_offsets: offsets(|request| request.1),
            heads: 1,
            alpha: 1.0,
            norm: 1.0,
            window,
            targets_only: false,
            times_s: None,
        }
    }

    /// Pairs (query row, key row) of an item's tiles, as the kernel walks them.
    fn pairs_of_queries(item: &QueryItem, columns: usize) -> Vec<(usize, usize)> {
        let rows = item.first..item.first + item.count;
        let own = if item.step == 0 { item.count.div_ceil(columns) } else { 0 };
        let tiles = 0..item.tiles - own;
        let tiles = tiles.map(|tile| if tile < item.before { tile } else { tile + item.skipped });
        let keys = tiles.flat_map(|tile| tile * columns..item.end.min((tile + 1) * columns));
        let keys: Vec<usize> = keys.map(|key| item.history + key).collect();
        rows.flat_map(|row| keys.iter().map(move |key| (row, *key))).collect()
    }

    fn pairs_of_keys(item: &KeyItem) -> Vec<(usize, usize)> {
        let history = item.history + item.from..item.history + item.to;
        let targets = item.first_target..item.first_target + item.targets;
        let queries = history.chain(targets);
        let keys = item.first..item.first + item.count;
        queries.flat_map(|row| keys.clone().map(move |key| (row, key))).collect()
    }

    #[test]
    fn no_visible_pair_is_skipped_and_hidden_tiles_are() {
        let windows = [(1, 0), (64, 0), (65, 64), (100, 3), (700, 1), (1, 600)];
        let windows = windows.map(|(recent, global)| Some(AttentionWindow { recent, global }));
        let requests = [(500, 70), (0, 3), (64, 0), (1, 1), (0, 0), (129, 65)];
        let tilings = [(64, 64), (128, 64), (128, 32), (16, 32)];
        let tilings = tilings.map(|(rows, columns)| Tiling { rows, columns });
        let cases = windows.into_iter().chain([None]).zip(tilings.into_iter().cycle());
        for (window, tiling, targets_only) in
            cases.flat_map(|(window, tiling)| [(window, tiling, false), (window, tiling, true)])
        {
            let shape = HstuAttention { targets_only, ..shape(&requests, window) };
            let of_queries: Vec<_> = query_items(&shape, tiling)
                .iter()
                .flat_map(|item| pairs_of_queries(item, tiling.columns))
                .collect();
            let of_keys: Vec<_> = key_items(&shape, tiling)
                .iter()
                .filter(|item| item.step == 1)
                .flat_map(pairs_of_keys)
                .collect();
            for found in [&of_queries, &of_keys] {
                let distinct: std::collections::HashSet<_> = found.iter().copied().collect();
                assert_eq!(distinct.len(), found.len(), "{window:?}: a pair twice");
                for request in (0..shape.requests()).map(|b| shape.request(b)) {
                    let n = request.history.len();
                    for row in request.history.clone().chain(request.targets.clone()) {
                        let is_target = request.targets.contains(&row);
                        let position = if is_target { n } else { row - request.history.start };
                        for key in 0..n {
                            let attends = is_target || !targets_only;
                            if attends && key <= position && shape.sees(position, key) {
                                let pair = (row, request.history.start + key);
                                assert!(
                                    distinct.contains(&pair),
                                    "{window:?}: {pair:?} is missing"
                                );
                            }
                        }
                    }
                }
            }
        }
        let all = |window| -> usize {
            query_items(&shape(&[(4096, 0)], window), Tiling::SQUARE)
                .iter()
                .map(|item| item.tiles)
                .sum()
        };
        let sparse = all(Some(AttentionWindow { recent: 256, global: 0 }));
        // 64 blocks of queries see 5 tiles of keys each, but for the first few.
        assert_eq!((all(None), sparse), (64 * 65 / 2, 64 * 5 - 10));
    }

    #[test]
    fn every_row_is_in_one_item_of_each_list() {
        for targets_only in [false, true] {
            let requests = [(500, 70), (0, 3), (64, 0), (1, 1), (0, 0)];
            let shape = HstuAttention { targets_only, ..shape(&requests, None) };
            let blocks = |blocks: Vec<(usize, usize)>| {
                let mut rows: Vec<usize> =
                    blocks.into_iter().flat_map(|(first, count)| first..first + count).collect();
                rows.sort_unstable();
                assert_eq!(rows, (0..shape.rows()).collect::<Vec<_>>());
            };
            blocks(
                query_items(&shape, Tiling::SQUARE)
                    .iter()
                    .map(|item| (item.first, item.count))
                    .collect(),
            );
            blocks(
                key_items(&shape, Tiling::SQUARE)
                    .iter()
                    .map(|item| (item.first, item.count))
                    .collect(),
            );
        }
    }

    #[test]
    fn halves_of_times_keep_their_order_and_distance() {
        let times = [i64::MIN, -1, 0, 1, i64::MAX];
        let words = upload(&[] as &[QueryItem], Some(&times));
        let whole = |at: usize| u64::from(words[at]) | u64::from(words[at + times.len()]) << 32;
        for (a, left) in times.iter().enumerate() {
            for (b, right) in times.iter().enumerate() {
                assert_eq!(whole(a).abs_diff(whole(b)), left.abs_diff(*right));
                assert_eq!(whole(a).cmp(&whole(b)), left.cmp(right));
            }
        }
    }
}
