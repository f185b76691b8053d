//! The writer of a stream, for many threads: who comes while another writes
//! waits, and the first of those then writes for all of them.
//!
//! No thread of its own: a call is done by whoever made it or by one who came before. So what waits is
//! bounded by the threads that call.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Limits;
use super::owner::Owner;
use super::segment;
use super::tail::{Job, Outcome, Tail};
use crate::engine::{Appended, Appender, Record, Topic, checked};
use crate::error::{Error, Result};

/// A group takes no more calls once it has so many bytes.
const GROUP_BYTES: usize = 8 << 20;

#[derive(Debug)]
pub(super) struct DirectoryAppender {
    topic: Topic,
    line: Mutex<Line>,
    turned: Condvar,
    /// The thread that writes has it; the others wait in line.
    tail: Mutex<Tail>,
    /// Let go of last.
    _owner: Owner,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    waiting: VecDeque<(u64, Job)>,
    done: HashMap<u64, Result<Outcome>>,
    /// Whether somebody writes.
    busy: bool,
}

impl DirectoryAppender {
    pub(super) fn open(topic: &Topic, folder: &Path, limits: Limits) -> Result<DirectoryAppender> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let owner = Owner::claim(topic, folder)?;
        let tail = Tail::open(folder, limits)?;
        Ok(DirectoryAppender {
            topic: topic.clone(),
            line: Mutex::default(),
            turned: Condvar::new(),
            tail: Mutex::new(tail),
            _owner: owner,
        })
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, at: Option<u64>, records: &[Record]) -> Result<Outcome> {
        checked(&self.topic, records)?;
        let bytes = records.iter().map(|record| segment::HEADER + record.payload.len()).sum();
        let mut encoded = Vec::with_capacity(bytes);
        for record in records {
            // Ids count in `append` alone, also for the next process, which finds them in the segments.
            let id = if at.is_none() { record.id } else { 0 };
            segment::encode(id, &record.payload, &mut encoded);
        }
        let mut line = self.line();
        let ticket = line.next;
        line.next += 1;
        line.waiting.push_back((ticket, Job { at, records: encoded }));
        loop {
            if let Some(outcome) = line.done.remove(&ticket) {
                return outcome;
            }
            line = match line.busy {
                true => self.turned.wait(line).unwrap_or_else(PoisonError::into_inner),
                false => self.write(line),
            };
        }
    }

    /// Writes for those who wait, and tells them.
    fn write<'a>(&'a self, mut line: MutexGuard<'a, Line>) -> MutexGuard<'a, Line> {
        let (mut tickets, mut jobs, mut bytes) = (Vec::new(), Vec::<Job>::new(), 0);
        while let Some((ticket, job)) = line
            .waiting
            .pop_front_if(|(_, job)| jobs.is_empty() || bytes + job.records.len() <= GROUP_BYTES)
        {
            bytes += job.records.len();
            tickets.push(ticket);
            jobs.push(job);
        }
        line.busy = true;
        drop(line);
        let turn = Turn { appender: self, tickets };
        let outcomes = match self.tail.lock() {
            Ok(mut tail) => tail.commit(&jobs),
            Err(_) => Err(self.failed()),
        };
        let mut line = self.line();
        match outcomes {
            Ok(outcomes) => {
                line.done.extend(turn.tickets.iter().copied().zip(outcomes.into_iter().map(Ok)))
            }
            Err(error) => {
                let each = turn.tickets.iter().map(|&ticket| (ticket, Err(again(&error))));
                line.done.extend(each);
            }
        }
        drop(line);
        drop(turn);
        self.line()
    }

    fn failed(&self) -> Error {
        Error::Invalid(format!(
            "stream {}: a thread failed amid an append; start this process again",
            self.topic
        ))
    }
}

impl Appender for DirectoryAppender {
    fn append(&self, records: &[Record]) -> Result<Appended> {
        let appended = self.submit(None, records)?;
        Ok(appended.expect("only a job with an end of its own can be refused"))
    }

    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.submit(Some(end), records)
    }
}

/// A thread's turn to write. However it ends, those in line go on, and those it wrote for have an answer.
struct Turn<'a> {
    appender: &'a DirectoryAppender,
    tickets: Vec<u64>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut line = self.appender.line();
        line.busy = false;
        if std::thread::panicking() {
            let failed = self.tickets.iter().map(|&ticket| (ticket, Err(self.appender.failed())));
            line.done.extend(failed);
        }
        self.appender.turned.notify_all();
    }
}

/// The same error, for another of those whose append it failed.
fn again(error: &Error) -> Error {
    match error {
        Error::Io { path, source } => {
            let source = std::io::Error::new(source.kind(), source.to_string());
            Error::Io { path: path.clone(), source }
        }
        Error::Data { path, reason } => Error::data(path, reason.clone()),
        other => Error::Invalid(other.to_string()),
    }
}
