//! The server's side: publications in order, each whole and checked, or none.
//!
//! It begins at the newest whole snapshot. A delta is given out only if it goes on from what was given out last;
//! anything torn, damaged, foreign or out of order is refused with its reason, counted, and changes nothing:
//! the old weights stay until the next snapshot. What weights are for is the caller's business.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Header, Publication, PublicationKind,
    publisher::Tail,
    wire::{self, Body, Envelope, Total},
};
use crate::engine::{Engine, Reader, Stored, Topic};
use crate::error::Result;

/// Records read at once.
const RECORDS: usize = 8;

/// Where a follower is: after the publication that it gave out last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct At {
    /// The publisher's chain.
    pub chain: u64,
    /// The publication's number.
    pub sequence: u64,
    /// The position of the next record.
    pub position: u64,
}

/// How much was refused, since the follower was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Refusals {
    /// Records that are damaged.
    pub damaged: u64,
    /// Records of another publication than the one that they are in.
    pub foreign: u64,
    /// Publications without their end.
    pub torn: u64,
    /// Deltas that go on from other weights.
    pub out_of_chain: u64,
}

/// Follows one model's published weights.
pub struct Follower {
    engine: Arc<dyn Engine>,
    topic: Topic,
    reader: Box<dyn Reader>,
    read: VecDeque<Stored>,
    at: Option<At>,
    coming: Option<Coming>,
    /// A publication that was refused; what is left of it is passed over.
    refused: Option<(u64, u64)>,
    refusals: Refusals,
}

/// A publication that is not whole yet.
struct Coming {
    envelope: Envelope,
    total: Total,
    dim: usize,
    found: Total,
    checksum: u64,
    publication: Publication,
}

/// What a record made of what came before it.
enum Step {
    /// More is to come, or it is of no interest.
    On,
    /// A publication is whole.
    Whole(Box<Publication>),
}

impl Follower {
    /// Follows from the newest whole snapshot on, or from the first that will be there.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    pub fn open(engine: Arc<dyn Engine>, topic: Topic) -> Result<Follower> {
        let from = newest(&*engine, &topic)?;
        let reader = engine.reader(&topic, from)?;
        Ok(Self::with(engine, topic, reader, None))
    }

    /// Goes on where another follower was, with the weights that it had.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    pub fn resume(engine: Arc<dyn Engine>, topic: Topic, at: At) -> Result<Follower> {
        let span = engine.span(&topic)?;
        // What is no longer kept is made up for by a snapshot.
        let from = if span.contains(&at.position) || at.position == span.end {
            at.position
        } else {
            newest(&*engine, &topic)?
        };
        let reader = engine.reader(&topic, from)?;
        Ok(Self::with(engine, topic, reader, Some(at)))
    }

    fn with(
        engine: Arc<dyn Engine>,
        topic: Topic,
        reader: Box<dyn Reader>,
        at: Option<At>,
    ) -> Follower {
        let (read, refusals) = (VecDeque::new(), Refusals::default());
        Self { engine, topic, reader, read, at, coming: None, refused: None, refusals }
    }

    /// Where it is; none before the first publication.
    pub fn at(&self) -> Option<At> {
        self.at
    }

    /// What it refused.
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }

    /// The next publication; where there is none yet, waits for it up to `wait`.
    ///
    /// # Errors
    /// An engine that cannot be reached. It can be called again.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Publication>> {
        let until = Instant::now() + wait;
        loop {
            while let Some(record) = self.read.pop_front() {
                if let Step::Whole(publication) = self.take(record) {
                    return Ok(Some(*publication));
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            let position = self.reader.position();
            match self.reader.next(RECORDS, left) {
                Ok(records) => self.read.extend(records),
                // It lagged so far behind that records are gone.
                Err(_) if position < self.engine.span(&self.topic)?.start => {
                    tracing::warn!(topic = %self.topic, position, "published weights are gone before they were read; going on at the newest snapshot");
                    self.coming = None;
                    self.reader =
                        self.engine.reader(&self.topic, newest(&*self.engine, &self.topic)?)?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            if self.read.is_empty() && Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    fn take(&mut self, record: Stored) -> Step {
        let (envelope, body) = match wire::decode(&record.payload) {
            Ok(found) => found,
            Err(why) => {
                self.refusals.damaged += 1;
                return self.refuse(record.position, None, &why);
            }
        };
        match body {
            Body::Begin { header, total, dim } => {
                self.begin(&record, envelope, Publication::empty(*header), (total, dim))
            }
            Body::Part(_) | Body::End { .. } if self.refused == Some(envelope.publication()) => {
                Step::On
            }
            Body::Part(packed) => self.on(record.position, envelope, |coming| {
                coming.checksum = packed.digest(coming.checksum);
                let part = packed.unpack(coming.dim)?;
                coming.found.add(&part);
                if !coming.found.is_within(&coming.total) {
                    return Err("it has more weights than it said".into());
                }
                let Publication { blocks, ids, rows, removed, .. } = &mut coming.publication;
                blocks.extend(part.blocks);
                ids.extend(part.ids);
                rows.extend(part.rows);
                removed.extend(part.removed);
                Ok(false)
            }),
            Body::End { checksum, .. } => self.on(record.position, envelope, |coming| {
                match coming.found == coming.total && coming.checksum == checksum {
                    true => Ok(true),
                    false => Err("its checksum differs".into()),
                }
            }),
        }
    }

    fn begin(
        &mut self,
        record: &Stored,
        envelope: Envelope,
        publication: Publication,
        (total, dim): (Total, usize),
    ) -> Step {
        if self.coming.take().is_some() {
            self.refusals.torn += 1;
            tracing::warn!(topic = %self.topic, position = record.position, "published weights have no end; the old ones stay");
        }
        let Header { kind, sequence, parent, .. } = publication.header;
        let this = Some(envelope.publication());
        if envelope.begin != record.position
            || envelope.number != 0
            || sequence != envelope.sequence
        {
            self.refusals.foreign += 1;
            return self.refuse(record.position, this, "it is in another place than it says");
        }
        let goes_on = self.at.is_some_and(|at| {
            at.chain == envelope.chain
                && at.sequence == parent
                && parent.checked_add(1) == Some(sequence)
        });
        if kind == PublicationKind::Delta && !goes_on {
            self.refusals.out_of_chain += 1;
            return self.refuse(record.position, this, "it goes on from other weights");
        }
        if let Err(why) = total.check(dim) {
            self.refusals.damaged += 1;
            return self.refuse(record.position, this, &why);
        }
        let (found, checksum) = (Total::default(), 0);
        self.coming = Some(Coming { envelope, total, dim, found, checksum, publication });
        Step::On
    }

    /// Takes a record of the publication that is coming; `take` says whether it is the last.
    fn on(
        &mut self,
        position: u64,
        envelope: Envelope,
        take: impl FnOnce(&mut Coming) -> std::result::Result<bool, String>,
    ) -> Step {
        let this = Some(envelope.publication());
        let Some(coming) = &mut self.coming else {
            self.refusals.foreign += 1;
            return self.refuse(
                position,
                this,
                "it is of a publication whose beginning was not read",
            );
        };
        let number = coming.envelope.number + 1;
        if envelope != (Envelope { number, ..coming.envelope }) {
            self.refusals.foreign += 1;
            return self.refuse(
                position,
                this,
                "it is of another publication, or records are missing",
            );
        }
        coming.envelope.number = number;
        match take(coming) {
            Ok(false) => Step::On,
            Ok(true) => {
                let coming = self.coming.take().expect("it was there");
                let Envelope { chain, sequence, .. } = envelope;
                self.at = Some(At { chain, sequence, position: position + 1 });
                Step::Whole(Box::new(coming.publication))
            }
            Err(why) => {
                self.refusals.damaged += 1;
                self.refuse(position, this, &why)
            }
        }
    }

    /// Refuses a record, and with it the publication that it is in.
    fn refuse(&mut self, position: u64, publication: Option<(u64, u64)>, why: &str) -> Step {
        let in_way = self.coming.take().map(|coming| coming.envelope.publication());
        self.refused = publication.or(in_way);
        tracing::warn!(topic = %self.topic, position, "published weights are refused: {why}; the old ones stay");
        Step::On
    }
}

impl Envelope {
    fn publication(&self) -> (u64, u64) {
        (self.chain, self.sequence)
    }
}

impl Total {
    fn is_within(&self, most: &Total) -> bool {
        self.blocks <= most.blocks
            && self.values <= most.values
            && self.rows <= most.rows
            && self.removed <= most.removed
    }
}

impl Publication {
    fn empty(header: Header) -> Publication {
        let (blocks, ids, rows, removed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Publication { header, blocks, ids, rows, removed }
    }
}

/// Where to begin to follow.
fn newest(engine: &dyn Engine, topic: &Topic) -> Result<u64> {
    let span = engine.span(topic)?;
    let tail = Tail::of(engine, topic)?;
    Ok(tail.snapshot.filter(|at| span.contains(at)).unwrap_or(span.start))
}
