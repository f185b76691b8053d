//! Keeps the process alive when a mapped file is cut. A read past the file's new end raises SIGBUS,
//! whose default is to end the process. The handler here puts zeros in the place of the whole
//! mapping, so that the read goes on, and counts the loss; who reads a mapping looks at the count
//! before and after, and believes nothing that was read where it changed.
//!
//! A handler may interrupt any code, so it takes no lock and no memory: mappings are in a list that
//! only grows, whose entries are used again, and all of it is atomic numbers. A fault at any other
//! address goes to the handler that was there before.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, fence};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Losses of any mapping since the process began. A batch of reads between two equal numbers saw
/// none; the reads are done before the second number is taken.
pub(crate) fn losses() -> u64 {
    fence(Acquire);
    LOSSES.load(Acquire)
}

/// What a mapping may be used for, and so what takes its place.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MappingAccess {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Guards one mapping as long as it lives. It must be dropped before the mapping is.
#[derive(Debug)]
pub(crate) struct FaultGuard {
    region: &'static Region,
}

impl FaultGuard {
    /// Guards the mapping of `len` bytes at `start`.
    ///
    /// # Safety
    /// The mapping must be there, be its caller's own from its first page to its last, and outlive
    /// the guard.
    ///
    /// # Errors
    /// The system refuses the signal's handler.
    pub unsafe fn over(
        start: *const u8,
        len: usize,
        access: MappingAccess,
    ) -> io::Result<FaultGuard> {
        install()?;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let region = free.pop().unwrap_or_else(Region::listed);
        let protection = match access {
            MappingAccess::Read => libc::PROT_READ,
            MappingAccess::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        region.losses.store(0, Relaxed);
        region.set(start as usize, len.next_multiple_of(page_size()), protection);
        Ok(FaultGuard { region })
    }

    /// How often the mapping was lost.
    pub fn losses(&self) -> u64 {
        self.region.losses.load(SeqCst)
    }

    /// How often the mapping was lost, where no handler that is counted has still to put its zeros
    /// there: what is mapped after this call stays, or the number changes. It waits for handlers
    /// that are at work, which wait for nobody.
    pub fn settled_losses(&self) -> u64 {
        // In this order: a handler is at work before it counts.
        let losses = self.losses();
        while self.region.handlers.load(SeqCst) > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        losses
    }

    /// Counts a loss that was found otherwise, such as by the file's length.
    pub fn count_loss(&self) {
        self.region.count_loss();
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        self.region.set(0, 0, 0);
        free.push(self.region);
    }
}

static LOSSES: AtomicU64 = AtomicU64::new(0);
/// The list's newest entry.
static NEWEST: AtomicPtr<Region> = AtomicPtr::new(std::ptr::null_mut());
/// Entries without a mapping. Its lock is held wherever the list or an entry's place is changed.
static FREE: Mutex<Vec<&'static Region>> = Mutex::new(Vec::new());
/// What handled the signal before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// An entry of the list: where a mapping is.
#[derive(Debug)]
struct Region {
    /// Odd while the numbers below are changed.
    version: AtomicU64,
    start: AtomicUsize,
    /// Bytes of whole pages; 0 where there is no mapping.
    len: AtomicUsize,
    protection: AtomicI32,
    losses: AtomicU64,
    /// Handlers that are putting zeros in the mapping's place.
    handlers: AtomicU64,
    /// Entries that came earlier; set before the entry is listed.
    next: *const Region,
}

/// Where a mapping is, as one reading of its entry says.
#[derive(Debug, Clone, Copy)]
struct MappedRange {
    start: usize,
    len: usize,
    protection: i32,
}

// SAFETY: `next` never changes once others see the entry, and entries live for ever.
unsafe impl Send for Region {}
// SAFETY: likewise; the rest are atomic numbers.
unsafe impl Sync for Region {}

impl Region {
    /// A new entry, in the list. The caller holds the lock of `FREE`.
    fn listed() -> &'static Region {
        let region = Box::leak(Box::new(Region {
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            protection: AtomicI32::new(0),
            losses: AtomicU64::new(0),
            handlers: AtomicU64::new(0),
            next: NEWEST.load(Acquire),
        }));
        NEWEST.store(region, Release);
        region
    }

    /// Changes the entry's place. The caller holds the lock of `FREE`.
    fn set(&self, start: usize, len: usize, protection: i32) {
        self.version.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.len.store(len, SeqCst);
        self.protection.store(protection, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    fn count_loss(&self) {
        // In this order: who sees the second count sees the first.
        self.losses.fetch_add(1, SeqCst);
        LOSSES.fetch_add(1, SeqCst);
    }

    /// If `address` lies in this mapping, counts it as lost and puts zeros there; false otherwise,
    /// and where the system refuses. An entry that is being changed is of no mapping that anybody
    /// reads.
    fn lose(&self, address: usize) -> bool {
        let version = self.version.load(SeqCst);
        let (start, len) = (self.start.load(SeqCst), self.len.load(SeqCst));
        let protection = self.protection.load(SeqCst);
        let is_whole = version.is_multiple_of(2) && self.version.load(SeqCst) == version;
        if !is_whole || address.wrapping_sub(start) >= len {
            return false;
        }
        self.put_zeros(MappedRange { start, len, protection }, || ())
    }

    /// Counts a loss, and puts zeros in the place of the whole mapping; false where the system
    /// refuses. `between` runs between the two, for tests.
    fn put_zeros(&self, range: MappedRange, between: impl FnOnce()) -> bool {
        let MappedRange { start, len, protection } = range;
        // In this order: see `settled_losses`.
        self.handlers.fetch_add(1, SeqCst);
        self.count_loss();
        between();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is that of a mapping whose guard lives, since a thread reads it now,
        // and it is its owner's from its first page to its last.
        let zeros = unsafe { libc::mmap(start as *mut c_void, len, protection, flags, -1, 0) };
        self.handlers.fetch_sub(1, SeqCst);
        zeros != libc::MAP_FAILED
    }
}

/// Bytes of a page of memory.
pub(crate) fn page_size() -> usize {
    // SAFETY: it reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(1)
}

/// Sets the handler, once a process.
fn install() -> io::Result<()> {
    static INSTALLING: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    // SAFETY: zeros are a valid `sigaction`, all of numbers and null pointers.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: it only reads what is set.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Known before the handler can run.
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    action.sa_sigaction = on_bus_error as *const () as usize;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what a handler
    // may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    *installed = true;
    Ok(())
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a valid one with SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Other processes send it with a code that is not positive, and without an address.
    if code > 0 && lose(address) {
        return;
    }
    // SAFETY: these are the arguments of the signal that is being handled.
    unsafe { delegate(signal, info, context) }
}

fn lose(address: usize) -> bool {
    let mut next = NEWEST.load(Acquire).cast_const();
    // SAFETY: it is null or an entry, and entries live for ever.
    while let Some(region) = unsafe { next.as_ref() } {
        if region.lose(address) {
            return true;
        }
        next = region.next;
    }
    false
}

/// Does what would be done without this handler.
///
/// # Safety
/// The arguments must be those of the signal that is being handled.
unsafe fn delegate(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    type WithInfo = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    let previous = PREVIOUS.get().map_or((0, libc::SIG_DFL), |p| (p.sa_flags, p.sa_sigaction));
    match previous {
        (_, libc::SIG_DFL | libc::SIG_IGN) => {
            // The read is done again when this returns, and then ends the process.
            // SAFETY: the call is allowed in a handler.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        (flags, handler) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: it was set with SA_SIGINFO, so it has this signature.
            unsafe { std::mem::transmute::<usize, WithInfo>(handler)(signal, info, context) }
        }
        (_, handler) => {
            // SAFETY: it was set without SA_SIGINFO, so it has this signature.
            unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(signal) }
        }
    }
}

#[cfg(test)]
impl FaultGuard {
    /// Does what a handler does that is held up by `between` after it has counted the loss.
    pub fn lose_slowly(&self, between: impl FnOnce()) {
        let Region { start, len, protection, .. } = self.region;
        let (start, len) = (start.load(SeqCst), len.load(SeqCst));
        let range = MappedRange { start, len, protection: protection.load(SeqCst) };
        assert!(self.region.put_zeros(range, between));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use memmap2::{Mmap, MmapMut};

    use super::*;

    const BYTES: usize = 3 << 16;

    fn cut(file: &File) {
        file.set_len(0).unwrap();
    }

    fn mapped() -> (File, Mmap) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES as u64).unwrap();
        // SAFETY: nobody else has the file.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        (file, map)
    }

    #[test]
    fn a_cut_mapping_gives_zeros_and_counts_one_loss() {
        let (file, map) = mapped();
        let (_other_file, other) = mapped();
        // SAFETY: both mappings outlive their guards, which are dropped first.
        let guard = |map: &Mmap| unsafe {
            FaultGuard::over(map.as_ptr(), map.len(), MappingAccess::Read).unwrap()
        };
        let (guard, of_other) = (guard(&map), guard(&other));
        cut(&file);
        let before = losses();
        assert_eq!((map[0], map[BYTES - 1], map[BYTES / 2]), (0, 0, 0));
        assert_eq!((guard.losses(), of_other.losses()), (1, 0));
        assert!(losses() > before);
    }

    #[test]
    fn a_cut_mapping_can_still_be_written() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(path.path()).unwrap();
        file.set_len(BYTES as u64).unwrap();
        // SAFETY: nobody else has the file.
        let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        // SAFETY: the mapping outlives the guard, which is dropped first.
        let guard =
            unsafe { FaultGuard::over(map.as_ptr(), map.len(), MappingAccess::ReadWrite).unwrap() };
        cut(&file);
        map[BYTES - 1] = 7;
        assert_eq!((map[BYTES - 1], guard.losses()), (7, 1));
        drop(guard);
    }

    /// In a process of its own: this test again, with the variable set.
    #[test]
    fn a_fault_anywhere_else_still_ends_the_process() {
        const INNER: &str = "HYPERCAST_TEST_BUS_ERROR";
        let (file, map) = mapped();
        if std::env::var_os(INNER).is_some() {
            install().unwrap();
            cut(&file);
            std::process::exit(i32::from(map[0]));
        }
        let name = "fault_guard::tests::a_fault_anywhere_else_still_ends_the_process";
        let mut inner = Command::new(std::env::current_exe().unwrap());
        let status = inner.args([name, "--exact"]).env(INNER, "1").output().unwrap().status;
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }
}
