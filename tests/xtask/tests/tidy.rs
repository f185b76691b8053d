//! `cargo xtask tidy` as a command, in repositories that are made up.

use std::{path::Path, process::Command};

/// A tree without findings.
const GOOD: [(&str, &str); 6] = [
    ("Cargo.toml", "[workspace]\nmembers = [\"host/core\", \"host/serve\"]\n"),
    ("host/core/Cargo.toml", "[package]\nname = \"hypercast-core\"\n"),
    (
        "host/core/src/lib.rs",
        "//! What every crate uses.\n\npub struct Row;\n\n#[test]\nfn nothing_leaks() {}\n",
    ),
    (
        "host/serve/Cargo.toml",
        "[package]\nname = \"hypercast-serve\"\n\n[dependencies]\nhypercast-core = \"1\"\n",
    ),
    ("hypercast.toml", "# Where models run.\ndevice = \"cpu\"\n"),
    (
        "ARCHITECTURE.md",
        "# A\n\n## Invariants\n\n- Nothing leaks: `host/core/src/lib.rs::nothing_leaks`.\n",
    ),
];

/// What makes the tree bad: the check, a file, its new text, and the place of the finding.
const BAD: [(&str, &str, &str, &str); 8] = [
    (
        "layers",
        "host/core/Cargo.toml",
        "[package]\nname = \"hypercast-core\"\n\n[dependencies]\nhypercast-serve = \"1\"\n",
        "host/core/Cargo.toml:5: `hypercast-core` may not use `hypercast-serve`; ",
    ),
    ("names", "host/serve/src/lib.rs", "\npub enum Row {}\n", "host/serve/src/lib.rs:2: "),
    ("tuples", "host/serve/src/lib.rs", "fn f(a: (u8, u8)) {}\n", "host/serve/src/lib.rs:1: "),
    ("width", "host/serve/src/lib.rs", "// LONG\n", "host/serve/src/lib.rs:1: "),
    ("prose", "host/serve/src/lib.rs", "/// Chooses.\nfn f() {}\n", "host/serve/src/lib.rs:1: "),
    ("keys", "hypercast.toml", "# Where.\ndevice = \"cpu\"\nseed = 1\n", "hypercast.toml:3: "),
    (
        "invariants",
        "host/core/src/lib.rs",
        "//! What every crate uses.\n",
        "ARCHITECTURE.md:5: `host/core/src/lib.rs` has no test `nothing_leaks`; ",
    ),
    ("size", "host/serve/src/lib.rs", "FILE", "host/serve/src/lib.rs:601: "),
];

fn write(root: &Path, path: &str, text: &str) {
    let file = root.join(path);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let text = text.replace("LONG", &"word ".repeat(25)).replace("FILE", &"// a\n".repeat(601));
    std::fs::write(file, text).unwrap();
}

/// A repository with the good tree, of which nothing is committed.
fn repository() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new("git").args(["init", "--quiet"]).current_dir(dir.path()).status();
    assert!(status.unwrap().success());
    for (path, text) in GOOD {
        write(dir.path(), path, text);
    }
    dir
}

/// Whether tidy passed, and what it printed.
fn tidy(root: &Path, args: &[&str]) -> (bool, String) {
    let xtask = Path::new(env!("CARGO_BIN_EXE_xtask"));
    let output = Command::new(xtask).arg("tidy").args(args).current_dir(root).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_good_tree_passes() {
    let dir = repository();
    let expected = format!("cargo xtask tidy: {} files, 0 findings\n", GOOD.len());
    assert_eq!(tidy(dir.path(), &[]), (true, expected));
}

#[test]
fn every_check_fails_on_a_tree_of_its_own() {
    for (check, path, text, place) in BAD {
        let dir = repository();
        write(dir.path(), path, text);
        let (passed, output) = tidy(dir.path(), &[]);
        assert!(!passed, "{check}: {output}");
        let lines: Vec<&str> = output.lines().collect();
        assert!(lines[0].starts_with(place), "{check}: {output}");
        assert_eq!(lines[1], format!("-- {check}: 1 findings"), "{output}");
        assert!(!tidy(dir.path(), &["--only", check]).0, "{check}");
        let others: Vec<&str> = BAD.map(|bad| bad.0).into_iter().filter(|c| *c != check).collect();
        assert!(tidy(dir.path(), &["--only", &others.join(",")]).0, "{check}");
    }
}
