//! The NATS JetStream engine: topic `TOPIC` is the stream `PREFIX-TOPIC` with one subject of the
//! same name, stored in files by the server. A position is the server's sequence number minus one.
//!
//! Any number of processes on any machines may append to a stream and read it. The server decides
//! how often it syncs and how many replicas a stream has: to have several replicas, create the
//! stream before its first use, or edit it. The engine does not change these settings.

mod reader;
mod writer;

use std::fmt::Display;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context, ErrorCode, context};
use hypercast_config::EngineSettings;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{sleep, timeout};

use self::reader::NatsReader;
use self::writer::NatsWriter;
use super::group_commit::GroupCommit;
use super::{Appender, MAX_RECORD_BYTES, Reader, StreamEngine, Topic};
use crate::error::{CommonErrors as _, Error, Result};

/// How long a failed request is repeated, so that a server may restart meanwhile.
const RETRY_FOR: Duration = Duration::from_secs(30);

/// How long to wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// The pause between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long the server itself detects duplicate ids, so that a record that another process sends
/// again is not stored twice. The appender remembers the newest ids for longer.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// Messages requested at once, so that the client has room for them.
const FETCH_MESSAGES: usize = 8192;

/// Streams on NATS JetStream. Calls block, so do not make them on a tokio worker thread.
#[derive(Debug)]
pub struct NatsEngine {
    server: Arc<NatsConnection>,
    retain_bytes: i64,
    remembered_ids: usize,
}

impl NatsEngine {
    /// Connects to the server.
    ///
    /// # Errors
    /// The server cannot be reached, has no JetStream, or does not accept long enough messages.
    pub fn open(settings: &EngineSettings) -> Result<NatsEngine> {
        let prefix = settings.nats_prefix.clone();
        // A stream's name is the prefix, a dash and the topic. With dashes in the prefix, two
        // installations could share a stream.
        if prefix.is_empty() || !prefix.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(Error::invalid(format!(
                "engine.nats_prefix is `{prefix}`; it must consist of letters, digits and `_`"
            )));
        }
        let server = NatsConnection::connect(&settings.nats_url, prefix)?;
        Ok(NatsEngine {
            server: Arc::new(server),
            retain_bytes: match settings.retain_mib {
                0 => -1,
                mib => (mib << 20) as i64,
            },
            remembered_ids: settings.remembered_ids,
        })
    }

    /// Creates the stream if needed, and sets its maximum size.
    fn ensure_stream(&self, topic: &Topic) -> Result<()> {
        let name = self.server.stream(topic);
        let config = Config {
            name: name.clone(),
            subjects: vec![name.clone()],
            storage: StorageType::File,
            num_replicas: 1,
            discard: DiscardPolicy::Old,
            duplicate_window: DUPLICATE_WINDOW,
            max_bytes: self.retain_bytes,
            ..Config::default()
        };
        self.server.retry(&format!("create the stream {name}"), || async {
            let js = &self.server.js;
            let stream = js.get_or_create_stream(config.clone()).await.map_err(text)?;
            let found = &stream.cached_info().config;
            if found.max_bytes != self.retain_bytes {
                let wanted = Config { max_bytes: self.retain_bytes, ..found.clone() };
                js.update_stream(wanted).await.map_err(text)?;
            }
            Ok(())
        })
    }
}

impl StreamEngine for NatsEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.ensure_stream(topic)?;
        let writer = NatsWriter::open(self.server.clone(), topic, self.remembered_ids)?;
        Ok(Arc::new(GroupCommit::new(topic, writer)))
    }

    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>> {
        Ok(Box::new(NatsReader::new(self.server.clone(), topic, from)))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let name = self.server.stream(topic);
        let span =
            self.server.retry(&format!("query the stream {name}"), || self.server.span(&name))?;
        Ok(span.unwrap_or(0..0))
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        let name = self.server.stream(topic);
        self.server.retry(&format!("trim the stream {name}"), || async {
            let Some(span) = self.server.span(&name).await? else { return Ok(()) };
            if before <= span.start {
                return Ok(());
            }
            let stream = self.server.js.get_stream_no_info(&name).await.map_err(text)?;
            let first_kept = before.min(span.end) + 1;
            stream.purge().sequence(first_kept).await.map_err(text)?;
            Ok(())
        })
    }
}

/// Waits for a future, even on a thread of the daemon's own runtime, where engines are opened and
/// closed.
fn blocking<F: Future>(runtime: &Runtime, future: F) -> F::Output {
    match Handle::try_current() {
        Ok(_) => tokio::task::block_in_place(|| runtime.block_on(future)),
        Err(_) => runtime.block_on(future),
    }
}

/// A connection and the runtime that drives it. The client reconnects by itself.
#[derive(Debug)]
struct NatsConnection {
    /// `Some` until this is dropped.
    runtime: Option<Runtime>,
    js: Context,
    url: String,
    prefix: String,
}

impl NatsConnection {
    fn connect(url: &str, prefix: String) -> Result<NatsConnection> {
        let cannot = |reason: String| unreachable(url, &reason);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("nats")
            .enable_all()
            .build()
            .map_err(|error| cannot(error.to_string()))?;
        let urls: Vec<String> = url.split(',').map(|url| url.trim().to_owned()).collect();
        let until = Instant::now() + RETRY_FOR / 3;
        let client = blocking(&runtime, async {
            loop {
                let options = async_nats::ConnectOptions::new()
                    .name("hypercast")
                    .connection_timeout(ANSWER_TIMEOUT)
                    .reconnect_delay_callback(|tries| {
                        (RETRY_PAUSE / 10 * tries as u32).min(3 * RETRY_PAUSE)
                    });
                match options.connect(urls.clone()).await {
                    Err(error) if Instant::now() >= until => return Err(cannot(error.to_string())),
                    Err(_) => sleep(RETRY_PAUSE).await,
                    Ok(client) => return Ok(client),
                }
            }
        })?;
        let most = client.server_info().max_payload;
        if most < MAX_RECORD_BYTES + 1024 {
            return Err(cannot(format!(
                "its longest message is {most} bytes, and {} are needed; set max_payload: 1MB in its \
                 configuration",
                MAX_RECORD_BYTES + 1024
            )));
        }
        let js = {
            let _inside = runtime.enter();
            context::ContextBuilder::new().timeout(ANSWER_TIMEOUT).build(client)
        };
        let server = NatsConnection { runtime: Some(runtime), js, url: url.to_owned(), prefix };
        let any = server.stream(&Topic::events());
        server.retry("use JetStream", || server.span(&any))?;
        Ok(server)
    }

    /// The name of a topic's stream and of its subject.
    fn stream(&self, topic: &Topic) -> String {
        format!("{}-{topic}", self.prefix)
    }

    fn block_on<F: Future>(&self, future: F) -> F::Output {
        blocking(self.runtime.as_ref().expect("there until it is dropped"), future)
    }

    /// Repeats a request until it succeeds or [`RETRY_FOR`] has passed. `what` completes "cannot
    /// ...".
    fn retry<T, F>(&self, what: &str, mut request: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, String>>,
    {
        let until = Instant::now() + RETRY_FOR;
        self.block_on(async {
            loop {
                let failed = match timeout(2 * ANSWER_TIMEOUT, request()).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => error,
                    Err(_) => "no answer".to_owned(),
                };
                if Instant::now() >= until {
                    return Err(self.unreachable(what, &failed));
                }
                sleep(RETRY_PAUSE).await;
            }
        })
    }

    /// The stored positions of a stream; `None` if it does not exist.
    async fn span(&self, name: &str) -> std::result::Result<Option<Range<u64>>, String> {
        let stream = match self.js.get_stream(name).await {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                context::GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    return Ok(None);
                }
                _ => return Err(text(error)),
            },
        };
        let state = &stream.cached_info().state;
        let first = match state.messages {
            0 => state.last_sequence,
            _ => state.first_sequence - 1,
        };
        Ok(Some(first..state.last_sequence))
    }

    fn unreachable(&self, what: &str, reason: &str) -> Error {
        unreachable(&self.url, &format!("cannot {what}: {reason}"))
    }
}

fn unreachable(url: &str, reason: &str) -> Error {
    Error::unreachable(format!(
        "NATS at {url}: {reason}; check that the server runs with JetStream (`nats-server -js`), that its disk has room, and that engine.nats_url is right"
    ))
}

impl Drop for NatsConnection {
    fn drop(&mut self) {
        // Every append has been acknowledged, so there is nothing to wait for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Creates a consumer that delivers a stream's messages from a position on once, in order, and that
/// the server removes when it is unused.
async fn consumer(
    js: &Context,
    name: &str,
    position: u64,
    headers_only: bool,
) -> std::result::Result<jetstream::consumer::PullConsumer, String> {
    let config = jetstream::consumer::pull::Config {
        deliver_policy: jetstream::consumer::DeliverPolicy::ByStartSequence {
            start_sequence: position + 1,
        },
        ack_policy: jetstream::consumer::AckPolicy::None,
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: 2 * RETRY_FOR,
        headers_only,
        ..Default::default()
    };
    js.create_consumer_on_stream(config, name).await.map_err(text)
}

fn text(error: impl Display) -> String {
    error.to_string()
}
