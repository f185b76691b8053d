//! The daemon: requests in, rankings out.
//!
//! [`http`] binds a process' tiers to [`routes`](self) and answers ([`api`]); a request is let in by
//! `admission`, gets its features and its ranking from [`service`] (on [`workers`]), and in between its TAEs from
//! [`fm_tier`]: an FM in this process ([`fm_batcher`]) or in another one ([`fm_remote`]).
//!
//! What serves is a [`set`] of versions, which a request uses from its beginning to its end; `follow` makes the next one
//! where the registry changes (`plan`, `loader`), and `feed` brings published weights to what serves. `shadow` lets versions see requests that were answered, `served`
//! remembers predictions until their outcomes are known, and `report` tells of all that.
//! `listen` has the connections, `linger` the bodies that nobody read and `tls` what encrypts them, `auth` says who may ask, `reload` takes over what changed in the configuration, and `ready` says
//! whether all is loaded that should serve.
//! `admin` takes pushes, and `rollouts` shows them what serves.
//! Training never happens here.

pub mod admin;
mod admission;
pub mod api;
mod auth;
pub mod client;
pub mod convert;
pub mod error;
mod events;
mod feed;
pub mod fm_batcher;
pub mod fm_remote;
pub mod fm_tier;
mod follow;
pub mod http;
pub mod ids;
mod ingest;
mod linger;
mod listen;
mod live;
mod loader;
pub mod metrics;
mod plan;
mod plugin_metrics;
mod ready;
mod recent;
pub mod recorded;
pub mod reload;
mod report;
pub mod rollout;
mod rollouts;
mod routes;
mod secret;
mod served;
pub mod service;
pub mod set;
pub mod settings;
mod shadow;
pub mod streams;
mod tls;
mod window;
pub mod workers;

pub use error::{Error, Result};
