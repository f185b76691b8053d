//! The daemon: requests in, rankings out.
//!
//! [`http`] takes bodies apart and answers ([`api`]), [`workers`] run what
//! blocks, [`service`] ranks: features → FM → expert network → `rank` in Wasm.
//! Training never happens here.

pub mod api;
pub mod convert;
pub mod http;
pub mod metrics;
pub mod service;
pub mod workers;
