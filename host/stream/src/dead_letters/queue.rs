//! The side of a reader: sets records aside, and learns which are to be tried again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypercast_core::clock::{self, now_ms};
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
    /// None until a record is set aside.
    earlier: RefCell<Option<EarlierLetters>>,
}

/// A reader's letters without a checksum, which earlier releases wrote. Their ids are not those of
/// letters that have one, so a record's second letter is known by its position here.
struct EarlierLetters {
    /// How far letters were read.
    cursor: StreamCursor,
    /// The newest [`MAX_DEAD_LETTERS`] at most.
    letters: BTreeMap<RecordAttempt, EarlierLetter>,
}

/// An attempt at a record of the reader's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct RecordAttempt {
    position: u64,
    retries: u32,
}

struct EarlierLetter {
    number: u64,
    request: Option<u64>,
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
        let (looked, earlier) = (None, RefCell::default());
        Ok(DeadLetterQueue { engine, reader, source, rate, stop, orders, looked, earlier })
    }

    /// How far orders were read: to be saved with what was done on them.
    pub fn position(&self) -> u64 {
        self.orders.place().position
    }

    /// Sets records aside; the letters are durable when it returns. Records that this reader set
    /// aside before, at the same attempt and in whatever release, get no second letter.
    ///
    /// # Errors
    /// The engine cannot be reached for long, or until the process is to stop.
    pub fn set_aside(&self, records: Vec<UnusableRecord>) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        self.rate.add(records.len());
        let letters: Vec<DeadLetter> =
            records.into_iter().map(|record| self.letter(record)).collect();
        for DeadLetter { source, position, request, reason, .. } in &letters {
            tracing::warn!(source, position, request, reason, "a record was set aside");
        }
        let mut attempt = 0;
        while let Err(error) = self.append(&letters) {
            attempt += 1;
            if attempt == ATTEMPTS || self.stop.is_requested() {
                return Err(error);
            }
            tracing::warn!(%error, "dead letters cannot be stored; trying again");
            clock::sleep(PAUSE);
        }
        Ok(())
    }

    /// Records of this reader that an operator ordered to be tried again since the last call; it
    /// looks once a second. Where the engine fails, there are none for now.
    pub fn orders(&mut self) -> Vec<DeadLetter> {
        if self.looked.is_some_and(|looked| clock::since(looked) < LOOK_EVERY) {
            return Vec::new();
        }
        self.looked = Some(clock::instant());
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
        let ordered = records.into_iter().filter_map(order).filter(|letter| self.is_own(letter));
        let again =
            |letter: DeadLetter| DeadLetter { retries: letter.retries.saturating_add(1), ..letter };
        ordered.map(again).collect()
    }

    /// This process writes to the stream for a moment only, as others do.
    fn append(&self, letters: &[DeadLetter]) -> Result<()> {
        let topic = Topic::dead_letters();
        let mut earlier = self.earlier.borrow_mut();
        let earlier = self.read_earlier(&mut earlier)?;
        let new = letters.iter().filter(|letter| !earlier.has(letter));
        let records: Vec<Record> = new
            .map(|letter| encode(letter.id(), &LetterRecord::SetAside(letter.clone())))
            .collect::<Result<_>>()?;
        let end = self.engine.appender(&topic)?.append(&records)?.end;
        self.engine.trim(&topic, end.saturating_sub(MAX_DEAD_LETTERS))
    }

    /// Reads the letters that came since the last call: a process of an earlier release may write
    /// some beside this one.
    fn read_earlier<'a>(
        &self,
        earlier: &'a mut Option<EarlierLetters>,
    ) -> Result<&'a EarlierLetters> {
        let (engine, topic) = (&*self.engine, Topic::dead_letters());
        let first = first_kept(&engine.span(&topic)?);
        let known = match earlier {
            Some(known) => known,
            None => {
                let cursor = StreamCursor::open(engine, &topic, StreamPlace::at(first))?;
                earlier.insert(EarlierLetters { cursor, letters: BTreeMap::new() })
            }
        };
        loop {
            match known.cursor.next_stored(engine, READ_RECORDS)? {
                StreamRead::Records(records) if records.is_empty() => break,
                StreamRead::Records(records) => {
                    records.iter().for_each(|record| self.note(record, &mut known.letters));
                }
                // Letters that are lost are known by nobody; listing them says how many.
                StreamRead::Gap(_) => {}
            }
        }
        known.letters.retain(|_, letter| letter.number >= first);
        Ok(known)
    }

    /// Notes a letter of this reader that has no checksum.
    fn note(&self, record: &StreamRecord, letters: &mut BTreeMap<RecordAttempt, EarlierLetter>) {
        let Some(LetterRecord::SetAside(letter)) = decode(record.position, &record.payload) else {
            return;
        };
        if letter.checksum.is_none() && self.is_own(&letter) {
            let DeadLetter { position, retries, request, .. } = letter;
            let letter = EarlierLetter { number: record.position, request };
            letters.insert(RecordAttempt { position, retries }, letter);
        }
    }

    fn is_own(&self, letter: &DeadLetter) -> bool {
        (&letter.reader, &letter.source) == (&self.reader, &self.source)
    }

    fn letter(&self, record: UnusableRecord) -> DeadLetter {
        let UnusableRecord { position, retries, request, checksum, mut reason } = record;
        reason.truncate(reason.floor_char_boundary(REASON_BYTES));
        let (reader, source, time_ms) = (self.reader.clone(), self.source.clone(), now_ms());
        DeadLetter { reader, source, position, retries, request, checksum, reason, time_ms }
    }
}

impl EarlierLetters {
    /// Whether a record has a letter without a checksum. Where both letters name a request, that
    /// must be the same one: a stream that was made anew has another record at the position.
    fn has(&self, letter: &DeadLetter) -> bool {
        let &DeadLetter { position, retries, request, checksum, .. } = letter;
        let earlier = self.letters.get(&RecordAttempt { position, retries });
        checksum.is_some()
            && earlier.is_some_and(|earlier| match (earlier.request, request) {
                (Some(earlier), Some(request)) => earlier == request,
                _ => true,
            })
    }
}
