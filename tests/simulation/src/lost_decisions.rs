//! Decisions about versions that the server loses: who had read them, or reads around them, tells
//! it and decides nothing. The operator does what they say: all is stopped, and the stream restored
//! from a copy.

use std::time::Duration;

use hypercast_stream::{
    registry::RegistryFollower,
    streams::{StreamRecord, Topic},
};

use crate::{
    plan::{FaultKind, PlannedFault},
    world::{Process, Simulation},
};

/// What every process says of missing decisions.
const REMEDY: &str = "restore this stream";

/// Decisions that are missing at the server.
pub(crate) struct LostDecisions {
    records: Vec<StreamRecord>,
    /// Whether the stream ended behind them, so that others may have come at their positions.
    is_tail: bool,
    /// Since the beginning.
    at: Duration,
    /// In the order of what processes decide.
    moment: u64,
    /// The processes that had read some of them, each with its life.
    readers: Vec<(usize, u64)>,
}

impl Simulation {
    /// Loses decisions; false if there are none, or others are lost.
    pub(crate) fn lose_decisions(&self, count: u32, inside: Option<u64>) -> bool {
        if self.lost_decisions.borrow().is_some() {
            return false;
        }
        let (topic, mut server) = (Topic::versions(), self.server.borrow_mut());
        let records = match inside {
            Some(choice) => server.lose_inside(&topic, count, choice),
            None => server.lose_tail(&topic, count),
        };
        drop(server);
        let Some(first) = records.first().map(|record| record.position) else { return false };
        let has_read = |process: &Process| {
            let life = process.life.try_borrow().ok()?;
            Some(life.as_ref()?.decider.versions.position() > first)
        };
        let numbered = self.processes.iter().enumerate();
        let readers = numbered.filter(|(_, process)| has_read(process) == Some(true));
        let readers = readers.map(|(at, process)| (at, process.lives.get())).collect();
        let (now, is_tail) = (self.timeline.now.get(), inside.is_none());
        let lost = records.len();
        self.timeline.trace.line(now, "server", || format!("loses {lost} of versions at {first}"));
        let moment = self.ledger.borrow_mut().moment();
        let lost = LostDecisions { records, is_tail, at: now, moment, readers };
        *self.lost_decisions.borrow_mut() = Some(lost);
        true
    }

    /// Holds what a process knows of lost decisions, once it has read what there is, against what
    /// it must know. `opened` is when its life began.
    pub(crate) fn check_told(&self, process: usize, opened: Duration, known: &RegistryFollower) {
        let lost = self.lost_decisions.borrow();
        let Some(lost) = lost.as_ref() else { return };
        let of = (process, self.processes[process].lives.get());
        let last = lost.records.last().map_or(0, |record| record.position);
        let must_know = match lost.is_tail {
            true => lost.readers.contains(&of),
            false => opened > lost.at && known.position() > last,
        };
        // Decisions of later versions are left out, too, and the first one is told.
        let is_later = |fault: &PlannedFault| matches!(fault.kind, FaultKind::LaterDecision);
        let first = known.registry().unapplied().map(|unapplied| &unapplied.first);
        let is_told = first
            .is_some_and(|first| first.contains(REMEDY) || self.plan.faults.iter().any(is_later));
        if must_know && !is_told {
            let role = self.processes[process].role;
            self.violate("decisions", format!("{role:?} passes lost decisions without a word"));
        }
    }

    /// Does what processes say of missing decisions; false if they say nothing.
    pub(crate) fn mend_decisions(&self, words: &str) -> bool {
        if !words.contains(REMEDY) || self.lost_decisions.borrow().is_none() {
            return false;
        }
        self.processes.iter().for_each(|process| self.kill(process));
        self.restore_decisions();
        true
    }

    /// Restores what is lost. What was decided since then at the same positions is gone, so
    /// processes need not have what they were told of it.
    pub(crate) fn restore_decisions(&self) {
        let Some(lost) = self.lost_decisions.borrow_mut().take() else { return };
        let (topic, mut server) = (Topic::versions(), self.server.borrow_mut());
        let undone = match lost.records.first() {
            Some(first) if lost.is_tail => server.cut(&topic, first.position),
            _ => 0,
        };
        server.put_back(&topic, &lost.records);
        drop(server);
        if undone > 0 {
            let mut ledger = self.ledger.borrow_mut();
            ledger.registered.retain(|registered| registered.ended < lost.moment);
            ledger.decisions_undone = true;
        }
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "operator", || format!("restores versions, less {undone}"));
    }
}
