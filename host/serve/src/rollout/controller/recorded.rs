//! Begins the rollouts that a push recorded: at once, or later if the process ended in between or
//! something failed. Until a rollout begins, what its push was accepted for may change; then it is
//! given up, and its history says why.

use std::time::Duration;

use hypercast_core::{
    clock::{instant, now_ms},
    error::ErrorKind,
};
use hypercast_stream::registry::Change;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{
        Rollout, RolloutStep, controller::RolloutController, import_config,
        repository::PendingRollout, transitions,
    },
    threads::lock,
};

/// Time between two attempts to begin recorded rollouts.
const BEGIN_AGAIN: Duration = Duration::from_secs(5);

impl RolloutController {
    /// Registers and promotes what the configuration serves, unless something was promoted since.
    fn import(&mut self, changes: &[Change]) -> Result<()> {
        let imported = self.decide(|registry| {
            let due = import_config::is_due(registry);
            Ok(if due { changes.to_vec() } else { Vec::new() })
        })?;
        if imported {
            tracing::warn!(
                "what the configuration serves is registered and promoted: from now on the registry decides what serves, and `hypercast versions` changes it"
            );
        }
        Ok(())
    }

    /// Begins the rollouts that were recorded with their push and have no file yet: the process
    /// ended in between, or something failed. What fails is tried again after a pause.
    pub(in crate::rollout) fn begin_recorded(&mut self) -> Result<()> {
        self.begin_at = Some(instant() + BEGIN_AGAIN);
        let acceptor = self.context.acceptor.clone();
        let recorded = acceptor.repository.pending()?;
        if !recorded.is_empty() {
            // Another daemon begins them, unless it is about to end.
            acceptor.repository.own()?;
        }
        let mut outcome = Ok(());
        for pending in recorded {
            let begun = if self.has_begun(&pending.rollout) {
                acceptor.repository.begun(&pending.rollout)
            } else {
                self.begin(&pending)
            };
            outcome = outcome.and(begun);
        }
        if outcome.is_ok() {
            self.begin_at = None;
        }
        outcome
    }

    /// Whether a recorded rollout has a file of its own, which is not noted yet.
    fn has_begun(&self, rollout: &Rollout) -> bool {
        let key = (rollout.name().to_owned(), rollout.version().to_owned());
        lock(&self.all).get(&key).is_some_and(|known| known.created_ms == rollout.created_ms)
    }

    /// Begins a recorded rollout. A refusal gives it up; whatever else fails is tried again.
    pub(super) fn begin(&mut self, pending: &PendingRollout) -> Result<()> {
        self.begin_at.get_or_insert(instant() + BEGIN_AGAIN);
        self.catch_up()?;
        let begun = self.begin_if_valid(pending);
        match &begun {
            Ok(()) => self.context.acceptor.repository.begun(&pending.rollout)?,
            Err(error) if error.kind() == ErrorKind::Refused => {
                self.cancel(pending, error.to_string())?;
            }
            Err(_) => {}
        }
        begun
    }

    /// Begins a recorded rollout, unless what its push was accepted for is no longer so.
    fn begin_if_valid(&mut self, pending: &PendingRollout) -> Result<()> {
        let PendingRollout { rollout, adoption, expires_ms } = pending;
        if let Some(expired) = expires_ms.filter(|expires_ms| *expires_ms <= now_ms()) {
            return Err(Error::refused(format!(
                "the signature expired at {expired} (milliseconds since 1970), before the rollout began; sign it again"
            )));
        }
        self.import(adoption)?;
        let serving = transitions::main_version(self.follower.registry(), rollout.name());
        let serving = serving.map(|serving| serving.version.as_str());
        if serving != rollout.previous.as_deref() {
            let or_none = |version: Option<&str>| version.unwrap_or("no version").to_owned();
            return Err(Error::refused(format!(
                "{} serves now, and the push was accepted while {} did; sign it again to replace what serves",
                or_none(serving),
                or_none(rollout.previous.as_deref())
            )));
        }
        self.replace(rollout)
    }

    /// Ends the recorded rollout of an expert, which would replace what serves as soon as it can
    /// begin; returns which, in words.
    pub(super) fn cancel_recorded(&mut self, name: &str) -> Result<Option<String>> {
        let acceptor = self.context.acceptor.clone();
        let recorded = acceptor.repository.pending()?;
        let is_own = |pending: &PendingRollout| {
            pending.rollout.name() == name && !self.has_begun(&pending.rollout)
        };
        let Some(pending) = recorded.into_iter().find(is_own) else { return Ok(None) };
        acceptor.repository.own()?;
        self.cancel(&pending, "asked to".into())?;
        Ok(Some(format!("the rollout of {} (not begun)", pending.rollout.label())))
    }

    /// Ends a recorded rollout that has not begun. Its history says why.
    fn cancel(&mut self, pending: &PendingRollout, cause: String) -> Result<()> {
        let mut rollout = pending.rollout.clone();
        let text = format!("given up before it began: {cause}");
        rollout.end(RolloutStep::Failed, cause, text);
        self.save(rollout)?;
        self.context.acceptor.repository.begun(&pending.rollout)
    }

    fn replace(&mut self, rollout: &Rollout) -> Result<()> {
        // The new version replaces the promoted one, which need not be watched any longer.
        let watched = self
            .active()
            .into_iter()
            .filter(|other| other.name() == rollout.name() && other.step == RolloutStep::Promoted);
        for mut other in watched {
            other.settled = true;
            other.add_line(format!("no longer watched: {} was pushed", rollout.version()));
            self.save(other)?;
        }
        self.end_step(&rollout.label());
        self.save(rollout.clone())
    }
}
