//! The wasmtime engine: one a process, with its instance pool and the thread
//! that ticks the epoch by which calls meet their deadlines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{
    Config, InstanceAllocationStrategy, PoolingAllocationConfig, ResourceLimiter, Store,
    UpdateDeadline,
};

use super::cache::{Cache, CacheConfig};
use super::contract::{self, Level};
use super::log::GuestLog;
use super::usage::{Line, Usage};
use crate::Error;
use crate::long_call::{Turn, Watch};

/// One epoch.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// The length of a log line in bytes; longer ones are cut.
const LOG_BYTES: usize = 512;

/// Sizes of the instance pool, fixed for the life of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Calls that can run at one time, over all plugins.
    pub instances: u32,
    /// The most linear memory that any plugin's limit may allow, in MiB.
    pub memory_mib: u32,
    /// The guests' call stack, in KiB.
    pub stack_kib: u32,
    /// Entries of a table of functions.
    pub table_elements: usize,
    /// Where compiled components are kept; none compiles them at each load.
    pub cache: Option<CacheConfig>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            instances: 64,
            memory_mib: 256,
            stack_kib: 512,
            table_elements: 10_000,
            cache: None,
        }
    }
}

/// Compiles components and holds the pool. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    engine: wasmtime::Engine,
    linker: Linker<HostState>,
    config: EngineConfig,
    cache: Option<Cache>,
    stop: Arc<AtomicBool>,
    log: Arc<GuestLog>,
}

impl Engine {
    /// Starts an engine: reserves the pool's address space and starts the ticker.
    pub fn new(config: EngineConfig) -> Result<Engine, Error> {
        let engine = wasmtime::Engine::new(&wasmtime_config(&config)).map_err(Error::engine)?;
        let mut linker = Linker::new(&engine);
        contract::Expert::add_to_linker::<_, HasSelf<_>>(&mut linker, |state: &mut HostState| {
            state
        })
        .map_err(Error::engine)?;
        let stop = Arc::new(AtomicBool::new(false));
        start_ticker(engine.weak(), stop.clone())?;
        let cache = config.cache.as_ref().and_then(|cache| match Cache::open(cache) {
            Ok(opened) => Some(opened),
            // Compiling takes a while longer and is always right.
            Err(error) => {
                tracing::warn!(folder = %cache.folder.display(), %error, "compiled plugins are not kept");
                None
            }
        });
        let log = Arc::default();
        Ok(Engine { inner: Arc::new(Inner { engine, linker, config, cache, stop, log }) })
    }

    /// What its guests wrote of late.
    pub fn log(&self) -> &Arc<GuestLog> {
        &self.inner.log
    }

    /// Checks and compiles a component, or takes what was compiled of the same bytes before.
    pub(super) fn compile(&self, bytes: &[u8]) -> wasmtime::Result<Component> {
        match &self.inner.cache {
            Some(cache) => cache.component(self.wasmtime(), bytes),
            None => Component::from_binary(self.wasmtime(), bytes),
        }
    }

    /// The pool's sizes.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Whether fewer than half of the pool's instances are in use: the rest is
    /// kept for calls, so that no plugin's spare instances take another's place.
    pub(super) fn has_room(&self) -> bool {
        let used = self
            .inner
            .engine
            .pooling_allocator_metrics()
            .map_or(0, |pool| pool.component_instances());
        used < u64::from(self.inner.config.instances) / 2
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.inner.engine
    }

    pub(super) fn linker(&self) -> &Linker<HostState> {
        &self.inner.linker
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn wasmtime_config(config: &EngineConfig) -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(config.instances)
        .total_core_instances(config.instances * 4)
        .max_core_instances_per_component(4)
        .total_memories(config.instances)
        .max_memories_per_component(1)
        .total_tables(config.instances * 2)
        .max_tables_per_component(2)
        .table_elements(config.table_elements)
        .max_memory_size((config.memory_mib as usize) << 20)
        // Clearing this much by hand is cheaper than giving the pages back.
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(16 << 10);
    let mut wasmtime = Config::new();
    wasmtime
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .epoch_interruption(true)
        .max_wasm_stack((config.stack_kib as usize) << 10)
        .memory_init_cow(true);
    wasmtime
}

fn start_ticker(engine: wasmtime::EngineWeak, stop: Arc<AtomicBool>) -> Result<(), Error> {
    let tick = move || {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(TICK);
            match engine.upgrade() {
                Some(engine) => engine.increment_epoch(),
                None => return,
            }
        }
    };
    std::thread::Builder::new()
        .name("wasm-epochs".into())
        .spawn(tick)
        .map(drop)
        .map_err(|error| Error::engine(error.into()))
}

/// What an instance may use, and what it has used.
pub(super) struct HostState {
    pub(super) plugin: Arc<str>,
    pub(super) memory_denied: bool,
    pub(super) table_denied: bool,
    memory_limit: usize,
    table_limit: usize,
    /// The linear memory's size: it never shrinks.
    pub(super) memory_bytes: usize,
    turn: Option<Turn>,
    usage: Arc<Usage>,
    log: Arc<GuestLog>,
    /// One of the instances that the plugin may have.
    _held: Held,
}

/// A place for an instance; dropping it makes it free.
pub(super) struct Held(Arc<AtomicU32>);

impl Held {
    /// A place of `most`, if one is free.
    pub(super) fn take(alive: &Arc<AtomicU32>, most: u32) -> Option<Held> {
        let held = Held(alive.clone());
        // Where there was none, dropping it takes the count back.
        (alive.fetch_add(1, Ordering::Relaxed) < most).then_some(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whose instance it is, and what it may have.
pub(super) struct Owner {
    pub(super) plugin: Arc<str>,
    pub(super) usage: Arc<Usage>,
    pub(super) log: Arc<GuestLog>,
    pub(super) memory_limit: usize,
    pub(super) table_limit: usize,
}

impl HostState {
    pub(super) fn new(owner: Owner, held: Held) -> HostState {
        let Owner { plugin, usage, log, memory_limit, table_limit } = owner;
        HostState {
            plugin,
            memory_denied: false,
            table_denied: false,
            memory_limit,
            table_limit,
            memory_bytes: 0,
            turn: None,
            usage,
            log,
            _held: held,
        }
    }
}

/// A store whose calls end at their deadlines, as [`begin`] sets them.
pub(super) fn store(engine: &wasmtime::Engine, state: HostState) -> Store<HostState> {
    let mut store = Store::new(engine, state);
    store.limiter(|state| state);
    store.epoch_deadline_callback(|mut context| {
        let next = context.data_mut().turn.as_mut().and_then(Turn::next);
        Ok(next.map_or(UpdateDeadline::Interrupt, UpdateDeadline::Continue))
    });
    store
}

/// What runs in the store from now on may take `deadline_ms`, and is watched for being long.
pub(super) fn begin(store: &mut Store<HostState>, deadline_ms: u32, watch: Watch) {
    // The tick under way may end at once, so one more.
    let (turn, first) = Turn::begin(u64::from(deadline_ms) + 1, watch);
    store.data_mut().turn = Some(turn);
    store.set_epoch_deadline(first);
}

/// What ran in the store is over.
pub(super) fn end(store: &mut Store<HostState>) {
    store.data_mut().turn = None;
}

impl Drop for HostState {
    fn drop(&mut self) {
        self.usage.memory(self.memory_bytes);
    }
}

impl ResourceLimiter for HostState {
    fn memory_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let allowed = desired <= self.memory_limit;
        self.memory_denied |= !allowed;
        if allowed {
            self.memory_bytes = self.memory_bytes.max(desired);
        }
        Ok(allowed)
    }

    fn table_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // Indirect-call tables of real guests have hundreds of entries.
        let allowed = desired <= self.table_limit;
        self.table_denied |= !allowed;
        Ok(allowed)
    }
}

impl contract::hypercast::expert::types::Host for HostState {}

impl contract::ExpertImports for HostState {
    fn log(&mut self, level: Level, message: String) {
        let end = message.floor_char_boundary(LOG_BYTES);
        // A guest's line must not look like several of the host's.
        let message = message[..end].escape_debug().to_string();
        let plugin = &*self.plugin;
        match self.usage.line(end, Instant::now()) {
            Line::Write => {}
            Line::Drop => return,
            Line::Tell(dropped) => {
                tracing::warn!(
                    plugin,
                    dropped,
                    "it writes more log lines than it may; the rest is left out"
                );
                return;
            }
        }
        let word = match level {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        self.log.keep(plugin, word, &message);
        match level {
            Level::Debug => tracing::debug!(plugin, "{message}"),
            Level::Info => tracing::info!(plugin, "{message}"),
            Level::Warn => tracing::warn!(plugin, "{message}"),
            Level::Error => tracing::error!(plugin, "{message}"),
        }
    }
}
