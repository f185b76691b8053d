//! Rollouts: from a push to a version that serves all users, step by step, with automatic rollback.
//!
//! A push ([`frame`]) carries the signature of a trusted key ([`signature`]). [`accept`] checks it,
//! stores its files ([`repository`]) and loads it as serving would. [`service`] takes pushes and
//! commands; a `controller` advances each rollout: it replays recorded requests, registers the
//! version, lets it see requests as a shadow, then serve a share of the users, then all. [`policy`]
//! has the limits, [`stats`] what a version did. The registry alone decides which version serves
//! whom ([`hypercast_stream::registry`]); a rollout's own state is in a file (`state`), so that it
//! continues after a restart.

pub mod accept;
mod controller;
mod evaluation;
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
use hypercast_stream::registry::ExpertVersion;
use serde::{Deserialize, Serialize};

pub use crate::rollout::{
    accept::Acceptor,
    frame::Push,
    policy::{PolicyOverrides, RolloutPolicy},
    replay::{ReplayFn, ReplayInput, ReplayVerdict},
    service::{RolloutContext, RolloutService},
    serving::{MeasuredArm, MeasuredSlice, VersionLookup},
    signature::{PushManifest, SecretKey, SignedManifest},
    stats::ArmStats,
};

/// Most lines of a rollout's log; the first and the newest ones are kept.
const LOG_LINES: usize = 200;

/// The step of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutStep {
    /// Recorded requests are replayed on it.
    Replay,
    /// It sees requests after they were answered.
    Shadow,
    /// It serves a share of the users.
    Canary,
    /// It passed its step and waits for `hypercast versions promote`.
    Waiting,
    /// It serves all users and is watched for a while.
    Promoted,
    /// It was given up before it served anybody.
    Failed,
    /// It served, and was rolled back.
    RolledBack,
}

impl RolloutStep {
    /// Whether the rollout has ended without success.
    pub fn is_over(self) -> bool {
        matches!(self, RolloutStep::Failed | RolloutStep::RolledBack)
    }

    /// The step's name in JSON and in logs.
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
    /// The step at that time.
    pub step: RolloutStep,
    /// What happened, in words for people.
    pub text: String,
}

/// A rollout, as in answers and in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The version that it brings.
    pub expert: ExpertVersion,
    /// Id of the signer's key.
    pub key: String,
    /// When it was signed, milliseconds since the epoch.
    pub created_ms: i64,
    /// When the push was accepted.
    pub begun_ms: i64,
    /// The step that it is in, or at which it ended.
    pub step: RolloutStep,
    /// When the step began.
    pub since_ms: i64,
    /// Milliseconds that the step had lasted when this was saved, without the time in which no
    /// daemon looked.
    #[serde(default)]
    pub lasted_ms: u64,
    /// The version that served most users before.
    pub previous: Option<String>,
    /// Other experts whose surfaces it takes over.
    pub displaced: Vec<String>,
    /// The limits that it must keep.
    pub limits: RolloutPolicy,
    /// p99 of the version before while both served, in microseconds.
    pub before_us: Option<f64>,
    /// Whether it is no longer watched.
    pub settled: bool,
    /// Why it failed, or why it is about to be given up.
    pub cause: Option<String>,
    /// What happened in it, oldest first.
    pub log: Vec<RolloutLogLine>,
}

impl Rollout {
    /// The name of the expert, without its version.
    pub fn name(&self) -> &str {
        &self.expert.name
    }

    /// The version of the expert, a semver.
    pub fn version(&self) -> &str {
        &self.expert.version
    }

    /// The label in metrics and logs, `NAME@VERSION`.
    pub fn label(&self) -> String {
        format!("{}@{}", self.expert.name, self.expert.version)
    }

    /// Whether the controller has to advance it.
    pub fn is_active(&self) -> bool {
        !self.step.is_over() && !self.settled
    }

    /// Whether it is under way; another push of the same expert must wait then.
    pub fn is_under_way(&self) -> bool {
        matches!(
            self.step,
            RolloutStep::Replay | RolloutStep::Shadow | RolloutStep::Canary | RolloutStep::Waiting
        )
    }

    /// Changes the step, with the reason.
    pub(crate) fn go(&mut self, step: RolloutStep, text: String) {
        (self.step, self.since_ms, self.lasted_ms) = (step, now_ms(), 0);
        self.add_line(text);
    }

    /// Ends the rollout for good, with the reason.
    pub(crate) fn end(&mut self, step: RolloutStep, cause: String, text: String) {
        (self.cause, self.settled) = (Some(cause), true);
        self.go(step, text);
    }

    /// Adds a line to the log.
    pub(crate) fn add_line(&mut self, text: String) {
        tracing::info!(rollout = self.label(), step = self.step.word(), "{text}");
        if self.log.len() == LOG_LINES {
            self.log.remove(LOG_LINES / 2);
        }
        self.log.push(RolloutLogLine { at_ms: now_ms(), step: self.step, text });
    }
}
