//! A feature state in a form that can be written down, so that a process which
//! starts again need not go through everything that happened.
//!
//! Items are written once, however many events name them, and those of the data
//! set by their id alone. What holds the bytes, and where, is the caller's.

use std::collections::HashMap;
use std::sync::Arc;

use hypercast_fm::example::{Event, Item, Outcome, User};
use serde::{Deserialize, Serialize};

use super::counters::SavedCounters;
use super::{FeatureState, History};
use crate::error::{CommonErrors as _, Error, Result};

/// An item on a shelf.
#[derive(Debug, Serialize, Deserialize)]
enum SavedItem {
    /// As the data set has it; without features if it has none.
    Base(u64),
    /// As it was told of.
    Told { id: u64, ids: Vec<u64>, dense: Vec<f32> },
}

/// The items that some events name, each once.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Shelf {
    items: Vec<SavedItem>,
}

/// Fills a shelf.
pub struct Shelving<'a> {
    state: &'a FeatureState,
    shelf: Shelf,
    base: HashMap<u64, u32>,
    told: HashMap<*const Item, u32>,
}

/// An event whose item is on a shelf.
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

/// All that a [`FeatureState`] knows beyond its data set.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedState {
    shelf: Shelf,
    items: Vec<u32>,
    users: Vec<User>,
    histories: Vec<SavedHistory>,
    /// Item, last touch, first impression.
    first_shown: Vec<(u64, i64, Option<i64>)>,
    counters: SavedCounters,
}

impl<'a> Shelving<'a> {
    /// An empty table of the items of `state`.
    pub fn new(state: &'a FeatureState) -> Self {
        Shelving { state, shelf: Shelf::default(), base: HashMap::new(), told: HashMap::new() }
    }

    /// Where an item is.
    pub fn put(&mut self, item: &Arc<Item>) -> u32 {
        let next = self.shelf.items.len() as u32;
        if !self.state.changed.items.contains(&item.id) {
            return *self.base.entry(item.id).or_insert_with(|| {
                self.shelf.items.push(SavedItem::Base(item.id));
                next
            });
        }
        *self.told.entry(Arc::as_ptr(item)).or_insert_with(|| {
            let (ids, dense) = (item.ids.clone(), item.dense.clone());
            self.shelf.items.push(SavedItem::Told { id: item.id, ids, dense });
            next
        })
    }

    /// An event whose item is in the table.
    pub fn event(&mut self, event: &Event) -> SavedEvent {
        let &Event { ref item, surface, time_ms, outcome } = event;
        SavedEvent { item: self.put(item), surface, time_ms, outcome }
    }

    /// The table.
    pub fn finish(self) -> Shelf {
        self.shelf
    }
}

impl Shelf {
    /// The items again, those of the data set as `state` has them.
    pub fn items(self, state: &FeatureState) -> Vec<Arc<Item>> {
        let item = |saved| match saved {
            SavedItem::Base(id) => state.item_or_blank(id),
            SavedItem::Told { id, ids, dense } => {
                let content = state.items.get(&id).map(|item| item.content.clone());
                Arc::new(Item { id, ids, dense, content: content.unwrap_or_default() })
            }
        };
        self.items.into_iter().map(item).collect()
    }
}

impl SavedEvent {
    /// The event again, with its item from the table.
    ///
    /// # Errors
    /// An item that the table does not have.
    pub fn event(self, items: &[Arc<Item>]) -> Result<Event> {
        let SavedEvent { item, surface, time_ms, outcome } = self;
        Ok(Event { item: on_shelf(items, item)?, surface, time_ms, outcome })
    }
}

/// The item at a place of a shelf.
pub fn on_shelf(items: &[Arc<Item>], at: u32) -> Result<Arc<Item>> {
    items
        .get(at as usize)
        .cloned()
        .ok_or_else(|| Error::invalid(format!("a saved state names item {at} of {}", items.len())))
}

impl FeatureState {
    /// What is to be written down.
    pub fn saved(&self) -> SavedState {
        let mut shelving = Shelving::new(self);
        let histories = self
            .histories
            .iter()
            .map(|(user, touched_ms, history)| SavedHistory {
                user,
                touched_ms,
                events: history.events.iter().map(|event| shelving.event(event)).collect(),
                count: history.count,
                last_ms: history.last_ms,
            })
            .collect();
        let told = self.changed.items.iter().filter_map(|id| self.items.get(id));
        let items = told.map(|item| shelving.put(item)).collect();
        let told = self.changed.users.iter().filter_map(|id| self.users.get(id));
        let users = told.map(|user| (**user).clone()).collect();
        let first_shown = self.first_shown.iter().map(|(id, ms, first)| (id, ms, *first)).collect();
        let counters = self.counters.saved();
        SavedState { shelf: shelving.finish(), items, users, histories, first_shown, counters }
    }

    /// Becomes what was written down. Call it on a state that knows the data set's items and users alone.
    ///
    /// # Errors
    /// What was written for another schema.
    pub fn restore(&mut self, saved: SavedState) -> Result<()> {
        let items = saved.shelf.items(self);
        for at in saved.items {
            let item = on_shelf(&items, at)?;
            self.check_item(&item)?;
            self.changed.items.insert(item.id);
            self.items.insert(item.id, item);
        }
        for user in saved.users {
            self.check_user(&user)?;
            self.changed.users.insert(user.id);
            self.users.insert(user.id, Arc::new(user));
        }
        for SavedHistory { user, touched_ms, events, count, last_ms } in saved.histories {
            let events =
                events.into_iter().map(|event| event.event(&items)).collect::<Result<_>>()?;
            self.histories.put(user, touched_ms, History { events, count, last_ms });
        }
        for (id, touched_ms, first_ms) in saved.first_shown {
            self.first_shown.put(id, touched_ms, first_ms);
        }
        self.counters.restore(saved.counters)
    }
}
