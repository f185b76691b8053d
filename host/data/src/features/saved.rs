//! A feature state in a form that can be serialised, so that a restarted process need not replay
//! all events.
//!
//! Each item is written once, however many events refer to it, and items of the data set by their
//! ids alone. The caller chooses the encoding and the place. The encoding may be positional, so the
//! order of fields and variants is part of the format.

use std::collections::HashMap;
use std::sync::Arc;

use hypercast_fm::example::{Event, Item, Outcome, User};
use serde::{Deserialize, Serialize};

use super::counters::SavedCounters;
use super::{FeatureState, History};
use crate::error::{CommonErrors as _, Error, Result};

/// An entry of an [`ItemTable`].
#[derive(Debug, Serialize, Deserialize)]
enum SavedItem {
    /// As in the data set; an item without features if the data set does not have it.
    Base(u64),
    /// Added or changed since the data set was read, with the vector of the data set if any.
    Changed { id: u64, ids: Vec<u64>, dense: Vec<f32> },
    /// The same with a vector that came by an event. States of earlier releases have none.
    WithContent { id: u64, ids: Vec<u64>, dense: Vec<f32>, content: Vec<f32> },
}

/// The items that some events refer to, each once.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ItemTable {
    items: Vec<SavedItem>,
}

/// Collects the items that events refer to into an [`ItemTable`].
pub struct ItemTableBuilder<'a> {
    state: &'a FeatureState,
    table: ItemTable,
    base: HashMap<u64, u32>,
    changed: HashMap<*const Item, u32>,
}

/// An event that refers to its item by an index into an [`ItemTable`].
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedEvent {
    item: u32,
    surface: u16,
    time_ms: i64,
    outcome: Outcome,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedHistory {
    user: u64,
    touched_ms: i64,
    events: Vec<SavedEvent>,
    count: u64,
    last_ms: i64,
}

/// Everything that a [`FeatureState`] knows beyond its data set.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedState {
    item_table: ItemTable,
    items: Vec<u32>,
    users: Vec<User>,
    histories: Vec<SavedHistory>,
    /// Item, time of the last touch, time of the first impression.
    first_shown: Vec<(u64, i64, Option<i64>)>,
    counters: SavedCounters,
}

impl<'a> ItemTableBuilder<'a> {
    /// An empty table for items of `state`.
    pub fn new(state: &'a FeatureState) -> Self {
        ItemTableBuilder {
            state,
            table: ItemTable::default(),
            base: HashMap::new(),
            changed: HashMap::new(),
        }
    }

    /// The index of an item, which is added if it is new.
    pub fn put(&mut self, item: &Arc<Item>) -> u32 {
        let next = self.table.items.len() as u32;
        if !self.state.changed.items.contains(&item.id) {
            return *self.base.entry(item.id).or_insert_with(|| {
                self.table.items.push(SavedItem::Base(item.id));
                next
            });
        }
        *self.changed.entry(Arc::as_ptr(item)).or_insert_with(|| {
            let (id, ids, dense) = (item.id, item.ids.clone(), item.dense.clone());
            let has_content = !item.content.is_empty() && self.state.content.has(id);
            self.table.items.push(if has_content {
                SavedItem::WithContent { id, ids, dense, content: item.content.to_vec() }
            } else {
                SavedItem::Changed { id, ids, dense }
            });
            next
        })
    }

    /// An event whose item is added to the table.
    pub fn event(&mut self, event: &Event) -> SavedEvent {
        let &Event { ref item, surface, time_ms, outcome } = event;
        SavedEvent { item: self.put(item), surface, time_ms, outcome }
    }

    /// The table of all items that were added.
    pub fn finish(self) -> ItemTable {
        self.table
    }
}

impl ItemTable {
    /// The items in their order, those of the data set as `state` has them.
    pub fn items(self, state: &FeatureState) -> Vec<Arc<Item>> {
        let changed = |mut item: Item| {
            state.upgrade.item(&mut item);
            Arc::new(item)
        };
        let base = |id: u64| state.items.get(&id).map(|item| item.content.clone());
        let item = |saved| match saved {
            SavedItem::Base(id) => state.item_or_blank(id),
            SavedItem::Changed { id, ids, dense } => {
                changed(Item { id, ids, dense, content: base(id).unwrap_or_default() })
            }
            SavedItem::WithContent { id, ids, dense, content } => {
                changed(Item { id, ids, dense, content: content.into() })
            }
        };
        self.items.into_iter().map(item).collect()
    }
}

impl SavedEvent {
    /// The event with its item from the table.
    ///
    /// # Errors
    /// The table does not have the item.
    pub fn event(self, items: &[Arc<Item>]) -> Result<Event> {
        let SavedEvent { item, surface, time_ms, outcome } = self;
        Ok(Event { item: table_item(items, item)?, surface, time_ms, outcome })
    }
}

/// The item at an index of a table.
///
/// # Errors
/// The table has no such index.
pub fn table_item(items: &[Arc<Item>], at: u32) -> Result<Arc<Item>> {
    items.get(at as usize).cloned().ok_or_else(|| {
        let count = items.len();
        Error::invalid(format!("the saved state refers to item {at} of {count}; it is damaged"))
    })
}

impl FeatureState {
    /// The state in a form that can be serialised.
    pub fn saved(&self) -> SavedState {
        let mut table = ItemTableBuilder::new(self);
        let histories = self
            .histories
            .iter()
            .map(|(user, touched_ms, history)| SavedHistory {
                user,
                touched_ms,
                events: history.newest(usize::MAX).map(|event| table.event(&event)).collect(),
                count: history.count,
                last_ms: history.last_ms,
            })
            .collect();
        let changed = self.changed.items.iter().filter_map(|id| self.items.get(id));
        let items = changed.map(|item| table.put(item)).collect();
        let changed = self.changed.users.iter().filter_map(|id| self.users.get(id));
        let users = changed.map(|user| (**user).clone()).collect();
        let first_shown = self.first_shown.iter().map(|(id, ms, first)| (id, ms, *first)).collect();
        let counters = self.counters.saved();
        SavedState { item_table: table.finish(), items, users, histories, first_shown, counters }
    }

    /// Restores a saved state. Call it on a new state of the same data set, whose schema may have
    /// grown since. Content vectors beyond `features.max_content_mib`, which may have been lowered
    /// since, are left out with a warning.
    ///
    /// # Errors
    /// The saved state is damaged or belongs to another schema.
    pub fn restore(&mut self, saved: SavedState) -> Result<()> {
        let items = saved.item_table.items(self);
        let mut refused: Option<(usize, Error)> = None;
        for at in saved.items {
            let mut item = table_item(&items, at)?;
            self.check_item(&item)?;
            let base = self.items.get(&item.id).map(|item| item.content.clone());
            let base = base.unwrap_or_default();
            if !self.content.fits(&item) {
                // The data set was made anew with vectors of another width.
                Arc::make_mut(&mut item).content = base.clone();
            }
            let mut has_content = item.content != base;
            if has_content && let Err(error) = self.content.check(&item) {
                refused.get_or_insert((0, error)).0 += 1;
                Arc::make_mut(&mut item).content = base;
                has_content = false;
            }
            self.put_changed(item, has_content);
        }
        if let Some((items, error)) = refused {
            tracing::warn!(items, %error, "content vectors of the saved state are left out");
        }
        for mut user in saved.users {
            self.upgrade.user(&mut user);
            self.check_user(&user)?;
            self.changed.users.insert(user.id);
            self.users.insert(user.id, Arc::new(user));
        }
        for SavedHistory { user, touched_ms, events, count, last_ms } in saved.histories {
            let events =
                events.into_iter().map(|event| event.event(&items)).collect::<Result<Vec<_>>>()?;
            let history = History::restored(events, self.history_size(), count, last_ms);
            self.histories.put(user, touched_ms, history);
        }
        for (id, touched_ms, first_ms) in saved.first_shown {
            self.first_shown.put(id, touched_ms, first_ms);
        }
        self.counters.restore(saved.counters)
    }
}
