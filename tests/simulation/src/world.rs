//! The run of a plan: what is due at which time, and the processes that it happens to.
//!
//! Everything runs in one thread. A process does one step at a time, and while a step sleeps, the
//! steps of other processes that are due by then run within it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    rc::Rc,
    time::Duration,
};

use hypercast_core::{hash::mix_parts, simulated};

use crate::{
    disk::DiskCopy,
    host::{ArmedFault, EPOCH_MS, Machine, ProcessHost, SimulatedCrash, SimulatedTime},
    installation::{self, Life},
    ledger::{GapsSeen, Ledger, Violation},
    log,
    lost_decisions::LostDecisions,
    oracles,
    plan::{FaultKind, Layout, Plan, ROLES, Role},
    plant::Plant,
    pushes::{self, PushCall, daemon_of},
    rollouts,
    rot::RottenBit,
    server::{Network, Server},
    work::{self, DiskWork, StreamWork},
    workload::{self, IngestCall},
};

thread_local! {
    static CURRENT: RefCell<Option<Rc<Simulation>>> = const { RefCell::new(None) };
}

/// A simulation, from its plan to what became of it.
pub struct Simulation {
    /// What happens in it.
    pub plan: Plan,
    /// Its time.
    pub timeline: Rc<SimulatedTime>,
    /// The processes, in the order of [`ROLES`].
    pub processes: Vec<Process>,
    /// The stream server.
    pub server: RefCell<Server>,
    /// What callers sent, and what they were told.
    pub ledger: RefCell<Ledger>,
    /// How often each kind of fault took effect, by the process that it hit.
    pub struck: RefCell<BTreeMap<(&'static str, Role), u64>>,
    /// A fault in the host's own parts, which the oracles must find.
    pub plant: Option<Plant>,
    /// What callers send; the last call is made once everything is repaired.
    pub calls: Vec<IngestCall>,
    /// What teams push.
    pub pushes: Vec<PushCall>,
    queue: RefCell<BTreeMap<(Duration, u64), Due>>,
    queued: Cell<u64>,
    /// Whether nothing breaks any more, and nobody decides anything new.
    pub healed: Cell<bool>,
    /// Whether the operator has decided that processes go on where records are missing.
    pub gaps_accepted: Cell<bool>,
    pub(crate) furthest_ahead_ms: Cell<i64>,
    /// Bits that have flipped, until somebody deals with their files.
    pub(crate) rotten: RefCell<Vec<RottenBit>>,
    /// Decisions that the server has lost, until somebody restores them.
    pub(crate) lost_decisions: RefCell<Option<LostDecisions>>,
    /// Copies of states, by the number of the fault that puts them back.
    pub(crate) copies: RefCell<BTreeMap<usize, DiskCopy>>,
}

/// A process in all its lives.
pub struct Process {
    /// What it runs.
    pub role: Role,
    /// Where it runs.
    pub machine: Rc<Machine>,
    /// Its way to the server.
    pub network: Network,
    /// What it holds while it runs. Borrowed while it does a step.
    pub life: RefCell<Option<Life>>,
    /// How often it was started.
    pub lives: Cell<u64>,
    /// Its steps in all lives.
    pub steps: Cell<u64>,
    /// Its work in the lives before.
    pub work: Cell<DiskWork>,
    /// What it did with streams.
    pub streams: RefCell<StreamWork>,
    pub(crate) host: RefCell<Option<Rc<ProcessHost>>>,
    /// Whether it shall run.
    pub(crate) wanted: Cell<bool>,
    /// Whether it shall be stopped in order.
    pub(crate) stopping: Cell<bool>,
    /// Whether an earlier version of the host has run until then.
    pub(crate) leaves_earlier_states: Cell<bool>,
    /// Faults that wait until it runs.
    pub(crate) waiting: RefCell<Vec<ArmedFault>>,
    drawn: Cell<u64>,
}

/// Something that happens at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Due {
    Step(usize),
    Call { number: usize, again: bool },
    Push { number: usize, again: bool },
    Fault(usize),
    PutBack(usize),
    EndOfSecondJoiner,
}

/// How a step ended.
pub(crate) enum Stepped {
    Went { busy: bool },
    Failed(String),
    Crashed,
    Panicked(String),
}

impl Simulation {
    /// The simulation that this thread runs.
    ///
    /// # Panics
    /// There is none.
    pub fn current() -> Rc<Simulation> {
        CURRENT.with_borrow(|world| world.clone().expect("a simulation runs"))
    }

    /// Runs a plan to its end, and then without faults until all is at rest; for some seeds, also
    /// what shows how work grows.
    pub fn run(plan: &Plan, plant: Option<Plant>, keep_trace: bool) -> Rc<Simulation> {
        let world = Simulation::run_alone(plan, plant, keep_trace);
        work::check_growth(&world);
        world
    }

    /// As [`Simulation::run`], this plan alone.
    pub fn run_alone(plan: &Plan, plant: Option<Plant>, keep_trace: bool) -> Rc<Simulation> {
        let _logs = log::collect();
        rollouts::wasm();
        let world = Rc::new(Simulation::new(plan, plant));
        if keep_trace {
            world.timeline.trace.keep();
        }
        CURRENT.set(Some(world.clone()));
        let within = Rc::downgrade(&world);
        *world.timeline.meanwhile.borrow_mut() = Some(Rc::new(move |until| {
            if let Some(world) = within.upgrade() {
                world.run_until(until);
            }
        }));
        for process in 0..world.processes.len() {
            world.schedule(Duration::ZERO, Due::Step(process));
        }
        let (_, during) = world.calls.split_last().expect("there is a last one");
        for (number, call) in during.iter().enumerate() {
            let due = Due::Call { number, again: false };
            world.schedule(Duration::from_millis(call.at_ms), due);
        }
        for (number, push) in world.pushes.iter().enumerate() {
            let due = Due::Push { number, again: false };
            world.schedule(Duration::from_millis(push.at_ms), due);
        }
        for (number, fault) in plan.faults.iter().enumerate() {
            world.schedule(Duration::from_millis(fault.at_ms), Due::Fault(number));
        }
        world.run_until(Duration::from_secs(plan.settings.duration_s));
        world.come_to_rest();
        oracles::check(&world);
        world.processes.iter().for_each(|process| world.end_life(process));
        CURRENT.set(None);
        world
    }

    fn new(plan: &Plan, plant: Option<Plant>) -> Simulation {
        let machine = |at: usize| {
            let machine = Machine::default();
            machine.clock_ahead_ms.set(plan.settings.machines_ahead_ms[at.min(1)]);
            installation::copy_dataset(&mut machine.disk.borrow_mut());
            machine.disk.borrow_mut().lie = plant.and_then(Plant::disk_lie);
            Rc::new(machine)
        };
        let machines: Vec<Rc<Machine>> = match plan.layout {
            Layout::Directory => vec![machine(0); ROLES.len()],
            Layout::Server => {
                let mut machines: Vec<Rc<Machine>> = (0..ROLES.len()).map(machine).collect();
                let at = |of: Role| ROLES.iter().position(|&role| role == of);
                let [logs, expert] = [Role::LoggingTier, Role::ExpertTrainer].map(at);
                machines[expert.expect("a role")] = machines[logs.expect("a role")].clone();
                machines
            }
        };
        let process = |(role, machine): (Role, &Rc<Machine>)| Process {
            role,
            machine: machine.clone(),
            network: Network::default(),
            life: RefCell::default(),
            lives: Cell::new(0),
            steps: Cell::new(0),
            work: Cell::default(),
            streams: RefCell::default(),
            host: RefCell::default(),
            wanted: Cell::new(match role {
                Role::Daemon | Role::Trainer | Role::LoggingTier | Role::ExpertTrainer => true,
                Role::Joiner => !plan.settings.join_in_daemon,
                Role::SecondJoiner => false,
                Role::ExpertDaemon | Role::SecondExpertDaemon => {
                    plan.pushes.iter().any(|&push| daemon_of(push) == role)
                }
            }),
            stopping: Cell::new(false),
            leaves_earlier_states: Cell::new(false),
            waiting: RefCell::default(),
            drawn: Cell::new(0),
        };
        let calls = workload::calls(plan);
        Simulation {
            plan: plan.clone(),
            timeline: Rc::default(),
            processes: ROLES.into_iter().zip(&machines).map(process).collect(),
            server: RefCell::new(Server::new(plan.settings.remembered_ids, plant)),
            ledger: RefCell::new(Ledger::new(calls.len())),
            struck: RefCell::default(),
            plant,
            calls,
            pushes: pushes::calls(plan),
            queue: RefCell::default(),
            queued: Cell::new(0),
            healed: Cell::new(false),
            gaps_accepted: Cell::new(!plan.settings.stops_at_gaps),
            furthest_ahead_ms: Cell::new(0),
            rotten: RefCell::default(),
            lost_decisions: RefCell::default(),
            copies: RefCell::default(),
        }
    }

    /// The server's clock, in milliseconds since 1970.
    pub fn server_ms(&self) -> i64 {
        let ahead_ms = self.plan.settings.machines_ahead_ms[2];
        EPOCH_MS + self.timeline.now.get().as_millis() as i64 + ahead_ms
    }

    /// A number below a bound, by chance, for a process.
    pub fn draw(&self, process: usize, bound: u64) -> u64 {
        let drawn = &self.processes[process].drawn;
        drawn.update(|count| count + 1);
        mix_parts(&[self.plan.seed, 2, process as u64, drawn.get()]) % bound.max(1)
    }

    /// The process of a role.
    pub fn process(&self, role: Role) -> (usize, &Process) {
        let mut processes = self.processes.iter().enumerate();
        processes.find(|(_, process)| process.role == role).expect("all roles are there")
    }

    /// Notes that a promise was broken.
    pub fn violate(&self, oracle: &'static str, what: String) {
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "oracle", || format!("{oracle}: {what}"));
        self.ledger.borrow_mut().violations.push(Violation { oracle, what });
    }

    /// Runs something on a new host of a machine, which no fault hits.
    pub fn observe<T>(&self, machine: &Rc<Machine>, run: impl FnOnce() -> T) -> T {
        let host = ProcessHost::new("observer", machine, &self.timeline, self.plan.seed);
        let said = log::take();
        let entered = simulated::enter(Rc::new(host));
        let made = run();
        drop(entered);
        log::put_back(said);
        made
    }

    pub(crate) fn schedule(&self, after: Duration, due: Due) {
        self.queued.update(|count| count + 1);
        let at = self.timeline.now.get() + after;
        self.queue.borrow_mut().insert((at, self.queued.get()), due);
    }

    pub(crate) fn run_until(&self, until: Duration) {
        loop {
            let mut queue = self.queue.borrow_mut();
            let Some(entry) = queue.first_entry().filter(|entry| entry.key().0 <= until) else {
                break;
            };
            let ((at, _), due) = entry.remove_entry();
            drop(queue);
            self.timeline.now.set(at.max(self.timeline.now.get()));
            match due {
                Due::Step(process) => self.step(process),
                Due::Call { number, again } => self.call(number, again),
                Due::Push { number, again } => self.push(number, again),
                Due::Fault(number) => self.begin_fault(number),
                Due::PutBack(number) => self.put_back(number),
                Due::EndOfSecondJoiner => self.processes[2].wanted.set(false),
            }
        }
        self.timeline.now.set(until.max(self.timeline.now.get()));
    }

    fn step(&self, number: usize) {
        let process = &self.processes[number];
        let Ok(mut life) = process.life.try_borrow_mut() else {
            // It sleeps, and this runs within that.
            return self.schedule(Duration::from_millis(10), Due::Step(number));
        };
        let is_gone = process.host.borrow().as_ref().is_some_and(|host| host.is_gone());
        if is_gone || (!process.wanted.get() && life.is_some()) {
            drop(life);
            self.end_life(process);
            let pause = 1000 + self.draw(number, 10_000);
            return self.schedule(Duration::from_millis(pause), Due::Step(number));
        }
        if !process.wanted.get() {
            return self.schedule(Duration::from_secs(1), Due::Step(number));
        }
        let host = self.host(number);
        host.armed.borrow_mut().append(&mut process.waiting.borrow_mut());
        process.steps.update(|steps| steps + 1);
        let gaps_before = GapsSeen::of(process, &life);
        let joined = life.as_ref().and_then(Life::joined);
        let is_start = life.is_none();
        let rotten = if is_start { self.rotten_states(process) } else { Vec::new() };
        let stepped = self.run_on(&host, || match life.take() {
            None => {
                process.streams.borrow_mut().begin_life();
                *life = Some(Life::open(&self.plan, self.plant, number)?);
                Ok(true)
            }
            Some(running) if process.stopping.take() => running.stop().map(|()| false),
            Some(running) => life.insert(running).step(),
        });
        self.count_faults(process.role, &host);
        if let Stepped::Went { .. } = stepped {
            self.check_gaps(process, gaps_before, GapsSeen::of(process, &life));
            for path in rotten {
                let path = path.display().to_string();
                if !host.said.borrow().iter().any(|line| line.contains(&path)) {
                    self.violate("rot", format!("{:?} reads {path} without a word", process.role));
                }
            }
            if let Some(life) = life.as_ref().filter(|_| !is_start) {
                let failures = self.disk_failures(process.role);
                process.streams.borrow_mut().step_ended(life, &self.plan, failures);
            }
        }
        let stopped = life.is_none();
        drop(life);
        let pause_ms = match stepped {
            Stepped::Went { .. } if stopped => {
                self.end_life(process);
                if process.leaves_earlier_states.take() {
                    self.leave_earlier_states(process, joined);
                }
                1000
            }
            Stepped::Went { busy: true } => 5 + self.draw(number, 40),
            Stepped::Went { busy: false } => 100 + self.draw(number, 900),
            Stepped::Crashed => {
                self.end_life(process);
                1000 + self.draw(number, 10_000)
            }
            Stepped::Failed(error) => {
                let now = self.timeline.now.get();
                self.timeline.trace.line(now, &host.name, || format!("fails: {error}"));
                // It may not know yet what the operator has decided, and is to be started again.
                let is_to_stop = process.stopping.get();
                self.end_life(process);
                if !self.repair(process, &error) && self.healed.get() && !is_to_stop {
                    self.violate("at rest", format!("{:?} fails: {error}", process.role));
                }
                1000 + self.draw(number, 20_000)
            }
            Stepped::Panicked(why) => {
                self.violate("no surprise", format!("{:?} panics: {why}", process.role));
                self.end_life(process);
                1000
            }
        };
        self.schedule(Duration::from_millis(pause_ms), Due::Step(number));
    }

    /// The host of a process's life; a new one if it has ended.
    fn host(&self, number: usize) -> Rc<ProcessHost> {
        let process = &self.processes[number];
        let new = || {
            process.lives.update(|lives| lives + 1);
            let lives = process.lives.get();
            let name = format!("{:?}.{lives}", process.role);
            let seed = mix_parts(&[self.plan.seed, 3, number as u64, lives]);
            Rc::new(ProcessHost::new(&name, &process.machine, &self.timeline, seed))
        };
        process.host.borrow_mut().get_or_insert_with(new).clone()
    }

    pub(crate) fn run_on(
        &self,
        host: &Rc<ProcessHost>,
        run: impl FnOnce() -> Result<bool, String>,
    ) -> Stepped {
        host.slept.set(Duration::ZERO);
        let of_others = log::take();
        let entered = simulated::enter(host.clone());
        let ran = panic::catch_unwind(AssertUnwindSafe(run));
        drop(entered);
        self.hear(host, log::take());
        log::put_back(of_others);
        match ran {
            Ok(Ok(busy)) => Stepped::Went { busy },
            Ok(Err(error)) => Stepped::Failed(error),
            Err(panicked) if panicked.is::<SimulatedCrash>() => Stepped::Crashed,
            Err(panicked) => {
                let words = panicked.downcast_ref::<String>().cloned();
                let word = panicked.downcast_ref::<&str>().map(ToString::to_string);
                Stepped::Panicked(words.or(word).unwrap_or_default())
            }
        }
    }

    /// An operator reads what a process has logged.
    fn hear(&self, host: &Rc<ProcessHost>, said: Vec<String>) {
        let said = if self.plant == Some(Plant::LogsUnread) { Vec::new() } else { said };
        let now = self.timeline.now.get();
        for line in &said {
            self.timeline.trace.line(now, &host.name, || format!("logs {line}"));
            self.mend_rot(&host.machine, line);
            self.mend_decisions(line);
        }
        host.said.replace(said);
    }

    /// Drops what a process holds, without effect on its disk but that locks are released.
    fn end_life(&self, process: &Process) {
        let Some(host) = process.host.borrow_mut().take() else { return };
        host.ended.set(true);
        let entered = simulated::enter(host.clone());
        drop(process.life.borrow_mut().take());
        drop(entered);
        process.work.update(|work| work.and(host.work.take()));
        let excess = process.streams.borrow_mut().end_life(process.role, &self.plan);
        if let Some(excess) = excess {
            self.violate("read once", excess);
        }
        self.count_faults(process.role, &host);
    }

    /// Ends a process in order at the end of a run, so that its disk has all that it did; false if
    /// it cannot.
    pub(crate) fn finish(&self, number: usize) -> bool {
        let process = &self.processes[number];
        process.wanted.set(false);
        let life = process.life.borrow_mut().take();
        let host = self.host(number);
        let stopped = self.run_on(&host, || {
            life.ok_or_else(|| "it does not run".to_owned())?.stop().map(|()| true)
        });
        self.end_life(process);
        match stopped {
            Stepped::Went { .. } => true,
            Stepped::Failed(error) | Stepped::Panicked(error) => {
                self.violate("at rest", format!("{:?} cannot stop: {error}", process.role));
                false
            }
            Stepped::Crashed => false,
        }
    }

    /// Holds what a step met in the stream of events against what it told of it, and against
    /// `engine.on_gap`.
    fn check_gaps(&self, process: &Process, before: Option<GapsSeen>, after: Option<GapsSeen>) {
        let (Some(before), Some(after)) = (before, after) else { return };
        if after.met > before.met && after.told == before.told {
            self.violate("gaps", format!("{:?} passes a gap without a word", process.role));
        }
        if after.told > before.told && after.is_to_stop {
            self.violate("gaps", format!("{:?} goes on behind a gap", process.role));
        }
    }

    /// How often an operation on a process's disk failed.
    fn disk_failures(&self, role: Role) -> u64 {
        let struck = self.struck.borrow();
        let failed = |kind: &str| kind.starts_with("bad ") || kind == "full disk";
        struck.iter().filter(|((kind, on), _)| *on == role && failed(kind)).map(|(_, n)| n).sum()
    }

    pub(crate) fn count_faults(&self, role: Role, host: &ProcessHost) {
        let mut struck = self.struck.borrow_mut();
        for fault in host.struck.borrow_mut().drain(..) {
            let kind = FaultKind::Disk { fault, spared: 0, hits: 0 };
            *struck.entry((kind.name(), role)).or_default() += 1;
        }
    }

    /// A caller makes a call, again and again until it is acknowledged.
    fn call(&self, number: usize, again: bool) {
        let call = &self.calls[number];
        let retry = |ms: u64| {
            self.schedule(Duration::from_millis(ms), Due::Call { number, again });
        };
        let process = &self.processes[0];
        let Ok(life) = process.life.try_borrow_mut() else { return retry(20) };
        let host = process.host.borrow().clone().filter(|host| !host.is_gone());
        let ingest = life.as_ref().and_then(|life| life.ingest.as_ref());
        let (Some(host), Some(ingest)) = (host, ingest) else {
            return retry(1000 + self.draw(0, 3000));
        };
        self.ledger.borrow_mut().attempt(number, call);
        let mut receipt = None;
        let stepped = self.run_on(&host, || {
            // As the daemon does before it appends.
            if call.latest_ms > ingest.latest_ms() {
                return Err("the caller's clock is ahead".to_owned());
            }
            let appended = ingest.append(call.events.clone(), call.events.len());
            receipt = Some(appended.map_err(|error| error.to_string())?);
            Ok(true)
        });
        drop(life);
        self.count_faults(process.role, &host);
        match (stepped, receipt) {
            (_, Some(receipt)) => {
                let mut ledger = self.ledger.borrow_mut();
                let problem = ledger.acknowledge(number, call, receipt, &self.plan);
                drop(ledger);
                if let Some(problem) = problem {
                    self.violate("known ids", problem);
                }
                if let Some(after_ms) = call.again_after_ms.filter(|_| !again) {
                    let due = Due::Call { number, again: true };
                    self.schedule(Duration::from_millis(after_ms), due);
                }
            }
            (Stepped::Panicked(why), None) => {
                self.violate("no surprise", format!("ingest panics: {why}"));
            }
            (Stepped::Failed(error), None) => {
                let now = self.timeline.now.get();
                self.timeline.trace.line(now, &host.name, || format!("refuses a call: {error}"));
                self.repair(process, &error);
                retry(500 + self.draw(0, 5000));
            }
            _ => retry(500 + self.draw(0, 5000)),
        }
    }

    /// Repairs everything, starts all processes anew, and lets time pass until every window is
    /// closed.
    fn come_to_rest(&self) {
        for process in &self.processes {
            process.machine.clock_ahead_ms.set(0);
            process.waiting.borrow_mut().clear();
            process.stopping.set(false);
            process.leaves_earlier_states.set(false);
            process.network.cut_until.set(Duration::ZERO);
            process.network.lost_requests.set(0);
            process.network.lost_answers.set(0);
            self.end_life(process);
        }
        self.copies.borrow_mut().clear();
        // What nobody has read yet is restored before it is missed.
        self.end_rot();
        self.restore_decisions();
        self.processes[2].wanted.set(false);
        // Clocks that were ahead have shown times that are still to come. Windows of then close
        // when they have come.
        let ahead_ms = self.furthest_ahead_ms.get().max(0)
            + self.plan.settings.machines_ahead_ms.iter().map(|ms| ms.abs()).sum::<i64>()
            + self.plan.settings.callers_ahead_ms;
        self.timeline.now.update(|now| now + Duration::from_millis(ahead_ms.unsigned_abs()));
        self.healed.set(true);
        // Without an event a daemon that does not join does not tick.
        let last = Due::Call { number: self.calls.len() - 1, again: false };
        self.schedule(Duration::from_secs(5), last);
        let quiet = Duration::from_secs(self.plan.settings.max_window_s + 150);
        let begun = self.timeline.now.get();
        self.run_until(begun + Duration::from_secs(30));
        for _ in 0..100 {
            if self.ledger.borrow().all_acknowledged() {
                break;
            }
            self.run_until(self.timeline.now.get() + Duration::from_secs(30));
        }
        self.run_until(self.timeline.now.get() + quiet);
    }
}
