//! What a streaming trainer did, and where its time went.

use std::time::Duration;

use hypercast_core::clock;

/// What a trainer did since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FollowFmReport {
    /// Requests learned from.
    pub requests: u64,
    /// Corrections learned from.
    pub corrections: u64,
    /// Publications.
    pub published: u64,
    /// Publications that were held.
    pub held: u64,
    /// Where it stands in the stream.
    pub position: u64,
    /// Where the time of its thread went.
    pub times: FmStageTimes,
}

/// Where the time of a trainer's thread went. The stages take turns, so that their sum is at most
/// the time that passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FmStageTimes {
    /// Reading and decoding records, and waiting for them.
    pub read: Duration,
    /// Predicting a batch and learning from it.
    pub step: Duration,
    /// Saving the trainer and where it stands.
    pub save: Duration,
    /// Comparing what was learned with what serves.
    pub gate: Duration,
    /// Taking what a publication sends from the weights.
    pub publish: Duration,
}

/// Adds the time that `run` takes to `total`.
pub(super) fn timed<T>(total: &mut Duration, run: impl FnOnce() -> T) -> T {
    let started = clock::instant();
    let value = run();
    *total += clock::since(started);
    value
}
