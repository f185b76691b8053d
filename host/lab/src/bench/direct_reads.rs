//! What the disk gives: single pages of a store's rows, read past the system's cache.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use hypercast_core::hash::mix64;

use crate::error::{CommonErrors as _, Error, Result};

/// How many pages the disk is asked for at once.
const DISK_THREADS: usize = 64;

/// The rows' files, read past the system's cache.
pub(super) struct DirectReads {
    files: Vec<File>,
    /// Reads so far. Each is of a page that is drawn anew: some come again, which the disk itself
    /// may have kept.
    reads: AtomicU64,
}

impl DirectReads {
    /// Opens them, and reads a page of each: some file systems refuse only that.
    pub(super) fn open(dir: &Path) -> Result<DirectReads> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
            let path = entry.map_err(Error::io(dir))?.path();
            if path.extension().is_some_and(|extension| extension == "slab") {
                let mut options = OpenOptions::new();
                options.read(true).custom_flags(libc::O_DIRECT);
                let file = options.open(&path).map_err(Error::io(&path))?;
                let page = &mut PageBuffer::new();
                file.read_exact_at(page.get(), 0).map_err(Error::io(&path))?;
                files.push(file);
            }
        }
        Ok(DirectReads { files, reads: AtomicU64::new(0) })
    }

    /// Reads so many random pages by threads, each one page after the other; gives the seconds.
    pub(super) fn read_pages(&self, pages: usize) -> Result<f64> {
        let start = Instant::now();
        std::thread::scope(|scope| {
            let read = |_| scope.spawn(|| self.read_pages_alone(pages / DISK_THREADS));
            let threads: Vec<_> = (0..DISK_THREADS).map(read).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn read_pages_alone(&self, pages: usize) -> Result<()> {
        let (mut buffer, page_size) = (PageBuffer::new(), page_size());
        for _ in 0..pages {
            let random = mix64(self.reads.fetch_add(1, Ordering::Relaxed)) as usize;
            let file = &self.files[random % self.files.len()];
            let len = file.metadata().map_err(Error::io("a slab"))?.len() as usize;
            let offset = (random >> 16) % (len / page_size) * page_size;
            file.read_exact_at(buffer.get(), offset as u64).map_err(Error::io("a slab"))?;
        }
        Ok(())
    }
}

/// A page of memory, aligned as direct reads need it.
struct PageBuffer(Vec<u8>);

impl PageBuffer {
    fn new() -> PageBuffer {
        PageBuffer(vec![0; 2 * page_size()])
    }

    fn get(&mut self) -> &mut [u8] {
        let at = self.0.as_ptr().align_offset(page_size());
        &mut self.0[at..at + page_size()]
    }
}

/// Bytes of a page.
pub(super) fn page_size() -> usize {
    // SAFETY: it reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every system has pages")
}

/// Bytes that this process has had the disk read, or why they are not known.
pub(super) fn bytes_from_disk() -> std::result::Result<u64, String> {
    const PATH: &str = "/proc/self/io";
    let text = std::fs::read_to_string(PATH).map_err(|error| format!("{PATH}: {error}"))?;
    read_bytes(&text).ok_or_else(|| format!("{PATH} has no read_bytes"))
}

fn read_bytes(io: &str) -> Option<u64> {
    io.lines().find_map(|line| line.strip_prefix("read_bytes: "))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_from_the_disk_are_known_or_not_but_never_made_up() {
        assert_eq!(read_bytes("rchar: 9\nread_bytes: 4096\nwrite_bytes: 1\n"), Some(4096));
        assert_eq!(read_bytes("rchar: 9\n"), None);
    }

    #[test]
    fn direct_reads_give_pages_or_say_that_they_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("0.slab"), vec![7; 8 * page_size()]).unwrap();
        match DirectReads::open(dir.path()) {
            Ok(disk) => assert!(disk.read_pages(2 * DISK_THREADS).unwrap() > 0.0),
            Err(error) => assert!(error.to_string().contains("0.slab"), "{error}"),
        }
    }
}
