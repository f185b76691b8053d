//! The position and time biases of an attention task, and their gradients.
//!
//! A row's position biases for ascending keys are contiguous in a reversed copy of the table. Its
//! time biases are looked up, a vector of keys at a time: the bucket of a distance is the place of
//! its highest bit.

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

/// A task's gradients of the bias tables; empty for an absent table.
pub(super) struct BiasTableGrads {
    pub(super) position: Vec<f32>,
    pub(super) time: Vec<f32>,
}

/// Consecutive vectors add to different copies of the sums, as an addition that waits for the one
/// before it to be stored takes many times as long.
const COPIES: usize = 8;

/// Sums of the scores' gradients over the pairs of a task.
pub(super) struct BiasSums {
    /// Laid out as the reversed biases.
    reversed: Vec<f32>,
    /// By the leading zeros of a pair's distance and the lane that the pair was in.
    by_zeros: [[[f32; MAX_LANES]; COPIES]; SLOTS],
    /// By time bucket, of pairs that may be far apart.
    far: Vec<f32>,
}

impl Default for BiasSums {
    fn default() -> Self {
        BiasSums { reversed: vec![], by_zeros: [[[0.0; MAX_LANES]; COPIES]; SLOTS], far: vec![] }
    }
}

impl BiasSums {
    pub(super) fn clear(&mut self, task: &AttentionTask<'_>) {
        zero(&mut self.reversed, task.position.map_or(0, |_| task.n() + 1 + KEYS));
        zero(&mut self.far, task.time.map_or(0, |times| times.table.len()));
        if task.time.is_some() {
            self.by_zeros.as_flattened_mut().as_flattened_mut().fill(0.0);
        }
    }

    /// Adds the gradients of a tile's scores, with zeros where a row does not see.
    #[inline(always)]
    pub(super) fn add<V: Lanes>(
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
        let keys = &biases.times.keys[tile.first_key..][..tile.columns];
        for (r, grads) in rows() {
            let from = RelativeTimes::of_row(times, earliest_s, tile.rows.first + r);
            self.add_near::<V>(from, keys, &grads[..tile.columns]);
        }
    }

    /// Adds the gradients of a row's scores at the buckets of its time and its keys'.
    #[inline(always)]
    fn add_near<V: Lanes>(&mut self, from: i32, keys: &[i32], grads: &[f32]) {
        let mut lanes = [0.0; MAX_LANES];
        let vectors = keys.chunks_exact(V::N).zip(grads.chunks_exact(V::N)).enumerate();
        for (vector, (keys, grads)) in vectors {
            // SAFETY: each chunk has N numbers, and no vector is longer than MAX_LANES.
            let (zeros, grads) = unsafe {
                let zeros = V::distance_zeros(keys.as_ptr(), from);
                zeros.store(lanes.as_mut_ptr());
                (zeros, V::load(grads.as_ptr()))
            };
            // Times ascend, so most vectors have one bucket or two. A branch would cost more than
            // an addition of zeros.
            let (first, last) = (lanes[0].to_bits(), lanes[V::N - 1].to_bits());
            let (of_first, found) = zeros.pick(first, grads);
            self.add_at(first, 2 * vector, of_first);
            let grads = grads.sub(of_first);
            let (of_last, found_last) = zeros.pick(last, grads);
            self.add_at(last, 2 * vector + 1, of_last);
            let mut rest = ((1u32 << V::N) - 1) & !(found | found_last);
            while rest != 0 {
                let bucket = lanes[rest.trailing_zeros() as usize % MAX_LANES].to_bits();
                let (picked, found) = zeros.pick(bucket, grads);
                self.add_at(bucket, 2 * vector, picked);
                rest &= !found;
            }
        }
    }

    #[inline(always)]
    fn add_at<V: Lanes>(&mut self, zeros: u32, copy: usize, grads: V) {
        let sums = self.by_zeros[zeros as usize % SLOTS][copy % COPIES].as_mut_ptr();
        // SAFETY: no vector is longer than MAX_LANES.
        unsafe { V::load(sums).add(grads).store(sums) };
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
        for (zeros, copies) in by_zeros {
            let mut lanes = [0.0; MAX_LANES];
            for copy in copies {
                lanes.iter_mut().zip(copy).for_each(|(lane, sum)| *lane += sum);
            }
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
