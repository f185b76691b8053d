//! The limits of a rollout, and the rules that apply them to counts.

use hypercast_config::{RolloutSettings, StopAfter};
use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::stats::ArmCounts,
};

/// With fewer faults than this, their share is not judged.
const FEWEST_FAULTS: u64 = 3;

/// With fewer requests than this, p99 is not judged.
const FEWEST_TIMES: u64 = 200;

/// What a push asks for. It may be more careful than the configuration, never less.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyOverrides {
    /// Where to wait for `hypercast versions promote`
    #[arg(long, value_enum)]
    pub stop_after: Option<StopAfter>,
    /// Requests to see as a shadow
    #[arg(long, value_name = "N")]
    pub shadow_requests: Option<u64>,
    /// Share of the users to serve as a canary
    #[arg(long, value_name = "SHARE")]
    pub canary_share: Option<f64>,
    /// Requests to answer as a canary
    #[arg(long, value_name = "N")]
    pub canary_requests: Option<u64>,
    /// Shortest time as a canary, in seconds
    #[arg(long, value_name = "SECONDS")]
    pub canary_s: Option<u64>,
    /// Share of its requests that may fault
    #[arg(long, value_name = "SHARE")]
    pub fault_share: Option<f64>,
    /// Highest ratio of its p99 to that of the version before
    #[arg(long, value_name = "FACTOR")]
    pub latency_factor: Option<f64>,
    /// Replace other experts on its surfaces
    #[arg(long)]
    pub replace: bool,
}

/// The limits of one rollout: the configuration's, tightened by the push. It repeats fields of
/// `RolloutSettings`, because serde cannot refuse unknown keys of a struct that flattens another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutPolicy {
    /// The step after which it waits for an operator.
    pub stop_after: StopAfter,
    /// Most recorded requests that are replayed.
    pub replay_requests: usize,
    /// Requests to see as a shadow.
    pub shadow_requests: u64,
    /// Share of the users to serve as a canary.
    pub canary_share: f64,
    /// Requests to answer as a canary.
    pub canary_requests: u64,
    /// Shortest time as a canary, in seconds.
    pub canary_s: u64,
    /// Time limit of a step, in seconds.
    pub step_most_s: u64,
    /// Share of its requests that may fault.
    pub fault_share: f64,
    /// Highest ratio of its p99 to that of the version before.
    pub latency_factor: f64,
    /// Allowance on top of that, in milliseconds.
    pub latency_slack_ms: f64,
    /// Window for faults and latency, in seconds.
    pub window_s: u64,
    /// How long it is watched after its promotion, in seconds.
    pub watch_s: u64,
    /// Whether it replaces other experts on its surfaces.
    pub replace: bool,
}

impl RolloutPolicy {
    /// The configuration's limits with a push's overrides.
    ///
    /// # Errors
    /// Refused: the push asks for less care than the configuration; the message has the bound.
    pub fn new(settings: &RolloutSettings, wishes: &PolicyOverrides) -> Result<Self> {
        let at_least = |key: &str, wish: Option<u64>, bound: u64| match wish {
            Some(wish) if wish < bound => refuse(key, &wish, "at least", &bound),
            wish => Ok(wish.unwrap_or(bound)),
        };
        let at_most = |key: &str, wish: Option<f64>, (least, bound): (f64, f64)| match wish {
            Some(wish) if !(wish >= least && wish <= bound) => {
                refuse(key, &wish, "at most", &bound)
            }
            wish => Ok(wish.unwrap_or(bound)),
        };
        let stop_after = match wishes.stop_after {
            Some(wish) if wish > settings.stop_after => {
                let (wish, bound) = (format!("{wish:?}"), format!("{:?}", settings.stop_after));
                return refuse("stop_after", &wish, "no later than", &bound);
            }
            wish => wish.unwrap_or(settings.stop_after),
        };
        Ok(Self {
            stop_after,
            replay_requests: settings.replay_requests,
            shadow_requests: at_least(
                "shadow_requests",
                wishes.shadow_requests,
                settings.shadow_requests,
            )?,
            canary_share: at_most(
                "canary_share",
                wishes.canary_share,
                (0.001, settings.canary_share),
            )?,
            canary_requests: at_least(
                "canary_requests",
                wishes.canary_requests,
                settings.canary_requests,
            )?,
            canary_s: at_least("canary_s", wishes.canary_s, settings.canary_s)?,
            step_most_s: settings.step_most_s,
            fault_share: at_most("fault_share", wishes.fault_share, (0.0, settings.fault_share))?,
            latency_factor: at_most(
                "latency_factor",
                wishes.latency_factor,
                (1.0, settings.latency_factor),
            )?,
            latency_slack_ms: settings.latency_slack_ms,
            window_s: settings.window_s,
            watch_s: settings.watch_s,
            replace: wishes.replace,
        })
    }

    /// Why faults end the rollout, if they do.
    pub fn faulty(&self, seen: &ArmCounts) -> Option<String> {
        let share = seen.faults as f64 / seen.requests.max(1) as f64;
        (seen.faults >= FEWEST_FAULTS && share > self.fault_share).then(|| {
            format!(
                "faults: {} of {} requests, {:.2} % (at most {:.2} % are allowed)",
                seen.faults,
                seen.requests,
                share * 100.0,
                self.fault_share * 100.0
            )
        })
    }

    /// Why latency ends the rollout, if it does. `before_us` is the p99 of the version before.
    pub fn slow(&self, seen: &ArmCounts, before_us: Option<f64>) -> Option<String> {
        let before_us = before_us?;
        let own_us = p99_us(seen)?;
        let most_us = self.most_us(before_us);
        (own_us > most_us).then(|| {
            format!(
                "latency: p99 {:.2} ms, {:.2} ms of the version before (at most {:.2} ms are allowed)",
                own_us / 1e3,
                before_us / 1e3,
                most_us / 1e3
            )
        })
    }

    /// The longest time that a version may take, where the version before took `before_us`;
    /// microseconds.
    pub fn most_us(&self, before_us: f64) -> f64 {
        before_us * self.latency_factor + self.latency_slack_ms * 1e3
    }
}

/// p99 in microseconds, if there are enough requests for it.
pub fn p99_us(seen: &ArmCounts) -> Option<f64> {
    (seen.requests >= FEWEST_TIMES).then(|| seen.quantile_us(0.99)).flatten()
}

fn refuse<T, V: std::fmt::Display>(key: &str, wish: &V, how: &str, bound: &V) -> Result<T> {
    Err(Error::refused(format!(
        "the push asks for {key} {wish}, and the operator's bound is {how} {bound} (rollout.{key})"
    )))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::stats::ArmStats, *};

    fn limits() -> RolloutPolicy {
        RolloutPolicy::new(&RolloutSettings::default(), &PolicyOverrides::default()).unwrap()
    }

    #[test]
    fn a_push_may_be_more_careful_and_not_less() {
        let settings = RolloutSettings::default();
        let careful = PolicyOverrides {
            stop_after: Some(StopAfter::Canary),
            canary_share: Some(0.01),
            shadow_requests: Some(500),
            ..PolicyOverrides::default()
        };
        let limits = RolloutPolicy::new(&settings, &careful).unwrap();
        assert_eq!((limits.canary_share, limits.shadow_requests), (0.01, 500));
        for careless in [
            PolicyOverrides { canary_share: Some(0.5), ..PolicyOverrides::default() },
            PolicyOverrides { canary_share: Some(f64::NAN), ..PolicyOverrides::default() },
            PolicyOverrides { shadow_requests: Some(1), ..PolicyOverrides::default() },
            PolicyOverrides { fault_share: Some(0.5), ..PolicyOverrides::default() },
        ] {
            let why = RolloutPolicy::new(&settings, &careless).unwrap_err().to_string();
            assert!(why.contains("operator's bound") && why.contains("rollout."), "{why}");
        }
        let settings = RolloutSettings { stop_after: StopAfter::Shadow, ..settings };
        assert!(RolloutPolicy::new(&settings, &careful).is_err());
    }

    #[test]
    fn faults_and_latency_are_told_by_share_and_by_the_version_before() {
        let tally = ArmStats::default();
        for at in 0..1000 {
            tally.add(Duration::from_micros(1000), at % 50 == 0);
        }
        let seen = tally.counts();
        assert!(limits().faulty(&seen).unwrap().contains("20 of 1000"));
        let strict = RolloutPolicy { latency_slack_ms: 0.0, ..limits() };
        assert!(strict.slow(&seen, Some(500.0)).unwrap().contains("p99"));
        assert_eq!(strict.slow(&seen, Some(800.0)), None);
        assert_eq!(strict.slow(&seen, None), None);
        let few = ArmStats::default();
        few.add(Duration::from_millis(100), true);
        assert_eq!(
            (strict.faulty(&few.counts()), strict.slow(&few.counts(), Some(1.0))),
            (None, None)
        );
    }
}
