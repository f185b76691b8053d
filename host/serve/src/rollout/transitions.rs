//! The changes that a rollout makes in the registry. Each function takes the current registry and
//! returns changes or a refusal; none appends anything.

use hypercast_stream::registry::{
    Change, Decision, ExpertVersion, Promotion, Registry, VersionState,
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::Rollout,
};

/// Changes that build on each other.
pub(super) struct PlannedChanges {
    /// The registry after the changes.
    pub(super) registry: Registry,
    /// The changes so far.
    pub(super) changes: Vec<Change>,
}

impl PlannedChanges {
    pub(super) fn new(registry: &Registry) -> Self {
        Self { registry: registry.clone(), changes: Vec::new() }
    }

    pub(super) fn add(&mut self, changes: Vec<Change>) -> Result<()> {
        self.registry.apply(&Decision::new(changes.clone()))?;
        self.changes.extend(changes);
        Ok(())
    }

    /// Rolls an expert back until the version serves nobody, or there is no traffic split without
    /// it. Several splits may contain it, because a rollout's own steps made them.
    fn take_users(&mut self, name: &str, version: &str) -> Result<()> {
        while share(&self.registry, name, version) > 0.0 {
            let Ok(changes) = self.registry.roll_back(name) else { break };
            self.add(changes)?;
        }
        Ok(())
    }
}

/// Registers a version and makes it a shadow.
pub(super) fn shadow(registry: &Registry, expert: &ExpertVersion) -> Result<Vec<Change>> {
    let mut plan = PlannedChanges::new(registry);
    plan.add(plan.registry.register_expert(expert)?)?;
    plan.add(plan.registry.shadow_expert(&expert.name, &expert.version)?)?;
    Ok(plan.changes)
}

/// Checks before a rollout starts whether all its changes are allowed now. Returns the canary's
/// share: none if no other version of the expert serves, because nobody could serve the other
/// users.
pub(super) fn rehearse(
    registry: &Registry,
    expert: &ExpertVersion,
    share: f64,
    replace: bool,
) -> Result<Option<f64>> {
    let mut plan = PlannedChanges::new(registry);
    plan.add(shadow(registry, expert)?)?;
    let alone = registry.expert(&expert.name).is_none_or(|all| all.shares.is_empty());
    let share = (!alone && share < 1.0).then_some(share);
    plan.add(promote(&plan.registry, expert, share.unwrap_or(1.0), replace)?)?;
    Ok(share)
}

/// Lets a version serve a share of the users.
pub(super) fn promote(
    registry: &Registry,
    expert: &ExpertVersion,
    share: f64,
    replace: bool,
) -> Result<Vec<Change>> {
    let (name, version) = (expert.name.clone(), expert.version.clone());
    Ok(registry.promote_expert(&Promotion { name, version, share, replace })?)
}

/// The experts that lose surfaces if the version is promoted with `replace`.
pub(super) fn displaced(registry: &Registry, expert: &ExpertVersion) -> Vec<String> {
    let mut others: Vec<String> = expert
        .surfaces
        .iter()
        .filter_map(|surface| registry.serving(surface))
        .filter(|other| *other != expert.name)
        .map(str::to_owned)
        .collect();
    others.sort();
    others.dedup();
    others
}

/// Retires versions that served before, except for the newest `keep` of them.
pub(super) fn retire_older(registry: &Registry, name: &str, keep: usize) -> Result<Vec<Change>> {
    let Some(all) = registry.expert(name) else { return Ok(Vec::new()) };
    let mut kept: Vec<&String> = Vec::new();
    for version in all.earlier.iter().rev().flat_map(|shares| shares.keys()) {
        if all.share(version) == 0.0 && !kept.contains(&version) && kept.len() < keep {
            kept.push(version);
        }
    }
    let standby = all.versions.values().filter(|version| {
        version.state == VersionState::Active
            && all.share(&version.version) == 0.0
            && !kept.contains(&&version.version)
    });
    let mut plan = PlannedChanges::new(registry);
    for version in standby {
        plan.add(plan.registry.retire_expert(name, &version.version, false)?)?;
    }
    Ok(plan.changes)
}

/// Gives a version's users back to the versions before, and retires it.
pub(super) fn give_up(registry: &Registry, rollout: &Rollout) -> Result<Vec<Change>> {
    let (name, version) = (rollout.name(), rollout.version());
    let mut plan = PlannedChanges::new(registry);
    let Some(registered) = registry.expert_version(name, version) else { return Ok(Vec::new()) };
    if registered.state == VersionState::Retired {
        return Ok(Vec::new());
    }
    plan.take_users(name, version)?;
    plan.add(plan.registry.retire_expert(name, version, true)?)?;
    for other in &rollout.displaced {
        if plan.registry.expert(other).is_some_and(|all| all.shares.is_empty()) {
            plan.add(plan.registry.roll_back(other)?)?;
        }
    }
    Ok(plan.changes)
}

/// Gives an expert's users back to the version before its main one, which stays loaded.
pub(super) fn roll_back(registry: &Registry, name: &str) -> Result<Vec<Change>> {
    if registry.expert(name).is_none() {
        return Err(Error::refused(format!("expert {name} is not registered")));
    }
    let mut plan = PlannedChanges::new(registry);
    plan.add(plan.registry.roll_back(name)?)?;
    if let Some(main) = main_version(registry, name) {
        plan.take_users(name, &main.version)?;
    }
    Ok(plan.changes)
}

/// The version that serves most users of an expert.
pub(super) fn main_version<'a>(registry: &'a Registry, name: &str) -> Option<&'a ExpertVersion> {
    let all = registry.expert(name)?;
    let (version, _) = all.shares.iter().max_by(|a, b| a.1.total_cmp(b.1))?;
    all.versions.get(version)
}

/// The share of the users that a version serves.
pub(super) fn share(registry: &Registry, name: &str, version: &str) -> f64 {
    registry.expert(name).map_or(0.0, |all| all.share(version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{self, expert_version as expert, fm_version};
    use crate::rollout::RolloutStep;

    fn rollout(version: &str, displaced: &[&str]) -> Rollout {
        Rollout {
            step: RolloutStep::Canary,
            displaced: displaced.iter().map(|name| name.to_string()).collect(),
            ..fixtures::rollout(expert("feed", version))
        }
    }

    fn decide(registry: &mut Registry, changes: Vec<Change>) {
        registry.apply(&Decision::new(changes)).unwrap();
    }

    fn with_fm() -> Registry {
        let fm = fm_version("1.0.0");
        let mut registry = Registry::default();
        let active = Change::FmState { version: "1.0.0".into(), state: VersionState::Active };
        decide(&mut registry, vec![Change::FmRegistered { fm }, active]);
        registry
    }

    fn go(registry: &mut Registry, expert: &ExpertVersion, share: Option<f64>, replace: bool) {
        let changes = shadow(registry, expert).unwrap();
        decide(registry, changes);
        for share in share.into_iter().chain([1.0]) {
            let changes = promote(registry, expert, share, replace).unwrap();
            decide(registry, changes);
        }
    }

    #[test]
    fn what_is_given_up_answers_nobody_and_the_version_before_answers_all() {
        let mut registry = with_fm();
        assert_eq!(rehearse(&registry, &expert("feed", "1.0.0"), 0.1, false).unwrap(), None);
        go(&mut registry, &expert("feed", "1.0.0"), None, false);
        for full in [false, true] {
            let mut registry = registry.clone();
            let second = expert("feed", "2.0.0");
            assert_eq!(rehearse(&registry, &second, 0.1, false).unwrap(), Some(0.1));
            let changes = shadow(&registry, &second).unwrap();
            decide(&mut registry, changes);
            for share in [Some(0.1), full.then_some(1.0)].into_iter().flatten() {
                let changes = promote(&registry, &second, share, false).unwrap();
                decide(&mut registry, changes);
            }
            let changes = give_up(&registry, &rollout("2.0.0", &[])).unwrap();
            decide(&mut registry, changes);
            assert_eq!(share(&registry, "feed", "1.0.0"), 1.0);
            let state = registry.expert_version("feed", "2.0.0").unwrap().state;
            assert_eq!(state, VersionState::Retired);
            assert_eq!(give_up(&registry, &rollout("2.0.0", &[])).unwrap(), []);
        }
        // After a rollback by hand, the version stays loaded.
        go(&mut registry, &expert("feed", "2.0.0"), Some(0.1), false);
        let changes = roll_back(&registry, "feed").unwrap();
        decide(&mut registry, changes);
        assert_eq!(share(&registry, "feed", "1.0.0"), 1.0);
        let state = registry.expert_version("feed", "2.0.0").unwrap().state;
        assert_eq!(state, VersionState::Active);
    }

    #[test]
    fn a_displaced_expert_gets_its_place_back() {
        let mut registry = with_fm();
        go(&mut registry, &expert("old", "1.0.0"), None, false);
        let new = expert("feed", "1.0.0");
        assert!(rehearse(&registry, &new, 0.1, false).is_err());
        assert_eq!(rehearse(&registry, &new, 0.1, true).unwrap(), None);
        assert_eq!(displaced(&registry, &new), ["old"]);
        go(&mut registry, &new, None, true);
        assert_eq!(registry.serving("feed"), Some("feed"));
        let changes = give_up(&registry, &rollout("1.0.0", &["old"])).unwrap();
        decide(&mut registry, changes);
        assert_eq!(registry.serving("feed"), Some("old"));
    }

    #[test]
    fn older_versions_are_retired_and_the_last_stays_ready() {
        let mut registry = with_fm();
        for version in ["1.0.0", "1.1.0", "1.2.0", "1.3.0"] {
            go(&mut registry, &expert("feed", version), (version != "1.0.0").then_some(0.1), false);
            let changes = retire_older(&registry, "feed", 1).unwrap();
            decide(&mut registry, changes);
        }
        let state = |version| registry.expert_version("feed", version).unwrap().state;
        use VersionState::{Active, Retired};
        let states = ["1.0.0", "1.1.0", "1.2.0", "1.3.0"].map(state);
        assert_eq!(states, [Retired, Retired, Active, Active]);
        let changes = roll_back(&registry, "feed").unwrap();
        decide(&mut registry, changes);
        assert_eq!(share(&registry, "feed", "1.2.0"), 1.0);
    }
}
