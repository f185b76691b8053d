//! What may be decided: each rule takes a wish and the registry's state, and gives
//! the changes, or the reason against it. It appends nothing.

use super::{
    Change, ExpertVersion, FmVersion, Registry, Shares, VersionState, registry::ExpertVersions,
};
use crate::error::{CommonErrors as _, Error, Result};

/// A wish to let an expert's version answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Promotion {
    /// The expert.
    pub name: String,
    /// The version.
    pub version: String,
    /// The share of the expert's users, above 0 and at most 1. The versions that answer now keep the rest, in their proportions.
    pub share: f64,
    /// Whether it takes the place of other experts on its surfaces.
    pub replace: bool,
}

impl Registry {
    /// A new FM version. One that is there with the same facts changes nothing.
    ///
    /// # Errors
    /// A version that is no semver, or is there with other facts.
    pub fn register_fm(&self, fm: &FmVersion) -> Result<Vec<Change>> {
        semver(&fm.version, "FM version")?;
        let Some(known) = self.fm(&fm.version) else {
            let fm = FmVersion { state: VersionState::Training, ..fm.clone() };
            return Ok(vec![Change::FmRegistered { fm }]);
        };
        let what = format!("FM {}", fm.version);
        alive(&what, known.state)?;
        same(&what, "schema", &known.schema, &fm.schema)?;
        same(&what, "TAE width", &known.tae_dim, &fm.tae_dim)?;
        same(&what, "weights", &known.weights, &fm.weights)?;
        Ok(Vec::new())
    }

    /// A new version of an expert. One that is there with the same facts changes nothing. Its FM version may still be missing.
    ///
    /// # Errors
    /// A version that is no semver, is there with other facts, has no surface, or does not fit the FM version that it pins.
    pub fn register_expert(&self, expert: &ExpertVersion) -> Result<Vec<Change>> {
        semver(&expert.version, "an expert's version")?;
        semver(&expert.fm, "FM version")?;
        let what = label(expert);
        if expert.surfaces.is_empty() {
            return refuse(format!("{what} serves no surface"));
        }
        if let Some(fm) = self.fm(&expert.fm) {
            alive(&format!("FM {}, which {what} pins,", fm.version), fm.state)?;
            fits(expert, fm)?;
        }
        let Some(known) = self.expert_version(&expert.name, &expert.version) else {
            let expert = ExpertVersion { state: VersionState::Training, ..expert.clone() };
            return Ok(vec![Change::ExpertRegistered { expert: Box::new(expert) }]);
        };
        alive(&what, known.state)?;
        same(&what, "plugin", &known.plugin_hash, &expert.plugin_hash)?;
        same(&what, "FM version", &known.fm, &expert.fm)?;
        same(&what, "schema", &known.schema, &expert.schema)?;
        same(&what, "TAE width", &known.tae_dim, &expert.tae_dim)?;
        same(&what, "surfaces", &known.surfaces, &expert.surfaces)?;
        same(&what, "weights", &known.weights, &expert.weights)?;
        Ok(Vec::new())
    }

    /// Lets an FM version answer for the experts that pin it, and have its TAEs logged.
    ///
    /// # Errors
    /// A version that is missing or retired.
    pub fn promote_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        alive(&format!("FM {version}"), fm.state)?;
        Ok(fm_state(fm, VersionState::Active))
    }

    /// Lets an FM version see requests, and only be measured.
    ///
    /// # Errors
    /// A version that is missing, retired, or needed by experts that answer.
    pub fn shadow_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        alive(&format!("FM {version}"), fm.state)?;
        let active = |pin: &&ExpertVersion| pin.state == VersionState::Active;
        self.unpinned(version, &active)?;
        self.not_the_last(fm)?;
        Ok(fm_state(fm, VersionState::Shadow))
    }

    /// Puts an FM version out of use.
    ///
    /// # Errors
    /// A version that is missing, that experts pin (they are named), or that is the only active one.
    pub fn retire_fm(&self, version: &str) -> Result<Vec<Change>> {
        let fm = self.known_fm(version)?;
        self.unpinned(version, &|_| true)?;
        self.not_the_last(fm)?;
        Ok(fm_state(fm, VersionState::Retired))
    }

    /// Lets an expert's version answer a share of its users.
    ///
    /// # Errors
    /// A version that is missing or retired, does not fit an active FM version, or serves what another expert serves.
    pub fn promote_expert(&self, promotion: &Promotion) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(&promotion.name, &promotion.version)?;
        let what = label(expert);
        alive(&what, expert.state)?;
        self.pinned_in(expert, &[VersionState::Active])?;
        let shares = share_out(all, expert, promotion.share)?;
        let mut changes = self.displace(expert, promotion.replace)?;
        if expert.state != VersionState::Active {
            changes.push(expert_state(expert, VersionState::Active));
        }
        if shares != all.shares {
            changes.push(Change::Traffic { name: expert.name.clone(), shares });
        }
        Ok(changes)
    }

    /// Lets an expert's version see the requests of its surfaces, and only be measured.
    ///
    /// # Errors
    /// A version that is missing, retired, answers users, or pins an FM version that runs nowhere.
    pub fn shadow_expert(&self, name: &str, version: &str) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(name, version)?;
        alive(&label(expert), expert.state)?;
        idle(all, expert)?;
        self.pinned_in(expert, &[VersionState::Active, VersionState::Shadow])?;
        Ok(match expert.state {
            VersionState::Shadow => Vec::new(),
            _ => vec![expert_state(expert, VersionState::Shadow)],
        })
    }

    /// Gives an expert's users back to who answered them before.
    ///
    /// # Errors
    /// An expert without an earlier version that is still loaded, or whose place another expert has taken.
    pub fn roll_back(&self, name: &str) -> Result<Vec<Change>> {
        let expert = self.known_name(name)?;
        let Some(shares) = expert.earlier.last() else {
            return refuse(format!(
                "expert {name} has no earlier version to go back to: none answered before, or it is retired"
            ));
        };
        for version in shares.keys().filter_map(|version| expert.versions.get(version)) {
            self.displace(version, false)?;
            self.pinned_in(version, &[VersionState::Active])?;
        }
        Ok(vec![Change::RolledBack { name: name.to_owned(), shares: shares.clone() }])
    }

    /// Puts an expert's version out of use; with `unserve`, even one that answers, whose surfaces are then the FM's own.
    ///
    /// # Errors
    /// A version that is missing, or that answers users.
    pub fn retire_expert(&self, name: &str, version: &str, unserve: bool) -> Result<Vec<Change>> {
        let (all, expert) = self.known_expert(name, version)?;
        let mut changes = Vec::new();
        match (all.share(version) > 0.0, unserve && all.shares.len() == 1) {
            (true, true) => {
                changes.push(Change::Traffic { name: name.to_owned(), shares: Shares::new() })
            }
            (true, false) => idle(all, expert)?,
            (false, _) => {}
        }
        if expert.state != VersionState::Retired {
            changes.push(expert_state(expert, VersionState::Retired));
        }
        Ok(changes)
    }

    /// Has a training expert's version go on with another FM version.
    ///
    /// # Errors
    /// A version that is missing, no longer training, or does not fit that FM version.
    pub fn pin(&self, name: &str, version: &str, fm: &str) -> Result<Vec<Change>> {
        let (_, expert) = self.known_expert(name, version)?;
        let what = label(expert);
        if expert.state != VersionState::Training {
            let state = word(expert.state);
            return refuse(format!(
                "{what} is {state}, and its parameters belong to FM {}; register and train a new version for FM {fm}",
                expert.fm
            ));
        }
        let fm = self.known_fm(fm)?;
        alive(&format!("FM {}", fm.version), fm.state)?;
        fits(expert, fm)?;
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

    /// The pinned FM version is there, in one of these states, and fits.
    fn pinned_in(&self, expert: &ExpertVersion, states: &[VersionState]) -> Result<()> {
        let what = label(expert);
        let Some(fm) = self.fm(&expert.fm) else {
            return refuse(format!("{what} pins FM {}, which is not registered", expert.fm));
        };
        fits(expert, fm)?;
        if states.contains(&fm.state) {
            return Ok(());
        }
        let advice = match fm.state {
            VersionState::Retired => "register a version that is trained on another FM",
            _ => "promote that FM first",
        };
        refuse(format!("{what} pins FM {}, which is {}; {advice}", fm.version, word(fm.state)))
    }

    /// The changes that make room on an expert's surfaces.
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

    fn unpinned(&self, fm: &str, counts: &dyn Fn(&&ExpertVersion) -> bool) -> Result<()> {
        let pins: Vec<String> = self
            .pins(fm)
            .into_iter()
            .filter(counts)
            .map(|pin| format!("{} ({})", label(pin), word(pin.state)))
            .collect();
        match pins.is_empty() {
            true => Ok(()),
            false => refuse(format!("FM {fm} is pinned by {}; retire them first", pins.join(", "))),
        }
    }

    fn not_the_last(&self, fm: &FmVersion) -> Result<()> {
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

/// Shares with `share` for one version, and the rest for those that answer now.
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

/// What an expert reads is what an FM gives.
fn fits(expert: &ExpertVersion, fm: &FmVersion) -> Result<()> {
    let what = label(expert);
    let (wanted, found) = (&expert.accepts_fm, &fm.version);
    let requirement = semver::VersionReq::parse(wanted)
        .map_err(|_| Error::refused(format!("{what}: fm-version {wanted:?} is no requirement")))?;
    let version = semver(found, "FM version")?;
    if requirement != semver::VersionReq::STAR && !requirement.matches(&version) {
        return refuse(format!("{what} accepts FM versions `{wanted}`, and FM {found} is none"));
    }
    if expert.tae_dim != fm.tae_dim {
        return refuse(format!(
            "{what} reads TAEs of {} values, and those of FM {found} have {}; train it on that FM's logs",
            expert.tae_dim, fm.tae_dim
        ));
    }
    if expert.schema != fm.schema {
        return refuse(format!(
            "{what} and FM {found} were trained with different schemas ({} and {}); train both on one data set",
            expert.schema, fm.schema
        ));
    }
    Ok(())
}

fn idle(all: &ExpertVersions, expert: &ExpertVersion) -> Result<()> {
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

fn alive(what: &str, state: VersionState) -> Result<()> {
    match state {
        VersionState::Retired => refuse(format!("{what} is retired; register a new version")),
        _ => Ok(()),
    }
}

fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    fact: &str,
    known: &T,
    given: &T,
) -> Result<()> {
    match known == given {
        true => Ok(()),
        false => refuse(format!(
            "{what} is registered with {fact} {known:?}, not {given:?}; give what is different a new version"
        )),
    }
}

fn semver(text: &str, what: &str) -> Result<semver::Version> {
    semver::Version::parse(text)
        .map_err(|error| Error::refused(format!("{what} {text:?} is no semver version: {error}")))
}

fn fm_state(fm: &FmVersion, state: VersionState) -> Vec<Change> {
    match fm.state == state {
        true => Vec::new(),
        false => vec![Change::FmState { version: fm.version.clone(), state }],
    }
}

fn expert_state(expert: &ExpertVersion, state: VersionState) -> Change {
    let (name, version) = (expert.name.clone(), expert.version.clone());
    Change::ExpertState { name, version, state }
}

fn label(expert: &ExpertVersion) -> String {
    format!("expert {} {}", expert.name, expert.version)
}

fn word(state: VersionState) -> &'static str {
    match state {
        VersionState::Training => "training",
        VersionState::Shadow => "shadow",
        VersionState::Active => "active",
        VersionState::Retired => "retired",
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::refused(why))
}
