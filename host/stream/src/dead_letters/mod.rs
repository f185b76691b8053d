//! Dead letters: records that a reader could not use, set aside so that it goes on behind them.
//!
//! A letter in the stream `dead-letters` says where its record is and why it was set aside; the
//! record stays in its own stream as long as that keeps it. An operator's order to try a record
//! again is a record of `dead-letters`, too. Its reader follows these orders and saves how far with
//! the rest of its state, so it tries each once. A record that fails again becomes a new letter.
//!
//! An event is tried again differently: it goes back into `events` itself, because the output of a
//! join is a function of that stream alone.

mod queue;
mod rate;

use hypercast_core::hash::mix_parts;
use serde::{Deserialize, Serialize};

pub use self::queue::DeadLetterQueue;
pub use self::rate::SetAsideRate;
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{
    Record, StreamCursor, StreamEngine, StreamPlace, StreamRead, StreamRecord, Topic, record_at,
};

/// The newest records of the stream that are kept and listed; older ones are deleted.
pub const MAX_DEAD_LETTERS: u64 = 10_000;

/// The longest reason in bytes; the rest is cut off.
const REASON_BYTES: usize = 1000;

/// Records per read.
const READ_RECORDS: usize = 1024;

/// The source of letters about feature logs, which are files. Other sources are streams.
pub const FEATURE_LOGS: &str = "logs";

/// A record that a reader could not use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusableRecord {
    /// Its position in its source.
    pub position: u64,
    /// How often it was tried again before.
    pub retries: u32,
    /// The request in it; none if the record cannot be read.
    pub request: Option<u64>,
    /// CRC-32 of its content; none of a row of a feature log.
    pub checksum: Option<u32>,
    /// Why it cannot be used.
    pub reason: String,
}

/// What is kept of a record that was set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Who set it aside ([`LetterReader::name`]).
    pub reader: String,
    /// The stream that has the record, or [`FEATURE_LOGS`].
    pub source: String,
    /// The record's position in the source.
    pub position: u64,
    /// How often it was tried again before.
    #[serde(default)]
    pub retries: u32,
    /// The request in the record; none if it cannot be read.
    #[serde(default)]
    pub request: Option<u64>,
    /// CRC-32 of the record's content, by which another record at its position is told apart; none
    /// of a row of a feature log, and in letters of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<u32>,
    /// Why it could not be used.
    pub reason: String,
    /// When it was set aside, milliseconds since the epoch.
    pub time_ms: i64,
}

/// A letter with its number, by which operators name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NumberedLetter {
    /// Its position in the stream of letters.
    pub number: u64,
    /// Whether an operator had the record tried again.
    pub retried: bool,
    /// The letter.
    #[serde(flatten)]
    pub letter: DeadLetter,
}

/// Who sets records aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LetterReader {
    /// The joiner, which reads `events`.
    Joiner,
    /// The feature state of daemons, which follows `outcomes`.
    Features,
    /// The logging tier, which reads `joined`.
    Logging,
    /// The trainer that publishes to this stream.
    Trainer(Topic),
}

/// Whose letters, and about what.
#[derive(Debug, Clone, Copy)]
pub struct LetterScope<'a> {
    /// Who sets records aside.
    pub reader: &'a LetterReader,
    /// The stream that it reads, or [`FEATURE_LOGS`].
    pub source: &'a str,
}

/// A record of the stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum LetterRecord {
    SetAside(DeadLetter),
    /// The order to try the record of a letter again.
    Retry {
        /// The letter's number.
        number: u64,
        letter: DeadLetter,
    },
}

impl LetterReader {
    /// The name in letters.
    pub fn name(&self) -> &str {
        match self {
            LetterReader::Joiner => "join",
            LetterReader::Features => "features",
            LetterReader::Logging => "logging",
            LetterReader::Trainer(topic) => topic.name(),
        }
    }
}

impl DeadLetter {
    /// The same for the same attempt at the same record, so that a reader that was killed and sets
    /// it aside again adds no second letter. Letters of releases without checksums have other ids,
    /// and are known by their positions ([`DeadLetterQueue::set_aside`]).
    fn id(&self) -> u64 {
        let text = |text: &str| {
            let mut words: Vec<u64> = text.bytes().map(u64::from).collect();
            words.push(text.len() as u64);
            mix_parts(&words)
        };
        let (reader, source) = (text(&self.reader), text(&self.source));
        let mut parts = vec![reader, source, self.position, u64::from(self.retries)];
        parts.extend(self.checksum.map(u64::from));
        mix_parts(&parts).max(1)
    }

    /// Why the record cannot be tried again; none if it can.
    fn retry_refusal(&self) -> Option<&'static str> {
        if self.reader == LetterReader::Logging.name() {
            return Some(
                "an FM may have learned from its request by now, so its embeddings would know what \
                 happened",
            );
        }
        (self.reader == LetterReader::Features.name()).then_some(
            "features follow outcomes in their order; a daemon that can read it takes it up if it \
             starts without its saved state (the folder `serve` under paths.state)",
        )
    }

    /// The content of the record, where its stream still has it.
    ///
    /// # Errors
    /// The source is no stream, the record was deleted, another one is in its place, or the engine
    /// cannot be reached.
    pub fn record(&self, engine: &dyn StreamEngine) -> Result<Vec<u8>> {
        let topic = Topic::source(&self.source).ok_or_else(|| {
            Error::invalid(format!("the record is in {}, which is no stream", self.source))
        })?;
        let StreamRecord { position, payload, .. } = record_at(engine, &topic, self.position)?;
        if self.checksum.is_some_and(|checksum| checksum != crc32fast::hash(&payload)) {
            return Err(Error::invalid(format!(
                "the record at position {position} of stream {topic} is not the one that was set \
                 aside: the stream was cut or made anew"
            )));
        }
        Ok(payload)
    }
}

/// What the stream of letters has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeptLetters {
    /// The letters, oldest first.
    pub letters: Vec<NumberedLetter>,
    /// How many records are missing between them: letters, or orders to try one again.
    pub lost: u64,
    /// The end of the stream.
    end: u64,
}

/// All letters that are kept, and how many were lost.
///
/// # Errors
/// The engine cannot be reached.
pub fn list(engine: &dyn StreamEngine) -> Result<KeptLetters> {
    let topic = Topic::dead_letters();
    let first = first_kept(&engine.span(&topic)?);
    let mut cursor = StreamCursor::open(engine, &topic, StreamPlace::at(first))?;
    let mut kept = KeptLetters::default();
    loop {
        match cursor.next_stored(engine, READ_RECORDS)? {
            StreamRead::Records(records) if records.is_empty() => break,
            StreamRead::Records(records) => records.iter().for_each(|record| kept.add(record)),
            // Another process may have deleted the oldest ones meanwhile.
            StreamRead::Gap(gap) if gap.position == first => {}
            StreamRead::Gap(gap) => {
                tracing::warn!("records are missing: {gap}");
                kept.lost += gap.missing();
            }
        }
    }
    kept.end = cursor.place().position;
    Ok(kept)
}

/// The letter with a number.
///
/// # Errors
/// There is none, or the engine cannot be reached.
pub fn find(engine: &dyn StreamEngine, number: u64) -> Result<NumberedLetter> {
    list(engine)?.find(number)
}

/// Orders that the record of a letter is tried again: by its reader, or, if it is an event, by the
/// joiner when it meets it again at the end of `events`.
///
/// # Errors
/// There is no such letter, its record was tried again already or cannot be, its stream no longer
/// has it, another process writes to `events`, or the engine cannot be reached.
pub fn retry(engine: &dyn StreamEngine, number: u64) -> Result<NumberedLetter> {
    loop {
        let kept = list(engine)?;
        let end = kept.end;
        let found = kept.find(number)?;
        let letter = &found.letter;
        if found.retried {
            return Err(Error::invalid(format!(
                "the record of dead letter {number} was tried again already; if it failed, it has a \
                 newer letter"
            )));
        }
        if let Some(why) = letter.retry_refusal() {
            return Err(Error::invalid(format!("dead letter {number} stays set aside: {why}")));
        }
        if letter.source != FEATURE_LOGS {
            let payload = letter.record(engine)?;
            if letter.source == Topic::events().name() {
                let record = Record { id: letter.id(), payload };
                engine.appender(&Topic::events())?.append(&[record])?;
            }
        }
        let order = encode(0, &LetterRecord::Retry { number, letter: letter.clone() })?;
        // Another writer may have been faster, perhaps with the same order.
        if engine.append_at(&Topic::dead_letters(), end, &[order])?.is_some() {
            return Ok(found);
        }
    }
}

impl KeptLetters {
    fn add(&mut self, record: &StreamRecord) {
        let letters = &mut self.letters;
        match decode(record.position, &record.payload) {
            Some(LetterRecord::SetAside(letter)) => {
                letters.push(NumberedLetter { number: record.position, retried: false, letter });
            }
            Some(LetterRecord::Retry { number, .. }) => {
                if let Ok(at) = letters.binary_search_by_key(&number, |letter| letter.number) {
                    letters[at].retried = true;
                }
            }
            None => {}
        }
    }

    fn find(self, number: u64) -> Result<NumberedLetter> {
        self.letters.into_iter().find(|letter| letter.number == number).ok_or_else(|| {
            Error::invalid(format!(
                "there is no dead letter {number}; `hypercast dead-letters list` names those that \
                 are kept"
            ))
        })
    }
}

/// The first position that counts. Engines that delete whole segments have earlier ones, too.
fn first_kept(span: &std::ops::Range<u64>) -> u64 {
    span.start.max(span.end.saturating_sub(MAX_DEAD_LETTERS))
}

fn encode(id: u64, record: &LetterRecord) -> Result<Record> {
    let payload = serde_json::to_vec(record)
        .map_err(|error| Error::internal(format!("cannot encode a dead letter: {error}")))?;
    Ok(Record { id, payload })
}

/// A record of the stream; none, with a warning, for one that this version does not know.
fn decode(position: u64, payload: &[u8]) -> Option<LetterRecord> {
    let decoded = serde_json::from_slice(payload);
    if let Err(error) = &decoded {
        tracing::warn!(position, %error, "a record of dead-letters cannot be read; it is skipped");
    }
    decoded.ok()
}

#[cfg(test)]
mod tests;
