//! The content vectors of joined examples: those of the data set, and those that came by events,
//! which the stream has in records of their own.
//!
//! The latter are kept by the positions of their records, the newest, within
//! `features.max_content_mib`. One that is not kept, as after a start, is read where it is, and
//! with it those around it: an engine may read a whole segment to find one record. If it is there
//! no more, the item has no vector.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use hypercast_core::clock;
use hypercast_data::dataset::Dataset;
use hypercast_data::features::{FeatureConfig, content_bytes};
use hypercast_fm::example::Example;
use hypercast_stream::join::{ContentPlace, ContentRecord, JoinedRecord};
use hypercast_stream::streams::{StreamCursor, StreamEngine, StreamPlace, StreamRead, Topic};

use super::joined_reader::{MOST_FAILURES, RETRY_AFTER};
use crate::error::Result;

/// The stream is read for a vector in blocks of as many records, each of which is read whole once.
const BLOCK_RECORDS: u64 = 1 << 12;

/// Puts vectors into examples.
pub(super) struct ContentReader {
    engine: Arc<dyn StreamEngine>,
    /// Of the vectors that it gives. If it is 0, the data set has none, and no item gets one.
    width: usize,
    /// Of the data set, by item.
    own: HashMap<u64, Arc<[f32]>>,
    cache: BTreeMap<ContentPlace, CachedVector>,
    /// The most vectors in it.
    capacity: usize,
    /// The blocks of the stream that were read for a vector, by their numbers.
    blocks: BTreeSet<u64>,
    /// Whether it was said that one is missing.
    has_warned: bool,
}

/// A vector that came by an event.
struct CachedVector {
    item: u64,
    /// Empty if the stream does not have it, or has one of another width.
    vector: Arc<[f32]>,
}

impl ContentReader {
    /// Of a data set and the stream of an engine.
    pub(super) fn new(
        engine: Arc<dyn StreamEngine>,
        dataset: &Dataset,
        features: &FeatureConfig,
    ) -> ContentReader {
        let with = dataset.items.values().filter(|item| !item.content.is_empty());
        let own = with.map(|item| (item.id, item.content.clone())).collect();
        let width = dataset.content;
        let capacity = features.max_content_mib.saturating_mul(1 << 20) / content_bytes(width);
        let (cache, blocks) = (BTreeMap::new(), BTreeSet::new());
        ContentReader { engine, width, own, cache, capacity, blocks, has_warned: false }
    }

    /// Keeps a vector whose record is at `place`.
    pub(super) fn put(&mut self, place: ContentPlace, content: ContentRecord) -> Arc<[f32]> {
        let ContentRecord { item, vector, .. } = content;
        if self.width == 0 {
            return Arc::default();
        }
        let fits = vector.len() == self.width;
        let vector: Arc<[f32]> = if fits { vector.into() } else { Arc::default() };
        self.keep(place, CachedVector { item, vector: vector.clone() });
        vector
    }

    /// Forgets what it read in the stream, which is another one now.
    pub(super) fn forget(&mut self) {
        self.cache.clear();
        self.blocks.clear();
    }

    fn keep(&mut self, place: ContentPlace, cached: CachedVector) {
        self.cache.insert(place, cached);
        while self.cache.len() > self.capacity {
            self.cache.pop_first();
        }
    }

    /// Gives the items of an example the vectors that they had when it was made.
    ///
    /// # Errors
    /// An engine that has failed for long, or that is to stop.
    pub(super) fn fill(&mut self, example: &mut Example) -> Result<()> {
        let history = example.history.iter_mut().map(|event| &mut event.item);
        for item in history.chain(example.targets.iter_mut().map(|target| &mut target.item)) {
            let vector = match ContentPlace::of(item) {
                Some(place) => self.vector(place, item.id)?,
                None => self.own.get(&item.id).cloned().unwrap_or_default(),
            };
            if !(vector.is_empty() && item.content.is_empty()) {
                Arc::make_mut(item).content = vector;
            }
        }
        Ok(())
    }

    fn vector(&mut self, place: ContentPlace, item: u64) -> Result<Arc<[f32]>> {
        if self.width == 0 {
            return Ok(Arc::default());
        }
        if let Some(cached) = self.cache.get(&place).filter(|cached| cached.item == item) {
            return Ok(cached.vector.clone());
        }
        if let Some(vector) = self.read(place, item)? {
            return Ok(vector);
        }
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                item,
                position = place.0,
                "joined has this item's content vector no more; it and others like it count as \
                 missing until the item is shown again"
            );
        }
        self.keep(place, CachedVector { item, vector: Arc::default() });
        Ok(Arc::default())
    }

    /// The vector of an item at a place, after reading its block of the stream if that was not read
    /// before; none if the stream has something else there, or nothing.
    fn read(&mut self, place: ContentPlace, item: u64) -> Result<Option<Arc<[f32]>>> {
        let ContentPlace(position) = place;
        let block = position / BLOCK_RECORDS;
        let first = block * BLOCK_RECORDS;
        let mut range = if self.blocks.insert(block) {
            first..first.saturating_add(BLOCK_RECORDS)
        } else {
            position..position.saturating_add(1)
        };
        let mut failures = 0;
        loop {
            let mut found = None;
            let read = self.read_range(range.clone(), |at, of, vector| {
                if at == place && of == item {
                    found = Some(vector.clone());
                }
            });
            match read {
                Ok(()) => return Ok(found),
                Err(_) if found.is_some() => return Ok(found),
                Err(error) => {
                    failures += 1;
                    if failures == MOST_FAILURES || self.engine.is_stopping() {
                        return Err(error.into());
                    }
                    tracing::warn!(%error, "a content vector cannot be read; trying again");
                    clock::sleep(RETRY_AFTER);
                    // What fails may be a record before it, which nobody needs.
                    range.start = position;
                }
            }
        }
    }

    /// Keeps the vectors in a part of the stream, and passes each to `each` with its place and its
    /// item.
    fn read_range(
        &mut self,
        range: Range<u64>,
        mut each: impl FnMut(ContentPlace, u64, &Arc<[f32]>),
    ) -> hypercast_stream::Result<()> {
        let engine = self.engine.clone();
        let from = StreamPlace::at(range.start);
        let mut cursor = StreamCursor::open(&*engine, &Topic::joined(), from)?;
        loop {
            let position = cursor.place().position;
            let left = range.end.saturating_sub(position);
            if left == 0 {
                return Ok(());
            }
            match cursor.next_stored(&*engine, left as usize)? {
                StreamRead::Records(records) if records.is_empty() => return Ok(()),
                StreamRead::Records(records) => {
                    for record in records {
                        let decoded = JoinedRecord::decode(&record.payload);
                        let Ok(JoinedRecord::Content(content)) = decoded else { continue };
                        let (place, item) = (ContentPlace(record.position), content.item);
                        each(place, item, &self.put(place, content));
                    }
                }
                // The stream ends before.
                StreamRead::Gap(_) if cursor.place().position <= position => return Ok(()),
                StreamRead::Gap(_) => {}
            }
        }
    }
}
