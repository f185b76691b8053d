//! What a plugin used (calls and their time by export, instances, memory), the limit of its log
//! lines, and its last log lines. Limits of other resources are in `engine` and `plugin`.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::fault::Call;
use crate::lock;

/// The period of unused log lines and bytes that a plugin may use at once later.
const LOG_BURST_S: f64 = 1.0;

/// The shortest time between two reports that a plugin's log lines are dropped.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// The calls of one export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallTotals {
    /// The number of calls, failed ones included.
    pub calls: u64,
    /// The total time in the guest.
    pub took: Duration,
}

/// What a plugin used since it was loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsageSnapshot {
    /// The calls by export.
    pub calls: HashMap<Call, CallTotals>,
    /// The number of instances made, and the time to make them.
    pub instances: CallTotals,
    /// The largest linear memory of an instance, in bytes.
    pub memory_bytes: u64,
    /// The number of log lines written.
    pub log_lines: u64,
    /// The number of log lines dropped, because there were too many a second.
    pub log_lines_dropped: u64,
    /// The size of the dropped log lines.
    pub log_bytes_dropped: u64,
}

/// What a plugin may log, over all its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRate {
    /// Log lines a second.
    pub lines_per_s: u32,
    /// Bytes a second, each line counted as it is after cutting.
    pub bytes_per_s: u32,
}

/// Counts what one plugin uses, and limits its log lines. Who reads the counts holds up no call.
#[derive(Debug)]
pub(super) struct Usage {
    calls: [CallCounter; Call::ALL.len()],
    instances: CallCounter,
    memory_bytes: AtomicU64,
    log_lines: AtomicU64,
    log_lines_dropped: AtomicU64,
    log_bytes_dropped: AtomicU64,
    /// Only calls that log take it.
    log: Mutex<LogBucket>,
}

#[derive(Debug, Default)]
struct CallCounter {
    calls: AtomicU64,
    took_ns: AtomicU64,
}

#[derive(Debug)]
struct LogBucket {
    rate: LogRate,
    /// Unused log lines and bytes (a token bucket), and when they were last filled up.
    lines: f64,
    bytes: f64,
    filled_at: Instant,
    /// When dropped log lines were last reported, and their number up to then.
    reported_at: Option<Instant>,
    reported: u64,
}

/// Whether a log line is written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LogDecision {
    /// The host writes the line.
    Write,
    /// The line is dropped, and the host reports the number of lines dropped since the last report.
    DropAndReport(u64),
    /// The line is dropped silently.
    Drop,
}

impl Usage {
    pub(super) fn new(rate: LogRate) -> Usage {
        let log = LogBucket {
            rate,
            lines: f64::from(rate.lines_per_s) * LOG_BURST_S,
            bytes: f64::from(rate.bytes_per_s) * LOG_BURST_S,
            filled_at: Instant::now(),
            reported_at: None,
            reported: 0,
        };
        Usage {
            calls: Default::default(),
            instances: CallCounter::default(),
            memory_bytes: AtomicU64::new(0),
            log_lines: AtomicU64::new(0),
            log_lines_dropped: AtomicU64::new(0),
            log_bytes_dropped: AtomicU64::new(0),
            log: Mutex::new(log),
        }
    }

    /// Counts a call that ended.
    pub(super) fn call(&self, call: Call, took: Duration) {
        self.calls[call as usize].add(took);
    }

    /// Counts an instance that was made, or could not be made.
    pub(super) fn instance(&self, took: Duration) {
        self.instances.add(took);
    }

    /// Records an instance's linear memory.
    pub(super) fn memory(&self, bytes: usize) {
        self.memory_bytes.fetch_max(bytes as u64, Relaxed);
    }

    /// Decides on a log line of `bytes` bytes at `now`.
    pub(super) fn line(&self, bytes: usize, now: Instant) -> LogDecision {
        let bucket = &mut *lock(&self.log);
        let passed_s = now.saturating_duration_since(bucket.filled_at).as_secs_f64();
        bucket.filled_at = now;
        let fill = |unused: f64, rate: u32| {
            let rate = f64::from(rate);
            (unused + passed_s * rate).min(rate * LOG_BURST_S)
        };
        bucket.lines = fill(bucket.lines, bucket.rate.lines_per_s);
        bucket.bytes = fill(bucket.bytes, bucket.rate.bytes_per_s);
        if bucket.lines >= 1.0 && bucket.bytes >= bytes as f64 {
            bucket.lines -= 1.0;
            bucket.bytes -= bytes as f64;
            self.log_lines.fetch_add(1, Relaxed);
            return LogDecision::Write;
        }
        let dropped = self.log_lines_dropped.fetch_add(1, Relaxed) + 1;
        self.log_bytes_dropped.fetch_add(bytes as u64, Relaxed);
        let is_early = |at| now.saturating_duration_since(at) < REPORT_EVERY;
        if bucket.reported_at.is_some_and(is_early) {
            return LogDecision::Drop;
        }
        bucket.reported_at = Some(now);
        LogDecision::DropAndReport(dropped - std::mem::replace(&mut bucket.reported, dropped))
    }

    pub(super) fn snapshot(&self) -> UsageSnapshot {
        let each = Call::ALL.into_iter().map(|call| (call, self.calls[call as usize].totals()));
        UsageSnapshot {
            calls: each.filter(|(_, totals)| totals.calls > 0).collect(),
            instances: self.instances.totals(),
            memory_bytes: self.memory_bytes.load(Relaxed),
            log_lines: self.log_lines.load(Relaxed),
            log_lines_dropped: self.log_lines_dropped.load(Relaxed),
            log_bytes_dropped: self.log_bytes_dropped.load(Relaxed),
        }
    }
}

impl CallCounter {
    fn add(&self, took: Duration) {
        self.calls.fetch_add(1, Relaxed);
        self.took_ns.fetch_add(took.as_nanos() as u64, Relaxed);
    }

    fn totals(&self) -> CallTotals {
        let took = Duration::from_nanos(self.took_ns.load(Relaxed));
        CallTotals { calls: self.calls.load(Relaxed), took }
    }
}

/// Log lines that are kept of each expert.
const LINES: usize = 256;

/// Experts whose lines are kept. A new one replaces the one with the oldest last line.
const EXPERTS: usize = 256;

/// A log line of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When it was written, in milliseconds since 1970.
    pub at_ms: i64,
    /// The plugin that wrote it.
    pub plugin: String,
    /// One of debug, info, warn and error.
    pub level: String,
    /// The line, escaped and cut to a bounded length.
    pub text: String,
}

/// The last lines of all guests of an engine, by the name of their expert, so that authors can see
/// theirs. A guest cannot choose that name.
#[derive(Debug, Default)]
pub struct GuestLog {
    lines: Mutex<HashMap<String, VecDeque<LogLine>>>,
}

impl GuestLog {
    /// Keeps a line of an expert and drops the expert's oldest one if there are too many.
    pub(super) fn keep(&self, expert: &str, line: LogLine) {
        let mut all = lock(&self.lines);
        if !all.contains_key(expert) && all.len() == EXPERTS {
            let silent = all.iter().min_by_key(|(_, lines)| lines.back().map(|line| line.at_ms));
            let silent = silent.expect("there are many").0.clone();
            all.remove(&silent);
        }
        let lines = all.entry(expert.to_owned()).or_default();
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// An expert's lines, oldest first.
    pub fn lines(&self, expert: &str) -> Vec<LogLine> {
        let all = lock(&self.lines);
        all.get(expert).into_iter().flatten().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_bytes_a_second_are_bounded_and_the_rest_is_counted() {
        let usage = Usage::new(LogRate { lines_per_s: 3, bytes_per_s: 100 });
        let start = lock(&usage.log).filled_at;
        let at = |ms: u64| start + Duration::from_millis(ms);
        (0..3).for_each(|_| assert_eq!(usage.line(10, at(0)), LogDecision::Write));
        assert_eq!(usage.line(10, at(0)), LogDecision::DropAndReport(1), "a fourth line at once");
        assert_eq!(usage.line(10, at(1)), LogDecision::Drop, "which is reported once in a while");
        assert_eq!(usage.line(90, at(1000)), LogDecision::Write, "a second later there is room");
        assert_eq!(usage.line(90, at(1000)), LogDecision::Drop, "but not for so many bytes");
        assert_eq!(usage.line(10, at(60_000)), LogDecision::Write);
        let snapshot = usage.snapshot();
        assert_eq!((snapshot.log_lines, snapshot.log_lines_dropped), (5, 3));
        assert_eq!(snapshot.log_bytes_dropped, 110);
        for _ in 0..3 {
            usage.line(1, at(61_000));
        }
        assert_eq!(
            usage.line(1, at(61_000)),
            LogDecision::DropAndReport(3),
            "and the number since the last report"
        );
    }

    #[test]
    fn calls_instances_and_the_highest_memory_are_counted() {
        let usage = Usage::new(LogRate { lines_per_s: 1, bytes_per_s: 1 });
        usage.call(Call::Rank, Duration::from_millis(2));
        usage.call(Call::Rank, Duration::from_millis(3));
        usage.instance(Duration::from_millis(1));
        [1, 5, 3].into_iter().for_each(|bytes| usage.memory(bytes));
        let snapshot = usage.snapshot();
        let rank = CallTotals { calls: 2, took: Duration::from_millis(5) };
        assert_eq!(snapshot.calls, HashMap::from([(Call::Rank, rank)]));
        assert_eq!(snapshot.instances, CallTotals { calls: 1, took: Duration::from_millis(1) });
        assert_eq!(snapshot.memory_bytes, 5);
    }

    #[test]
    fn lines_and_experts_are_bounded() {
        let log = GuestLog::default();
        let line =
            |text: String| LogLine { at_ms: 1, plugin: "mlp".into(), level: "info".into(), text };
        for at in 0..LINES + 10 {
            log.keep("a", line(at.to_string()));
        }
        let lines = log.lines("a");
        assert_eq!((lines.len(), lines[0].text.as_str()), (LINES, "10"));
        for expert in 0..EXPERTS * 2 {
            log.keep(&expert.to_string(), line("x".into()));
        }
        assert_eq!(log.lines.lock().unwrap().len(), EXPERTS);
        assert!(log.lines("nobody").is_empty() && log.lines("mlp").is_empty());
    }
}
