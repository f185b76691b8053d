//! Reads a NATS stream in order. The server may lose its consumer at any time, so the reader keeps
//! the position itself and compares every message with it.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::Batch;
use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::{
    ANSWER_TIMEOUT, FETCH_MESSAGES, NatsConnection, RETRY_FOR, RETRY_PAUSE, consumer, text,
};
use crate::error::Result;
use crate::streams::{READ_BYTES, Reader, StreamRecord, Topic, gone};

/// How long the server keeps a request that waits for the first message.
const FIRST_MESSAGE_WAIT: Duration = Duration::from_secs(5);

pub(super) struct NatsReader {
    server: Arc<NatsConnection>,
    topic: Topic,
    name: String,
    position: u64,
    consumer: Option<PullConsumer>,
    /// Since when the server does not answer.
    away: Option<Instant>,
}

/// Why a pull returned no messages.
enum PullFault {
    /// The connection or the consumer was lost; trying again may help.
    Transient(String),
    /// Messages are missing before the received one.
    Gap,
}

fn transient(error: impl Display) -> PullFault {
    PullFault::Transient(text(error))
}

impl NatsReader {
    pub(super) fn new(server: Arc<NatsConnection>, topic: &Topic, from: u64) -> NatsReader {
        let name = server.stream(topic);
        let topic = topic.clone();
        NatsReader { server, topic, name, position: from, consumer: None, away: None }
    }

    async fn wait(&mut self, most: usize, until: Instant) -> Result<Vec<StreamRecord>> {
        let mut read = Vec::new();
        loop {
            let pulled = self.pull(most.min(FETCH_MESSAGES), until, &mut read).await;
            if pulled.is_err() {
                // Messages may have been lost in transit: the next consumer begins after the last
                // received one.
                self.consumer = None;
            }
            let left = until.saturating_duration_since(Instant::now());
            match pulled {
                _ if !read.is_empty() => {
                    self.away = None;
                    return Ok(read);
                }
                Ok(()) => self.away = None,
                // Messages are missing because they were deleted, or were lost in transit.
                Err(PullFault::Gap) => {
                    if let Ok(Some(span)) = self.server.span(&self.name).await
                        && self.position < span.start
                    {
                        return Err(gone(&self.topic, self.position, span.start));
                    }
                }
                Err(PullFault::Transient(reason)) => {
                    let since = *self.away.get_or_insert_with(Instant::now);
                    if since.elapsed() > RETRY_FOR {
                        let what = format!("read the stream {}", self.name);
                        return Err(self.server.unreachable(&what, &reason));
                    }
                    sleep(RETRY_PAUSE.min(left)).await;
                }
            }
            if left.is_zero() {
                return Ok(read);
            }
        }
    }

    /// Reads the available messages; if there are none, waits for the first.
    async fn pull(
        &mut self,
        most: usize,
        until: Instant,
        read: &mut Vec<StreamRecord>,
    ) -> std::result::Result<(), PullFault> {
        if self.consumer.is_none() {
            let Some(span) = self.server.span(&self.name).await.map_err(PullFault::Transient)?
            else {
                let left = until.saturating_duration_since(Instant::now());
                sleep(RETRY_PAUSE.min(left)).await;
                return Ok(());
            };
            if self.position < span.start {
                return Err(PullFault::Gap);
            }
        }
        let consumer = match &mut self.consumer {
            Some(consumer) => consumer,
            none => {
                let made = consumer(&self.server.js, &self.name, self.position, false).await;
                none.insert(made.map_err(PullFault::Transient)?)
            }
        };
        let position = &mut self.position;
        let fetch = |count| consumer.fetch().max_messages(count).max_bytes(READ_BYTES).messages();
        collect(fetch(most).await.map_err(transient)?, position, ANSWER_TIMEOUT, read).await?;
        let left = until.saturating_duration_since(Instant::now());
        if !read.is_empty() || left.is_zero() {
            return Ok(());
        }
        let expires = left.min(FIRST_MESSAGE_WAIT);
        let first = consumer.batch().max_messages(1).expires(expires).messages().await;
        collect(first.map_err(transient)?, position, expires + ANSWER_TIMEOUT, read).await?;
        if !read.is_empty() && most > 1 {
            let more = fetch(most - 1).await.map_err(transient)?;
            collect(more, position, ANSWER_TIMEOUT, read).await?;
        }
        Ok(())
    }
}

/// Appends a batch's messages to `read` as long as they follow the position.
async fn collect(
    mut batch: Batch,
    position: &mut u64,
    patience: Duration,
    read: &mut Vec<StreamRecord>,
) -> std::result::Result<(), PullFault> {
    loop {
        let message = match timeout(patience, batch.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => message.map_err(transient)?,
            Err(_) => return Err(PullFault::Transient("no answer".to_owned())),
        };
        let info = message.info().map_err(transient)?;
        let stored_ms = i64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).ok();
        match info.stream_sequence.cmp(&(*position + 1)) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Greater => return Err(PullFault::Gap),
            std::cmp::Ordering::Equal => {
                let payload = message.message.payload.to_vec();
                read.push(StreamRecord { position: *position, stored_ms, payload });
                *position += 1;
            }
        }
    }
}

impl Reader for NatsReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let server = self.server.clone();
        let until = Instant::now() + wait;
        server.block_on(self.wait(most, until))
    }

    fn position(&self) -> u64 {
        self.position
    }
}
