//! The demo's processes: each is the `hypercast` binary as an operator starts it,
//! with all it says in a file of its own.
//!
//! None outlives the demo: what is dropped is killed by its process id, and a stop asks first. What a
//! process does is not known here.

use std::{
    ffi::OsStr,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::shutdown::Shutdown;

/// How long a process may take to stop once it is asked.
const GRACE: Duration = Duration::from_secs(60);

/// How long a server of others may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// How often a process is looked at while something is awaited of it.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Bytes of what a process said that an error repeats.
const TAIL_BYTES: usize = 2000;

/// All of them, in the order in which they were started.
#[derive(Debug)]
pub struct Fleet {
    program: PathBuf,
    /// Where what they say is kept.
    said: PathBuf,
    stop: Shutdown,
    running: Vec<Process>,
}

/// A process that runs until it is stopped; dropping it kills it.
#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
    said: PathBuf,
    /// Whether how it ends says how it went: other programs have other ways once they are asked to stop.
    ours: bool,
}

impl Fleet {
    /// None yet; what they say goes into the folder `said`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new(said: PathBuf, stop: Shutdown) -> Result<Fleet> {
        std::fs::create_dir_all(&said).map_err(Error::io(&said))?;
        let program = crate::program::hypercast()?;
        Ok(Fleet { program, said, stop, running: Vec::new() })
    }

    /// Runs `hypercast ARGS` to its end; it speaks for itself on standard error.
    ///
    /// # Errors
    /// A command that fails; being asked to stop.
    pub fn complete(&self, args: &[&OsStr]) -> Result<()> {
        let name = words(args);
        let mut command = Command::new(&self.program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().map_err(cannot_start(&name))?;
        let mut process = Process { name, child, said: PathBuf::new(), ours: true };
        loop {
            match process.ended()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let name = &process.name;
                    return Err(Error::invalid(format!(
                        "`hypercast {name}` ended with {status}; its message is above"
                    )));
                }
                None => self.pause()?,
            }
        }
    }

    /// Runs `hypercast ARGS` and gives whether it went well, and what it said.
    ///
    /// # Errors
    /// A command that cannot be started.
    pub fn ask(&self, args: &[&OsStr]) -> Result<(bool, String)> {
        let output = Command::new(&self.program)
            .args(args)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .output()
            .map_err(cannot_start(&words(args)))?;
        let said = if output.status.success() { &output.stdout } else { &output.stderr };
        Ok((output.status.success(), String::from_utf8_lossy(said).trim_end().to_owned()))
    }

    /// Starts `hypercast ARGS`, which runs until the fleet is stopped.
    ///
    /// # Errors
    /// A process that cannot be started.
    pub fn start(&mut self, name: &str, args: &[&OsStr]) -> Result<()> {
        let program = self.program.clone();
        self.start_program(name, &program, args)
    }

    /// The same with another program.
    ///
    /// # Errors
    /// A program that is missing.
    pub fn start_program(&mut self, name: &str, program: &Path, args: &[&OsStr]) -> Result<()> {
        let said = self.said.join(format!("{name}.log"));
        let file = File::create(&said).map_err(Error::io(&said))?;
        let both = file.try_clone().map_err(Error::io(&said))?;
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(file).stderr(both);
        let child = command.spawn().map_err(cannot_start(name))?;
        let ours = program == self.program;
        self.running.push(Process { name: name.to_owned(), child, said, ours });
        Ok(())
    }

    /// Starts a NATS server whose files are in `store`, and gives its address.
    ///
    /// # Errors
    /// A server that is not in PATH, or does not become ready.
    pub fn start_nats(&mut self, store: &Path) -> Result<String> {
        let failed = |error: std::io::Error| Error::invalid(format!("no port for NATS: {error}"));
        let free = std::net::TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let port = free.local_addr().map_err(failed)?.port().to_string();
        drop(free);
        let words = ["-js", "-a", "127.0.0.1", "-p", &port, "-sd"];
        let mut args: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
        args.push(store.as_os_str());
        self.start_program("nats-server", "nats-server".as_ref(), &args)?;
        self.await_word("nats-server", "Server is ready", READY_WITHIN)?;
        Ok(format!("nats://127.0.0.1:{port}"))
    }

    /// Waits until a process has said something, and gives the rest of that line.
    ///
    /// # Errors
    /// A process that ends before, or takes longer than `within`; being asked to stop.
    pub fn await_word(&mut self, name: &str, word: &str, within: Duration) -> Result<String> {
        let until = Instant::now() + within;
        loop {
            if let Some(rest) = self.after(name, word)? {
                return Ok(rest);
            }
            self.check()?;
            if Instant::now() > until {
                return Err(Error::invalid(format!(
                    "{name} has not said {word:?} within {within:?}; see {}",
                    self.said.join(format!("{name}.log")).display()
                )));
            }
            self.pause()?;
        }
    }

    /// Whether a process has said something already.
    ///
    /// # Errors
    /// What the file system says.
    pub fn has_said(&self, name: &str, word: &str) -> Result<bool> {
        self.after(name, word).map(|rest| rest.is_some())
    }

    /// The rest of the line in which a process said something.
    fn after(&self, name: &str, word: &str) -> Result<Option<String>> {
        let path = self.said.join(format!("{name}.log"));
        let said = std::fs::read(&path).map_err(Error::io(&path))?;
        // A line that is still being written has no end yet.
        let end = said.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        let whole = String::from_utf8_lossy(&said[..end]);
        let found = whole.lines().find_map(|line| line.split_once(word));
        Ok(found.map(|(_, rest)| rest.trim().to_owned()))
    }

    /// Looks whether all still run.
    ///
    /// # Errors
    /// One that has ended, with the last that it said.
    pub fn check(&mut self) -> Result<()> {
        for process in &mut self.running {
            if let Some(status) = process.ended()? {
                return Err(process.failed(status));
            }
        }
        Ok(())
    }

    /// What a process has in memory now, in MiB; 0 where the system does not say.
    pub fn memory_mib(&self) -> Vec<(String, f64)> {
        self.running
            .iter()
            .map(|process| (process.name.clone(), resident_mib(process.child.id())))
            .collect()
    }

    /// Asks all to stop, those that were started last first, and waits for each.
    ///
    /// # Errors
    /// Those that did not end well; the others are stopped all the same.
    pub fn stop(&mut self) -> Result<()> {
        let mut failed = Vec::new();
        while let Some(process) = self.running.pop() {
            if let Err(error) = process.stop() {
                failed.push(error.to_string());
            }
        }
        match failed.is_empty() {
            true => Ok(()),
            false => Err(Error::invalid(failed.join("; "))),
        }
    }

    fn pause(&self) -> Result<()> {
        if self.stop.is_requested() {
            return Err(Error::invalid("stopped before its end"));
        }
        std::thread::sleep(LOOK_EVERY);
        Ok(())
    }
}

impl Process {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(|error| Error::invalid(format!("{}: {error}", self.name)))
    }

    fn failed(&self, status: ExitStatus) -> Error {
        let said = std::fs::read(&self.said).unwrap_or_default();
        let tail = &said[said.len().saturating_sub(TAIL_BYTES)..];
        Error::invalid(format!(
            "{} ended with {status}; the last that it said ({}):\n{}",
            self.name,
            self.said.display(),
            String::from_utf8_lossy(tail).trim_end()
        ))
    }

    fn stop(mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            return Err(self.failed(status));
        }
        let pid = self.child.id().to_string();
        Command::new("kill").arg(pid).status().map_err(cannot_start("kill"))?;
        let until = Instant::now() + GRACE;
        loop {
            match self.ended()? {
                Some(status) if status.success() || !self.ours => return Ok(()),
                Some(status) => return Err(self.failed(status)),
                None if Instant::now() > until => {
                    let name = &self.name;
                    return Err(Error::invalid(format!(
                        "{name} did not stop within {GRACE:?}; it was killed"
                    )));
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Of a process that has ended both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cannot_start(name: &str) -> impl Fn(std::io::Error) -> Error {
    let name = name.to_owned();
    move |error| Error::invalid(format!("cannot start {name}: {error}"))
}

fn words(args: &[&OsStr]) -> String {
    let words: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    words.join(" ")
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
