//! Appends to a NATS stream: many messages are in flight at once, and an append returns once all of
//! its messages are acknowledged.
//!
//! Each message names the one before it, and the server refuses it if the stream's last message is
//! another one. So if a connection loses some messages, the ones after them are refused instead of
//! stored out of order. Every message has an id, so all can be sent again until the server has
//! stored each once.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::{
    ANSWER_TIMEOUT, FETCH_MESSAGES, NatsConnection, RETRY_FOR, RETRY_PAUSE, consumer, text,
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::group_commit::{AppendJob, CommitOutcome, CommitSink};
use crate::streams::ids::RecentIds;
use crate::streams::{Appended, Record, Topic};

/// The most messages in flight.
const IN_FLIGHT_MESSAGES: usize = 1024;

/// The most bytes in flight.
const IN_FLIGHT_BYTES: usize = 8 << 20;

#[derive(Debug)]
pub(super) struct NatsWriter {
    server: Arc<NatsConnection>,
    name: String,
    ids: RecentIds,
    remembered_ids: usize,
    /// The end of the stream after the last append.
    end: u64,
    /// Distinguishes our messages without a record id from those of other processes.
    nonce: u64,
    sent: u64,
}

/// A message that the server stores once.
struct OutgoingMessage<'a> {
    id: String,
    payload: &'a [u8],
    /// Whether it was sent before: then a duplicate may be our own.
    tried: bool,
}

impl CommitSink for NatsWriter {
    type Records = Vec<Record>;

    fn prepare(records: &[Record], with_ids: bool) -> Vec<Record> {
        let prepared = records.iter().cloned();
        prepared
            .map(|record| Record { id: if with_ids { record.id } else { 0 }, ..record })
            .collect()
    }

    fn bytes(records: &Vec<Record>) -> usize {
        records.iter().map(|record| record.payload.len() + 128).sum()
    }

    fn commit(&mut self, jobs: &[AppendJob<Vec<Record>>]) -> Result<Vec<CommitOutcome>> {
        let known = self.ids.len();
        let outcomes: Result<Vec<Vec<CommitOutcome>>> = jobs
            .chunk_by(|left, right| left.expected_end.is_none() && right.expected_end.is_none())
            .map(|run| self.append(run))
            .collect();
        match &outcomes {
            Ok(_) => self.ids.settle(),
            // Some may be stored; the server detects the duplicates when they are sent again.
            Err(_) => self.ids.undo(known),
        }
        Ok(outcomes?.concat())
    }
}

impl NatsWriter {
    pub(super) fn open(
        server: Arc<NatsConnection>,
        topic: &Topic,
        remembered_ids: usize,
    ) -> Result<NatsWriter> {
        let name = server.stream(topic);
        let ids = recent_ids(&server, &name, remembered_ids)?;
        let nonce = RandomState::new().hash_one(&name);
        Ok(NatsWriter { server, name, ids, remembered_ids, end: 0, nonce, sent: 0 })
    }

    /// Appends the records of one call with an expected end, or of several calls without, as one
    /// run; every call returns the end of the run.
    fn append(&mut self, jobs: &[AppendJob<Vec<Record>>]) -> Result<Vec<CommitOutcome>> {
        let expected_end = jobs[0].expected_end;
        let mut messages = Vec::new();
        let mut job_of_message = Vec::new();
        let mut repeated = vec![0; jobs.len()];
        for (at, job) in jobs.iter().enumerate() {
            for record in &job.records {
                if !self.ids.admit(record.id) {
                    repeated[at] += 1;
                    continue;
                }
                let id = match record.id {
                    0 => self.unique(),
                    id => format!("{id:016x}"),
                };
                messages.push(OutgoingMessage { id, payload: &record.payload, tried: false });
                job_of_message.push(at);
            }
        }
        let Some(published) = self.publish(&mut messages, expected_end)? else {
            return Ok(vec![None]);
        };
        published.repeated.iter().for_each(|&at| repeated[job_of_message[at]] += 1);
        let end = match published.end {
            Some(end) if published.repeated.is_empty() => end,
            _ => self.end()?,
        };
        if messages.is_empty() && expected_end.is_some_and(|expected| expected != end) {
            return Ok(vec![None]);
        }
        self.check_tail(published.first_stored)?;
        self.end = end;
        Ok(repeated.into_iter().map(|repeated| Some(Appended { end, repeated })).collect())
    }

    /// Tells if a record was stored before the end that was acknowledged earlier: then the stream
    /// has lost its tail. The ids of the lost records must not keep them from being sent again.
    fn check_tail(&mut self, first_stored: Option<u64>) -> Result<()> {
        let Some(first) = first_stored.filter(|&first| first < self.end) else { return Ok(()) };
        tracing::error!(
            "stream {}: acknowledged records are lost: it ended at position {}, and new ones were stored from position {first} on; send those of its last minutes again",
            self.name,
            self.end
        );
        self.ids = recent_ids(&self.server, &self.name, self.remembered_ids)?;
        Ok(())
    }

    fn unique(&mut self) -> String {
        self.sent += 1;
        format!("{:016x}-{}", self.nonce, self.sent)
    }

    fn end(&self) -> Result<u64> {
        let what = format!("query the stream {}", self.name);
        let span = self.server.retry(&what, || async {
            let span = self.server.span(&self.name).await?;
            span.ok_or_else(|| "it was deleted; restart this process".to_owned())
        })?;
        Ok(span.end)
    }

    /// Sends messages until all are acknowledged. With `expected_end`, returns `None` and stores
    /// nothing if the stream does not end there; otherwise no other process's message comes between
    /// ours.
    fn publish(
        &self,
        messages: &mut [OutgoingMessage<'_>],
        expected_end: Option<u64>,
    ) -> Result<Option<PublishedRun>> {
        let mut published = PublishedRun::default();
        let until = Instant::now() + RETRY_FOR;
        let mut done = 0;
        while done < messages.len() {
            let round = self.server.block_on(self.round(messages, done, expected_end));
            for (at, ack) in round.acks.iter().enumerate() {
                published.end = published.end.max(Some(ack.sequence));
                if !ack.duplicate {
                    published.first_stored.get_or_insert(ack.sequence - 1);
                }
                if ack.duplicate && !ack.tried {
                    published.repeated.push(done + at);
                }
            }
            done += round.acks.len();
            match round.failed {
                None => {}
                Some((PublishErrorKind::WrongLastSequence, _))
                    if done == 0 && expected_end.is_some() =>
                {
                    return Ok(None);
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) if expected_end.is_none() => {
                    // Another process appended in between; our next messages follow its. Each round
                    // stores at least one message.
                    debug_assert!(!round.acks.is_empty());
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) if round.acks.is_empty() => {
                    return Err(Error::internal(format!(
                        "stream {}: another process appended between {} records that belong together; {done} of them are stored",
                        self.name,
                        messages.len()
                    )));
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) => {}
                Some((_, reason)) if Instant::now() >= until || self.server.stop.is_requested() => {
                    return Err(self
                        .server
                        .unreachable(&format!("append to the stream {}", self.name), &reason));
                }
                Some(_) => self.server.block_on(async { sleep(RETRY_PAUSE).await }),
            }
        }
        Ok(Some(published))
    }

    /// Sends as many messages from `done` on as may be in flight, and returns the acknowledgements
    /// up to the first failure.
    async fn round(
        &self,
        messages: &mut [OutgoingMessage<'_>],
        done: usize,
        expected_end: Option<u64>,
    ) -> SendRound {
        let mut in_flight = Vec::new();
        let mut bytes = 0;
        let mut round = SendRound::default();
        for at in done..messages.len().min(done + IN_FLIGHT_MESSAGES) {
            let message = PublishMessage::build().payload(messages[at].payload.to_vec().into());
            let message = match expected_end {
                Some(end) if at == 0 => message.expected_last_sequence(end),
                // Messages of other processes may come before those of this round.
                None if at == done => message,
                _ => message.expected_last_message_id(&messages[at - 1].id),
            };
            let message = message.message_id(&messages[at].id);
            let tried = std::mem::replace(&mut messages[at].tried, true);
            // Without a connection the client's queue may fill up.
            let sent =
                timeout(ANSWER_TIMEOUT, self.server.js.send_publish(self.name.clone(), message));
            match sent.await {
                Ok(Ok(ack)) => in_flight.push((ack, tried)),
                Ok(Err(error)) => round.failed = Some((error.kind(), text(error))),
                Err(_) => {
                    round.failed = Some((
                        PublishErrorKind::TimedOut,
                        "the client's queue of messages is full".into(),
                    ));
                }
            }
            bytes += messages[at].payload.len();
            if round.failed.is_some() || bytes >= IN_FLIGHT_BYTES {
                break;
            }
        }
        for (ack, tried) in in_flight {
            match ack.await {
                Ok(ack) => {
                    let (sequence, duplicate) = (ack.sequence, ack.duplicate);
                    round.acks.push(PublishAck { sequence, duplicate, tried });
                }
                Err(error) => {
                    // The later ones need no answer: they are sent again, and the server recognises
                    // those it has.
                    round.failed = Some((error.kind(), text(error)));
                    break;
                }
            }
        }
        round
    }
}

#[derive(Default)]
struct SendRound {
    acks: Vec<PublishAck>,
    failed: Option<(PublishErrorKind, String)>,
}

struct PublishAck {
    sequence: u64,
    duplicate: bool,
    tried: bool,
}

#[derive(Default)]
struct PublishedRun {
    /// The position of the first message that was not stored before.
    first_stored: Option<u64>,
    /// The highest acknowledged end of the stream.
    end: Option<u64>,
    /// Indexes of messages that were stored before.
    repeated: Vec<usize>,
}

/// Reads the newest ids of a stream from its messages' headers.
fn recent_ids(server: &NatsConnection, name: &str, most: usize) -> Result<RecentIds> {
    server.retry(&format!("read the newest ids of the stream {name}"), || async {
        let mut ids = RecentIds::new(most);
        let span = server.span(name).await?.unwrap_or(0..0);
        let mut position = span.start.max(span.end.saturating_sub(most as u64));
        if position == span.end {
            return Ok(ids);
        }
        let consumer = consumer(&server.js, name, position, true).await?;
        while position < span.end {
            let mut batch =
                consumer.fetch().max_messages(FETCH_MESSAGES).messages().await.map_err(text)?;
            let before = position;
            while let Some(message) = batch.next().await {
                let message = message.map_err(text)?;
                position = message.info().map_err(text)?.stream_sequence;
                let id = message.headers.as_ref().and_then(|headers| headers.get("Nats-Msg-Id"));
                let id = id.and_then(|id| u64::from_str_radix(id.as_str(), 16).ok());
                ids.admit(id.unwrap_or(0));
                ids.settle();
            }
            if position == before {
                return Err("no messages arrive".to_owned());
            }
        }
        Ok(ids)
    })
}
