//! What a fault of the plan does when it is due, and what an operator does afterwards.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use hypercast_core::{disk, hash::mix_parts};
use hypercast_stream::streams::{StreamRecord, Topic};

use crate::{
    host::{ArmedFault, Machine},
    plan::{FaultKind, ROLES, RottenFile},
    world::{Due, Process, Simulation, Stepped},
};

/// Where processes keep their state.
const STATE: &str = "/state";

/// A bit that has flipped.
pub(crate) struct RottenBit {
    file: RottenFile,
    machine: Rc<Machine>,
    path: PathBuf,
    choice: u64,
}

impl RottenBit {
    /// Restores the file from a copy, in which the bit has not flipped.
    pub(crate) fn restore(&self) {
        self.machine.disk.borrow_mut().flip_bit(&self.path, self.choice);
    }

    /// Whether it is in a file that nobody can do without.
    pub(crate) fn is_needed(&self) -> bool {
        self.file == RottenFile::EventsSegment
    }
}

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
            FaultKind::LaterEvent | FaultKind::LaterDecision => {
                if !self.append_later(process, fault.kind) {
                    return;
                }
            }
            FaultKind::LostTail { count } => {
                let lost = self.server.borrow_mut().lose_tail(&Topic::events(), count);
                if !self.note_lost(lost) {
                    return;
                }
            }
            FaultKind::LostInside { count } => {
                let choice = mix_parts(&[self.plan.seed, 6, number as u64]);
                let lost = self.server.borrow_mut().lose_inside(&Topic::events(), count, choice);
                if !self.note_lost(lost) {
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

    /// Flips a bit; false if there is no such file.
    fn rot(&self, process: &Process, file: RottenFile, choice: u64) -> bool {
        let mut disk = process.machine.disk.borrow_mut();
        let path = match file {
            RottenFile::JoinState => "/state/join/state".into(),
            RottenFile::FeatureState => "/state/serve/state".into(),
            RottenFile::EventsEnd => "/streams/events/end".into(),
            RottenFile::EventsSegment => {
                let folder = Path::new("/streams/events");
                let mut names = disk.names(folder).unwrap_or_default();
                names.retain(|name| Path::new(name).extension() == Some(OsStr::new("records")));
                // Writers have the last one.
                names.pop();
                if names.is_empty() {
                    return false;
                }
                folder.join(&names[choice as usize % names.len()])
            }
        };
        let is_flipped = disk.flip_bit(&path, choice);
        if is_flipped {
            let machine = process.machine.clone();
            self.rotten.borrow_mut().push(RottenBit { file, machine, path, choice });
        }
        is_flipped
    }

    /// Notes events that the server lost; false if there are none.
    fn note_lost(&self, lost: Vec<StreamRecord>) -> bool {
        let now = self.timeline.now.get();
        let positions: Vec<u64> = lost.iter().map(|record| record.position).collect();
        self.timeline.trace.line(now, "server", || format!("loses events {positions:?}"));
        self.ledger.borrow_mut().lost.extend(lost);
        !positions.is_empty()
    }

    /// Appends what only a later version of the host knows; false if the process does not run.
    fn append_later(&self, process: &Process, kind: FaultKind) -> bool {
        let Ok(life) = process.life.try_borrow_mut() else { return false };
        let host = process.host.borrow().clone().filter(|host| !host.is_gone());
        let (Some(host), Some(life)) = (host, &*life) else { return false };
        let appended = self.run_on(&host, || match kind {
            FaultKind::LaterEvent => life.append_later_event().map(|()| true),
            _ => life.append_later_decision().map(|()| true),
        });
        matches!(appended, Stepped::Went { .. })
    }

    /// Ends a process at once, as `kill -9`.
    fn kill(&self, process: &Process) {
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
                self.ledger.borrow_mut().rollouts.put_back(process.role);
            }
        }
        machine.disk.borrow_mut().put_back(Path::new(STATE), &copy);
    }

    /// Does what an error says: of missing records, that processes go on without them; of a file
    /// that a fault had damaged, all processes are stopped, and it is removed or restored.
    /// False if there is nothing to be done.
    pub(crate) fn repair(&self, process: &Process, error: &str) -> bool {
        if error.contains("engine.on_gap") && !self.gaps_accepted.replace(true) {
            let now = self.timeline.now.get();
            self.timeline.trace.line(now, "operator", || "sets on_gap to continue".to_owned());
            return true;
        }
        let says_what_to_do = |bit: &RottenBit| {
            let names = error.contains(&format!("{}: ", bit.path.display()));
            let remedies: &[&str] = match bit.is_needed() {
                true => &["restore the file from a copy"],
                false => &["move it away", "remove this file"],
            };
            names && remedies.iter().any(|remedy| error.contains(remedy))
        };
        let mut rotten = self.rotten.borrow_mut();
        let Some(at) = rotten.iter().position(says_what_to_do) else { return false };
        self.processes.iter().for_each(|process| self.kill(process));
        let path = rotten[at].path.clone();
        if rotten[at].is_needed() {
            rotten.remove(at).restore();
        } else {
            // It may come back with a state that is restored.
            let removed = self.observe(&process.machine, || disk::remove_file(&path));
            drop(removed);
        }
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "operator", || format!("removes or restores {path:?}"));
        true
    }
}
