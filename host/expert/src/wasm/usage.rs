//! What a plugin used: calls and their time by export, instances, memory, log
//! lines. Counts alone; what may be used is decided elsewhere.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Call;

/// The longest that log lines and bytes are saved up for.
const LOG_BURST_S: f64 = 1.0;

/// How often it is said that lines are left out, at most.
const TELL: Duration = Duration::from_secs(10);

/// Calls of one export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Calls, failed ones included.
    pub calls: u64,
    /// Time in the guest.
    pub took: Duration,
}

/// What a plugin used since it was loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsageSnapshot {
    /// By export.
    pub calls: HashMap<Call, Spent>,
    /// Instances that were made, and the time that took.
    pub instances: Spent,
    /// The most linear memory that an instance had, in bytes.
    pub memory_bytes: u64,
    /// Log lines that were written.
    pub log_lines: u64,
    /// Log lines that were left out, since there were too many a second.
    pub log_lines_dropped: u64,
    /// Their bytes.
    pub log_bytes_dropped: u64,
}

/// Log lines and bytes that a plugin may write a second, over all its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRate {
    /// Lines.
    pub lines_per_s: u32,
    /// Bytes, after each line was cut.
    pub bytes_per_s: u32,
}

/// Counts as they go.
#[derive(Debug)]
pub(super) struct Usage {
    calls: Mutex<HashMap<Call, Spent>>,
    instances: AtomicU64,
    instances_ns: AtomicU64,
    memory_bytes: AtomicU64,
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    rate: LogRate,
    filled: Instant,
    lines: f64,
    bytes: f64,
    written: u64,
    dropped: u64,
    dropped_bytes: u64,
    /// When it was last said how many were left out, and how many that were.
    told: Option<(Instant, u64)>,
}

/// What becomes of a log line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// It is written.
    Write,
    /// It is left out, and that is said: so many were since it was last said.
    Tell(u64),
    /// It is left out.
    Drop,
}

impl Usage {
    pub(super) fn new(rate: LogRate) -> Usage {
        let log = Log {
            rate,
            filled: Instant::now(),
            lines: f64::from(rate.lines_per_s) * LOG_BURST_S,
            bytes: f64::from(rate.bytes_per_s) * LOG_BURST_S,
            written: 0,
            dropped: 0,
            dropped_bytes: 0,
            told: None,
        };
        Usage {
            calls: Mutex::default(),
            instances: AtomicU64::new(0),
            instances_ns: AtomicU64::new(0),
            memory_bytes: AtomicU64::new(0),
            log: Mutex::new(log),
        }
    }

    /// A call ended.
    pub(super) fn call(&self, call: Call, took: Duration) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = calls.entry(call).or_default();
        spent.calls += 1;
        spent.took += took;
    }

    /// An instance was made, or failed to be.
    pub(super) fn instance(&self, took: Duration) {
        self.instances.fetch_add(1, Ordering::Relaxed);
        self.instances_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// An instance has so much linear memory.
    pub(super) fn memory(&self, bytes: usize) {
        self.memory_bytes.fetch_max(bytes as u64, Ordering::Relaxed);
    }

    /// A line of so many bytes at `now`.
    pub(super) fn line(&self, bytes: usize, now: Instant) -> Line {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).line(bytes, now)
    }

    pub(super) fn snapshot(&self) -> UsageSnapshot {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        UsageSnapshot {
            calls: self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            instances: Spent {
                calls: self.instances.load(Ordering::Relaxed),
                took: Duration::from_nanos(self.instances_ns.load(Ordering::Relaxed)),
            },
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
            log_lines: log.written,
            log_lines_dropped: log.dropped,
            log_bytes_dropped: log.dropped_bytes,
        }
    }
}

impl Log {
    fn line(&mut self, bytes: usize, now: Instant) -> Line {
        let passed_s = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        let fill = |held: f64, rate: u32| {
            let rate = f64::from(rate);
            (held + passed_s * rate).min(rate * LOG_BURST_S)
        };
        self.lines = fill(self.lines, self.rate.lines_per_s);
        self.bytes = fill(self.bytes, self.rate.bytes_per_s);
        if self.lines >= 1.0 && self.bytes >= bytes as f64 {
            self.lines -= 1.0;
            self.bytes -= bytes as f64;
            self.written += 1;
            return Line::Write;
        }
        self.dropped += 1;
        self.dropped_bytes += bytes as u64;
        let told = self.told.map_or(0, |(_, dropped)| dropped);
        match self.told {
            Some((at, _)) if now.saturating_duration_since(at) < TELL => Line::Drop,
            _ => {
                self.told = Some((now, self.dropped));
                Line::Tell(self.dropped - told)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_bytes_a_second_are_bounded_and_the_rest_is_counted() {
        let usage = Usage::new(LogRate { lines_per_s: 3, bytes_per_s: 100 });
        let start = usage.log.lock().unwrap().filled;
        let at = |ms: u64| start + Duration::from_millis(ms);
        (0..3).for_each(|_| assert_eq!(usage.line(10, at(0)), Line::Write));
        assert_eq!(usage.line(10, at(0)), Line::Tell(1), "a fourth line at once");
        assert_eq!(usage.line(10, at(1)), Line::Drop, "which is said once in a while");
        assert_eq!(usage.line(90, at(1000)), Line::Write, "a second later there is room");
        assert_eq!(usage.line(90, at(1000)), Line::Drop, "but not for so many bytes");
        assert_eq!(usage.line(10, at(60_000)), Line::Write);
        let snapshot = usage.snapshot();
        assert_eq!((snapshot.log_lines, snapshot.log_lines_dropped), (5, 3));
        assert_eq!(snapshot.log_bytes_dropped, 110);
        for _ in 0..3 {
            usage.line(1, at(61_000));
        }
        assert_eq!(usage.line(1, at(61_000)), Line::Tell(3), "and how many there were since");
    }

    #[test]
    fn calls_instances_and_the_highest_memory_are_counted() {
        let usage = Usage::new(LogRate { lines_per_s: 1, bytes_per_s: 1 });
        usage.call(Call::Rank, Duration::from_millis(2));
        usage.call(Call::Rank, Duration::from_millis(3));
        usage.instance(Duration::from_millis(1));
        [1, 5, 3].into_iter().for_each(|bytes| usage.memory(bytes));
        let snapshot = usage.snapshot();
        let rank = Spent { calls: 2, took: Duration::from_millis(5) };
        assert_eq!(snapshot.calls, HashMap::from([(Call::Rank, rank)]));
        assert_eq!(snapshot.instances, Spent { calls: 1, took: Duration::from_millis(1) });
        assert_eq!(snapshot.memory_bytes, 5);
    }
}
