//! The trainer's side: a snapshot first and now and then, deltas between.
//!
//! Everything is relative to what this process has published (`mirror`), so a restarted trainer, which cannot know
//! how far its saved weights are from those that it published last, begins with a snapshot. So does
//! one whose append failed. It says where in the stream the newest snapshot is, and lets go of what is before
//! the last but one.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use super::{
    Header, PublicationKind, TensorSlice, Weights,
    mirror::{Delta, Mirror, ROWS},
    wire::{self, Body, Envelope, PART_BYTES, Part, Total},
};
use crate::engine::{Appender, Engine, MAX_RECORD_BYTES, Record, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::PublishSettings;
use hypercast_core::clock::now_ms;

/// What the trainer says of the weights; see [`Header`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// The stream's position up to which it had learned.
    pub trained_position: u64,
    /// Time of the newest request learned from, milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// When the newest event that was learned from was taken in, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// What a publication was.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Published {
    /// Its number.
    pub sequence: u64,
    /// All weights, or some.
    pub kind: PublicationKind,
    /// Blocks of dense tensors.
    pub blocks: u64,
    /// Rows.
    pub rows: u64,
    /// Rows that are gone.
    pub removed: u64,
    /// Bytes of weights and ids.
    pub raw_bytes: u64,
    /// Bytes of the records.
    pub bytes: u64,
    /// Bytes of all the weights and ids that there are.
    pub all_bytes: u64,
}

/// Publishes one model's weights.
pub struct Publisher {
    engine: Arc<dyn Engine>,
    topic: Topic,
    appender: Arc<dyn Appender>,
    settings: PublishSettings,
    work: PathBuf,
    /// Where the stream stands; none until it was looked at.
    tail: Option<Tail>,
    chain: u64,
    deltas: u32,
    /// What was published; none before a snapshot.
    mirror: Option<Mirror>,
}

/// The end of a stream of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail {
    /// The position after the last record.
    pub(super) end: u64,
    /// The next publication's number.
    pub(super) sequence: u64,
    /// Where the newest whole snapshot begins.
    pub(super) snapshot: Option<u64>,
}

impl Publisher {
    /// Opens a model's stream for publishing. `work` is a folder of this publisher alone, for what it published last;
    /// it is replaced.
    ///
    /// # Errors
    /// A stream that another process publishes to, or an engine that cannot be reached.
    pub fn open(
        engine: Arc<dyn Engine>,
        topic: Topic,
        settings: PublishSettings,
        work: &Path,
    ) -> Result<Publisher> {
        let appender = engine.appender(&topic)?;
        let tail = Some(Tail::of(&*engine, &topic)?);
        let work = work.to_path_buf();
        let chain = RandomState::new().build_hasher().finish();
        Ok(Self { engine, topic, appender, settings, work, tail, chain, deltas: 0, mirror: None })
    }

    /// Whether a snapshot of the model is in the stream, from which a server can begin.
    pub fn has_snapshot(&self) -> bool {
        self.tail.is_some_and(|tail| tail.snapshot.is_some())
    }

    /// Publishes what moved, or everything. When it returns the publication is durable.
    ///
    /// # Errors
    /// What the engine says, or another publisher of the same model. The next publication is then a snapshot.
    pub fn publish(&mut self, source: &dyn Weights, facts: Facts) -> Result<Published> {
        let mirror = self.mirror.take();
        let delta = match &mirror {
            Some(mirror) if self.deltas < self.settings.snapshot_every => {
                mirror.choose(source, &self.settings)?
            }
            _ => None,
        };
        // Where an append fails, it is not known where the stream ends.
        let tail = match self.tail.take() {
            Some(tail) => tail,
            None => Tail::of(&*self.engine, &self.topic)?,
        };
        match (delta, mirror) {
            (Some(delta), Some(mirror)) => self.delta(source, facts, (tail, delta, mirror)),
            _ => self.snapshot(source, facts, tail),
        }
    }

    fn delta(
        &mut self,
        source: &dyn Weights,
        facts: Facts,
        (tail, delta, mut mirror): (Tail, Delta, Mirror),
    ) -> Result<Published> {
        let dim = source.rows().map_or(0, super::Rows::dim);
        let total = Total {
            blocks: delta.blocks.len() as u64,
            values: delta.blocks.iter().map(|block| block.values.len() as u64).sum(),
            rows: delta.ids.len() as u64,
            removed: delta.removed.len() as u64,
        };
        let header = self.header(source, facts, (PublicationKind::Delta, tail));
        let mut sending = self.begin(header, (total, dim), tail)?;
        for removed in delta.removed.chunks(PART_BYTES / 8) {
            sending.add(Part { removed: removed.into(), ..Part::default() })?;
        }
        for block in &delta.blocks {
            sending.block(block.clone())?;
        }
        if dim > 0 {
            let rows = delta.rows.chunks(ROWS.min(PART_BYTES / wire::row_bytes(dim)) * dim);
            for (ids, rows) in
                delta.ids.chunks(ROWS.min(PART_BYTES / wire::row_bytes(dim))).zip(rows)
            {
                sending.rows(ids, rows)?;
            }
        }
        let (published, tail) = sending.end(mirror.all_bytes(source))?;
        mirror.sent(&delta)?;
        (self.tail, self.mirror) = (Some(tail), Some(mirror));
        self.deltas += 1;
        Ok(published)
    }

    fn snapshot(&mut self, source: &dyn Weights, facts: Facts, tail: Tail) -> Result<Published> {
        let mut mirror = Mirror::new(source, &self.settings, &self.work)?;
        let (dim, rows) = source.rows().map_or((0, 0), |rows| (rows.dim(), rows.len()));
        let blocks: Vec<TensorSlice> = mirror.all_blocks().collect();
        let total = Total {
            blocks: blocks.len() as u64,
            values: blocks.iter().map(|block| block.values.len() as u64).sum(),
            rows: rows as u64,
            removed: 0,
        };
        let header = self.header(source, facts, (PublicationKind::Snapshot, tail));
        let mut sending = self.begin(header, (total, dim), tail)?;
        for block in blocks {
            sending.block(block)?;
        }
        if let Some(rows) = source.rows() {
            let all: Vec<u64> = rows.ids().collect();
            for ids in all.chunks(ROWS.min(PART_BYTES / wire::row_bytes(dim))) {
                let mut values = vec![0.0; ids.len() * dim];
                rows.gather(ids, &mut values);
                sending.rows(ids, &values)?;
                mirror.keep_rows(ids, &values)?;
            }
        }
        let (published, after) = sending.end(mirror.all_bytes(source))?;
        if let Some(before) = tail.snapshot {
            self.engine.trim(&self.topic, before)?;
        }
        (self.tail, self.mirror, self.deltas) = (Some(after), Some(mirror), 0);
        Ok(published)
    }

    fn header(
        &self,
        source: &dyn Weights,
        facts: Facts,
        (kind, tail): (PublicationKind, Tail),
    ) -> Header {
        Header {
            sequence: tail.sequence,
            kind,
            parent: match kind {
                PublicationKind::Snapshot => 0,
                PublicationKind::Delta => tail.sequence - 1,
            },
            trained_position: facts.trained_position,
            trained_until_ms: facts.trained_until_ms,
            ingested_ms: facts.ingested_ms,
            published_ms: now_ms(),
            manifest: source.manifest(),
        }
    }

    fn begin(&self, header: Header, (total, dim): (Total, usize), tail: Tail) -> Result<Sending> {
        total.check(dim).map_err(|why| Error::invalid(format!("{}: {why}", self.topic)))?;
        let mut sending = Sending {
            appender: self.appender.clone(),
            topic: self.topic.clone(),
            level: self.settings.zstd_level,
            envelope: Envelope {
                chain: self.chain,
                sequence: tail.sequence,
                number: 0,
                begin: tail.end,
                snapshot: tail.snapshot,
            },
            kind: header.kind,
            tail,
            part: Part::default(),
            part_bytes: 0,
            checksum: 0,
            records: Vec::new(),
            total: Total::default(),
            raw_bytes: 0,
            bytes: 0,
        };
        sending.record(&Body::Begin { header: Box::new(header), total, dim })?;
        Ok(sending)
    }
}

/// A publication on its way.
struct Sending {
    appender: Arc<dyn Appender>,
    topic: Topic,
    level: i32,
    envelope: Envelope,
    kind: PublicationKind,
    tail: Tail,
    part: Part,
    part_bytes: usize,
    checksum: u64,
    records: Vec<Record>,
    total: Total,
    raw_bytes: u64,
    bytes: u64,
}

/// Records appended together, at most.
const RECORDS: usize = 8;

impl Sending {
    fn block(&mut self, block: TensorSlice) -> Result<()> {
        let bytes = wire::block_bytes(&block.name, block.values.len());
        self.room_for(bytes)?;
        self.part.blocks.push(block);
        Ok(())
    }

    fn rows(&mut self, ids: &[u64], rows: &[f32]) -> Result<()> {
        self.room_for(8 * ids.len() + 4 * rows.len())?;
        self.part.ids.extend_from_slice(ids);
        self.part.rows.extend_from_slice(rows);
        Ok(())
    }

    fn room_for(&mut self, bytes: usize) -> Result<()> {
        if self.part_bytes + bytes > PART_BYTES {
            self.close_part()?;
        }
        self.part_bytes += bytes;
        Ok(())
    }

    fn close_part(&mut self) -> Result<()> {
        let part = std::mem::take(&mut self.part);
        self.part_bytes = 0;
        if part == Part::default() {
            return Ok(());
        }
        self.add(part)
    }

    fn add(&mut self, part: Part) -> Result<()> {
        self.total.add(&part);
        let blocks = part.blocks.iter();
        let blocks = blocks.map(|block| wire::block_bytes(&block.name, block.values.len()));
        self.raw_bytes += blocks.sum::<usize>() as u64;
        self.raw_bytes += (8 * (part.ids.len() + part.removed.len()) + 4 * part.rows.len()) as u64;
        let packed = part.pack();
        self.checksum = packed.digest(self.checksum);
        self.record(&Body::Part(packed))
    }

    fn record(&mut self, body: &Body) -> Result<()> {
        let failed = |why: String| Error::invalid(format!("publishing to {}: {why}", self.topic));
        let payload = wire::encode(&self.envelope, body, self.level).map_err(failed)?;
        if payload.len() > MAX_RECORD_BYTES {
            let bytes = payload.len();
            return Err(failed(format!(
                "a record of {bytes} bytes; its names or its manifest are too long"
            )));
        }
        self.envelope.number += 1;
        self.bytes += payload.len() as u64;
        // What is appended at a known end cannot be appended twice.
        self.records.push(Record { id: 0, payload });
        if self.records.len() == RECORDS { self.append() } else { Ok(()) }
    }

    fn append(&mut self) -> Result<()> {
        let records = std::mem::take(&mut self.records);
        match self.appender.append_at(self.tail.end, &records)? {
            Some(appended) => self.tail.end = appended.end,
            None => {
                return Err(Error::invalid(format!(
                    "another process publishes to {} too; stop one of them",
                    self.topic
                )));
            }
        }
        Ok(())
    }

    fn end(mut self, all_bytes: u64) -> Result<(Published, Tail)> {
        self.close_part()?;
        let snapshot = self.kind == PublicationKind::Snapshot;
        self.record(&Body::End { snapshot, checksum: self.checksum })?;
        if !self.records.is_empty() {
            self.append()?;
        }
        let tail = Tail {
            end: self.tail.end,
            sequence: self.tail.sequence + 1,
            snapshot: if snapshot { Some(self.envelope.begin) } else { self.tail.snapshot },
        };
        let published = Published {
            sequence: self.tail.sequence,
            kind: self.kind,
            blocks: self.total.blocks,
            rows: self.total.rows,
            removed: self.total.removed,
            raw_bytes: self.raw_bytes,
            bytes: self.bytes,
            all_bytes,
        };
        Ok((published, tail))
    }
}

impl Tail {
    /// Reads it from the last record; where that is damaged, from all of them.
    pub(super) fn of(engine: &dyn Engine, topic: &Topic) -> Result<Tail> {
        let span = engine.span(topic)?;
        let mut tail = Tail { end: span.end, sequence: 0, snapshot: None };
        if span.is_empty() {
            return Ok(tail);
        }
        if tail.read(engine, topic, span.end - 1)? {
            return Ok(tail);
        }
        tracing::warn!(%topic, "the last record of published weights is damaged; reading all of them");
        tail.read(engine, topic, span.start)?;
        // Numbers of damaged records are not known, but each publication has two records at least.
        tail.sequence = tail.sequence.max(span.end);
        Ok(tail)
    }

    /// Whether the records from a position on could be read.
    fn read(&mut self, engine: &dyn Engine, topic: &Topic, from: u64) -> Result<bool> {
        let mut reader = engine.reader(topic, from)?;
        let mut all = true;
        while reader.position() < self.end {
            let records = reader.next(RECORDS, Duration::ZERO)?;
            if records.is_empty() {
                break;
            }
            for record in records {
                let Ok((envelope, body)) = wire::decode(&record.payload) else {
                    all = false;
                    continue;
                };
                self.sequence = envelope.sequence + 1;
                self.snapshot = match body {
                    Body::End { snapshot: true, .. } => Some(envelope.begin),
                    _ => envelope.snapshot,
                };
            }
        }
        Ok(all)
    }
}
