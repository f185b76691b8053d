//! Checks of what an operator copies: the binary accepts every command of the operations guide and
//! of the systemd units, and every metric that the guide mentions exists.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use hypercast_core::prerequisite::skip;
use hypercast_tests::{Prerequisites, prerequisites, run};

fn host() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../host")
}

fn guide() -> String {
    std::fs::read_to_string(host().join("README.md")).unwrap()
}

/// Checks that the binary accepts a command with all its options. With `--help` appended, it parses
/// them without running the command.
fn assert_accepted(binary: &Path, words: &[&str]) {
    let args: Vec<&str> = words.iter().copied().chain(["--help"]).collect();
    let (well, text) = run(binary, Path::new("."), &args);
    assert!(well, "hypercast {}: {text}", words.join(" "));
}

/// The `hypercast` commands in the guide's shell blocks.
fn commands(guide: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut shell = false;
    for line in guide.lines() {
        match line {
            "```sh" => shell = true,
            "```" => shell = false,
            _ if shell => {
                let line = line.split("  #").next().unwrap_or_default();
                let parts = line.split("&&").flat_map(|part| part.split('|'));
                let own = parts.filter_map(|part| part.trim().strip_prefix("hypercast "));
                commands.extend(own.map(str::to_owned));
            }
            _ => {}
        }
    }
    commands
}

#[test]
fn the_binary_accepts_every_command_of_the_guide() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("the guide's commands")
    else {
        return;
    };
    let commands = commands(&guide());
    assert!(commands.len() > 10, "{commands:?}");
    for command in &commands {
        assert_accepted(&binary, &command.split_whitespace().collect::<Vec<_>>());
    }
}

#[test]
fn the_binary_accepts_the_command_of_every_unit() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("units") else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(host().join("deploy")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "service") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let line = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let mut start = line("ExecStart=/usr/local/bin/hypercast ").unwrap().replace("%i", "1.0.0");
        for pair in line("Environment=").unwrap_or_default().split_whitespace() {
            let (name, value) = pair.split_once('=').unwrap();
            start = start.replace(&format!("${{{name}}}"), value);
        }
        assert_accepted(&binary, &start.split_whitespace().collect::<Vec<_>>());
        seen += 1;
        verified(&path, &text, &binary);
    }
    assert_eq!(seen, 5);
}

/// Verifies a unit with `systemd-analyze`, if this machine has it.
fn verified(path: &Path, text: &str, binary: &Path) {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return skip("systemd-analyze verify", "this machine has none");
    }
    let dir = tempfile::tempdir().unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().replace('@', "@1.0.0");
    let unit = dir.path().join(name);
    let here = text.replace("/usr/local/bin/hypercast", binary.to_str().unwrap());
    std::fs::write(&unit, here).unwrap();
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let own: Vec<&str> = said.lines().filter(|line| line.contains("hypercast")).collect();
    assert!(own.is_empty(), "{}: {own:?}", path.display());
}

#[test]
fn every_metric_of_the_guide_exists() {
    let named = |text: &str| -> BTreeSet<String> {
        let part = |rest: &str| -> String {
            rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect()
        };
        text.match_indices("hypercast_").map(|(at, _)| part(&text[at..])).collect()
    };
    let mut known = BTreeSet::new();
    let mut folders = vec![host()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                known.extend(named(&std::fs::read_to_string(path).unwrap_or_default()));
            }
        }
    }
    let mentioned = named(&guide());
    assert!(mentioned.len() > 8, "{mentioned:?}");
    let missing: Vec<&String> = mentioned.difference(&known).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_image_contains_the_whole_workspace() {
    let root = host().join("..");
    let file = std::fs::read_to_string(host().join("deploy/Containerfile")).unwrap();
    let lines = file.lines().filter_map(|line| line.strip_prefix("COPY "));
    let copied: BTreeSet<&str> = lines
        .filter(|line| !line.starts_with("--from"))
        .flat_map(|line| line.split_whitespace().rev().skip(1))
        .collect();
    for source in &copied {
        assert!(root.join(source).exists(), "{source}");
    }
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    for member in members.lines().filter_map(|line| line.trim().strip_prefix('"')) {
        let top = member.split(['/', '"']).next().unwrap();
        assert!(copied.contains(top), "the Containerfile copies {member}");
    }
    assert!(file.contains("\nUSER 10001"), "the image does not run as root");
}
