//! The thread that takes rollouts along. It looks a few times a second at what was counted, decides in the registry, and
//! writes down where each rollout stands. What it cannot reach it tries again; nothing waits for it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use hypercast_config::{Config, StopAfter};
use hypercast_core::{clock::now_ms, error::ErrorKind, shutdown::Shutdown};
use hypercast_expert::{Expert, wasm::contract::Verdict};
use hypercast_stream::versions::{Change, Follower, Registry, VersionState, schema_hash};

use crate::{
    error::Result,
    request_log::{self, ReplayExpert},
    rollout::{
        Rollout, RolloutStep,
        accept::AcceptedPush,
        evaluate::judge,
        import_config,
        policy::enough_times,
        service::{RolloutCommand, RolloutContext},
        state::{RolloutFiles, RolloutMap},
        stats::StepWatch,
        transitions,
    },
};

/// How often it looks while something is under way, and while nothing is.
const BUSY: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(500);

/// How long it leaves a rollout alone that it could not take along.
const REST: Duration = Duration::from_secs(1);

/// How long a version may take to be loaded.
const LOAD: Duration = Duration::from_secs(120);

/// How often quality is judged.
const JUDGE: Duration = Duration::from_secs(2);

/// Length of the lists that a replay compares at their tops.
const TOP: usize = 10;

/// All that a thread needs to take rollouts along.
pub(super) struct RolloutController {
    tools: RolloutContext,
    follower: Follower,
    files: RolloutFiles,
    all: Arc<Mutex<RolloutMap>>,
    recorded: PathBuf,
    keep_versions: usize,
    schema: String,
    watches: HashMap<String, StepWatch>,
    /// Experts of rollouts that just began, for their replay.
    loaded: HashMap<String, Box<Expert>>,
    rests: HashMap<String, Instant>,
    stop: Shutdown,
}

impl RolloutController {
    /// Over what files told of.
    pub(super) fn new(
        config: &Config,
        tools: RolloutContext,
        (files, all): (RolloutFiles, Arc<Mutex<RolloutMap>>),
        stop: Shutdown,
    ) -> Result<Self> {
        Ok(Self {
            follower: Follower::new(&*tools.streams)?,
            recorded: config.paths.state.join("recorded"),
            keep_versions: config.rollout.keep_versions,
            schema: schema_hash(&tools.schema),
            tools,
            files,
            all,
            watches: HashMap::new(),
            loaded: HashMap::new(),
            rests: HashMap::new(),
            stop,
        })
    }

    /// Until it is told to stop.
    pub(super) fn run(mut self, asked: &Receiver<RolloutCommand>) {
        while !self.stop.is_requested() {
            let active = self.active();
            let wait = if active.is_empty() { IDLE } else { BUSY };
            match asked.recv_timeout(wait) {
                Ok(command) => self.execute(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            for rollout in self.active() {
                if self.stop.is_requested() {
                    return;
                }
                self.advance_and_save(rollout);
            }
        }
    }

    fn active(&self) -> Vec<Rollout> {
        self.all().values().filter(|rollout| rollout.is_active()).cloned().collect()
    }

    fn all(&self) -> MutexGuard<'_, RolloutMap> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn execute(&mut self, command: RolloutCommand) {
        match command {
            RolloutCommand::Begin { begun: AcceptedPush { rollout, expert, adoption }, done } => {
                let begun = self.adopt(&adoption).and_then(|()| self.begin(&rollout));
                if begun.is_ok() {
                    self.loaded.insert(rollout.label(), expert);
                }
                // Who asked may have gone.
                let _ = done.send(begun);
            }
            RolloutCommand::RollBack { name, done } => {
                let _ = done.send(self.roll_back(&name));
            }
        }
    }

    fn adopt(&mut self, adoption: &[Change]) -> Result<()> {
        let adopted = self.decide(|registry| match import_config::is_due(registry) {
            true => Ok(adoption.to_vec()),
            false => Ok(Vec::new()),
        })?;
        if adopted {
            tracing::warn!(
                "what the configuration serves is registered and promoted: from now on the registry says what serves, and `hypercast versions` changes it"
            );
        }
        Ok(())
    }

    fn begin(&mut self, rollout: &Rollout) -> Result<()> {
        // What a newer version replaces is not watched any more.
        let watched: Vec<Rollout> = self
            .active()
            .into_iter()
            .filter(|other| other.name() == rollout.name() && other.step == RolloutStep::Promoted)
            .collect();
        for mut other in watched {
            other.settled = true;
            other.tell(now_ms(), format!("no longer watched: {} was pushed", rollout.version()));
            self.keep(other)?;
        }
        self.watches.remove(&rollout.label());
        self.keep(rollout.clone())
    }

    fn keep(&mut self, rollout: Rollout) -> Result<()> {
        self.files.write(&rollout)?;
        let name = rollout.name().to_owned();
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert((name.clone(), rollout.version().to_owned()), rollout);
        self.files.trim(&mut all, &name);
        Ok(())
    }

    fn roll_back(&mut self, name: &str) -> Result<String> {
        let active = self.active().into_iter().filter(|rollout| rollout.name() == name);
        let mut own: Vec<Rollout> = active.collect();
        own.sort_by_key(|rollout| rollout.begun_ms);
        if let Some(mut rollout) = own.pop() {
            let label = rollout.label();
            self.give_up(&mut rollout, "asked to".into())?;
            self.keep(rollout)?;
            self.watches.remove(&label);
            self.loaded.remove(&label);
        } else {
            self.decide(|registry| transitions::roll_back(registry, name))?;
        }
        let shares = self.follower.registry().expert(name).map(|all| all.shares.clone());
        let shares: Vec<String> = shares
            .into_iter()
            .flatten()
            .map(|(version, share)| format!("{version} ({:.0} %)", share * 100.0))
            .collect();
        Ok(match shares.is_empty() {
            true => format!("no version of {name} answers now"),
            false => format!("{name} is answered by {} now", shares.join(", ")),
        })
    }

    fn decide(&mut self, wish: impl Fn(&Registry) -> Result<Vec<Change>>) -> Result<bool> {
        self.follower.decide(&*self.tools.streams, wish)
    }

    /// Takes a rollout along, and writes down what changed.
    fn advance_and_save(&mut self, mut rollout: Rollout) {
        let label = rollout.label();
        if self.rests.get(&label).is_some_and(|until| Instant::now() < *until) {
            return;
        }
        self.rests.remove(&label);
        let before = rollout.clone();
        let outcome = self.advance(&mut rollout).or_else(|error| match error {
            // What a rule forbids now will not be allowed by waiting.
            error if error.kind() == ErrorKind::Refused => {
                self.give_up(&mut rollout, error.to_string())
            }
            error => Err(error),
        });
        if before.step != rollout.step || rollout.settled {
            self.watches.remove(&label);
            self.loaded.remove(&label);
        }
        let kept = outcome.and_then(|()| match rollout == before {
            true => Ok(()),
            false => self.keep(rollout),
        });
        if let Err(error) = kept {
            tracing::warn!(%error, rollout = label, "a rollout cannot be taken along; trying again");
            self.rests.insert(label, Instant::now() + REST);
        }
    }

    fn advance(&mut self, rollout: &mut Rollout) -> Result<()> {
        self.follower.catch_up()?;
        if rollout.step != RolloutStep::Replay && self.moved_by_others(rollout) {
            return Ok(());
        }
        match rollout.step {
            RolloutStep::Replay => self.replay(rollout),
            RolloutStep::Shadow => self.shadow(rollout),
            RolloutStep::Canary => self.canary(rollout),
            RolloutStep::Waiting => self.wait(rollout),
            RolloutStep::Promoted => self.watch_over(rollout),
            RolloutStep::Failed | RolloutStep::RolledBack => Ok(()),
        }
    }

    /// Follows what an operator decided meanwhile, or this process before it was ended; whether that changed the step.
    fn moved_by_others(&self, rollout: &mut Rollout) -> bool {
        let registry = self.follower.registry();
        let (name, version) = (rollout.name(), rollout.version());
        let share = transitions::share(registry, name, version);
        let state = registry.expert_version(name, version).map(|version| version.state);
        let now = now_ms();
        match (rollout.step, state) {
            (RolloutStep::Promoted, Some(VersionState::Active)) if share == 0.0 => {
                rollout.settled = true;
                rollout.tell(now, "no longer watched: it answers nobody any more".into());
            }
            (RolloutStep::Promoted, Some(VersionState::Active)) => return false,
            (_, Some(VersionState::Retired) | None) => {
                rollout.cause = Some("it was retired by hand".into());
                rollout.settled = true;
                rollout.go(RolloutStep::Failed, now, "it was retired by hand".into());
            }
            (_, Some(VersionState::Active)) if share > 0.999 => {
                rollout.go(
                    RolloutStep::Promoted,
                    now,
                    "it answers everybody, as was decided".into(),
                );
            }
            (RolloutStep::Shadow, Some(VersionState::Active)) if share > 0.0 => {
                rollout.go(
                    RolloutStep::Canary,
                    now,
                    format!("it answers {:.1} % of the users", share * 100.0),
                );
            }
            (RolloutStep::Canary | RolloutStep::Waiting, Some(VersionState::Active))
                if share == 0.0 =>
            {
                rollout.cause = Some("its users were given back by hand".into());
                rollout.settled = true;
                rollout.go(
                    RolloutStep::RolledBack,
                    now,
                    "its users were given back by hand".into(),
                );
            }
            _ => return false,
        }
        true
    }

    fn replay(&mut self, rollout: &mut Rollout) -> Result<()> {
        let said = self.replayed(rollout)?;
        if let Err(cause) = said {
            return self.give_up(rollout, cause);
        }
        if self.stop.is_requested() {
            return Ok(());
        }
        let expert = rollout.expert.clone();
        self.decide(|registry| transitions::shadow(registry, &expert))?;
        let text = said.unwrap_or_default();
        rollout.tell(now_ms(), text);
        let text = format!("registered; it is to see {} requests", rollout.limits.shadow_requests);
        rollout.go(RolloutStep::Shadow, now_ms(), text);
        Ok(())
    }

    /// What a replay says, or why it ends the rollout.
    fn replayed(&mut self, rollout: &Rollout) -> Result<std::result::Result<String, String>> {
        let most = rollout.limits.replay_requests;
        if most == 0 || !self.recorded.is_dir() {
            return Ok(Ok("no requests are recorded: none was replayed".into()));
        }
        let expert = &rollout.expert;
        let surfaces: Vec<u16> = expert
            .surfaces
            .iter()
            .filter_map(|surface| self.tools.schema.surface(surface))
            .collect();
        let fits = |record: &request_log::RecordedRequest| {
            record.schema == self.schema
                && record.fm == expert.fm
                && record.tae_dim == expert.tae_dim
                && surfaces.contains(&record.example.surface)
        };
        let requests = request_log::newest(&self.recorded, most, fits)?;
        if requests.is_empty() {
            return Ok(Ok(
                "no requests of its surfaces and FM are recorded: none was replayed".into()
            ));
        }
        let own = match self.loaded.get(&rollout.label()) {
            Some(expert) => expert,
            None => {
                let opened = Box::new(self.tools.acceptor.open(expert)?);
                self.loaded.entry(rollout.label()).or_insert(opened)
            }
        };
        let (label, without_tae) = (rollout.label(), expert.without_tae);
        let own = ReplayExpert { expert: own, without_tae, label: &label };
        let before = rollout
            .previous
            .as_ref()
            .and_then(|version| self.tools.serving.arm(&expert.name, version));
        let before_label =
            format!("{}@{}", expert.name, rollout.previous.as_deref().unwrap_or("-"));
        let other = before.as_ref().map(|arm| ReplayExpert {
            expert: &arm.expert,
            without_tae: arm.without_tae,
            label: &before_label,
        });
        let stop = self.stop.clone();
        let report = request_log::replay(&requests, own, other, (TOP, &|| stop.is_requested()));
        if let Some((cause, faults)) = report.faults.iter().next() {
            let (count, all, first) = (faults.count, report.requests, &faults.first);
            return Ok(Err(format!(
                "replay: {count} of {all} recorded requests faulted ({cause}): {first}"
            )));
        }
        let limits = &rollout.limits;
        if let (Some(own), Some(before)) = (report.times, report.times_against) {
            // The median: a few hundred requests on a busy machine say little of a p99.
            let most_us = before.p50_us * limits.latency_factor + limits.latency_slack_ms * 1e3;
            if own.p50_us > most_us {
                return Ok(Err(format!(
                    "replay: it takes {:.2} ms a recorded request, and the version before {:.2} ms (at most {:.2} ms may be)",
                    own.p50_us / 1e3,
                    before.p50_us / 1e3,
                    most_us / 1e3
                )));
            }
        }
        Ok(Ok(format!(
            "{} recorded requests replayed against {}: {} of {} rankings differ, rank correlation {}",
            report.requests,
            report.against,
            report.differing,
            report.compared,
            report.rank_correlation.map_or("-".into(), |rho| format!("{rho:.3}"))
        )))
    }

    fn shadow(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(looked) = self.look(rollout)? else { return Ok(()) };
        if let Some(cause) = looked.cause {
            return self.give_up(rollout, format!("shadow: {cause}"));
        }
        let (seen, wanted) = (looked.requests, rollout.limits.shadow_requests);
        if seen < wanted {
            return self.too_long(rollout, format!("it saw {seen} of {wanted} requests"));
        }
        if rollout.limits.stop_after == StopAfter::Shadow {
            let text =
                format!("it saw {seen} requests, and waits for `hypercast versions promote`");
            rollout.go(RolloutStep::Waiting, now_ms(), text);
            return Ok(());
        }
        rollout.tell(now_ms(), format!("it saw {seen} requests, {} faults", looked.faults));
        let limits = rollout.limits.clone();
        match limits.canary_share < 1.0 {
            true => {
                self.promote(rollout, limits.canary_share)?;
                let text = format!("it answers {:.1} % of the users", limits.canary_share * 100.0);
                rollout.go(RolloutStep::Canary, now_ms(), text);
                Ok(())
            }
            false => self.promote_to_all(rollout),
        }
    }

    fn canary(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(looked) = self.look(rollout)? else { return Ok(()) };
        if let Some(cause) = looked.cause {
            return self.give_up(rollout, format!("canary: {cause}"));
        }
        rollout.before_us = looked.before_us.or(rollout.before_us);
        let limits = &rollout.limits;
        let (seen, wanted) = (looked.requests, limits.canary_requests);
        let lasted_s = (now_ms() - rollout.since_ms) / 1000;
        if seen < wanted || lasted_s < limits.canary_s as i64 {
            return self.too_long(rollout, format!("it answered {seen} of {wanted} requests"));
        }
        if let Some(why) = self.held(rollout) {
            return self.too_long(rollout, format!("held: {why}"));
        }
        if limits.stop_after == StopAfter::Canary {
            let text =
                format!("it answered {seen} requests, and waits for `hypercast versions promote`");
            rollout.go(RolloutStep::Waiting, now_ms(), text);
            return Ok(());
        }
        rollout.tell(now_ms(), format!("it answered {seen} requests, {} faults", looked.faults));
        self.promote_to_all(rollout)
    }

    /// Waits for an operator; what it does meanwhile counts as before.
    fn wait(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(looked) = self.look(rollout)? else { return Ok(()) };
        rollout.before_us = looked.before_us.or(rollout.before_us);
        match looked.cause {
            Some(cause) => self.give_up(rollout, format!("waiting: {cause}")),
            None => Ok(()),
        }
    }

    fn watch_over(&mut self, rollout: &mut Rollout) -> Result<()> {
        let Some(looked) = self.look(rollout)? else { return Ok(()) };
        if let Some(cause) = looked.cause {
            return self.give_up(rollout, format!("promoted: {cause}"));
        }
        let watched_s = rollout.limits.watch_s;
        if now_ms() - rollout.since_ms >= watched_s as i64 * 1000 {
            rollout.settled = true;
            rollout.tell(
                now_ms(),
                format!(
                    "watched for {watched_s} s: {} requests, {} faults",
                    looked.requests, looked.faults
                ),
            );
        }
        Ok(())
    }

    fn promote(&mut self, rollout: &mut Rollout, share: f64) -> Result<()> {
        let (expert, replace) = (rollout.expert.clone(), rollout.limits.replace);
        self.decide(|registry| transitions::promote(registry, &expert, (share, replace)))?;
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
        rollout.go(RolloutStep::Promoted, now_ms(), text);
        Ok(())
    }

    /// Ends a rollout: users go back to who answered before, and the version is retired.
    fn give_up(&mut self, rollout: &mut Rollout, cause: String) -> Result<()> {
        let answered =
            transitions::share(self.follower.registry(), rollout.name(), rollout.version()) > 0.0;
        let own = rollout.clone();
        self.decide(|registry| transitions::give_up(registry, &own))?;
        rollout.cause = Some(cause.clone());
        rollout.settled = true;
        let now = transitions::main_version(self.follower.registry(), rollout.name());
        let text = match (answered, now) {
            (true, Some(now)) => format!("rolled back to {}: {cause}", now.version),
            (true, None) => format!("rolled back: {cause}"),
            (false, _) => format!("given up: {cause}"),
        };
        tracing::warn!(rollout = rollout.label(), cause, "a rollout has failed");
        rollout.go(
            if answered { RolloutStep::RolledBack } else { RolloutStep::Failed },
            now_ms(),
            text,
        );
        Ok(())
    }

    fn too_long(&mut self, rollout: &mut Rollout, state: String) -> Result<()> {
        let most_s = rollout.limits.step_most_s;
        if now_ms() - rollout.since_ms <= most_s as i64 * 1000 {
            return Ok(());
        }
        let step = rollout.step.word();
        self.give_up(rollout, format!("{step}: {state} in {most_s} s (rollout.step_most_s)"))
    }

    /// What the version did in its step, once it is loaded for it.
    fn look(&mut self, rollout: &mut Rollout) -> Result<Option<StepStats>> {
        let (name, version) = (rollout.name().to_owned(), rollout.version().to_owned());
        let (label, now) = (rollout.label(), Instant::now());
        let registry = self.follower.registry();
        let share = transitions::share(registry, &name, &version);
        let arm = self.tools.serving.arm(&name, &version);
        let arm = arm.filter(|arm| (arm.share - share).abs() < 1e-9);
        let watch = self
            .watches
            .entry(label)
            .or_insert_with(|| StepWatch::new(now, rollout.limits.window_s));
        let Some(arm) = arm else {
            if now - watch.began > LOAD {
                let why = self.tools.serving.problem();
                let why = why.unwrap_or_else(|| format!("not within {} s", LOAD.as_secs()));
                self.give_up(rollout, format!("it cannot be loaded: {why}"))?;
            }
            return Ok(None);
        };
        let own = watch.own.look(now, &arm.tally);
        let previous = rollout.previous.as_deref();
        let before = previous.and_then(|version| self.tools.serving.arm(&name, version));
        let before_us = before.and_then(|before| {
            let looked = watch.before.look(now, &before.tally);
            enough_times(&looked.window)
        });
        let limits = &rollout.limits;
        let answers = arm.share > 0.0;
        let mut cause = limits.faulty(&own.window).map(|cause| match arm.tally.said().pop() {
            Some((_, said)) => format!("{cause}; the last one: {said}"),
            None => cause,
        });
        // While it is the only one that answers, what the version before did is what it last did beside it.
        let beside = before_us.or(rollout.before_us);
        cause = cause.or_else(|| answers.then(|| limits.slow(&own.window, beside)).flatten());
        if cause.is_none() && answers && watch.judged.is_none_or(|at| now - at >= JUDGE) {
            watch.judged = Some(now);
            let slices = self.tools.serving.slices(&name, &version, previous);
            let held = match judge(&arm.expert, slices) {
                Verdict::Publish => None,
                Verdict::Hold(why) => Some(why),
                Verdict::RollBack(why) => {
                    cause = Some(format!("evaluate: {why}"));
                    None
                }
            };
            if held != watch.held
                && let Some(why) = &held
            {
                rollout.tell(now_ms(), format!("held: {why}"));
            }
            watch.held = held;
        }
        Ok(Some(StepStats {
            requests: own.whole.requests,
            faults: own.whole.faults,
            before_us,
            cause,
        }))
    }

    fn held(&self, rollout: &Rollout) -> Option<String> {
        self.watches.get(&rollout.label())?.held.clone()
    }
}

/// What a version did in its step.
struct StepStats {
    requests: u64,
    faults: u64,
    before_us: Option<f64>,
    /// Why it must go.
    cause: Option<String>,
}
