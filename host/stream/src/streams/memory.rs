//! The engine in memory, for tests and for jobs within one process. Streams end with the process;
//! records are kept until they are trimmed.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ids::RecentIds;
use super::{
    Appended, Appender, READ_BYTES, Reader, Record, StreamEngine, StreamPlace, StreamRecord, Topic,
    check_lengths, locked,
};
use crate::error::Result;

/// Streams in memory. A stream may have any number of appenders.
#[derive(Debug)]
pub struct MemoryEngine {
    remembered_ids: usize,
    streams: Mutex<BTreeMap<Topic, Arc<MemoryStream>>>,
}

impl MemoryEngine {
    /// An engine without streams; each will remember this many ids.
    pub fn new(remembered_ids: usize) -> MemoryEngine {
        MemoryEngine { remembered_ids, streams: Mutex::default() }
    }

    fn stream(&self, topic: &Topic) -> Arc<MemoryStream> {
        let make = || {
            let ids = RecentIds::new(self.remembered_ids);
            let kept = Mutex::new(MemoryRecords { first: 0, payloads: VecDeque::new(), ids });
            Arc::new(MemoryStream { topic: topic.clone(), kept, grew: Condvar::new() })
        };
        locked(&self.streams).entry(topic.clone()).or_insert_with(make).clone()
    }
}

impl Default for MemoryEngine {
    fn default() -> Self {
        MemoryEngine::new(1_000_000)
    }
}

impl StreamEngine for MemoryEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        Ok(self.stream(topic))
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        Ok(Box::new(MemoryReader { stream: self.stream(topic), place }))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let stream = self.stream(topic);
        let kept = locked(&stream.kept);
        Ok(kept.first..kept.end())
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        let stream = self.stream(topic);
        let mut kept = locked(&stream.kept);
        let gone = before.clamp(kept.first, kept.end()) - kept.first;
        kept.payloads.drain(..gone as usize);
        kept.first += gone;
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryStream {
    topic: Topic,
    kept: Mutex<MemoryRecords>,
    grew: Condvar,
}

#[derive(Debug)]
struct MemoryRecords {
    first: u64,
    payloads: VecDeque<Vec<u8>>,
    ids: RecentIds,
}

impl MemoryRecords {
    fn end(&self) -> u64 {
        self.first + self.payloads.len() as u64
    }
}

impl Appender for MemoryStream {
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<Option<Appended>> {
        check_lengths(&self.topic, records)?;
        let mut kept = locked(&self.kept);
        if expected_end.is_some_and(|expected| expected != kept.end()) {
            return Ok(None);
        }
        let mut repeated = 0;
        for record in records {
            if expected_end.is_some() || kept.ids.admit(record.id) {
                kept.payloads.push_back(record.payload.clone());
            } else {
                repeated += 1;
            }
        }
        kept.ids.settle();
        self.grew.notify_all();
        Ok(Some(Appended { end: kept.end(), repeated }))
    }
}

struct MemoryReader {
    stream: Arc<MemoryStream>,
    place: StreamPlace,
}

impl Reader for MemoryReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let until = Instant::now() + wait;
        let topic = &self.stream.topic;
        let mut kept = locked(&self.stream.kept);
        while self.place.position == kept.end() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Vec::new());
            }
            let waited = self.stream.grew.wait_timeout(kept, left);
            kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.place.check_span(topic, &(kept.first..kept.end()))?;
        let at = (self.place.position - kept.first) as usize;
        if let Some(before) = at.checked_sub(1) {
            self.place.check_before(topic, &kept.payloads[before], kept.first)?;
        }
        let mut bytes = 0;
        let mut read = Vec::new();
        for payload in kept.payloads.range(at..).take(most) {
            let record = StreamRecord {
                position: self.position(),
                stored_ms: None,
                payload: payload.clone(),
            };
            self.place = StreamPlace::after(&record);
            read.push(record);
            bytes += payload.len();
            if bytes >= READ_BYTES {
                break;
            }
        }
        Ok(read)
    }

    fn position(&self) -> u64 {
        self.place.position
    }
}
