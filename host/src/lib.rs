//! HyperCast's host: everything around the foundation model and the experts.
//!
//! Data flows one way: [`import`] writes a [`dataset`]; [`features`] turn its
//! events into examples; [`train`] feeds them to the FM and fills the [`logs`],
//! from which experts ([`expert`]) are trained; [`serve`] answers requests with
//! both. [`demo`] runs all of it; [`evaluate`] measures it
//! without a daemon, [`experiment`] makes the paper's tables, and [`bench`] says how fast it is. The FM itself is the crate `hypercast-fm`.

pub mod bench;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod dataset;
pub mod demo;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod experiment;
pub mod expert;
pub mod features;
pub mod import;
pub mod ingest;
pub mod join;
pub mod logs;
pub mod owner;
pub mod progress;
pub mod publish;
pub mod recorded;
pub mod rollout;
pub mod schema;
pub mod serve;
pub mod stop;
pub mod synthetic;
pub mod telemetry;
pub mod trace;
pub mod train;
pub mod versions;
