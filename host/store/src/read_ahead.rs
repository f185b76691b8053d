//! Reads from the disk for a store that is larger than memory. A fault brings one page and waits
//! for it, so a batch would wait for one page after the other. Here the disk is asked for all pages
//! of a batch at once, in the order in which they lie, so that it always has many requests.
//!
//! To ask costs a system call a page, also for a page that is there, which is more than to read it.
//! So it is done only while batches do come from the disk.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::fault_guard::page_size;

/// Asking pays where more than one row in so many waits for the disk: a page that is there costs a
/// call of about a microsecond, one that is not a wait of about a hundred.
const ROWS_A_FAULT: usize = 128;
/// Batches that ask before one finds out again whether it pays, which may cost it the time of ten.
const ASKING_BATCHES: u32 = 256;

/// Whether the batches of a store come from the disk, which all its readers find out together.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// Batches that are still to ask.
    asking: AtomicU32,
}

impl Default for ReadAhead {
    /// At first nothing is in memory.
    fn default() -> ReadAhead {
        ReadAhead { asking: AtomicU32::new(ASKING_BATCHES) }
    }
}

impl ReadAhead {
    /// Reads a batch of so many rows, after a `request` for its pages where that pays.
    pub fn around<T>(&self, rows: usize, request: impl FnOnce(), read: impl FnOnce() -> T) -> T {
        let asking = self.asking.load(Relaxed);
        if asking > 0 {
            // Of two that count at the same time one may be lost, which changes nothing.
            self.asking.store(asking - 1, Relaxed);
            request();
            return read();
        }
        let before = faults();
        let done = read();
        if faults().saturating_sub(before) > (rows / ROWS_A_FAULT) as u64 {
            self.asking.store(ASKING_BATCHES, Relaxed);
        }
        done
    }
}

/// How often this thread has waited for a page from the disk.
fn faults() -> u64 {
    // SAFETY: zeros are a valid `rusage`, all of numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    #[cfg(target_os = "linux")]
    let who = libc::RUSAGE_THREAD;
    #[cfg(not(target_os = "linux"))]
    let who = libc::RUSAGE_SELF;
    // SAFETY: it writes the struct that it is given.
    unsafe { libc::getrusage(who, &raw mut usage) };
    usage.ru_majflt as u64
}

/// Pages that a batch will read.
#[derive(Debug, Default)]
pub(crate) struct PageList {
    numbers: Vec<usize>,
}

impl PageList {
    /// Adds the pages of `len` bytes of a mapping.
    #[inline]
    pub fn add(&mut self, start: *const u8, len: usize) {
        let start = start as usize;
        self.numbers.extend(start / page_size()..(start + len).div_ceil(page_size()));
    }

    /// Asks the disk for all of them, and forgets them. It does not wait; where the system does not
    /// know the advice, whoever reads waits for each.
    pub fn request(&mut self) {
        self.numbers.sort_unstable();
        self.numbers.dedup();
        for run in self.numbers.chunk_by(|page, next| next - page == 1) {
            let (start, len) = (run[0] * page_size(), run.len() * page_size());
            // SAFETY: the advice changes no memory, whatever lies there.
            unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_WILLNEED) };
        }
        self.numbers.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use memmap2::Mmap;

    use super::*;
    use crate::memory::Residency;

    /// Faults of reading every other page, with the file not in memory.
    fn faults_of(request: bool) -> u64 {
        const PAGES: usize = 256;
        let file = tempfile::tempfile().unwrap();
        file.set_len(0).unwrap();
        std::io::Write::write_all(&mut &file, &vec![7; PAGES * page_size()]).unwrap();
        file.sync_all().unwrap();
        // SAFETY: the file is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        // SAFETY: nobody else has the file.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        Residency::Partial.advise(&map);
        let places: Vec<&u8> = map.iter().step_by(2 * page_size()).collect();
        if request {
            let mut pages = PageList::default();
            places.iter().rev().for_each(|place| pages.add(*place, 1));
            pages.request();
        }
        let before = faults();
        assert!(places.iter().all(|place| **place == 7));
        faults() - before
    }

    #[test]
    fn pages_that_were_asked_for_are_not_waited_for_one_by_one() {
        let (alone, asked) = (faults_of(false), faults_of(true));
        // A file system in memory has no faults at all.
        assert!(asked <= alone / 8, "{asked} of {alone} faults");
    }

    #[test]
    fn batches_ask_while_they_come_from_the_disk() {
        let ahead = ReadAhead::default();
        let asked = |batches: u32| {
            let mut asked = 0;
            (0..batches).for_each(|_| ahead.around(512, || asked += 1, || ()));
            asked
        };
        assert_eq!(asked(ASKING_BATCHES + 50), ASKING_BATCHES);
        ahead.asking.store(3, Relaxed);
        assert_eq!(asked(50), 3);
    }
}
