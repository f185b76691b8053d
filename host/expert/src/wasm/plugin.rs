//! A plugin: a component that was checked before any of its code ran, and the calls into it.
//!
//! Every call gets a fresh instance, so a fault leaves nothing behind. Results are checked here;
//! whether a network is valid is checked in `graph`. Each question at load is put to two instances,
//! which must return the same.

use std::fmt::Debug;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use wasmtime::{PoolConcurrencyLimitError, Store, Trap};

use super::check;
use super::contract::{
    ActionBatch, Contract, Description, Evaluation, EvaluationRows, HostInfo, NamedColumn, Network,
    Prediction, RankRequest, Ranked, TaskLabels, TrainingStep, Verdict, quote,
};
use super::contract2;
use super::engine::{self, Engine, HostState, InstanceSlot};
use super::fault::{Call, ExpertFault, Fault, overflows_own_stack, trace};
use super::guest::{Guest, GuestPre};
use super::usage::{GuestLog, LogRate, Usage, UsageSnapshot};
use crate::cpu_budget::{CpuBudget, GateConfig, LongCallRule, ThreadGate};
use crate::error::{CommonErrors as _, Error};

/// What a plugin may use. A description can ask for its own `rank` limits; the `_max` fields are
/// their upper bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// The deadline of a `rank` call if the description asks for none.
    pub deadline_ms: u32,
    /// The longest `rank` deadline that a description can ask for.
    pub deadline_max_ms: u32,
    /// The deadline of all other calls.
    pub hook_deadline_ms: u32,
    /// The linear memory of an instance if the description asks for none.
    pub memory_mib: u32,
    /// The largest memory that a description can ask for. The engine's pool limits it, too.
    pub memory_max_mib: u32,
    /// The size of one call's result in bytes.
    pub output_bytes: usize,
    /// The size of the component file in bytes.
    pub component_bytes: usize,
    /// The number of live instances of the plugin. The pool limits those of all plugins.
    pub instances: u32,
    /// The number of entries of a function table. The engine's pool limits it, too.
    pub table_elements: usize,
    /// Lines and bytes that it may log.
    pub log: LogRate,
    /// The threads that it may occupy if its calls are slow.
    pub gate: GateConfig,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            deadline_ms: 50,
            deadline_max_ms: 200,
            hook_deadline_ms: 2_000,
            memory_mib: 64,
            memory_max_mib: 256,
            output_bytes: 16 << 20,
            component_bytes: 64 << 20,
            instances: 16,
            table_elements: 10_000,
            log: LogRate { lines_per_s: 20, bytes_per_s: 8 << 10 },
            gate: GateConfig::default(),
        }
    }
}

/// The number of instances that a plugin keeps ready for `rank`, and of used ones that wait for
/// clearing.
const SPARE_INSTANCES: usize = 2;

/// The longest time in which an instance may be made ahead of its call. The guest's start function
/// runs in that time, and no call's deadline covers it.
const MAX_PREPARE_TIME: Duration = Duration::from_millis(5);

/// A checked component, ready to be instantiated.
pub struct Plugin {
    engine: Engine,
    pre: GuestPre,
    /// The name in messages: the file's, then the description's.
    name: Arc<str>,
    /// The name under which its log lines are kept, if that is not its own.
    log_name: Option<Arc<str>>,
    pub(crate) limits: Limits,
    rank_deadline_ms: u32,
    memory_mib: u32,
    usage: Arc<Usage>,
    live_instances: Arc<AtomicU32>,
    /// Limits the threads of its calls.
    pub(crate) gate: Arc<ThreadGate>,
    spares: Mutex<Spares>,
    /// Whether the last new instance failed or was slow. If so, none is made ahead.
    is_slow_to_start: AtomicBool,
}

/// Instances that wait, so that a request need not wait for making one or clearing its memory.
#[derive(Default)]
struct Spares {
    /// Fresh instances. Each serves one call.
    ready: Vec<(Store<HostState>, Guest)>,
    /// Used instances, whose memory has to be cleared.
    used: Vec<Store<HostState>>,
}

impl Plugin {
    /// Reads, checks and compiles the component at `path`. Runs no guest code.
    pub fn load(engine: &Engine, path: &Path, limits: &Limits) -> Result<Plugin, Error> {
        let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
        check::size(&file_name(path), size, limits.component_bytes)?;
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Plugin::from_file(engine, path, &bytes, limits)
    }

    /// As [`Plugin::load`], with the bytes that were read from `path`.
    pub fn from_file(
        engine: &Engine,
        path: &Path,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<Plugin, Error> {
        Plugin::from_bytes(engine, &file_name(path), bytes, limits)
    }

    /// Checks and compiles a component. `name` is used in messages until its description is known.
    pub fn from_bytes(
        engine: &Engine,
        name: &str,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<Plugin, Error> {
        check::size(name, bytes.len() as u64, limits.component_bytes)?;
        check::header(name, bytes)?;
        let refused = |rule: String, error: wasmtime::Error| {
            Error::refused(name, format!("{rule}: {error:#}"))
        };
        let component = engine
            .compile(bytes)
            .map_err(|error| refused("it is not a valid component".to_owned(), error))?;
        let contract = check::imports(name, engine, &component)?;
        let pre = GuestPre::new(&engine.inner.linker, &component, contract).map_err(|error| {
            refused(format!("it does not fit the expert contract {}", contract.version()), error)
        })?;
        let memory_mib = limits.memory_mib.min(engine.inner.config.memory_mib);
        Ok(Plugin {
            engine: engine.clone(),
            pre,
            name: name.into(),
            log_name: None,
            rank_deadline_ms: limits.deadline_ms,
            memory_mib,
            usage: Arc::new(Usage::new(limits.log)),
            live_instances: Arc::default(),
            gate: Arc::default(),
            limits: limits.clone(),
            spares: Mutex::default(),
            is_slow_to_start: AtomicBool::new(false),
        })
    }

    /// Keeps its log lines under the name of the expert from here on.
    pub(crate) fn keep_log_under(&mut self, registered: &str) {
        self.log_name = Some(registered.into());
    }

    /// The last log lines of all guests of its engine, by the names of their experts.
    pub fn log(&self) -> Arc<GuestLog> {
        self.engine.inner.log.clone()
    }

    /// The resources used since it was loaded.
    pub fn usage(&self) -> UsageSnapshot {
        self.usage.snapshot()
    }

    /// The version of the contract that it was built for.
    pub fn contract(&self) -> Contract {
        self.pre.contract()
    }

    /// Leaves out of a schema what the plugin's contract cannot express. The plugin is told what is
    /// left, and its columns and network are checked against it.
    pub fn limit(&self, info: &mut HostInfo) {
        if self.contract() == Contract::Second {
            contract2::limit(info);
        }
    }

    /// Calls `describe`, and does not check yet whether the host has what the description asks for.
    pub fn declared(&self, info: &HostInfo) -> Result<Description, Error> {
        let description =
            self.twice(Call::Describe, |guest, store| match guest.check_hooks(store) {
                Ok(()) => guest.describe(store, info),
                Err(why) => Ok(Err(why)),
            })?;
        description.map_err(|why| Error::refused(&self.name, why))
    }

    /// Calls `describe` and checks the description. Its name and limits apply to later calls.
    pub fn describe(&mut self, info: &HostInfo) -> Result<Description, Error> {
        let description = self.declared(info)?;
        check::description(&description, info).map_err(|why| Error::refused(&self.name, why))?;
        self.name = description.name.as_str().into();
        let asked = description.limits;
        if asked.deadline_ms > 0 {
            self.rank_deadline_ms = asked.deadline_ms.min(self.limits.deadline_max_ms);
        }
        if asked.memory_mib > 0 {
            let max = self.limits.memory_max_mib.min(self.engine.inner.config.memory_mib);
            self.memory_mib = asked.memory_mib.min(max);
        }
        Ok(description)
    }

    /// Calls `network`. Its result is checked in `graph`, not here.
    pub fn network(&self, info: &HostInfo) -> Result<Network, Error> {
        let network = self.twice(Call::Network, |guest, store| guest.network(store, info))?;
        network.map_err(|why| {
            let why = format!("its network does not fit this schema: {}", quote(&why));
            Error::refused(&self.name, why)
        })
    }

    /// Calls two fresh instances, which must return the same, because training and serving call
    /// other instances in other processes.
    fn twice<T: Debug>(
        &self,
        call: Call,
        f: impl Fn(&Guest, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, Error> {
        let (first, second) = (self.run(call, &f)?, self.run(call, &f)?);
        agree(&first, &second).map_err(|why| self.fault(call, Fault::BadOutput(why)))?;
        Ok(first)
    }

    /// Ranks the request's candidates in a fresh instance, if possible one that
    /// [`Plugin::prepare`] made.
    ///
    /// The result has at most `request.limit` entries, best first, with distinct candidates and
    /// finite scores.
    pub fn rank(
        &self,
        request: &RankRequest,
        predictions: &[Prediction],
        columns: &[NamedColumn],
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let ready = self.spares().ready.pop();
        let mut instance = match ready {
            Some((store, guest)) => Instance { plugin: self, store, guest },
            None => {
                let start = Instant::now();
                let instance = self.instance(Call::Rank)?;
                self.is_slow_to_start.store(start.elapsed() > MAX_PREPARE_TIME, Ordering::Relaxed);
                instance
            }
        };
        let ranked = instance.rank(request, predictions, columns);
        let mut spares = self.spares();
        if spares.used.len() < SPARE_INSTANCES {
            spares.used.push(instance.store);
        }
        ranked
    }

    /// Clears used instances and makes new ones. Called between requests, it takes over most of the
    /// cost of a fresh instance a call. If an instance cannot be made, or only slowly, the next
    /// `rank` makes it under its own deadline, and no more are made ahead until that is fast again.
    pub fn prepare(&self) {
        self.clear();
        while self.spares().ready.len() < SPARE_INSTANCES.min(self.limits.instances as usize)
            && !self.is_slow_to_start.load(Ordering::Relaxed)
            && self.engine.has_room()
        {
            let start = Instant::now();
            let made = self.instance(Call::Rank);
            self.is_slow_to_start
                .store(made.is_err() || start.elapsed() > MAX_PREPARE_TIME, Ordering::Relaxed);
            let Ok(Instance { store, guest, .. }) = made else { return };
            self.spares().ready.push((store, guest));
        }
    }

    fn clear(&self) {
        // They are dropped when the lock is free again.
        let used = std::mem::take(&mut self.spares().used);
        drop(used);
    }

    fn spares(&self) -> MutexGuard<'_, Spares> {
        self.spares.lock().expect("no holder panics")
    }

    /// Calls `labels`: turns joined outcomes into labels, sample space and weights, with one entry
    /// for each task of `description`, in its order.
    pub fn labels(
        &self,
        description: &Description,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> Result<Vec<TaskLabels>, ExpertFault> {
        let call = Call::Labels;
        let labels = self.run(call, |guest, store| guest.labels(store, info, batch))?;
        let labels = labels.map_err(|why| self.fault(call, Fault::Refused(quote(&why))))?;
        check::labels(labels, &description.tasks, batch.surface.len())
            .map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// The most bytes of an instance's linear memory.
    pub(crate) fn memory_limit(&self) -> usize {
        (self.memory_mib as usize) << 20
    }

    /// Whether it has the hook `weights`.
    pub fn weighs(&self) -> bool {
        self.pre.weighs()
    }

    /// Calls `weights`: a factor of the loss weights of each row, for each task of `description` in
    /// its order, empty where all are 1.
    pub fn weights(
        &self,
        description: &Description,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> Result<Vec<Vec<f32>>, ExpertFault> {
        let call = Call::Weights;
        let weights = self.run(call, |guest, store| guest.weights(store, info, batch))?;
        let weights = weights.map_err(|why| self.fault(call, Fault::Refused(quote(&why))))?;
        check::weights(weights, &description.tasks, batch.surface.len())
            .map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// Calls `sample`: the probability, in 0..=1, to keep each example.
    pub fn sample(&self, info: &HostInfo, batch: &ActionBatch) -> Result<Vec<f32>, ExpertFault> {
        let call = Call::Sample;
        let keep = self.run(call, |guest, store| guest.sample(store, info, batch))?;
        check::sample(keep, batch.surface.len())
            .map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// Calls `schedule`: a factor, in 0..=10, of a training step's learning rate.
    pub fn schedule(&self, step: TrainingStep) -> Result<f32, ExpertFault> {
        let call = Call::Schedule;
        let factor = self.run(call, |guest, store| guest.schedule(store, step))?;
        check::factor(factor).map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// Calls `evaluate`: whether trained parameters may serve. A reason is escaped and cut.
    pub fn evaluate(
        &self,
        info: &HostInfo,
        evaluation: &Evaluation,
    ) -> Result<Verdict, ExpertFault> {
        let verdict =
            self.run(Call::Evaluate, |guest, store| guest.evaluate(store, info, evaluation));
        verdict.map(check::verdict)
    }

    /// Whether it has the hook `evaluate-rows`.
    pub fn evaluates_rows(&self) -> bool {
        self.pre.evaluates_rows()
    }

    /// Calls `evaluate-rows`, or `evaluate` of a plugin without it.
    pub fn evaluate_rows(
        &self,
        info: &HostInfo,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Verdict, ExpertFault> {
        let verdict = self
            .run(Call::Evaluate, |guest, store| guest.evaluate_rows(store, info, evaluation, rows));
        verdict.map(check::verdict)
    }

    /// Whether it has the hook `validation-score`.
    pub fn scores_passes(&self) -> bool {
        self.pre.scores_passes()
    }

    /// Calls `validation-score`: how good a pass of training was, higher is better; none if the
    /// plugin leaves that to the host.
    pub fn validation_score(
        &self,
        info: &HostInfo,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, ExpertFault> {
        let call = Call::ValidationScore;
        let score =
            self.run(call, |guest, store| guest.validation_score(store, info, evaluation, rows))?;
        let score = score.map_err(|why| self.fault(call, Fault::Refused(quote(&why))))?;
        check::score(score).map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// Makes one call in a fresh instance.
    fn run<T>(
        &self,
        call: Call,
        f: impl FnOnce(&Guest, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, ExpertFault> {
        self.instance(call)?.run(call, f)
    }

    /// Makes a fresh instance under the deadline of `call`.
    pub fn instance(&self, call: Call) -> Result<Instance<'_>, ExpertFault> {
        let start = Instant::now();
        let mut store = engine::store(&self.engine.inner.engine, self.state(call)?);
        store.set_hostcall_fuel(self.limits.output_bytes);
        self.begin(&mut store, call);
        let made = self.pre.instantiate(&mut store);
        self.usage.instance(start.elapsed());
        match made {
            Ok(guest) => Ok(Instance { plugin: self, store, guest }),
            Err(error) => Err(self.classify(call, &error, store.data())),
        }
    }

    /// The state of a new instance, if the plugin may have one more.
    fn state(&self, call: Call) -> Result<HostState, ExpertFault> {
        let max = self.limits.instances;
        let slot = InstanceSlot::take(&self.live_instances, max).or_else(|| {
            // Used instances that were not cleared yet count, too.
            self.clear();
            InstanceSlot::take(&self.live_instances, max)
        });
        let slot = slot.ok_or_else(|| {
            self.fault(call, Fault::Busy(format!("all of its {max} instances are in use")))
        })?;
        Ok(HostState {
            plugin: self.name.clone(),
            log_name: self.log_name.clone().unwrap_or_else(|| self.name.clone()),
            memory_limit: self.memory_limit(),
            table_limit: self.limits.table_elements,
            usage: self.usage.clone(),
            log: self.engine.inner.log.clone(),
            last_error: None,
            memory_denied: false,
            table_denied: false,
            memory_bytes: 0,
            budget: None,
            _slot: slot,
        })
    }

    /// Starts a call in the store with its deadline.
    fn begin(&self, store: &mut Store<HostState>, call: Call) {
        store.data_mut().last_error = None;
        let gate = (call == Call::Rank).then(|| self.gate.clone());
        let rule = LongCallRule { gate, slow_ms: self.limits.gate.slow_ms };
        // One tick more, because the current one may end at once.
        let (budget, first) = CpuBudget::begin(u64::from(self.deadline_ms(call)) + 1, rule);
        store.data_mut().budget = Some(budget);
        store.set_epoch_deadline(first);
    }

    fn deadline_ms(&self, call: Call) -> u32 {
        if call == Call::Rank { self.rank_deadline_ms } else { self.limits.hook_deadline_ms }
    }

    fn fault(&self, call: Call, cause: Fault) -> ExpertFault {
        ExpertFault::new(&self.name, call, cause)
    }

    fn classify(&self, call: Call, error: &wasmtime::Error, state: &HostState) -> ExpertFault {
        let memory = Fault::Memory(self.memory_mib);
        let cause = match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => Fault::Deadline(self.deadline_ms(call)),
            Some(Trap::StackOverflow) => Fault::StackOverflow,
            Some(Trap::MemoryOutOfBounds) if overflows_own_stack(error) => Fault::StackOverflow,
            // A Rust guest that is denied memory aborts, which is a trap.
            _ if state.memory_denied => memory,
            _ if state.table_denied => Fault::Table(self.limits.table_elements),
            // A guest of the SDK logs a panic's message and place before it traps.
            Some(trap) => Fault::Trap(match &state.last_error {
                Some(message) => message.clone(),
                None => trap.to_string().trim_start_matches("wasm trap: ").to_owned(),
            }),
            None if error.is::<PoolConcurrencyLimitError>() => {
                Fault::Busy(format!("the instance pool is full: {error}"))
            }
            None if error.root_cause().to_string().contains("allocated for hostcalls") => {
                Fault::BadOutput(format!("more than {} bytes of output", self.limits.output_bytes))
            }
            // All other errors are values that violate the canonical ABI.
            None => Fault::BadOutput(quote(&error.root_cause().to_string())),
        };
        ExpertFault { trace: trace(error), ..self.fault(call, cause) }
    }
}

/// A plugin's name before its description is known.
fn file_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or(path.as_os_str());
    stem.to_string_lossy().into_owned()
}

/// Checks that two results are equal, by their text, because NaN equals NaN there.
fn agree<T: Debug>(first: &T, second: &T) -> Result<(), String> {
    if format!("{first:?}") == format!("{second:?}") {
        Ok(())
    } else {
        Err("two fresh instances returned different results; a result may depend on nothing but \
             the call's arguments"
            .to_owned())
    }
}

/// An instance of a plugin. It must not be used after a fault. Each call of [`Plugin`] uses a fresh
/// one.
pub struct Instance<'a> {
    plugin: &'a Plugin,
    store: Store<HostState>,
    guest: Guest,
}

impl Instance<'_> {
    /// The size of its linear memory in bytes. Memory never shrinks, so this is what its calls
    /// needed.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory_bytes
    }

    /// Like [`Plugin::rank`], in this instance.
    pub fn rank(
        &mut self,
        request: &RankRequest,
        predictions: &[Prediction],
        columns: &[NamedColumn],
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let call = Call::Rank;
        let ranked =
            self.run(call, |guest, store| guest.rank(store, request, predictions, columns))?;
        let ranked = ranked.map_err(|why| self.plugin.fault(call, Fault::Refused(quote(&why))))?;
        check::ranked(&ranked, request.candidates.len(), request.limit as usize)
            .map_err(|why| self.plugin.fault(call, Fault::BadOutput(why)))?;
        Ok(ranked)
    }

    fn run<T>(
        &mut self,
        call: Call,
        f: impl FnOnce(&Guest, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, ExpertFault> {
        self.plugin.begin(&mut self.store, call);
        let start = Instant::now();
        let answer = f(&self.guest, &mut self.store);
        self.plugin.usage.call(call, start.elapsed());
        self.store.data_mut().budget = None;
        answer.map_err(|error| self.plugin.classify(call, &error, self.store.data()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_differ_anywhere_do_not_agree() {
        assert!(agree(&vec![1.0f32, f32::NAN], &vec![1.0f32, f32::NAN]).is_ok());
        assert!(agree(&vec![1.0f32], &vec![1.0f32 + f32::EPSILON]).is_err());
        assert!(agree(&Ok::<_, String>(1), &Err::<i32, _>("1".to_owned())).is_err());
    }
}
