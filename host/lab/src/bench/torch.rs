//! PyTorch as a rival, eager and compiled: `torch_rival.py` runs as a child process on as many
//! threads as we have, and does one timed run for each line that it is sent.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use super::{BenchOptions, BenchReport, timing::Rival};

const SCRIPT: &str = include_str!("torch_rival.py");

/// After a run, OpenMP's threads spin for a while; our next run must not share the cores with them.
const SETTLE: Duration = Duration::from_millis(50);

/// A Python process with prepared cases.
pub struct Torch {
    child: Child,
    pipes: RefCell<Pipes>,
    /// Per case, whether it compiled.
    compiled: Vec<bool>,
}

struct Pipes {
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Torch {
    /// Starts Python and prepares the cases, which `torch_rival.py` describes. Without PyTorch the
    /// report says so and the result is `None`; a case that does not compile is measured eager
    /// only.
    pub fn start(
        options: &BenchOptions,
        report: &mut BenchReport,
        cases: &[Value],
    ) -> Option<Torch> {
        match Self::spawn(&options.python, cases) {
            Ok((torch, prepared)) => {
                report.version("torch", prepared["torch"].as_str().unwrap_or("unknown"));
                for (case, prepared) in cases.iter().zip(prepared["cases"].as_array()?) {
                    if let Some(why) = prepared["note"].as_str() {
                        let kind = &case["kind"];
                        report.note(format!("torch.compile of {kind}: {why}"));
                    }
                }
                Some(torch)
            }
            Err(why) => {
                report.note(format!("PyTorch: {why}; name a Python with torch by --python"));
                None
            }
        }
    }

    fn spawn(python: &str, cases: &[Value]) -> Result<(Torch, Value), String> {
        let failed = |error: std::io::Error| format!("cannot run {python:?} ({error})");
        let mut child = Command::new(python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut requests = child.stdin.take().expect("piped above");
        let mut answers = BufReader::new(child.stdout.take().expect("piped above"));
        let mut errors = child.stderr.take().expect("piped above");
        // Read to the end on a thread: autotuning writes more than a pipe holds.
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        let request = json!({ "threads": rayon::current_num_threads(), "cases": cases });
        let mut line = String::new();
        // A script that ended early explains itself on its error output.
        let sent = writeln!(requests, "{request}").and_then(|()| answers.read_line(&mut line));
        if sent.is_err() || line.is_empty() {
            drop(requests);
            let _ = child.wait();
            let text = errors.join().unwrap_or_default();
            return Err(text.lines().last().unwrap_or("it ended without a word").to_owned());
        }
        let prepared: Value = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let of_cases = prepared["cases"].as_array().map(Vec::as_slice).unwrap_or_default();
        let compiled = of_cases.iter().map(|case| case["compiled"] == true).collect();
        let pipes = RefCell::new(Pipes { requests, answers });
        Ok((Torch { child, pipes, compiled }, prepared))
    }

    /// The variants of a case; they take NaN seconds once the process has failed.
    pub fn rivals(&self, case: usize) -> Vec<Rival<'_>> {
        let rival = |name, variant: &'static str| Rival {
            name,
            run: Box::new(move |times_s| {
                times_s.push(self.run_s(case, variant).unwrap_or(f64::NAN));
                Ok(())
            }),
        };
        let mut all = vec![rival("PyTorch eager", "eager")];
        if self.compiled.get(case) == Some(&true) {
            all.push(rival("PyTorch compiled", "compiled"));
        }
        all
    }

    /// The seconds of one run.
    fn run_s(&self, case: usize, variant: &str) -> Option<f64> {
        let Pipes { requests, answers } = &mut *self.pipes.borrow_mut();
        let mut line = String::new();
        let answered =
            writeln!(requests, "{case} {variant}").and_then(|()| answers.read_line(&mut line));
        std::thread::sleep(SETTLE);
        answered.ok().and_then(|_| line.trim().parse().ok())
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
