//! A user's history, as it is kept: an event takes 40 bytes, and four for each value of the schema.
//! As an [`Event`], which has room for all values that there can be, it takes 72.

use std::collections::VecDeque;
use std::sync::Arc;

use hypercast_fm::example::{Event, Item, Outcome};

/// The events of one user in the order they were shown.
#[derive(Default)]
pub(super) struct History {
    events: VecDeque<KeptEvent>,
    /// `[events, values]`.
    values: VecDeque<f32>,
    /// All events so far, including those that were dropped.
    pub(super) count: u64,
    pub(super) last_ms: i64,
}

/// An event without the values of its outcome.
struct KeptEvent {
    item: Arc<Item>,
    time_ms: i64,
    actions: u64,
    known: u64,
    surface: u16,
}

/// The sizes of a history.
#[derive(Debug, Clone, Copy)]
pub(super) struct HistorySize {
    /// The most events.
    pub(super) events: usize,
    /// The values of an outcome.
    pub(super) values: usize,
}

/// What names an event in its user's history.
#[derive(Debug, Clone, Copy)]
pub(super) struct EventKey {
    pub(super) time_ms: i64,
    pub(super) item: u64,
    pub(super) surface: u16,
}

impl History {
    /// The events of a saved history, the oldest first.
    pub(super) fn restored(
        events: impl IntoIterator<Item = Event>,
        size: HistorySize,
        count: u64,
        last_ms: i64,
    ) -> History {
        let mut history = History { count, last_ms, ..History::default() };
        for event in events {
            history.insert(history.events.len(), event, size.values);
        }
        history
    }

    /// The newest events, at most so many, the oldest first.
    pub(super) fn newest(&self, most: usize) -> impl Iterator<Item = Event> + '_ {
        (self.events.len().saturating_sub(most)..self.events.len()).map(|at| self.event(at))
    }

    /// Inserts an event in the order they were shown, which differs from the order in which their
    /// outcomes became known.
    pub(super) fn push(&mut self, event: Event, size: HistorySize) {
        self.count += 1;
        self.last_ms =
            if self.count == 1 { event.time_ms } else { self.last_ms.max(event.time_ms) };
        let later =
            self.events.iter().rev().take_while(|other| other.time_ms > event.time_ms).count();
        self.insert(self.events.len() - later, event, size.values);
        if self.events.len() > size.events {
            self.events.pop_front();
            self.values.drain(..size.values);
        }
    }

    /// Replaces the outcome of an event, and returns its item and the outcome of before; none if
    /// the event is gone.
    pub(super) fn correct(
        &mut self,
        key: EventKey,
        outcome: Outcome,
    ) -> Option<(Arc<Item>, Outcome)> {
        let is_it = |event: &KeptEvent| {
            (event.time_ms, event.item.id, event.surface) == (key.time_ms, key.item, key.surface)
        };
        let at = self.events.iter().rposition(is_it)?;
        let Event { item, outcome: before, .. } = self.event(at);
        let width = self.values.len() / self.events.len();
        (self.events[at].actions, self.events[at].known) = (outcome.actions, outcome.known);
        let values = self.values.range_mut(at * width..(at + 1) * width);
        values.zip(outcome.values).for_each(|(own, new)| *own = new);
        Some((item, before))
    }

    fn insert(&mut self, at: usize, event: Event, width: usize) {
        let Event { item, surface, time_ms, outcome: Outcome { actions, known, values } } = event;
        for (value, place) in values[..width].iter().zip(at * width..) {
            self.values.insert(place, *value);
        }
        self.events.insert(at, KeptEvent { item, time_ms, actions, known, surface });
    }

    fn event(&self, at: usize) -> Event {
        let &KeptEvent { ref item, time_ms, actions, known, surface } = &self.events[at];
        let width = self.values.len() / self.events.len();
        let mut outcome = Outcome { actions, known, ..Outcome::UNKNOWN };
        let values = self.values.range(at * width..(at + 1) * width);
        outcome.values.iter_mut().zip(values).for_each(|(own, value)| *own = *value);
        Event { item: item.clone(), surface, time_ms, outcome }
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::MAX_VALUES;

    use super::*;

    #[test]
    fn an_event_takes_no_more_memory_than_it_says() {
        assert_eq!((size_of::<KeptEvent>(), size_of::<Event>()), (40, 72));
    }

    /// Against a sorted list of whole events.
    #[test]
    fn events_keep_their_order_and_the_values_that_the_schema_has() {
        for values in [0, 1, 3, MAX_VALUES] {
            let size = HistorySize { events: 5, values };
            let (mut history, mut expected) = (History::default(), Vec::<Event>::new());
            for (number, time_ms) in [30, 10, 20, 20, 50, 40, 5, 60].into_iter().enumerate() {
                let mut outcome = Outcome { actions: 1 << 63, known: !0, ..Outcome::UNKNOWN };
                outcome.values[..values].fill(number as f32);
                let item = Arc::new(Item { id: number as u64, ..Item::default() });
                let event = Event { item, surface: 7, time_ms, outcome };
                history.push(event.clone(), size);
                let later = expected.partition_point(|other| other.time_ms <= time_ms);
                expected.insert(later, event);
                if expected.len() > size.events {
                    expected.remove(0);
                }
            }
            let mut other = Outcome::UNKNOWN;
            other.values[..values].fill(-1.0);
            let key = EventKey { time_ms: 20, item: 3, surface: 7 };
            let at = expected.iter().position(|event| event.item.id == 3).unwrap();
            let (item, before) = history.correct(key, other).unwrap();
            assert_eq!((item.id, before.values[..values].to_vec()), (3, vec![3.0; values]));
            assert!(history.correct(EventKey { surface: 6, ..key }, other).is_none());
            expected[at].outcome = other;
            let all = format!("{expected:?}");
            assert_eq!(format!("{:?}", history.newest(9).collect::<Vec<_>>()), all);
            let newest = format!("{:?}", &expected[3..]);
            assert_eq!(format!("{:?}", history.newest(2).collect::<Vec<_>>()), newest);
            let again = History::restored(expected, size, 8, 60);
            assert_eq!(format!("{:?}", again.newest(9).collect::<Vec<_>>()), all);
        }
    }
}
