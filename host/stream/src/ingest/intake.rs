//! Where events come in: checked, turned into records and appended, and the
//! ticks that close windows while nothing comes.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use super::{Told, What};
use crate::engine::{Appender, Engine, Record, Topic};
use crate::error::Result;
use hypercast_config::JoinSettings;
use hypercast_core::clock::now_ms;
use hypercast_core::shutdown::Shutdown;

/// Takes events in for one process.
pub struct Intake {
    engine: Arc<dyn Engine>,
    appender: Mutex<Option<Arc<dyn Appender>>>,
    max_future_ms: i64,
    tick_ms: i64,
    /// How long after the last event a window can be open.
    ticks_for_ms: i64,
    last_event_ms: AtomicI64,
    last_append_ms: AtomicI64,
}

/// What became of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Events that are new.
    pub accepted: usize,
    /// Events that were there already.
    pub repeated: usize,
    /// Where the stream ends after them.
    pub end: u64,
}

impl Intake {
    /// An intake that becomes the stream's writer with its first event, or with [`Intake::open`].
    pub fn new(engine: Arc<dyn Engine>, settings: &JoinSettings) -> Intake {
        let ms = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX / 4);
        Intake {
            engine,
            appender: Mutex::new(None),
            max_future_ms: ms(settings.max_future_s),
            tick_ms: i64::try_from(settings.tick_ms).unwrap_or(i64::MAX),
            ticks_for_ms: ms(settings.max_window_s.saturating_add(60)),
            last_event_ms: AtomicI64::new(now_ms()),
            last_append_ms: AtomicI64::new(now_ms()),
        }
    }

    /// Becomes the stream's writer.
    ///
    /// # Errors
    /// A stream that another process writes to, an engine that cannot be reached.
    pub fn open(&self) -> Result<Arc<dyn Appender>> {
        let mut appender = self.appender.lock().expect("no holder panics");
        if let Some(appender) = &*appender {
            return Ok(appender.clone());
        }
        Ok(appender.insert(self.engine.appender(&Topic::events())?).clone())
    }

    /// The latest time that an event may have now, in milliseconds since the epoch.
    pub fn latest_ms(&self) -> i64 {
        match self.max_future_ms {
            0 => i64::MAX,
            ahead => now_ms().saturating_add(ahead),
        }
    }

    /// Appends `records` events of a body of `given`; all are durable when it returns. Events of one request may
    /// share a record.
    ///
    /// # Errors
    /// An event that cannot be written, an engine that fails.
    pub fn append(&self, events: Vec<Told>, given: usize) -> Result<Taken> {
        let now = now_ms();
        let records: Vec<Record> =
            events.into_iter().map(|event| event.record(now)).collect::<Result<_>>()?;
        let appended = self.open()?.append(&records)?;
        self.last_event_ms.store(now, Ordering::Relaxed);
        self.last_append_ms.store(now, Ordering::Relaxed);
        // Where all records are old, all events are.
        let all = appended.repeated == records.len();
        let repeated = if all { given } else { appended.repeated };
        Ok(Taken { accepted: given - repeated.min(given), repeated, end: appended.end })
    }

    /// Tells the time as long as a window may be open and nothing else does; returns when told to stop.
    pub fn tick(&self, stop: &Shutdown) {
        while self.tick_ms > 0 && !stop.is_requested() {
            std::thread::sleep(Duration::from_millis(self.tick_ms.min(50) as u64));
            let now = now_ms();
            let quiet = now - self.last_append_ms.load(Ordering::Relaxed) >= self.tick_ms;
            let waited_for = now - self.last_event_ms.load(Ordering::Relaxed) <= self.ticks_for_ms;
            let appender = self.appender.lock().expect("no holder panics").clone();
            let Some(appender) = appender.filter(|_| quiet && waited_for) else { continue };
            self.last_append_ms.store(now, Ordering::Relaxed);
            let tick = Told { id: None, what: What::Tick { time_ms: now } };
            if let Err(error) = tick.record(now).and_then(|record| appender.append(&[record])) {
                tracing::warn!(%error, "the time could not be told to the joiner; trying again");
            }
        }
    }
}

impl Told {
    /// The surface whose impressions it tells of, and how many.
    pub fn impressions(&self) -> Option<(u16, u64)> {
        match &self.what {
            What::Impression(shown) => Some((shown.surface, 1)),
            What::Whole(rows) => Some((rows.first()?.surface, rows.len() as u64)),
            What::Action(_) | What::Item(_) | What::User(_) | What::Tick { .. } => None,
        }
    }
}
