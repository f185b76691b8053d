//! What plugins may use: of every plugin, and of one expert's where it is less.

use serde::{Deserialize, Serialize};

use hypercast_expert::{
    BreakerConfig, EngineConfig, Limits, LoadOptions, cpu_budget::GateConfig, graph::GraphLimits,
    wasm::LogRate,
};

/// Limits of every plugin; a plugin may ask for less, never for more.
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
    /// Instances of all plugins that may live at once. A call that finds none free falls back to
    /// the FM's ranking at once, with the cause `busy`.
    pub instances: u32,
    /// Instances of one plugin that may live at once.
    pub instances_each: u32,
    /// The share of server.threads that one slow plugin may hold, at least one thread. Further
    /// calls fall back to the FM's ranking at once, with the cause `busy`.
    pub threads_share: f64,
    /// A plugin is slow if its calls take more processor time than this, on average or while they
    /// run, in milliseconds. A call that has taken 2 ms lets other threads go first.
    pub slow_ms: f64,
    /// Log lines a second of one plugin. Further ones are dropped and counted.
    pub log_lines_per_s: u32,
    /// Bytes of log lines a second of one plugin.
    pub log_bytes_per_s: u32,
    /// Parameters of a network.
    pub max_parameters: usize,
    /// Floating-point operations for a candidate.
    pub max_flops: u64,
    /// Consecutive faults that open a plugin's breaker.
    pub breaker_faults: u32,
    /// The breaker also opens when calls that end in faults take this share of a thread's processor
    /// time over ten seconds, which is two calls that spin until a deadline of 50 ms.
    pub breaker_lost_share: f64,
    /// Time that a breaker first stays open, in milliseconds. It doubles each time that the breaker
    /// opens again soon.
    pub breaker_rest_ms: u64,
    /// The longest time that a breaker stays open, in milliseconds.
    pub breaker_rest_max_ms: u64,
    /// Size of the folder `compiled` under paths.state, in MiB, where compiled plugins are kept for
    /// the next start. 0 keeps none. Only the daemon may be able to write there: the files run as
    /// machine code.
    pub compiled_mib: u64,
}

/// Limits of one expert's plugin; what is not given is that of every plugin, and nothing may be
/// more.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertLimits {
    /// As `plugin_limits.deadline_ms`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u32>,
    /// As `plugin_limits.memory_mib`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// As `plugin_limits.output_mib`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_mib: Option<u32>,
    /// As `plugin_limits.instances_each`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances_each: Option<u32>,
    /// As `plugin_limits.log_lines_per_s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_lines_per_s: Option<u32>,
    /// As `plugin_limits.log_bytes_per_s`.
    #[serde(skip_serializing_if = "Option::is_none")]
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
            breaker_faults: 5,
            breaker_lost_share: 0.01,
            breaker_rest_ms: 5000,
            breaker_rest_max_ms: 300_000,
            compiled_mib: 512,
        }
    }
}

impl PluginLimits {
    /// The limits of a load, but for what the FM and the daemon's threads decide.
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
                ..GraphLimits::default()
            },
            ..LoadOptions::default()
        }
    }

    /// The pool of instances.
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            instances: self.instances,
            memory_mib: self.memory_mib,
            table_elements: self.table_elements as usize,
            ..EngineConfig::default()
        }
    }

    /// The breaker of each plugin.
    pub fn breaker(&self) -> BreakerConfig {
        BreakerConfig {
            faults: self.breaker_faults,
            lost_share: self.breaker_lost_share,
            open_ms: self.breaker_rest_ms,
            open_max_ms: self.breaker_rest_max_ms,
        }
    }

    /// The same with one expert's own.
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
        let positive = [
            ("deadline_ms", self.deadline_ms),
            ("setup_deadline_ms", self.setup_deadline_ms),
            ("memory_mib", self.memory_mib),
            ("table_elements", self.table_elements),
            ("output_mib", self.output_mib),
            ("instances", self.instances),
            ("instances_each", self.instances_each),
            ("breaker_faults", self.breaker_faults),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("plugin_limits.{key} is 0; it must be at least 1"));
        }
        let shares = [
            ("threads_share", self.threads_share),
            ("breaker_lost_share", self.breaker_lost_share),
        ];
        if let Some((key, share)) = shares.iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            return Err(format!("plugin_limits.{key} is {share}; it must be from 0 to 1"));
        }
        if self.slow_ms.is_nan() || self.slow_ms < 0.0 {
            return Err(format!(
                "plugin_limits.slow_ms is {}; it must be at least 0",
                self.slow_ms
            ));
        }
        Ok(())
    }
}

impl ExpertLimits {
    /// Says which of them is more than every plugin may have, or nothing.
    pub(super) fn validate(&self, all: &PluginLimits) -> Result<(), String> {
        let given = [
            ("deadline_ms", self.deadline_ms, all.deadline_ms),
            ("memory_mib", self.memory_mib, all.memory_mib),
            ("output_mib", self.output_mib, all.output_mib),
            ("instances_each", self.instances_each, all.instances_each),
        ];
        let logs = [
            ("log_lines_per_s", self.log_lines_per_s, all.log_lines_per_s),
            ("log_bytes_per_s", self.log_bytes_per_s, all.log_bytes_per_s),
        ];
        for (key, own, most) in given {
            if own == Some(0) {
                return Err(format!("{key} is 0; it must be at least 1"));
            }
            more(key, own, most)?;
        }
        logs.into_iter().try_for_each(|(key, own, most)| more(key, own, most))
    }
}

fn more(key: &str, own: Option<u32>, most: u32) -> Result<(), String> {
    match own {
        Some(own) if own > most => Err(format!(
            "{key} is {own}, more than plugin_limits.{key} of {most}; raise that first"
        )),
        _ => Ok(()),
    }
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
