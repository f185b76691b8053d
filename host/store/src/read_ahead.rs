//! Reads from the disk for a store that is larger than memory. A fault brings one page and waits
//! for it, so a batch would wait for one page after the other. Here the disk is asked for all pages
//! of a batch at once, in the order in which they lie, so that it always has many requests.
//!
//! To ask costs a system call a page, also for a page that is there, which is more than to read it.
//! So it is done only while batches do come from the disk.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::fault_guard::page_size;

/// Asking pays where more than one row in so many waits for the disk: a page that is there costs a
/// call of about a microsecond, one that is not a wait of about a hundred.
const ROWS_A_FAULT: usize = 128;
/// Rows that are read without asking before one knows that it does not pay. A batch alone would not
/// do: one fault is much for a small one, and says little.
const WINDOW_ROWS: usize = 4096;
/// A smaller batch gains too little from many requests at once, so it never asks. It is not counted
/// either, which would cost it two system calls.
const FEWEST_ROWS: usize = 16;
/// Batches that ask before one finds out again whether it pays, which may cost it the time of ten.
const ASKING_BATCHES: u32 = 256;

/// Whether the batches of a store come from the disk. A writer and its handles find it out
/// together, also past a checkpoint, and so do the threads of a reader; readers that were opened
/// apart do not.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// Batches that are still to ask.
    asking: AtomicU32,
    /// Rows of this window, which were read without asking.
    rows: AtomicUsize,
    /// How often these waited for the disk.
    faults: AtomicU64,
}

impl Default for ReadAhead {
    /// At first nothing is in memory.
    fn default() -> ReadAhead {
        ReadAhead {
            asking: AtomicU32::new(ASKING_BATCHES),
            rows: AtomicUsize::new(0),
            faults: AtomicU64::new(0),
        }
    }
}

impl ReadAhead {
    /// Reads a batch of so many rows, after a `request` for its pages where that pays. `faults`
    /// says how often this thread has waited for the disk so far.
    pub fn around<T>(
        &self,
        rows: usize,
        faults: impl Fn() -> u64,
        request: impl FnOnce(),
        read: impl FnOnce() -> T,
    ) -> T {
        if rows < FEWEST_ROWS {
            return read();
        }
        let asking = self.asking.load(Relaxed);
        if asking > 0 {
            // Of two that count at the same time one may be lost, which changes nothing.
            self.asking.store(asking - 1, Relaxed);
            request();
            return read();
        }
        let before = faults();
        let done = read();
        self.count(rows, faults().saturating_sub(before));
        done
    }

    /// Counts a batch that did not ask, and decides whether the next ones do. Batches that are
    /// counted while another one ends the window may fall into either, which matters little.
    fn count(&self, rows: usize, faults: u64) {
        let rows = self.rows.fetch_add(rows, Relaxed) + rows;
        let faults = self.faults.fetch_add(faults, Relaxed) + faults;
        // Once there are too many for a whole window, its other rows need not wait for the disk.
        let pays = faults > (rows.max(WINDOW_ROWS) / ROWS_A_FAULT) as u64;
        if pays || rows >= WINDOW_ROWS {
            self.rows.store(0, Relaxed);
            self.faults.store(0, Relaxed);
        }
        if pays {
            self.asking.store(ASKING_BATCHES, Relaxed);
        }
    }
}

/// How often this thread has waited for a page from the disk.
pub(crate) fn faults() -> u64 {
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
    use std::{
        cell::Cell,
        os::fd::AsRawFd,
        time::{Duration, Instant},
    };

    use memmap2::Mmap;

    use super::*;
    use crate::memory::Residency;

    /// Pages of the file of which every other one is read.
    const PAGES: usize = 256;

    /// Faults of reading every other page, with the file not in memory.
    fn faults_of(request: bool) -> u64 {
        let file = tempfile::tempfile().unwrap();
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
            // A fault on a page that is still on its way may count as one that waited.
            let end = Instant::now() + Duration::from_secs(5);
            while !are_in_memory(&map) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let before = faults();
        assert!(places.iter().all(|place| **place == 7));
        faults() - before
    }

    /// Whether every other page is in memory.
    fn are_in_memory(map: &Mmap) -> bool {
        let mut is_there = [0_u8; PAGES];
        let start = map.as_ptr().cast_mut().cast();
        // SAFETY: it changes nothing of the mapping, and writes a byte for each of its pages.
        let rc = unsafe { libc::mincore(start, map.len(), is_there.as_mut_ptr().cast()) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        is_there.iter().step_by(2).all(|page| page & 1 == 1)
    }

    #[test]
    fn pages_that_were_asked_for_are_not_waited_for_one_by_one() {
        let alone = faults_of(false);
        if alone < 64 {
            eprintln!(
                "SKIPPED: reading {} pages of a file in {} waited for the disk only {alone} times, \
                 so the system did not drop them from memory; a folder on a disk (TMPDIR) may do",
                PAGES / 2,
                std::env::temp_dir().display()
            );
            return;
        }
        let asked = faults_of(true);
        assert!(asked <= alone / 8, "{asked} of {alone} faults");
    }

    /// Of so many batches of `rows` rows those that ask, where of those that do not every `every`th
    /// row waits for the disk.
    fn asking(ahead: &ReadAhead, batches: usize, rows: usize, every: usize) -> usize {
        let (rows_read, asked) = (Cell::new(0), Cell::new(0));
        for _ in 0..batches {
            let before = asked.get();
            let read = || {
                if asked.get() == before {
                    rows_read.set(rows_read.get() + rows);
                }
            };
            let request = || asked.set(before + 1);
            ahead.around(rows, || (rows_read.get() / every) as u64, request, read);
        }
        asked.get()
    }

    #[test]
    fn batches_ask_while_they_come_from_the_disk() {
        const FIRST: usize = ASKING_BATCHES as usize;
        for rows in [FEWEST_ROWS, 100, 512, WINDOW_ROWS] {
            let of = |batches, every| asking(&ReadAhead::default(), batches, rows, every);
            assert_eq!(of(FIRST + 1, 2), FIRST, "{rows}: it finds out");
            // Half of the rows wait: 66 rows are enough to know it.
            let batches_that_find_out = 66_usize.div_ceil(rows);
            assert_eq!(of(2 * FIRST + batches_that_find_out, 2), 2 * FIRST, "{rows}");
            // One row in 64 waits: half of a window, or a whole one, and it asks again.
            assert_eq!(of(2 * FIRST + WINDOW_ROWS.div_ceil(rows), 64), 2 * FIRST, "{rows}");
            // One in 256: it never does, although every small batch with a fault has many.
            assert_eq!(of(FIRST + 10 * WINDOW_ROWS / rows, 256), FIRST, "{rows}");
        }
    }

    #[test]
    fn small_batches_never_ask() {
        let ahead = ReadAhead::default();
        assert_eq!(asking(&ahead, 5000, FEWEST_ROWS - 1, 1), 0);
        assert_eq!(asking(&ahead, 5000, 1, 1), 0);
        // They leave it to the larger ones.
        assert_eq!(asking(&ahead, 300, FEWEST_ROWS, usize::MAX), ASKING_BATCHES as usize);
        assert_eq!(asking(&ahead, 5000, 1, 1), 0);
        assert_eq!(asking(&ahead, 5000, FEWEST_ROWS, usize::MAX), 0);
    }
}
