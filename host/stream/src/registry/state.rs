//! The registry's state: the result of all its decisions. It applies decisions and answers queries;
//! `rules` says which decisions are allowed.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Change, Decision, ExpertVersion, FmVersion, Shares, VersionState, fnv};
use crate::error::{CommonErrors as _, Error, Result};

/// The number of earlier shares that are kept for rollbacks.
const EARLIER_SHARES: usize = 32;

/// All registered versions, and which of them answer.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Registry {
    fms: BTreeMap<String, FmVersion>,
    experts: BTreeMap<String, ExpertVersions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unapplied: Option<UnappliedDecisions>,
}

/// Decisions that this state misses, because this version of hypercast cannot apply them or the
/// stream has lost them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnappliedDecisions {
    /// The number of decisions.
    pub count: u64,
    /// The first of them: its stream and record, why it does not apply, and what to do.
    pub first: String,
}

/// The versions of an expert.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ExpertVersions {
    /// By version.
    pub versions: BTreeMap<String, ExpertVersion>,
    /// The current shares.
    pub shares: Shares,
    /// The earlier shares, the newest last; only those that can be restored.
    pub earlier: Vec<Shares>,
}

impl ExpertVersions {
    /// The versions in semver order.
    pub fn in_order(&self) -> Vec<&ExpertVersion> {
        let mut versions: Vec<&ExpertVersion> = self.versions.values().collect();
        versions.sort_by_cached_key(|&version| semver_key(&version.version));
        versions
    }

    /// The share of the users that a version answers.
    pub fn share(&self, version: &str) -> f64 {
        self.shares.get(version).copied().unwrap_or(0.0)
    }
}

impl Registry {
    /// Whether nothing was ever registered: then the configuration alone determines what serves.
    pub fn is_empty(&self) -> bool {
        self.fms.is_empty() && self.experts.is_empty()
    }

    /// An FM version, if it is registered.
    pub fn fm(&self, version: &str) -> Option<&FmVersion> {
        self.fms.get(version)
    }

    /// The FM versions in semver order.
    pub fn fms(&self) -> Vec<&FmVersion> {
        let mut fms: Vec<&FmVersion> = self.fms.values().collect();
        fms.sort_by_cached_key(|&fm| semver_key(&fm.version));
        fms
    }

    /// The FM versions whose TAEs are computed: active and shadow ones, in semver order.
    pub fn live_fms(&self) -> Vec<&FmVersion> {
        let mut fms = self.fms();
        fms.retain(|fm| matches!(fm.state, VersionState::Active | VersionState::Shadow));
        fms
    }

    /// Whether the configured FM is used besides the registered ones: as long as the configured
    /// experts are, because none was promoted here, or no FM version is active.
    pub fn leaves_the_configured_fm(&self) -> bool {
        !self.has_promoted() || self.newest_fm().is_none()
    }

    /// Whether any expert was ever promoted: then the registry determines which experts serve, and
    /// not the configuration.
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

    /// A version of an expert, if it is registered.
    pub fn expert_version(&self, name: &str, version: &str) -> Option<&ExpertVersion> {
        self.experts.get(name)?.versions.get(version)
    }

    /// The experts by name.
    pub fn experts(&self) -> impl Iterator<Item = (&str, &ExpertVersions)> {
        self.experts.iter().map(|(name, expert)| (name.as_str(), expert))
    }

    /// The expert versions, except retired ones, that pin an FM version.
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

    /// The decisions that this state misses, if there are any.
    pub fn unapplied(&self) -> Option<&UnappliedDecisions> {
        self.unapplied.as_ref()
    }

    /// Checks that the state has every decision. On a state that misses one, nothing may be
    /// decided.
    ///
    /// # Errors
    /// Refused: the first decision that is missing, and what to do.
    pub fn check_complete(&self) -> Result<()> {
        match &self.unapplied {
            None => Ok(()),
            Some(UnappliedDecisions { count, first }) => Err(Error::refused(format!(
                "this process misses {count} decisions of the registry, so it decides nothing: \
                 {first}"
            ))),
        }
    }

    /// Notes that decisions are missing.
    pub(super) fn leave_out(&mut self, decisions: u64, why: String) {
        let unapplied = self.unapplied.get_or_insert(UnappliedDecisions { count: 0, first: why });
        unapplied.count += decisions;
    }

    /// Applies a decision.
    ///
    /// # Errors
    /// The decision is about something that is not registered; the registry is then unchanged.
    pub fn apply(&mut self, decision: &Decision) -> Result<()> {
        // All changes are checked before any is applied, because a copy of the state would cost
        // more the more versions there are.
        for (at, change) in decision.changes.iter().enumerate() {
            self.check_known(change, &decision.changes[..at])?;
        }
        decision.changes.iter().try_for_each(|change| self.change(change))
    }

    /// Checks that what a change is about is registered, possibly by the changes before it.
    fn check_known(&self, change: &Change, before: &[Change]) -> Result<()> {
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
                let forgotten = expert.earlier.len().saturating_sub(EARLIER_SHARES);
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

/// A user's position in [0, 1) among the users of an expert. It depends on both, so a user stays
/// with a version, and tests of two experts are independent.
pub fn user_bucket(user: u64, expert: &str) -> f64 {
    let hash = hypercast_core::hash::mix64(user ^ fnv(expert.as_bytes()));
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// The version for a user at `bucket`. Older versions come first, so that a newer one whose share
/// grows keeps the users it has.
pub fn choose_version(shares: &Shares, bucket: f64) -> Option<&str> {
    let mut versions: Vec<(&str, f64)> =
        shares.iter().map(|(version, share)| (version.as_str(), *share)).collect();
    versions.sort_by_cached_key(|&(version, _)| semver_key(version));
    let mut until = 0.0;
    let found = versions.iter().find(|(_, share)| {
        until += share;
        bucket < until
    });
    // The shares may sum to slightly less than 1.
    found.or(versions.last()).map(|(version, _)| *version)
}

/// What versions are sorted by: semver; others come first.
fn semver_key(version: &str) -> (Option<semver::Version>, &str) {
    (semver::Version::parse(version).ok(), version)
}

fn unknown(what: &str, name: &str) -> Error {
    Error::internal(format!("a decision is about {what} {name}, which is not registered"))
}
