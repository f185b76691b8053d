//! The position and time biases of an attention task, and their gradients.
//!
//! A row's position biases for ascending keys are contiguous in a reversed copy of the table. Its
//! time biases are looked up, a vector of keys at a time: the bucket of a distance is the place of
//! its highest bit.

use std::ops::RangeInclusive;

use super::lanes::{Lanes, MAX_LANES, SLOTS};
use super::task::{AttentionTask, KEYS, RowBlock, add_values, scale, zero};
use crate::attention::time_bucket;

/// The table of the time bias, and the tokens' times in seconds.
#[derive(Clone, Copy)]
pub(super) struct TimeBias<'a> {
    pub(super) table: &'a [f32],
    /// `[rows]`: the times of all rows.
    pub(super) rows_s: &'a [i64],
    /// `[n]`: the times of the history, oldest first.
    pub(super) keys_s: &'a [i64],
}

/// Buffers for a task's biases.
#[derive(Default)]
pub(super) struct Biases {
    /// Entry n - d is the bias at distance d, so that a row's biases for ascending keys are
    /// contiguous. Zeros follow, to fill whole vectors. All zeros without a table.
    reversed: Vec<f32>,
    /// The time table by the leading zeros of a distance.
    by_zeros: [f32; SLOTS],
    times: RelativeTimes,
}

/// A task's times as differences from the earliest.
#[derive(Default)]
struct RelativeTimes {
    /// None if the times lie 2^31 s or more apart, which takes the slow path.
    earliest_s: Option<i64>,
    /// `[n]`, and zeros to fill whole vectors.
    keys: Vec<i32>,
}

/// The scores of some rows for `columns` keys from `first_key` on, [`KEYS`] cells a row.
#[derive(Clone, Copy)]
pub(super) struct ScoreTile {
    pub(super) rows: RowBlock,
    pub(super) first_key: usize,
    /// A multiple of the vector's length.
    pub(super) columns: usize,
}

/// The time bucket of the distances with this many leading zeros in 32 bits, modulo [`SLOTS`].
fn bucket_of(zeros: usize, buckets: usize) -> usize {
    let distance_s = if zeros == 0 { 0 } else { 1 << (31 - zeros) };
    time_bucket(distance_s, buckets)
}

impl RelativeTimes {
    fn prepare(&mut self, task: &AttentionTask<'_>, times: TimeBias<'_>) {
        let rows = [&times.rows_s[task.history.clone()], &times.rows_s[task.targets.clone()]];
        let all = || times.keys_s.iter().chain(rows[0]).chain(rows[1]).copied();
        let (earliest_s, latest_s) = all()
            .fold((i64::MAX, i64::MIN), |(low, high), time_s| (low.min(time_s), high.max(time_s)));
        let near = latest_s.checked_sub(earliest_s).is_some_and(|s| s <= i64::from(i32::MAX));
        self.earliest_s = near.then_some(earliest_s);
        self.keys.clear();
        if near {
            self.keys.extend(times.keys_s.iter().map(|time_s| (time_s - earliest_s) as i32));
            self.keys.resize(times.keys_s.len() + KEYS, 0);
        }
    }

    /// The time of a row, relative to `earliest_s`.
    #[inline(always)]
    fn of_row(times: TimeBias<'_>, earliest_s: i64, row: usize) -> i32 {
        (times.rows_s[row] - earliest_s) as i32
    }
}

impl Biases {
    pub(super) fn prepare(&mut self, task: &AttentionTask<'_>) {
        let n = task.n();
        zero(&mut self.reversed, n + 1 + KEYS);
        if let Some(table) = task.position {
            let last = table.len() - 1;
            let (far, near) = self.reversed[..=n].split_at_mut(n - n.min(last));
            far.fill(table[last]);
            for (bias, entry) in near.iter_mut().rev().zip(table) {
                *bias = *entry;
            }
        }
        if let Some(times) = task.time {
            for (zeros, bias) in self.by_zeros.iter_mut().enumerate() {
                *bias = times.table[bucket_of(zeros, times.table.len())];
            }
            self.times.prepare(task, times);
        }
    }

    /// Writes the biases of a tile; those at and after key n are arbitrary.
    #[inline(always)]
    pub(super) fn write<V: Lanes>(
        &self,
        task: &AttentionTask<'_>,
        tile: &ScoreTile,
        cells: &mut [f32],
    ) {
        let rows = cells.chunks_exact_mut(KEYS).take(tile.rows.count).enumerate();
        let Some(times) = task.time else {
            for (r, cells) in rows {
                let by_position = &self.reversed[tile.reversed(task, r)..][..tile.columns];
                scale::<V>(&mut cells[..tile.columns], by_position, 1.0);
            }
            return;
        };
        let Some(earliest_s) = self.times.earliest_s else {
            for (r, cells) in rows {
                let by_position = &self.reversed[tile.reversed(task, r)..];
                let buckets = far_buckets(task, times, tile, r);
                for ((cell, bias), bucket) in cells.iter_mut().zip(by_position).zip(buckets) {
                    *cell = bias + times.table[bucket];
                }
            }
            return;
        };
        let keys = &self.times.keys[tile.first_key..][..tile.columns];
        for (r, cells) in rows {
            let cells = &mut cells[..tile.columns];
            let by_position = &self.reversed[tile.reversed(task, r)..][..tile.columns];
            let from = RelativeTimes::of_row(times, earliest_s, tile.rows.first + r);
            assert!(keys.len().is_multiple_of(V::N), "not whole vectors");
            for at in (0..keys.len()).step_by(V::N) {
                // SAFETY: at + N is at most the length of all three, which were cut to one length.
                unsafe {
                    let by_time = V::distance_zeros(keys.as_ptr().wrapping_add(at), from)
                        .look_up(&self.by_zeros);
                    let by_position = V::load(by_position.as_ptr().wrapping_add(at));
                    by_position.add(by_time).store(cells.as_mut_ptr().wrapping_add(at));
                }
            }
        }
    }
}

impl ScoreTile {
    /// The place of row r's first key in the reversed biases.
    #[inline(always)]
    fn reversed(&self, task: &AttentionTask<'_>, r: usize) -> usize {
        self.first_key + task.n() - self.rows.at(r)
    }
}

/// The time bucket of row r and each of the tile's keys, however far apart.
#[inline(always)]
fn far_buckets(
    task: &AttentionTask<'_>,
    times: TimeBias<'_>,
    tile: &ScoreTile,
    r: usize,
) -> impl Iterator<Item = usize> {
    let (row_s, buckets) = (times.rows_s[tile.rows.first + r], times.table.len());
    let keys_s = &times.keys_s[tile.first_key..task.n()];
    keys_s.iter().take(tile.columns).map(move |s| time_bucket(row_s.abs_diff(*s), buckets))
}

/// The leading zeros that the distances between some rows and keys may have.
#[inline(always)]
fn zeros_between(rows: &[i32], keys: &[i32]) -> RangeInclusive<u32> {
    let bounds = |times: &[i32]| {
        times.iter().fold((i32::MAX, 0), |(low, high), time| (low.min(*time), high.max(*time)))
    };
    let ((first_row, last_row), (first_key, last_key)) = (bounds(rows), bounds(keys));
    let nearest = (first_row - last_key).max(first_key - last_row).max(0);
    let farthest = (last_row - first_key).max(last_key - first_row);
    farthest.leading_zeros()..=nearest.leading_zeros()
}

/// A task's gradients of the bias tables; empty for an absent table.
pub(super) struct BiasTableGrads {
    pub(super) position: Vec<f32>,
    pub(super) time: Vec<f32>,
}

/// Sums of the scores' gradients over the pairs of a task.
pub(super) struct BiasSums {
    /// Laid out as the reversed biases.
    reversed: Vec<f32>,
    /// By the leading zeros of a pair's distance and the lane that the pair was in.
    by_zeros: [[f32; MAX_LANES]; SLOTS],
    /// By time bucket, of pairs that may be far apart.
    far: Vec<f32>,
}

impl Default for BiasSums {
    fn default() -> Self {
        BiasSums { reversed: vec![], by_zeros: [[0.0; MAX_LANES]; SLOTS], far: vec![] }
    }
}

impl BiasSums {
    pub(super) fn clear(&mut self, task: &AttentionTask<'_>) {
        zero(&mut self.reversed, task.position.map_or(0, |_| task.n() + 1 + KEYS));
        zero(&mut self.far, task.time.map_or(0, |times| times.table.len()));
        if task.time.is_some() {
            self.by_zeros = [[0.0; MAX_LANES]; SLOTS];
        }
    }

    /// Adds the gradients of a tile's scores, with zeros where a row does not see and in rows that
    /// the tile lacks.
    #[inline(always)]
    pub(super) fn add<V: Lanes, const R: usize>(
        &mut self,
        task: &AttentionTask<'_>,
        biases: &Biases,
        tile: &ScoreTile,
        grads: &[f32],
    ) {
        let rows = || grads.chunks_exact(KEYS).take(tile.rows.count).enumerate();
        if task.position.is_some() {
            for (r, grads) in rows() {
                let sums = &mut self.reversed[tile.reversed(task, r)..][..tile.columns];
                add_values::<V>(sums, &grads[..tile.columns]);
            }
        }
        let Some(times) = task.time else { return };
        let Some(earliest_s) = biases.times.earliest_s else {
            for (r, grads) in rows() {
                for (grad, bucket) in grads.iter().zip(far_buckets(task, times, tile, r)) {
                    self.far[bucket] += grad;
                }
            }
            return;
        };
        let last = tile.rows.count - 1;
        let rows: [i32; R] = std::array::from_fn(|r| {
            RelativeTimes::of_row(times, earliest_s, tile.rows.first + r.min(last))
        });
        let keys = &biases.times.keys[tile.first_key..][..tile.columns];
        let seen = tile.rows.seen(tile.first_key);
        for at in (0..seen).step_by(V::N) {
            let seen = &keys[at..seen.min(at + V::N)];
            self.add_near::<V, R>(rows, &keys[at..], zeros_between(&rows, seen), &grads[at..]);
        }
    }

    /// Adds the gradients of the scores of R rows and a vector of keys, with this range of leading
    /// zeros of the distances between them. As times ascend, the range is mostly short.
    #[inline(always)]
    fn add_near<V: Lanes, const R: usize>(
        &mut self,
        rows: [i32; R],
        keys: &[i32],
        range: RangeInclusive<u32>,
        grads: &[f32],
    ) {
        assert!(keys.len() >= V::N && grads.len() >= (R - 1) * KEYS + V::N, "tile too small");
        let (mut zeros, mut values) = ([V::splat(0.0); R], [V::splat(0.0); R]);
        for r in 0..R {
            // SAFETY: r < R, so the assertion bounds both.
            unsafe {
                zeros[r] = V::distance_zeros(keys.as_ptr(), rows[r]);
                values[r] = V::load(grads.as_ptr().wrapping_add(r * KEYS));
            }
        }
        for slot in range {
            let sums = self.by_zeros[slot as usize % SLOTS].as_mut_ptr();
            // SAFETY: no vector is longer than MAX_LANES.
            unsafe {
                let mut sum = V::load(sums);
                for r in 0..R {
                    sum = sum.add_where(values[r], zeros[r], slot);
                }
                sum.store(sums);
            }
        }
    }

    /// The tables' gradients, with those of the targets' scores of themselves.
    pub(super) fn tables(&self, task: &AttentionTask<'_>, of_themselves: f32) -> BiasTableGrads {
        let mut position = vec![0.0; task.position.map_or(0, <[f32]>::len)];
        let last = position.len().saturating_sub(1);
        // The reversed sums end with distance 0 at entry n.
        let by_distance = self.reversed.iter().rev().skip(KEYS);
        for (distance, sum) in by_distance.enumerate() {
            position[distance.min(last)] += sum;
        }
        let mut time = self.far.clone();
        let by_zeros = self.by_zeros.iter().enumerate().filter(|_| task.time.is_some());
        for (zeros, lanes) in by_zeros {
            let bucket = bucket_of(zeros, time.len());
            time[bucket] += lanes.iter().sum::<f32>();
        }
        for table in [&mut position, &mut time] {
            if let Some(nearest) = table.first_mut() {
                *nearest += of_themselves;
            }
        }
        BiasTableGrads { position, time }
    }
}
