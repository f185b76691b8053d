//! The server's side: reads publications in order; returns each complete and checked, or not at
//! all.
//!
//! A follower begins at the newest complete snapshot. It returns a delta only if it continues the
//! publication returned before. Anything incomplete, damaged, foreign or out of order is logged,
//! counted and skipped, and the old weights stay until the next snapshot. So a follower whose
//! stream lost records goes on behind them, or at a newer snapshot, and never takes one again.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use hypercast_core::clock;
use serde::Serialize;

use super::{
    Publication, PublicationHeader, PublicationKind,
    codec::{self, PackedPart, RecordBody, RecordEnvelope, WeightsTotal},
    publisher::PublishedTail,
};
use crate::error::Result;
use crate::streams::{
    StreamCursor, StreamEngine, StreamGap, StreamPlace, StreamRead, StreamRecord, Topic,
};

/// Records per read.
const RECORDS: usize = 8;

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
    cursor: StreamCursor,
    /// The position of the oldest record that it began at.
    begun: u64,
    read: VecDeque<StreamRecord>,
    /// The chain and the number of the publication that was returned last.
    pub(super) at: Option<(u64, u64)>,
    partial: Option<PartialPublication>,
    /// A refused publication; its remaining records are skipped.
    refused: Option<(u64, u64)>,
    /// What was refused so far.
    pub refusals: Refusals,
}

/// Why a record and its publication are refused.
struct RecordRefusal {
    count: fn(&mut Refusals) -> &mut u64,
    why: String,
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
        let span = engine.span(&topic)?;
        let begun = newest_snapshot(&*engine, &topic)?.unwrap_or(span.start);
        Ok(Self {
            cursor: StreamCursor::open(&*engine, &topic, StreamPlace::at(begun))?,
            begun,
            engine,
            topic,
            read: VecDeque::new(),
            at: None,
            partial: None,
            refused: None,
            refusals: Refusals::default(),
        })
    }

    /// The next publication that the stream has; if it has none, waits for it up to `wait`.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Publication>> {
        let until = clock::instant() + wait;
        loop {
            while let Some(record) = self.read.pop_front() {
                if let Some(publication) = self.take(record) {
                    return Ok(Some(publication));
                }
            }
            let mut read = self.cursor.next_stored(&*self.engine, RECORDS)?;
            if matches!(&read, StreamRead::Records(records) if records.is_empty()) {
                let left = until.saturating_duration_since(clock::instant());
                if left.is_zero() {
                    return Ok(None);
                }
                read = self.cursor.next(&*self.engine, RECORDS, left)?;
            }
            match read {
                StreamRead::Records(records) => self.read.extend(records),
                StreamRead::Gap(gap) => self.pass(&gap)?,
            }
        }
    }

    /// Goes on behind missing records: at the newest snapshot if that is there, which needs nothing
    /// before it. A follower that has no weights yet begins at the oldest record instead, because
    /// there may be an earlier snapshot.
    fn pass(&mut self, gap: &StreamGap) -> Result<()> {
        if let Some(torn) = self.partial.take() {
            self.refusals.torn += 1;
            self.refused = Some(torn.envelope.publication());
        }
        let next = self.cursor.place().position;
        let first = self.engine.span(&self.topic)?.start;
        let newer = newest_snapshot(&*self.engine, &self.topic)?.filter(|&at| at >= next);
        let (from, what) = match newer {
            Some(at) => (at, "going on at the newest snapshot"),
            None if self.at.is_none() && first < self.begun => {
                self.begun = first;
                (first, "beginning at an earlier snapshot")
            }
            None => (next, "the weights stay until the next snapshot if deltas are among them"),
        };
        tracing::error!("published weights are missing: {gap}; {what}");
        if from != next {
            self.cursor.seek(&*self.engine, StreamPlace::at(from))?;
        }
        Ok(())
    }

    /// Processes a record; returns the publication that it completes, if any.
    fn take(&mut self, record: StreamRecord) -> Option<Publication> {
        let position = record.position;
        let (envelope, body) = match codec::decode(&record.payload) {
            Ok(found) => found,
            Err(why) => return self.refuse(damaged(why), position, None),
        };
        let this = envelope.publication();
        let taken = match body {
            RecordBody::Begin { header, total, dim } => {
                let begun = PartialPublication::new(envelope, *header, total, dim);
                self.begin(position, begun).map(|()| None)
            }
            _ if self.refused == Some(this) => Ok(None),
            RecordBody::Part(packed) => self
                .continued(envelope)
                .and_then(|partial| partial.add(packed).map_err(damaged))
                .map(|()| None),
            RecordBody::End { checksum, .. } => self
                .continued(envelope)
                .and_then(|partial| partial.check(checksum).map_err(damaged))
                .map(|()| {
                    self.at = Some(this);
                    self.partial.take().map(|partial| partial.publication)
                }),
        };
        taken.unwrap_or_else(|refusal| self.refuse(refusal, position, Some(this)))
    }

    fn begin(&mut self, position: u64, begun: PartialPublication) -> Refusable<()> {
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
        if (envelope.begin, envelope.number, envelope.sequence) != (position, 0, sequence) {
            return Err(foreign("its position or number is not the announced one"));
        }
        let continues =
            self.at == Some((envelope.chain, parent)) && parent.checked_add(1) == Some(sequence);
        if kind == PublicationKind::Delta && !continues {
            let why = "it continues other weights".to_owned();
            return Err(RecordRefusal { count: |counts| &mut counts.out_of_chain, why });
        }
        begun.total.check(begun.dim).map_err(damaged)?;
        self.partial = Some(begun);
        Ok(())
    }

    /// The publication that a record continues.
    fn continued(&mut self, envelope: RecordEnvelope) -> Refusable<&mut PartialPublication> {
        let partial = self.partial.as_mut();
        let partial =
            partial.ok_or_else(|| foreign("the beginning of its publication was not read"))?;
        let number = partial.envelope.number + 1;
        if envelope != (RecordEnvelope { number, ..partial.envelope }) {
            return Err(foreign("it belongs to another publication, or records are missing"));
        }
        partial.envelope.number = number;
        Ok(partial)
    }

    /// Counts and refuses a record and its publication.
    fn refuse(
        &mut self,
        RecordRefusal { count, why }: RecordRefusal,
        position: u64,
        publication: Option<(u64, u64)>,
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

type Refusable<T> = std::result::Result<T, RecordRefusal>;

fn damaged(why: String) -> RecordRefusal {
    RecordRefusal { count: |counts| &mut counts.damaged, why }
}

fn foreign(why: &str) -> RecordRefusal {
    RecordRefusal { count: |counts| &mut counts.foreign, why: why.to_owned() }
}

impl RecordEnvelope {
    fn publication(&self) -> (u64, u64) {
        (self.chain, self.sequence)
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

    fn add(&mut self, packed: PackedPart) -> std::result::Result<(), String> {
        self.checksum = packed.digest(self.checksum);
        let part = packed.unpack(self.dim)?;
        self.found.add(&part);
        let (found, total) = (&self.found, &self.total);
        if found.blocks > total.blocks
            || found.values > total.values
            || found.rows > total.rows
            || found.removed > total.removed
        {
            return Err("it has more weights than announced".into());
        }
        let Publication { blocks, ids, rows, removed, .. } = &mut self.publication;
        blocks.extend(part.blocks);
        ids.extend(part.ids);
        rows.extend(part.rows);
        removed.extend(part.removed);
        Ok(())
    }

    /// Checks that all weights have come.
    fn check(&self, checksum: u64) -> std::result::Result<(), String> {
        if self.found != self.total || self.checksum != checksum {
            return Err("its checksum is wrong".into());
        }
        Ok(())
    }
}

/// The position of the newest complete snapshot that is stored.
fn newest_snapshot(engine: &dyn StreamEngine, topic: &Topic) -> Result<Option<u64>> {
    let span = engine.span(topic)?;
    let tail = PublishedTail::of(engine, topic)?;
    Ok(tail.snapshot.filter(|at| span.contains(at)))
}
