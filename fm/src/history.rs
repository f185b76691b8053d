//! Encoded histories, and the cache that keeps them between requests: what
//! makes a candidate cost its own token and not the user's whole past.
//!
//! A cache belongs to one loaded FM version. An entry says which events it was
//! made of, and they are compared, not hashed: an event whose outcome became
//! known later, or whose item changed, is encoded anew with all that follow it.
//! How histories are encoded is the model's business.

use std::sync::Arc;

use hypercast_kernels::history::HistoryBackend;
use quick_cache::{Weighter, sync::Cache};

use crate::example::{Event, Example};

/// A user's history as the layers see it: `[n]` tokens, oldest first.
#[derive(Debug, Clone)]
pub struct Encoded<B: HistoryBackend> {
    /// The event of each token.
    pub(crate) events: Vec<Event>,
    /// `[n]`: when each happened, in seconds.
    pub(crate) times_s: Vec<i64>,
    /// Keys and values of each layer; none before the first token.
    pub(crate) layers: Vec<B::Kept>,
}

impl<B: HistoryBackend> Default for Encoded<B> {
    fn default() -> Self {
        Self { events: Vec::new(), times_s: Vec::new(), layers: Vec::new() }
    }
}

impl<B: HistoryBackend> Encoded<B> {
    /// How many of the oldest events are those of `history`.
    fn common(&self, history: &[Event]) -> usize {
        self.events.iter().zip(history).take_while(|(own, event)| same(own, event)).count()
    }

    fn truncate(&mut self, tokens: usize) {
        self.events.truncate(tokens);
        self.times_s.truncate(tokens);
        for layer in &mut self.layers {
            B::truncate(layer, tokens);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(|layer| B::kept_size(layer).bytes).sum();
        layers + self.events.capacity() * size_of::<Event>() + self.times_s.capacity() * 8
    }
}

/// Whether two events are the same token. Items are shared, so that most comparisons are of pointers.
fn same(a: &Event, b: &Event) -> bool {
    let item = Arc::ptr_eq(&a.item, &b.item) || a.item == b.item;
    let values = |event: &Event| event.outcome.values.map(f32::to_bits);
    item && (a.surface, a.time_ms) == (b.surface, b.time_ms)
        && (a.outcome.actions, a.outcome.known) == (b.outcome.actions, b.outcome.known)
        && values(a) == values(b)
}

/// What is known of a request's history.
pub(crate) enum Found<B: HistoryBackend> {
    /// All of it, shared with other requests.
    Whole(Arc<Encoded<B>>),
    /// Its oldest events, maybe none; the rest is to be encoded.
    Prefix(Box<Encoded<B>>),
}

/// How often the cache had what was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Requests whose whole history was there.
    pub whole: u64,
    /// Tokens that were there.
    pub known_tokens: u64,
    /// Tokens that had to be encoded.
    pub new_tokens: u64,
    /// Tokens that updates encoded with their weights before those were in service.
    pub warmed_tokens: u64,
    /// Bytes in the cache now.
    pub bytes: u64,
}

/// Encoded histories by user, bounded by bytes: the least useful go first.
#[derive(Debug)]
pub(crate) struct HistoryCache<B: HistoryBackend> {
    entries: Option<Cache<u64, Arc<Encoded<B>>, Bytes>>,
    /// At most.
    most_bytes: u64,
}

#[derive(Debug, Clone)]
struct Bytes;

impl<B: HistoryBackend> Weighter<u64, Arc<Encoded<B>>> for Bytes {
    fn weight(&self, _user: &u64, history: &Arc<Encoded<B>>) -> u64 {
        history.bytes() as u64
    }
}

impl<B: HistoryBackend> HistoryCache<B> {
    /// A cache of at most `bytes`; none with 0.
    pub(crate) fn new(bytes: usize) -> Self {
        /// A guess at an entry's size, from which the cache estimates how many it will hold.
        const ENTRY_BYTES: usize = 256 << 10;
        let entries = (bytes > 0)
            .then(|| Cache::with_weighter((bytes / ENTRY_BYTES).max(64), bytes as u64, Bytes));
        Self { entries, most_bytes: bytes as u64 }
    }

    /// What is known of the history of an example that begins at its event `first`.
    pub(crate) fn find(&self, example: &Example, first: usize) -> Found<B> {
        let history = &example.history[first..];
        let user = example.user.id;
        let known = self.entries.as_ref().and_then(|entries| entries.get(&user));
        let Some(known) = known.filter(|_| !history.is_empty()) else {
            return Found::Prefix(Box::default());
        };
        let common = known.common(history);
        if common == history.len() && common == known.events.len() {
            return Found::Whole(known);
        }
        // It is taken out of the cache to grow in place, unless another request reads it just now.
        self.entries.as_ref().and_then(|entries| entries.remove(&user));
        let mut own = Arc::unwrap_or_clone(known);
        own.truncate(common);
        Found::Prefix(Box::new(own))
    }

    /// Keeps a history for the user's next request.
    pub(crate) fn keep(&self, user: u64, history: Arc<Encoded<B>>) {
        if let Some(entries) = self.entries.as_ref().filter(|_| !history.events.is_empty()) {
            entries.insert(user, history);
        }
    }

    /// What is there of a user, which makes it no more useful.
    pub(crate) fn peek(&self, user: u64) -> Option<Arc<Encoded<B>>> {
        self.entries.as_ref().and_then(|entries| entries.peek(&user))
    }

    /// Has `bytes` less room than it was made with; 0 gives it all back.
    pub(crate) fn give_up(&self, bytes: u64) {
        if let Some(entries) = &self.entries {
            entries.set_capacity(self.most_bytes.saturating_sub(bytes));
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        if let Some(entries) = &self.entries {
            entries.clear();
        }
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.as_ref().map_or(0, Cache::weight)
    }
}
