//! The crates of this repository as a registry would offer them: packaged, and beside all that they
//! depend on, in a folder that stands for crates.io. So a test can install and build as on a
//! machine without the checkout.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The crates of the workspace that may be published, as `cargo metadata` describes them.
///
/// # Panics
/// Cargo fails.
pub fn published(checkout: &Path) -> Vec<Value> {
    let args = ["metadata", "--no-deps", "--offline", "--format-version=1"];
    let metadata = output(cargo(args).current_dir(checkout));
    let metadata: Value = serde_json::from_str(&metadata).expect("metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages is a list");
    packages.iter().filter(|package| package["publish"].is_null()).cloned().collect()
}

/// Packages every crate that may be published, and returns a `CARGO_HOME` below `into` whose
/// crates.io has these and their dependencies.
///
/// # Panics
/// A crate cannot be packaged, or a dependency is neither here nor to be fetched.
pub fn local_registry(checkout: &Path, into: &Path) -> PathBuf {
    let (crates, home, target) = (into.join("crates"), into.join("home"), into.join("target"));
    let vendor = ["vendor", "--locked", "--versioned-dirs", "--quiet"];
    output(cargo(vendor).arg(&crates).current_dir(checkout));
    let mut package = cargo(["package", "--no-verify", "--allow-dirty", "--target-dir"]);
    package.arg(&target);
    for published in published(checkout) {
        package.arg("--package").arg(published["name"].as_str().expect("a name"));
    }
    output(package.current_dir(checkout));
    let packaged = std::fs::read_dir(target.join("package")).expect("cargo made it");
    for file in packaged.map(|entry| entry.expect("it is listed").path()) {
        let Some(name) = file.file_stem().filter(|_| file.extension() == Some(OsStr::new("crate")))
        else {
            continue;
        };
        output(Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(&crates));
        // Of a crate that cargo itself has vendored this has the hashes of its files, too.
        let hash = output(Command::new("sha256sum").arg(&file));
        let hash = hash.split(' ').next().unwrap_or_default();
        let sums = format!(r#"{{"files": {{}}, "package": "{hash}"}}"#);
        let sums_file = crates.join(name).join(".cargo-checksum.json");
        std::fs::write(sums_file, sums).expect("the folder is there");
    }
    std::fs::create_dir_all(&home).expect("a folder is made");
    let config = format!(
        "[source.crates-io]\nreplace-with = \"local\"\n[source.local]\ndirectory = {crates:?}\n"
    );
    std::fs::write(home.join("config.toml"), config).expect("a file is written");
    home
}

/// The files that a package would have, by their paths in it.
///
/// # Panics
/// Cargo fails.
pub fn packaged_files(checkout: &Path, package: &str) -> Vec<String> {
    let mut command = cargo(["package", "--list", "--allow-dirty", "--offline", "--package"]);
    output(command.arg(package).current_dir(checkout)).lines().map(str::to_owned).collect()
}

/// What a command prints, if it succeeds.
fn output(command: &mut Command) -> String {
    let output = command.output().expect("the program runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The cargo that built this test.
fn cargo<const ARGS: usize>(args: [&str; ARGS]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(args);
    command
}
