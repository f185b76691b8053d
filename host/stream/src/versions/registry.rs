//! The registry's state: the sum of its decisions. It applies what was decided
//! and answers questions; what may be decided is in `rules`.

use std::{cmp::Ordering, collections::BTreeMap};

use serde::Serialize;

use super::{Change, Decision, ExpertVersion, FmVersion, Shares, VersionState};
use crate::error::{CommonErrors as _, Error, Result};

/// Earlier ways to share an expert's users that are remembered for going back.
const REMEMBERED: usize = 32;

/// Everything that is registered.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Registry {
    fms: BTreeMap<String, FmVersion>,
    experts: BTreeMap<String, ExpertVersions>,
}

/// The versions of an expert.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ExpertVersions {
    /// By version.
    pub versions: BTreeMap<String, ExpertVersion>,
    /// Who answers now.
    pub shares: Shares,
    /// Who answered before, the last one last; only what can still be gone back to.
    pub earlier: Vec<Shares>,
}

impl ExpertVersions {
    /// Versions in the order of semver.
    pub fn in_order(&self) -> Vec<&ExpertVersion> {
        let mut versions: Vec<&ExpertVersion> = self.versions.values().collect();
        versions.sort_by(|a, b| semver_order(&a.version, &b.version));
        versions
    }

    /// The share of the users that a version answers.
    pub fn share(&self, version: &str) -> f64 {
        self.shares.get(version).copied().unwrap_or(0.0)
    }
}

impl Registry {
    /// Whether nothing was ever registered: then the configuration alone says what serves.
    pub fn is_empty(&self) -> bool {
        self.fms.is_empty() && self.experts.is_empty()
    }

    /// An FM version.
    pub fn fm(&self, version: &str) -> Option<&FmVersion> {
        self.fms.get(version)
    }

    /// FM versions in the order of semver.
    pub fn fms(&self) -> Vec<&FmVersion> {
        let mut fms: Vec<&FmVersion> = self.fms.values().collect();
        fms.sort_by(|a, b| semver_order(&a.version, &b.version));
        fms
    }

    /// FM versions whose TAEs are computed: active ones and shadows, in the order of semver.
    pub fn live_fms(&self) -> Vec<&FmVersion> {
        let mut fms = self.fms();
        fms.retain(|fm| matches!(fm.state, VersionState::Active | VersionState::Shadow));
        fms
    }

    /// Whether the configured FM is in use beside what is registered: as long as the configured experts are, since none
    /// was promoted here, or no FM version is active.
    pub fn leaves_the_configured_fm(&self) -> bool {
        !self.has_promoted() || self.newest_fm().is_none()
    }

    /// Whether any expert was ever promoted: then the registry says which experts serve, and not the configuration.
    pub fn has_promoted(&self) -> bool {
        let used = |state| matches!(state, VersionState::Active | VersionState::Retired);
        let mut versions = self.experts.values().flat_map(|expert| expert.versions.values());
        versions.any(|version| used(version.state))
    }

    /// The newest active FM version: it answers where no expert does.
    pub fn newest_fm(&self) -> Option<&FmVersion> {
        self.fms().into_iter().rfind(|fm| fm.state == VersionState::Active)
    }

    /// An expert with its versions.
    pub fn expert(&self, name: &str) -> Option<&ExpertVersions> {
        self.experts.get(name)
    }

    /// An expert's version.
    pub fn expert_version(&self, name: &str, version: &str) -> Option<&ExpertVersion> {
        self.experts.get(name)?.versions.get(version)
    }

    /// Experts by name.
    pub fn experts(&self) -> impl Iterator<Item = (&str, &ExpertVersions)> {
        self.experts.iter().map(|(name, expert)| (name.as_str(), expert))
    }

    /// The experts' versions that are not retired and learn or serve with an FM version.
    pub fn pins(&self, fm: &str) -> Vec<&ExpertVersion> {
        self.experts
            .values()
            .flat_map(ExpertVersions::in_order)
            .filter(|expert| expert.fm == fm && expert.state != VersionState::Retired)
            .collect()
    }

    /// The name of the expert that answers on a surface.
    pub fn serving(&self, surface: &str) -> Option<&str> {
        let serves = |expert: &ExpertVersions| {
            let mut versions = expert.shares.keys().filter_map(|at| expert.versions.get(at));
            versions.any(|version| version.surfaces.iter().any(|own| own == surface))
        };
        self.experts().find(|(_, expert)| serves(expert)).map(|(name, _)| name)
    }

    /// Adds a decision.
    ///
    /// # Errors
    /// One that speaks of what is not there; the registry is then as it was.
    pub fn apply(&mut self, decision: &Decision) -> Result<()> {
        // All of it is looked at before any of it is done: a copy would cost more the more versions there ever were.
        for (at, change) in decision.changes.iter().enumerate() {
            self.speaks_of_known(change, &decision.changes[..at])?;
        }
        decision.changes.iter().try_for_each(|change| self.change(change))
    }

    /// Whether what a change is about is registered, or is by the changes before it.
    fn speaks_of_known(&self, change: &Change, before: &[Change]) -> Result<()> {
        let registers = |name: &str, version: Option<&str>| {
            before.iter().any(|change| match change {
                Change::ExpertRegistered { expert } => {
                    expert.name == name && version.is_none_or(|version| expert.version == version)
                }
                _ => false,
            })
        };
        let registers_fm = |version: &str| {
            let of = |change: &Change| matches!(change, Change::FmRegistered { fm } if fm.version == version);
            before.iter().any(of)
        };
        match change {
            Change::FmRegistered { .. } | Change::ExpertRegistered { .. } => Ok(()),
            Change::FmState { version, .. } => {
                let known = self.fms.contains_key(version) || registers_fm(version);
                known.then_some(()).ok_or_else(|| unknown("FM", version))
            }
            Change::ExpertState { name, version, .. } | Change::Pinned { name, version, .. } => {
                let known =
                    self.expert_version(name, version).is_some() || registers(name, Some(version));
                known.then_some(()).ok_or_else(|| unknown("expert", &format!("{name} {version}")))
            }
            Change::Traffic { name, .. } | Change::RolledBack { name, .. } => {
                let known = self.experts.contains_key(name) || registers(name, None);
                known.then_some(()).ok_or_else(|| unknown("expert", name))
            }
        }
    }

    fn change(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::FmRegistered { fm } => {
                self.fms.insert(fm.version.clone(), fm.clone());
            }
            Change::ExpertRegistered { expert } => {
                let versions = self.experts.entry(expert.name.clone()).or_default();
                versions.versions.insert(expert.version.clone(), (**expert).clone());
            }
            Change::FmState { version, state } => {
                self.fms.get_mut(version).ok_or_else(|| unknown("FM", version))?.state = *state;
            }
            Change::ExpertState { name, version, state } => {
                self.version_mut(name, version)?.state = *state;
                if *state != VersionState::Active {
                    let expert = self.expert_mut(name)?;
                    expert.earlier.retain(|shares| !shares.contains_key(version));
                }
            }
            Change::Pinned { name, version, fm } => {
                self.version_mut(name, version)?.fm.clone_from(fm);
            }
            Change::Traffic { name, shares } => {
                let expert = self.expert_mut(name)?;
                let before = std::mem::replace(&mut expert.shares, shares.clone());
                if !before.is_empty() {
                    expert.earlier.push(before);
                }
                let forgotten = expert.earlier.len().saturating_sub(REMEMBERED);
                expert.earlier.drain(..forgotten);
            }
            Change::RolledBack { name, shares } => {
                let expert = self.expert_mut(name)?;
                expert.earlier.pop();
                expert.shares.clone_from(shares);
            }
        }
        Ok(())
    }

    fn expert_mut(&mut self, name: &str) -> Result<&mut ExpertVersions> {
        self.experts.get_mut(name).ok_or_else(|| unknown("expert", name))
    }

    fn version_mut(&mut self, name: &str, version: &str) -> Result<&mut ExpertVersion> {
        let expert = self.expert_mut(name)?;
        let found = expert.versions.get_mut(version);
        found.ok_or_else(|| unknown("expert", &format!("{name} {version}")))
    }
}

/// By semver; what is none comes first.
pub(super) fn semver_order(a: &str, b: &str) -> Ordering {
    let parse = |text: &str| semver::Version::parse(text).ok();
    parse(a).cmp(&parse(b)).then_with(|| a.cmp(b))
}

fn unknown(what: &str, name: &str) -> Error {
    Error::invalid(format!("a decision speaks of {what} {name}, which is not registered"))
}
