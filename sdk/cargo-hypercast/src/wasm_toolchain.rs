//! Finds or installs a Rust compiler for `wasm32-unknown-unknown`.
//!
//! It tries, in this order: the active toolchain, if it has the target; `rustup target add`; and,
//! if rustup is missing or cannot reach its server, Debian's packages. Those contain a matching
//! compiler, cargo and source of the standard library.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::workspace::cargo;

/// The target of guests. It has no system interface.
pub const TARGET: &str = "wasm32-unknown-unknown";

const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "lld-19"];
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
// Without a limit, rustup can wait forever for a server that it cannot reach.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);

/// Where to get the compiler from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToolchainSource {
    /// rustup, or else debian
    Auto,
    /// The active toolchain; adds the Wasm target with rustup if it is missing
    Rustup,
    /// Debian's packages rustc-web, cargo-web, rust-web-src and lld-19
    Debian,
}

impl ToolchainSource {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Rustup => "rustup",
            Self::Debian => "debian",
        }
    }
}

/// A compiler that can build guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toolchain {
    /// The active toolchain.
    Rustup,
    /// The compiler of Debian's packages.
    Debian,
}

impl Toolchain {
    /// Finds a compiler, or installs what is missing and prints what it installs.
    ///
    /// # Errors
    /// No compiler is available. The message says what to install.
    pub fn ensure(source: ToolchainSource) -> Result<Self> {
        match source {
            ToolchainSource::Rustup => rustup(),
            ToolchainSource::Debian => debian(),
            ToolchainSource::Auto => rustup().or_else(|why| {
                say(&format!("{why:#}; trying Debian's packages instead"));
                debian()
            }),
        }
    }

    /// A name for the target folder: builds of two compilers must not share one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rustup => "rustup",
            Self::Debian => "debian",
        }
    }

    /// A cargo command that uses this compiler, regardless of the environment that the calling
    /// cargo has set up.
    pub fn cargo(self) -> Command {
        let mut command = match self {
            Self::Rustup => cargo(),
            Self::Debian => Command::new(DEBIAN_CARGO),
        };
        // Flags meant for native code may not work for Wasm.
        for name in
            ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "CARGO_BUILD_TARGET"]
        {
            command.env_remove(name);
        }
        if self == Self::Debian {
            for name in [
                "RUSTUP_TOOLCHAIN",
                "RUSTC_WRAPPER",
                "RUSTC_WORKSPACE_WRAPPER",
                "RUSTDOC",
                "CARGO",
                "LD_LIBRARY_PATH",
            ] {
                command.env_remove(name);
            }
            command.env("RUSTC", DEBIAN_RUSTC);
            // Allows the nightly flag -Zbuild-std. It works because the compiler and the library
            // source have the same version.
            command.env("RUSTC_BOOTSTRAP", "1");
            command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", "wasm-ld-19");
        }
        command
    }

    /// Further arguments that `cargo build` needs.
    pub fn build_args(self) -> &'static [&'static str] {
        match self {
            Self::Rustup => &[],
            Self::Debian => &["-Zbuild-std=std,panic_abort"],
        }
    }
}

fn rustup() -> Result<Toolchain> {
    if has_target()? {
        return Ok(Toolchain::Rustup);
    }
    say(&format!("plugins need the target {TARGET}: running `rustup target add {TARGET}`"));
    let mut child = Command::new("rustup")
        .args(["target", "add", TARGET])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot run rustup")?;
    let deadline = Instant::now() + RUSTUP_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("`rustup target add` did not finish within {} s", RUSTUP_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    ensure!(status.success() && has_target()?, "`rustup target add {TARGET}` failed");
    Ok(Toolchain::Rustup)
}

// Whether the compiler's folder for the target contains a standard library.
fn has_target() -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .context("cannot run rustc")?;
    ensure!(output.status.success(), "rustc does not know the target {TARGET}");
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let Ok(files) = std::fs::read_dir(folder) else {
        return Ok(false);
    };
    Ok(files.flatten().any(|f| f.file_name().to_string_lossy().starts_with("libstd-")))
}

fn debian() -> Result<Toolchain> {
    if installed(&DEBIAN_PACKAGES)? {
        return Ok(Toolchain::Debian);
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "there is no compiler for {TARGET} and no apt-get to install one: install rustup from \
         https://rustup.rs and run `rustup target add {TARGET}`"
    );
    let install =
        format!("apt-get install --yes --no-install-recommends {}", DEBIAN_PACKAGES.join(" "));
    ensure!(
        is_root()?,
        "plugins need Debian's compiler for {TARGET}. Run: sudo apt-get update && sudo {install}"
    );
    say(&format!("plugins need a compiler for {TARGET}: running `{install}` (once)"));
    // The existing package index may do even if the update fails.
    if let Err(error) = apt(&["update"]) {
        say(&format!("{error:#}; continuing with the existing package index"));
    }
    apt(&install.split(' ').skip(1).collect::<Vec<_>>())?;
    ensure!(
        installed(&DEBIAN_PACKAGES)?,
        "apt-get succeeded, but not all of these packages are installed: {}",
        DEBIAN_PACKAGES.join(", ")
    );
    Ok(Toolchain::Debian)
}

fn installed(packages: &[&str]) -> Result<bool> {
    let query =
        Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}\n"]).args(packages).output();
    let Ok(output) = query else { return Ok(false) };
    let states = String::from_utf8_lossy(&output.stdout);
    Ok(states.lines().filter(|state| *state == "installed").count() == packages.len())
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("cannot run id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

// Apt's output goes to stderr, because stdout is for the result of our own command.
fn apt(args: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run apt-get")?;
    if output.status.success() {
        return Ok(());
    }
    std::io::stderr().write_all(&output.stdout)?;
    bail!("apt-get {} failed", args.join(" "))
}

fn say(message: &str) {
    eprintln!("cargo hypercast: {message}");
}
