//! The side of a reader: sets records aside, and learns which are to be tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypercast_core::clock::now_ms;
use hypercast_core::shutdown::Shutdown;

use super::{
    DeadLetter, LetterRecord, LetterScope, MAX_DEAD_LETTERS, READ_RECORDS, REASON_BYTES,
    SetAsideRate, UnusableRecord, decode, encode, first_kept,
};
use crate::error::Result;
use crate::streams::{
    Record, StreamCursor, StreamEngine, StreamPlace, StreamRead, StreamRecord, Topic,
};

/// How often it looks for orders.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Attempts to store letters, for other processes write to the same stream.
const ATTEMPTS: u32 = 30;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// The letters of one reader.
pub struct DeadLetterQueue {
    engine: Arc<dyn StreamEngine>,
    reader: String,
    source: String,
    rate: Arc<SetAsideRate>,
    stop: Shutdown,
    orders: StreamCursor,
    pub(super) looked: Option<Instant>,
}

impl DeadLetterQueue {
    /// The letters of a reader. Orders count from the position `from` on, where the reader had read
    /// them, or those that come from now on. `stop` ends the repetition of failed appends.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        of: LetterScope<'_>,
        from: Option<u64>,
        rate: Arc<SetAsideRate>,
        stop: Shutdown,
    ) -> Result<DeadLetterQueue> {
        let topic = Topic::dead_letters();
        let span = engine.span(&topic)?;
        let from = from.unwrap_or(span.end).min(span.end).max(first_kept(&span));
        let orders = StreamCursor::open(&*engine, &topic, StreamPlace::at(from))?;
        let (reader, source) = (of.reader.name().to_owned(), of.source.to_owned());
        Ok(DeadLetterQueue { engine, reader, source, rate, stop, orders, looked: None })
    }

    /// How far orders were read: to be saved with what was done on them.
    pub fn position(&self) -> u64 {
        self.orders.place().position
    }

    /// Sets records aside; the letters are durable when it returns. Records that this reader set
    /// aside before, at the same attempt, get no second letter.
    ///
    /// # Errors
    /// The engine cannot be reached for long, or until the process is to stop.
    pub fn set_aside(&self, records: Vec<UnusableRecord>) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        self.rate.add(records.len());
        let letters = records.into_iter().map(|record| self.letter(record));
        let letters = letters
            .map(|letter| {
                let DeadLetter { source, position, request, reason, .. } = &letter;
                tracing::warn!(source, position, request, reason, "a record was set aside");
                encode(letter.id(), &LetterRecord::SetAside(letter))
            })
            .collect::<Result<Vec<Record>>>()?;
        let mut attempt = 0;
        while let Err(error) = self.append(&letters) {
            attempt += 1;
            if attempt == ATTEMPTS || self.stop.is_requested() {
                return Err(error);
            }
            tracing::warn!(%error, "dead letters cannot be stored; trying again");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Records of this reader that an operator ordered to be tried again since the last call; it
    /// looks once a second. Where the engine fails, there are none for now.
    pub fn orders(&mut self) -> Vec<DeadLetter> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK_EVERY) {
            return Vec::new();
        }
        self.looked = Some(Instant::now());
        let records = match self.orders.next(&*self.engine, READ_RECORDS, Duration::ZERO) {
            Ok(StreamRead::Records(records)) => records,
            Ok(StreamRead::Gap(gap)) => {
                tracing::warn!("orders to try records again may be missing: {gap}");
                Vec::new()
            }
            Err(error) => {
                tracing::warn!(%error, "dead-letters cannot be read; trying again");
                Vec::new()
            }
        };
        let order = |record: StreamRecord| match decode(record.position, &record.payload)? {
            LetterRecord::Retry { letter, .. } => Some(letter),
            LetterRecord::SetAside(_) => None,
        };
        let is_own =
            |letter: &DeadLetter| (&letter.reader, &letter.source) == (&self.reader, &self.source);
        let ordered = records.into_iter().filter_map(order).filter(is_own);
        let again =
            |letter: DeadLetter| DeadLetter { retries: letter.retries.saturating_add(1), ..letter };
        ordered.map(again).collect()
    }

    /// This process writes to the stream for a moment only, as others do.
    fn append(&self, letters: &[Record]) -> Result<()> {
        let topic = Topic::dead_letters();
        let end = self.engine.appender(&topic)?.append(letters)?.end;
        self.engine.trim(&topic, end.saturating_sub(MAX_DEAD_LETTERS))
    }

    fn letter(&self, record: UnusableRecord) -> DeadLetter {
        let UnusableRecord { position, retries, request, checksum, mut reason } = record;
        reason.truncate(reason.floor_char_boundary(REASON_BYTES));
        let (reader, source, time_ms) = (self.reader.clone(), self.source.clone(), now_ms());
        DeadLetter { reader, source, position, retries, request, checksum, reason, time_ms }
    }
}
