//! The wasmtime engine: one a process, with its pool of instances and the thread that advances the
//! epoch, which ends calls at their deadlines.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hypercast_core::{
    clock::now_ms,
    supervised_thread::{self, OnPanic},
};
use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{
    Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, ResourceLimiter, Store,
    UpdateDeadline,
};

use super::cache::{Cache, CacheConfig};
use super::contract::{self, Level};
use super::contract2;
use super::usage::{GuestLog, LogDecision, LogLine, Usage};
use crate::Error;
use crate::cpu_budget::CpuBudget;

/// The length of an epoch.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// The longest log line in bytes; longer ones are cut.
const LOG_BYTES: usize = 512;

/// The sizes of the instance pool, fixed for the life of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// The number of calls that can run at a time, over all plugins.
    pub instances: u32,
    /// The upper bound of all plugins' memory limits, in MiB.
    pub memory_mib: u32,
    /// The size of a guest's call stack, in KiB.
    pub stack_kib: u32,
    /// The number of entries of a function table.
    pub table_elements: usize,
    /// The cache of compiled components; without one, each load compiles.
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
    pub(super) inner: Arc<EngineInner>,
}

pub(super) struct EngineInner {
    pub(super) engine: wasmtime::Engine,
    pub(super) linker: Linker<HostState>,
    /// The sizes of its pool.
    pub(super) config: EngineConfig,
    cache: Option<Cache>,
    /// The last log lines of its guests.
    pub(super) log: Arc<GuestLog>,
}

impl Engine {
    /// Starts an engine: reserves the pool's address space and starts the epoch thread.
    pub fn new(config: EngineConfig) -> Result<Engine, Error> {
        let engine = wasmtime::Engine::new(&wasmtime_config(&config)).map_err(Error::engine)?;
        let mut linker = Linker::new(&engine);
        contract::Expert::add_to_linker::<_, HasSelf<_>>(&mut linker, |state: &mut HostState| {
            state
        })
        .map_err(Error::engine)?;
        contract2::add_types(&mut linker).map_err(Error::engine)?;
        start_ticker(engine.weak())?;
        // Without the cache everything works, but loads are slower.
        let cache = config.cache.as_ref().and_then(|cache| {
            let warn = |error: &std::io::Error| {
                let folder = cache.folder.display();
                tracing::warn!(%folder, %error, "the cache of compiled plugins cannot be used");
            };
            Cache::open(cache).inspect_err(warn).ok()
        });
        let log = Arc::default();
        Ok(Engine { inner: Arc::new(EngineInner { engine, linker, config, cache, log }) })
    }

    /// Compiles a component, or loads it from the cache.
    pub(super) fn compile(&self, bytes: &[u8]) -> wasmtime::Result<Component> {
        match &self.inner.cache {
            Some(cache) => cache.component(&self.inner.engine, bytes),
            None => Component::from_binary(&self.inner.engine, bytes),
        }
    }

    /// Whether fewer than half of the pool's instances are in use. The other half is reserved for
    /// calls, so that spare instances of one plugin do not block calls of another.
    pub(super) fn has_room(&self) -> bool {
        let pool = self.inner.engine.pooling_allocator_metrics();
        let used = pool.map_or(0, |pool| pool.component_instances());
        used < u64::from(self.inner.config.instances) / 2
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
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(kept_resident_bytes())
        .table_keep_resident(16 << 10);
    let mut wasmtime = Config::new();
    wasmtime
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .epoch_interruption(true)
        .max_wasm_stack((config.stack_kib as usize) << 10)
        .memory_init_cow(true);
    wasmtime
}

/// How much of an instance's memory is zeroed after its call, and not returned to the system: pages
/// that the next call finds are written in a fraction of the time that page faults take. Most of a
/// guest's memory lies above its stack of 1 MiB and is never touched, so this much is kept only
/// where the system can say which pages were: elsewhere all of them would be zeroed.
fn kept_resident_bytes() -> usize {
    if PoolingAllocationConfig::is_pagemap_scan_available() { 4 << 20 } else { 256 << 10 }
}

/// Starts the thread that advances the epoch, which ends with the engine.
fn start_ticker(engine: wasmtime::EngineWeak) -> Result<(), Error> {
    let tick = move || {
        while let Some(engine) = engine.upgrade() {
            engine.increment_epoch();
            drop(engine);
            std::thread::sleep(TICK);
        }
    };
    // Without it, no guest's deadline would ever pass.
    supervised_thread::spawn("wasm-epochs", OnPanic::EndProcess, tick)?;
    Ok(())
}

/// The host's data of an instance: its limits and what it used.
pub(super) struct HostState {
    pub(super) plugin: Arc<str>,
    /// The name under which its log lines are kept.
    pub(super) log_name: Arc<str>,
    pub(super) memory_limit: usize,
    pub(super) table_limit: usize,
    pub(super) usage: Arc<Usage>,
    pub(super) log: Arc<GuestLog>,
    /// The last error that the guest logged in this call, escaped and cut.
    pub(super) last_error: Option<String>,
    /// Whether the guest was refused more memory.
    pub(super) memory_denied: bool,
    /// Whether the guest was refused a larger table.
    pub(super) table_denied: bool,
    /// The size of the linear memory, which never shrinks.
    pub(super) memory_bytes: usize,
    /// The remaining time of the running call.
    pub(super) budget: Option<CpuBudget>,
    /// One of the instances that the plugin may have.
    pub(super) _slot: InstanceSlot,
}

/// The right to one instance; returned on drop.
pub(super) struct InstanceSlot(Arc<AtomicU32>);

impl InstanceSlot {
    /// Takes one of `max` slots, of which `in_use` counts those in use. None if all are.
    pub(super) fn take(in_use: &Arc<AtomicU32>, max: u32) -> Option<InstanceSlot> {
        let slot = InstanceSlot(in_use.clone());
        // If none is free, dropping `slot` takes the count back.
        (in_use.fetch_add(1, Ordering::Relaxed) < max).then_some(slot)
    }
}

impl Drop for InstanceSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A store whose calls end at the deadline of their budget.
pub(super) fn store(engine: &wasmtime::Engine, state: HostState) -> Store<HostState> {
    let mut store = Store::new(engine, state);
    store.limiter(|state| state);
    store.epoch_deadline_callback(|mut context| {
        let next = context.data_mut().budget.as_mut().and_then(CpuBudget::next_check);
        Ok(next.map_or(UpdateDeadline::Interrupt, UpdateDeadline::Continue))
    });
    store
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
        // Tables for indirect calls of real guests have hundreds of entries.
        let allowed = desired <= self.table_limit;
        self.table_denied |= !allowed;
        Ok(allowed)
    }
}

impl contract::Host for HostState {}

impl contract::ExpertImports for HostState {
    fn log(&mut self, level: Level, message: String) {
        let end = message.floor_char_boundary(LOG_BYTES);
        // Escaped, so that a guest's line cannot look like several lines of the host.
        let message = message[..end].escape_debug().to_string();
        let plugin = &*self.plugin;
        if matches!(level, Level::Error) {
            self.last_error = Some(message.clone());
        }
        match self.usage.line(end, Instant::now()) {
            LogDecision::Write => {}
            LogDecision::Drop => return,
            LogDecision::DropAndReport(dropped) => {
                tracing::warn!(plugin, dropped, "log lines over the plugin's limit were dropped");
                return;
            }
        }
        let word = match level {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        let line = LogLine {
            at_ms: now_ms(),
            plugin: plugin.to_owned(),
            level: word.to_owned(),
            text: message.clone(),
        };
        self.log.keep(&self.log_name, line);
        match level {
            Level::Debug => tracing::debug!(plugin, "{message}"),
            Level::Info => tracing::info!(plugin, "{message}"),
            Level::Warn => tracing::warn!(plugin, "{message}"),
            Level::Error => tracing::error!(plugin, "{message}"),
        }
    }
}
