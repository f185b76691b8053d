//! What must hold of rollouts: each goes on from step to step and never back, steps last as long as
//! they must by a clock that does not jump, a version that failed answers nobody, decisions follow
//! the rules, and once all is at rest no rollout is under way.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use hypercast_serve::rollout::{Rollout, RolloutStep, repository::Repository};
use hypercast_stream::registry::{Change, Decision, Promotion, Registry, Shares, VersionState};

use crate::{
    plan::Role,
    pushes::{PushCall, PushedKind, expert_of, kind_of},
    rollouts::settings,
    world::Simulation,
};

/// What the team of a push was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PushAnswer {
    /// The push is accepted: its rollout, and whether it is new.
    Accepted {
        /// When the push of the rollout was signed.
        created_ms: i64,
        /// Whether the daemon did not know it.
        is_new: bool,
    },
    /// Another rollout is under way; the team tries again later.
    Busy,
    /// It will not be accepted.
    Refused(String),
    /// The team does not know what became of it.
    Unclear,
}

/// A push, by what its team knows of it.
#[derive(Debug, Clone)]
struct PushTold {
    /// The daemon that it was sent to.
    to: Role,
    /// The last answer that says something.
    answer: Option<PushAnswer>,
    /// Whether an answer was lost, or the daemon's state was put back to an earlier one.
    is_unclear: bool,
}

/// Where a rollout was seen last.
#[derive(Debug, Clone)]
struct SeenRollout {
    step: RolloutStep,
    settled: bool,
    /// When the step began at the earliest, since the beginning of the simulation.
    since: Duration,
}

/// What tells rollouts apart. Each daemon has one expert.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RolloutKey {
    role: Role,
    version: String,
    /// When its push was signed.
    created_ms: i64,
}

/// What was seen of rollouts and pushes during a run.
#[derive(Default)]
pub struct RolloutLedger {
    seen: BTreeMap<RolloutKey, SeenRollout>,
    /// Experts and versions that an operator has retired, or tried to.
    pub retired_by_hand: BTreeSet<(&'static str, String)>,
    /// Experts whose last change of shares an operator has undone, or tried to.
    pub undone_by_hand: BTreeSet<&'static str>,
    /// Daemons whose state was put back, which find versions retired that they had retired.
    put_back: BTreeSet<Role>,
    /// By the number of the push.
    pushes: BTreeMap<usize, PushTold>,
}

impl RolloutLedger {
    /// Holds the rollouts of a daemon against how they were seen before; `began` is when it began
    /// what has brought them there. Says what is wrong.
    pub fn observe(&mut self, role: Role, now: &[Rollout], began: Duration) -> Vec<String> {
        let mut wrong = Vec::new();
        let under_way = now.iter().filter(|rollout| rollout.is_under_way());
        let under_way: Vec<String> = under_way.map(Rollout::label).collect();
        if under_way.len() > 1 {
            wrong.push(format!("{under_way:?} are under way at once"));
        }
        for rollout in now {
            let (version, created_ms) = (rollout.version().to_owned(), rollout.created_ms);
            let key = RolloutKey { role, version, created_ms };
            let wrong_cause = self.wrong_cause(role, rollout);
            let Some(seen) = self.seen.get_mut(&key) else {
                trace(role, rollout);
                wrong.extend(wrong_cause);
                let (step, settled) = (rollout.step, rollout.settled);
                // It may come from a copy of a state.
                let since = began.saturating_sub(Duration::from_millis(rollout.lasted_ms));
                self.seen.insert(key, SeenRollout { step, settled, since });
                continue;
            };
            wrong.extend(went_wrong(seen, rollout, began));
            if (seen.step, seen.settled) != (rollout.step, rollout.settled) {
                trace(role, rollout);
                wrong.extend(wrong_cause);
            }
            if seen.step != rollout.step {
                (seen.step, seen.since) = (rollout.step, began);
            }
            seen.settled = rollout.settled;
        }
        let is_there = |key: &RolloutKey| {
            let is_it =
                |of: &Rollout| of.version() == key.version && of.created_ms == key.created_ms;
            now.iter().any(is_it)
        };
        let gone = |key: &&RolloutKey| key.role == role && !is_there(key);
        if let Some(gone) = self.seen.keys().find(gone).cloned() {
            wrong.push(format!("the rollout of {} is gone", gone.version));
            self.seen.remove(&gone);
        }
        wrong
    }

    /// What is wrong with why a rollout says that it has ended.
    fn wrong_cause(&self, role: Role, rollout: &Rollout) -> Option<String> {
        let is_told = rollout.cause.as_ref().is_some_and(|cause| cause.contains("retired by hand"));
        let key = (expert_of(role)?, rollout.version().to_owned());
        let is_wrong =
            is_told && !self.retired_by_hand.contains(&key) && !self.put_back.contains(&role);
        is_wrong.then(|| format!("{} says that it was retired by hand", rollout.label()))
    }

    /// Notes an answer to a push, and says what is wrong with it.
    pub fn told(&mut self, number: usize, call: &PushCall, answer: PushAnswer) -> Option<String> {
        let new = PushTold { to: call.to, answer: None, is_unclear: false };
        let told = self.pushes.entry(number).or_insert(new);
        let was_accepted = matches!(told.answer, Some(PushAnswer::Accepted { .. }));
        match &answer {
            PushAnswer::Busy => return None,
            PushAnswer::Unclear => told.is_unclear = true,
            PushAnswer::Accepted { is_new: true, .. } if was_accepted && !told.is_unclear => {
                return Some(format!("the push of {} is accepted twice", call.version));
            }
            PushAnswer::Accepted { created_ms, .. } if *created_ms != call.created_ms => {
                return Some(format!("the push of {} is taken for another one", call.version));
            }
            PushAnswer::Refused(_) if was_accepted => {}
            answer => told.answer = Some(answer.clone()),
        }
        None
    }

    /// Forgets what was seen of a daemon whose state is put back to an earlier one.
    pub fn put_back(&mut self, role: Role) {
        self.put_back.insert(role);
        self.seen.retain(|key, _| key.role != role);
        for told in self.pushes.values_mut().filter(|told| told.to == role) {
            (told.answer, told.is_unclear) = (None, true);
        }
    }
}

fn trace(role: Role, rollout: &Rollout) {
    let timeline = &Simulation::current().timeline;
    let told = || {
        // The first line has the key, which is another one in each run of the simulator.
        let line = rollout.log.iter().skip(1).next_back().map_or("", |line| line.text.as_str());
        format!("{role:?} has {} {}: {line}", rollout.label(), rollout.step.word())
    };
    timeline.trace.line(timeline.now.get(), "rollout", told);
}

/// What is wrong with how a rollout went on.
fn went_wrong(seen: &SeenRollout, now: &Rollout, began: Duration) -> Option<String> {
    let place = |step, settled| (place(step), settled);
    if place(now.step, now.settled) < place(seen.step, seen.settled) {
        let (label, before, after) = (now.label(), seen.step.word(), now.step.word());
        return Some(format!("the rollout of {label} goes back from {before} to {after}"));
    }
    let line = &now.log.last()?.text;
    let least_s = match (seen.step, now.step) {
        (RolloutStep::Canary, RolloutStep::Waiting) => settings().canary_s,
        (RolloutStep::Canary, RolloutStep::Promoted) if !line.contains("as was decided") => {
            settings().canary_s
        }
        (RolloutStep::Promoted, RolloutStep::Promoted)
            if now.settled && !seen.settled && line.starts_with("watched for") =>
        {
            settings().watch_s
        }
        _ => return None,
    };
    // `began` is a step earlier than the end of what is measured, so nothing is taken off.
    let lasted = Simulation::current().timeline.now.get().saturating_sub(seen.since);
    let label = now.label();
    (lasted < Duration::from_secs(least_s)).then(|| {
        let step = seen.step.word();
        format!("{label} was in its step {step} for {lasted:?}, since {began:?}, not {least_s} s")
    })
}

/// The order of steps.
fn place(step: RolloutStep) -> u8 {
    match step {
        RolloutStep::Replay => 0,
        RolloutStep::Shadow => 1,
        RolloutStep::Canary => 2,
        RolloutStep::Waiting => 3,
        RolloutStep::Promoted => 4,
        RolloutStep::Failed | RolloutStep::RolledBack => 5,
    }
}

/// Whether a decision about experts is one that the rules make of the registry before it.
pub fn follows_rules(registry: &Registry, changes: &[Change]) -> bool {
    let (mut registry, mut rest) = (registry.clone(), changes);
    while !rest.is_empty() {
        let made = candidates(&registry, rest).into_iter().find(|made| rest.starts_with(made));
        let Some(changes) = made.filter(|made| !made.is_empty()) else { return false };
        rest = &rest[changes.len()..];
        let decision = Decision { at_ms: 0, changes, made_by: String::new() };
        if registry.apply(&decision).is_err() {
            return false;
        }
    }
    true
}

/// What the rules make of requests that could have led to some changes.
fn candidates(registry: &Registry, changes: &[Change]) -> Vec<Vec<Change>> {
    let promoted = |name: &String, version: &String, shares: &Shares| {
        let (name, version) = (name.clone(), version.clone());
        let share = shares.get(&version).copied().unwrap_or(0.0);
        registry.promote_expert(&Promotion { name, version, share, replace: false })
    };
    let made = match changes {
        [Change::ExpertRegistered { expert }, ..] => vec![registry.register_expert(expert)],
        [Change::ExpertState { name, version, state: VersionState::Shadow }, ..] => {
            vec![registry.shadow_expert(name, version)]
        }
        [Change::ExpertState { name, version, state: VersionState::Retired }, ..] => {
            vec![registry.retire_expert(name, version, false)]
        }
        [
            Change::Traffic { name, shares },
            Change::ExpertState { version, state: VersionState::Retired, .. },
            ..,
        ] if shares.is_empty() => vec![registry.retire_expert(name, version, true)],
        [Change::RolledBack { name, .. }, ..] => vec![registry.roll_back(name)],
        [Change::ExpertState { name, version, .. }, Change::Traffic { shares, .. }, ..] => {
            vec![promoted(name, version, shares)]
        }
        [Change::Traffic { name, shares }, ..] => {
            shares.keys().map(|version| promoted(name, version, shares)).collect()
        }
        _ => Vec::new(),
    };
    made.into_iter().flatten().collect()
}

/// What is wrong with the shares of experts, if something is.
pub fn wrong_shares(registry: &Registry) -> Option<String> {
    registry.experts().find_map(|(name, all)| {
        let sum: f64 = all.shares.values().sum();
        let is_whole = all.shares.is_empty() || (sum - 1.0).abs() < 1e-9;
        let is_retired = |version: &&String| {
            let of = all.versions.get(*version);
            of.is_none_or(|of| of.state == VersionState::Retired)
        };
        let retired = all.shares.keys().find(is_retired);
        match retired {
            Some(version) => Some(format!("{name} {version} answers, and is retired")),
            None => (!is_whole).then(|| format!("the shares of {name} sum to {sum}")),
        }
    })
}

/// Holds the rollouts at rest against the registry and what teams were told. `is_left_out` says
/// whether there are decisions that nobody here knows, with which nothing goes on.
pub fn check(world: &Simulation, registry: &Registry, is_left_out: bool) {
    let violate = |what: String| world.violate("rollouts", what);
    for process in world.processes.iter().filter(|process| process.wanted.get()) {
        let Some(name) = expert_of(process.role) else { continue };
        let life = process.life.borrow();
        let Some(daemon) = life.as_ref().and_then(|life| life.rollouts.as_ref()) else {
            violate(format!("{:?} does not run", process.role));
            continue;
        };
        let rollouts = daemon.service.of(name);
        for rollout in &rollouts {
            if rollout.is_active() && !is_left_out {
                let (label, step) = (rollout.label(), rollout.step.word());
                violate(format!("{label} is at rest in its step {step}: {rollout:?}"));
            }
            if let Some(what) = wrong_end(world, registry, rollout) {
                violate(what);
            }
        }
        let folder = Path::new("/state").join(name).join("experts/pushed");
        let recorded = world.observe(&process.machine, || Repository::open(&folder)?.pending());
        match recorded {
            Err(error) => violate(format!("recorded pushes cannot be read: {error}")),
            Ok(recorded) if !recorded.is_empty() && !is_left_out => {
                violate(format!("{:?} has not begun", recorded[0].rollout.label()));
            }
            Ok(_) => {}
        }
        drop(life);
        check_pushes(world, process.role, &rollouts, is_left_out);
    }
}

/// Holds what the teams of a daemon were told against its rollouts.
fn check_pushes(world: &Simulation, role: Role, rollouts: &[Rollout], is_left_out: bool) {
    let mut pushes = world.ledger.borrow().rollouts.pushes.clone();
    pushes.retain(|_, told| told.to == role);
    for (number, told) in pushes {
        let PushCall { name, version, created_ms, .. } = &world.pushes[number];
        let is_of = |of: &&Rollout| of.version() == version && of.created_ms == *created_ms;
        let rollout = rollouts.iter().find(is_of);
        let goes_on = rollout.is_some_and(|rollout| !rollout.step.is_over());
        match told.answer {
            Some(PushAnswer::Accepted { .. }) if rollout.is_none() && !is_left_out => {
                let what = format!("{name} {version} was accepted, and has no rollout");
                world.violate("rollouts", what);
            }
            Some(PushAnswer::Refused(why)) if goes_on && !told.is_unclear => {
                let what = format!("{name} {version} was refused ({why}), and goes on");
                world.violate("rollouts", what);
            }
            _ => {}
        }
    }
}

/// What is wrong with where a rollout has ended.
fn wrong_end(world: &Simulation, registry: &Registry, rollout: &Rollout) -> Option<String> {
    let (name, version) = (rollout.name(), rollout.version());
    let state = registry.expert_version(name, version).map(|version| version.state);
    let is_by_hand = rollout.cause.as_ref().is_some_and(|cause| cause.contains("by hand"));
    if rollout.step.is_over() && !is_by_hand && state.is_some_and(|of| of != VersionState::Retired)
    {
        return Some(format!("{name} {version} has failed, and is not retired"));
    }
    let is_watched = |line: &str| line.starts_with("watched for");
    let watched = rollout.log.iter().any(|line| is_watched(&line.text));
    let kind = kind_of(world.plan.seed, name, version);
    let is_good = match kind {
        PushedKind::Good | PushedKind::Held => true,
        // It may have been promoted, and answer a share again.
        PushedKind::FaultyForAll => world.ledger.borrow().rollouts.undone_by_hand.contains(name),
        _ => false,
    };
    (watched && !is_good).then(|| format!("{name} {version} was watched, and is {kind:?}"))
}
