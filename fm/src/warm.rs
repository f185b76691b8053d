//! Histories that are encoded with new weights before those are in service, so that the first requests after an
//! update find them. Whose: the users that were asked for last, as far as memory, number and time allow; all others
//! are encoded when they are asked for, as ever.
//!
//! Memory is the old generation's: its cache gives up what the new one takes. It works on one thread, which is not
//! one of those that serve. When weights change, and how they are put in service, is `live`'s.

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
    history::{Encoded, HistoryCache},
    inference::Pass,
    sampling::Selected,
    serving::{ServingBackend, ServingModel},
};

/// The share of the cache's bytes that may be warm when weights go into service: one in so many.
const SHARE: usize = 4;

/// Tokens that are encoded together, at least one history: few, so that what serves waits for no long pass.
const BATCH_TOKENS: usize = 512;

/// Fresh weights that wait are worth more than warm histories after this time.
const AT_MOST: Duration = Duration::from_secs(5);

/// The users that were asked for last. Writing is one addition and one store; reading may miss who is written
/// just then.
#[derive(Debug)]
struct Recent {
    /// A ring; a user may be in it more than once.
    users: Box<[AtomicU64]>,
    /// How many were written since the start.
    written: AtomicUsize,
}

impl Recent {
    /// So long that `users` are in it where each is asked for a few times in a row.
    fn new(users: usize) -> Self {
        const TIMES: usize = 4;
        let empty = || AtomicU64::new(0);
        let users = std::iter::repeat_with(empty).take(users.saturating_mul(TIMES)).collect();
        Self { users, written: AtomicUsize::new(0) }
    }

    /// A user is asked for.
    fn touch(&self, user: u64) {
        if !self.users.is_empty() {
            let at = self.written.fetch_add(1, Ordering::Relaxed) % self.users.len();
            self.users[at].store(user, Ordering::Relaxed);
        }
    }

    /// Who was asked for, each once, the last one first.
    fn users(&self) -> Vec<u64> {
        let written = self.written.load(Ordering::Relaxed);
        let first = written.saturating_sub(self.users.len());
        let mut seen = HashSet::new();
        let users = (first..written).rev().map(|at| &self.users[at % self.users.len()]);
        users.map(|user| user.load(Ordering::Relaxed)).filter(|&user| seen.insert(user)).collect()
    }
}

/// Encodes histories with new weights on a thread of its own.
#[derive(Debug)]
pub(crate) struct Warmer {
    recent: Recent,
    thread: rayon::ThreadPool,
    /// How many, at most.
    histories: usize,
    /// How many bytes, at most.
    bytes: u64,
}

impl Warmer {
    /// For so many histories, or none with 0 or without a cache.
    pub(crate) fn start(histories: usize, history_cache_bytes: usize) -> Result<Option<Self>> {
        if histories == 0 || history_cache_bytes == 0 {
            return Ok(None);
        }
        // What kernels would do in parallel is done here by the one thread, and not by threads that serve.
        let thread = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "fm-warm".into())
            .start_handler(|_| crate::priority::give_way())
            .build()
            .map_err(|error| Error::Update(format!("no thread for its histories: {error}")))?;
        let bytes = (history_cache_bytes / SHARE) as u64;
        Ok(Some(Self { recent: Recent::new(histories), thread, histories, bytes }))
    }

    /// A user is asked for.
    pub(crate) fn touch(&self, user: u64) {
        self.recent.touch(user);
    }

    /// Encodes for `pass`, which is not in service yet, what `old` has of the users that were asked for last. It
    /// gives the number of tokens.
    pub(crate) fn warm<B: ServingBackend>(
        &self,
        pass: &Pass<'_, B>,
        old: &HistoryCache<B>,
    ) -> Result<u64>
    where
        ServingModel<B>: Sync,
    {
        let until = Instant::now() + AT_MOST;
        let mut users = self.recent.users().into_iter();
        let (mut tokens, mut left) = (0, self.histories);
        while left > 0 && Instant::now() < until {
            let warm = pass.now.cache.bytes();
            let room = self.bytes.saturating_sub(warm);
            let batch = Waiting::next(&mut users, old, (left, room));
            if batch.histories.is_empty() {
                break;
            }
            left -= batch.histories.len();
            old.give_up(warm + batch.bytes);
            tokens += self.thread.install(|| encode(pass, batch.histories))?;
        }
        Ok(tokens)
    }
}

/// Users and their events, to be encoded together.
#[derive(Default)]
struct Waiting {
    histories: Vec<(u64, Vec<Event>)>,
    tokens: usize,
    /// What they take in the old cache.
    bytes: u64,
}

impl Waiting {
    /// Of the next users, as the old cache has them by now: it may have lost some, and others grew. Events are
    /// copied, because an entry that is held here could not grow in place.
    fn next<B: ServingBackend>(
        users: &mut impl Iterator<Item = u64>,
        old: &HistoryCache<B>,
        (most, room): (usize, u64),
    ) -> Self {
        let mut waiting = Self::default();
        while waiting.tokens < BATCH_TOKENS
            && waiting.histories.len() < most
            && let Some(user) = users.next()
        {
            let Some(history) = old.peek(user) else { continue };
            let bytes = history.bytes() as u64;
            if waiting.bytes + bytes <= room {
                waiting.bytes += bytes;
                waiting.tokens += history.events.len();
                waiting.histories.push((user, history.events.clone()));
            }
        }
        waiting
    }
}

/// Encodes whole histories and keeps them.
fn encode<B: ServingBackend>(pass: &Pass<'_, B>, histories: Vec<(u64, Vec<Event>)>) -> Result<u64>
where
    ServingModel<B>: Sync,
{
    let examples: Vec<Example> = histories.into_iter().map(alone).collect();
    let selected: Vec<Selected<'_>> = examples.iter().map(all).collect();
    let new = |example: &Example| Encoded { events: example.history.clone(), ..Encoded::default() };
    let mut encoded: Vec<Encoded<B>> = examples.iter().map(new).collect();
    pass.encode(&selected, &mut encoded.iter_mut().collect::<Vec<_>>())?;
    for (example, encoded) in examples.iter().zip(encoded) {
        pass.now.cache.keep(example.user.id, Arc::new(encoded));
    }
    Ok(examples.iter().map(|example| example.history.len() as u64).sum())
}

/// A history without a request.
fn alone((id, history): (u64, Vec<Event>)) -> Example {
    let user = Arc::new(User { id, ..User::default() });
    Example { request: 0, user, surface: 0, time_ms: 0, history, targets: Vec::new() }
}

/// What is kept of a user is all that the model reads.
fn all(example: &Example) -> Selected<'_> {
    Selected { example, events: (0..example.history.len()).collect(), targets: Vec::new() }
}
