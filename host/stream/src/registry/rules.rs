//! The rules of decisions: each takes a request and the registry's state, and returns the changes
//! or the reason against them. Nothing here appends.

use super::{
    Change, ExpertVersion, FmVersion, Registry, Shares, VersionState, state::ExpertVersions,
};
use crate::error::{CommonErrors as _, Error, Result};

/// A request to let a version of an expert answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Promotion {
    /// The expert.
    pub name: String,
    /// The version.
    pub version: String,
    /// The share of the expert's users, above 0 and at most 1. The versions that answer now keep
    /// the rest in their proportions.
    pub share: f64,
    /// Whether it replaces other experts on its surfaces.
    pub replace: bool,
}

impl Registry {
    /// Registers an FM version. An equal registration changes nothing.
    ///
    /// # Errors
    /// The version is not semver, or is registered with other properties.
    pub fn register_fm(&self, fm: &FmVersion) -> Result<Vec<Change>> {
        semver(&fm.version, "FM version")?;
        let Some(known) = self.fm(&fm.version) else {
            let fm = FmVersion { state: VersionState::Training, ..fm.clone() };
            return Ok(vec![Change::FmRegistered { fm }]);
        };
        let what = format!("FM {}", fm.version);
        check_not_retired(&what, known.state)?;
        if !fm.earlier_schemas.contains(&known.schema) {
            check_same(&what, "schema", &known.schema, &fm.schema)?;
        }
        check_same(&what, "TAE width", &known.tae_dim, &fm.tae_dim)?;
        check_same(&what, "weights", &known.weights, &fm.weights)?;
        Ok(Vec::new())
    }

    /// Registers a version of an expert. An equal registration changes nothing. Its FM version may
    /// still be missing.
    ///
    /// # Errors
    /// The version is not semver, is registered with other properties, has no surface, or does not
    /// fit the FM version that it pins.
    pub fn register_expert(&self, expert: &ExpertVersion) -> Result<Vec<Change>> {
        semver(&expert.version, "an expert's version")?;
        semver(&expert.fm, "FM version")?;
        let what = label(expert);
        if expert.surfaces.is_empty() {
            return refuse(format!("{what} serves no surface"));
        }
        if let Some(fm) = self.fm(&expert.fm) {
            check_not_retired(&format!("FM {}, which {what} pins,", fm.version), fm.state)?;
            check_fits(expert, fm)?;
        }
        let Some(known) = self.expert_version(&expert.name, &expert.version) else {
            let expert = ExpertVersion { state: VersionState::Training, ..expert.clone() };
            return Ok(vec![Change::ExpertRegistered { expert: Box::new(expert) }]);
        };
        check_not_retired(&what, known.state)?;
        check_same(&what, "plugin", &known.plugin_hash, &expert.plugin_hash)?;
        check_same(&what, "FM version", &known.fm, &expert.fm)?;
        if !expert.earlier_schemas.contains(&known.schema) {
            check_same(&what, "schema", &known.schema, &expert.schema)?;
        }
        check_same(&what, "TAE width", &known.tae_dim, &expert.tae_dim)?;
        check_same(&what, "surfaces", &known.surfaces, &expert.surfaces)?;
        check_same(&what, "weights", &known.weights, &expert.weights)?;
        Ok(Vec::new())
    }

    /// Activates an FM version: it answers for the experts that pin it, and its TAEs are logged.
    ///
    /// # Errors
    /// The version is missing or retired.
    pub fn promote_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        check_not_retired(&format!("FM {version}"), fm.state)?;
        Ok(fm_state(fm, VersionState::Active))
    }

    /// Makes an FM version a shadow: it predicts for requests, and is only measured.
    ///
    /// # Errors
    /// The version is missing, retired, or needed by experts that answer.
    pub fn shadow_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        check_not_retired(&format!("FM {version}"), fm.state)?;
        let active = |pin: &&ExpertVersion| pin.state == VersionState::Active;
        self.check_unpinned(version, &active)?;
        self.check_not_last(fm)?;
        Ok(fm_state(fm, VersionState::Shadow))
    }

    /// Retires an FM version.
    ///
    /// # Errors
    /// The version is missing, pinned by experts (which the error names), or the only active one.
    pub fn retire_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        self.check_unpinned(version, &|_| true)?;
        self.check_not_last(fm)?;
        Ok(fm_state(fm, VersionState::Retired))
    }

    /// Lets a version of an expert answer a share of its users.
    ///
    /// # Errors
    /// The version is missing or retired, does not fit an active FM version, or serves what another
    /// expert serves.
    pub fn promote_expert(&self, promotion: &Promotion) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(&promotion.name, &promotion.version)?;
        let what = label(expert);
        check_not_retired(&what, expert.state)?;
        self.check_pinned_fm(expert, &[VersionState::Active])?;
        let shares = share_out(all, expert, promotion.share)?;
        let mut changes = self.displace(expert, promotion.replace)?;
        changes.extend(expert_state(expert, VersionState::Active));
        if shares != all.shares {
            changes.push(Change::Traffic { name: expert.name.clone(), shares });
        }
        Ok(changes)
    }

    /// Makes a version of an expert a shadow: it predicts for the requests of its surfaces, and is
    /// only measured.
    ///
    /// # Errors
    /// The version is missing, retired, answers users, or pins an FM version that is not in use.
    pub fn shadow_expert(&self, name: &str, version: &str) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(name, version)?;
        check_not_retired(&label(expert), expert.state)?;
        check_idle(all, expert)?;
        self.check_pinned_fm(expert, &[VersionState::Active, VersionState::Shadow])?;
        Ok(expert_state(expert, VersionState::Shadow).into_iter().collect())
    }

    /// Restores an expert's previous shares.
    ///
    /// # Errors
    /// The expert has no earlier shares, or another expert serves its surfaces now.
    pub fn roll_back(&self, name: &str) -> Result<Vec<Change>> {
        let expert = self.known_name(name)?;
        let Some(shares) = expert.earlier.last() else {
            return refuse(format!(
                "expert {name} has no earlier version to go back to: none answered before, or it is retired"
            ));
        };
        for version in shares.keys().filter_map(|version| expert.versions.get(version)) {
            self.displace(version, false)?;
            self.check_pinned_fm(version, &[VersionState::Active])?;
        }
        Ok(vec![Change::RolledBack { name: name.to_owned(), shares: shares.clone() }])
    }

    /// Retires a version of an expert; with `unserve` even one that answers, whose surfaces the FM
    /// then serves.
    ///
    /// # Errors
    /// The version is missing or answers users.
    pub fn retire_expert(&self, name: &str, version: &str, unserve: bool) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(name, version)?;
        let mut changes = Vec::new();
        if unserve && all.shares.len() == 1 && all.share(version) > 0.0 {
            changes.push(Change::Traffic { name: name.to_owned(), shares: Shares::new() });
        } else {
            check_idle(all, expert)?;
        }
        changes.extend(expert_state(expert, VersionState::Retired));
        Ok(changes)
    }

    /// Changes the FM version that a version of an expert in training pins.
    ///
    /// # Errors
    /// The version is missing, no longer in training, or does not fit that FM version.
    pub fn pin(&self, name: &str, version: &str, fm: &str) -> Result<Vec<Change>> {
        let (_, expert) = self.known_expert(name, version)?;
        let what = label(expert);
        if expert.state != VersionState::Training {
            return refuse(format!(
                "{what} is {}, and its parameters belong to FM {}; register and train a new version for FM {fm}",
                expert.state, expert.fm
            ));
        }
        let fm = self.known_fm(fm)?;
        check_not_retired(&format!("FM {}", fm.version), fm.state)?;
        check_fits(expert, fm)?;
        if expert.fm == fm.version {
            return Ok(Vec::new());
        }
        let (name, version) = (name.to_owned(), version.to_owned());
        Ok(vec![Change::Pinned { name, version, fm: fm.version.clone() }])
    }

    fn known_fm(&self, version: &str) -> Result<&FmVersion> {
        self.fm(version).ok_or_else(|| {
            let known: Vec<&str> = self.fms().iter().map(|fm| fm.version.as_str()).collect();
            Error::refused(format!("FM {version} is not registered; there are {known:?}"))
        })
    }

    fn known_name(&self, name: &str) -> Result<&ExpertVersions> {
        self.expert(name).ok_or_else(|| {
            let known: Vec<&str> = self.experts().map(|(name, _)| name).collect();
            Error::refused(format!("expert {name} is not registered; there are {known:?}"))
        })
    }

    fn known_expert(&self, name: &str, version: &str) -> Result<(&ExpertVersions, &ExpertVersion)> {
        let all = self.known_name(name)?;
        let known = || -> Vec<&str> { all.in_order().iter().map(|v| v.version.as_str()).collect() };
        let expert = all.versions.get(version).ok_or_else(|| {
            Error::refused(format!(
                "expert {name} has no version {version}; there are {:?}",
                known()
            ))
        })?;
        Ok((all, expert))
    }

    /// Checks that the pinned FM version exists, is in one of these states, and fits.
    fn check_pinned_fm(&self, expert: &ExpertVersion, states: &[VersionState]) -> Result<()> {
        let what = label(expert);
        let Some(fm) = self.fm(&expert.fm) else {
            return refuse(format!("{what} pins FM {}, which is not registered", expert.fm));
        };
        check_fits(expert, fm)?;
        if states.contains(&fm.state) {
            return Ok(());
        }
        let advice = match fm.state {
            VersionState::Retired => "register a version that is trained on another FM",
            _ => "promote that FM first",
        };
        refuse(format!("{what} pins FM {}, which is {}; {advice}", fm.version, fm.state))
    }

    /// The changes that remove other experts from an expert's surfaces.
    fn displace(&self, expert: &ExpertVersion, replace: bool) -> Result<Vec<Change>> {
        let mut others: Vec<&str> = expert
            .surfaces
            .iter()
            .filter_map(|surface| self.serving(surface))
            .filter(|other| *other != expert.name)
            .collect();
        others.sort_unstable();
        others.dedup();
        let mut changes = Vec::new();
        for other in others {
            let all = self.known_name(other)?;
            let answering = || all.shares.keys().filter_map(|version| all.versions.get(version));
            let mut surfaces = answering().flat_map(|version| &version.surfaces);
            if !replace {
                let shared: Vec<&String> =
                    surfaces.filter(|surface| expert.surfaces.contains(surface)).collect();
                return refuse(format!(
                    "surface {:?} is served by expert {other}; {} can take its place with --replace",
                    shared[0],
                    label(expert)
                ));
            }
            if let Some(left) = surfaces.find(|surface| !expert.surfaces.contains(surface)) {
                return refuse(format!(
                    "expert {other} also serves surface {left:?}, which {} does not; promote a version of {other} without the others first",
                    label(expert)
                ));
            }
            changes.push(Change::Traffic { name: other.to_owned(), shares: Shares::new() });
        }
        Ok(changes)
    }

    fn check_unpinned(&self, fm: &str, counts: &dyn Fn(&&ExpertVersion) -> bool) -> Result<()> {
        let pins: Vec<String> = self
            .pins(fm)
            .into_iter()
            .filter(counts)
            .map(|pin| format!("{} ({})", label(pin), pin.state))
            .collect();
        if pins.is_empty() {
            return Ok(());
        }
        refuse(format!("FM {fm} is pinned by {}; retire them first", pins.join(", ")))
    }

    fn check_not_last(&self, fm: &FmVersion) -> Result<()> {
        let other =
            |other: &&FmVersion| other.state == VersionState::Active && other.version != fm.version;
        if fm.state == VersionState::Active && !self.fms().iter().any(other) {
            return refuse(format!(
                "FM {} is the only active one and serves; promote another one first",
                fm.version
            ));
        }
        Ok(())
    }
}

/// Shares with `share` for one version and the rest for those that answer now.
fn share_out(all: &ExpertVersions, expert: &ExpertVersion, share: f64) -> Result<Shares> {
    let what = label(expert);
    if !(share > 0.0 && share <= 1.0) {
        return refuse(format!("a share of {share}; it must be above 0, at most 1"));
    }
    let mut shares = Shares::new();
    if share < 1.0 {
        let others = || all.shares.iter().filter(|(version, _)| **version != expert.version);
        let rest: f64 = others().map(|(_, share)| share).sum();
        if rest <= 0.0 {
            return refuse(format!(
                "no other version of {} answers, so {what} must take all users; leave --share out",
                expert.name
            ));
        }
        for (version, own) in others() {
            let other = &all.versions[version];
            let alike = |a: &ExpertVersion, b: &ExpertVersion| {
                a.surfaces.iter().all(|surface| b.surfaces.contains(surface))
            };
            if !(alike(expert, other) && alike(other, expert)) {
                return refuse(format!(
                    "{what} serves {:?} and {} serves {:?}; versions that share users serve the same surfaces",
                    expert.surfaces,
                    label(other),
                    other.surfaces
                ));
            }
            shares.insert(version.clone(), own / rest * (1.0 - share));
        }
    }
    shares.insert(expert.version.clone(), share);
    Ok(shares)
}

/// Checks that an expert accepts an FM's version, and that what it reads is there: the TAE, and the
/// core's columns. Schemas of which neither has grown from the other are compared by column.
fn check_fits(expert: &ExpertVersion, fm: &FmVersion) -> Result<()> {
    let what = label(expert);
    let (wanted, found) = (&expert.accepts_fm, &fm.version);
    let requirement = semver::VersionReq::parse(wanted)
        .map_err(|_| Error::refused(format!("{what}: fm-version {wanted:?} is no requirement")))?;
    let version = semver(found, "FM version")?;
    if requirement != semver::VersionReq::STAR && !requirement.matches(&version) {
        return refuse(format!("{what} accepts FM versions `{wanted}`, but not FM {found}"));
    }
    if expert.tae_dim != fm.tae_dim {
        return refuse(format!(
            "{what} reads TAEs of {} values, and those of FM {found} have {}; train it on that FM's logs",
            expert.tae_dim, fm.tae_dim
        ));
    }
    let has_grown =
        fm.earlier_schemas.contains(&expert.schema) || expert.earlier_schemas.contains(&fm.schema);
    if expert.schema == fm.schema || has_grown {
        return Ok(());
    }
    let (own, of_fm) = (&expert.schema, &fm.schema);
    let Some(columns) = expert.columns.as_ref().filter(|_| !fm.columns.is_empty()) else {
        return refuse(format!(
            "{what} and FM {found} were trained with different schemas ({own} and {of_fm}); train \
             both on one data set"
        ));
    };
    let missing: Vec<&str> =
        columns.iter().filter(|own| !fm.columns.contains(own)).map(String::as_str).collect();
    if !missing.is_empty() {
        return refuse(format!(
            "{what} reads what the schema of FM {found} does not have: {}. Its author trains it on \
             that FM's logs, or leaves the columns out; its operator lets the data set's schema \
             grow by them (`hypercast schema apply`)",
            missing.join(", ")
        ));
    }
    Ok(())
}

fn check_idle(all: &ExpertVersions, expert: &ExpertVersion) -> Result<()> {
    let share = all.share(&expert.version);
    if share > 0.0 {
        return refuse(format!(
            "{} answers {:.0} % of its users; promote another version, or roll back, first",
            label(expert),
            share * 100.0
        ));
    }
    Ok(())
}

fn check_not_retired(what: &str, state: VersionState) -> Result<()> {
    match state {
        VersionState::Retired => refuse(format!("{what} is retired; register a new version")),
        _ => Ok(()),
    }
}

fn check_same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    property: &str,
    known: &T,
    given: &T,
) -> Result<()> {
    if known == given {
        return Ok(());
    }
    refuse(format!(
        "{what} is registered with {property} {known:?}, not {given:?}; register the changed one as \
         a new version"
    ))
}

fn semver(text: &str, what: &str) -> Result<semver::Version> {
    semver::Version::parse(text)
        .map_err(|error| Error::refused(format!("{what} {text:?} is no semver version: {error}")))
}

/// The change to a state, unless the version has it.
fn fm_state(fm: &FmVersion, state: VersionState) -> Vec<Change> {
    let change = Change::FmState { version: fm.version.clone(), state };
    if fm.state == state { Vec::new() } else { vec![change] }
}

fn expert_state(expert: &ExpertVersion, state: VersionState) -> Option<Change> {
    let (name, version) = (expert.name.clone(), expert.version.clone());
    (expert.state != state).then_some(Change::ExpertState { name, version, state })
}

fn label(expert: &ExpertVersion) -> String {
    format!("expert {} {}", expert.name, expert.version)
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::refused(why))
}
