//! Group commit: many threads, one writer. Who comes while another writes waits
//! in line, and the first of those then writes for all of them.
//!
//! It has no thread of its own: a call is done by whoever made it, or by one who came before. So what waits
//! is bounded by the threads that call.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Appended, Topic};
use crate::error::{CommonErrors as _, Error, Result};

/// A group takes no more calls once it has so many bytes.
const GROUP_BYTES: usize = 8 << 20;

/// What came of a call: none if the stream did not end where it should.
pub(super) type Outcome = Option<Appended>;

/// Where calls are written to, by one thread at a time.
pub(super) trait Sink {
    /// What a call brings.
    type Job;

    /// About how large a job is.
    fn bytes(job: &Self::Job) -> usize;

    /// Does the jobs in order; an error is that of each of them.
    fn commit(&mut self, jobs: &[Self::Job]) -> Result<Vec<Outcome>>;
}

/// The line before a sink.
#[derive(Debug)]
pub(super) struct Line<S: Sink> {
    topic: Topic,
    places: Mutex<Places<S::Job>>,
    turned: Condvar,
    /// The thread whose turn it is has it; the others wait for their answers.
    sink: Mutex<S>,
}

#[derive(Debug)]
struct Places<J> {
    next: u64,
    waiting: VecDeque<(u64, J)>,
    answers: HashMap<u64, Result<Outcome>>,
    /// Whether it is somebody's turn.
    busy: bool,
}

impl<S: Sink> Line<S> {
    pub(super) fn new(topic: &Topic, sink: S) -> Line<S> {
        let places =
            Places { next: 0, waiting: VecDeque::new(), answers: HashMap::new(), busy: false };
        Line {
            topic: topic.clone(),
            places: Mutex::new(places),
            turned: Condvar::new(),
            sink: Mutex::new(sink),
        }
    }

    /// Has a job done, and returns when it is.
    pub(super) fn submit(&self, job: S::Job) -> Result<Outcome> {
        let mut places = self.places();
        let ticket = places.next;
        places.next += 1;
        places.waiting.push_back((ticket, job));
        loop {
            if let Some(answer) = places.answers.remove(&ticket) {
                return answer;
            }
            places = match places.busy {
                true => self.turned.wait(places).unwrap_or_else(PoisonError::into_inner),
                false => self.turn(places),
            };
        }
    }

    fn places(&self) -> MutexGuard<'_, Places<S::Job>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does the jobs of those who wait, and answers them.
    fn turn<'a>(
        &'a self,
        mut places: MutexGuard<'a, Places<S::Job>>,
    ) -> MutexGuard<'a, Places<S::Job>> {
        let (mut tickets, mut jobs, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some((ticket, job)) = places
            .waiting
            .pop_front_if(|(_, job)| jobs.is_empty() || bytes + S::bytes(job) <= GROUP_BYTES)
        {
            bytes += S::bytes(&job);
            tickets.push(ticket);
            jobs.push(job);
        }
        places.busy = true;
        drop(places);
        let turn = Turn { line: self, tickets };
        let outcomes = match self.sink.lock() {
            Ok(mut sink) => sink.commit(&jobs),
            Err(_) => Err(self.failed()),
        };
        let mut places = self.places();
        match outcomes {
            Ok(outcomes) => {
                let answers = outcomes.into_iter().map(Ok);
                places.answers.extend(turn.tickets.iter().copied().zip(answers));
            }
            Err(error) => {
                let answers = turn.tickets.iter().map(|&ticket| (ticket, Err(again(&error))));
                places.answers.extend(answers);
            }
        }
        drop(places);
        drop(turn);
        self.places()
    }

    fn failed(&self) -> Error {
        Error::invalid(format!(
            "stream {}: a thread failed amid an append; start this process again",
            self.topic
        ))
    }
}

/// A thread's turn. However it ends, those in line go on, and those that it was for have an answer.
struct Turn<'a, S: Sink> {
    line: &'a Line<S>,
    tickets: Vec<u64>,
}

impl<S: Sink> Drop for Turn<'_, S> {
    fn drop(&mut self) {
        let mut places = self.line.places();
        places.busy = false;
        if std::thread::panicking() {
            let failed = self.tickets.iter().map(|&ticket| (ticket, Err(self.line.failed())));
            places.answers.extend(failed);
        }
        self.line.turned.notify_all();
    }
}

/// The same error, for another of those whose call it failed.
fn again(error: &Error) -> Error {
    match error {
        Error::Core(error) => Error::Core(error.again()),
        other => Error::internal(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts, or fails as it is told.
    struct Counter(u64);

    impl Sink for Counter {
        type Job = &'static str;

        fn bytes(_: &Self::Job) -> usize {
            1
        }

        fn commit(&mut self, jobs: &[Self::Job]) -> Result<Vec<Outcome>> {
            assert!(!jobs.contains(&"panic"), "as told");
            let count = |_: &Self::Job| {
                self.0 += 1;
                Some(Appended { end: self.0, repeated: 0 })
            };
            Ok(jobs.iter().map(count).collect())
        }
    }

    #[test]
    fn a_panic_amid_a_turn_is_an_error_for_everybody_and_leaves_nobody_waiting() {
        let line = Line::new(&Topic::events(), Counter(0));
        assert_eq!(line.submit("count").unwrap().unwrap().end, 1);
        let told = std::thread::scope(|scope| {
            let panics = scope.spawn(|| line.submit("panic").is_ok());
            let others =
                [scope.spawn(|| line.submit("count")), scope.spawn(|| line.submit("count"))];
            assert!(panics.join().is_err() || line.submit("count").is_err());
            others.map(|other| other.join().unwrap())
        });
        assert!(told.iter().all(|told| told.as_ref().is_err() || told.as_ref().unwrap().is_some()));
        let error = line.submit("count").unwrap_err().to_string();
        assert!(error.contains("start this process again"), "{error}");
    }
}
