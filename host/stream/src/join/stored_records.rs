//! The stored records of an output, with which a joiner compares those that it makes again.

use std::collections::VecDeque;

use serde::Serialize;

use super::output_streams::{encode, shortened};
use super::{JoinedRecord, OutcomeRecord, StateUpdate};
use crate::error::Result;
use crate::streams::{StreamCursor, StreamEngine, StreamPlace, StreamRead, StreamRecord, Topic};

/// Records per read.
const READ: usize = 1024;

/// A stored record that is not the one of its number that the joiner makes.
pub(super) struct StoredDifference {
    pub(super) topic: Topic,
    pub(super) position: u64,
}

/// The records of one output that its joiner makes again.
pub(super) struct StoredRecords {
    topic: Topic,
    cursor: StreamCursor,
    read: VecDeque<StreamRecord>,
    /// Records that were made since the first event.
    made: u64,
    end: u64,
}

impl StoredRecords {
    /// The stored records behind the first `made` ones.
    pub(super) fn open(
        engine: &dyn StreamEngine,
        topic: Topic,
        made: u64,
    ) -> Result<StoredRecords> {
        let span = engine.span(&topic)?;
        let from = StreamPlace::at(made.clamp(span.start, span.end));
        let cursor = StreamCursor::open(engine, &topic, from)?;
        Ok(StoredRecords { topic, cursor, read: VecDeque::new(), made, end: span.end })
    }

    /// Whether all that is stored was made again.
    pub(super) fn is_repeated(&self) -> bool {
        self.made >= self.end
    }

    /// The stored records that were not compared, in words.
    pub(super) fn rest(&self) -> String {
        let StoredRecords { topic, made, end, .. } = self;
        format!("stream {topic} from position {} on (of {end})", (*made).min(*end))
    }

    /// Compares the record of `joined` that is made now with the stored one of its number, if that
    /// is there.
    pub(super) fn compare_joined(
        &mut self,
        engine: &dyn StreamEngine,
        joined: &JoinedRecord,
    ) -> Result<Option<StoredDifference>> {
        self.compare(engine, |stored| {
            // As it is stored, it may have lost targets.
            let made = JoinedRecord::decode(&shortened(joined.clone())?)?;
            let Ok(stored) = JoinedRecord::decode(stored) else { return Ok(true) };
            Ok(identity_of_joined(&made)? == identity_of_joined(&stored)?)
        })
    }

    /// As [`StoredRecords::compare_joined`], of `outcomes`.
    pub(super) fn compare_outcome(
        &mut self,
        engine: &dyn StreamEngine,
        outcome: &OutcomeRecord,
    ) -> Result<Option<StoredDifference>> {
        self.compare(engine, |stored| {
            let Ok(stored) = OutcomeRecord::decode(stored) else { return Ok(true) };
            Ok(identity_of_update(&outcome.update)? == identity_of_update(&stored.update)?)
        })
    }

    fn compare(
        &mut self,
        engine: &dyn StreamEngine,
        is_same: impl FnOnce(&[u8]) -> Result<bool>,
    ) -> Result<Option<StoredDifference>> {
        let (topic, position) = (self.topic.clone(), self.made);
        let same = match self.next(engine)? {
            Some(stored) => is_same(&stored.payload)?,
            None => true,
        };
        Ok((!same).then_some(StoredDifference { topic, position }))
    }

    /// The stored record of the same number as the one that is made now; none if there is none.
    fn next(&mut self, engine: &dyn StreamEngine) -> Result<Option<StreamRecord>> {
        let position = self.made;
        self.made += 1;
        while position < self.end {
            if let Some(next) = self.read.front() {
                let is_stored = next.position == position;
                return Ok(if is_stored { self.read.pop_front() } else { None });
            }
            match self.cursor.next_stored(engine, READ)? {
                StreamRead::Records(records) if records.is_empty() => break,
                StreamRead::Records(records) => self.read.extend(records),
                StreamRead::Gap(_) => {}
            }
        }
        Ok(None)
    }
}

/// What makes a joined record another one: features are left out, which a release may compute
/// otherwise, and so are the times of arrival.
fn identity_of_joined(record: &JoinedRecord) -> Result<Vec<u8>> {
    let is_correction = matches!(record, JoinedRecord::Correction(_));
    let example = match record {
        JoinedRecord::Example(joined) | JoinedRecord::Correction(joined) => &joined.example,
        JoinedRecord::Content(content) => return encode(&(content.item, &content.vector)),
    };
    let targets: Vec<_> =
        example.targets.iter().map(|target| (target.item.id, &target.outcome)).collect();
    encode(&(is_correction, example.request, example.surface, example.time_ms, targets))
}

/// What makes an update another one.
fn identity_of_update(update: &StateUpdate) -> Result<Vec<u8>> {
    /// The part of an update that is compared.
    #[derive(Serialize)]
    enum UpdateIdentity<T> {
        Outcome { corrected: bool, row: T },
        Item(u64),
        User(u64),
    }
    let corrected = matches!(update, StateUpdate::Corrected(_));
    encode(&match update {
        StateUpdate::Outcome(row) | StateUpdate::Corrected(row) => {
            let times = [row.time_ms, row.outcome_ms];
            let row = (row.request, row.item, row.surface, times, &row.outcome);
            UpdateIdentity::Outcome { corrected, row }
        }
        StateUpdate::Item(item) => UpdateIdentity::Item(item.id),
        StateUpdate::User(user) => UpdateIdentity::User(user.id),
    })
}
