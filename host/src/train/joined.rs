//! The stream of joined examples as its followers read it: decoded, with the
//! content vectors of the data set put back. An engine that fails is asked again for a while.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hypercast_fm::example::{Event, Example, Item};

use crate::{
    dataset::Dataset,
    engine::{Engine, Reader, Topic},
    error::{Error, Result},
    join::{Joined, JoinedExample},
};

/// How long it waits after an engine has failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row after which it gives up.
const MOST_FAILURES: u32 = 120;

/// A record.
pub(super) struct Record {
    pub(super) example: Example,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
    /// The position after it.
    pub(super) end: u64,
}

/// Follows `joined`.
pub(super) struct JoinedReader {
    engine: Arc<dyn Engine>,
    reader: Box<dyn Reader>,
    content: HashMap<u64, Arc<[f32]>>,
    failures: u32,
}

impl JoinedReader {
    /// From a position on, or from the first record that is kept.
    ///
    /// # Errors
    /// A stream that ends before the position, or no longer has it.
    pub(super) fn open(
        engine: Arc<dyn Engine>,
        dataset: &Dataset,
        from: Option<u64>,
    ) -> Result<JoinedReader> {
        let topic = Topic::joined();
        let span = engine.span(&topic)?;
        let from = from.unwrap_or(span.start);
        if from < span.start || from > span.end {
            return Err(Error::Invalid(format!(
                "stream {topic} holds positions {} to {}, and {from} is where to go on; what was written so far is of another stream, or records are gone: begin in another folder",
                span.start, span.end
            )));
        }
        let with = dataset.items.values().filter(|item| !item.content.is_empty());
        let content = with.map(|item| (item.id, item.content.clone())).collect();
        let reader = engine.reader(&topic, from)?;
        Ok(JoinedReader { engine, reader, content, failures: 0 })
    }

    /// The position of the next record.
    pub(super) fn position(&self) -> u64 {
        self.reader.position()
    }

    /// The next records, for the first of which it waits; none if there is none, or the engine has failed.
    ///
    /// # Errors
    /// A record of another version, or an engine that has failed for long.
    pub(super) fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<Record>> {
        let records = match self.reader.next(most, wait) {
            Ok(records) => records,
            Err(error) => {
                self.retry(error)?;
                return Ok(Vec::new());
            }
        };
        self.failures = 0;
        let read = |record: crate::engine::Stored| {
            let joined: Joined = postcard::from_bytes(&record.payload).map_err(|error| {
                let at = record.position;
                Error::Invalid(format!(
                    "stream joined, record {at}: {error}; another version wrote it"
                ))
            })?;
            let (correction, JoinedExample { example, ingested_ms }) = match joined {
                Joined::Example(joined) => (false, joined),
                Joined::Correction(joined) => (true, joined),
            };
            let example = self.restored(example);
            Ok(Record { example, correction, ingested_ms, end: record.position + 1 })
        };
        records.into_iter().map(read).collect()
    }

    fn retry(&mut self, error: Error) -> Result<()> {
        self.failures += 1;
        if self.failures >= MOST_FAILURES {
            return Err(error);
        }
        tracing::warn!(%error, "the joined stream cannot be read; trying again");
        std::thread::sleep(RETRY_AFTER);
        if let Ok(reader) = self.engine.reader(&Topic::joined(), self.reader.position()) {
            self.reader = reader;
        }
        Ok(())
    }

    fn restored(&self, mut example: Example) -> Example {
        if self.content.is_empty() {
            return example;
        }
        let restore = |item: &mut Arc<Item>| {
            if let Some(content) = self.content.get(&item.id) {
                Arc::make_mut(item).content = content.clone();
            }
        };
        example.history.iter_mut().for_each(|event: &mut Event| restore(&mut event.item));
        example.targets.iter_mut().for_each(|target| restore(&mut target.item));
        example
    }
}

/// The clock, in milliseconds since the epoch.
pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
