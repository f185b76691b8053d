//! The trainer's side: publishes a snapshot first and from time to time, and deltas in between.
//!
//! Deltas are relative to what this process published ([`super::published_state`]). A restarted
//! trainer cannot know how far its saved weights are from the last published ones, so it begins
//! with a snapshot; so does a trainer whose append failed. A snapshot deletes the records before
//! the snapshot before it.
//!
//! A publication has two halves. [`Publisher::prepare`] takes what is to be sent from weights that
//! do not change meanwhile. [`Publisher::send`] encodes, compresses and appends it, and reads
//! nothing that the trainer changes, so that it may run beside learning ([`super::background`]).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_config::PublishSettings;
use hypercast_core::{clock::now_ms, entropy};
use hypercast_store::{Store, StoreReader};
use serde::Serialize;

use super::{
    PublicationHeader, PublicationKind, TensorSlice, WeightSource,
    codec::{self, PART_BYTES, RecordBody, RecordEnvelope, WeightsPart, WeightsTotal},
    published_state::{Delta, PublishedState, ROWS},
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{
    Appender, MAX_RECORD_BYTES, Record, StreamCursor, StreamEngine, StreamPlace, StreamRead, Topic,
};

/// How far the published weights were trained; see [`PublicationHeader`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainingPosition {
    /// The stream position up to which the model was trained.
    pub trained_position: u64,
    /// The time of the newest request in training, milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// When the newest event in training was received, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// The size of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PublicationStats {
    /// The publication's number.
    pub sequence: u64,
    /// Whether it has all weights.
    pub kind: PublicationKind,
    /// The number of blocks of dense tensors.
    pub blocks: u64,
    /// The number of rows.
    pub rows: u64,
    /// The number of removed rows.
    pub removed: u64,
    /// Bytes of weights and ids before compression.
    pub raw_bytes: u64,
    /// Bytes of the records.
    pub bytes: u64,
    /// Bytes of all weights and ids of the model.
    pub all_bytes: u64,
}

/// Publishes one model's weights.
pub struct Publisher {
    engine: Arc<dyn StreamEngine>,
    topic: Topic,
    /// `None` after a failure: an appender whose disk has failed takes no more, and one that is
    /// opened anew looks first at what was stored, as after a restart.
    appender: Option<Arc<dyn Appender>>,
    settings: PublishSettings,
    work: PathBuf,
    /// The end of the stream; `None` while it is unknown.
    tail: Option<PublishedTail>,
    /// A number by chance for each snapshot and the deltas that continue it. The numbers of
    /// publications can come again, because a stream that loses its tail goes on from what it has.
    chain: u64,
    deltas: u32,
    /// The published weights; `None` before a snapshot.
    state: Option<PublishedState>,
}

/// What a publication sends, of weights of one moment.
///
/// In memory it has the dense weights, and of a delta its rows: `publish.share` of all bytes at
/// most. The rows of a snapshot stay in the trainer's store, whose journal is in memory once more
/// (at most as long as it becomes before it is folded), until they are copied to the publisher's.
pub struct PreparedPublication {
    /// Without its number and its parent's, which the stream's end says.
    header: PublicationHeader,
    weights: PreparedWeights,
    /// What followers have; of a snapshot, what they will have, without its rows.
    state: PublishedState,
    /// The width of a row; 0 without rows.
    dim: usize,
    /// Bytes of all weights and ids of the model.
    all_bytes: u64,
}

/// Which weights are sent.
enum PreparedWeights {
    Delta(Delta),
    /// All, with the rows of the trainer's store, if it has one.
    Snapshot(Option<StoreReader>),
}

/// The end of a stream of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PublishedTail {
    /// The position after the last record.
    pub(super) end: u64,
    /// The next publication's number.
    pub(super) sequence: u64,
    /// The position of the newest complete snapshot.
    pub(super) snapshot: Option<u64>,
}

impl Publisher {
    /// Opens a model's stream for publishing. `work` is a directory for this publisher alone; it is
    /// replaced.
    ///
    /// # Errors
    /// Another process publishes to the stream, or the engine cannot be reached.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        topic: Topic,
        settings: PublishSettings,
        work: &Path,
    ) -> Result<Publisher> {
        let appender = Some(engine.appender(&topic)?);
        let tail = Some(PublishedTail::of(&*engine, &topic)?);
        let work = work.to_path_buf();
        let (chain, deltas) = (0, 0);
        Ok(Self { engine, topic, appender, settings, work, tail, chain, deltas, state: None })
    }

    /// Whether the stream has a snapshot, from which a server can begin.
    pub fn has_snapshot(&self) -> bool {
        self.tail.is_some_and(|tail| tail.snapshot.is_some())
    }

    /// Publishes what moved, or everything. The publication is durable when it returns.
    ///
    /// # Errors
    /// As [`Publisher::prepare`] and [`Publisher::send`].
    pub fn publish(
        &mut self,
        source: &dyn WeightSource,
        training: TrainingPosition,
    ) -> Result<PublicationStats> {
        let prepared = self.prepare(source, training)?;
        self.send(prepared)
    }

    /// Takes what moved from the weights, or all of them, for [`Publisher::send`]. Until that has
    /// succeeded, another publication would be a snapshot.
    ///
    /// # Errors
    /// The store cannot be read, or the work directory cannot be replaced.
    pub fn prepare(
        &mut self,
        source: &dyn WeightSource,
        training: TrainingPosition,
    ) -> Result<PreparedPublication> {
        let state = self.state.take();
        let delta = match &state {
            Some(state) if self.deltas < self.settings.snapshot_every => {
                state.next_delta(source, &self.settings)?
            }
            _ => None,
        };
        let (kind, weights, state) = match delta.zip(state) {
            Some((delta, state)) => (PublicationKind::Delta, PreparedWeights::Delta(delta), state),
            None => {
                let rows = source.rows().map(Store::reader).transpose()?;
                let state = PublishedState::new(source, &self.settings, &self.work)?;
                (PublicationKind::Snapshot, PreparedWeights::Snapshot(rows), state)
            }
        };
        let header = PublicationHeader {
            sequence: 0,
            kind,
            parent: 0,
            trained_position: training.trained_position,
            trained_until_ms: training.trained_until_ms,
            ingested_ms: training.ingested_ms,
            published_ms: now_ms(),
            manifest: source.manifest(),
        };
        let dim = source.rows().map_or(0, Store::dim);
        let all_bytes = state.all_bytes(source);
        Ok(PreparedPublication { header, weights, state, dim, all_bytes })
    }

    /// Sends what was prepared last. The publication is durable when it returns, and followers are
    /// known to have it.
    ///
    /// # Errors
    /// The engine fails, or another process publishes the same model. The next publication is then
    /// a snapshot.
    pub fn send(&mut self, prepared: PreparedPublication) -> Result<PublicationStats> {
        let sent = self.write(prepared);
        if sent.is_err() {
            self.appender = None;
        }
        sent
    }

    fn write(&mut self, prepared: PreparedPublication) -> Result<PublicationStats> {
        let PreparedPublication { mut header, weights, mut state, dim, all_bytes } = prepared;
        // After a failed append the end of the stream is unknown.
        let tail = match self.tail.take() {
            Some(tail) => tail,
            None => PublishedTail::of(&*self.engine, &self.topic)?,
        };
        header.sequence = tail.sequence;
        let (stats, after) = match weights {
            PreparedWeights::Delta(delta) => {
                header.parent = tail.sequence - 1;
                let mut total = WeightsTotal::default();
                total.add(&delta.weights);
                let mut writer = self.begin(header, total, dim, tail)?;
                writer.delta(&delta.weights, dim)?;
                let sent = writer.end(all_bytes)?;
                state.sent(delta)?;
                self.deltas += 1;
                sent
            }
            PreparedWeights::Snapshot(rows) => {
                // The trainer's store is done with before appends, which may take long.
                if let Some(rows) = rows {
                    state.copy_rows(&rows)?;
                }
                self.chain = entropy::number();
                let mut writer = self.begin(header, state.total(), dim, tail)?;
                writer.snapshot(&state)?;
                let sent = writer.end(all_bytes)?;
                if let Some(before) = tail.snapshot {
                    self.engine.trim(&self.topic, before)?;
                }
                self.deltas = 0;
                sent
            }
        };
        (self.tail, self.state) = (Some(after), Some(state));
        Ok(stats)
    }

    fn begin(
        &mut self,
        header: PublicationHeader,
        total: WeightsTotal,
        dim: usize,
        tail: PublishedTail,
    ) -> Result<PublicationWriter> {
        total.check(dim).map_err(|why| Error::refused(format!("{}: {why}", self.topic)))?;
        let appender = match self.appender.take() {
            Some(appender) => appender,
            None => self.engine.appender(&self.topic)?,
        };
        self.appender = Some(appender.clone());
        let mut writer = PublicationWriter {
            appender,
            topic: self.topic.clone(),
            level: self.settings.zstd_level,
            envelope: RecordEnvelope {
                chain: self.chain,
                sequence: tail.sequence,
                number: 0,
                begin: tail.end,
                snapshot: tail.snapshot,
            },
            tail,
            part: WeightsPart::default(),
            part_bytes: 0,
            checksum: 0,
            records: Vec::new(),
            stats: PublicationStats {
                sequence: tail.sequence,
                kind: header.kind,
                blocks: total.blocks,
                rows: total.rows,
                removed: total.removed,
                raw_bytes: 0,
                bytes: 0,
                all_bytes: 0,
            },
        };
        writer.record(&RecordBody::Begin { header: Box::new(header), total, dim })?;
        Ok(writer)
    }
}

/// The number of rows that fit a part.
fn rows_per_part(dim: usize) -> usize {
    ROWS.min(PART_BYTES / codec::row_bytes(dim))
}

/// Writes the records of one publication.
struct PublicationWriter {
    appender: Arc<dyn Appender>,
    topic: Topic,
    level: i32,
    envelope: RecordEnvelope,
    tail: PublishedTail,
    part: WeightsPart,
    part_bytes: usize,
    checksum: u64,
    records: Vec<Record>,
    stats: PublicationStats,
}

/// The most records that are appended together.
const RECORDS: usize = 8;

impl PublicationWriter {
    /// Adds the weights of a delta, whose rows have `dim` values.
    fn delta(&mut self, weights: &WeightsPart, dim: usize) -> Result<()> {
        let WeightsPart { blocks, ids, rows, removed } = weights;
        for removed in removed.chunks(PART_BYTES / 8) {
            self.add(WeightsPart { removed: removed.into(), ..WeightsPart::default() })?;
        }
        blocks.iter().try_for_each(|block| self.block(block.clone()))?;
        if dim > 0 {
            let count = rows_per_part(dim);
            for (ids, rows) in ids.chunks(count).zip(rows.chunks(count * dim)) {
                self.rows(ids, rows)?;
            }
        }
        Ok(())
    }

    /// Adds all weights; the rows are read a part at a time.
    fn snapshot(&mut self, state: &PublishedState) -> Result<()> {
        state.all_blocks().try_for_each(|block| self.block(block))?;
        let Some(rows) = state.rows() else { return Ok(()) };
        let (dim, all) = (rows.dim(), rows.ids().collect::<Vec<u64>>());
        for ids in all.chunks(rows_per_part(dim)) {
            let mut values = vec![0.0; ids.len() * dim];
            rows.gather(ids, &mut values)?;
            self.rows(ids, &values)?;
        }
        // Before the last record makes it a publication.
        Ok(rows.check_files()?)
    }

    fn block(&mut self, block: TensorSlice) -> Result<()> {
        let bytes = codec::block_bytes(&block.name, block.values.len());
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
        if part == WeightsPart::default() {
            return Ok(());
        }
        self.add(part)
    }

    fn add(&mut self, part: WeightsPart) -> Result<()> {
        self.stats.raw_bytes += part.bytes() as u64;
        let packed = part.pack();
        self.checksum = packed.digest(self.checksum);
        self.record(&RecordBody::Part(packed))
    }

    fn record(&mut self, body: &RecordBody) -> Result<()> {
        let failed = |why: String| Error::internal(format!("publishing to {}: {why}", self.topic));
        let payload = codec::encode(&self.envelope, body, self.level).map_err(failed)?;
        if payload.len() > MAX_RECORD_BYTES {
            let bytes = payload.len();
            return Err(failed(format!(
                "a record has {bytes} bytes; the tensor names or the manifest are too long"
            )));
        }
        self.envelope.number += 1;
        self.stats.bytes += payload.len() as u64;
        // A record that is appended at a known end cannot be appended twice.
        self.records.push(Record { id: 0, payload });
        if self.records.len() == RECORDS { self.append() } else { Ok(()) }
    }

    fn append(&mut self) -> Result<()> {
        let records = std::mem::take(&mut self.records);
        let appended = self.appender.append_at(self.tail.end, &records)?.ok_or_else(|| {
            Error::refused(format!(
                "another process publishes to {}, too; stop one of them",
                self.topic
            ))
        })?;
        self.tail.end = appended.end;
        Ok(())
    }

    fn end(mut self, all_bytes: u64) -> Result<(PublicationStats, PublishedTail)> {
        self.close_part()?;
        let snapshot = self.stats.kind == PublicationKind::Snapshot;
        self.record(&RecordBody::End { snapshot, checksum: self.checksum })?;
        if !self.records.is_empty() {
            self.append()?;
        }
        let tail = PublishedTail {
            end: self.tail.end,
            sequence: self.tail.sequence + 1,
            snapshot: if snapshot { Some(self.envelope.begin) } else { self.tail.snapshot },
        };
        Ok((PublicationStats { all_bytes, ..self.stats }, tail))
    }
}

impl PublishedTail {
    /// Reads the last record; if that is damaged or missing, all records.
    pub(super) fn of(engine: &dyn StreamEngine, topic: &Topic) -> Result<PublishedTail> {
        let span = engine.span(topic)?;
        let mut tail = PublishedTail { end: span.end, sequence: 0, snapshot: None };
        if span.is_empty() {
            return Ok(tail);
        }
        if tail.read(engine, topic, span.end - 1)? {
            return Ok(tail);
        }
        tracing::warn!(
            %topic,
            "the last record of published weights is damaged or missing; reading all of them"
        );
        tail.read(engine, topic, span.start)?;
        // The numbers of damaged records are unknown, but each publication has at least two
        // records.
        tail.sequence = tail.sequence.max(tail.end);
        Ok(tail)
    }

    /// Reads the records from a position on; false if one is damaged or missing.
    fn read(&mut self, engine: &dyn StreamEngine, topic: &Topic, from: u64) -> Result<bool> {
        let mut cursor = StreamCursor::open(engine, topic, StreamPlace::at(from))?;
        let mut all = true;
        loop {
            let records = match cursor.next_stored(engine, RECORDS)? {
                StreamRead::Records(records) if records.is_empty() => break,
                StreamRead::Records(records) => records,
                StreamRead::Gap(_) => {
                    all = false;
                    continue;
                }
            };
            for record in records {
                let Ok((envelope, body)) = codec::decode(&record.payload) else {
                    all = false;
                    continue;
                };
                self.sequence = envelope.sequence + 1;
                self.snapshot = match body {
                    RecordBody::End { snapshot: true, .. } => Some(envelope.begin),
                    _ => envelope.snapshot,
                };
            }
        }
        self.end = cursor.place().position;
        Ok(all)
    }
}
