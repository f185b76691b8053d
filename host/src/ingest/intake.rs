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
use crate::{
    clock::now_ms,
    config::Config,
    engine::{Appender, Engine, Record, Topic},
    error::Result,
    schema::Schema,
    serve::{
        api::{EventsRequest, Refusal},
        convert::Converter,
        metrics::Metrics,
    },
    stop::Stop,
};

/// Takes events in for one process.
pub struct Intake {
    engine: Arc<dyn Engine>,
    appender: Mutex<Option<Arc<dyn Appender>>>,
    schema: Arc<Schema>,
    converter: Converter,
    max_events: usize,
    max_future_ms: i64,
    tick_ms: i64,
    /// How long after the last event a window can be open.
    ticks_for_ms: i64,
    last_event_ms: AtomicI64,
    last_append_ms: AtomicI64,
    metrics: Arc<Metrics>,
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
    pub fn new(
        engine: Arc<dyn Engine>,
        schema: Arc<Schema>,
        config: &Config,
        metrics: Arc<Metrics>,
    ) -> Intake {
        let ms = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX / 4);
        Intake {
            engine,
            appender: Mutex::new(None),
            converter: Converter::new(schema.clone()),
            schema,
            max_events: config.server.max_events,
            max_future_ms: ms(config.join.max_future_s),
            tick_ms: i64::try_from(config.join.tick_ms).unwrap_or(i64::MAX),
            ticks_for_ms: ms(config.join.max_window_s.saturating_add(60)),
            last_event_ms: AtomicI64::new(now_ms()),
            last_append_ms: AtomicI64::new(now_ms()),
            metrics,
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

    /// Appends the events of a body; all are durable when it returns. None is taken if one is refused.
    ///
    /// # Errors
    /// An event that does not fit the schema, too many of them, a time that is too far ahead, an engine that fails.
    pub fn take(&self, request: &EventsRequest) -> std::result::Result<Taken, Refusal> {
        let given = request.len();
        if given > self.max_events {
            return Err(Refusal::TooMany { given, what: "events", most: self.max_events });
        }
        let internal = |error: crate::error::Error| Refusal::Internal(error.to_string());
        let now = now_ms();
        let latest_ms = match self.max_future_ms {
            0 => i64::MAX,
            ahead => now.saturating_add(ahead),
        };
        let told = self.converter.told(request, latest_ms)?;
        let surfaces: Vec<(u16, u64)> = told.iter().filter_map(surface).collect();
        let records: Vec<Record> = told
            .into_iter()
            .map(|told| told.record(now))
            .collect::<Result<_>>()
            .map_err(internal)?;
        let appended = self.open().and_then(|to| to.append(&records)).map_err(internal)?;
        self.last_event_ms.store(now, Ordering::Relaxed);
        self.last_append_ms.store(now, Ordering::Relaxed);
        for (surface, count) in surfaces {
            self.metrics.events(&self.schema.surfaces[usize::from(surface)], count);
        }
        // Events of one request may share a record; where all records are old, all events are.
        let all = appended.repeated == records.len();
        let repeated = if all { given } else { appended.repeated };
        Ok(Taken { accepted: given - repeated.min(given), repeated, end: appended.end })
    }

    /// Tells the time as long as a window may be open and nothing else does; returns when told to stop.
    pub fn tick(&self, stop: &Stop) {
        while self.tick_ms > 0 && !stop.is_asked() {
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

fn surface(told: &Told) -> Option<(u16, u64)> {
    match &told.what {
        What::Impression(shown) => Some((shown.surface, 1)),
        What::Whole(rows) => Some((rows.first()?.surface, rows.len() as u64)),
        What::Action(_) | What::Item(_) | What::User(_) | What::Tick { .. } => None,
    }
}
