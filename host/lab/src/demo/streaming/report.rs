//! The result of the streaming demo: quality by surface, task and arm, freshness, latency,
//! publications, and whether every impression became exactly one example.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    time::{Duration, Instant},
};

use hypercast_stream::{
    join::JoinedRecord,
    streams::{StreamEngine, Topic},
};
use serde::Serialize;

use super::{load::ReplayCounts, operator::DecisionRecord, status::LiveStatus};
use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::{LatencyQuantiles, MetricRow, table},
};

/// The time that the joiner has for the last events.
const JOIN_WITHIN: Duration = Duration::from_secs(60);

/// Records per read.
const RECORDS: usize = 1024;

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct StreamingReport {
    /// Quality of served predictions.
    pub rows: Vec<MetricRow>,
    /// What was sent, and how it was answered.
    #[serde(flatten)]
    pub sent: ReplayCounts,
    /// Round trips of requests.
    pub round_trip: LatencyQuantiles,
    /// The daemon's numbers at the end.
    pub live: LiveStatus,
    /// The joined examples.
    pub joined: JoinedCounts,
    /// The operator's decisions.
    pub decisions: Vec<DecisionRecord>,
    /// Resident memory of each process at the end, in MiB.
    pub memory_mib: BTreeMap<String, f64>,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
}

/// The contents of the stream of joined examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct JoinedCounts {
    /// Examples.
    pub records: u64,
    /// Impressions in them.
    pub impressions: u64,
    /// Impressions that are in more than one.
    pub doubled: u64,
    /// Corrected outcomes.
    pub corrected: u64,
}

impl JoinedCounts {
    /// Reads the stream until it has `expected` impressions, or the joiner's time is over.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    pub fn read(engine: &dyn StreamEngine, expected: u64) -> Result<JoinedCounts> {
        let mut reader = engine.reader(&Topic::joined(), 0)?;
        let mut examples = JoinedCounts::default();
        let mut seen = HashSet::new();
        let until = Instant::now() + JOIN_WITHIN;
        while Instant::now() < until {
            let records = reader.next(RECORDS, Duration::from_millis(500))?;
            if records.is_empty() && examples.impressions >= expected {
                break;
            }
            for record in records {
                match JoinedRecord::decode(&record.payload)? {
                    JoinedRecord::Example(joined) => {
                        examples.records += 1;
                        for target in &joined.example.targets {
                            if seen.insert((joined.example.request, target.item.id)) {
                                examples.impressions += 1;
                            } else {
                                examples.doubled += 1;
                            }
                        }
                    }
                    JoinedRecord::Correction(joined) => {
                        examples.corrected += joined.example.targets.len() as u64;
                    }
                    JoinedRecord::Content(_) => {}
                }
            }
        }
        Ok(examples)
    }
}

impl StreamingReport {
    /// Impressions that are in no example.
    pub fn lost(&self) -> u64 {
        self.sent.impressions.saturating_sub(self.joined.impressions)
    }

    /// Checks that no impression was lost or doubled.
    ///
    /// # Errors
    /// An impression that was.
    pub fn check(&self) -> Result<()> {
        if self.lost() == 0 && self.joined.doubled == 0 {
            return Ok(());
        }
        Err(Error::internal(format!(
            "of {} impressions {} are in no example, and {} in more than one",
            self.sent.impressions,
            self.lost(),
            self.joined.doubled
        )))
    }
}

impl fmt::Display for StreamingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Slices of a few rows with equal labels have no metrics; only the JSON has them.
        f.write_str(&table(
            self.rows.iter().filter(|row| row.metrics.ne.or(row.metrics.mse).is_some()),
        ))?;
        writeln!(f, "\n{:<28} {:>10} {:>10}", "", "p50 ms", "p99 ms")?;
        let named = self.live.stages.iter().chain(&self.live.freshness);
        let named = named.map(|(name, latency)| (name.as_str(), latency));
        for (name, latency) in [("round trip", &self.round_trip)].into_iter().chain(named) {
            writeln!(f, "{name:<28} {:>10.1} {:>10.1}", latency.p50_ms, latency.p99_ms)?;
        }
        let list = |counts: &BTreeMap<String, u64>| {
            let counts: Vec<_> = counts.iter().map(|(name, n)| format!("{name} {n}")).collect();
            counts.join(", ")
        };
        let Self { sent, joined, .. } = self;
        let ReplayCounts { requests, degraded, refused, impressions, late_actions, .. } = sent;
        let arms = list(&sent.arms);
        writeln!(f, "\n{requests} requests ({arms}), {degraded} degraded, {refused} refused")?;
        let (served, refused) = (list(&self.live.publications), self.live.refused_publications);
        writeln!(f, "publications served: {served}; {refused} refused")?;
        writeln!(
            f,
            "{impressions} impressions sent, {} in examples: {} lost, {} doubled; {late_actions} \
             outcomes sent late, {} corrected",
            joined.impressions,
            self.lost(),
            joined.doubled,
            joined.corrected
        )?;
        let memory = self.memory_mib.iter().map(|(name, mib)| format!("{name} {mib:.0} MiB"));
        writeln!(f, "memory: {}", memory.collect::<Vec<_>>().join(", "))?;
        writeln!(f, "{}", crate::demo::step_times(&self.seconds))
    }
}
