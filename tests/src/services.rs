//! Processes of the system that a test starts, kills and starts again.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A process that can be ended and begun anew with the same arguments; dropping it kills the process.
pub struct Service {
    /// For messages.
    pub name: String,
    program: PathBuf,
    args: Vec<String>,
    dir: PathBuf,
    child: Option<Child>,
}

impl Service {
    /// Starts `program args` in `dir`; what it says goes to `dir/NAME.log`.
    pub fn start(name: &str, program: &Path, args: &[&str], dir: &Path) -> Service {
        let mut service = Service {
            name: name.into(),
            program: program.into(),
            args: args.iter().map(|arg| arg.to_string()).collect(),
            dir: dir.into(),
            child: None,
        };
        service.begin();
        service
    }

    /// Starts it, which must not be running.
    pub fn begin(&mut self) {
        assert!(self.child.is_none(), "{} runs", self.name);
        let log = |path: &Path| -> File {
            OpenOptions::new().create(true).append(true).open(path).expect("a log can be opened")
        };
        let path = self.log_path();
        let child = Command::new(&self.program)
            .args(&self.args)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log(&path))
            .stderr(log(&path))
            .spawn()
            .unwrap_or_else(|error| panic!("{} starts: {error}", self.name));
        self.child = Some(child);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            child.wait().expect("a child can be waited for");
        }
    }

    /// Asks it to stop (SIGTERM) and expects it to end well within so long.
    pub fn stop(&mut self, grace: Duration) {
        let mut child = self.child.take().unwrap_or_else(|| panic!("{} runs", self.name));
        let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(asked.is_ok_and(|status| status.success()), "{} can be asked to stop", self.name);
        let start = Instant::now();
        loop {
            match child.try_wait().expect("a child can be waited for") {
                Some(status) => {
                    assert!(status.success(), "{}: {status}\n{}", self.name, self.said());
                    return;
                }
                None if start.elapsed() > grace => {
                    let _ = child.kill();
                    panic!("{} did not stop within {grace:?}\n{}", self.name, self.said());
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Whether it runs, or ended by itself.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// The end of what it said.
    pub fn said(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.name))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `is` is true; `what` says what for, in the panic after `patience`.
pub fn wait_until(what: &str, patience: Duration, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A loopback port that is free now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}
