//! Appends to a stream of NATS: many messages under way, all of them
//! acknowledged before an append returns.
//!
//! Each message names the one before it, and the server refuses it if another is the stream's last. So when some are
//! lost with a connection, those behind them are refused and not kept out of order; and because each has an
//! id, all can be sent again until the server has them once.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::{ANSWER, PATIENCE, PAUSE, Server, consumer, text};
use crate::engine::ids::Ids;
use crate::engine::line::{Line, Outcome, Sink};
use crate::engine::{Appended, Appender, Record, Topic, checked};
use crate::error::{CommonErrors as _, Error, Result};

/// Messages under way at most, and their bytes.
const UNDER_WAY: (usize, usize) = (1024, 8 << 20);

#[derive(Debug)]
pub(super) struct NatsAppender {
    topic: Topic,
    line: Line<Publisher>,
}

impl NatsAppender {
    pub(super) fn open(
        server: Arc<Server>,
        topic: &Topic,
        remembered_ids: usize,
    ) -> Result<NatsAppender> {
        let name = server.stream(topic);
        let ids = remember(&server, &name, remembered_ids)?;
        let nonce = RandomState::new().hash_one(&name);
        let publisher = Publisher { server, name, ids, nonce, sent: 0 };
        Ok(NatsAppender { topic: topic.clone(), line: Line::new(topic, publisher) })
    }

    fn submit(&self, at: Option<u64>, records: &[Record]) -> Result<Outcome> {
        checked(&self.topic, records)?;
        self.line.submit(Job { at, records: records.to_vec() })
    }
}

impl Appender for NatsAppender {
    fn append(&self, records: &[Record]) -> Result<Appended> {
        let appended = self.submit(None, records)?;
        Ok(appended.expect("only a job with an end of its own can be refused"))
    }

    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.submit(Some(end), records)
    }
}

#[derive(Debug)]
struct Job {
    at: Option<u64>,
    records: Vec<Record>,
}

#[derive(Debug)]
struct Publisher {
    server: Arc<Server>,
    name: String,
    ids: Ids,
    /// Tells our messages without ids from others'.
    nonce: u64,
    sent: u64,
}

/// A message to be kept once.
struct Message<'a> {
    id: String,
    payload: &'a [u8],
    /// Whether it went out before, so that its repetition may be our own.
    tried: bool,
}

impl Sink for Publisher {
    type Job = Job;

    fn bytes(job: &Job) -> usize {
        job.records.iter().map(|record| record.payload.len() + 128).sum()
    }

    fn commit(&mut self, jobs: &[Job]) -> Result<Vec<Outcome>> {
        let known = self.ids.len();
        let outcomes: Result<Vec<Outcome>> = jobs
            .chunk_by(|left, right| left.at.is_none() && right.at.is_none())
            .map(|run| match run {
                [job] if job.at.is_some() => Ok(vec![self.append_at(job)?]),
                run => self.append(run),
            })
            .collect::<Result<Vec<_>>>()
            .map(|outcomes| outcomes.into_iter().flatten().collect());
        match &outcomes {
            Ok(_) => self.ids.settle(),
            // Some may be kept; the server says so when they come again.
            Err(_) => self.ids.undo(known),
        }
        outcomes
    }
}

impl Publisher {
    /// Appends several calls' records as one run; each is told the end of the run.
    fn append(&mut self, jobs: &[Job]) -> Result<Vec<Outcome>> {
        let mut messages = Vec::new();
        let mut of = Vec::new();
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
                messages.push(Message { id, payload: &record.payload, tried: false });
                of.push(at);
            }
        }
        let published = self.publish(&mut messages, None)?.expect("no end was asked for");
        published.repeated.iter().for_each(|&at| repeated[of[at]] += 1);
        let end = match published.end {
            Some(end) if published.repeated.is_empty() => end,
            _ => self.end()?,
        };
        Ok(repeated.into_iter().map(|repeated| Some(Appended { end, repeated })).collect())
    }

    fn append_at(&mut self, job: &Job) -> Result<Outcome> {
        if job.records.is_empty() {
            let end = self.end()?;
            return Ok((Some(end) == job.at).then_some(Appended { end, repeated: 0 }));
        }
        let mut messages: Vec<_> = job
            .records
            .iter()
            .map(|record| Message { id: self.unique(), payload: &record.payload, tried: false })
            .collect();
        let published = self.publish(&mut messages, job.at)?;
        Ok(published.and_then(|published| published.end).map(|end| Appended { end, repeated: 0 }))
    }

    fn unique(&mut self) -> String {
        self.sent += 1;
        format!("{:016x}-{}", self.nonce, self.sent)
    }

    fn end(&self) -> Result<u64> {
        let what = format!("ask for the stream {}", self.name);
        let span = self.server.ask(&what, || async {
            let span = self.server.span(&self.name).await?;
            span.ok_or_else(|| "it was deleted; start this process again".to_owned())
        })?;
        Ok(span.end)
    }

    /// Publishes until all are acknowledged. With an end, none unless the stream ends there, and then nothing between them.
    fn publish(&self, messages: &mut [Message<'_>], at: Option<u64>) -> Result<Option<Published>> {
        let mut published = Published::default();
        let until = Instant::now() + PATIENCE;
        let mut done = 0;
        while done < messages.len() {
            let (before, rest) = messages.split_at_mut(done);
            let first = match (at, before.last()) {
                (None, _) => First::Anywhere,
                (Some(end), None) => First::At(end),
                (Some(_), Some(last)) => First::Behind(&last.id),
            };
            let round = self.server.block_on(self.round(rest, &first));
            for (at, ack) in round.acks.iter().enumerate() {
                published.end = published.end.max(Some(ack.sequence));
                if ack.duplicate && !ack.tried {
                    published.repeated.push(done + at);
                }
            }
            done += round.acks.len();
            match round.failed {
                None => {}
                Some((PublishErrorKind::WrongLastSequence, _)) if done == 0 && at.is_some() => {
                    return Ok(None);
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) if at.is_none() => {
                    // Another process appended amid ours: ours go on behind it. Each round gets at least one further.
                    debug_assert!(!round.acks.is_empty());
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) if round.acks.is_empty() => {
                    return Err(Error::invalid(format!(
                        "stream {}: another process appended amid {} records that belong together, of which {done} are kept",
                        self.name,
                        messages.len()
                    )));
                }
                Some((PublishErrorKind::WrongLastMessageId, _)) => {}
                Some((_, reason)) if Instant::now() >= until => {
                    return Err(self
                        .server
                        .unreachable(&format!("append to the stream {}", self.name), &reason));
                }
                Some(_) => self.server.block_on(async { sleep(PAUSE).await }),
            }
        }
        Ok(Some(published))
    }

    /// Sends as many as may be under way, and takes what is acknowledged up to the first that is not.
    async fn round(&self, messages: &mut [Message<'_>], first: &First<'_>) -> Round {
        let mut under_way = Vec::new();
        let mut bytes = 0;
        let mut round = Round::default();
        for at in 0..messages.len().min(UNDER_WAY.0) {
            let message = PublishMessage::build().payload(messages[at].payload.to_vec().into());
            let message = match (at, first) {
                (0, First::Anywhere) => message,
                (0, First::At(end)) => message.expected_last_sequence(*end),
                (0, First::Behind(id)) => message.expected_last_message_id(id),
                (at, _) => message.expected_last_message_id(&messages[at - 1].id),
            };
            let message = message.message_id(&messages[at].id);
            let tried = std::mem::replace(&mut messages[at].tried, true);
            // While there is no connection, the client's queue may fill up.
            let sent = timeout(ANSWER, self.server.js.send_publish(self.name.clone(), message));
            match sent.await {
                Ok(Ok(ack)) => under_way.push((ack, tried)),
                Ok(Err(error)) => round.failed = Some((error.kind(), text(error))),
                Err(_) => {
                    round.failed =
                        Some((PublishErrorKind::TimedOut, "it takes no more messages".into()));
                }
            }
            bytes += messages[at].payload.len();
            if round.failed.is_some() || bytes >= UNDER_WAY.1 {
                break;
            }
        }
        for (ack, tried) in under_way {
            match ack.await {
                Ok(ack) => {
                    let (sequence, duplicate) = (ack.sequence, ack.duplicate);
                    round.acks.push(Ack { sequence, duplicate, tried });
                }
                Err(error) => {
                    // Those behind it need no answer: they are sent again, and the server knows those that it has.
                    round.failed = Some((error.kind(), text(error)));
                    break;
                }
            }
        }
        round
    }
}

/// What the first message of a round must be behind.
enum First<'a> {
    Anywhere,
    At(u64),
    Behind(&'a str),
}

#[derive(Default)]
struct Round {
    acks: Vec<Ack>,
    failed: Option<(PublishErrorKind, String)>,
}

struct Ack {
    sequence: u64,
    duplicate: bool,
    tried: bool,
}

#[derive(Default)]
struct Published {
    /// The highest end that was acknowledged.
    end: Option<u64>,
    /// Messages that were there already.
    repeated: Vec<usize>,
}

/// The newest ids of a stream, from the headers of its messages.
fn remember(server: &Server, name: &str, most: usize) -> Result<Ids> {
    const AT_ONCE: usize = 8192;
    server.ask(&format!("read the newest ids of the stream {name}"), || async {
        let mut ids = Ids::new(most);
        let span = server.span(name).await?.unwrap_or(0..0);
        let mut position = span.start.max(span.end.saturating_sub(most as u64));
        if position == span.end {
            return Ok(ids);
        }
        let consumer = consumer(&server.js, name, (position, true)).await?;
        while position < span.end {
            let mut batch =
                consumer.fetch().max_messages(AT_ONCE).messages().await.map_err(text)?;
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
                return Err("its messages do not come".to_owned());
            }
        }
        Ok(ids)
    })
}
