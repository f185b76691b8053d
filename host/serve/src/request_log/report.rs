//! The result of a replay: how rankings differ, faults and times. As JSON or as text.

use std::{collections::BTreeMap, fmt};

use hypercast_core::quantile::quantile;
use serde::Serialize;

/// A comparison over requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ReplayReport {
    /// What was replayed.
    pub of: String,
    /// What it was compared with.
    pub against: String,
    /// Number of requests that were run.
    pub requests: usize,
    /// Number of requests that were left out, by reason.
    pub left_out: BTreeMap<String, usize>,
    /// Number of requests that both ranked.
    pub compared: usize,
    /// Number of those whose rankings differ.
    pub differing: usize,
    /// Share of those with the same first candidate.
    pub top_1: Option<f64>,
    /// Length of the lists that `top_k` is over.
    pub k: usize,
    /// Mean share of the first k candidates that both lists have.
    pub top_k: Option<f64>,
    /// Mean rank correlation (Spearman) over candidates that both ranked.
    pub rank_correlation: Option<f64>,
    /// Faults by cause, with the first message of each.
    pub faults: BTreeMap<String, FaultSummary>,
    /// The same for what it was compared with.
    pub faults_against: BTreeMap<String, FaultSummary>,
    /// Times per request.
    pub times: Option<ReplayTimes>,
    /// The same for what it was compared with; none for recorded answers.
    pub times_against: Option<ReplayTimes>,
}

/// Faults of one cause.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FaultSummary {
    /// Number of faults.
    pub count: usize,
    /// The first one's message.
    pub first: String,
}

/// Times of network and guest together, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReplayTimes {
    /// The median.
    pub p50_us: f64,
    /// The 99th percentile.
    pub p99_us: f64,
}

impl ReplayTimes {
    /// Quantiles of `times_us`; none without times.
    pub fn of(mut times_us: Vec<f64>) -> Option<Self> {
        if times_us.is_empty() {
            return None;
        }
        let mut at = |share| quantile(&mut times_us, share);
        Some(Self { p50_us: at(0.5), p99_us: at(0.99) })
    }
}

impl fmt::Display for ReplayReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: Option<f64>| match share {
            Some(share) => format!("{:.1} %", share * 100.0),
            None => "-".into(),
        };
        writeln!(f, "{} against {}", self.of, self.against)?;
        writeln!(f, "requests          {}", self.requests)?;
        for (why, count) in &self.left_out {
            writeln!(f, "left out          {count}: {why}")?;
        }
        writeln!(f, "rankings differ   {} of {}", self.differing, self.compared)?;
        writeln!(f, "same first        {}", percent(self.top_1))?;
        writeln!(f, "top {:<13} {} in common", self.k, percent(self.top_k))?;
        match self.rank_correlation {
            Some(rho) => writeln!(f, "rank correlation  {rho:.4}")?,
            None => writeln!(f, "rank correlation  -")?,
        }
        for (whose, faults) in [("", &self.faults), (" (against)", &self.faults_against)] {
            for (cause, FaultSummary { count, first }) in faults {
                writeln!(f, "faults{whose:<12}{count} {cause}: {first}")?;
            }
        }
        for (whose, times) in [("", self.times), (" (against)", self.times_against)] {
            if let Some(ReplayTimes { p50_us, p99_us }) = times {
                writeln!(f, "time{whose:<14}p50 {p50_us:.0} us, p99 {p99_us:.0} us")?;
            }
        }
        Ok(())
    }
}
