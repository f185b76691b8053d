//! What the loop did: quality by surface, task and arm, freshness, latency,
//! publications, and whether every impression became exactly one example.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{drive::Sent, operator::Note, scores::Row, watch::Live};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_stream::join::JoinedRecord;
use hypercast_stream::streams::{StreamEngine, Topic};
use hypercast_train::report::number;

/// How long the joiner may take for what was sent last.
const PATIENCE: Duration = Duration::from_secs(60);

/// Records a read.
const RECORDS: usize = 1024;

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Quality of served predictions.
    pub rows: Vec<Row>,
    /// Requests for rankings.
    pub requests: u64,
    /// Of those, answered by an arm.
    pub arms: BTreeMap<String, u64>,
    /// Of those, answered by the FM's own ranking.
    pub degraded: u64,
    /// Of those, refused.
    pub refused: u64,
    /// Round trips of requests.
    pub round_trip: Quantiles,
    /// What the daemon said at the end.
    pub live: Live,
    /// Impressions told.
    pub impressions: u64,
    /// Actions told in time.
    pub actions: u64,
    /// Actions told after their windows.
    pub late_actions: u64,
    /// What became of impressions.
    pub joined: Examples,
    /// What the operator decided.
    pub decisions: Vec<Note>,
    /// What each process had in memory at the end, in MiB.
    pub memory_mib: BTreeMap<String, f64>,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
}

/// Two quantiles.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Quantiles {
    /// Median, milliseconds.
    pub p50_ms: f64,
    /// 99th percentile, milliseconds.
    pub p99_ms: f64,
}

/// What is in the stream of joined examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Examples {
    /// Records with examples.
    pub records: u64,
    /// Impressions in them.
    pub impressions: u64,
    /// Impressions that are in more than one.
    pub doubled: u64,
    /// Corrected outcomes.
    pub corrected: u64,
}

impl Quantiles {
    /// Of values in milliseconds; zeros if there are none.
    pub fn of(mut took_ms: Vec<f64>) -> Quantiles {
        took_ms.sort_unstable_by(f64::total_cmp);
        let last = took_ms.len().saturating_sub(1) as f64;
        let at = |share: f64| took_ms.get((last * share).round() as usize).copied().unwrap_or(0.0);
        Quantiles { p50_ms: at(0.5), p99_ms: at(0.99) }
    }
}

impl Examples {
    /// Reads the stream until it has so many impressions, or for as long as the joiner may take.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    pub fn read(engine: &dyn StreamEngine, awaited: u64) -> Result<Examples> {
        let mut reader = engine.reader(&Topic::joined(), 0)?;
        let mut examples = Examples::default();
        let mut seen = HashSet::new();
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let records = reader.next(RECORDS, Duration::from_millis(500))?;
            if records.is_empty() && examples.impressions >= awaited {
                break;
            }
            for record in records {
                match JoinedRecord::decode(&record.payload)? {
                    JoinedRecord::Example(joined) => {
                        examples.records += 1;
                        for target in &joined.example.targets {
                            match seen.insert((joined.example.request, target.item.id)) {
                                true => examples.impressions += 1,
                                false => examples.doubled += 1,
                            }
                        }
                    }
                    JoinedRecord::Correction(joined) => {
                        examples.corrected += joined.example.targets.len() as u64;
                    }
                }
            }
        }
        Ok(examples)
    }
}

impl Report {
    /// Impressions that are in no example.
    pub fn lost(&self) -> u64 {
        self.impressions.saturating_sub(self.joined.impressions)
    }

    /// From what was sent, and what it was worth.
    pub fn new(sent: &Sent, rows: Vec<Row>, (live, joined): (Live, Examples)) -> Report {
        Report {
            rows,
            requests: sent.requests,
            arms: sent.arms.clone(),
            degraded: sent.degraded,
            refused: sent.refused,
            round_trip: Quantiles::of(sent.took_ms.clone()),
            live,
            impressions: sent.impressions,
            actions: sent.actions,
            late_actions: sent.late,
            joined,
            decisions: Vec::new(),
            memory_mib: BTreeMap::new(),
            seconds: BTreeMap::new(),
        }
    }

    /// Refuses a run in which an impression was lost or doubled.
    ///
    /// # Errors
    /// Such a run.
    pub fn check(&self) -> Result<()> {
        if self.lost() == 0 && self.joined.doubled == 0 {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "of {} impressions {} are in no example, and {} in more than one",
            self.impressions,
            self.lost(),
            self.joined.doubled
        )))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12} {:<14} {:<16} {:>8} {:>8} {:>8} {:>8}",
            "surface", "task", "arm", "rows", "NE", "AUC", "GAUC"
        )?;
        let mut last = None;
        // Slices of a few rows, all alike, are in the JSON alone.
        for row in self.rows.iter().filter(|row| row.ne.is_some()) {
            let key = (&row.surface, &row.task);
            let [surface, task] = match last.replace(key) == Some(key) {
                true => ["", ""],
                false => [row.surface.as_str(), row.task.as_str()],
            };
            let [ne, auc, gauc] = [row.ne, row.auc, row.gauc].map(number);
            let (arm, n) = (&row.arm, row.n);
            writeln!(f, "{surface:<12} {task:<14} {arm:<16} {n:>8} {ne:>8} {auc:>8} {gauc:>8}")?;
        }
        writeln!(f, "\n{:<28} {:>10} {:>10}", "", "p50 ms", "p99 ms")?;
        let stages = self.live.stages.iter().map(|(name, took)| (name.as_str(), took));
        let fresh = self.live.freshness.iter().map(|(name, took)| (name.as_str(), took));
        for (name, took) in
            [("round trip", &self.round_trip)].into_iter().chain(stages).chain(fresh)
        {
            writeln!(f, "{name:<28} {:>10.1} {:>10.1}", took.p50_ms, took.p99_ms)?;
        }
        let list = |of: &BTreeMap<String, u64>| {
            let of: Vec<String> = of.iter().map(|(name, n)| format!("{name} {n}")).collect();
            of.join(", ")
        };
        let Report { requests, degraded, refused, impressions, late_actions, joined, .. } = self;
        writeln!(
            f,
            "\n{requests} requests ({}), {degraded} degraded, {refused} refused",
            list(&self.arms)
        )?;
        writeln!(
            f,
            "publications served: {}; {} refused",
            list(&self.live.publications),
            self.live.refused_publications
        )?;
        writeln!(
            f,
            "{impressions} impressions told, {} in examples: {} lost, {} doubled; {late_actions} outcomes told late, {} corrected",
            joined.impressions,
            self.lost(),
            joined.doubled,
            joined.corrected
        )?;
        let of: Vec<String> =
            self.memory_mib.iter().map(|(name, mib)| format!("{name} {mib:.0} MiB")).collect();
        writeln!(f, "memory: {}", of.join(", "))?;
        let of: Vec<String> =
            self.seconds.iter().map(|(step, s)| format!("{step} {s:.1} s")).collect();
        writeln!(f, "{}", of.join(", "))
    }
}
