//! The daemon as a process of its own, as an operator runs it.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::error::{CommonErrors as _, Error, Result};

/// A running daemon; dropping it ends the process.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Where it listens: `http://127.0.0.1:PORT`.
    pub url: String,
}

impl Daemon {
    /// Starts `hypercast serve` on a free loopback port and waits until it is ready.
    ///
    /// # Errors
    /// A daemon that ends before it is ready; it has said why on standard error.
    pub fn start(config: &Path) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::invalid(format!("cannot start the daemon: {error}"));
        let program = crate::program::hypercast()?;
        let mut child = Command::new(program)
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().expect("piped above");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        match line.trim().strip_prefix("listening on ") {
            Some(url) => Ok(Self { url: url.to_owned(), child }),
            None => {
                let status = child.wait().map_err(failed)?;
                Err(Error::invalid(format!(
                    "the daemon ended before it was ready ({status}); see its message above"
                )))
            }
        }
    }

    /// What it has in memory now, in MiB; 0 where the system does not say.
    pub fn memory_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or(0.0) / 1024.0
    }

    /// Asks it to stop and waits for it.
    ///
    /// # Errors
    /// A daemon that did not end well.
    pub fn stop(mut self) -> Result<()> {
        let failed =
            |error: std::io::Error| Error::invalid(format!("cannot stop the daemon: {error}"));
        Command::new("kill").arg(self.child.id().to_string()).status().map_err(failed)?;
        let status = self.child.wait().map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::invalid(format!("the daemon ended with {status}"))),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After `stop` the process is gone and both calls do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
