//! The hook by which a simulator owns the clock, the numbers and the files of a thread.
//!
//! In production no host is entered: `clock`, `entropy` and `disk` load one thread-local flag and
//! go on to the system. So production code reaches time, chance and files as it would without a
//! simulator, and the simulator runs that code, not a model of it.

use std::{
    cell::{Cell, RefCell},
    ffi::OsString,
    fs::TryLockError,
    io,
    path::Path,
    rc::Rc,
    time::Duration,
};

use crate::disk::{Metadata, OpenMode};

/// A process of a machine that exists only in a simulation.
pub trait SimulatedHost: SimulatedDisk {
    /// Milliseconds since 1970 by this machine's wall clock, which may jump.
    fn now_ms(&self) -> i64;

    /// The time since the simulation began; it never goes back.
    fn since_start(&self) -> Duration;

    /// Lets simulated time pass.
    fn sleep(&self, duration: Duration);

    /// The next random number.
    fn number(&self) -> u64;
}

/// A number by which a simulated disk knows an open file.
pub type SimulatedFile = u64;

/// The disk of a simulated machine. Each method does what the function or the method of `std::fs`
/// with its name does, and fails with its errors, or with those of a bad disk.
pub trait SimulatedDisk {
    /// Opens a file.
    ///
    /// # Errors
    /// As `std::fs::OpenOptions::open`.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimulatedFile>;

    /// Closes a file, and releases its lock.
    fn close(&self, file: SimulatedFile);

    /// Reads from an offset on.
    ///
    /// # Errors
    /// The disk is bad.
    fn read_at(&self, file: SimulatedFile, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes from an offset on.
    ///
    /// # Errors
    /// The disk is bad or full; a part of the bytes may be written.
    fn write_at(&self, file: SimulatedFile, bytes: &[u8], at: u64) -> io::Result<usize>;

    /// Cuts or extends a file.
    ///
    /// # Errors
    /// The disk is bad.
    fn set_len(&self, file: SimulatedFile, length: u64) -> io::Result<()>;

    /// The length of a file.
    ///
    /// # Errors
    /// The disk is bad.
    fn length(&self, file: SimulatedFile) -> io::Result<u64>;

    /// Makes the content of a file durable, but not its name.
    ///
    /// # Errors
    /// The disk is bad; what was not durable may be lost, whatever later calls say.
    fn sync(&self, file: SimulatedFile) -> io::Result<()>;

    /// Locks a file for this opening of it.
    ///
    /// # Errors
    /// As `std::fs::File::try_lock`.
    fn try_lock(&self, file: SimulatedFile) -> Result<(), TryLockError>;

    /// Releases the lock of this opening of a file.
    ///
    /// # Errors
    /// The disk is bad.
    fn unlock(&self, file: SimulatedFile) -> io::Result<()>;

    /// What a path names.
    ///
    /// # Errors
    /// As `std::fs::metadata`.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;

    /// The names in a folder, sorted.
    ///
    /// # Errors
    /// As `std::fs::read_dir`.
    fn names(&self, folder: &Path) -> io::Result<Vec<OsString>>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// The disk is bad, or there is no such folder.
    fn sync_dir(&self, folder: &Path) -> io::Result<()>;

    /// Makes a folder in one that exists.
    ///
    /// # Errors
    /// As `std::fs::create_dir`.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// As `std::fs::remove_file`.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder with all in it.
    ///
    /// # Errors
    /// As `std::fs::remove_dir_all`.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or folder another name in the same folder.
    ///
    /// # Errors
    /// As `std::fs::rename`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
}

thread_local! {
    /// Whether a host is entered. A flag of its own, because it needs no destructor: reading it is
    /// a load.
    static IS_SIMULATED: Cell<bool> = const { Cell::new(false) };
    static ENTERED: RefCell<Option<Rc<dyn SimulatedHost>>> = const { RefCell::new(None) };
}

/// Makes this thread run on `host` until the guard is dropped; then on the host before it again.
pub fn enter(host: Rc<dyn SimulatedHost>) -> Entered {
    IS_SIMULATED.set(true);
    Entered(ENTERED.replace(Some(host)))
}

/// Whether this thread runs on a simulated host. One that does starts no threads: they would run on
/// the real machine.
pub fn is_entered() -> bool {
    IS_SIMULATED.get()
}

/// Keeps a thread on its simulated host.
pub struct Entered(Option<Rc<dyn SimulatedHost>>);

impl Drop for Entered {
    fn drop(&mut self) {
        IS_SIMULATED.set(self.0.is_some());
        ENTERED.set(self.0.take());
    }
}

/// The host that this thread runs on, if it is simulated.
#[inline]
pub(crate) fn host() -> Option<Rc<dyn SimulatedHost>> {
    if !IS_SIMULATED.get() {
        return None;
    }
    ENTERED.with_borrow(Clone::clone)
}
