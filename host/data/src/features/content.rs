//! Content vectors that came by events after the data set was read.
//!
//! Such an item is kept twice, with its vector and without: histories refer to the latter, and get
//! the newest vector when they are read. So an item has one vector in memory, however often it
//! changes and however many events refer to the item.

use std::sync::Arc;

use hypercast_fm::example::{Event, Item};

use super::FeatureConfig;
use super::id_maps::IdMap;
use crate::error::{CommonErrors as _, Error, Result};

/// The items whose vectors came by events.
pub(super) struct ContentOverrides {
    /// The length of a vector.
    width: usize,
    /// The most memory of all vectors.
    max_mib: usize,
    /// The items without their vectors, by id.
    bare: IdMap<Arc<Item>>,
}

impl ContentOverrides {
    pub(super) fn new(width: usize, config: &FeatureConfig) -> ContentOverrides {
        ContentOverrides { width, max_mib: config.max_content_mib, bare: IdMap::default() }
    }

    pub(super) fn has(&self, id: u64) -> bool {
        self.bare.contains_key(&id)
    }

    /// Refuses a vector of another width, or one for which there is no room.
    pub(super) fn check(&self, item: &Item) -> Result<()> {
        check_content_width(item, self.width)?;
        if self.has(item.id) {
            return Ok(());
        }
        check_content_room(self.bare.len() + 1, self.width, self.max_mib)
    }

    /// Whether an item's vector, if it has one, is as long as the state's are.
    pub(super) fn fits(&self, item: &Item) -> bool {
        item.content.is_empty() || item.content.len() == self.width
    }

    /// Notes an item with a vector that came by an event.
    pub(super) fn put(&mut self, item: &Item) {
        let bare = Item { content: Arc::default(), ..item.clone() };
        self.bare.insert(item.id, Arc::new(bare));
    }

    /// The item as a history refers to it.
    pub(super) fn without(&self, item: Arc<Item>) -> Arc<Item> {
        self.bare.get(&item.id).cloned().unwrap_or(item)
    }

    /// The event with the vector that its item has now among `items`, and all else as it was.
    pub(super) fn attached(&self, mut event: Event, items: &IdMap<Arc<Item>>) -> Event {
        let id = event.item.id;
        if self.bare.is_empty() {
            return event;
        }
        let (Some(bare), Some(now)) = (self.bare.get(&id), items.get(&id)) else { return event };
        if Arc::ptr_eq(bare, &event.item) || has_same_features(bare, &event.item) {
            event.item = now.clone();
        } else {
            Arc::make_mut(&mut event.item).content = now.content.clone();
        }
        event
    }
}

fn has_same_features(a: &Item, b: &Item) -> bool {
    // A missing number is NaN, which is not equal to itself.
    let (a_bits, b_bits) =
        (a.dense.iter().map(|n| n.to_bits()), b.dense.iter().map(|n| n.to_bits()));
    a.ids == b.ids && a_bits.eq(b_bits)
}

/// Refuses an item whose vector has not `width` numbers.
///
/// # Errors
/// Says what it has and what was expected.
pub fn check_content_width(item: &Item, width: usize) -> Result<()> {
    let (id, numbers) = (item.id, item.content.len());
    if numbers == width {
        return Ok(());
    }
    let wanted = match width {
        0 => "the data set has no content.parquet, which gives their width".to_owned(),
        _ => format!("those of the data set have {width}"),
    };
    Err(Error::invalid(format!("item {id} has a content vector of {numbers} numbers; {wanted}")))
}

/// What an entry has besides its numbers, about: its key, its pointers, and its part of a map.
const ENTRY_BYTES: usize = 100;

/// The memory of a content vector of a width that came by an event.
pub fn content_bytes(width: usize) -> usize {
    width.saturating_mul(size_of::<f32>()).saturating_add(ENTRY_BYTES)
}

/// Refuses `count` vectors of a width if they have more than so many MiB.
///
/// # Errors
/// They have; the error names the setting.
pub fn check_content_room(count: usize, width: usize, max_mib: usize) -> Result<()> {
    if count.saturating_mul(content_bytes(width)) <= max_mib.saturating_mul(1 << 20) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{count} content vectors of {width} numbers have more than {max_mib} MiB; raise \
         features.max_content_mib, or put them into content.parquet"
    )))
}
