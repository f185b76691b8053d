//! Rollouts: from a push to a version that answers everybody, step by step, and back by itself where it fails.
//!
//! A push ([`frame`]) is vouched for by a key that the operator trusts ([`signature`]); [`accept`] checks it, keeps its
//! files ([`repository`]) and loads it as serving would. The daemon's side of it is `desk`; one thread (`driver`) takes it along: recorded requests are
//! replayed, it is registered, sees requests as a shadow, answers a share of the users, and then all. What it must stand is
//! in [`limits`], what it did in [`tally`], whether it predicts well enough in `evaluate`. Who answers whom is decided
//! in the registry alone ([`hypercast_stream::versions`]); where a rollout stands is in a file (`state`), so that it goes on after a restart.

pub mod accept;
mod controller;
pub mod frame;
mod import_config;
pub mod policy;
mod replay;
pub mod repository;
pub mod service;
pub(crate) mod serving;
pub mod signature;
mod state;
pub mod stats;
mod transitions;

use hypercast_core::clock::now_ms;
use hypercast_stream::versions::ExpertVersion;
use serde::{Deserialize, Serialize};

pub use crate::rollout::{
    accept::{Acceptor, PushTarget},
    frame::Push,
    policy::{PolicyOverrides, RolloutPolicy},
    service::{RolloutContext, RolloutService},
    signature::{PushManifest, SecretKey, SignedManifest},
    stats::ArmStats,
};

/// Lines of a rollout's log that are kept; the first ones and the newest ones stay.
const LOG_LINES: usize = 200;

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutStep {
    /// Recorded requests are run through it.
    Replay,
    /// It sees requests after they were answered.
    Shadow,
    /// It answers a share of the users.
    Canary,
    /// It has stood its step, and waits for `hypercast versions promote`.
    Waiting,
    /// It answers everybody, and is watched for a while.
    Promoted,
    /// It was given up before it answered anybody.
    Failed,
    /// It answered, and its users were given back.
    RolledBack,
}

impl RolloutStep {
    /// Whether nothing follows by itself.
    pub fn is_over(self) -> bool {
        matches!(self, RolloutStep::Failed | RolloutStep::RolledBack)
    }

    /// In words.
    pub fn word(self) -> &'static str {
        match self {
            RolloutStep::Replay => "replay",
            RolloutStep::Shadow => "shadow",
            RolloutStep::Canary => "canary",
            RolloutStep::Waiting => "waiting",
            RolloutStep::Promoted => "promoted",
            RolloutStep::Failed => "failed",
            RolloutStep::RolledBack => "rolled-back",
        }
    }
}

/// A line of a rollout's log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutLogLine {
    /// When, milliseconds since the epoch.
    pub at_ms: i64,
    /// The step.
    pub step: RolloutStep,
    /// What happened.
    pub text: String,
}

/// A rollout, as it is told and as its file has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// What it brings.
    pub expert: ExpertVersion,
    /// The signer's key, by its id.
    pub key: String,
    /// When it was signed, milliseconds since the epoch.
    pub created_ms: i64,
    /// When it was taken.
    pub begun_ms: i64,
    /// Where it stands.
    pub step: RolloutStep,
    /// Since when.
    pub since_ms: i64,
    /// The version that answered most users before.
    pub previous: Option<String>,
    /// Other experts that lost their place to it.
    pub displaced: Vec<String>,
    /// What it must stand.
    pub limits: RolloutPolicy,
    /// p99 of the version before while both answered, in microseconds.
    pub before_us: Option<f64>,
    /// Whether it is not watched any more.
    pub settled: bool,
    /// Why it was given up, or what it waits for.
    pub cause: Option<String>,
    /// What happened.
    pub log: Vec<RolloutLogLine>,
}

impl Rollout {
    /// The expert's name.
    pub fn name(&self) -> &str {
        &self.expert.name
    }

    /// The version.
    pub fn version(&self) -> &str {
        &self.expert.version
    }

    /// `NAME@VERSION`.
    pub fn label(&self) -> String {
        format!("{}@{}", self.expert.name, self.expert.version)
    }

    /// Whether the driver has something to do with it.
    pub fn is_active(&self) -> bool {
        !self.step.is_over() && !self.settled
    }

    /// Whether it is on its way: another push of the name has to wait.
    pub fn is_under_way(&self) -> bool {
        matches!(
            self.step,
            RolloutStep::Replay | RolloutStep::Shadow | RolloutStep::Canary | RolloutStep::Waiting
        )
    }

    /// Goes to a step, with the reason.
    pub(crate) fn go(&mut self, step: RolloutStep, text: String) {
        (self.step, self.since_ms) = (step, now_ms());
        self.add_line(text);
    }

    /// Ends the rollout for good, with the reason.
    pub(crate) fn end(&mut self, step: RolloutStep, cause: String, text: String) {
        (self.cause, self.settled) = (Some(cause), true);
        self.go(step, text);
    }

    /// Adds a line.
    pub(crate) fn add_line(&mut self, text: String) {
        tracing::info!(rollout = self.label(), step = self.step.word(), "{text}");
        if self.log.len() == LOG_LINES {
            self.log.remove(LOG_LINES / 2);
        }
        self.log.push(RolloutLogLine { at_ms: now_ms(), step: self.step, text });
    }
}
