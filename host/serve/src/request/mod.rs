//! One request: its JSON bodies, their conversion into the schema's columns, the ranking itself,
//! and the events that come back.
//!
//! `admission` decides whether a request is taken, [`workers`] are the threads it runs on,
//! `candidates` and `ranking` are the columns of a request and its answer, [`convert`] and `events`
//! turn bodies into records, `caller_ids` keeps ids that are texts,
//! [`service`] ranks, `rankings` notes its answers for the joiner, and [`streams`] keeps
//! `feature_state` up to date with the outcomes that are known.

pub(crate) mod admission;
pub mod api;
pub(crate) mod caller_ids;
pub(crate) mod candidates;
pub mod convert;
pub(crate) mod events;
pub mod feature_state;
mod ids;
pub(crate) mod named_features;
pub(crate) mod ranking;
mod rankings;
pub mod service;
pub mod streams;
pub mod workers;
