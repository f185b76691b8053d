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

pub mod error;
pub mod fm;
pub mod http;
pub mod metrics;
pub mod request;
pub mod request_log;
pub mod rollout;
mod threads;
pub mod versions;

pub use error::{Error, Result};
pub use http::{admin, client, reload};
pub use request::{api, convert};
