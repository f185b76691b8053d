//! The processes of demo and benches: the installed `hypercast` program as an operator runs it, and
//! `nats-server`. The output of each goes to a log file of its own.
//!
//! No process outlives its owner: dropping one kills it by its id, and a stop asks it to end first.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use hypercast_core::shutdown::Shutdown;

use crate::error::{CommonErrors as _, Error, Result};

/// The time that a process has to end once it is asked to.
const GRACE: Duration = Duration::from_secs(60);

/// The time that `nats-server` has to become ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes of a log that an error quotes.
const TAIL_BYTES: usize = 2000;

/// `hypercast WORDS --config CONFIG`. The program is `$HYPERCAST`, or the `hypercast` beside this
/// executable.
///
/// # Errors
/// Neither exists.
pub fn hypercast(words: &[&str], config: &Path) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.args(words).arg("--config").arg(config).stdin(Stdio::null());
    Ok(command)
}

/// The program that [`hypercast`] runs.
///
/// # Errors
/// As those of [`hypercast`].
pub fn program() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("HYPERCAST") {
        return Ok(given.into());
    }
    let own = std::env::current_exe()
        .map_err(|error| Error::internal(format!("cannot find this program: {error}")))?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let beside = folder.join("hypercast");
    if beside.is_file() {
        return Ok(beside);
    }
    Err(Error::invalid(format!(
        "there is no `hypercast` in {}: build it with `cargo build -p hypercast` in the same \
         profile, or name it in $HYPERCAST",
        folder.display()
    )))
}

/// Running processes in the order in which they were started.
#[derive(Debug)]
pub struct ProcessGroup {
    /// The folder of their logs.
    logs: PathBuf,
    stop: Shutdown,
    running: Vec<ChildProcess>,
}

/// A process that runs until it is stopped; dropping it kills it.
#[derive(Debug)]
struct ChildProcess {
    name: String,
    child: Child,
    log: PathBuf,
    /// Whether its exit status counts once it is asked to stop: other programs use it otherwise.
    is_hypercast: bool,
}

impl ProcessGroup {
    /// An empty group whose logs go into the folder `logs`. `stop` interrupts its waits.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn new(logs: PathBuf, stop: Shutdown) -> Result<ProcessGroup> {
        std::fs::create_dir_all(&logs).map_err(Error::io(&logs))?;
        Ok(ProcessGroup { logs, stop, running: Vec::new() })
    }

    /// Runs `hypercast WORDS` to its end, with its standard error on ours.
    ///
    /// # Errors
    /// A command that fails; an interruption by `stop`.
    pub fn complete(&self, words: &[&str], config: &Path) -> Result<()> {
        let name = words.join(" ");
        let mut command = hypercast(words, config)?;
        let child = command.stdout(Stdio::null()).spawn().map_err(cannot_start(&name))?;
        let mut process = ChildProcess { name, child, log: PathBuf::new(), is_hypercast: true };
        loop {
            match process.ended()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let name = &process.name;
                    return Err(Error::internal(format!(
                        "`hypercast {name}` ended with {status}; its message is above"
                    )));
                }
                None => self.pause()?,
            }
        }
    }

    /// Runs `hypercast versions WORDS`: the table, or the reason for a refusal.
    ///
    /// # Errors
    /// A command that cannot be started.
    pub fn versions(
        &self,
        words: &[&str],
        config: &Path,
    ) -> Result<std::result::Result<String, String>> {
        let mut command = hypercast(&[&["versions"][..], words].concat(), config)?;
        let output = command.env("RUST_BACKTRACE", "0").output();
        let output = output.map_err(cannot_start("hypercast versions"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let is_success = output.status.success();
        Ok(if is_success { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
    }

    /// Runs `hypercast versions WORDS`, which must not be refused.
    ///
    /// # Errors
    /// A refusal.
    pub fn accepted(&self, words: &[&str], config: &Path) -> Result<()> {
        let refused = |why| Error::internal(format!("versions {}: {why}", words.join(" ")));
        self.versions(words, config)?.map(drop).map_err(refused)
    }

    /// Starts `hypercast WORDS`, which runs until the group is stopped.
    ///
    /// # Errors
    /// A process that cannot be started.
    pub fn start(&mut self, name: &str, words: &[&str], config: &Path) -> Result<()> {
        self.spawn(name, hypercast(words, config)?, true)
    }

    fn spawn(&mut self, name: &str, mut command: Command, is_hypercast: bool) -> Result<()> {
        let log = self.log(name);
        let file = File::create(&log).map_err(Error::io(&log))?;
        let both = file.try_clone().map_err(Error::io(&log))?;
        let child = command.stdin(Stdio::null()).stdout(file).stderr(both).spawn();
        let child = child.map_err(cannot_start(name))?;
        self.running.push(ChildProcess { name: name.to_owned(), child, log, is_hypercast });
        Ok(())
    }

    /// The log of a process.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Starts a NATS server with its files in `store`; returns its address.
    ///
    /// # Errors
    /// A server that is not in PATH or does not become ready.
    pub fn start_nats(&mut self, store: &Path) -> Result<String> {
        let failed = |error: std::io::Error| Error::internal(format!("no port for NATS: {error}"));
        let free = std::net::TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let port = free.local_addr().map_err(failed)?.port().to_string();
        drop(free);
        let mut command = Command::new("nats-server");
        command.args(["-js", "-a", "127.0.0.1", "-p", &port, "-sd"]).arg(store);
        self.spawn("nats-server", command, false)?;
        self.await_output("nats-server", "Server is ready", READY_WITHIN)?;
        Ok(format!("nats://127.0.0.1:{port}"))
    }

    /// Waits until a process has written `text`; returns the rest of that line.
    ///
    /// # Errors
    /// A process that ends or takes longer than `within`; an interruption by `stop`.
    pub fn await_output(&mut self, name: &str, text: &str, within: Duration) -> Result<String> {
        let until = Instant::now() + within;
        loop {
            if let Some(rest) = self.find_output(name, text)? {
                return Ok(rest);
            }
            self.check()?;
            if Instant::now() > until {
                return Err(Error::unreachable(format!(
                    "{name} has not written {text:?} within {within:?}; see {}",
                    self.log(name).display()
                )));
            }
            self.pause()?;
        }
    }

    /// The rest of the first line in which a process has written `text`, if it has.
    ///
    /// # Errors
    /// A log that cannot be read.
    pub fn find_output(&self, name: &str, text: &str) -> Result<Option<String>> {
        let path = self.log(name);
        let log = std::fs::read(&path).map_err(Error::io(&path))?;
        // The last line may still be incomplete.
        let end = log.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        let log = String::from_utf8_lossy(&log[..end]);
        let found = log.lines().find_map(|line| line.split_once(text));
        Ok(found.map(|(_, rest)| rest.trim().to_owned()))
    }

    /// Checks that all processes still run.
    ///
    /// # Errors
    /// A process that has ended, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        for process in &mut self.running {
            if let Some(status) = process.ended()? {
                return Err(process.failed(status));
            }
        }
        Ok(())
    }

    /// The resident memory of each process by name, in MiB.
    pub fn memory_mib(&self) -> Vec<(String, f64)> {
        let of = |process: &ChildProcess| (process.name.clone(), resident_mib(process.child.id()));
        self.running.iter().map(of).collect()
    }

    /// Asks all processes to stop, the last started first, and waits for each.
    ///
    /// # Errors
    /// Processes that did not end well; the others are stopped all the same.
    pub fn stop(&mut self) -> Result<()> {
        let mut failed = Vec::new();
        while let Some(process) = self.running.pop() {
            if let Err(error) = process.stop() {
                failed.push(error.to_string());
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(Error::internal(failed.join("; "))) }
    }

    fn pause(&self) -> Result<()> {
        if self.stop.is_requested() {
            return Err(Error::refused("stopped before its end"));
        }
        std::thread::sleep(POLL_INTERVAL);
        Ok(())
    }
}

impl ChildProcess {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(|error| Error::internal(format!("{}: {error}", self.name)))
    }

    fn failed(&self, status: ExitStatus) -> Error {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(TAIL_BYTES)..];
        Error::internal(format!(
            "{} ended with {status}; the end of its log ({}):\n{}",
            self.name,
            self.log.display(),
            String::from_utf8_lossy(tail).trim_end()
        ))
    }

    fn stop(mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            return Err(self.failed(status));
        }
        terminate(&self.child)?;
        let until = Instant::now() + GRACE;
        loop {
            match self.ended()? {
                Some(status) if status.success() || !self.is_hypercast => return Ok(()),
                Some(status) => return Err(self.failed(status)),
                None if Instant::now() > until => {
                    let name = &self.name;
                    return Err(Error::internal(format!(
                        "{name} did not stop within {GRACE:?}; it was killed"
                    )));
                }
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // Both do nothing if the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon on a free loopback port, with its log on our standard error.
#[derive(Debug)]
pub struct DaemonProcess {
    process: ChildProcess,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
}

impl DaemonProcess {
    /// Starts `hypercast serve` and waits until it is ready.
    ///
    /// # Errors
    /// A daemon that ends before it is ready; its reason is on standard error.
    pub fn start(config: &Path) -> Result<Self> {
        let mut child = hypercast(&["serve", "--listen", "127.0.0.1:0"], config)?
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot_start("the daemon"))?;
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped above");
        let name = "the daemon".to_owned();
        let process = ChildProcess { name, child, log: PathBuf::new(), is_hypercast: true };
        BufReader::new(stdout).read_line(&mut line).map_err(cannot_start("the daemon"))?;
        match line.trim().strip_prefix("listening on ") {
            Some(url) => Ok(Self { url: url.to_owned(), process }),
            None => {
                Err(Error::internal("the daemon ended before it was ready; its message is above"))
            }
        }
    }

    /// Its resident memory, in MiB.
    pub fn memory_mib(&self) -> f64 {
        resident_mib(self.process.child.id())
    }

    /// Asks it to stop and waits for its end.
    ///
    /// # Errors
    /// A daemon that did not end well.
    pub fn stop(self) -> Result<()> {
        self.process.stop()
    }
}

/// The resident memory of a process, in MiB; 0 where the system does not say.
pub fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

fn terminate(child: &Child) -> Result<()> {
    Command::new("kill").arg(child.id().to_string()).status().map_err(cannot_start("kill"))?;
    Ok(())
}

fn cannot_start(name: &str) -> impl Fn(std::io::Error) -> Error {
    let name = name.to_owned();
    move |error| Error::internal(format!("cannot start {name}: {error}"))
}
