//! The server's side: reads publications in order; returns each complete and checked, or not at
//! all.
//!
//! A follower begins at the newest complete snapshot. It returns a delta only if it continues the
//! publication returned before. Anything incomplete, damaged, foreign or out of order is logged,
//! counted and skipped, and the old weights stay until the next snapshot.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Publication, PublicationHeader, PublicationKind,
    codec::{self, RecordBody, RecordEnvelope, WeightsTotal},
    publisher::PublishedTail,
};
use crate::error::Result;
use crate::streams::{Reader, StreamEngine, StreamRecord, Topic};

/// Records per read.
const RECORDS: usize = 8;

/// A follower's position, after the publication that it returned last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerPosition {
    /// The publisher's chain.
    pub chain: u64,
    /// The publication's number.
    pub sequence: u64,
    /// The position of the next record.
    pub position: u64,
}

/// What a follower refused since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Refusals {
    /// Damaged records.
    pub damaged: u64,
    /// Records of another publication than the one around them.
    pub foreign: u64,
    /// Publications without an end.
    pub torn: u64,
    /// Deltas that continue other weights.
    pub out_of_chain: u64,
}

/// Follows one model's published weights.
pub struct PublicationFollower {
    engine: Arc<dyn StreamEngine>,
    topic: Topic,
    reader: Box<dyn Reader>,
    read: VecDeque<StreamRecord>,
    at: Option<FollowerPosition>,
    partial: Option<PartialPublication>,
    /// A refused publication; its remaining records are skipped.
    refused: Option<(u64, u64)>,
    refusals: Refusals,
}

/// A publication whose end was not read yet.
struct PartialPublication {
    envelope: RecordEnvelope,
    total: WeightsTotal,
    dim: usize,
    found: WeightsTotal,
    checksum: u64,
    publication: Publication,
}

impl PublicationFollower {
    /// Follows from the newest complete snapshot, or from the first one to come.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(engine: Arc<dyn StreamEngine>, topic: Topic) -> Result<PublicationFollower> {
        let from = newest_snapshot(&*engine, &topic)?;
        let reader = engine.reader(&topic, from)?;
        Ok(Self::from_reader(engine, topic, reader, None))
    }

    /// Continues where another follower stopped, with the weights that it had.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn resume(
        engine: Arc<dyn StreamEngine>,
        topic: Topic,
        at: FollowerPosition,
    ) -> Result<PublicationFollower> {
        let span = engine.span(&topic)?;
        // A snapshot replaces what was deleted.
        let from = if span.contains(&at.position) || at.position == span.end {
            at.position
        } else {
            newest_snapshot(&*engine, &topic)?
        };
        let reader = engine.reader(&topic, from)?;
        Ok(Self::from_reader(engine, topic, reader, Some(at)))
    }

    fn from_reader(
        engine: Arc<dyn StreamEngine>,
        topic: Topic,
        reader: Box<dyn Reader>,
        at: Option<FollowerPosition>,
    ) -> PublicationFollower {
        let (read, refusals) = (VecDeque::new(), Refusals::default());
        Self { engine, topic, reader, read, at, partial: None, refused: None, refusals }
    }

    /// The current position; `None` before the first publication.
    pub fn at(&self) -> Option<FollowerPosition> {
        self.at
    }

    /// What was refused so far.
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }

    /// The next publication; waits for it up to `wait`.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Publication>> {
        let until = Instant::now() + wait;
        loop {
            while let Some(record) = self.read.pop_front() {
                if let Some(publication) = self.take(record) {
                    return Ok(Some(publication));
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            let position = self.reader.position();
            match self.reader.next(RECORDS, left) {
                Ok(records) => self.read.extend(records),
                // The follower lagged so far behind that records were deleted.
                Err(_) if position < self.engine.span(&self.topic)?.start => {
                    tracing::warn!(topic = %self.topic, position, "published weights were deleted before they were read; continuing at the newest snapshot");
                    self.partial = None;
                    self.reader = self
                        .engine
                        .reader(&self.topic, newest_snapshot(&*self.engine, &self.topic)?)?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            if self.read.is_empty() && Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    /// Processes a record; returns the publication that it completes, if any.
    fn take(&mut self, record: StreamRecord) -> Option<Publication> {
        let (envelope, body) = match codec::decode(&record.payload) {
            Ok(found) => found,
            Err(why) => {
                return self.refuse(|counts| &mut counts.damaged, record.position, None, &why);
            }
        };
        match body {
            RecordBody::Begin { header, total, dim } => {
                self.begin(record.position, PartialPublication::new(envelope, *header, total, dim))
            }
            RecordBody::Part(_) | RecordBody::End { .. }
                if self.refused == Some(envelope.publication()) =>
            {
                None
            }
            RecordBody::Part(packed) => self.next_part(record.position, envelope, |partial| {
                partial.checksum = packed.digest(partial.checksum);
                let part = packed.unpack(partial.dim)?;
                partial.found.add(&part);
                if !partial.found.is_within(&partial.total) {
                    return Err("it has more weights than announced".into());
                }
                let Publication { blocks, ids, rows, removed, .. } = &mut partial.publication;
                blocks.extend(part.blocks);
                ids.extend(part.ids);
                rows.extend(part.rows);
                removed.extend(part.removed);
                Ok(false)
            }),
            RecordBody::End { checksum, .. } => {
                self.next_part(record.position, envelope, |partial| {
                    if partial.found != partial.total || partial.checksum != checksum {
                        return Err("its checksum is wrong".into());
                    }
                    Ok(true)
                })
            }
        }
    }

    fn begin(&mut self, position: u64, begun: PartialPublication) -> Option<Publication> {
        if self.partial.take().is_some() {
            self.refusals.torn += 1;
            tracing::warn!(
                topic = %self.topic,
                position,
                "a publication has no end; the previous weights stay"
            );
        }
        let envelope = begun.envelope;
        let PublicationHeader { kind, sequence, parent, .. } = begun.publication.header;
        let this = Some(envelope.publication());
        if (envelope.begin, envelope.number, envelope.sequence) != (position, 0, sequence) {
            return self.refuse(
                |counts| &mut counts.foreign,
                position,
                this,
                "its position or number is not the announced one",
            );
        }
        let continues = self.at.is_some_and(|at| {
            at.chain == envelope.chain
                && at.sequence == parent
                && parent.checked_add(1) == Some(sequence)
        });
        if kind == PublicationKind::Delta && !continues {
            return self.refuse(
                |counts| &mut counts.out_of_chain,
                position,
                this,
                "it continues other weights",
            );
        }
        if let Err(why) = begun.total.check(begun.dim) {
            return self.refuse(|counts| &mut counts.damaged, position, this, &why);
        }
        self.partial = Some(begun);
        None
    }

    /// Processes a record of the current publication; `take` returns whether it is the last one.
    fn next_part(
        &mut self,
        position: u64,
        envelope: RecordEnvelope,
        take: impl FnOnce(&mut PartialPublication) -> std::result::Result<bool, String>,
    ) -> Option<Publication> {
        let this = Some(envelope.publication());
        let Some(partial) = &mut self.partial else {
            return self.refuse(
                |counts| &mut counts.foreign,
                position,
                this,
                "the beginning of its publication was not read",
            );
        };
        let number = partial.envelope.number + 1;
        if envelope != (RecordEnvelope { number, ..partial.envelope }) {
            return self.refuse(
                |counts| &mut counts.foreign,
                position,
                this,
                "it belongs to another publication, or records are missing",
            );
        }
        partial.envelope.number = number;
        match take(partial) {
            Ok(false) => None,
            Ok(true) => {
                let partial = self.partial.take().expect("matched above");
                let RecordEnvelope { chain, sequence, .. } = envelope;
                self.at = Some(FollowerPosition { chain, sequence, position: position + 1 });
                Some(partial.publication)
            }
            Err(why) => self.refuse(|counts| &mut counts.damaged, position, this, &why),
        }
    }

    /// Counts and refuses a record and its publication.
    fn refuse(
        &mut self,
        count: impl Fn(&mut Refusals) -> &mut u64,
        position: u64,
        publication: Option<(u64, u64)>,
        why: &str,
    ) -> Option<Publication> {
        *count(&mut self.refusals) += 1;
        let in_way = self.partial.take().map(|partial| partial.envelope.publication());
        self.refused = publication.or(in_way);
        tracing::warn!(
            topic = %self.topic,
            position,
            "refused published weights: {why}; the previous weights stay"
        );
        None
    }
}

impl RecordEnvelope {
    fn publication(&self) -> (u64, u64) {
        (self.chain, self.sequence)
    }
}

impl WeightsTotal {
    fn is_within(&self, most: &WeightsTotal) -> bool {
        self.blocks <= most.blocks
            && self.values <= most.values
            && self.rows <= most.rows
            && self.removed <= most.removed
    }
}

impl PartialPublication {
    fn new(
        envelope: RecordEnvelope,
        header: PublicationHeader,
        total: WeightsTotal,
        dim: usize,
    ) -> PartialPublication {
        let (blocks, ids, rows, removed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let publication = Publication { header, blocks, ids, rows, removed };
        let found = WeightsTotal::default();
        PartialPublication { envelope, total, dim, found, checksum: 0, publication }
    }
}

/// Where a new follower begins.
fn newest_snapshot(engine: &dyn StreamEngine, topic: &Topic) -> Result<u64> {
    let span = engine.span(topic)?;
    let tail = PublishedTail::of(engine, topic)?;
    Ok(tail.snapshot.filter(|at| span.contains(at)).unwrap_or(span.start))
}
