//! Reads a stream from a place on, and goes on behind records that are missing, which it reports.
//! Whoever reads a whole stream reads it so: a read without records is not the stream's end.

use std::time::Duration;

use super::{GapCause, Reader, StreamEngine, StreamGap, StreamPlace, StreamRecord, Topic};
use crate::error::{CommonErrors as _, Error, Result};

/// How long one read waits for records that the stream says it has, before it looks whether the
/// process is to stop.
const STORED_WAIT: Duration = Duration::from_secs(1);

/// Such reads without any record, one after the other, after which the records count as missing: a
/// stream can have lost its last ones, and still end behind them. NATS tells within these reads if
/// a stream became shorter.
const STORED_READS: u32 = 40;

/// What a read of a stream found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamRead {
    /// The next records; none if none came in time.
    Records(Vec<StreamRecord>),
    /// Records are missing; the next read goes on behind them.
    Gap(StreamGap),
}

/// A place in a stream that moves with what is read. A failed read is repeated from the same place
/// by the next call.
pub struct StreamCursor {
    topic: Topic,
    reader: Box<dyn Reader>,
    place: StreamPlace,
}

impl StreamCursor {
    /// Reads from a place on.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(
        engine: &dyn StreamEngine,
        topic: &Topic,
        place: StreamPlace,
    ) -> Result<StreamCursor> {
        Ok(StreamCursor { topic: topic.clone(), reader: engine.resume(topic, place)?, place })
    }

    /// The place after the last record that was read.
    pub fn place(&self) -> StreamPlace {
        self.place
    }

    /// Reads from another place on.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn seek(&mut self, engine: &dyn StreamEngine, place: StreamPlace) -> Result<()> {
        self.reader = engine.resume(&self.topic, place)?;
        self.place = place;
        Ok(())
    }

    /// The next records, as [`Reader::next`] returns them, or what is missing before them.
    ///
    /// # Errors
    /// A record is damaged, or the engine cannot be reached.
    pub fn next(
        &mut self,
        engine: &dyn StreamEngine,
        most: usize,
        wait: Duration,
    ) -> Result<StreamRead> {
        match self.reader.next(most, wait) {
            Ok(records) => {
                if let Some(last) = records.last() {
                    self.place = StreamPlace::after(last);
                }
                Ok(StreamRead::Records(records))
            }
            Err(Error::Gap(gap)) => {
                self.seek(engine, StreamPlace::at(gap.next_position()))?;
                Ok(StreamRead::Gap(gap))
            }
            // The reader may have lost its connection or its file.
            Err(error) => {
                if let Ok(reader) = engine.resume(&self.topic, self.place) {
                    self.reader = reader;
                }
                Err(error)
            }
        }
    }

    /// The next records that the stream has now, or what is missing before them; no records mean
    /// that it has no more.
    ///
    /// # Errors
    /// As [`StreamCursor::next`]; or they do not come, and the process is to stop
    /// ([`StreamEngine::is_stopping`]).
    pub fn next_stored(&mut self, engine: &dyn StreamEngine, most: usize) -> Result<StreamRead> {
        let mut end = 0;
        for _ in 0..STORED_READS {
            end = engine.span(&self.topic)?.end;
            if self.place.position == end {
                return Ok(StreamRead::Records(Vec::new()));
            }
            match self.next(engine, most, STORED_WAIT)? {
                StreamRead::Records(records) if records.is_empty() => {}
                read => return Ok(read),
            }
            if engine.is_stopping() {
                return Err(Error::unreachable(format!(
                    "stream {}: the records from position {} on have not come, and the process is \
                     to stop; it goes on there at its next start",
                    self.topic, self.place.position
                )));
            }
        }
        let (topic, position) = (self.topic.clone(), self.place.position);
        if position > end {
            // The record before is still the one that was read, so the end is only told late.
            return Ok(StreamRead::Records(Vec::new()));
        }
        self.seek(engine, StreamPlace::at(end))?;
        let cause = GapCause::Deleted { first: end };
        Ok(StreamRead::Gap(StreamGap { topic, position, cause }))
    }
}

/// The record at a position of a stream.
///
/// # Errors
/// The stream no longer has it ([`Error::Gap`]) or ends before it, the record is damaged, or the
/// engine cannot be reached.
pub fn record_at(engine: &dyn StreamEngine, topic: &Topic, position: u64) -> Result<StreamRecord> {
    let mut cursor = StreamCursor::open(engine, topic, StreamPlace::at(position))?;
    match cursor.next_stored(engine, 1)? {
        StreamRead::Records(read) => read.into_iter().next().ok_or_else(|| {
            Error::invalid(format!("stream {topic} ends before position {position}"))
        }),
        StreamRead::Gap(gap) => Err(Error::Gap(gap)),
    }
}
