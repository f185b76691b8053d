//! The NATS JetStream engine: topic `TOPIC` is the stream `PREFIX-TOPIC` with one subject of the
//! same name, stored in files by the server. A position is the server's sequence number minus one.
//!
//! Any number of processes on any machines may append to a stream and read it. The server decides
//! how often it syncs. With several replicas a record is acknowledged once most of them have it.

mod connection;
mod reader;
mod writer;

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context};
use hypercast_config::EngineSettings;
use hypercast_core::shutdown::Shutdown;

use self::connection::NatsConnection;
use self::reader::NatsReader;
use self::writer::NatsWriter;
use super::group_commit::GroupCommit;
use super::{Appender, Reader, StreamEngine, StreamPlace, Topic};
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
    replicas: usize,
    remembered_ids: usize,
}

impl NatsEngine {
    /// Connects to the server.
    ///
    /// # Errors
    /// The server cannot be reached, refuses the user, has no JetStream, or does not accept long
    /// enough messages; or a file that the settings name cannot be read.
    pub fn open(settings: &EngineSettings, stop: &Shutdown) -> Result<NatsEngine> {
        let prefix = &settings.nats_prefix;
        // A stream's name is the prefix, a dash and the topic. With dashes in the prefix, two
        // installations could share a stream.
        if prefix.is_empty() || !prefix.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(Error::invalid(format!(
                "engine.nats_prefix is `{prefix}`; it must consist of letters, digits and `_`"
            )));
        }
        Ok(NatsEngine {
            server: Arc::new(NatsConnection::connect(settings, stop)?),
            retain_bytes: match settings.retain_mib {
                0 => -1,
                mib => (mib << 20) as i64,
            },
            replicas: settings.nats_replicas,
            remembered_ids: settings.remembered_ids,
        })
    }

    /// Creates the stream if needed, and sets its maximum size and its replicas.
    fn ensure_stream(&self, topic: &Topic) -> Result<()> {
        let name = self.server.stream(topic);
        let config = Config {
            name: name.clone(),
            subjects: vec![name.clone()],
            storage: StorageType::File,
            num_replicas: self.replicas,
            discard: DiscardPolicy::Old,
            duplicate_window: DUPLICATE_WINDOW,
            max_bytes: self.retain_bytes,
            ..Config::default()
        };
        self.server.retry(&format!("create the stream {name}"), || async {
            let js = &self.server.js;
            let stream = js.get_or_create_stream(config.clone()).await.map_err(text)?;
            let found = &stream.cached_info().config;
            // An operator may have given the stream more of them.
            let num_replicas = found.num_replicas.max(self.replicas);
            let wanted = Config { max_bytes: self.retain_bytes, num_replicas, ..found.clone() };
            if wanted != *found {
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

    fn has_many_writers(&self) -> bool {
        true
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        Ok(Box::new(NatsReader::new(self.server.clone(), topic, place)))
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

    fn is_stopping(&self) -> bool {
        self.server.stop.is_requested()
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
