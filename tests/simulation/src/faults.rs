//! What a fault of the plan does when it is due, and what an operator does afterwards.

use std::{path::Path, rc::Rc, time::Duration};

use hypercast_core::hash::mix_parts;
use hypercast_stream::streams::{StreamRecord, Topic};

use crate::{
    earlier,
    host::ArmedFault,
    installation::engine,
    plan::{FaultKind, LosingStream, ROLES},
    world::{Due, Process, Simulation, Stepped},
};

/// Where processes keep their state.
const STATE: &str = "/state";

impl Simulation {
    /// What happens when a fault is due.
    pub(crate) fn begin_fault(&self, number: usize) {
        let fault = &self.plan.faults[number];
        if self.healed.get() {
            return;
        }
        let at = ROLES.iter().position(|&role| role == fault.on).expect("all roles are there");
        let process = &self.processes[at];
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "fault", || format!("{:?} on {:?}", fault.kind, fault.on));
        match fault.kind {
            FaultKind::Disk { fault, spared, hits } => {
                process.waiting.borrow_mut().push(ArmedFault { fault, spared, hits });
                return;
            }
            FaultKind::Stop => process.stopping.set(true),
            FaultKind::ClockJump { by_ms } => {
                process.machine.clock_ahead_ms.update(|ahead| ahead + by_ms);
                let ahead = process.machine.clock_ahead_ms.get();
                self.furthest_ahead_ms.set(self.furthest_ahead_ms.get().max(ahead));
            }
            FaultKind::Partition { for_ms } => {
                process.network.cut_until.set(now + Duration::from_millis(for_ms));
            }
            FaultKind::LostRequests { count } => process.network.lost_requests.set(count),
            FaultKind::LostAnswers { count } => process.network.lost_answers.set(count),
            FaultKind::BitRot { file } => {
                self.kill(process);
                if !self.rot(process, file, mix_parts(&[self.plan.seed, 5, number as u64])) {
                    return;
                }
            }
            FaultKind::RestoredState { age_ms } => {
                let copy = process.machine.disk.borrow().copy(Path::new(STATE));
                let Some(copy) = copy else { return };
                self.copies.borrow_mut().insert(number, copy);
                self.schedule(Duration::from_millis(age_ms), Due::PutBack(number));
            }
            FaultKind::LaterEvent | FaultKind::LaterDecision | FaultKind::EarlierDecision => {
                if !self.append_foreign(at, fault.kind) {
                    return;
                }
            }
            FaultKind::EarlierRelease => {
                process.stopping.set(true);
                process.leaves_earlier_states.set(true);
                return;
            }
            FaultKind::LostTail { of: LosingStream::Joined, count } => {
                self.kill(process);
                if !self.cut_joined(count) {
                    return;
                }
            }
            FaultKind::LostInside { of: LosingStream::Joined, count } => {
                self.kill(process);
                if !self.lose_joined(count, mix_parts(&[self.plan.seed, 7, number as u64])) {
                    return;
                }
            }
            FaultKind::LostTail { of: LosingStream::Versions, count } => {
                if !self.lose_decisions(count, None) {
                    return;
                }
            }
            FaultKind::LostInside { of: LosingStream::Versions, count } => {
                // Who has read them all does not read them again.
                self.kill(process);
                let choice = mix_parts(&[self.plan.seed, 6, number as u64]);
                if !self.lose_decisions(count, Some(choice)) {
                    return;
                }
            }
            FaultKind::LostTail { of, count } => {
                let lost = self.server.borrow_mut().lose_tail(&of.topic(), count);
                if !self.note_lost(of.topic(), lost) {
                    return;
                }
            }
            FaultKind::LostInside { of, count } => {
                let choice = mix_parts(&[self.plan.seed, 6, number as u64]);
                let lost = self.server.borrow_mut().lose_inside(&of.topic(), count, choice);
                if !self.note_lost(of.topic(), lost) {
                    return;
                }
            }
            FaultKind::SecondJoiner { for_ms } => {
                process.wanted.set(true);
                self.schedule(Duration::from_millis(for_ms), Due::EndOfSecondJoiner);
            }
        }
        *self.struck.borrow_mut().entry((fault.kind.name(), fault.on)).or_default() += 1;
    }

    /// Loses joined records inside of their stream, near its end; false if there are none.
    fn lose_joined(&self, count: u32, choice: u64) -> bool {
        let (now, topic) = (self.timeline.now.get(), Topic::joined());
        let newest = self.server.borrow().end(&topic).saturating_sub(2 * u64::from(count));
        let first = newest + choice % u64::from(count);
        let lost = self.server.borrow_mut().lose_at(&topic, first, count);
        self.timeline.trace.line(now, "server", || format!("loses joined {first}.."));
        let is_lost = !lost.is_empty();
        self.ledger.borrow_mut().lost_joined.extend(lost);
        is_lost
    }

    /// Loses the last joined records; false if there are none.
    fn cut_joined(&self, count: u32) -> bool {
        let now = self.timeline.now.get();
        let cut = self.server.borrow_mut().lose_tail(&Topic::joined(), count);
        if cut.is_empty() {
            return false;
        }
        // It may have lost others before them already.
        let end = self.server.borrow().end(&Topic::joined());
        self.timeline.trace.line(now, "server", || format!("cuts joined at {end}"));
        let mut ledger = self.ledger.borrow_mut();
        let before = ledger.lost_joined.extract_if(.., |lost| lost.position >= end);
        let before: Vec<StreamRecord> = before.collect();
        ledger.cut_joined.extend(before.into_iter().chain(cut));
        ledger.cuts += 1;
        true
    }

    /// Notes records that the server lost; false if there are none.
    fn note_lost(&self, topic: Topic, lost: Vec<StreamRecord>) -> bool {
        let now = self.timeline.now.get();
        let positions: Vec<u64> = lost.iter().map(|record| record.position).collect();
        self.timeline.trace.line(now, "server", || format!("loses {topic} {positions:?}"));
        self.ledger.borrow_mut().lost.entry(topic).or_default().extend(lost);
        !positions.is_empty()
    }

    /// Appends what another version of the host would; false if the process does not run.
    fn append_foreign(&self, at: usize, kind: FaultKind) -> bool {
        let process = &self.processes[at];
        let Ok(life) = process.life.try_borrow_mut() else { return false };
        let host = process.host.borrow().clone().filter(|host| !host.is_gone());
        let (Some(host), Some(life)) = (host, &*life) else { return false };
        let appended = self.run_on(&host, || match kind {
            FaultKind::LaterEvent => life.append_later_event().map(|()| true),
            FaultKind::EarlierDecision => {
                let engine = engine(&self.plan, at, self.plant)?;
                earlier::decide(&*engine).map(|()| true)
            }
            _ => life.append_later_decision().map(|()| true),
        });
        matches!(appended, Stepped::Went { .. })
    }

    /// Ends a process at once, as `kill -9`.
    pub(crate) fn kill(&self, process: &Process) {
        if let Some(host) = &*process.host.borrow() {
            host.ended.set(true);
        }
    }

    /// Ends the processes of a machine, and puts the state back that a fault had copied.
    pub(crate) fn put_back(&self, number: usize) {
        let Some(copy) = self.copies.borrow_mut().remove(&number) else { return };
        let at = ROLES.iter().position(|&role| role == self.plan.faults[number].on);
        let machine = &self.processes[at.expect("all roles are there")].machine;
        for process in &self.processes {
            if Rc::ptr_eq(&process.machine, machine) {
                self.kill(process);
                process.streams.borrow_mut().forget_saved();
                self.ledger.borrow_mut().rollouts.put_back(process.role);
            }
        }
        machine.disk.borrow_mut().put_back(Path::new(STATE), &copy);
    }

    /// Does what an error says: of missing records, that processes go on without them; of a damaged
    /// file, that it is removed or restored. False if there is nothing to be done.
    pub(crate) fn repair(&self, process: &Process, error: &str) -> bool {
        if error.contains("engine.on_gap") && !self.gaps_accepted.replace(true) {
            let now = self.timeline.now.get();
            self.timeline.trace.line(now, "operator", || "sets on_gap to continue".to_owned());
            // Processes read their configuration when they start.
            self.processes.iter().for_each(|process| process.stopping.set(true));
            return true;
        }
        self.mend_decisions(error) || self.mend_rot(&process.machine, error)
    }
}
