//! A Rust compiler for `wasm32-unknown-unknown`, found or installed.
//!
//! In order: the active toolchain, if it has the target; `rustup target add`; and
//! where rustup is missing or cannot reach its server, Debian's packages, which
//! hold a compiler, a cargo and the standard library's source that match.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::workspace::cargo;

/// What guests are built for: no system interface at all.
pub const TARGET: &str = "wasm32-unknown-unknown";

const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "lld-19"];
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
// A server that cannot be reached may never answer.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);

/// Where the compiler comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Route {
    /// The first of the others that works
    Auto,
    /// The active toolchain, with its target added if need be
    Rustup,
    /// Debian's packages rustc-web, cargo-web, rust-web-src and lld-19
    Debian,
}

/// A compiler that can build guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toolchain {
    /// The active one.
    Rustup,
    /// Debian's.
    Debian,
}

impl Toolchain {
    /// Finds a compiler, or installs what it lacks, and says so.
    pub fn ensure(route: Route) -> Result<Self> {
        match route {
            Route::Rustup => rustup(),
            Route::Debian => debian(),
            Route::Auto => rustup().or_else(|why| {
                say(&format!("{why:#}; turning to Debian's packages"));
                debian()
            }),
        }
    }

    /// Its name, for folders: the builds of two compilers do not mix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rustup => "rustup",
            Self::Debian => "debian",
        }
    }

    /// A cargo that uses this compiler, whatever the caller's cargo has put into the environment.
    pub fn cargo(self) -> Command {
        let mut command = match self {
            Self::Rustup => Command::new(cargo()),
            Self::Debian => Command::new(DEBIAN_CARGO),
        };
        // Flags for the host's compiler do not fit the guests'.
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
            // -Zbuild-std is a nightly flag; this compiler and its library source are of one version.
            command.env("RUSTC_BOOTSTRAP", "1");
            command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", "wasm-ld-19");
        }
        command
    }

    /// What `cargo build` needs besides the target.
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
            bail!("rustup got no answer within {} s", RUSTUP_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    ensure!(status.success() && has_target()?, "rustup could not add {TARGET}");
    Ok(Toolchain::Rustup)
}

// The standard library for the target lies where the compiler would look for it.
fn has_target() -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .context("cannot run rustc")?;
    ensure!(output.status.success(), "rustc does not know {TARGET}");
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
        "no {TARGET} and no apt-get: install the target with rustup"
    );
    let install =
        format!("apt-get install --yes --no-install-recommends {}", DEBIAN_PACKAGES.join(" "));
    ensure!(
        is_root()?,
        "plugins need Debian's compiler for {TARGET}. Run: sudo apt-get update && sudo {install}"
    );
    say(&format!("plugins need a compiler for {TARGET}: running `{install}` (once)"));
    // A mirror that fails half-way may still have left a usable index.
    if let Err(error) = apt(&["update"]) {
        say(&format!("{error:#}; going on with the index at hand"));
    }
    apt(&install.split(' ').skip(1).collect::<Vec<_>>())?;
    ensure!(
        installed(&DEBIAN_PACKAGES)?,
        "apt-get ended well, yet {} are not all there",
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

// Its talk goes to stderr: stdout is for the command's own answer.
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
