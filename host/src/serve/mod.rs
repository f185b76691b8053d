//! The daemon: requests in, rankings out.
//!
//! [`http`] binds a process' tiers to [`routes`](self) and answers ([`api`]); a request is let in by
//! `admission`, gets its features and its ranking from [`service`] (on [`workers`]), and in between its TAEs from
//! [`fm_tier`]: an FM in this process ([`fm_batcher`]) or in another one ([`fm_remote`]).
//! Training never happens here.

mod admission;
pub mod api;
pub mod convert;
mod events;
pub mod fm_batcher;
pub mod fm_remote;
pub mod fm_tier;
pub mod http;
pub mod ids;
mod ingest;
mod live;
pub mod metrics;
mod routes;
pub mod service;
pub mod streams;
pub mod tae;
pub mod workers;
