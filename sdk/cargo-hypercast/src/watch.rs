//! `cargo hypercast watch`: checks and tests a plugin again after each change of its files.
//!
//! It looks at names, sizes and times of files twice a second: a plugin has few files, and so no
//! crate that knows each system's notifications is needed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use crate::tasks::{PackageChoice, PluginCrate};
use crate::wasm_toolchain::ToolchainSource;

/// The time between two looks at the files.
const INTERVAL: Duration = Duration::from_millis(500);

/// Folders and files that no build reads: what builds, runs and cargo itself write.
const IGNORED: [&str; 5] = ["target", "run", ".git", ".cargo", "Cargo.lock"];

/// The most files that are looked at.
const MOST_FILES: usize = 10_000;

/// Sizes and times of files, by path.
type FileStamps = BTreeMap<PathBuf, (u64, SystemTime)>;

/// Checks and tests the plugin, and again after each change, until the process is ended.
///
/// # Errors
/// The files of the package cannot be listed, or this program cannot run itself.
pub fn watch(source: ToolchainSource, choice: &PackageChoice, args: &[OsString]) -> Result<()> {
    let plugin = PluginCrate::load(choice)?;
    let manifest = plugin.manifest().to_owned();
    let folder = manifest.parent().unwrap_or(Path::new("."));
    let own = std::env::current_exe().context("cannot find this program")?;
    let run = |subcommand: &str, args: &[OsString]| {
        let mut command = Command::new(&own);
        command.args(["--wasm-toolchain", source.name(), subcommand, "--manifest-path"]);
        let status = command.arg(&manifest).args(args).status();
        Ok::<bool, anyhow::Error>(status.context("cannot run this program again")?.success())
    };
    loop {
        // Before the run, so that a change during it is seen.
        let before = stamps(folder)?;
        let start = Instant::now();
        // The tests of a plugin that is refused say nothing more.
        let passed = run("check", &[])? && run("test", args)?;
        let word = if passed { "passed" } else { "FAILED" };
        let took_s = start.elapsed().as_secs_f64();
        eprintln!(
            "cargo hypercast: {word} after {took_s:.1} s; waiting for a change in {} (Ctrl-C ends)",
            folder.display()
        );
        while stamps(folder)? == before {
            std::thread::sleep(INTERVAL);
        }
    }
}

/// The files below a folder, but for those that are ignored.
fn stamps(folder: &Path) -> Result<FileStamps> {
    let mut found = FileStamps::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        // A folder may be gone since it was listed.
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            if IGNORED.iter().any(|ignored| name == *ignored) {
                continue;
            }
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else {
                let changed = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.insert(entry.path(), (metadata.len(), changed));
            }
            anyhow::ensure!(
                found.len() <= MOST_FILES,
                "{} has more than {MOST_FILES} files: move data out of the package",
                folder.display()
            );
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_of_files_that_a_build_reads() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = dir.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        write("src/lib.rs", "1");
        let first = stamps(dir.path()).unwrap();
        assert_eq!(first.len(), 1);
        write("target/debug/x", "1");
        write("run/data/x", "1");
        assert_eq!(stamps(dir.path()).unwrap(), first, "what builds write is no change");
        write("src/lib.rs", "12");
        let second = stamps(dir.path()).unwrap();
        assert_ne!(second, first);
        write("schema.toml", "");
        let third = stamps(dir.path()).unwrap();
        assert_ne!(third, second, "a new file");
        std::fs::remove_file(dir.path().join("schema.toml")).unwrap();
        assert_eq!(stamps(dir.path()).unwrap(), second);
    }
}
