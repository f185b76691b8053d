//! Runs the host's own code over a simulated clock, network and disk, breaks these, and holds what
//! comes of it against what the host promises.
//!
//! ```text
//! plan          what happens: settings, requests, faults; drawn from a seed, or read from a file
//! world         the run of a plan, in one thread
//! faults        what breaks in it, and what an operator does
//! installation  what the processes run: the host's own types
//! workload      what callers send
//! trainer       the FM's trainer, and what it must have learned from
//! logging_tier  the logging tier, and what it must have logged
//! model         the model of both, which notes what it learns
//! expert_trainer   the trainer of an expert, and what it must have learned from
//! expert_model  its expert, which notes what it learns
//! publications  weights that a trainer publishes and a daemon follows
//! versions      decisions that the processes make on one stream
//! pushes        versions of experts that teams send
//! rollouts      daemons that bring them to all users
//! rot           bits that flip in files
//! lost_decisions   decisions that the server loses
//! earlier       what a release before has left
//! host, disk    a process's clock, numbers and files, and the faults of these
//! server        a stream server and the network
//! ledger, oracles, rollout_oracles   what callers were told, and what must hold
//! work          what processes do for it, which must be in proportion
//! plant         faults that are planted to see that the oracles find them
//! shrink        the smallest plan that shows a fault
//! log, trace    what processes say, and what happened, line by line
//! ```

pub mod disk;
mod earlier;
mod expert_model;
pub mod expert_trainer;
mod faults;
pub mod host;
pub mod installation;
pub mod ledger;
mod log;
pub mod logging_tier;
mod lost_decisions;
pub mod model;
pub mod oracles;
pub mod plan;
pub mod plant;
pub mod publications;
pub mod pushes;
pub mod rollout_oracles;
pub mod rollouts;
mod rot;
pub mod server;
pub mod shrink;
pub mod trace;
pub mod trainer;
pub mod versions;
pub mod work;
pub mod workload;
pub mod world;
