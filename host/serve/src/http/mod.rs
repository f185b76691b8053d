//! The HTTP side: connections, TLS, access control, routes, and how each route answers.
//!
//! `server` starts the process; `listen` accepts connections, `peers` bounds those of one machine
//! and `tls` encrypts them; `bodies` reads what requests send; `auth` lets requests in, by
//! `tokens`; `routes`, [`admin`], `ingest` and `live_page` answer them with the helpers of
//! `respond`. [`reload`] takes over a changed configuration, and `growth` a schema that has grown.
//! [`client`] is the other end: how commands and tiers call a daemon.

pub mod admin;
mod auth;
pub(crate) mod bodies;
pub mod client;
mod drain_body;
mod growth;
mod ingest;
mod listen;
mod live_page;
mod peers;
pub mod reload;
pub(crate) mod respond;
mod routes;
mod server;
mod tls;
mod tokens;

pub use server::serve;
