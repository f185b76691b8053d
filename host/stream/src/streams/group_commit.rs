//! Group commit: many threads append to one stream, and one of them at a time writes.
//!
//! Calls that arrive while a thread writes are queued. The first of them then writes for all that
//! are queued, so that they share one sync. There is no thread of its own, so the queue is never
//! longer than the number of calling threads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Appended, Appender, Record, Topic, check_lengths, locked};
use crate::error::{CommonErrors as _, Error, Result};

/// A group takes no more calls once it has this many bytes.
const GROUP_BYTES: usize = 8 << 20;

/// The result of one call: `None` if the stream did not end where the caller expected.
pub(super) type CommitOutcome = Option<Appended>;

/// One call: its records, in the form that the sink writes.
#[derive(Debug)]
pub(super) struct AppendJob<R> {
    /// Where the stream must end; `None` appends at any end and skips records with known ids.
    pub(super) expected_end: Option<u64>,
    pub(super) records: R,
}

/// Writes the records of several calls. One thread uses it at a time.
pub(super) trait CommitSink: Send {
    /// A call's records in the form that the sink writes.
    type Records: Send;

    /// Prepares a call's records before the call is queued. `with_ids` is false where ids do not
    /// count.
    fn prepare(records: &[Record], with_ids: bool) -> Self::Records;

    /// The approximate size of a call's records.
    fn bytes(records: &Self::Records) -> usize;

    /// Commits the jobs in order. An error is the error of every job.
    fn commit(&mut self, jobs: &[AppendJob<Self::Records>]) -> Result<Vec<CommitOutcome>>;
}

/// The appender of a stream: a sink and the queue of calls before it.
#[derive(Debug)]
pub(super) struct GroupCommit<S: CommitSink> {
    topic: Topic,
    queue: Mutex<CommitQueue<S::Records>>,
    committed: Condvar,
    /// Locked by the thread that commits; the other threads wait for their results.
    sink: Mutex<S>,
}

#[derive(Debug)]
struct CommitQueue<R> {
    next_ticket: u64,
    waiting: VecDeque<(u64, AppendJob<R>)>,
    results: HashMap<u64, Result<CommitOutcome>>,
    /// Whether a thread commits.
    busy: bool,
}

impl<S: CommitSink> GroupCommit<S> {
    pub(super) fn new(topic: &Topic, sink: S) -> GroupCommit<S> {
        let (waiting, results) = (VecDeque::new(), HashMap::new());
        let queue = CommitQueue { next_ticket: 0, waiting, results, busy: false };
        GroupCommit {
            topic: topic.clone(),
            queue: Mutex::new(queue),
            committed: Condvar::new(),
            sink: Mutex::new(sink),
        }
    }

    /// Commits the queued calls and stores their results.
    fn commit_group<'a>(
        &'a self,
        mut queue: MutexGuard<'a, CommitQueue<S::Records>>,
    ) -> MutexGuard<'a, CommitQueue<S::Records>> {
        let (mut tickets, mut jobs, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some((ticket, job)) = queue.waiting.pop_front_if(|(_, job)| {
            jobs.is_empty() || bytes + S::bytes(&job.records) <= GROUP_BYTES
        }) {
            bytes += S::bytes(&job.records);
            tickets.push(ticket);
            jobs.push(job);
        }
        queue.busy = true;
        drop(queue);
        let turn = CommitTurn { appender: self, tickets };
        let outcomes = match self.sink.lock() {
            Ok(mut sink) => sink.commit(&jobs),
            Err(_) => Err(self.poisoned()),
        };
        let tickets = turn.tickets.iter().copied();
        match outcomes {
            Ok(outcomes) => {
                locked(&self.queue).results.extend(tickets.zip(outcomes.into_iter().map(Ok)));
            }
            Err(error) => {
                let results = tickets.map(|ticket| (ticket, Err(again(&error))));
                locked(&self.queue).results.extend(results);
            }
        }
        drop(turn);
        locked(&self.queue)
    }

    fn poisoned(&self) -> Error {
        Error::internal(format!(
            "stream {}: a thread panicked during an append; restart this process",
            self.topic
        ))
    }
}

impl<S: CommitSink> Appender for GroupCommit<S> {
    /// Queues a call and returns its result once it is committed.
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<CommitOutcome> {
        check_lengths(&self.topic, records)?;
        let records = S::prepare(records, expected_end.is_none());
        let mut queue = locked(&self.queue);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.waiting.push_back((ticket, AppendJob { expected_end, records }));
        loop {
            if let Some(result) = queue.results.remove(&ticket) {
                return result;
            }
            queue = if queue.busy {
                self.committed.wait(queue).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.commit_group(queue)
            };
        }
    }
}

/// A thread's turn to commit. However it ends, even by a panic, its calls get a result and the next
/// group can begin.
struct CommitTurn<'a, S: CommitSink> {
    appender: &'a GroupCommit<S>,
    tickets: Vec<u64>,
}

impl<S: CommitSink> Drop for CommitTurn<'_, S> {
    fn drop(&mut self) {
        let mut queue = locked(&self.appender.queue);
        queue.busy = false;
        if std::thread::panicking() {
            let failed = |&ticket: &u64| (ticket, Err(self.appender.poisoned()));
            queue.results.extend(self.tickets.iter().map(failed));
        }
        self.appender.committed.notify_all();
    }
}

/// The same error, for another call that failed with it.
fn again(error: &Error) -> Error {
    match error {
        Error::Core(error) => Error::Core(error.clone()),
        other => Error::internal(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts jobs, and panics on a record `panic`.
    struct CountingSink(u64);

    impl CommitSink for CountingSink {
        type Records = Vec<Record>;

        fn prepare(records: &[Record], _: bool) -> Vec<Record> {
            records.to_vec()
        }

        fn bytes(_: &Vec<Record>) -> usize {
            1
        }

        fn commit(&mut self, jobs: &[AppendJob<Vec<Record>>]) -> Result<Vec<CommitOutcome>> {
            let mut payloads = jobs.iter().flat_map(|job| &job.records);
            assert!(payloads.all(|record| record.payload != b"panic"), "as the test asks");
            let count = |_: &AppendJob<Vec<Record>>| {
                self.0 += 1;
                Some(Appended { end: self.0, repeated: 0 })
            };
            Ok(jobs.iter().map(count).collect())
        }
    }

    #[test]
    fn a_panic_during_a_commit_is_an_error_for_every_caller_and_blocks_none() {
        let appender = GroupCommit::new(&Topic::events(), CountingSink(0));
        let submit = |text: &str| {
            appender.submit(None, &[Record { id: 0, payload: text.as_bytes().to_vec() }])
        };
        assert_eq!(submit("count").unwrap().unwrap().end, 1);
        let results = std::thread::scope(|scope| {
            let panics = scope.spawn(|| submit("panic").is_ok());
            let others = [scope.spawn(|| submit("count")), scope.spawn(|| submit("count"))];
            assert!(panics.join().is_err() || submit("count").is_err());
            others.map(|other| other.join().unwrap())
        });
        assert!(
            results
                .iter()
                .all(|result| result.as_ref().is_err() || result.as_ref().unwrap().is_some())
        );
        let error = submit("count").unwrap_err().to_string();
        assert!(error.contains("restart this process"), "{error}");
    }
}
