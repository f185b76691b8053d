//! What a release before has left: saved states in its layout, and decisions as it wrote them.

use std::path::Path;

use hypercast_core::{atomic_file, disk, entropy};
use hypercast_data::features::FeatureConfig;
use hypercast_data::versioned;
use hypercast_stream::{
    Error,
    registry::{Decision, RegistryFollower},
    streams::{Record, StreamEngine, StreamPlace, Topic},
};

use crate::{
    installation::{dataset, engine},
    plan::{FaultKind, Role},
    versions,
    world::{Process, Simulation},
};

/// What a state file begins with, before the checksum of the rest.
const MAGIC: &[u8] = b"hcstate1";

impl Simulation {
    /// Leaves the states of a process that was stopped in order as a release before would have. A
    /// joiner's only if it had `joined` all: what is still to be made again would be made by the
    /// rules of that release, and was made by those of today.
    pub(crate) fn leave_earlier_states(&self, process: &Process, joined: Option<u64>) {
        let left = self.observe(&process.machine, || {
            let engine = engine(&self.plan, 2, None).ok()?;
            let events = engine.span(&Topic::events()).ok()?;
            let has_joined = joined == Some(events.end);
            let mut left = has_joined && rewrite(Path::new("/state/join/state"), true);
            if left {
                self.ledger.borrow_mut().upgraded.extend(joined);
            }
            if process.role == Role::Daemon {
                left |= rewrite(Path::new("/state/serve/state"), false);
            }
            Some(left)
        });
        if left == Some(true) {
            let name = FaultKind::EarlierRelease.name();
            *self.struck.borrow_mut().entry((name, process.role)).or_default() += 1;
        }
    }
}

/// Writes a saved state as a release before did: it ends before the place in its stream, and a
/// joiner's also before the fields that say by which rules it had joined. False if there is none.
///
/// A state says itself at which position it was saved, in its first field.
pub(crate) fn rewrite(path: &Path, is_joiner: bool) -> bool {
    let Ok(bytes) = disk::read(path) else { return false };
    let Some((checksum, packed)) =
        bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk::<4>())
    else {
        return false;
    };
    if crc32fast::hash(packed) != u32::from_le_bytes(*checksum) {
        return false;
    }
    let Ok(mut plain) = zstd::decode_all(packed) else { return false };
    if is_joiner {
        // It has no content vectors.
        let limits = Some((dataset().content, FeatureConfig::default().max_content_mib));
        let contents = postcard::to_allocvec(&(Vec::<u64>::new(), limits));
        let Some(before) = contents.ok().and_then(|own| plain.strip_suffix(&own[..])) else {
            return false;
        };
        plain = before.to_vec();
    }
    let Some(end) = place_begins(&plain) else { return false };
    plain.truncate(end);
    if is_joiner {
        // It has made all that its outputs have, by today's rules.
        let Some(before) = plain.strip_suffix(&[1, 1]) else { return false };
        plain = before.to_vec();
    }
    let Ok(packed) = zstd::encode_all(&plain[..], 1) else { return false };
    let checksum = crc32fast::hash(&packed).to_le_bytes();
    atomic_file::write(path, &[MAGIC, &checksum, &packed].concat()).is_ok()
}

/// Where a state ends and the place begins.
fn place_begins(plain: &[u8]) -> Option<usize> {
    let (position, _) = postcard::take_from_bytes::<u64>(plain).ok()?;
    let is_place = |&at: &usize| match postcard::take_from_bytes::<StreamPlace>(&plain[at..]) {
        Ok((place, rest)) => place.position == position && ends(rest),
        Err(_) => false,
    };
    (0..plain.len()).rev().find(is_place)
}

/// Whether nothing follows a place but earlier places.
fn ends(rest: &[u8]) -> bool {
    let earlier = || postcard::take_from_bytes::<Vec<StreamPlace>>(rest);
    rest.is_empty() || earlier().is_ok_and(|(_, rest)| rest.is_empty())
}

/// Appends a decision as a release before would have made it on the same state.
///
/// # Errors
/// The engine cannot be reached, or the state is not known.
pub(crate) fn decide(engine: &dyn StreamEngine) -> Result<(), String> {
    let version = versions::drawn(entropy::number());
    let told = |error: Error| error.to_string();
    loop {
        let mut follower = RegistryFollower::new(engine).map_err(told)?;
        follower.catch_up(engine).map_err(told)?;
        follower.registry().check_complete().map_err(told)?;
        let fm = versions::simulated_fm(version.clone());
        let changes = follower.registry().register_fm(&fm).map_err(told)?;
        let mut decision = versioned::to_json(&Decision::new(changes), 1);
        decision.as_object_mut().map(|fields| fields.remove("made_by"));
        let record = Record { id: 0, payload: decision.to_string().into_bytes() };
        let end = follower.position();
        if engine.append_at(&Topic::versions(), end, &[record]).map_err(told)?.is_some() {
            return Ok(());
        }
    }
}
