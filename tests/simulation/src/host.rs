//! Processes of simulated machines: what production code sees as clock, numbers and files, and
//! where faults of these are injected.

use std::{
    cell::{Cell, RefCell},
    ffi::{OsStr, OsString},
    fs::TryLockError,
    io::{self, ErrorKind},
    panic,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use hypercast_core::{
    disk::{Metadata, OpenMode},
    hash::mix_parts,
    simulated::{SimulatedDisk, SimulatedFile, SimulatedHost},
};
use serde::{Deserialize, Serialize};

use crate::{
    disk::{Disk, NameOrder, PowerCut, SECTOR},
    trace::Trace,
    work::DiskWork,
};

/// When simulations begin, in milliseconds since 1970.
pub const EPOCH_MS: i64 = 1_800_000_000_000;

/// One write in so many reaches the disk before it is synced.
const WRITTEN_BACK: u64 = 8;

/// How long a step of a process may sleep in all. One that waits longer is restarted, as an
/// operator does it.
const PATIENCE: Duration = Duration::from_secs(120);

/// The panic by which a simulated process ends. It runs no panic hook.
pub struct SimulatedCrash;

/// Runs what is due until a time since the beginning.
pub type Meanwhile = Rc<dyn Fn(Duration)>;

/// Time that all machines share. Their clocks may show another one.
#[derive(Default)]
pub struct SimulatedTime {
    /// Since the simulation began.
    pub now: Cell<Duration>,
    /// Runs what is due until a time, while a process sleeps.
    pub meanwhile: RefCell<Option<Meanwhile>>,
    /// What has happened, line by line.
    pub trace: Trace,
}

/// A machine: its disk, and how far its wall clock is ahead.
#[derive(Default)]
pub struct Machine {
    /// What its processes have stored.
    pub disk: RefCell<Disk>,
    /// In milliseconds; negative if it is behind.
    pub clock_ahead_ms: Cell<i64>,
    /// How often its power was cut.
    pub power_cuts: Cell<u64>,
}

/// What a fault does to an operation on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFault {
    /// The process ends before the operation, or in the middle of a write.
    Kill,
    /// So do all processes of the machine, and what was not synced may be lost.
    PowerCut(NameOrder),
    /// The operation fails: the device is bad.
    Bad(DiskUse),
    /// A write fails, perhaps after a part: the disk is full.
    Full,
}

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskUse {
    /// Bytes or names are read.
    Read,
    /// Bytes are written to a file.
    Write,
    /// A file or a folder is synced.
    Sync,
    /// Files are opened, renamed, removed or locked.
    Other,
}

/// A fault that waits for its operation.
#[derive(Debug, Clone, Copy)]
pub struct ArmedFault {
    /// What it does to them.
    pub fault: DiskFault,
    /// The number of operations that it could hit and does not.
    pub spared: u32,
    /// The number of operations that it hits.
    pub hits: u32,
}

/// One life of a process.
pub struct ProcessHost {
    /// Its name in the trace.
    pub name: String,
    /// The machine that it runs on.
    pub machine: Rc<Machine>,
    /// Whether it has ended: whatever it still does has no effect.
    pub ended: Cell<bool>,
    /// The faults that wait for an operation of it.
    pub armed: RefCell<Vec<ArmedFault>>,
    /// The faults that took effect.
    pub struck: RefCell<Vec<DiskFault>>,
    /// Its work in this life.
    pub work: Cell<DiskWork>,
    /// What it logged in the last step, as warnings and errors.
    pub said: RefCell<Vec<String>>,
    /// How long the current step has slept.
    pub slept: Cell<Duration>,
    timeline: Rc<SimulatedTime>,
    seed: u64,
    power_cuts: u64,
    numbers: Cell<u64>,
}

impl ProcessHost {
    /// A new life on a machine; equal seeds give equal numbers.
    pub fn new(name: &str, machine: &Rc<Machine>, timeline: &Rc<SimulatedTime>, seed: u64) -> Self {
        ProcessHost {
            name: name.to_owned(),
            machine: machine.clone(),
            ended: Cell::new(false),
            armed: RefCell::default(),
            struck: RefCell::default(),
            work: Cell::default(),
            said: RefCell::default(),
            slept: Cell::default(),
            timeline: timeline.clone(),
            seed,
            power_cuts: machine.power_cuts.get(),
            numbers: Cell::new(0),
        }
    }

    /// Whether it cannot go on: it was killed, or its machine lost its power.
    pub fn is_gone(&self) -> bool {
        self.ended.get() || self.power_cuts != self.machine.power_cuts.get()
    }

    fn die(&self) -> ! {
        self.ended.set(true);
        self.timeline.trace.line(self.timeline.now.get(), &self.name, || "ends".to_owned());
        panic::resume_unwind(Box::new(SimulatedCrash))
    }

    /// Cuts the power of its machine.
    pub fn cut_power(&self, names: NameOrder) {
        let seed = mix_parts(&[self.seed, self.machine.power_cuts.get()]);
        self.machine.power_cuts.update(|cuts| cuts + 1);
        self.machine.disk.borrow_mut().cut_power(PowerCut { seed, names });
    }

    /// The fault that an operation meets, if any; called before it.
    fn meet(&self, kind: DiskUse, name: &str, path: &Path) -> io::Result<Option<DiskFault>> {
        if std::thread::panicking() || self.is_gone() {
            return Err(io::Error::other("the process has ended"));
        }
        self.count(|work| work.operations += 1);
        let mut armed = self.armed.borrow_mut();
        let mut met = None;
        for waiting in armed.iter_mut() {
            let could_hit = match waiting.fault {
                DiskFault::Kill | DiskFault::PowerCut(_) => true,
                DiskFault::Bad(of) => of == kind,
                DiskFault::Full => kind == DiskUse::Write,
            };
            if !could_hit {
                continue;
            }
            if waiting.spared > 0 {
                waiting.spared -= 1;
            } else if met.is_none() {
                waiting.hits -= 1;
                met = Some(waiting.fault);
            }
        }
        armed.retain(|waiting| waiting.hits > 0);
        self.struck.borrow_mut().extend(met);
        let told = || format!("{name} {} {}", path.display(), told(met));
        self.timeline.trace.line(self.timeline.now.get(), &self.name, told);
        Ok(met)
    }

    /// As [`ProcessHost::meet`], for operations that a crash leaves out as a whole.
    fn before(&self, kind: DiskUse, name: &str, path: &Path) -> io::Result<()> {
        match self.meet(kind, name, path)? {
            None => Ok(()),
            Some(fault) => self.strike(fault),
        }
    }

    fn strike(&self, fault: DiskFault) -> io::Result<()> {
        match fault {
            DiskFault::Kill => self.die(),
            DiskFault::PowerCut(names) => {
                self.cut_power(names);
                self.die()
            }
            DiskFault::Bad(_) => Err(io::Error::from_raw_os_error(5)),
            DiskFault::Full => Err(ErrorKind::StorageFull.into()),
        }
    }

    fn path(&self, file: SimulatedFile) -> PathBuf {
        self.machine.disk.borrow().path(file)
    }

    fn count(&self, add: impl FnOnce(&mut DiskWork)) {
        let mut work = self.work.get();
        add(&mut work);
        self.work.set(work);
    }
}

fn told(fault: Option<DiskFault>) -> String {
    fault.map_or(String::new(), |fault| format!("meets {fault:?}"))
}

impl SimulatedHost for ProcessHost {
    fn now_ms(&self) -> i64 {
        let passed = self.timeline.now.get().as_millis() as i64;
        EPOCH_MS + passed + self.machine.clock_ahead_ms.get()
    }

    fn since_start(&self) -> Duration {
        self.timeline.now.get()
    }

    fn sleep(&self, duration: Duration) {
        if std::thread::panicking() {
            return;
        }
        let until = self.timeline.now.get() + duration;
        let meanwhile = self.timeline.meanwhile.borrow().clone();
        if let Some(run) = meanwhile {
            run(until);
        }
        self.timeline.now.set(until.max(self.timeline.now.get()));
        self.slept.update(|slept| slept + duration);
        if self.is_gone() || self.slept.get() > PATIENCE {
            self.die();
        }
    }

    fn number(&self) -> u64 {
        self.numbers.update(|count| count + 1);
        mix_parts(&[self.seed, self.numbers.get()])
    }
}

impl SimulatedDisk for ProcessHost {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimulatedFile> {
        self.before(DiskUse::Other, "open", path)?;
        self.machine.disk.borrow_mut().open(path, mode)
    }

    fn close(&self, file: SimulatedFile) {
        self.machine.disk.borrow_mut().close(file);
    }

    fn read_at(&self, file: SimulatedFile, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.before(DiskUse::Read, "read", &self.path(file))?;
        let read = self.machine.disk.borrow().read_at(file, buffer, at)?;
        if self.path(file).extension() == Some(OsStr::new("records")) {
            self.count(|work| work.read_bytes += read as u64);
        }
        Ok(read)
    }

    fn write_at(&self, file: SimulatedFile, bytes: &[u8], at: u64) -> io::Result<usize> {
        let met = self.meet(DiskUse::Write, "write", &self.path(file))?;
        let choice = mix_parts(&[self.seed, self.work.get().operations]);
        // A write ends early only between sectors.
        let length = met.map_or(bytes.len(), |_| {
            let end = at + choice % (bytes.len() as u64 + 1);
            (end - end % SECTOR as u64).saturating_sub(at) as usize
        });
        let written_back = choice.is_multiple_of(WRITTEN_BACK);
        let mut disk = self.machine.disk.borrow_mut();
        let written = disk.write_at(file, &bytes[..length], at, written_back)?;
        drop(disk);
        if self.path(file).extension() != Some(OsStr::new("partial")) {
            self.count(|work| work.written_bytes += written as u64);
        }
        met.map_or(Ok(()), |fault| self.strike(fault))?;
        Ok(written)
    }

    fn set_len(&self, file: SimulatedFile, length: u64) -> io::Result<()> {
        self.before(DiskUse::Other, "set_len", &self.path(file))?;
        self.machine.disk.borrow_mut().set_len(file, length)
    }

    fn length(&self, file: SimulatedFile) -> io::Result<u64> {
        self.before(DiskUse::Other, "length", &self.path(file))?;
        self.machine.disk.borrow().length(file)
    }

    fn sync(&self, file: SimulatedFile) -> io::Result<()> {
        let met = self.meet(DiskUse::Sync, "sync", &self.path(file))?;
        if matches!(met, Some(DiskFault::Bad(_))) {
            self.machine.disk.borrow_mut().fail_sync(file);
        }
        met.map_or(Ok(()), |fault| self.strike(fault))?;
        self.machine.disk.borrow_mut().sync(file)
    }

    fn try_lock(&self, file: SimulatedFile) -> Result<(), TryLockError> {
        self.before(DiskUse::Other, "lock", &self.path(file)).map_err(TryLockError::Error)?;
        self.machine.disk.borrow_mut().try_lock(file)
    }

    fn unlock(&self, file: SimulatedFile) -> io::Result<()> {
        self.machine.disk.borrow_mut().unlock(file)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.before(DiskUse::Other, "metadata", path)?;
        self.machine.disk.borrow().metadata(path)
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        self.before(DiskUse::Other, "names", folder)?;
        self.machine.disk.borrow().names(folder)
    }

    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        self.before(DiskUse::Sync, "sync_dir", folder)?;
        self.machine.disk.borrow_mut().sync_dir(folder)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.before(DiskUse::Other, "create_dir", path)?;
        self.machine.disk.borrow_mut().create_dir(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.before(DiskUse::Other, "remove", path)?;
        self.machine.disk.borrow_mut().remove(path, false)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.before(DiskUse::Other, "remove_all", path)?;
        self.machine.disk.borrow_mut().remove(path, true)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(DiskUse::Other, "rename", from)?;
        self.count(|work| work.replaced += 1);
        self.machine.disk.borrow_mut().rename(from, to)
    }
}
