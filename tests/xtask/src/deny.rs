//! `cargo xtask deny`: cargo-deny on `deny.toml`, installed where it is missing.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    options::Options,
    process::{cargo, repository_root, target},
};

/// The version that is installed where there is none. Another that is in PATH is used as it is.
const VERSION: &str = "0.20.2";

/// What needs no network.
const CHECKS: [&str; 3] = ["bans", "licenses", "sources"];

/// Checks bans, licences and sources; known vulnerabilities only if their database is on this
/// machine, because CI may have no network.
pub fn run(_: Options) -> Result<bool> {
    let root = repository_root()?;
    let program = find_or_install(&root)?;
    let check = |options: &[&str], checks: &[&str]| -> Result<bool> {
        let mut command = Command::new(&program);
        command.current_dir(&root).args(options).arg("check").args(checks);
        Ok(command.status().with_context(|| format!("cannot run {}", program.display()))?.success())
    };
    let mut passed = check(&[], &CHECKS)?;
    if has_advisories(&cargo_home()?) {
        passed &= check(&["--offline"], &["advisories"])?;
    } else {
        println!("advisories: not checked (no database)");
    }
    Ok(passed)
}

/// cargo-deny from PATH, from an earlier run, or built now, which takes about two minutes.
fn find_or_install(root: &Path) -> Result<PathBuf> {
    let tools = target(root).join("tools");
    let installed = tools.join("bin/cargo-deny");
    for program in [PathBuf::from("cargo-deny"), installed.clone()] {
        let found = Command::new(&program).arg("--version").stdout(Stdio::null()).status();
        if found.is_ok_and(|status| status.success()) {
            return Ok(program);
        }
    }
    let build = tools.join("build");
    let status = cargo()
        // Without optimisation: it builds for minutes and runs for seconds.
        .args(["install", "cargo-deny", "--locked", "--debug", "--version", VERSION, "--root"])
        .arg(&tools)
        .env("CARGO_TARGET_DIR", &build)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cargo-deny {VERSION} could not be installed from crates.io");
    std::fs::remove_dir_all(&build)
        .with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(installed)
}

fn cargo_home() -> Result<PathBuf> {
    let given = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    given.or_else(home).context("neither CARGO_HOME nor HOME is set")
}

/// Whether a clone of RustSec's database is where cargo-deny keeps it.
fn has_advisories(cargo_home: &Path) -> bool {
    let databases = std::fs::read_dir(cargo_home.join("advisory-dbs"));
    databases.is_ok_and(|entries| entries.flatten().any(|entry| entry.path().join(".git").is_dir()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_a_clone_and_not_an_empty_folder() {
        let home = tempfile::tempdir().unwrap();
        assert!(!has_advisories(home.path()));
        let database = home.path().join("advisory-dbs/advisory-db-1");
        std::fs::create_dir_all(&database).unwrap();
        assert!(!has_advisories(home.path()));
        std::fs::create_dir(database.join(".git")).unwrap();
        assert!(has_advisories(home.path()));
    }
}
