//! Reads a stream of NATS in order. The consumer on the server is a convenience
//! that may vanish at any time: the position is ours, and every message is held to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::Batch;
use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::{ANSWER, PATIENCE, PAUSE, Server, consumer, text};
use crate::engine::{READ_BYTES, Reader, Stored, Topic};
use crate::error::{Error, Result};

/// Messages asked for at once, so that the client has room for them.
const AT_ONCE: usize = 8192;

/// How long the server keeps a request that waits for the first message.
const WAITING: Duration = Duration::from_secs(5);

pub(super) struct NatsReader {
    server: Arc<Server>,
    topic: Topic,
    name: String,
    position: u64,
    consumer: Option<PullConsumer>,
    /// Since when the server does not answer.
    away: Option<Instant>,
}

/// Why there are no messages.
enum Fault {
    /// It may pass: the connection, or the consumer, was lost.
    Passing(String),
    /// Messages are missing before one that came.
    Gap,
}

impl NatsReader {
    pub(super) fn new(server: Arc<Server>, topic: &Topic, from: u64) -> NatsReader {
        let name = server.stream(topic);
        let topic = topic.clone();
        NatsReader { server, topic, name, position: from, consumer: None, away: None }
    }

    async fn wait(&mut self, most: usize, until: Instant) -> Result<Vec<Stored>> {
        let mut read = Vec::new();
        loop {
            let pulled = self.pull(most.min(AT_ONCE), until, &mut read).await;
            if pulled.is_err() {
                // Messages may have been lost on their way: the next consumer begins behind what came.
                self.consumer = None;
            }
            let left = until.saturating_duration_since(Instant::now());
            match pulled {
                _ if !read.is_empty() => {
                    self.away = None;
                    return Ok(read);
                }
                Ok(()) => self.away = None,
                Err(Fault::Gap) => self.explain().await?,
                Err(Fault::Passing(reason)) => {
                    let since = *self.away.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        let what = format!("read the stream {}", self.name);
                        return Err(self.server.unreachable(&what, &reason));
                    }
                    sleep(PAUSE.min(left)).await;
                }
            }
            if left.is_zero() {
                return Ok(read);
            }
        }
    }

    /// Reads what is there, and if that is nothing waits a while for the first.
    async fn pull(
        &mut self,
        most: usize,
        until: Instant,
        read: &mut Vec<Stored>,
    ) -> std::result::Result<(), Fault> {
        let position = &mut self.position;
        let consumer = match &self.consumer {
            Some(consumer) => consumer,
            None => {
                let Some(span) = self.server.span(&self.name).await.map_err(Fault::Passing)? else {
                    let left = until.saturating_duration_since(Instant::now());
                    sleep(PAUSE.min(left)).await;
                    return Ok(());
                };
                if *position < span.start {
                    return Err(Fault::Gap);
                }
                let made = consumer(&self.server.js, &self.name, (*position, false)).await;
                self.consumer.insert(made.map_err(Fault::Passing)?)
            }
        };
        let fetch = || consumer.fetch().max_messages(most).max_bytes(READ_BYTES).messages();
        let batch = fetch().await.map_err(|error| Fault::Passing(text(error)))?;
        collect(batch, position, ANSWER, read).await?;
        let left = until.saturating_duration_since(Instant::now());
        if !read.is_empty() || left.is_zero() {
            return Ok(());
        }
        let expires = left.min(WAITING);
        let first = consumer.batch().max_messages(1).expires(expires).messages().await;
        let first = first.map_err(|error| Fault::Passing(text(error)))?;
        collect(first, position, expires + ANSWER, read).await?;
        if !read.is_empty() && most > 1 {
            let more = consumer.fetch().max_messages(most - 1).max_bytes(READ_BYTES).messages();
            let batch = more.await.map_err(|error| Fault::Passing(text(error)))?;
            collect(batch, position, ANSWER, read).await?;
        }
        Ok(())
    }

    /// Says why messages are missing, if it is not that they were lost on their way.
    async fn explain(&self) -> Result<()> {
        match self.server.span(&self.name).await {
            Ok(Some(span)) if self.position < span.start => Err(Error::Gone {
                topic: self.topic.to_string(),
                position: self.position,
                first: span.start,
            }),
            _ => Ok(()),
        }
    }
}

/// Takes a batch's messages as long as they follow the position.
async fn collect(
    mut batch: Batch,
    position: &mut u64,
    patience: Duration,
    read: &mut Vec<Stored>,
) -> std::result::Result<(), Fault> {
    loop {
        let message = match timeout(patience, batch.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => message.map_err(|error| Fault::Passing(text(error)))?,
            Err(_) => return Err(Fault::Passing("no answer".to_owned())),
        };
        let sequence = message.info().map_err(|error| Fault::Passing(text(error)))?.stream_sequence;
        match sequence.cmp(&(*position + 1)) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Greater => return Err(Fault::Gap),
            std::cmp::Ordering::Equal => {
                let payload = message.message.payload.to_vec();
                read.push(Stored { position: *position, payload });
                *position += 1;
            }
        }
    }
}

impl Reader for NatsReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<Stored>> {
        let server = self.server.clone();
        let until = Instant::now() + wait;
        server.block_on(self.wait(most, until))
    }

    fn position(&self) -> u64 {
        self.position
    }
}
