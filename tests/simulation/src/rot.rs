//! Bits that flip in files: where, what must be told of them, and what an operator does then.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use hypercast_core::disk::{self, OpenMode};
use hypercast_stream::streams::{StreamCursor, StreamPlace, StreamRead, Topic};

use crate::{
    disk::Disk,
    host::Machine,
    installation::engine,
    plan::{Role, RottenFile},
    publications,
    world::{Process, Simulation},
};

/// A bit that has flipped.
pub(crate) struct RottenBit {
    file: RottenFile,
    machine: Rc<Machine>,
    path: PathBuf,
    /// Its byte in the file, and its bit in that.
    at: usize,
    mask: u8,
    /// What was in the file after it, up to where that must not change.
    content: Vec<u8>,
}

impl RottenBit {
    /// Whether the file is still the one that the fault has hit.
    fn is_there(&self) -> bool {
        let content = self.machine.disk.borrow().content(&self.path);
        content.is_some_and(|content| content.starts_with(&self.content))
    }

    /// Restores the file from a copy, in which the bit has not flipped.
    pub(crate) fn restore(&self) {
        if self.is_there() {
            self.machine.disk.borrow_mut().flip(&self.path, self.at, self.mask);
        }
    }

    /// Whether it is in a file that nobody can do without.
    pub(crate) fn is_needed(&self) -> bool {
        self.file.stream().is_some()
    }

    /// Whether words name the file and say what to do.
    fn is_told(&self, words: &str) -> bool {
        let remedies: &[&str] = match self.is_needed() {
            true => &["restore the file from a copy"],
            false => &["move it away", "remove this file"],
        };
        words.contains(&format!("{}: ", self.path.display()))
            && remedies.iter().any(|remedy| words.contains(remedy))
    }
}

impl RottenFile {
    /// The stream of a directory that it is a segment of.
    fn stream(self) -> Option<Topic> {
        match self {
            RottenFile::JoinState | RottenFile::FeatureState | RottenFile::EventsEnd => None,
            RottenFile::EventsSegment | RottenFile::NewestEvents => Some(Topic::events()),
            RottenFile::Joined => Some(Topic::joined()),
            RottenFile::Outcomes => Some(Topic::outcomes()),
            RottenFile::Versions => Some(Topic::versions()),
            RottenFile::Weights => Some(publications::topic()),
        }
    }

    /// The processes that read it when they start, if it is a saved state.
    fn is_state_of(self, role: Role, join_in_daemon: bool) -> bool {
        match self {
            RottenFile::FeatureState => role == Role::Daemon,
            RottenFile::JoinState if join_in_daemon => role == Role::Daemon,
            RottenFile::JoinState => role == Role::Joiner,
            _ => false,
        }
    }
}

/// Where a bit can flip: the bytes of a file that must not change.
struct FilePart {
    path: PathBuf,
    bytes: usize,
}

impl Simulation {
    /// Flips a bit; false if there is no such file.
    pub(crate) fn rot(&self, process: &Process, file: RottenFile, choice: u64) -> bool {
        let machine = process.machine.clone();
        let part = match file {
            RottenFile::JoinState => whole(&machine, "/state/join/state"),
            RottenFile::FeatureState => whole(&machine, "/state/serve/state"),
            RottenFile::EventsEnd => whole(&machine, "/streams/events/end"),
            _ => file.stream().and_then(|topic| segment(&machine, &topic, file, choice)),
        };
        let Some(FilePart { path, bytes }) = part.filter(|part| part.bytes > 0) else {
            return false;
        };
        // One file of a folder at a time: what one of them tells of another is still there.
        let mut rotten = self.rotten.borrow_mut();
        let is_beside = |bit: &RottenBit| bit.path.parent() == path.parent() && bit.is_there();
        if rotten.iter().any(is_beside) {
            return false;
        }
        let (at, mask) = (choice as usize / 8 % bytes, 1 << (choice % 8));
        machine.disk.borrow_mut().flip(&path, at, mask);
        let mut content = machine.disk.borrow().content(&path).unwrap_or_default();
        content.truncate(bytes);
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "fault", || format!("bit {mask:#x} of {path:?} {at}"));
        rotten.push(RottenBit { file, machine, path, at, mask, content });
        self.processes.iter().for_each(|of| of.streams.borrow_mut().forget_saved());
        true
    }

    /// Does what the host says of a file that a fault had damaged: all processes are stopped, and
    /// it is removed or restored. False if it says nothing of one.
    pub(crate) fn mend_rot(&self, machine: &Rc<Machine>, words: &str) -> bool {
        let mut rotten = self.rotten.borrow_mut();
        let told = |bit: &RottenBit| Rc::ptr_eq(&bit.machine, machine) && bit.is_told(words);
        let Some(at) = rotten.iter().position(told) else { return false };
        for process in &self.processes {
            self.kill(process);
            process.streams.borrow_mut().forget_saved();
        }
        let path = rotten[at].path.clone();
        if rotten[at].is_needed() {
            rotten.remove(at).restore();
        } else {
            // It may come back with a state that is restored.
            let removed = self.observe(machine, || disk::remove_file(&path));
            drop(removed);
        }
        let now = self.timeline.now.get();
        self.timeline.trace.line(now, "operator", || format!("removes or restores {path:?}"));
        true
    }

    /// The saved states of a process that have a flipped bit.
    pub(crate) fn rotten_states(&self, process: &Process) -> Vec<PathBuf> {
        let in_daemon = self.plan.settings.join_in_daemon;
        let is_of = |bit: &&RottenBit| {
            Rc::ptr_eq(&bit.machine, &process.machine)
                && bit.file.is_state_of(process.role, in_daemon)
                && bit.is_there()
        };
        self.rotten.borrow().iter().filter(is_of).map(|bit| bit.path.clone()).collect()
    }

    /// Whoever reads a damaged stream is told; then it is restored.
    pub(crate) fn end_rot(&self) {
        for bit in self.rotten.take() {
            let Some(topic) = bit.file.stream() else {
                self.rotten.borrow_mut().push(bit);
                continue;
            };
            if bit.is_there() {
                let read = self.observe(&bit.machine, || self.read_all(&topic));
                if !read.as_ref().is_err_and(|error| bit.is_told(error)) {
                    let path = bit.path.display();
                    self.violate("rot", format!("{topic} is read, {path} is damaged: {read:?}"));
                }
            }
            bit.restore();
        }
    }

    fn read_all(&self, topic: &Topic) -> Result<(), String> {
        let engine = engine(&self.plan, 2, None)?;
        let read = || {
            let span = engine.span(topic)?;
            let place = StreamPlace::at(span.start);
            let mut cursor = StreamCursor::open(&*engine, topic, place)?;
            while cursor.place().position < span.end {
                match cursor.next(&*engine, span.end as usize, Duration::ZERO)? {
                    StreamRead::Records(read) if read.is_empty() => break,
                    StreamRead::Gap(gap) => return Err(hypercast_stream::Error::Gap(gap)),
                    StreamRead::Records(_) => {}
                }
            }
            Ok(())
        };
        read().map_err(|error| error.to_string())
    }
}

fn whole(machine: &Machine, path: &str) -> Option<FilePart> {
    let bytes = machine.disk.borrow().content(Path::new(path))?.len();
    Some(FilePart { path: path.into(), bytes })
}

/// A segment of a stream, as far as it has what was acknowledged.
fn segment(machine: &Machine, topic: &Topic, file: RottenFile, choice: u64) -> Option<FilePart> {
    let mut disk = machine.disk.borrow_mut();
    let folder = Path::new("/streams").join(topic.name());
    let mut names = disk.names(&folder).unwrap_or_default();
    names.retain(|name| Path::new(name).extension() == Some(OsStr::new("records")));
    let newest = names.last().cloned()?;
    match file {
        RottenFile::EventsSegment => drop(names.pop()),
        RottenFile::NewestEvents => names = vec![newest.clone()],
        _ => {}
    }
    let name = names.get(choice as usize % names.len().max(1))?;
    let path = folder.join(name);
    let bytes = if *name == newest {
        acknowledged(&mut disk, &folder, name)?
    } else {
        disk.content(&path)?.len()
    };
    Some(FilePart { path, bytes })
}

/// How much of the newest segment was acknowledged. The file that says so is written back to the
/// disk, as a kernel does it after a while: else a power cut leaves nothing by which a flipped bit
/// in the last write differs from a write that it tore.
fn acknowledged(disk: &mut Disk, folder: &Path, segment: &OsStr) -> Option<usize> {
    let end = folder.join("end");
    let content = disk.content(&end)?;
    let number = |at: usize| Some(u64::from_le_bytes(content.get(at..at + 8)?.try_into().ok()?));
    let (base, offset) = (number(8)?, number(16)?);
    let file = disk.open(&end, OpenMode::Read).ok()?;
    disk.sync(file).ok()?;
    disk.close(file);
    (segment.to_str()?.starts_with(&format!("{base:020}."))).then_some(offset as usize)
}
