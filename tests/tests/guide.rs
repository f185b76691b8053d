//! Runs the author's guide, `sdk/README.md`: all its `sh` blocks, in order, in one shell, in a
//! new folder. So the guide always matches the tool.
//!
//! The daemon's port is replaced by a free one. What is installed, and from where, depends on the
//! test: the binaries that were built along with it and the checkout's SDK, or, where nothing of
//! the checkout is to be used, packages from a local registry.

use std::{path::Path, process::Command, time::Instant};

use hypercast_tests::{
    Prerequisites,
    commands::{checkout, shell_blocks},
    local_registry::{local_registry, packaged_files, published},
    prerequisites,
    services::free_port,
};

const GUIDE: &str = include_str!("../../sdk/README.md");

/// The time limit of the whole guide, in seconds. Most of the time goes into building the host.
const LIMIT_S: &str = "3600";

/// How much of the script's output a failure shows, in bytes.
const SHOWN_BYTES: usize = 6_000;

/// What the guide's lines about installing become.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Installed {
    /// What was built along with this test; new experts use the checkout's SDK.
    Checkout,
    /// Released packages; new experts name their versions.
    Released,
}

/// The guide as one script. It stops at the first command that fails, and kills its background
/// jobs.
fn script(blocks: &[String], installed: Installed, port: u16) -> String {
    let checkout = checkout();
    let mut script = String::from("set -eu\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n");
    for (number, block) in blocks.iter().enumerate() {
        script.push_str(&format!("echo \"=== block {number} after $SECONDS s\"\n"));
        for line in block.lines() {
            let line = line.replace("127.0.0.1:8570", &format!("127.0.0.1:{port}"));
            let package = line.strip_prefix("cargo install --locked --path ");
            let line = match (package, installed) {
                (Some(folder), Installed::Checkout) => format!("test -d '{folder}'"),
                (Some(folder), Installed::Released) => {
                    format!("cargo install --quiet --locked {}", package_in(&checkout.join(folder)))
                }
                (None, Installed::Released) if line.starts_with("export HYPERCAST_SDK") => continue,
                (None, _) => line,
            };
            // The first block is for the checkout, all others for a folder of the author's.
            let line = match number {
                0 if installed == Installed::Checkout => {
                    format!("cd '{}'; {line}; cd - > /dev/null", checkout.display())
                }
                _ => line,
            };
            script.push_str(&(line.clone() + "\n"));
            if line.starts_with("cargo hypercast push") {
                script.push_str("echo \"=== pushed after $SECONDS s\"\n");
            }
        }
    }
    script.push_str("echo \"=== end after $SECONDS s\"\n");
    script
}

/// The name of the package in a folder.
fn package_in(folder: &Path) -> String {
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).expect("a package");
    let name = manifest.lines().find_map(|line| line.strip_prefix("name = "));
    name.expect("a package has a name").trim_matches('"').to_owned()
}

/// Runs the guide in `dir`, with programs from `bin`. Returns what it printed.
fn run_guide(
    dir: &Path,
    bin: &Path,
    installed: Installed,
    environment: &[(&str, &Path)],
) -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(bin.to_owned()).chain(std::env::split_paths(&path));
    let script = script(&shell_blocks(GUIDE), installed, free_port());
    let start = Instant::now();
    // The timeout also kills everything that the guide has started.
    let output = Command::new("timeout")
        .args([LIMIT_S, "bash", "-c"])
        .arg(format!("{{ {script}\n}} 2>&1"))
        .current_dir(dir)
        .env("PATH", std::env::join_paths(folders).unwrap())
        .envs(environment.iter().copied())
        // All dependencies were fetched to build this test.
        .env("CARGO_NET_OFFLINE", "true")
        .env_remove("HYPERCAST")
        .env_remove("HYPERCAST_PLUGINS")
        .env_remove("HYPERCAST_COMPONENT")
        .env_remove("HYPERCAST_SDK")
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = said.len().saturating_sub(SHOWN_BYTES);
    let last = said.ceil_char_boundary(last);
    assert!(output.status.success(), "a command of the guide failed:\n{}", &said[last..]);
    let times = said.lines().filter(|line| line.starts_with("=== "));
    eprintln!("{}", times.collect::<Vec<_>>().join("\n"));
    eprintln!("the guide took {:.0} s", start.elapsed().as_secs_f64());
    said
}

#[test]
fn all_commands_of_the_guide_succeed() {
    let Some(Prerequisites { hypercast: binary, .. }) = prerequisites("guide") else { return };
    let dir = tempfile::tempdir().unwrap();
    let beside = binary.parent().expect("the binary is in a folder");
    let target = beside.parent().expect("the profile's folder is in the target folder");
    // Put only those binaries into the path that `cargo install` would install.
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for name in ["hypercast", "cargo-hypercast"] {
        std::os::unix::fs::symlink(beside.join(name), bin.join(name)).unwrap();
    }
    run_guide(dir.path(), &bin, Installed::Checkout, &[("CARGO_TARGET_DIR", target)]);
}

/// As on a machine without the checkout: everything is installed from packages, and built in an
/// empty folder. Takes as long as an optimised build of the host.
#[test]
#[ignore = "for hours, in `cargo xtask full`"]
fn an_expert_outside_of_the_checkout_is_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let home = local_registry(&checkout(), dir.path());
    let (root, target, work) =
        (dir.path().join("root"), dir.path().join("built"), dir.path().join("work"));
    std::fs::create_dir(&work).unwrap();
    let environment =
        [("CARGO_HOME", &*home), ("CARGO_INSTALL_ROOT", &*root), ("CARGO_TARGET_DIR", &*target)];
    let said = run_guide(&work, &root.join("bin"), Installed::Released, &environment);
    let promoted = said.lines().find_map(|line| line.strip_prefix("=== pushed after "));
    let blocks = shell_blocks(GUIDE).concat();
    let commands =
        blocks.lines().filter(|line| line.starts_with("cargo ") || line.starts_with("hypercast "));
    let until = commands.clone().position(|line| line.starts_with("cargo hypercast push"));
    println!(
        "figure: from cargo install to a promoted version: {} commands, {}",
        until.expect("the guide pushes") + 1,
        promoted.expect("the push ended"),
    );
    let built = said.lines().find_map(|line| line.strip_prefix("=== block 1 after "));
    println!("figure: of these, to install: {}", built.expect("the second block began"));
}

/// Everything that an author or an operator installs can be packaged: it says what it is, has its
/// files within its folder, and needs no crate that is not published.
#[test]
fn what_is_installed_can_be_published() {
    let checkout = checkout();
    let packages = published(&checkout);
    let names: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    for name in ["hypercast", "cargo-hypercast", "hypercast-sdk", "hypercast-testkit"] {
        assert!(names.contains(&name), "{name} is not published");
    }
    for package in &packages {
        let name = &package["name"];
        assert!(package["description"].is_string() && package["license"].is_string(), "{name}");
        let keywords = package["keywords"].as_array().map_or(0, Vec::len);
        assert!((1..=5).contains(&keywords), "{name} has {keywords} keywords, and may have 1 to 5");
        assert!(package["categories"].as_array().is_some_and(|all| !all.is_empty()), "{name}");
        // A dependency for tests alone is left out of a package where it names no version.
        let needed = package["dependencies"].as_array().unwrap().iter();
        for used in needed.filter(|used| used["kind"].is_null() && used["path"].is_string()) {
            assert!(names.contains(&used["name"].as_str().unwrap()), "{name} needs {used}");
            assert_ne!(used["req"], "*", "{name} needs any version of {}", used["name"]);
        }
    }
    for (package, file) in [
        ("hypercast-sdk", "wit/expert.wit"),
        ("hypercast-expert", "wit/expert.wit"),
        ("hypercast-expert", "wit/2.0.0/expert.wit"),
        ("cargo-hypercast", "template/lib.rs.in"),
        ("hypercast-testkit", "README.md"),
    ] {
        let files = packaged_files(&checkout, package);
        assert!(files.iter().any(|packaged| packaged == file), "{package} lacks {file}: {files:?}");
        assert!(files.iter().all(|packaged| !packaged.starts_with("tests/")), "{package}");
    }
}

#[test]
fn the_test_runs_every_fenced_command_of_the_guide() {
    let fences = GUIDE.lines().filter(|line| line.trim_start().starts_with("```")).count();
    let shown = ["```rust", "```rust,ignore", "```text", "```python", "```console"];
    let other = GUIDE.lines().filter(|line| shown.contains(&line.trim_end())).count();
    let blocks = shell_blocks(GUIDE);
    assert_eq!(
        fences,
        2 * (blocks.len() + other),
        "every block is `sh`, which the test runs, or one of {shown:?}, which it does not"
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
    let released = script(&blocks, Installed::Released, 4321);
    assert!(!released.contains("8570"), "every port is replaced");
    let checkout = checkout().display().to_string();
    assert!(!released.contains(&checkout), "nothing of the checkout is used: {released}");
    assert!(released.contains("cargo install --quiet --locked hypercast\n"), "{released}");
}
