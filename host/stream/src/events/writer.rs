//! Appends events to their stream, and ticks while no events arrive, so that the joiner's windows
//! close.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_config::JoinSettings;
use hypercast_core::clock::{self, now_ms};
use hypercast_core::shutdown::Shutdown;

use super::{EventKind, NewEvent, RankingEvent};
use crate::error::Result;
use crate::streams::{Appender, Record, StreamEngine, Topic};

/// Appends the events that one process receives.
pub struct EventWriter {
    engine: Arc<dyn StreamEngine>,
    appender: Mutex<Option<Arc<dyn Appender>>>,
    max_future_ms: i64,
    tick_ms: u64,
    /// How long after the last event a window may be open.
    ticks_for_ms: u64,
    /// The times below count from here: the wall clock may be set back, and then no tick would come
    /// for as long.
    opened: Instant,
    last_event_ms: AtomicU64,
    last_append_ms: AtomicU64,
}

/// The result of appending a request's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendReceipt {
    /// The events that were not stored before.
    pub accepted: usize,
    /// Events that were stored before.
    pub repeated: usize,
    /// The end of the stream after them.
    pub end: u64,
}

impl EventWriter {
    /// A writer that opens the stream at its first event, or with [`EventWriter::open`].
    pub fn new(engine: Arc<dyn StreamEngine>, settings: &JoinSettings) -> EventWriter {
        let ms = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX / 4);
        EventWriter {
            engine,
            appender: Mutex::new(None),
            max_future_ms: ms(settings.max_future_s),
            tick_ms: settings.tick_ms,
            ticks_for_ms: settings.max_window_s.saturating_add(60).saturating_mul(1000),
            opened: clock::instant(),
            last_event_ms: AtomicU64::new(0),
            last_append_ms: AtomicU64::new(0),
        }
    }

    /// Opens the stream for writing.
    ///
    /// # Errors
    /// Another process writes to the stream, or the engine cannot be reached.
    pub fn open(&self) -> Result<Arc<dyn Appender>> {
        let mut appender = self.appender.lock().expect("no holder panics");
        if let Some(appender) = &*appender {
            return Ok(appender.clone());
        }
        Ok(appender.insert(self.engine.appender(&Topic::events())?).clone())
    }

    /// How long this writer has been there, in milliseconds.
    fn open_ms(&self) -> u64 {
        u64::try_from(clock::since(self.opened).as_millis()).unwrap_or(u64::MAX)
    }

    /// The latest timestamp that is accepted now, in milliseconds since the epoch.
    pub fn latest_ms(&self) -> i64 {
        match self.max_future_ms {
            0 => i64::MAX,
            ahead => now_ms().saturating_add(ahead),
        }
    }

    /// Appends the events of a request of `given` events; all are durable when it returns. Several
    /// events of one request may share a record.
    ///
    /// # Errors
    /// An event cannot be encoded, or the engine fails.
    pub fn append(&self, events: Vec<NewEvent>, given: usize) -> Result<AppendReceipt> {
        let arrived_ms = now_ms();
        let records: Vec<Record> =
            events.into_iter().map(|event| event.record(arrived_ms)).collect::<Result<_>>()?;
        let appended = self.open()?.append(&records)?;
        let now = self.open_ms();
        self.last_event_ms.store(now, Ordering::Relaxed);
        self.last_append_ms.store(now, Ordering::Relaxed);
        // If all records were stored before, so were all events.
        let all = appended.repeated == records.len();
        let repeated = if all { given } else { appended.repeated };
        Ok(AppendReceipt { accepted: given - repeated.min(given), repeated, end: appended.end })
    }

    /// Appends the rankings of answers; false if this process does not write the stream, which may
    /// have one writer and then is another's. They open no window, and time does not pass by them.
    ///
    /// # Errors
    /// A ranking is too long for a record, or the engine fails.
    pub fn append_rankings(&self, rankings: Vec<RankingEvent>) -> Result<bool> {
        let appender = if self.engine.has_many_writers() {
            Some(self.open()?)
        } else {
            self.appender.lock().expect("no holder panics").clone()
        };
        let Some(appender) = appender else { return Ok(false) };
        let arrived_ms = now_ms();
        let record =
            |ranking| NewEvent { id: None, kind: EventKind::Ranking(ranking) }.record(arrived_ms);
        let records: Vec<Record> = rankings.into_iter().map(record).collect::<Result<_>>()?;
        appender.append(&records).map(|_| true)
    }

    /// Appends ticks as long as a window may be open and no events arrive; returns on shutdown.
    pub fn tick(&self, stop: &Shutdown) {
        while self.tick_ms > 0 && !stop.is_requested() {
            clock::sleep(Duration::from_millis(self.tick_ms.min(50)));
            self.tick_if_quiet();
        }
    }

    /// Appends a tick if a window may be open and no events came for the time between two ticks. A
    /// failure is logged only, because the next call tries again.
    pub fn tick_if_quiet(&self) {
        let now = self.open_ms();
        let since = |last: &AtomicU64| now.saturating_sub(last.load(Ordering::Relaxed));
        let quiet = since(&self.last_append_ms) >= self.tick_ms;
        let waited_for = since(&self.last_event_ms) <= self.ticks_for_ms;
        let appender = self.appender.lock().expect("no holder panics").clone();
        let Some(appender) = appender.filter(|_| quiet && waited_for) else { return };
        self.last_append_ms.store(now, Ordering::Relaxed);
        let time_ms = now_ms();
        let tick = NewEvent { id: None, kind: EventKind::Tick { time_ms } };
        if let Err(error) = tick.record(time_ms).and_then(|record| appender.append(&[record])) {
            tracing::warn!(%error, "cannot append a tick for the joiner; trying again");
        }
    }
}

impl NewEvent {
    /// The surface and the number of the impressions in it.
    pub fn impressions(&self) -> Option<(u16, u64)> {
        match &self.kind {
            EventKind::Impression(impression) => Some((impression.surface, 1)),
            EventKind::CompleteRequest(rows) => Some((rows.first()?.surface, rows.len() as u64)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::Item;

    use super::*;
    use crate::events::EventRecord;
    use crate::streams::MemoryEngine;

    #[test]
    fn answers_are_noted_by_whoever_writes_the_stream_each_time() {
        let engine = Arc::new(MemoryEngine::new(16));
        let writer = EventWriter::new(engine.clone(), &JoinSettings::default());
        let (request, arm, items) = (7, "feed@1.0.0".to_owned(), vec![3, 1]);
        let ranking = RankingEvent { request, arm, items, propensities: vec![Some(0.5)] };
        let note = || writer.append_rankings(vec![ranking.clone()]).unwrap();
        let end = || engine.span(&Topic::events()).unwrap().end;
        assert_eq!((note(), end()), (false, 0), "another process may be the stream's writer");
        writer.open().unwrap();
        assert_eq!([note(), note()], [true; 2]);
        assert_eq!(end(), 2, "an answer that is given twice is noted twice");
        let records = engine.reader(&Topic::events(), 0).unwrap().next(2, Duration::ZERO).unwrap();
        let event = EventRecord::decode(&records[1].payload).unwrap();
        assert_eq!((event.time_ms(), event.kind), (None, EventKind::Ranking(ranking)));
    }

    #[test]
    fn an_item_that_changes_back_is_taken_again_and_an_update_with_an_id_once() {
        let engine = Arc::new(MemoryEngine::new(16));
        let writer = EventWriter::new(engine, &JoinSettings::default());
        let repeated = |id, tag| {
            let item = Item { id: 1, ids: vec![tag], ..Item::default() };
            let update = NewEvent { id, kind: EventKind::Item(item) };
            writer.append(vec![update], 1).unwrap().repeated
        };
        assert_eq!([7, 8, 7].map(|tag| repeated(None, tag)), [0; 3]);
        let updates = [1, 2, 3, 1].map(|id| repeated(Some(id), 7));
        assert_eq!(updates, [0, 0, 0, 1]);
    }
}
