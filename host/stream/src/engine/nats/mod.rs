//! The engine on NATS JetStream: a stream a topic, `PREFIX-TOPIC`, with one
//! subject, kept in files by the server. A position is the server's sequence less one.
//!
//! Any number of processes on any machines may append to a stream and read it. How often the server syncs, and
//! on how many servers a stream is, is the server's to say: whoever wants several copies makes the stream before its first
//! use, or edits it; what is chosen there stays.

mod appender;
mod reader;

use std::fmt::Display;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context, ErrorCode, context};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{sleep, timeout};

use self::appender::NatsAppender;
use self::reader::NatsReader;
use super::{Appender, Engine, MAX_RECORD_BYTES, Reader, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::EngineSettings;

/// How long a request is tried again, so that a server may be restarted meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long one answer is waited for.
const ANSWER: Duration = Duration::from_secs(3);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the server itself knows an id, so that what is sent again by another process is not kept twice. The
/// appender knows the newest ids for longer.
const DUPLICATES: Duration = Duration::from_secs(120);

/// Streams on NATS JetStream. Calls block, so they must not be made by tokio's own workers.
#[derive(Debug)]
pub struct Nats {
    server: Arc<Server>,
    retain_bytes: i64,
    remembered_ids: usize,
}

impl Nats {
    /// Connects.
    ///
    /// # Errors
    /// A server that cannot be reached, or that has no JetStream, or takes too short messages.
    pub fn open(settings: &EngineSettings) -> Result<Nats> {
        let prefix = settings.nats_prefix.clone();
        // A stream's name is the prefix, a dash and the topic: dashes before it would make two systems one.
        if prefix.is_empty() || !prefix.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(Error::invalid(format!(
                "engine.nats_prefix is `{prefix}`; it must be of letters, digits and `_`"
            )));
        }
        let server = Server::connect(&settings.nats_url, prefix)?;
        Ok(Nats {
            server: Arc::new(server),
            retain_bytes: match settings.retain_mib {
                0 => -1,
                mib => (mib << 20) as i64,
            },
            remembered_ids: settings.remembered_ids,
        })
    }

    /// Makes the stream if it is not there, and gives it the size that the settings want.
    fn provide(&self, topic: &Topic) -> Result<()> {
        let name = self.server.stream(topic);
        let config = Config {
            name: name.clone(),
            subjects: vec![name.clone()],
            storage: StorageType::File,
            num_replicas: 1,
            discard: DiscardPolicy::Old,
            duplicate_window: DUPLICATES,
            max_bytes: self.retain_bytes,
            ..Config::default()
        };
        self.server.ask(&format!("make the stream {name}"), || async {
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

impl Engine for Nats {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.provide(topic)?;
        Ok(Arc::new(NatsAppender::open(self.server.clone(), topic, self.remembered_ids)?))
    }

    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>> {
        Ok(Box::new(NatsReader::new(self.server.clone(), topic, from)))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let name = self.server.stream(topic);
        let span =
            self.server.ask(&format!("ask for the stream {name}"), || self.server.span(&name))?;
        Ok(span.unwrap_or(0..0))
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        let name = self.server.stream(topic);
        self.server.ask(&format!("trim the stream {name}"), || async {
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

/// Waits for a future, on a thread of the daemon's own runtime too, where an engine is opened and closed.
fn blocking<F: Future>(runtime: &Runtime, future: F) -> F::Output {
    match Handle::try_current() {
        Ok(_) => tokio::task::block_in_place(|| runtime.block_on(future)),
        Err(_) => runtime.block_on(future),
    }
}

/// The connection, and the runtime that drives it. It reconnects by itself.
#[derive(Debug)]
struct Server {
    /// There until it is dropped.
    runtime: Option<Runtime>,
    js: Context,
    url: String,
    prefix: String,
}

impl Server {
    fn connect(url: &str, prefix: String) -> Result<Server> {
        let cannot = |reason: String| {
            Error::unreachable(format!(
                "NATS at {url}: {reason}; check that it runs, as `nats-server -js`, and that engine.nats_url is right"
            ))
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("nats")
            .enable_all()
            .build()
            .map_err(|error| cannot(error.to_string()))?;
        let urls: Vec<String> = url.split(',').map(|url| url.trim().to_owned()).collect();
        let until = Instant::now() + PATIENCE / 3;
        let client = blocking(&runtime, async {
            loop {
                let options = async_nats::ConnectOptions::new()
                    .name("hypercast")
                    .connection_timeout(ANSWER)
                    .reconnect_delay_callback(|tries| (PAUSE / 10 * tries as u32).min(3 * PAUSE));
                match options.connect(urls.clone()).await {
                    Err(error) if Instant::now() >= until => return Err(cannot(error.to_string())),
                    Err(_) => sleep(PAUSE).await,
                    Ok(client) => return Ok(client),
                }
            }
        })?;
        let most = client.server_info().max_payload;
        if most < MAX_RECORD_BYTES + 1024 {
            return Err(cannot(format!(
                "it takes messages of {most} bytes, and {} are needed: set max_payload: 1MB in its configuration",
                MAX_RECORD_BYTES + 1024
            )));
        }
        let js = {
            let _inside = runtime.enter();
            context::ContextBuilder::new().timeout(ANSWER).build(client)
        };
        let server = Server { runtime: Some(runtime), js, url: url.to_owned(), prefix };
        let any = server.stream(&Topic::events());
        server.ask("use JetStream", || server.span(&any))?;
        Ok(server)
    }

    /// The name of a topic's stream, and of its subject.
    fn stream(&self, topic: &Topic) -> String {
        format!("{}-{topic}", self.prefix)
    }

    fn block_on<F: Future>(&self, future: F) -> F::Output {
        blocking(self.runtime.as_ref().expect("there until it is dropped"), future)
    }

    /// Asks until there is an answer or patience ends.
    fn ask<T, F>(&self, what: &str, mut request: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, String>>,
    {
        let until = Instant::now() + PATIENCE;
        self.block_on(async {
            loop {
                let failed = match timeout(2 * ANSWER, request()).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => error,
                    Err(_) => "no answer".to_owned(),
                };
                if Instant::now() >= until {
                    return Err(self.unreachable(what, &failed));
                }
                sleep(PAUSE).await;
            }
        })
    }

    /// What is kept of a stream; none if it is not there.
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
        Error::unreachable(format!(
            "NATS at {}: cannot {what}: {reason}; check that the server runs, with JetStream (`nats-server -js`) and room on \
             its disk, and that engine.nats_url is right",
            self.url
        ))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // What was appended was acknowledged; there is nothing to wait for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A consumer that gives a stream's messages once, in order, and that the server forgets by itself.
async fn consumer(
    js: &Context,
    name: &str,
    (from, headers_only): (u64, bool),
) -> std::result::Result<jetstream::consumer::PullConsumer, String> {
    let config = jetstream::consumer::pull::Config {
        deliver_policy: jetstream::consumer::DeliverPolicy::ByStartSequence {
            start_sequence: from + 1,
        },
        ack_policy: jetstream::consumer::AckPolicy::None,
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: 2 * PATIENCE,
        headers_only,
        ..Default::default()
    };
    js.create_consumer_on_stream(config, name).await.map_err(text)
}

fn text(error: impl Display) -> String {
    error.to_string()
}
