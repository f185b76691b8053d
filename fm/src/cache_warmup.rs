//! Cache warm-up: encodes histories with new weights before the weights are in service, so that the
//! first requests after an update hit the cache.
//!
//! The histories are those of the most recent users, within limits on their number, on memory and
//! on time; all others are encoded at the user's next request. The old generation's cache shrinks
//! by what the new one takes, so both together stay within the configured size. The work runs on
//! one thread of its own. `live_model` decides when weights change.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    Error, Result,
    example::{Event, Example, User},
    history::{EncodedHistory, HistoryCache},
    inference::InferencePass,
    sampling::ExampleSelection,
    serving::{ServingBackend, ServingModel},
    training_only::ReadFor,
};

/// Warm-up may fill the cache's bytes divided by this.
const CACHE_FRACTION_DIVISOR: usize = 4;

/// Histories are encoded together until they have this many tokens: few, so that requests do not
/// wait for a long pass.
const BATCH_TOKENS: usize = 512;

/// The time limit of a warm-up; after that, fresh weights matter more than warm histories.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// The users of recent requests. Recording is one atomic addition and one store; a concurrent
/// reader may miss a user that is being recorded.
#[derive(Debug)]
pub(crate) struct RecentUsers {
    /// A ring buffer, which may contain a user more than once.
    users: Box<[AtomicU64]>,
    /// The number of users recorded since the start.
    written: AtomicUsize,
}

impl RecentUsers {
    /// A buffer large enough for `users` distinct users, at least one, that each make a few
    /// requests in a row.
    fn new(users: usize) -> Self {
        const REQUESTS_PER_USER: usize = 4;
        let empty = || AtomicU64::new(0);
        let users =
            std::iter::repeat_with(empty).take(users.saturating_mul(REQUESTS_PER_USER)).collect();
        Self { users, written: AtomicUsize::new(0) }
    }

    /// Records a request of a user.
    pub(crate) fn record(&self, user: u64) {
        let at = self.written.fetch_add(1, Ordering::Relaxed) % self.users.len();
        self.users[at].store(user, Ordering::Relaxed);
    }

    /// The recorded users without repetitions, the most recent first.
    fn users(&self) -> Vec<u64> {
        let written = self.written.load(Ordering::Relaxed);
        let first = written.saturating_sub(self.users.len());
        let mut seen = HashSet::new();
        let users = (first..written).rev().map(|at| &self.users[at % self.users.len()]);
        users.map(|user| user.load(Ordering::Relaxed)).filter(|&user| seen.insert(user)).collect()
    }
}

/// Encodes recent users' histories with new weights, on a thread of its own.
#[derive(Debug)]
pub(crate) struct CacheWarmer {
    pub(crate) recent: RecentUsers,
    thread: rayon::ThreadPool,
    max_histories: usize,
    max_bytes: u64,
}

impl CacheWarmer {
    /// A warmer for at most `max_histories` histories; `None` if that is 0 or there is no cache.
    pub(crate) fn start(max_histories: usize, history_cache_bytes: usize) -> Result<Option<Self>> {
        if max_histories == 0 || history_cache_bytes == 0 {
            return Ok(None);
        }
        // Kernels called inside this pool run on its one thread and not on the serving threads.
        let thread = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "fm-warm".into())
            .start_handler(|_| crate::threads::lower_thread_priority())
            .build()
            .map_err(|error| Error::Update(format!("cannot start the warm-up thread: {error}")))?;
        let max_bytes = (history_cache_bytes / CACHE_FRACTION_DIVISOR) as u64;
        let recent = RecentUsers::new(max_histories);
        Ok(Some(Self { recent, thread, max_histories, max_bytes }))
    }

    /// Encodes the histories of recent users that `old` has cached into the cache of `pass`, whose
    /// generation is not in service yet. Returns the number of encoded tokens.
    pub(crate) fn warm_up<B: ServingBackend>(
        &self,
        pass: &InferencePass<'_, B>,
        old: &HistoryCache<B>,
    ) -> Result<u64>
    where
        ServingModel<B>: Sync,
    {
        let deadline = Instant::now() + TIME_LIMIT;
        let mut users = self.recent.users().into_iter();
        let (mut tokens, mut left) = (0, self.max_histories);
        while left > 0 && Instant::now() < deadline {
            let warm_bytes = pass.generation.cache.bytes();
            let max_bytes = self.max_bytes.saturating_sub(warm_bytes);
            let batch = WarmupBatch::next(&mut users, old, left, max_bytes);
            if batch.histories.is_empty() {
                break;
            }
            left -= batch.histories.len();
            old.reserve(warm_bytes + batch.bytes);
            tokens += self.thread.install(|| encode(pass, batch.histories))?;
        }
        Ok(tokens)
    }
}

/// Histories to be encoded together.
#[derive(Default)]
struct WarmupBatch {
    histories: Vec<Example>,
    tokens: usize,
    /// The bytes that the histories take in the old cache.
    bytes: u64,
}

impl WarmupBatch {
    /// The next users' histories as they are in the old cache now; it may have evicted some since.
    /// Events are copied, because an entry that is held here could not grow in place.
    fn next<B: ServingBackend>(
        users: &mut impl Iterator<Item = u64>,
        old: &HistoryCache<B>,
        max_histories: usize,
        max_bytes: u64,
    ) -> Self {
        let mut batch = Self::default();
        while batch.tokens < BATCH_TOKENS
            && batch.histories.len() < max_histories
            && let Some(user) = users.next()
        {
            let Some(history) = old.peek(user) else { continue };
            let bytes = history.bytes() as u64;
            if batch.bytes + bytes <= max_bytes {
                batch.bytes += bytes;
                batch.tokens += history.events.len();
                batch.histories.push(without_request(user, history.events.clone()));
            }
        }
        batch
    }
}

/// Encodes histories and inserts them into the cache of the pass's generation.
fn encode<B: ServingBackend>(pass: &InferencePass<'_, B>, examples: Vec<Example>) -> Result<u64>
where
    ServingModel<B>: Sync,
{
    let selected: Vec<ExampleSelection<'_>> = examples.iter().map(all_events).collect();
    let new = |example: &Example| EncodedHistory {
        events: example.history.clone(),
        ..EncodedHistory::default()
    };
    let mut encoded: Vec<EncodedHistory<B>> = examples.iter().map(new).collect();
    pass.encode(&selected, &mut encoded.iter_mut().collect::<Vec<_>>())?;
    for (example, encoded) in examples.iter().zip(encoded) {
        pass.generation.cache.insert(example.user.id, Arc::new(encoded));
    }
    Ok(examples.iter().map(|example| example.history.len() as u64).sum())
}

/// An example that has only a user and a history.
fn without_request(user: u64, history: Vec<Event>) -> Example {
    let user = Arc::new(User { id: user, ..User::default() });
    Example { request: 0, user, surface: 0, time_ms: 0, history, targets: Vec::new() }
}

/// All events of a history: a cached history contains only events that the model reads.
fn all_events(example: &Example) -> ExampleSelection<'_> {
    let events = (0..example.history.len()).collect();
    ExampleSelection { example, events, targets: Vec::new(), reader: ReadFor::Prediction }
}
