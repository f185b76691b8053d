//! Advances rollouts. A few times a second a step reads what was counted, decides in the registry,
//! and writes each rollout's state to its file. What fails for the moment is tried again. Replays
//! and a plugin's `evaluate` run on threads of their own: no command waits for one. `recorded`
//! begins rollouts.

mod recorded;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hypercast_config::{Config, StopAfter};
use hypercast_core::{
    clock::instant, error::ErrorKind, logging::RepeatedFailures, shutdown::Shutdown,
};
use hypercast_expert::{ServedExpert, wasm::contract::Verdict};
use hypercast_stream::registry::{Change, Registry, RegistryFollower, VersionState};

use crate::{
    error::Result,
    rollout::{
        Rollout, RolloutStep,
        accept::AcceptedPush,
        policy::p99_us,
        replay::{ReplayInput, ReplayTask, ReplayVerdict},
        service::RolloutContext,
        state::{RolloutFiles, RolloutMap},
        stats::{ArmCounts, StepWatch},
        transitions,
    },
    threads::lock,
};

/// Time between two looks while a rollout is active.
const BUSY: Duration = Duration::from_millis(50);

/// Time between two looks while none is.
const IDLE: Duration = Duration::from_millis(500);

/// Back-off after a failed step.
const BACK_OFF: Duration = Duration::from_secs(1);

/// A restart forgets at most so much of the time that a step has lasted, in milliseconds.
const LASTED_SAVED_MS: u64 = 10_000;

/// How long a version may take to load before its rollout fails.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// Advances all rollouts of a daemon.
pub(super) struct RolloutController {
    context: RolloutContext,
    follower: RegistryFollower,
    files: RolloutFiles,
    all: Arc<Mutex<RolloutMap>>,
    request_log: PathBuf,
    keep_versions: usize,
    /// By label, as the following maps.
    watches: HashMap<String, StepWatch>,
    /// Experts that were loaded when their push was accepted, for their replay.
    loaded: HashMap<String, Arc<ServedExpert>>,
    replays: HashMap<String, ReplayTask>,
    /// Rollouts whose last step failed, and when to try again.
    back_off: HashMap<String, Instant>,
    /// When to begin the rollouts of recorded pushes; none while all have begun.
    begin_at: Option<Instant>,
    failures: RepeatedFailures,
    stop: Shutdown,
}

impl RolloutController {
    /// Continues the rollouts in `all`, which `files` stores.
    pub(super) fn new(
        config: &Config,
        context: RolloutContext,
        files: RolloutFiles,
        all: Arc<Mutex<RolloutMap>>,
        stop: Shutdown,
    ) -> Result<Self> {
        Ok(Self {
            follower: RegistryFollower::new(&*context.acceptor.streams)?,
            request_log: config.paths.state.join("recorded"),
            keep_versions: config.rollout.keep_versions,
            context,
            files,
            all,
            watches: HashMap::new(),
            loaded: HashMap::new(),
            replays: HashMap::new(),
            back_off: HashMap::new(),
            begin_at: Some(instant()),
            failures: RepeatedFailures::default(),
            stop,
        })
    }

    /// Begins and advances what can be; returns the time until the next look.
    pub(super) fn step(&mut self) -> Duration {
        self.begin_due(instant());
        let active = self.active();
        let pause = if active.is_empty() { IDLE } else { BUSY };
        for rollout in active {
            if self.stop.is_requested() {
                break;
            }
            self.advance_and_save(rollout);
        }
        pause
    }

    /// Cancels the replays that run, and waits for their threads.
    pub(super) fn stop_replays(&mut self) {
        self.replays.drain().for_each(|(_, replay)| replay.stop());
    }

    /// Begins recorded rollouts, if it is time to.
    pub(super) fn begin_due(&mut self, now: Instant) {
        if self.begin_at.is_some_and(|at| at <= now)
            && let Err(error) = self.begin_recorded()
            && self.failures.is_news(&error)
        {
            tracing::warn!(%error, "an accepted push has not begun its rollout; trying again");
        }
    }

    fn active(&self) -> Vec<Rollout> {
        lock(&self.all).values().filter(|rollout| rollout.is_active()).cloned().collect()
    }

    /// Begins the rollout of a push that was just accepted.
    pub(super) fn begin_accepted(&mut self, accepted: AcceptedPush) -> Result<()> {
        let AcceptedPush { pending, expert } = accepted;
        self.begin(&pending)?;
        self.loaded.extend(expert.map(|expert| (pending.rollout.label(), expert)));
        Ok(())
    }

    fn save(&mut self, rollout: Rollout) -> Result<()> {
        self.files.write(&rollout)?;
        self.keep(rollout);
        Ok(())
    }

    fn keep(&self, rollout: Rollout) {
        let name = rollout.name().to_owned();
        let mut all = lock(&self.all);
        all.insert((name.clone(), rollout.version().to_owned()), rollout);
        self.files.trim(&mut all, &name);
    }

    /// Drops what belongs to one step of a rollout: its counts, its loaded expert, its replay.
    fn end_step(&mut self, label: &str) {
        self.watches.remove(label);
        self.loaded.remove(label);
        self.replays.remove(label);
    }

    /// Gives the users of an expert back: ends its active rollout and the one that is recorded,
    /// or, without either, undoes the last promotion. Returns what was done, in words.
    pub(super) fn roll_back(&mut self, name: &str) -> Result<String> {
        // What answers users comes first. If one fails, the other is ended all the same.
        let outcomes = [self.give_up_active(name), self.cancel_recorded(name)];
        let ended: Vec<String> = outcomes.iter().flatten().flatten().cloned().collect();
        let done = (!ended.is_empty()).then(|| format!("ended {}", ended.join(" and ")));
        if let Some(error) = outcomes.into_iter().find_map(Result::err) {
            return Err(match done {
                Some(done) => error.within(format!("{done}, but not all")),
                None => error,
            });
        }
        if done.is_none() {
            self.decide(|registry| transitions::roll_back(registry, name))?;
        }
        let done = done.map(|done| done + "; ").unwrap_or_default();
        let answering =
            self.follower.registry().expert(name).into_iter().flat_map(|all| &all.shares);
        let shares: Vec<String> = answering
            .map(|(version, share)| format!("{version} ({:.0} %)", share * 100.0))
            .collect();
        if shares.is_empty() {
            return Ok(format!("{done}no version of {name} answers now"));
        }
        Ok(format!("{done}{name} is answered by {} now", shares.join(", ")))
    }

    /// Ends the active rollout of an expert; returns which, in words.
    fn give_up_active(&mut self, name: &str) -> Result<Option<String>> {
        let active = self.active().into_iter().filter(|rollout| rollout.name() == name);
        let Some(mut rollout) = active.max_by_key(|rollout| rollout.begun_ms) else {
            return Ok(None);
        };
        let (label, step) = (rollout.label(), rollout.step.word());
        self.give_up(&mut rollout, "asked to".into())?;
        self.save(rollout)?;
        self.end_step(&label);
        Ok(Some(format!("the rollout of {label} ({step})")))
    }

    fn decide(&mut self, changes: impl Fn(&Registry) -> Result<Vec<Change>>) -> Result<bool> {
        self.follower.decide(&*self.context.acceptor.streams, changes)
    }

    /// Reads the registry, on which nothing may be decided if it misses a decision.
    fn catch_up(&mut self) -> Result<()> {
        self.follower.catch_up(&*self.context.acceptor.streams)?;
        Ok(self.follower.registry().check_complete()?)
    }

    /// Advances a rollout, and saves it if that changed it.
    fn advance_and_save(&mut self, mut rollout: Rollout) {
        let label = rollout.label();
        if self.back_off.get(&label).is_some_and(|until| instant() < *until) {
            return;
        }
        self.back_off.remove(&label);
        let before = rollout.clone();
        let advanced = self.advance(&mut rollout).or_else(|error| {
            // Waiting does not change what a rule forbids, but it may bring what could not be read.
            if error.kind() == ErrorKind::Refused {
                self.catch_up()?;
                self.give_up(&mut rollout, error.to_string())
            } else {
                Err(error)
            }
        });
        if before.step != rollout.step || rollout.settled {
            self.end_step(&label);
        }
        let saved =
            advanced.and_then(|()| if rollout == before { Ok(()) } else { self.save(rollout) });
        if let Err(error) = saved {
            if self.failures.is_news(&format!("{label}: {error}")) {
                tracing::warn!(%error, rollout = label, "a step of a rollout failed; trying again");
            }
            self.back_off.insert(label, instant() + BACK_OFF);
        }
    }

    fn advance(&mut self, rollout: &mut Rollout) -> Result<()> {
        self.catch_up()?;
        if let Some(cause) = rollout.cause.clone() {
            return self.give_up(rollout, cause);
        }
        if rollout.step != RolloutStep::Replay && self.follow_registry(rollout) {
            return Ok(());
        }
        match rollout.step {
            RolloutStep::Replay => self.replay(rollout),
            RolloutStep::Shadow => self.shadow(rollout),
            RolloutStep::Canary => self.canary(rollout),
            // Under the same limits as a canary.
            RolloutStep::Waiting => self.measure(rollout).map(drop),
            RolloutStep::Promoted => self.watch(rollout),
            RolloutStep::Failed | RolloutStep::RolledBack => Ok(()),
        }
    }

    /// Follows decisions that an operator made in the meantime, or this process before a restart.
    /// Returns whether they changed the rollout.
    fn follow_registry(&self, rollout: &mut Rollout) -> bool {
        let registry = self.follower.registry();
        let (name, version) = (rollout.name(), rollout.version());
        let share = transitions::share(registry, name, version);
        let state = registry.expert_version(name, version).map(|version| version.state);
        match (rollout.step, state) {
            (RolloutStep::Promoted, Some(VersionState::Active)) if share == 0.0 => {
                rollout.settled = true;
                rollout.add_line("no longer watched: it answers nobody any more".into());
            }
            (RolloutStep::Promoted, Some(VersionState::Active)) => return false,
            (_, Some(VersionState::Retired) | None) => {
                let why = "it was retired by hand".to_owned();
                rollout.end(RolloutStep::Failed, why.clone(), why);
            }
            (_, Some(VersionState::Active)) if share > 0.999 => {
                rollout.go(RolloutStep::Promoted, "it answers everybody, as was decided".into());
            }
            (RolloutStep::Shadow, Some(VersionState::Active)) if share > 0.0 => {
                rollout.go(RolloutStep::Canary, answers_share(share));
            }
            (RolloutStep::Canary | RolloutStep::Waiting, Some(VersionState::Active))
                if share == 0.0 =>
            {
                let why = "its users were given back by hand".to_owned();
                rollout.end(RolloutStep::RolledBack, why.clone(), why);
            }
            _ => return false,
        }
        true
    }

    /// Starts the replay, or takes its result once it has one.
    fn replay(&mut self, rollout: &mut Rollout) -> Result<()> {
        let label = rollout.label();
        let Some(task) = self.replays.get_mut(&label) else {
            let task = ReplayTask::start(self.replay_input(rollout), self.context.replay)?;
            self.replays.insert(label, task);
            return Ok(());
        };
        let Some(verdict) = task.result() else { return Ok(()) };
        self.replays.remove(&label);
        let summary = match verdict? {
            ReplayVerdict::Passed(summary) => summary,
            ReplayVerdict::Failed(cause) => return self.give_up(rollout, cause),
        };
        let expert = rollout.expert.clone();
        self.decide(|registry| transitions::shadow(registry, &expert))?;
        rollout.add_line(summary);
        let wanted = rollout.limits.shadow_requests;
        rollout.go(RolloutStep::Shadow, format!("registered; it is to see {wanted} requests"));
        Ok(())
    }

    fn replay_input(&self, rollout: &Rollout) -> ReplayInput {
        let serving = &self.context.serving;
        let previous = rollout.previous.as_ref();
        let surfaces = rollout.expert.surfaces.iter();
        ReplayInput {
            expert: self.loaded.get(&rollout.label()).cloned(),
            before: previous.and_then(|version| serving.arm(rollout.name(), version)),
            surfaces: surfaces
                .filter_map(|name| self.context.acceptor.schema.surface(name))
                .collect(),
            request_log: self.request_log.clone(),
            acceptor: self.context.acceptor.clone(),
            rollout: rollout.clone(),
        }
    }

    fn shadow(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(stats) = self.measure(rollout)? else { return Ok(()) };
        let (seen, wanted) = (stats.requests, rollout.limits.shadow_requests);
        if seen < wanted {
            return self.check_time(rollout, format!("it saw {seen} of {wanted} requests"));
        }
        if rollout.limits.stop_after == StopAfter::Shadow {
            let text =
                format!("it saw {seen} requests, and waits for `hypercast versions promote`");
            rollout.go(RolloutStep::Waiting, text);
            return Ok(());
        }
        rollout.add_line(format!("it saw {seen} requests, {} faults", stats.faults));
        let share = rollout.limits.canary_share;
        if share >= 1.0 {
            return self.promote_to_all(rollout);
        }
        self.promote(rollout, share)?;
        rollout.go(RolloutStep::Canary, answers_share(share));
        Ok(())
    }

    fn canary(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(stats) = self.measure(rollout)? else { return Ok(()) };
        let limits = &rollout.limits;
        let (seen, wanted) = (stats.requests, limits.canary_requests);
        if seen < wanted || self.step_lasted(rollout).as_secs() < limits.canary_s {
            return self.check_time(rollout, format!("it answered {seen} of {wanted} requests"));
        }
        let watch = self.watches.get(&rollout.label());
        if let Some(why) = watch.and_then(|watch| watch.evaluation.held.clone()) {
            return self.check_time(rollout, format!("held: {why}"));
        }
        if limits.stop_after == StopAfter::Canary {
            let text =
                format!("it answered {seen} requests, and waits for `hypercast versions promote`");
            rollout.go(RolloutStep::Waiting, text);
            return Ok(());
        }
        rollout.add_line(format!("it answered {seen} requests, {} faults", stats.faults));
        self.promote_to_all(rollout)
    }

    /// Watches a promoted version for `watch_s` seconds.
    fn watch(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(ArmCounts { requests, faults, .. }) = self.measure(rollout)? else {
            return Ok(());
        };
        let watch_s = rollout.limits.watch_s;
        if self.step_lasted(rollout).as_secs() >= watch_s {
            rollout.settled = true;
            rollout
                .add_line(format!("watched for {watch_s} s: {requests} requests, {faults} faults"));
        }
        Ok(())
    }

    fn promote(&mut self, rollout: &Rollout, share: f64) -> Result<()> {
        let (expert, replace) = (&rollout.expert, rollout.limits.replace);
        self.decide(|registry| transitions::promote(registry, expert, share, replace))?;
        Ok(())
    }

    fn promote_to_all(&mut self, rollout: &mut Rollout) -> Result<()> {
        self.promote(rollout, 1.0)?;
        let (name, keep) = (rollout.name().to_owned(), self.keep_versions);
        self.decide(|registry| transitions::retire_older(registry, &name, keep))?;
        let text = match &rollout.previous {
            Some(previous) => {
                format!("it answers everybody; {previous} stays loaded for a rollback")
            }
            None => "it answers everybody".into(),
        };
        rollout.go(RolloutStep::Promoted, text);
        Ok(())
    }

    /// Ends a rollout: its users go back to the version before, and its version is retired. Its
    /// file has the cause before that is decided: if the process ends in between, or the registry
    /// cannot be reached, it is given up later, and for that cause.
    fn give_up(&mut self, rollout: &mut Rollout, cause: String) -> Result<()> {
        if rollout.cause.is_none() {
            rollout.cause = Some(cause.clone());
            let written = self.files.write(rollout);
            self.keep(rollout.clone());
            // A full disk must not keep a bad version.
            if let Err(error) = written {
                tracing::warn!(%error, rollout = rollout.label(), "why a rollout is given up cannot be written");
            }
        }
        let registry = self.follower.registry();
        let answered = transitions::share(registry, rollout.name(), rollout.version()) > 0.0
            || matches!(rollout.step, RolloutStep::Canary | RolloutStep::Promoted);
        let own = rollout.clone();
        self.decide(|registry| transitions::give_up(registry, &own))?;
        let now = transitions::main_version(self.follower.registry(), rollout.name());
        let text = match (answered, now) {
            (true, Some(now)) => format!("rolled back to {}: {cause}", now.version),
            (true, None) => format!("rolled back: {cause}"),
            (false, _) => format!("given up: {cause}"),
        };
        tracing::warn!(rollout = rollout.label(), cause, "a rollout has failed");
        let step = if answered { RolloutStep::RolledBack } else { RolloutStep::Failed };
        rollout.end(step, cause, text);
        Ok(())
    }

    /// How long the step of a rollout that was measured has lasted.
    fn step_lasted(&self, rollout: &Rollout) -> Duration {
        let watch = self.watches.get(&rollout.label());
        watch.map_or(Duration::ZERO, |watch| watch.lasted(instant()))
    }

    /// Gives a rollout up whose step takes longer than `step_most_s`.
    fn check_time(&mut self, rollout: &mut Rollout, state: String) -> Result<()> {
        let most_s = rollout.limits.step_most_s;
        if self.step_lasted(rollout) <= Duration::from_secs(most_s) {
            return Ok(());
        }
        let step = rollout.step.word();
        self.give_up(rollout, format!("{step}: {state} in {most_s} s (rollout.step_most_s)"))
    }

    /// What the version did in this step. None while it is not loaded yet, and where it broke a
    /// limit: its rollout is given up then.
    fn measure(&mut self, rollout: &mut Rollout) -> Result<Option<ArmCounts>> {
        let (name, version) = (rollout.name().to_owned(), rollout.version().to_owned());
        let now = instant();
        let serving = &self.context.serving;
        let breaker = self.context.acceptor.breaker();
        let share = transitions::share(self.follower.registry(), &name, &version);
        let arm = serving.measured(&name, &version);
        let arm = arm.filter(|arm| (arm.share - share).abs() < 1e-9);
        let watch = self.watches.entry(rollout.label()).or_insert_with(|| {
            let lasted = Duration::from_millis(rollout.lasted_ms);
            StepWatch::new(now, lasted, rollout.limits.window_s, breaker)
        });
        let lasted_ms = watch.lasted(now).as_millis() as u64;
        if lasted_ms >= rollout.lasted_ms + LASTED_SAVED_MS {
            rollout.lasted_ms = lasted_ms;
        }
        let Some(arm) = arm else {
            if now - watch.began > LOAD_TIMEOUT {
                let why = serving
                    .problem()
                    .unwrap_or_else(|| format!("not within {} s", LOAD_TIMEOUT.as_secs()));
                self.give_up(rollout, format!("it cannot be loaded: {why}"))?;
            }
            return Ok(None);
        };
        let own = watch.own.update(now, &arm.stats);
        let previous = rollout.previous.clone();
        let previous = previous.as_deref();
        let before = previous.and_then(|version| serving.measured(&name, version));
        let before_us =
            before.and_then(|before| p99_us(&watch.before.update(now, &before.stats).window));
        // Once the version before answers nobody, its last p99 beside this one is the measure.
        let before_us = before_us.or(rollout.before_us);
        if matches!(rollout.step, RolloutStep::Canary | RolloutStep::Waiting) {
            rollout.before_us = before_us;
        }
        let limits = &rollout.limits;
        let answers = arm.share > 0.0;
        let mut cause = limits.faulty(&own.window).map(|cause| match arm.stats.last_fault() {
            Some(fault) => format!("{cause}; the last one: {fault}"),
            None => cause,
        });
        if answers && cause.is_none() {
            cause = limits.slow(&own.window, before_us);
        }
        if answers && cause.is_none() {
            let before = watch.evaluation.held.clone();
            match watch.evaluation.verdict(now) {
                None | Some(Verdict::Publish) => {}
                Some(Verdict::Hold(why)) if before.as_ref() == Some(&why) => {}
                Some(Verdict::Hold(why)) => rollout.add_line(format!("held: {why}")),
                Some(Verdict::RollBack(why)) => cause = Some(format!("evaluate: {why}")),
            }
            let slices = || serving.slices(&name, &version, previous);
            watch.evaluation.start(now, arm.evaluate, slices)?;
        }
        if let Some(cause) = cause {
            let step = rollout.step.word();
            self.give_up(rollout, format!("{step}: {cause}"))?;
            return Ok(None);
        }
        Ok(Some(own.whole))
    }
}

fn answers_share(share: f64) -> String {
    format!("it answers {:.1} % of the users", share * 100.0)
}
