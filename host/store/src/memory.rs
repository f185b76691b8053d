//! How much memory there is for a store's pages: it decides which advice the mappings get. A store
//! that fits is read ahead and mapped in large pages, where the system has them for files, which
//! spares random reads most of the cost of address translation; one that does not fit is read page
//! by page, so that a read from the disk brings only what was asked for. It is advice: answers
//! never depend on it.

use std::fs;

use memmap2::{Advice, Mmap};

/// How a mapping will be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// All of it stays in memory.
    Whole,
    /// It is larger than memory.
    Partial,
}

impl Residency {
    /// For a store of so many bytes, beside whatever else runs here.
    pub fn of(bytes: u64) -> Residency {
        match available() {
            Some(available) if bytes > available / 4 * 3 => Residency::Partial,
            _ => Residency::Whole,
        }
    }

    /// Tells the system. Where it does not know the advice, it goes without.
    pub fn advise(self, map: &Mmap) {
        match self {
            Residency::Whole => {
                #[cfg(target_os = "linux")]
                drop(map.advise(Advice::HugePage));
            }
            Residency::Partial => {
                #[cfg(target_os = "linux")]
                drop(map.advise(Advice::NoHugePage));
                drop(map.advise(Advice::Random));
            }
        }
    }
}

/// What the system could give to this process, its control group's limit included, where that can
/// be found out.
fn available() -> Option<u64> {
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter();
    let limits = limits.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    free.into_iter().chain(limits).min()
}

/// Where the limits of a process's control groups are; within a container the group is the root of
/// what is mounted.
fn limit_files(groups: &str) -> Vec<String> {
    let (new, old) = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory");
    let mut files = vec![format!("{new}/memory.max"), format!("{old}/memory.limit_in_bytes")];
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        match (parts.next(), parts.next()) {
            (Some(""), Some(path)) => files.push(format!("{new}{path}/memory.max")),
            (Some("memory"), Some(path)) => {
                files.push(format!("{old}{path}/memory.limit_in_bytes"));
            }
            _ => {}
        }
    }
    files
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        let text = "MemTotal:       24684416 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(mem_available(text), Some(20_480_000_000));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
        let files = limit_files("5:cpu:/a\n4:memory:/b/c\n0::/d\n");
        let own =
            ["/sys/fs/cgroup/memory/b/c/memory.limit_in_bytes", "/sys/fs/cgroup/d/memory.max"];
        assert_eq!(files[2..], own);
        assert_eq!(Residency::of(1), Residency::Whole);
        assert_eq!(
            Residency::of(u64::MAX),
            if available().is_some() { Residency::Partial } else { Residency::Whole }
        );
    }
}
