//! Plugins: the experts that serve, the limits of every plugin, and stricter ones for one expert.

use std::{collections::BTreeMap, path::PathBuf};

use hypercast_expert::{
    BreakerConfig, EngineConfig, Limits, LoadOptions, cpu_budget::GateConfig, graph::GraphLimits,
    wasm::LogRate,
};
use serde::{Deserialize, Serialize};

use crate::{NeLimits, check, check_positive, check_share};

/// An expert that answers for some surfaces, or shadows them: an entry of `[[experts]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertEntry {
    /// Its name in metrics and responses, and that of its parameter folder.
    pub name: String,
    /// The component, as `cargo hypercast build -p mlp-fusion --out FILE` writes it.
    pub plugin: PathBuf,
    /// The surfaces that it serves, by name. `[]` means every surface that no other expert names.
    #[serde(default)]
    pub surfaces: Vec<String>,
    /// Train and run it with zeros in place of the TAE: a baseline that shows what the TAE is
    /// worth.
    #[serde(default)]
    pub without_tae: bool,
    /// Run beside the serving expert of its surfaces without answering, to compare the two.
    #[serde(default)]
    pub shadow: bool,
    /// The rows that train it: those of its "own" surfaces, or "all" (for surfaces with few rows).
    #[serde(default)]
    pub train_on: TrainOn,
    /// Limits of this plugin that are stricter than `[plugin_limits]`: deadline_ms, memory_mib,
    /// output_mib, instances_each, log_lines_per_s, log_bytes_per_s. Weaker ones are refused.
    #[serde(default)]
    pub limits: ExpertLimits,
    /// Limits of NE for what its trainer publishes, besides the plugin's own `evaluate`: `max` by
    /// task, and `max_increase` over the NE of what serves, as a fraction.
    #[serde(default)]
    pub ne_limits: NeLimits,
}

/// The surfaces whose rows train an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// The surfaces that it serves.
    #[default]
    Own,
    /// All surfaces in the logs.
    All,
}

/// Limits of every plugin: `[plugin_limits]`. A plugin may ask for less, never for more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PluginLimits {
    /// Time for a call of `rank`, in milliseconds of the wall clock.
    pub deadline_ms: u32,
    /// Time for any other call (at load, in training, before a publication), in milliseconds.
    pub setup_deadline_ms: u32,
    /// Linear memory of an instance, in MiB.
    pub memory_mib: u32,
    /// Entries of an instance's function table.
    pub table_elements: u32,
    /// What a call may return to the host, in MiB.
    pub output_mib: u32,
    /// Instances of all plugins that may exist at once. A call that finds no free instance falls
    /// back to the FM's ranking at once, with the cause `busy`.
    pub instances: u32,
    /// Instances of one plugin that may exist at once.
    pub instances_each: u32,
    /// The share of server.threads that one slow plugin may hold, at least one thread. Further
    /// calls fall back to the FM's ranking at once, with the cause `busy`.
    pub threads_share: f64,
    /// A plugin is slow if its calls take more processor time than this, on average or while they
    /// run, in milliseconds. After 2 ms, a call gives other threads priority.
    pub slow_ms: f64,
    /// Log lines per second of one plugin. Further lines are dropped and counted.
    pub log_lines_per_s: u32,
    /// Bytes of log lines per second of one plugin. Further lines are dropped and counted.
    pub log_bytes_per_s: u32,
    /// The most parameters of a plugin's network.
    pub max_parameters: usize,
    /// The most floating-point operations of a plugin's network for one candidate.
    pub max_flops: u64,
    /// The same of a new version, as a share of those of a one-stage model of its FM's size.
    pub max_flops_share: f64,
    /// Other shares by surface. An expert of several has the least of theirs.
    pub surface_flops_share: BTreeMap<String, f64>,
    /// The most memory of a plugin's network, in MiB, for each use where it is made of it, to serve
    /// or to be trained: parameters,
    /// what is derived from them, and the values of all runs at a time. It is computed for the
    /// largest requests and batches before anything is allocated.
    pub network_memory_mib: u64,
    /// Consecutive faults, of as many users, that open a plugin's breaker. As many of one user set
    /// that user aside: the FM's ranking answers for `breaker_rest_ms`.
    pub breaker_faults: u32,
    /// The breaker also opens when calls that end in faults take this share of a thread's processor
    /// time over ten seconds. The default is two calls that run until a deadline of 50 ms.
    pub breaker_lost_share: f64,
    /// Time that a breaker stays open at first, in milliseconds. It doubles each time that the
    /// breaker soon opens again.
    pub breaker_rest_ms: u64,
    /// The longest time that a breaker stays open, in milliseconds.
    pub breaker_rest_max_ms: u64,
    /// Size of the folder `compiled` under paths.state, in MiB, which keeps compiled plugins for
    /// the next start. 0 keeps none. Make sure that only the daemon can write there: the files run
    /// as machine code.
    pub compiled_mib: u64,
}

/// Stricter limits of one expert's plugin. A limit that is not set is that of [`PluginLimits`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertLimits {
    /// As `plugin_limits.deadline_ms`.
    pub deadline_ms: Option<u32>,
    /// As `plugin_limits.memory_mib`.
    pub memory_mib: Option<u32>,
    /// As `plugin_limits.output_mib`.
    pub output_mib: Option<u32>,
    /// As `plugin_limits.instances_each`.
    pub instances_each: Option<u32>,
    /// As `plugin_limits.log_lines_per_s`.
    pub log_lines_per_s: Option<u32>,
    /// As `plugin_limits.log_bytes_per_s`.
    pub log_bytes_per_s: Option<u32>,
}

impl Default for PluginLimits {
    fn default() -> Self {
        Self {
            deadline_ms: 50,
            setup_deadline_ms: 5000,
            memory_mib: 64,
            table_elements: 10_000,
            output_mib: 16,
            instances: 64,
            instances_each: 16,
            threads_share: 0.5,
            slow_ms: 10.0,
            log_lines_per_s: 20,
            log_bytes_per_s: 8192,
            max_parameters: 64 << 20,
            max_flops: 20_000_000,
            max_flops_share: 0.4,
            surface_flops_share: BTreeMap::new(),
            network_memory_mib: 4096,
            breaker_faults: 5,
            breaker_lost_share: 0.01,
            breaker_rest_ms: 5000,
            breaker_rest_max_ms: 300_000,
            compiled_mib: 512,
        }
    }
}

impl PluginLimits {
    /// The limits for loading a plugin. Callers add what the FM and the daemon's threads determine.
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            limits: Limits {
                deadline_ms: self.deadline_ms,
                deadline_max_ms: self.deadline_ms,
                hook_deadline_ms: self.setup_deadline_ms,
                memory_mib: self.memory_mib,
                memory_max_mib: self.memory_mib,
                output_bytes: (self.output_mib as usize) << 20,
                instances: self.instances_each,
                table_elements: self.table_elements as usize,
                log: LogRate {
                    lines_per_s: self.log_lines_per_s,
                    bytes_per_s: self.log_bytes_per_s,
                },
                gate: GateConfig { slow_ms: self.slow_ms, ..GateConfig::default() },
                ..Limits::default()
            },
            graph_limits: GraphLimits {
                parameters: self.max_parameters,
                flops_per_candidate: self.max_flops,
                memory_bytes: self.network_memory_mib.saturating_mul(1 << 20),
                ..GraphLimits::default()
            },
            ..LoadOptions::default()
        }
    }

    /// The settings of the pool of instances.
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            instances: self.instances,
            memory_mib: self.memory_mib,
            table_elements: self.table_elements as usize,
            ..EngineConfig::default()
        }
    }

    /// The settings of each plugin's breaker.
    pub fn breaker(&self) -> BreakerConfig {
        BreakerConfig {
            faults: self.breaker_faults,
            lost_share: self.breaker_lost_share,
            open_ms: self.breaker_rest_ms,
            open_max_ms: self.breaker_rest_max_ms,
        }
    }

    /// These limits with one expert's stricter ones.
    pub(super) fn with(&self, own: &ExpertLimits) -> Self {
        Self {
            deadline_ms: own.deadline_ms.unwrap_or(self.deadline_ms),
            memory_mib: own.memory_mib.unwrap_or(self.memory_mib),
            output_mib: own.output_mib.unwrap_or(self.output_mib),
            instances_each: own.instances_each.unwrap_or(self.instances_each),
            log_lines_per_s: own.log_lines_per_s.unwrap_or(self.log_lines_per_s),
            log_bytes_per_s: own.log_bytes_per_s.unwrap_or(self.log_bytes_per_s),
            ..self.clone()
        }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        check_positive([
            ("plugin_limits.deadline_ms", self.deadline_ms),
            ("plugin_limits.setup_deadline_ms", self.setup_deadline_ms),
            ("plugin_limits.memory_mib", self.memory_mib),
            ("plugin_limits.table_elements", self.table_elements),
            ("plugin_limits.output_mib", self.output_mib),
            ("plugin_limits.instances", self.instances),
            ("plugin_limits.instances_each", self.instances_each),
            ("plugin_limits.breaker_faults", self.breaker_faults),
        ])?;
        check_positive([("plugin_limits.network_memory_mib", self.network_memory_mib)])?;
        check_share("plugin_limits.threads_share", self.threads_share)?;
        check_share("plugin_limits.breaker_lost_share", self.breaker_lost_share)?;
        self.validate_flops_shares()?;
        check(self.slow_ms >= 0.0, "plugin_limits.slow_ms", self.slow_ms, "at least 0")
    }
}

impl ExpertLimits {
    /// Checks that no limit is weaker than that of every plugin.
    fn validate(&self, all: &PluginLimits) -> Result<(), String> {
        let limits = [
            ("deadline_ms", self.deadline_ms, all.deadline_ms),
            ("memory_mib", self.memory_mib, all.memory_mib),
            ("output_mib", self.output_mib, all.output_mib),
            ("instances_each", self.instances_each, all.instances_each),
            ("log_lines_per_s", self.log_lines_per_s, all.log_lines_per_s),
            ("log_bytes_per_s", self.log_bytes_per_s, all.log_bytes_per_s),
        ];
        for (key, own, most) in limits {
            let Some(own) = own else { continue };
            // A plugin may be forbidden to log, but it cannot run without time, memory or output.
            check(own > 0 || key.starts_with("log_"), key, own, "at least 1")?;
            if own > most {
                return Err(format!(
                    "{key} is {own}, more than plugin_limits.{key} of {most}; raise that first"
                ));
            }
        }
        Ok(())
    }
}

/// Checks names and limits of all experts.
pub(super) fn validate_experts(experts: &[ExpertEntry], all: &PluginLimits) -> Result<(), String> {
    for (at, entry) in experts.iter().enumerate() {
        let name = &entry.name;
        let allowed = |char: char| char.is_ascii_alphanumeric() || "-_.".contains(char);
        if name.is_empty() || !name.chars().all(allowed) {
            return Err(format!("experts[{at}].name is {name:?}; use letters, digits, - _ ."));
        }
        if experts[..at].iter().any(|other| other.name == *name) {
            return Err(format!("two experts are named {name:?}; names must be unique"));
        }
        entry.limits.validate(all).map_err(|why| format!("experts[{at}].limits.{why}"))?;
        entry.ne_limits.validate().map_err(|why| format!("experts[{at}].ne_limits.{why}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_may_have_less_and_never_more() {
        let all = PluginLimits::default();
        let less =
            ExpertLimits { deadline_ms: Some(20), instances_each: Some(2), ..Default::default() };
        less.validate(&all).unwrap();
        let options = all.with(&less).load_options();
        assert_eq!((options.limits.deadline_ms, options.limits.deadline_max_ms), (20, 20));
        assert_eq!((options.limits.instances, options.limits.memory_mib), (2, all.memory_mib));
        let more = ExpertLimits { memory_mib: Some(all.memory_mib + 1), ..Default::default() };
        let why = more.validate(&all).unwrap_err();
        assert!(
            why.contains("memory_mib is 65, more than plugin_limits.memory_mib of 64"),
            "{why}"
        );
        let none = ExpertLimits { output_mib: Some(0), ..Default::default() };
        assert!(none.validate(&all).unwrap_err().contains("output_mib is 0"));
    }

    #[test]
    fn limits_that_make_no_sense_are_refused_by_key() {
        let refused = |limits: PluginLimits| limits.validate().unwrap_err();
        let limits = PluginLimits::default;
        assert!(
            refused(PluginLimits { instances: 0, ..limits() }).contains("plugin_limits.instances ")
        );
        assert!(refused(PluginLimits { threads_share: 1.5, ..limits() }).contains("threads_share"));
        assert!(refused(PluginLimits { slow_ms: f64::NAN, ..limits() }).contains("slow_ms"));
    }
}
