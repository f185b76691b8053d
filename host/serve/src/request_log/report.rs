//! What came of a replay: how rankings differ, faults, times. As JSON, or in words.

use std::{collections::BTreeMap, fmt};

use hypercast_core::quantile::quantile;
use serde::Serialize;

/// A comparison over requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ReplayReport {
    /// What was run.
    pub of: String,
    /// What it is compared with.
    pub against: String,
    /// Requests that were run.
    pub requests: usize,
    /// Requests that were left out, by reason.
    pub left_out: BTreeMap<String, usize>,
    /// Requests that both ranked.
    pub compared: usize,
    /// Those of them whose rankings differ anywhere.
    pub differing: usize,
    /// The share of them with the same first candidate.
    pub top_1: Option<f64>,
    /// Length of the lists that `top_k` is over.
    pub k: usize,
    /// The mean share of the first k candidates that both have.
    pub top_k: Option<f64>,
    /// The mean rank correlation (Spearman) over candidates that both ranked.
    pub rank_correlation: Option<f64>,
    /// Faults by cause, with the first one's words.
    pub faults: BTreeMap<String, FaultSummary>,
    /// The same of what it is compared with.
    pub faults_against: BTreeMap<String, FaultSummary>,
    /// Times a request.
    pub times: Option<ReplayTimes>,
    /// The same of what it is compared with; none for recorded answers.
    pub times_against: Option<ReplayTimes>,
}

/// Faults of one cause.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FaultSummary {
    /// How many.
    pub count: usize,
    /// What the first one said.
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
    /// Of times in microseconds; none of none.
    pub fn of(mut times_us: Vec<f64>) -> Option<Self> {
        if times_us.is_empty() {
            return None;
        }
        let mut at = |share| quantile(&mut times_us, share);
        Some(Self { p50_us: at(0.5), p99_us: at(0.99) })
    }
}

impl ReplayReport {
    /// Faults of all causes.
    pub fn fault_count(&self) -> usize {
        self.faults.values().map(|faults| faults.count).sum()
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
