//! Which version of an expert answers a user: by a hash of the user and the
//! expert's name, so that a user stays with a version and tests of two experts are independent.

use super::{Shares, fnv, registry::semver_order};

/// A user's place in [0, 1) among the users of an expert.
pub fn place(user: u64, expert: &str) -> f64 {
    // SplitMix64's finaliser: neighbouring users are far apart.
    let mut hash = user ^ fnv(expert.as_bytes());
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// The version for a user at `place`. Older versions come first, so that a newer one whose share grows keeps the users it has.
pub fn choose(shares: &Shares, place: f64) -> Option<&str> {
    let mut versions: Vec<(&str, f64)> =
        shares.iter().map(|(version, share)| (version.as_str(), *share)).collect();
    versions.sort_by(|(a, _), (b, _)| semver_order(a, b));
    let mut until = 0.0;
    let found = versions.iter().find(|(_, share)| {
        until += share;
        place < until
    });
    // Shares that sum to a little less than 1 leave nobody without a version.
    found.or(versions.last()).map(|(version, _)| *version)
}
