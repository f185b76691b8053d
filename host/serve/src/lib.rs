//! The daemon: it ranks candidates over HTTP, receives events, and changes the versions that serve
//! while requests run. It does not train, does not decide what is promoted by itself other than in
//! a rollout that an operator's key has signed, and has no command line: that is the binary's.
//!
//! A request for a ranking goes this way; each box has threads of its own:
//!
//! ```text
//!  client ── http::listen ── http::auth ── http::routes       one async task a connection
//!             TLS, limits     tokens          │
//!                                             ▼
//!                               request::admission            refused here if it would be late
//!                                             │
//!          ┌──────────────────────────────────┤
//!          ▼                                  │
//!   request::service::fetch ── feature_state  │               1. features, on a worker thread
//!          │                                  │
//!          ▼                                  │
//!   fm::batcher (or fm::remote)               │               2. the FM: TAEs and main tasks
//!          │                                  │
//!          ▼                                  │
//!   request::service::rank ── versions::serving_set           3. the expert, on a worker thread
//!          │
//!          ├── answer (http::respond)
//!          ├── metrics, metrics::prediction_log               counted; waits for the outcome
//!          ├── request_log                                    a sample, for replays
//!          └── versions::shadow                               versions that only measure
//! ```
//!
//! Beside requests, [`versions`] follows the registry and published weights, [`request::streams`]
//! follows events and outcomes, and [`rollout`] brings pushed versions into service step by step.
//! Each folder's first paragraph says what is in it.

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
