//! Durable streams and what is in them: event records, joined examples, published weights, and
//! decisions about versions. Processes of one installation exchange everything through these
//! streams.
//!
//! Nothing here trains a model or answers a request, and nothing here speaks HTTP: `train` and
//! `serve` use this crate.
//!
//! ```text
//! streams       append and read durable streams: a directory, NATS JetStream, or memory
//! events        the records of the `events` stream, and their writer
//! join          events to examples and outcomes: a state machine (`core`) and what runs it
//! dead_letters  records that a reader could not use, and orders to try them again
//! publish       weights from a trainer to servers: snapshots and deltas
//! registry      which versions exist, and which of them answers whom: decisions in a stream
//! ```
//!
//! The way of an event: a caller's request becomes a [`events::NewEvent`], which
//! [`events::EventWriter`] appends to the stream `events`. The joiner reads it back as an
//! [`events::EventRecord`] and adds it to a pending request. Once the request's outcomes are known,
//! the joiner writes a [`join::JoinedRecord`] with features to `joined`, which trainers read, and a
//! [`join::OutcomeRecord`] without features to `outcomes`, which daemons read.
//!
//! ```text
//! NewEvent -> [events] -> EventRecord -> Joiner -+-> [joined]   -> FM trainer, logging tier
//!                                                +-> [outcomes] -> feature state of daemons
//! trainer  -> [fm-VERSION], [expert-NAME-VERSION] -> serving models
//! operator -> [versions] -> registry of every process
//! ```
//!
//! ```
//! use std::time::Duration;
//!
//! use hypercast_stream::streams::{MemoryEngine, Record, StreamEngine, Topic};
//!
//! # fn main() -> hypercast_stream::Result<()> {
//! let engine = MemoryEngine::default();
//! let record = Record { id: 7, payload: b"shown".to_vec() };
//! let appended = engine.appender(&Topic::events())?.append(&[record.clone(), record])?;
//! assert_eq!((appended.end, appended.repeated), (1, 1)); // The second one has a known id.
//!
//! let mut reader = engine.reader(&Topic::events(), 0)?;
//! let records = reader.next(10, Duration::ZERO)?;
//! assert_eq!(records[0].payload, b"shown");
//! # Ok(())
//! # }
//! ```

pub mod dead_letters;
pub mod error;
pub mod events;
pub mod join;
pub mod publish;
pub mod registry;
pub mod streams;

pub use error::{Error, Result};
