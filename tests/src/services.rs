//! Processes that a test starts, kills and restarts.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A process that can be stopped and started again with the same arguments. Dropping it kills it.
pub struct ServiceProcess {
    /// The name of the process in messages and of its log file.
    pub name: String,
    program: PathBuf,
    args: Vec<String>,
    dir: PathBuf,
    child: Option<Child>,
}

impl ServiceProcess {
    /// Starts `program args` in `dir`. Its output goes to `dir/NAME.log`.
    pub fn start(name: &str, program: &Path, args: &[&str], dir: &Path) -> ServiceProcess {
        let mut service = ServiceProcess {
            name: name.into(),
            program: program.into(),
            args: args.iter().map(|arg| arg.to_string()).collect(),
            dir: dir.into(),
            child: None,
        };
        service.begin();
        service
    }

    /// Starts the process again.
    ///
    /// # Panics
    /// It is still running.
    pub fn begin(&mut self) {
        assert!(self.child.is_none(), "{} is still running", self.name);
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

    /// Kills the process (SIGKILL).
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // This fails if the process has already ended.
            let _ = child.kill();
            child.wait().expect("a child can be waited for");
        }
    }

    /// Stops the process (SIGTERM).
    ///
    /// # Panics
    /// It does not end within `grace`, or ends with an error.
    pub fn stop(&mut self, grace: Duration) {
        let mut child = self.child.take().unwrap_or_else(|| panic!("{} is not running", self.name));
        let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(asked.is_ok_and(|status| status.success()), "{} can be asked to stop", self.name);
        let start = Instant::now();
        loop {
            match child.try_wait().expect("a child can be waited for") {
                Some(status) => {
                    assert!(status.success(), "{}: {status}\n{}", self.name, self.output());
                    return;
                }
                None if start.elapsed() > grace => {
                    let _ = child.kill();
                    panic!("{} did not stop within {grace:?}\n{}", self.name, self.output());
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Whether the process is running.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// The last 30 lines of its output.
    pub fn output(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.name))
    }
}

impl Drop for ServiceProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `is` returns true.
///
/// # Panics
/// It stays false for `patience`. The message contains `what`.
pub fn wait_until(what: &str, patience: Duration, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < patience, "waited longer than {patience:?} for: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Finds a loopback port that is free at the moment.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}
