//! Child processes: git, cargo and where cargo puts its output.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The root of the working tree that the current folder is in.
pub fn repository_root() -> Result<PathBuf> {
    let output = Command::new("git").args(["rev-parse", "--show-toplevel"]).output();
    let output = output.context("cannot run git")?;
    ensure!(output.status.success(), "the current folder is not in a git working tree");
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// What git prints, with `input` as its standard input.
pub fn git(root: &Path, args: &[&str], input: &str) -> Result<Vec<u8>> {
    let mut child = Command::new("git")
        .args(args)
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run git")?;
    let mut stdin = child.stdin.take().context("git has no standard input")?;
    let input = input.to_owned();
    // A thread of its own: git answers while it reads, and both pipes are short.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "git {} failed", args.join(" "));
    writer.join().expect("writing to a pipe does not panic")?;
    Ok(output.stdout)
}

/// Short commit hash of the working tree, with `-dirty` if it has changes.
pub fn commit(root: &Path) -> Result<String> {
    let args = ["describe", "--always", "--dirty", "--exclude", "*"];
    Ok(String::from_utf8(git(root, &args, "")?)?.trim_end().to_owned())
}

/// The time in UTC, as `2025-01-31T12:00:00Z`.
pub fn now() -> Result<String> {
    let output = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output();
    Ok(String::from_utf8(output.context("cannot run date")?.stdout)?.trim_end().to_owned())
}

/// The cargo that runs this program, or the one in the path. It does not get what cargo told this
/// program of its package: build scripts that read it, as ring's does, would run again, and all
/// that is built on them would be built again.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The folder of cargo's output.
pub fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}
