//! The author's guide, `sdk/README.md`, followed literally: its fenced commands, in
//! their order, in one shell, in a folder of their own. So guide and tool cannot drift apart.
//!
//! Two things are mapped: the daemon's port, to one that is free, and `cargo install`, to
//! the binaries that were built beside this test, which are what it would install.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use hypercast_tests::{Prerequisites, prerequisites};

const GUIDE: &str = include_str!("../../sdk/README.md");

/// How long it may take, in seconds: nearly all of it is for building the host, on a machine that may be slow.
const MOST_S: &str = "3600";

/// What a failure shows of the script's output, in bytes.
const TOLD_BYTES: usize = 6_000;

/// The commands of ```` ```sh ```` blocks.
fn blocks(guide: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in guide.lines() {
        match (&mut block, line.trim_end()) {
            (None, "```sh") => block = Some(String::new()),
            (Some(_), "```") => blocks.extend(block.take()),
            (Some(block), line) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, _) => {}
        }
    }
    assert!(block.is_none(), "a block of the guide does not end");
    blocks
}

/// The whole guide as one script that stops at the first command that fails, and ends what it started.
fn script(blocks: &[String], checkout: &Path, port: u16) -> String {
    let mut script = String::from("set -eu\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n");
    for (number, block) in blocks.iter().enumerate() {
        script.push_str(&format!("echo \"=== block {number} after $SECONDS s\"\n"));
        for line in block.lines() {
            let line = line.replace("127.0.0.1:8570", &format!("127.0.0.1:{port}"));
            let installed = line.strip_prefix("cargo install ");
            match installed.and_then(|options| options.split("--path ").nth(1)) {
                Some(package) => {
                    let package = package.split(' ').next().unwrap_or(package);
                    let manifest = checkout.join(package).join("Cargo.toml");
                    script.push_str(&format!("test -f '{}'\n", manifest.display()));
                }
                None => script.push_str(&(line + "\n")),
            }
        }
    }
    script.push_str("echo \"=== end after $SECONDS s\"\n");
    script
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}

#[test]
fn the_guide_followed_literally_ends_well() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("guide") else { return };
    let dir = tempfile::tempdir().unwrap();
    let checkout = std::fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap();
    let beside = binary.parent().expect("a binary lies in a folder");
    let target = beside.parent().expect("a profile's folder lies in the target folder");
    // What `cargo install` would have put into the path, and nothing else of the target folder.
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for name in ["hypercast", "cargo-hypercast"] {
        std::os::unix::fs::symlink(beside.join(name), bin.join(name)).unwrap();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(bin).chain(std::env::split_paths(&path));
    let script = script(&blocks(GUIDE), &checkout, free_port());
    let start = Instant::now();
    // Where the guide waits in vain, this ends it and all that it started.
    let output = Command::new("timeout")
        .args([MOST_S, "bash", "-c"])
        .arg(format!("{{ {script}\n}} 2>&1"))
        .current_dir(dir.path())
        .env("PATH", std::env::join_paths(folders).unwrap())
        .env("CARGO_TARGET_DIR", target)
        // What the guide builds was built for this test: nothing is fetched.
        .env("CARGO_NET_OFFLINE", "true")
        .env_remove("HYPERCAST")
        .env_remove("HYPERCAST_PLUGINS")
        .env_remove("HYPERCAST_COMPONENT")
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.len().saturating_sub(TOLD_BYTES);
    let last = said.ceil_char_boundary(last);
    assert!(output.status.success(), "the guide stopped:\n{}", &said[last..]);
    let times = said.lines().filter(|line| line.starts_with("=== "));
    eprintln!("{}", times.collect::<Vec<_>>().join("\n"));
    eprintln!("the guide took {:.0} s", start.elapsed().as_secs_f64());
}

#[test]
fn every_fenced_command_of_the_guide_is_one_that_the_test_runs() {
    let fences = GUIDE.lines().filter(|line| line.trim_start().starts_with("```")).count();
    let shown = ["```rust", "```text"];
    let other = GUIDE.lines().filter(|line| shown.contains(&line.trim_end())).count();
    let blocks = blocks(GUIDE);
    assert_eq!(
        fences,
        2 * (blocks.len() + other),
        "a block is `sh`, or `rust` or `text` to be read"
    );
    let all = blocks.join("");
    for subcommand in [
        "new", "build", "check", "test", "bench", "train", "replay", "keygen", "sign", "push",
        "logs", "rollback",
    ] {
        assert!(all.contains(&format!("cargo hypercast {subcommand}")), "{subcommand}");
    }
    // Cargo takes an alias for the tool of the same name: in the checkout, where a reader begins, and in experts below it.
    let config = include_str!("../../.cargo/config.toml");
    assert!(!config.contains("\nhypercast ="), "an alias hides `cargo hypercast`");
    let script = script(&blocks, &PathBuf::from("/checkout"), 4321);
    assert!(!script.contains("8570"), "every port is mapped");
    assert!(script.contains("test -f '/checkout/host/Cargo.toml'"), "{script}");
}
