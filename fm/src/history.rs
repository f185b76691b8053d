//! Encoded histories, and the cache that keeps them between requests. With a cached history,
//! scoring a candidate costs one token instead of the user's whole history.
//!
//! A cache belongs to one generation of a model's weights. An entry stores the events that it
//! encodes, and a lookup compares them one by one: from the first event whose outcome or item has
//! changed, the history is encoded again. The encoding itself is in `serving`.

use std::sync::Arc;

use hypercast_kernels::{history::KeptLayer, serving::ServingBackend};
use quick_cache::{Weighter, sync::Cache};

use crate::example::{Event, Example, Item};

/// A user's encoded history: `[n]` tokens, oldest first.
#[derive(Debug, Clone, Default)]
pub struct EncodedHistory<B: ServingBackend> {
    /// `[n]`: the event of each token.
    pub(crate) events: Vec<Event>,
    /// `[n]`: when each happened, in seconds.
    pub(crate) times_s: Vec<i64>,
    /// Keys and values of each layer; empty before the first token.
    pub(crate) layers: Vec<B::Kept>,
}

impl<B: ServingBackend> EncodedHistory<B> {
    /// The number of leading events that are equal to those of `history`.
    fn common_prefix(&self, history: &[Event]) -> usize {
        self.events.iter().zip(history).take_while(|(own, event)| same_token(own, event)).count()
    }

    fn truncate(&mut self, tokens: usize) {
        self.events.truncate(tokens);
        self.times_s.truncate(tokens);
        for layer in &mut self.layers {
            layer.truncate(tokens);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(B::Kept::bytes).sum();
        layers + self.events.capacity() * size_of::<Event>() + self.times_s.capacity() * 8
    }
}

/// Whether two events give the same token. Items are shared, so most comparisons are of pointers.
fn same_token(a: &Event, b: &Event) -> bool {
    let item = Arc::ptr_eq(&a.item, &b.item) || is_same_item(&a.item, &b.item);
    let values = |event: &Event| event.outcome.values.map(f32::to_bits);
    item && (a.surface, a.time_ms) == (b.surface, b.time_ms)
        && (a.outcome.actions, a.outcome.known) == (b.outcome.actions, b.outcome.known)
        && values(a) == values(b)
}

/// Whether two items have the same features. Numbers are compared by their bits, as those that are
/// missing are NaN.
fn is_same_item(a: &Item, b: &Item) -> bool {
    let bits = |number: &f32| number.to_bits();
    (a.id, &a.ids, &a.content) == (b.id, &b.ids, &b.content)
        && a.dense.iter().map(bits).eq(b.dense.iter().map(bits))
}

/// The cached part of a request's history.
pub(crate) enum CacheLookup<B: ServingBackend> {
    /// The whole history, shared with other requests.
    Complete(Arc<EncodedHistory<B>>),
    /// The oldest events, possibly none; the caller encodes the rest.
    Prefix(Box<EncodedHistory<B>>),
}

/// Hits and misses of the history cache since the model was loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Requests whose whole history was cached.
    pub full_hits: u64,
    /// Tokens that were cached.
    pub cached_tokens: u64,
    /// Tokens that had to be encoded.
    pub encoded_tokens: u64,
    /// Tokens that updates encoded with their new weights before putting them in service.
    pub warmup_tokens: u64,
    /// Bytes in the cache now.
    pub bytes: u64,
}

/// Encoded histories by user, bounded in bytes; the least recently useful entries are evicted.
#[derive(Debug)]
pub(crate) struct HistoryCache<B: ServingBackend> {
    /// A cache without room refuses every entry.
    entries: Cache<u64, Arc<EncodedHistory<B>>, HistoryBytes>,
    max_bytes: u64,
}

#[derive(Debug, Clone)]
struct HistoryBytes;

impl<B: ServingBackend> Weighter<u64, Arc<EncodedHistory<B>>> for HistoryBytes {
    fn weight(&self, _user: &u64, history: &Arc<EncodedHistory<B>>) -> u64 {
        history.bytes() as u64
    }
}

impl<B: ServingBackend> HistoryCache<B> {
    /// A cache of at most `bytes`; 0 caches nothing.
    pub(crate) fn new(bytes: usize) -> Self {
        /// A typical entry's size, from which the cache estimates the number of entries.
        const ENTRY_BYTES: usize = 256 << 10;
        let (entries, max_bytes) = ((bytes / ENTRY_BYTES).max(64), bytes as u64);
        Self { entries: Cache::with_weighter(entries, max_bytes, HistoryBytes), max_bytes }
    }

    /// Looks up the history of an example, which begins at its event `first`.
    pub(crate) fn lookup(&self, example: &Example, first: usize) -> CacheLookup<B> {
        let history = &example.history[first..];
        let user = example.user.id;
        let Some(known) = self.entries.get(&user).filter(|_| !history.is_empty()) else {
            return CacheLookup::Prefix(Box::default());
        };
        let common = known.common_prefix(history);
        if common == history.len() && common == known.events.len() {
            return CacheLookup::Complete(known);
        }
        // Taken out of the cache, the entry can grow in place unless another request is reading it.
        self.entries.remove(&user);
        let mut own = Arc::unwrap_or_clone(known);
        own.truncate(common);
        CacheLookup::Prefix(Box::new(own))
    }

    /// Stores a history for the user's next request.
    pub(crate) fn insert(&self, user: u64, history: Arc<EncodedHistory<B>>) {
        if !history.events.is_empty() {
            self.entries.insert(user, history);
        }
    }

    /// A user's cached history; unlike [`HistoryCache::lookup`], this does not count as a use.
    pub(crate) fn peek(&self, user: u64) -> Option<Arc<EncodedHistory<B>>> {
        self.entries.peek(&user)
    }

    /// Reduces the capacity to `bytes` less than the cache was created with; 0 restores it.
    pub(crate) fn reserve(&self, bytes: u64) {
        self.entries.set_capacity(self.max_bytes.saturating_sub(bytes));
    }

    pub(crate) fn clear(&self) {
        self.entries.clear();
    }

    /// Bytes that its entries take.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.weight()
    }
}
