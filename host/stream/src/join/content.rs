//! Content vectors of items in the stream of joined examples.
//!
//! A vector has up to 16 KiB and an example some hundred items, so that examples do not repeat
//! them: a vector is a record of its own, and items refer to it by that record's position. A
//! request refers to the vectors that its items had when it was made, whatever came until it is
//! joined. The joiner itself keeps the newest vector of each item, and repeats it when an
//! example needs one whose record is far back, so that readers find it though old records are
//! deleted.

use std::collections::BTreeMap;
use std::sync::Arc;

use hypercast_data::dataset::Dataset;
use hypercast_data::features::{RequestInput, check_content_room, check_content_width};
use hypercast_fm::example::{Example, Item};
use serde::{Deserialize, Serialize};

use super::{ContentRecord, JoinSink, JoinedRecord, Joiner};
use crate::error::Result;

/// The records of `joined` after which a vector that an example needs is repeated. Another number
/// would make other records of the same events.
const REPEAT_AFTER: u64 = 1 << 16;

/// Where the content vector of an item is: the position of its record in
/// [`crate::streams::Topic::joined`]. An item of a joined example has this in place of the vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContentPlace(pub u64);

/// The place of a vector whose record may be gone, or have another position than was counted.
const LOST: ContentPlace = ContentPlace(u64::MAX);

/// The bits of a position in one number: as many as f32 has exactly.
const BITS: u32 = 24;

impl ContentPlace {
    /// The numbers that stand in place of a vector.
    pub const WIDTH: usize = 2;

    /// The place in the form of a vector.
    pub fn numbers(self) -> Arc<[f32]> {
        let ContentPlace(position) = self;
        [position >> BITS, position & ((1 << BITS) - 1)].map(|part| part as f32).into()
    }

    /// The place that an item of a joined example has; none if its vector came by no event.
    pub fn of(item: &Item) -> Option<ContentPlace> {
        let &[high, low] = &item.content[..] else { return None };
        Some(ContentPlace((high as u64) << BITS | low as u64))
    }
}

/// Which content vectors of events are taken. Others would make other records of the same events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ContentLimits {
    /// The numbers of a vector; 0 refuses any.
    pub(super) width: usize,
    /// `features.max_content_mib`.
    pub(super) max_mib: usize,
}

/// The newest vector of each item whose vector came by an event.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct PlacedVectors {
    by_item: BTreeMap<u64, PlacedVector>,
}

/// A vector, and where readers find it.
#[derive(Debug, Serialize, Deserialize)]
struct PlacedVector {
    place: ContentPlace,
    vector: Vec<f32>,
}

impl PlacedVectors {
    /// Refuses an item's vector if it has another width than the data set's, or if there is no room
    /// for it.
    pub(super) fn check(&self, item: &Item, limits: ContentLimits) -> Result<()> {
        if item.content.is_empty() {
            return Ok(());
        }
        let ContentLimits { width, max_mib } = limits;
        check_content_width(item, width)?;
        if self.by_item.contains_key(&item.id) {
            return Ok(());
        }
        Ok(check_content_room(self.by_item.len() + 1, width, max_mib)?)
    }

    /// Refuses limits that the vectors are beyond already.
    pub(super) fn check_room(&self, limits: ContentLimits) -> Result<()> {
        let ContentLimits { width, max_mib } = limits;
        Ok(check_content_room(self.by_item.len(), width, max_mib)?)
    }

    /// Notes an item's vector, which a record at `place` tells.
    pub(super) fn put(&mut self, item: u64, place: ContentPlace, vector: Vec<f32>) {
        self.by_item.insert(item, PlacedVector { place, vector });
    }

    /// Forgets the places from a position on, where the stream has other records, or none. Such a
    /// vector is repeated when it is needed.
    pub(super) fn lose_from(&mut self, position: u64) {
        let placed = self.by_item.values_mut();
        placed.filter(|placed| placed.place.0 >= position).for_each(|placed| placed.place = LOST);
    }

    pub(super) fn get(&self, item: u64) -> Option<&[f32]> {
        self.by_item.get(&item).map(|placed| &placed.vector[..])
    }

    /// The items of an example whose vectors are to be repeated before it, in the order of their
    /// ids. `next` is the position of the next record.
    pub(super) fn distant(&self, example: &Example, next: u64) -> Vec<u64> {
        if self.by_item.is_empty() {
            return Vec::new();
        }
        let history = example.history.iter().map(|event| event.item.id);
        let items = history.chain(example.targets.iter().map(|target| target.item.id));
        let mut distant: Vec<u64> = items
            .filter(|id| {
                let is_near = |PlacedVector { place: ContentPlace(at), .. }: &PlacedVector| {
                    *at < next && next - at <= REPEAT_AFTER
                };
                self.by_item.get(id).is_some_and(|placed| !is_near(placed))
            })
            .collect();
        distant.sort_unstable();
        distant.dedup();
        distant
    }
}

/// What a joiner does with content vectors.
impl Joiner {
    /// The data set whose feature state a joiner has: without content vectors, in the place of
    /// which items have the [`ContentPlace`] of those that came by events.
    pub fn bare(dataset: &Dataset) -> Dataset {
        Dataset { content: ContentPlace::WIDTH, ..dataset.without_content() }
    }

    /// Takes content vectors of this width, the data set's.
    #[must_use]
    pub fn with_content(mut self, width: usize) -> Joiner {
        self.content_limits.width = width;
        self
    }

    /// Adds or replaces an item's features, and writes its vector if it has one.
    pub(super) fn upsert_item(
        &mut self,
        mut item: Item,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) -> Result<()> {
        let vector = std::mem::take(&mut item.content);
        let id = item.id;
        self.state.upsert_item(item)?;
        if !vector.is_empty() {
            self.emit_content(id, vector.to_vec(), ingested_ms, output);
        }
        Ok(())
    }

    /// Writes the vector of a known item, to which the item refers from now on.
    fn emit_content(
        &mut self,
        item: u64,
        vector: Vec<f32>,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) {
        let place = ContentPlace(self.counts.joined);
        let content = ContentRecord { item, vector: vector.clone(), ingested_ms };
        output.joined(JoinedRecord::Content(content));
        self.counts.joined += 1;
        self.contents.put(item, place, vector);
        self.state.set_content(item, place.numbers());
    }

    /// A request with its features as of now, the vectors of whose items readers find.
    pub(super) fn fetch(
        &mut self,
        request: &RequestInput,
        history_len: usize,
        ingested_ms: i64,
        output: &mut dyn JoinSink,
    ) -> Example {
        let example = self.state.fetch(request, history_len);
        let distant = self.contents.distant(&example, self.counts.joined);
        if distant.is_empty() {
            return example;
        }
        for item in distant {
            let vector = self.contents.get(item).expect("it is distant").to_vec();
            self.emit_content(item, vector, ingested_ms, output);
        }
        self.state.fetch(request, history_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_exact_however_far_the_stream_is() {
        for position in [0, 1, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, (1 << 48) - 1] {
            let item = Item { content: ContentPlace(position).numbers(), ..Item::default() };
            assert_eq!(ContentPlace::of(&item), Some(ContentPlace(position)));
        }
        assert_eq!(ContentPlace::of(&Item::default()), None);
    }
}
