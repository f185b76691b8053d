//! Runs the author's guide, `sdk/README.md`: all its fenced commands, in order, in one shell, in a
//! new folder. So the guide always matches the tool.
//!
//! Three things are replaced: the daemon's port, by a free one, `cargo install`, by the binaries
//! that were built along with this test, and the folder in which that is to be run, by the checkout.

use std::{path::Path, process::Command, time::Instant};

use hypercast_tests::{
    Prerequisites,
    commands::{checkout, shell_blocks},
    prerequisites,
    services::free_port,
};

const GUIDE: &str = include_str!("../../sdk/README.md");

/// The time limit of the whole guide, in seconds. Most of the time goes into building the host.
const LIMIT_S: &str = "3600";

/// How much of the script's output a failure shows, in bytes.
const SHOWN_BYTES: usize = 6_000;

/// The guide as one script. It stops at the first command that fails, and kills its background
/// jobs.
fn script(blocks: &[String], checkout: &Path, port: u16) -> String {
    let mut script = String::from("set -eu\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n");
    for (number, block) in blocks.iter().enumerate() {
        script.push_str(&format!("echo \"=== block {number} after $SECONDS s\"\n"));
        for line in block.lines() {
            let line = line.replace("127.0.0.1:8570", &format!("127.0.0.1:{port}"));
            let line = line.replace("$PWD", &checkout.display().to_string());
            let installed = line.strip_prefix("cargo install ");
            match installed.and_then(|options| options.split("--path ").nth(1)) {
                Some(package) => {
                    let package = package.split(' ').next().unwrap_or(package);
                    let manifest = checkout.join(package).join("Cargo.toml");
                    script.push_str(&format!("test -f '{}'\n", manifest.display()));
                }
                None => script.push_str(&(line.clone() + "\n")),
            }
        }
    }
    script.push_str("echo \"=== end after $SECONDS s\"\n");
    script
}

#[test]
fn all_commands_of_the_guide_succeed() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("guide") else { return };
    let dir = tempfile::tempdir().unwrap();
    let checkout = checkout();
    let beside = binary.parent().expect("the binary is in a folder");
    let target = beside.parent().expect("the profile's folder is in the target folder");
    // Put only those binaries into the path that `cargo install` would install.
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for name in ["hypercast", "cargo-hypercast"] {
        std::os::unix::fs::symlink(beside.join(name), bin.join(name)).unwrap();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(bin).chain(std::env::split_paths(&path));
    let script = script(&shell_blocks(GUIDE), &checkout, free_port());
    let start = Instant::now();
    // The timeout also kills everything that the guide has started.
    let output = Command::new("timeout")
        .args([LIMIT_S, "bash", "-c"])
        .arg(format!("{{ {script}\n}} 2>&1"))
        .current_dir(dir.path())
        .env("PATH", std::env::join_paths(folders).unwrap())
        .env("CARGO_TARGET_DIR", target)
        // All dependencies were fetched to build this test.
        .env("CARGO_NET_OFFLINE", "true")
        .env_remove("HYPERCAST")
        .env_remove("HYPERCAST_PLUGINS")
        .env_remove("HYPERCAST_COMPONENT")
        .env_remove("HYPERCAST_SDK")
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.len().saturating_sub(SHOWN_BYTES);
    let last = said.ceil_char_boundary(last);
    assert!(output.status.success(), "a command of the guide failed:\n{}", &said[last..]);
    let times = said.lines().filter(|line| line.starts_with("=== "));
    eprintln!("{}", times.collect::<Vec<_>>().join("\n"));
    eprintln!("the guide took {:.0} s", start.elapsed().as_secs_f64());
}

#[test]
fn the_test_runs_every_fenced_command_of_the_guide() {
    let fences = GUIDE.lines().filter(|line| line.trim_start().starts_with("```")).count();
    let shown = ["```rust", "```rust,ignore", "```text"];
    let other = GUIDE.lines().filter(|line| shown.contains(&line.trim_end())).count();
    let blocks = shell_blocks(GUIDE);
    assert_eq!(
        fences,
        2 * (blocks.len() + other),
        "every block is `sh`, which the test runs, or `rust` or `text`, which it does not"
    );
    let all = blocks.join("");
    for subcommand in [
        "new", "build", "check", "test", "bench", "run", "train", "replay", "keygen", "sign",
        "push", "logs", "rollback", "link",
    ] {
        assert!(all.contains(&format!("cargo hypercast {subcommand}")), "{subcommand}");
    }
    // An alias would hide the installed tool in the checkout, and in experts created inside it.
    let config = include_str!("../../.cargo/config.toml");
    assert!(!config.contains("\nhypercast ="), "an alias hides `cargo hypercast`");
    let script = script(&blocks, &checkout(), 4321);
    assert!(!script.contains("8570"), "every port is replaced");
    assert!(script.contains("/host/Cargo.toml'\n"), "{script}");
}
