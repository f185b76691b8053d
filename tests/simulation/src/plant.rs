//! Faults that are planted to see that the oracles find them. Each is a lie of what the host's code
//! stands on, so the code itself needs no switches.

use hypercast_core::hash::mix_parts;

use crate::disk::DiskLie;

/// A fault that a seam has for a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Segments of streams are not synced.
    SegmentSync,
    /// Files are renamed before they are synced.
    DraftSync,
    /// Names are not synced.
    FolderSync,
    /// Locks are always granted.
    Locks,
    /// Streams remember half of the record ids.
    HalfOfIds,
    /// Times in events are believed, whenever they arrived.
    TimesBelieved,
    /// Appends at an expected end are stored at any end.
    EndsIgnored,
    /// The server remembers no record ids.
    IdsForgotten,
    /// A record in a thousand is stored twice.
    RecordsDoubled,
    /// A record in a thousand is left out by a reader.
    RecordsSkipped,
    /// The last record of a publication is stored first.
    PublicationsReversed,
    /// Nobody ticks while no events come.
    NoTicks,
    /// Files of rollouts are not written.
    RolloutsUnwritten,
    /// Faults of guests are not counted.
    FaultsUncounted,
    /// Readers forget what they read last, by which they know a stream again.
    ChecksumsForgotten,
    /// Whoever goes on with the events reads all of them before.
    ReadAgainAtStart,
    /// Each read of a stream that gives records reads all records before.
    ReadAgainAtSteps,
    /// States are saved with every event.
    SavedAtEvents,
    /// Nobody hears what processes log.
    LogsUnread,
    /// A trainer that goes on has forgotten the last record of its save.
    LastForgotten,
    /// An expert's trainer that goes on has forgotten the last row of its save.
    ExpertForgets,
    /// The weights that are loaded are the newest, and not those that were asked for.
    NewestWeights,
    /// Readers of decisions pass those that the server has lost.
    HolesUntold,
    /// A record in a thousand is left out by the logging tier's reader.
    LogRowsSkipped,
}

/// All of them, with their names.
pub const PLANTS: [(&str, Plant); 24] = [
    ("segment-sync", Plant::SegmentSync),
    ("draft-sync", Plant::DraftSync),
    ("folder-sync", Plant::FolderSync),
    ("locks", Plant::Locks),
    ("half-of-ids", Plant::HalfOfIds),
    ("times-believed", Plant::TimesBelieved),
    ("ends-ignored", Plant::EndsIgnored),
    ("ids-forgotten", Plant::IdsForgotten),
    ("records-doubled", Plant::RecordsDoubled),
    ("records-skipped", Plant::RecordsSkipped),
    ("publications-reversed", Plant::PublicationsReversed),
    ("no-ticks", Plant::NoTicks),
    ("rollouts-unwritten", Plant::RolloutsUnwritten),
    ("faults-uncounted", Plant::FaultsUncounted),
    ("checksums-forgotten", Plant::ChecksumsForgotten),
    ("read-again-at-start", Plant::ReadAgainAtStart),
    ("read-again-at-steps", Plant::ReadAgainAtSteps),
    ("saved-at-events", Plant::SavedAtEvents),
    ("logs-unread", Plant::LogsUnread),
    ("last-forgotten", Plant::LastForgotten),
    ("expert-forgets", Plant::ExpertForgets),
    ("newest-weights", Plant::NewestWeights),
    ("holes-untold", Plant::HolesUntold),
    ("log-rows-skipped", Plant::LogRowsSkipped),
];

impl Plant {
    /// Of those that are lies of the disk, which.
    pub fn disk_lie(self) -> Option<DiskLie> {
        match self {
            Plant::SegmentSync => Some(DiskLie::SegmentSync),
            Plant::DraftSync => Some(DiskLie::DraftSync),
            Plant::FolderSync => Some(DiskLie::FolderSync),
            Plant::Locks => Some(DiskLie::Locks),
            Plant::RolloutsUnwritten => Some(DiskLie::RolloutRenames),
            _ => None,
        }
    }

    /// Whether a record is one of those that a plant hits.
    pub fn hits(plant: Option<Plant>, of: Plant, payload: &[u8]) -> bool {
        let hash = || payload.iter().fold(0, |hash, &byte| mix_parts(&[hash, byte.into()]));
        plant == Some(of) && hash().is_multiple_of(1000)
    }
}
