//! The content vectors of joined examples: those of the data set, and those that came by events,
//! which the stream has in records of their own.
//!
//! The latter are kept by the positions of their records, the newest, within
//! `features.max_content_mib`. One that is not kept, as after a start, is read where it is. If it
//! is there no more, the item has no vector.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use hypercast_core::clock;
use hypercast_data::dataset::Dataset;
use hypercast_data::features::{FeatureConfig, content_bytes};
use hypercast_fm::example::Example;
use hypercast_stream::join::{ContentPlace, ContentRecord, JoinedRecord};
use hypercast_stream::streams::{StreamEngine, Topic, record_at};

use super::joined_reader::{MOST_FAILURES, RETRY_AFTER};
use crate::error::Result;

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
        let cache = BTreeMap::new();
        ContentReader { engine, width, own, cache, capacity, has_warned: false }
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
        let found = self.read(place)?.filter(|content| content.item == item);
        if let Some(content) = found {
            return Ok(self.put(place, content));
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

    /// The vector at a place; none if the stream has something else there, or nothing.
    fn read(&self, place: ContentPlace) -> Result<Option<ContentRecord>> {
        let mut failures = 0;
        let record = loop {
            match record_at(&*self.engine, &Topic::joined(), place.0) {
                Ok(record) => break record,
                Err(hypercast_stream::Error::Gap(_)) => return Ok(None),
                Err(error) => {
                    failures += 1;
                    if failures == MOST_FAILURES || self.engine.is_stopping() {
                        return Err(error.into());
                    }
                    tracing::warn!(%error, "a content vector cannot be read; trying again");
                    clock::sleep(RETRY_AFTER);
                }
            }
        };
        Ok(match JoinedRecord::decode(&record.payload) {
            Ok(JoinedRecord::Content(content)) => Some(content),
            _ => None,
        })
    }
}
