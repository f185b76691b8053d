//! A plugin: a component that was checked before any of its code ran, and the
//! calls into it.
//!
//! Every call makes a fresh instance, so a fault leaves nothing behind. What
//! comes back is checked here; whether it makes sense as a network is for
//! `graph`. What is asked at load is asked twice, of two instances, which must agree.

use std::fmt::Debug;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use wasmtime::component::Component;
use wasmtime::{PoolConcurrencyLimitError, Store, Trap};

use super::check;
use super::contract::{
    self, ActionBatch, Description, Evaluation, Expert, ExpertPre, HostInfo, NamedColumn, Network,
    Prediction, RankRequest, Ranked, TaskLabels, TrainingStep, Verdict,
};
use super::engine::{self, Engine, Held, HostState, Owner};
use super::fault::{Call, ExpertFault, Fault, trace};
use super::log::GuestLog;
use super::usage::{LogRate, Usage, UsageSnapshot};
use crate::Error;
use crate::gate::{Gate, GateConfig};
use crate::long_call::Watch;

/// What a guest may use. A description asks for its own `rank` limits; the
/// `_max` fields bound what it gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Deadline of a `rank` call whose description asks for none, in milliseconds.
    pub deadline_ms: u32,
    /// The most that a description can ask for.
    pub deadline_max_ms: u32,
    /// Deadline of every call but `rank`, in milliseconds.
    pub hook_deadline_ms: u32,
    /// Linear memory of a guest whose description asks for none, in MiB.
    pub memory_mib: u32,
    /// The most that a description can ask for; the engine's pool bounds it too.
    pub memory_max_mib: u32,
    /// Bytes that one call may hand to the host.
    pub output_bytes: usize,
    /// Size of a component file, in bytes.
    pub component_bytes: usize,
    /// Instances of one plugin that may be alive at one time; the pool's bound is over all plugins.
    pub instances: u32,
    /// Entries of a table of functions; the engine's pool bounds it too.
    pub table_elements: usize,
    /// What it may log.
    pub log: LogRate,
    /// The threads that it may hold where its calls take long.
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

/// Instances that a plugin keeps ready for `rank`, and used ones that it keeps for clearing.
const READY: usize = 2;

/// How long an instance may take that is made ahead of its call: a start function of the guest's runs in it, at a time
/// that no call of its own pays for.
const SOON: Duration = Duration::from_millis(5);

/// A checked component, ready to be instantiated.
pub struct Plugin {
    engine: Engine,
    pre: ExpertPre<HostState>,
    name: Arc<str>,
    limits: Limits,
    rank_deadline_ms: u32,
    memory_mib: u32,
    usage: Arc<Usage>,
    alive: Arc<AtomicU32>,
    gate: Arc<Gate>,
    spares: Mutex<Spares>,
    /// Whether the last instance failed, or took long.
    unprepared: AtomicBool,
}

/// What need not happen while a request waits: making an instance, and clearing a used one's memory.
#[derive(Default)]
struct Spares {
    /// Fresh instances; each serves one call.
    ready: Vec<(Store<HostState>, Expert)>,
    /// Used instances, of which only the memory is left to clear.
    used: Vec<Store<HostState>>,
}

impl Plugin {
    /// Reads, checks and compiles the component at `path`. Runs no guest code.
    pub fn load(engine: &Engine, path: &Path, limits: &Limits) -> Result<Plugin, Error> {
        let name = path
            .file_stem()
            .map_or_else(|| path.display().to_string(), |stem| stem.to_string_lossy().into_owned());
        let read = |source| Error::Read { path: path.to_path_buf(), source };
        let size = std::fs::metadata(path).map_err(read)?.len();
        check_size(&name, size, limits)?;
        Plugin::from_bytes(engine, &name, &std::fs::read(path).map_err(read)?, limits)
    }

    /// Checks and compiles a component. `name` stands for it in messages until
    /// its description is known.
    pub fn from_bytes(
        engine: &Engine,
        name: &str,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<Plugin, Error> {
        check_size(name, bytes.len() as u64, limits)?;
        check_header(name, bytes)?;
        let refused = |why: String| Error::refused(name, why);
        let component = engine
            .compile(bytes)
            .map_err(|error| refused(format!("it is not a valid component: {error:#}")))?;
        check_imports(name, engine, &component)?;
        let pre = engine.linker().instantiate_pre(&component).and_then(ExpertPre::new).map_err(
            |error| {
                refused(format!(
                    "it does not fit the expert contract {}: {error:#}",
                    contract::VERSION
                ))
            },
        )?;
        let memory_mib = limits.memory_mib.min(engine.config().memory_mib);
        Ok(Plugin {
            engine: engine.clone(),
            pre,
            name: name.into(),
            rank_deadline_ms: limits.deadline_ms,
            memory_mib,
            usage: Arc::new(Usage::new(limits.log)),
            alive: Arc::default(),
            gate: Arc::default(),
            limits: limits.clone(),
            spares: Mutex::default(),
            unprepared: AtomicBool::new(false),
        })
    }

    /// The name used in messages: the file's, then the description's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What guests of its engine wrote of late.
    pub fn log(&self) -> Arc<GuestLog> {
        self.engine.log().clone()
    }

    /// What it may use.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What lets its calls in.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// What it has used.
    pub fn usage(&self) -> UsageSnapshot {
        self.usage.snapshot()
    }

    /// The deadline of a `rank` call, in milliseconds.
    pub fn rank_deadline_ms(&self) -> u32 {
        self.rank_deadline_ms
    }

    /// Calls `describe`, checks the description, and takes its name and limits
    /// for the calls that follow.
    pub fn describe(&mut self, info: &HostInfo) -> Result<Description, Error> {
        let description = self.twice(Call::Describe, |instance| {
            instance.run(Call::Describe, |expert, store| expert.call_describe(store, info))
        })?;
        check::description(&description, info).map_err(|why| Error::refused(&self.name, why))?;
        self.name = description.name.as_str().into();
        let asked = description.limits;
        if asked.deadline_ms > 0 {
            self.rank_deadline_ms = asked.deadline_ms.min(self.limits.deadline_max_ms);
        }
        if asked.memory_mib > 0 {
            let most = self.limits.memory_max_mib.min(self.engine.config().memory_mib);
            self.memory_mib = asked.memory_mib.min(most);
        }
        Ok(description)
    }

    /// Calls `network`. The result is not checked: see `graph`.
    pub fn network(&self, info: &HostInfo) -> Result<Network, Error> {
        let network = self.twice(Call::Network, |instance| {
            instance.run(Call::Network, |expert, store| expert.call_network(store, info))
        })?;
        network.map_err(|why| {
            Error::refused(
                &self.name,
                format!("its network does not fit this schema: {}", check::quote(&why)),
            )
        })
    }

    /// Asks two fresh instances, which must answer alike: training and serving ask others, in other processes.
    fn twice<T: Debug>(
        &self,
        call: Call,
        ask: impl Fn(&mut Instance<'_>) -> Result<T, ExpertFault>,
    ) -> Result<T, Error> {
        let first = ask(&mut self.instance(call)?)?;
        let second = ask(&mut self.instance(call)?)?;
        agree(&first, &second).map_err(|why| self.fault(call, Fault::BadOutput(why)))?;
        Ok(first)
    }

    /// Ranks the request's candidates in a fresh instance: one made ahead by
    /// [`Plugin::prepare`] where there is one.
    ///
    /// The result has at most `request.limit` entries with distinct candidates
    /// and finite scores, best first.
    pub fn rank(
        &self,
        request: &RankRequest,
        predictions: &[Prediction],
        columns: &[NamedColumn],
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let ready = self.spares().ready.pop();
        let mut instance = match ready {
            Some((store, expert)) => Instance { plugin: self, store, expert },
            None => {
                let start = Instant::now();
                let instance = self.instance(Call::Rank)?;
                self.unprepared.store(start.elapsed() > SOON, Ordering::Relaxed);
                instance
            }
        };
        let ranked = instance.rank(request, predictions, columns);
        let mut spares = self.spares();
        if spares.used.len() < READY {
            spares.used.push(instance.store);
        }
        ranked
    }

    /// Clears used instances and makes the next ones. Call it between requests:
    /// it is most of the cost of a fresh instance a call. An instance that
    /// cannot be made, or takes long, is left to the next `rank`, whose fault or
    /// time it then is; none is made ahead until a `rank` had one soon.
    pub fn prepare(&self) {
        self.clear();
        while self.spares().ready.len() < READY.min(self.limits.instances as usize)
            && !self.unprepared.load(Ordering::Relaxed)
            && self.engine.has_room()
        {
            let start = Instant::now();
            let made = self.instance(Call::Rank);
            self.unprepared.store(made.is_err() || start.elapsed() > SOON, Ordering::Relaxed);
            let Ok(Instance { store, expert, .. }) = made else { return };
            self.spares().ready.push((store, expert));
        }
    }

    fn clear(&self) {
        let used = std::mem::take(&mut self.spares().used);
        drop(used);
    }

    fn spares(&self) -> MutexGuard<'_, Spares> {
        self.spares.lock().expect("no holder panics")
    }

    /// Turns joined outcomes into labels, sample space and weights: one entry a
    /// task of `description`, in its order.
    pub fn labels(
        &self,
        description: &Description,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> Result<Vec<TaskLabels>, ExpertFault> {
        let call = Call::Labels;
        let mut instance = self.instance(call)?;
        let labels = instance.run(call, |expert, store| expert.call_labels(store, info, batch))?;
        let labels = labels.map_err(|why| self.fault(call, Fault::Refused(check::quote(&why))))?;
        check::labels(labels, &description.tasks, batch.surface.len())
            .map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// The keep probability of each example, in 0..=1; one for each example.
    pub fn sample(&self, info: &HostInfo, batch: &ActionBatch) -> Result<Vec<f32>, ExpertFault> {
        let call = Call::Sample;
        let mut instance = self.instance(call)?;
        let keep = instance.run(call, |expert, store| expert.call_sample(store, info, batch))?;
        check::sample(keep, batch.surface.len())
            .map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// A factor of a training step's learning rate, in 0..=10.
    pub fn schedule(&self, step: TrainingStep) -> Result<f32, ExpertFault> {
        let call = Call::Schedule;
        let mut instance = self.instance(call)?;
        let factor = instance.run(call, |expert, store| expert.call_schedule(store, step))?;
        check::factor(factor).map_err(|why| self.fault(call, Fault::BadOutput(why)))
    }

    /// Whether what was trained may serve. A reason is of bounded length, without control characters.
    pub fn evaluate(
        &self,
        info: &HostInfo,
        evaluation: &Evaluation,
    ) -> Result<Verdict, ExpertFault> {
        let call = Call::Evaluate;
        let mut instance = self.instance(call)?;
        let verdict =
            instance.run(call, |expert, store| expert.call_evaluate(store, info, evaluation))?;
        Ok(check::verdict(verdict))
    }

    /// A fresh instance, made under `call`'s deadline.
    pub fn instance(&self, call: Call) -> Result<Instance<'_>, ExpertFault> {
        let start = Instant::now();
        let mut store = engine::store(self.engine.wasmtime(), self.state(call)?);
        store.set_hostcall_fuel(self.limits.output_bytes);
        self.begin(&mut store, call);
        let made = self.pre.instantiate(&mut store);
        self.usage.instance(start.elapsed());
        match made {
            Ok(expert) => Ok(Instance { plugin: self, store, expert }),
            Err(error) => Err(self.classify(call, &error, store.data())),
        }
    }

    /// The state of another instance, if the plugin may have one.
    fn state(&self, call: Call) -> Result<HostState, ExpertFault> {
        let most = self.limits.instances;
        let held = Held::take(&self.alive, most).or_else(|| {
            // Used ones that are not cleared yet count too.
            self.clear();
            Held::take(&self.alive, most)
        });
        let held = held.ok_or_else(|| {
            self.fault(call, Fault::Busy(format!("all of its {most} instances are in use")))
        })?;
        let owner = Owner {
            plugin: self.name.clone(),
            usage: self.usage.clone(),
            log: self.engine.log().clone(),
            memory_limit: (self.memory_mib as usize) << 20,
            table_limit: self.limits.table_elements,
        };
        Ok(HostState::new(owner, held))
    }

    fn begin(&self, store: &mut Store<HostState>, call: Call) {
        let gate = (call == Call::Rank).then(|| self.gate.clone());
        let watch = Watch { gate, slow_ms: self.limits.gate.slow_ms };
        engine::begin(store, self.deadline_ms(call), watch);
    }

    fn deadline_ms(&self, call: Call) -> u32 {
        if call == Call::Rank { self.rank_deadline_ms } else { self.limits.hook_deadline_ms }
    }

    fn fault(&self, call: Call, cause: Fault) -> ExpertFault {
        ExpertFault { plugin: self.name.to_string(), call, cause, trace: Vec::new() }
    }

    fn classify(&self, call: Call, error: &wasmtime::Error, state: &HostState) -> ExpertFault {
        let memory = Fault::Memory { limit_mib: self.memory_mib };
        let cause = match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => Fault::Deadline { limit_ms: self.deadline_ms(call) },
            Some(Trap::StackOverflow) => Fault::StackOverflow,
            // A Rust guest that is denied memory aborts, which is a trap.
            _ if state.memory_denied => memory,
            _ if state.table_denied => Fault::Table { limit_elements: self.limits.table_elements },
            Some(trap) => {
                Fault::Trap(trap.to_string().trim_start_matches("wasm trap: ").to_owned())
            }
            None if error.is::<PoolConcurrencyLimitError>() => {
                Fault::Busy(format!("the pool of instances has no room: {error}"))
            }
            None if error.root_cause().to_string().contains("allocated for hostcalls") => {
                Fault::BadOutput(format!("more than {} bytes of output", self.limits.output_bytes))
            }
            // What is left are values that break the canonical ABI.
            None => Fault::BadOutput(check::quote(&error.root_cause().to_string())),
        };
        ExpertFault { trace: trace(error), ..self.fault(call, cause) }
    }
}

/// Whether two answers are the same, to the last bit that their text shows.
fn agree<T: Debug>(first: &T, second: &T) -> Result<(), String> {
    match format!("{first:?}") == format!("{second:?}") {
        true => Ok(()),
        false => Err("two fresh instances answered differently; an answer may depend on nothing but what is asked".into()),
    }
}

/// An instance of a plugin. It is dropped after a fault; the calls of
/// [`Plugin`] use a fresh one each.
pub struct Instance<'a> {
    plugin: &'a Plugin,
    store: Store<HostState>,
    expert: Expert,
}

impl Instance<'_> {
    /// Its linear memory, in bytes; memory never shrinks, so this is the most that its calls needed.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory_bytes
    }

    /// As [`Plugin::rank`], in this instance.
    pub fn rank(
        &mut self,
        request: &RankRequest,
        predictions: &[Prediction],
        columns: &[NamedColumn],
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let call = Call::Rank;
        let ranked =
            self.run(call, |expert, store| expert.call_rank(store, request, predictions, columns))?;
        let ranked =
            ranked.map_err(|why| self.plugin.fault(call, Fault::Refused(check::quote(&why))))?;
        check::ranked(&ranked, request.candidates.len(), request.limit as usize)
            .map_err(|why| self.plugin.fault(call, Fault::BadOutput(why)))?;
        Ok(ranked)
    }

    fn run<T>(
        &mut self,
        call: Call,
        f: impl FnOnce(&Expert, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, ExpertFault> {
        self.plugin.begin(&mut self.store, call);
        let start = Instant::now();
        let answer = f(&self.expert, &mut self.store);
        self.plugin.usage.call(call, start.elapsed());
        engine::end(&mut self.store);
        answer.map_err(|error| self.plugin.classify(call, &error, self.store.data()))
    }
}

fn check_size(name: &str, size: u64, limits: &Limits) -> Result<(), Error> {
    if size > limits.component_bytes as u64 {
        let limit = limits.component_bytes;
        return Err(Error::refused(
            name,
            format!("the file has {size} bytes, more than the limit of {limit}"),
        ));
    }
    Ok(())
}

fn check_header(name: &str, bytes: &[u8]) -> Result<(), Error> {
    let why = match bytes {
        [0, b'a', b's', b'm', 0x0d, 0, 1, 0, ..] => return Ok(()),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => {
            "it is a core Wasm module, not a component: build it with `cargo hypercast build`"
        }
        _ => "it is not a WebAssembly file",
    };
    Err(Error::refused(name, why.into()))
}

fn check_imports(name: &str, engine: &Engine, component: &Component) -> Result<(), Error> {
    let ty = component.component_type();
    let mut foreign = Vec::new();
    let mut version = None;
    for (import, _) in ty.imports(engine.wasmtime()) {
        match import.strip_prefix(contract::TYPES_IMPORT) {
            Some(found) => version = Some(found.to_owned()),
            None if import == "log" => {}
            None => foreign.push(format!("`{import}`")),
        }
    }
    let Some(version) = version else {
        let why = "it does not import the expert contract's types: it is no HyperCast expert; build it with the HyperCast SDK";
        return Err(Error::refused(name, why.into()));
    };
    if major(&version) != major(contract::VERSION) {
        return Err(Error::ContractVersion {
            plugin: name.to_owned(),
            found: version,
            host: contract::VERSION,
        });
    }
    if !foreign.is_empty() {
        let why =
            format!("it imports {}; an expert may import nothing but `log`", foreign.join(", "));
        return Err(Error::refused(name, why));
    }
    Ok(())
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
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
