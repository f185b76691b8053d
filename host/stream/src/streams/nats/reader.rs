//! Reads a NATS stream in order. The server may lose its consumer at any time, so the reader keeps
//! the position itself and compares every message with it. Each new consumer begins one message
//! earlier, which must be the one that was read last.

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
use crate::error::{Error, Result};
use crate::streams::{GapCause, READ_BYTES, Reader, StreamGap, StreamPlace, StreamRecord, Topic};

/// How long the server keeps a request that waits for the first message.
const FIRST_MESSAGE_WAIT: Duration = Duration::from_secs(5);

pub(super) struct NatsReader {
    server: Arc<NatsConnection>,
    topic: Topic,
    name: String,
    place: StreamPlace,
    consumer: Option<PullConsumer>,
    /// The first stored position when the consumer was made.
    first: u64,
    /// The position of the first message that the last consumer gave in place of the next one.
    beyond: Option<u64>,
    /// Since when the server does not answer, or says that the stream is shorter than it was.
    away: Option<Instant>,
}

/// Why a pull returned no messages.
enum PullFault {
    /// The connection or the consumer was lost; trying again may help.
    Transient(String),
    /// Messages before the one at this position did not come.
    Beyond(u64),
    /// The stream has not what it had.
    Missing(Error),
}

fn transient(error: impl Display) -> PullFault {
    PullFault::Transient(text(error))
}

/// A batch of messages under way, and how long one of them may take.
struct PulledBatch {
    messages: Batch,
    patience: Duration,
}

impl NatsReader {
    pub(super) fn new(
        server: Arc<NatsConnection>,
        topic: &Topic,
        place: StreamPlace,
    ) -> NatsReader {
        let (name, topic) = (server.stream(topic), topic.clone());
        let (consumer, first, beyond, away) = (None, 0, None, None);
        NatsReader { server, topic, name, place, consumer, first, beyond, away }
    }

    async fn wait(&mut self, most: usize, until: Instant) -> Result<Vec<StreamRecord>> {
        let mut read = Vec::new();
        loop {
            let pulled = self.pull(most.min(FETCH_MESSAGES), until, &mut read).await;
            if pulled.is_err() {
                // Messages may have been lost in transit: the next consumer begins at the last
                // received one.
                self.consumer = None;
            }
            if !read.is_empty() {
                (self.away, self.beyond) = (None, None);
                return Ok(read);
            }
            let left = until.saturating_duration_since(Instant::now());
            match pulled {
                Ok(()) => self.away = None,
                Err(fault) => {
                    if let Some(error) = self.lasting(fault) {
                        (self.away, self.beyond) = (None, None);
                        return Err(error);
                    }
                    sleep(RETRY_PAUSE.min(left)).await;
                }
            }
            if left.is_zero() {
                return Ok(read);
            }
        }
    }

    /// The error for a fault that trying again does not mend.
    fn lasting(&mut self, fault: PullFault) -> Option<Error> {
        let away = *self.away.get_or_insert_with(Instant::now);
        let lasts = away.elapsed() >= RETRY_FOR;
        match fault {
            PullFault::Transient(reason) => lasts.then(|| {
                let what = format!("read the stream {}", self.name);
                self.server.unreachable(&what, &reason)
            }),
            // Two consumers in a row found the same: it was not lost in transit.
            PullFault::Beyond(first) => (self.beyond.replace(first) == Some(first))
                .then(|| self.place.gap(&self.topic, GapCause::Deleted { first })),
            // A server of a cluster that was cut off from the others may not know the newest
            // messages until it has stepped down.
            PullFault::Missing(Error::Gap(StreamGap { cause: GapCause::Cut { .. }, .. }))
                if !lasts =>
            {
                None
            }
            PullFault::Missing(error) => Some(error),
        }
    }

    /// Reads the available messages; if there are none, waits for the first.
    async fn pull(
        &mut self,
        most: usize,
        until: Instant,
        read: &mut Vec<StreamRecord>,
    ) -> std::result::Result<(), PullFault> {
        let mut compared = 0;
        if self.consumer.is_none() {
            let span = self.server.span(&self.name).await.map_err(PullFault::Transient)?;
            let kept = span.clone().unwrap_or(0..0);
            self.place.check_span(&self.topic, &kept).map_err(PullFault::Missing)?;
            if span.is_none() {
                let left = until.saturating_duration_since(Instant::now());
                sleep(RETRY_PAUSE.min(left)).await;
                return Ok(());
            }
            let from = self.place.read_from(kept.start);
            let made = consumer(&self.server.js, &self.name, from, false).await;
            self.consumer = Some(made.map_err(PullFault::Transient)?);
            self.first = kept.start;
            compared = (self.place.position - from) as usize;
        }
        let consumer = self.consumer.as_ref().expect("it was made");
        let fetch = consumer.fetch().max_messages(most + compared).max_bytes(READ_BYTES);
        let fetched = fetch.messages().await;
        let messages = fetched.map_err(transient)?;
        self.collect(PulledBatch { messages, patience: ANSWER_TIMEOUT }, read).await?;
        let left = until.saturating_duration_since(Instant::now());
        if !read.is_empty() || left.is_zero() {
            return Ok(());
        }
        let expires = left.min(FIRST_MESSAGE_WAIT);
        let consumer = self.consumer.as_ref().expect("it was made");
        let first = consumer.batch().max_messages(1).expires(expires).messages().await;
        let messages = first.map_err(transient)?;
        let patience = expires + ANSWER_TIMEOUT;
        self.collect(PulledBatch { messages, patience }, read).await?;
        if !read.is_empty() && most > 1 {
            let consumer = self.consumer.as_ref().expect("it was made");
            let more =
                consumer.fetch().max_messages(most - 1).max_bytes(READ_BYTES).messages().await;
            let messages = more.map_err(transient)?;
            self.collect(PulledBatch { messages, patience: ANSWER_TIMEOUT }, read).await?;
        }
        Ok(())
    }

    /// Appends a batch's messages to `read` as long as they follow the position.
    async fn collect(
        &mut self,
        batch: PulledBatch,
        read: &mut Vec<StreamRecord>,
    ) -> std::result::Result<(), PullFault> {
        let PulledBatch { mut messages, patience } = batch;
        loop {
            let message = match timeout(patience, messages.next()).await {
                Ok(None) => return Ok(()),
                Ok(Some(message)) => message.map_err(transient)?,
                Err(_) => return Err(PullFault::Transient("no answer".to_owned())),
            };
            let info = message.info().map_err(transient)?;
            let position = info.stream_sequence - 1;
            let stored_ms = i64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).ok();
            let payload = &message.message.payload;
            if position > self.place.position {
                return Err(PullFault::Beyond(position));
            }
            if position == self.place.position {
                let record = StreamRecord { position, stored_ms, payload: payload.to_vec() };
                self.place = StreamPlace::after(&record);
                read.push(record);
            } else if position + 1 == self.place.position {
                let same = self.place.check_before(&self.topic, payload, self.first);
                same.map_err(PullFault::Missing)?;
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
        self.place.position
    }
}
