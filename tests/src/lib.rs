//! What the black-box tests share: the binary, a small simulated world and a running daemon.
//!
//! `cargo verify` builds the binary and the components. Without them a test is
//! skipped, or fails in CI.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

pub mod commands;
pub mod guests;
pub mod local_registry;
pub mod secure;
pub mod services;

use hypercast_config::{Config, ExpertEntry, ExpertTraining, PluginLimits};
use hypercast_core::prerequisite::skip;
use hypercast_data::simulate;
use serde_json::{Value, json};

/// The `hypercast` binary in the folder of this test's own, where `cargo test --workspace` puts it.
pub fn binary() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let path = own.parent()?.parent()?.join("hypercast");
    path.is_file().then_some(path)
}

/// The folder in an environment variable that `cargo verify` sets.
fn components(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_dir())
}

/// What `cargo verify` builds for the black-box tests.
#[derive(Debug, Clone)]
pub struct Prerequisites {
    /// The `hypercast` binary.
    pub hypercast: PathBuf,
    /// The `hypercast-lab` binary.
    pub lab: PathBuf,
    /// The folder of the built plugins.
    pub plugins: PathBuf,
    /// The folder of the hostile guests.
    pub hostile: PathBuf,
}

/// The prerequisites of `test`; without them the test is skipped.
///
/// # Panics
/// The components are there and a binary is not; or they are missing where `CI` is `true`.
pub fn prerequisites(test: &str) -> Option<Prerequisites> {
    let guests = built_guests(test)?;
    let hypercast = binary().expect("`cargo verify` builds the hypercast binary");
    let lab = hypercast.with_file_name("hypercast-lab");
    assert!(lab.is_file(), "`cargo verify` builds the hypercast-lab binary");
    Some(Prerequisites { hypercast, lab, plugins: guests.plugins, hostile: guests.hostile })
}

/// The folders of built guests.
#[derive(Debug, Clone)]
pub struct BuiltGuests {
    /// The plugins.
    pub plugins: PathBuf,
    /// The hostile guests.
    pub hostile: PathBuf,
}

/// The folders of built guests; without them the test is skipped.
pub fn built_guests(test: &str) -> Option<BuiltGuests> {
    let found = components("HYPERCAST_PLUGINS").zip(components("HYPERCAST_HOSTILE"));
    if found.is_none() {
        skip(test, "`cargo verify` builds the plugins and hostile guests that it needs");
    }
    found.map(|(plugins, hostile)| BuiltGuests { plugins, hostile })
}

/// Simulates a world in `dir/data` and returns a configuration for it with a very small FM.
pub fn world(dir: &Path, requests: usize, surfaces: usize) -> Config {
    let options = simulate::SimulateOptions {
        into: dir.join("data"),
        users: 200,
        items: 200,
        requests,
        surfaces,
        seed: 5,
    };
    simulate::simulate(&options).expect("a world can be simulated");
    small_config()
}

/// A configuration with a very small FM.
pub fn small_config() -> Config {
    let mut config = Config {
        expert_training: ExpertTraining { epochs: 1, ..ExpertTraining::default() },
        // Experts are as large as beside a large FM.
        plugin_limits: PluginLimits {
            memory_mib: 32,
            max_flops_share: 10.0,
            ..PluginLimits::default()
        },
        ..Config::default()
    };
    config.fm.dim = 32;
    config.fm.qk_dim = 16;
    config.fm.v_dim = 16;
    config.fm.max_history = 32;
    config.logs.skip_share = 0.1;
    config
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder can be made");
    for entry in std::fs::read_dir(from).expect("it is a folder") {
        let entry = entry.expect("it can be read");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a file can be copied");
        }
    }
}

/// Writes a configuration of the folder `from` to its copy `to`, and makes its absolute paths point
/// there.
pub fn rebase(config: &Config, from: &Path, to: &Path) -> Config {
    let path = to.join("hypercast.toml");
    config.write(&path).expect("it can be written");
    let text = std::fs::read_to_string(&path).expect("it was written");
    let [from, to] = [from, to].map(|path| path.to_str().expect("a path in UTF-8"));
    std::fs::write(&path, text.replace(from, to)).expect("it can be written");
    Config::read(&path).expect("only its paths changed")
}

/// The value of a counter or gauge without labels in the text of `/metrics`.
pub fn metric(text: &str, name: &str) -> usize {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} is in {text}")).parse().expect("a whole number")
}

/// The entry of an expert in the configuration.
pub fn expert(name: &str, plugin: PathBuf, surfaces: &[&str]) -> ExpertEntry {
    ExpertEntry {
        name: name.into(),
        plugin,
        surfaces: surfaces.iter().map(|surface| surface.to_string()).collect(),
        without_tae: false,
        shadow: false,
        train_on: hypercast_config::TrainOn::All,
        limits: Default::default(),
        ne_limits: Default::default(),
    }
}

/// The body of `POST /v1/rank` for these items, at a fixed time, so that answers can be compared.
pub fn rank_body(user: u64, surface: &str, items: impl IntoIterator<Item = u64>) -> Value {
    let candidates: Vec<Value> = items.into_iter().map(|id| json!({ "id": id })).collect();
    let time_ms = 1_800_000_000_000_u64;
    json!({ "user": user, "surface": surface, "candidates": candidates, "time_ms": time_ms })
}

/// Runs the binary. Returns whether it succeeded, and its output.
pub fn run(binary: &Path, dir: &Path, args: &[&str]) -> (bool, String) {
    let output =
        Command::new(binary).args(args).current_dir(dir).output().expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

/// Runs the binary, expects it to succeed and returns its output.
pub fn run_well(binary: &Path, dir: &Path, args: &[&str]) -> String {
    let (well, text) = run(binary, dir, args);
    assert!(well, "hypercast {args:?}: {text}");
    text
}

/// A daemon on a free loopback port. Dropping it kills the process.
pub struct TestDaemon {
    child: Child,
    url: String,
}

impl TestDaemon {
    /// Starts `hypercast serve` in `dir` and waits until it is ready.
    pub fn start(binary: &Path, dir: &Path) -> Self {
        Self::start_with(binary, dir, &[])
    }

    /// Like `start`, with further arguments.
    pub fn start_with(binary: &Path, dir: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(binary)
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(args)
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the daemon starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped above");
        BufReader::new(stdout).read_line(&mut line).expect("its first line is read");
        let url = line.trim().strip_prefix("listening on ").expect("it became ready").to_owned();
        Self { child, url }
    }

    /// Tells the daemon to reload its configuration (SIGHUP).
    pub fn hang_up(&self) {
        let asked = Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status();
        assert!(asked.expect("kill runs").success(), "the daemon can be signalled");
    }

    /// The URL on which the daemon listens, such as `http://127.0.0.1:8570`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The resident memory of the daemon, in MiB; 0 if the system does not report it.
    pub fn memory_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or(0.0) / 1024.0
    }

    /// POSTs a body. Returns the status and the JSON response.
    pub fn post(&self, route: &str, body: &str) -> (u16, Value) {
        let request =
            agent().post(format!("{}{route}", self.url)).header("content-type", "application/json");
        let mut response = request.send(body).expect("the daemon answers");
        (response.status().as_u16(), response.body_mut().read_json().expect("the answer is JSON"))
    }

    /// POSTs a body with a deadline header, in milliseconds. Returns the status, the JSON response,
    /// and whether there is a `retry-after` header.
    pub fn post_within(&self, route: &str, body: &str, left_ms: &str) -> (u16, Value, bool) {
        let request = agent()
            .post(format!("{}{route}", self.url))
            .header("content-type", "application/json")
            .header("hypercast-deadline-ms", left_ms);
        let mut response = request.send(body).expect("the daemon answers");
        let again = response.headers().contains_key("retry-after");
        let answer = response.body_mut().read_json().expect("the answer is JSON");
        (response.status().as_u16(), answer, again)
    }

    /// GETs a route. Returns the status and the body.
    pub fn get(&self, route: &str) -> (u16, String) {
        let mut response =
            agent().get(format!("{}{route}", self.url)).call().expect("the daemon answers");
        (
            response.status().as_u16(),
            response.body_mut().read_to_string().expect("the answer is text"),
        )
    }

    /// Stops the daemon (SIGTERM). Returns whether it exited without an error.
    pub fn stop(mut self) -> bool {
        let asked =
            Command::new("kill").arg(self.child.id().to_string()).status().expect("kill runs");
        asked.success() && self.child.wait().expect("it ends").success()
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        // After `stop` the process has ended, and both calls do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP client that returns responses with an error status like any other.
pub fn agent() -> ureq::Agent {
    ureq::Agent::new_with_config(ureq::Agent::config_builder().http_status_as_error(false).build())
}
